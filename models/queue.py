"""Sampling for many prompts through a batch of fixed size: a row that has stopped makes room for the next sample.

Without it a batch waits for its longest row; with it the batch stays full until the queue is empty. Prompts are prefilled
Q at a time, into a bank; each device fills its own free rows from its own share of the bank, so that nothing moves between
devices. All rows write to the same slot of their ring whatever their age, so a refill changes no shape. A sample depends on
its own key alone, and is the same as `sampler.sample` gives, to rounding.

Left out: streaming single tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from models.gemma import FAR, KV, Compute, GemmaConfig, Params, unroll, unroll_kv
from models.sampler import Prefix, Rows, Sampling, advance, pick, pick_kv, prefill, row_keys, rows_a_device, start, take
from models.sharding import fetch, put


@dataclass(frozen=True)
class Finished:
    """Samples that have just ended, on the host. `index` counts samples: prompt i has i * n to (i + 1) * n - 1."""

    index: np.ndarray  # k
    tokens: np.ndarray  # kC, the stop token included, padding behind it
    lengths: np.ndarray  # k
    truncated: np.ndarray  # k


@partial(jax.jit, static_argnames=("count", "config", "compute", "sampling"))
def open_rows(bank: Prefix, count: int, config: GemmaConfig, compute: Compute, sampling: Sampling) -> Rows:
    """`count` rows without work. The bank gives the shapes."""
    zeros = jnp.zeros(len(bank.lengths), jnp.int32, out_sharding=compute.at("B"))
    rows = start(bank, row_keys(0, 0, zeros), zeros.astype(jnp.float32), zeros, config, compute, sampling)
    share = rows_a_device(rows)
    devices = len(zeros) // share
    copies = jnp.broadcast_to(jnp.arange(count // devices) % share, (devices, count // devices))
    return take(replace(rows, alive=zeros > 0), jax.sharding.reshard(copies, compute.at("B.")), compute)


@partial(jax.jit, static_argnames=("compute",), donate_argnames="rows")
def refill(rows: Rows, bank: Prefix, source: Array, keys: Array, temperature: Array, limits: Array, compute: Compute) -> Rows:
    """Start a new sample in the rows where `source` [devices, n], a prompt of the device's share of the bank, is not -1."""
    new = lax.reshape(source >= 0, (source.size,), out_sharding=compute.at("B"))
    source = jnp.maximum(source, 0)

    def choose(fresh, old, axis=0):
        others = [i for i in range(old.ndim) if i != axis]
        return jnp.where(jnp.expand_dims(new, others), fresh, old)

    axis = 0 if isinstance(rows.prefix.k, tuple) else 1
    kv = pick_kv(unroll_kv(bank.kv, compute), source, compute)
    prefix = jax.tree.map(partial(choose, axis=axis), (kv.k, kv.v), (rows.prefix.k, rows.prefix.v))
    return replace(
        rows,
        keys=choose(keys, rows.keys),
        temperature=choose(temperature, rows.temperature),
        starts=choose(pick(bank.lengths, source, compute), rows.starts),
        lengths=choose(0, rows.lengths),
        limits=choose(limits, rows.limits),
        alive=new | rows.alive,
        truncated=~new & rows.truncated,
        tokens=choose(0, rows.tokens),
        logprobs=choose(0.0, rows.logprobs),
        hidden=choose(pick(bank.hidden, source, compute), rows.hidden),
        prefix=KV(prefix[0], prefix[1], choose(kv.positions, rows.prefix.positions)),
        cache=replace(rows.cache, positions=choose(FAR, rows.cache.positions)),
    )


@partial(jax.jit, static_argnames=("config", "compute", "sampling"), donate_argnames="rows")
def work(params: Params, rows: Rows, count: Array, keep: Array, config: GemmaConfig, compute: Compute, sampling: Sampling):
    """Decode until every device has at most `keep` rows alive."""
    return advance(unroll(params, config, compute), rows, count, keep, config, compute, sampling)


def sample_queue(
    params: Params, prompts: np.ndarray, lengths: np.ndarray, temperature: np.ndarray, bank_size: int, row_count: int,
    seed: int, step: int, config: GemmaConfig, compute: Compute, sampling: Sampling, wanted: np.ndarray | None = None,
) -> Iterator[Finished]:  # fmt: skip
    """One sample of every prompt for every entry of `temperature` n, given out as they end.  prompts [count, P], count, n

    `bank_size` prompts are prefilled at a time, `row_count` samples are under way at most; both divide over the devices. The
    key of sample i is `row_keys(seed, step, i)`. Of all samples, those whose numbers are in `wanted` are drawn.
    """
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    share, samples = bank_size // devices, len(temperature)
    wanted = np.arange(len(prompts) * samples) if wanted is None else np.sort(wanted)
    asked = np.unique(wanted // samples)  # the prompts that have a sample to draw
    owner = np.full((devices, row_count // devices), -1)  # which sample a row works on
    born = np.zeros_like(owner)  # the slot of its ring that holds its first token
    waiting: list[list[int]] = [[] for _ in range(devices)]  # samples of the bank that have no row yet, by device
    loaded, count, bank, rows = 0, jnp.int32(0), None, None
    while True:
        while any(waiting) or loaded < len(asked):
            if not any(waiting):
                here = asked[np.minimum(np.arange(loaded, loaded + bank_size), len(asked) - 1)]  # the last bank may repeat one
                bank = prefill(params, put(prompts[here], "QP"), put(lengths[here], "Q"), config, compute)
                for q, prompt in enumerate(asked[loaded : loaded + bank_size]):
                    waiting[q // share] += wanted[wanted // samples == prompt].tolist()
                loaded += bank_size
                rows = rows or open_rows(bank, row_count, config, compute, sampling)
            source = np.full_like(owner, -1)
            for device, row in zip(*np.nonzero(owner < 0), strict=True):
                if waiting[device]:
                    owner[device, row] = waiting[device].pop(0)
                    source[device, row] = np.searchsorted(here, owner[device, row] // samples) - device * share
                    born[device, row] = int(count) % sampling.width
            if (source < 0).all():
                break
            index = np.maximum(owner, 0).reshape(-1)
            limits = np.full(row_count, sampling.width, np.int32)
            keys = row_keys(seed, step, put(index, "B"))
            rows = refill(
                rows, bank, put(source, "B."), keys, put(temperature[index % samples], "B"), put(limits, "B"), compute
            )  # fmt: skip
        if (owner < 0).all():
            return
        idle = not any(waiting) and loaded >= len(asked)
        keep = 0 if idle else owner.shape[1] - max(owner.shape[1] // 4, 1)
        rows, count = work(params, rows, count, jnp.int32(keep), config, compute, sampling)
        alive, tokens, ages, truncated = fetch((rows.alive, rows.tokens, rows.lengths, rows.truncated))
        ended = np.flatnonzero((owner.reshape(-1) >= 0) & ~alive)
        ring = (born.reshape(-1)[ended, None] + np.arange(sampling.width)) % sampling.width
        yield Finished(owner.reshape(-1)[ended], np.take_along_axis(tokens[ended], ring, axis=1), ages[ended], truncated[ended])
        owner.reshape(-1)[ended] = -1
