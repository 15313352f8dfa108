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

from models.gemma import FAR, KV, ExecutionConfig, GemmaConfig, Params, unroll, unroll_kv
from models.sampler import (
    DecodeState,
    PrefillResult,
    Sampling,
    compact_batch,
    decode_until,
    gather_kv,
    gather_rows,
    init_decode_state,
    prefill,
    row_keys,
    rows_a_device,
)
from models.sharding import to_devices, to_host


@dataclass(frozen=True)
class Finished:
    """Samples that have just ended, on the host. `index` counts samples: prompt i has i * n to (i + 1) * n - 1."""

    index: np.ndarray  # k
    tokens: np.ndarray  # kC, the stop token included, padding behind it
    lengths: np.ndarray  # k
    truncated: np.ndarray  # k


@partial(jax.jit, static_argnames=("count", "config", "execution", "sampling"))
def empty_state(
    prefilled: PrefillResult, count: int, config: GemmaConfig, execution: ExecutionConfig, sampling: Sampling
) -> DecodeState:
    """`count` rows without work. The bank gives the shapes."""
    zeros = jnp.zeros(len(prefilled.lengths), jnp.int32, out_sharding=execution.at("B"))
    state = init_decode_state(prefilled, row_keys(0, 0, zeros), zeros.astype(jnp.float32), zeros, config, execution, sampling)
    share = rows_a_device(state)
    devices = len(zeros) // share
    copies = jnp.broadcast_to(jnp.arange(count // devices) % share, (devices, count // devices))
    return compact_batch(replace(state, alive=zeros > 0), jax.sharding.reshard(copies, execution.at("B.")), execution)


@partial(jax.jit, static_argnames=("execution",), donate_argnames="state")
def refill(
    state: DecodeState,
    prefilled: PrefillResult,
    source: Array,
    keys: Array,
    temperature: Array,
    limits: Array,
    execution: ExecutionConfig,
) -> DecodeState:
    """Start a new sample in the rows where `source` [devices, n], a prompt of the device's share of the bank, is not -1."""
    new = lax.reshape(source >= 0, (source.size,), out_sharding=execution.at("B"))
    source = jnp.maximum(source, 0)

    def choose(fresh, old, axis=0):
        others = [i for i in range(old.ndim) if i != axis]
        return jnp.where(jnp.expand_dims(new, others), fresh, old)

    axis = 0 if isinstance(state.prefix.k, tuple) else 1
    kv = gather_kv(unroll_kv(prefilled.kv, execution), source, execution)
    prefix = jax.tree.map(partial(choose, axis=axis), (kv.k, kv.v), (state.prefix.k, state.prefix.v))
    return replace(
        state,
        keys=choose(keys, state.keys),
        temperature=choose(temperature, state.temperature),
        starts=choose(gather_rows(prefilled.lengths, source, execution), state.starts),
        lengths=choose(0, state.lengths),
        limits=choose(limits, state.limits),
        alive=new | state.alive,
        truncated=~new & state.truncated,
        tokens=choose(0, state.tokens),
        logprobs=choose(0.0, state.logprobs),
        hidden=choose(gather_rows(prefilled.hidden, source, execution), state.hidden),
        prefix=KV(prefix[0], prefix[1], choose(kv.positions, state.prefix.positions)),
        cache=replace(state.cache, positions=choose(FAR, state.cache.positions)),
    )


@partial(jax.jit, static_argnames=("config", "execution", "sampling"), donate_argnames="state")
def decode_chunk(
    params: Params,
    state: DecodeState,
    count: Array,
    keep: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
):
    """Decode until every device has at most `keep` rows alive."""
    return decode_until(unroll(params, config, execution), state, count, keep, config, execution, sampling)


def sample_continuously(
    params: Params, prompts: np.ndarray, lengths: np.ndarray, temperature: np.ndarray, prefill_size: int, row_count: int,
    seed: int, step: int, config: GemmaConfig, execution: ExecutionConfig, sampling: Sampling, wanted: np.ndarray | None = None,
) -> Iterator[Finished]:  # fmt: skip
    """One sample of every prompt for every entry of `temperature` n, given out as they end.  prompts [count, P], count, n

    `bank_size` prompts are prefilled at a time, `row_count` samples are under way at most; both divide over the devices. The
    key of sample i is `row_keys(seed, step, i)`. Of all samples, those whose numbers are in `wanted` are drawn.
    """
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    share, samples = prefill_size // devices, len(temperature)
    wanted = np.arange(len(prompts) * samples) if wanted is None else np.sort(wanted)
    asked = np.unique(wanted // samples)  # the prompts that have a sample to draw
    owner = np.full((devices, row_count // devices), -1)  # which sample a row works on
    born = np.zeros_like(owner)  # the slot of its ring that holds its first token
    waiting: list[list[int]] = [[] for _ in range(devices)]  # samples of the bank that have no row yet, by device
    loaded, count, prefilled, state = 0, jnp.int32(0), None, None
    while True:
        while any(waiting) or loaded < len(asked):
            if not any(waiting):
                here = asked[
                    np.minimum(np.arange(loaded, loaded + prefill_size), len(asked) - 1)
                ]  # the last bank may repeat one
                prefilled = prefill(params, to_devices(prompts[here], "QP"), to_devices(lengths[here], "Q"), config, execution)
                for q, prompt in enumerate(asked[loaded : loaded + prefill_size]):
                    waiting[q // share] += wanted[wanted // samples == prompt].tolist()
                loaded += prefill_size
                state = state or empty_state(prefilled, row_count, config, execution, sampling)
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
            keys = row_keys(seed, step, to_devices(index, "B"))
            state = refill(
                state,
                prefilled,
                to_devices(source, "B."),
                keys,
                to_devices(temperature[index % samples], "B"),
                to_devices(limits, "B"),
                execution,
            )
        if (owner < 0).all():
            return
        idle = not any(waiting) and loaded >= len(asked)
        keep = 0 if idle else owner.shape[1] - max(owner.shape[1] // 4, 1)
        state, count = decode_chunk(params, state, count, jnp.int32(keep), config, execution, sampling)
        alive, tokens, ages, truncated = to_host((state.alive, state.tokens, state.lengths, state.truncated))
        ended = np.flatnonzero((owner.reshape(-1) >= 0) & ~alive)
        ring = (born.reshape(-1)[ended, None] + np.arange(sampling.width)) % sampling.width
        yield Finished(owner.reshape(-1)[ended], np.take_along_axis(tokens[ended], ring, axis=1), ages[ended], truncated[ended])
        owner.reshape(-1)[ended] = -1
