"""Continuous batching: samples of many prompts from a batch of fixed size. A row that has stopped starts the next sample.

Without it a batch waits for its longest row; with it the batch stays full until no sample is left to start. `prefill_size`
prompts are prefilled at a time. Each device holds its share of them, and its rows draw samples of this share only, so nothing
moves between devices. All rows write to the same slot of their rings, whatever their ages, so starting a sample changes no
shape. A sample depends on its own key alone: it is the one that `sampler.sample` draws, up to rounding.

`Scheduler` decides on the host which row draws which sample; `sample_continuously` applies its decisions to the arrays. Not
supported: streaming of single tokens.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from models.gemma import FAR, KV, ExecutionConfig, GemmaConfig, Params
from models.kv_cache import unroll, unroll_kv
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
    rows_per_device,
)
from models.sharding import MeshJit, to_devices, to_host


@dataclass(frozen=True)
class Finished:
    """Samples that have just ended, on the host. Prompt i has the samples i * n to (i + 1) * n - 1."""

    index: np.ndarray  # k, the samples' numbers
    tokens: np.ndarray  # kC, the stop token included, zeros after it
    lengths: np.ndarray  # k
    truncated: np.ndarray  # k


class Scheduler:
    """Which row draws which sample. Plain numpy, on the host, without the model.

    Rows are [devices, rows per device]. `next_prompts` queues the samples of the next prompts on the devices that hold these
    prompts, `start` gives queued samples to free rows of their device, `finish` frees the rows whose samples have ended.
    """

    def __init__(self, wanted: np.ndarray, per_prompt: int, prefill_size: int, row_count: int, width: int, devices: int):
        """`wanted` are the numbers of the samples to draw; each prompt has `per_prompt` numbers. `width` is C.

        `prefill_size` and `row_count` must be multiples of `devices`.
        """
        self.wanted = np.sort(wanted)
        self.per_prompt, self.prefill_size, self.width = per_prompt, prefill_size, width
        self.share = prefill_size // devices  # prefilled prompts per device
        self.unloaded = np.unique(self.wanted // per_prompt)  # prompts to prefill, those without a wanted sample left out
        self.loaded = self.unloaded[:0]  # prompts of the last prefill
        self.waiting: list[deque[int]] = [deque() for _ in range(devices)]  # samples of loaded prompts without a row
        self.samples = np.full((devices, row_count // devices), -1)  # the sample of each row; -1: the row is free
        self.first_slots = np.zeros_like(self.samples)  # the ring slot of each sample's first token

    @property
    def must_load(self) -> bool:
        """Whether no sample waits but some prompts are not prefilled yet."""
        return not any(self.waiting) and len(self.unloaded) > 0

    @property
    def can_start(self) -> bool:
        """Whether any sample has not been started."""
        return any(self.waiting) or len(self.unloaded) > 0

    @property
    def unfinished(self) -> bool:
        """Whether any sample has not ended."""
        return self.can_start or bool((self.samples >= 0).any())

    @property
    def keep(self) -> int:
        """Decoding pauses once at most so many rows are alive on each device: 3/4 of them while samples wait, then none."""
        rows = self.samples.shape[1]
        return rows - max(rows // 4, 1) if self.can_start else 0

    def next_prompts(self) -> np.ndarray:
        """The prompts to prefill next, [prefill_size]; where too few are left, the last one fills up."""
        prompts, self.unloaded = np.split(self.unloaded, [self.prefill_size])
        for i, prompt in enumerate(prompts):
            self.waiting[i // self.share] += self.wanted[self.wanted // self.per_prompt == prompt].tolist()
        self.loaded = np.pad(prompts, (0, self.prefill_size - len(prompts)), mode="edge")
        return self.loaded

    def start(self, count: int) -> np.ndarray:
        """Give free rows the samples that wait on their device; their first token is drawn in decode step `count`.

        -> [devices, rows per device]: the prompt of each row that starts, as an index into its device's share; -1 elsewhere
        """
        source = np.full_like(self.samples, -1)
        for device, row in zip(*np.nonzero(self.samples < 0), strict=True):
            if self.waiting[device]:
                sample = self.waiting[device].popleft()
                self.samples[device, row] = sample
                self.first_slots[device, row] = count % self.width
                source[device, row] = np.searchsorted(self.loaded, sample // self.per_prompt) - device * self.share
        return source

    def finish(self, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Free the rows that are not alive (B), devices one after another.

        -> those rows k, their samples k, and their ring slots kC in the order in which tokens were written
        """
        samples, first_slots = self.samples.reshape(-1), self.first_slots.reshape(-1)  # views
        rows = np.flatnonzero((samples >= 0) & ~alive)
        ended = samples[rows]
        samples[rows] = -1
        return rows, ended, (first_slots[rows, None] + np.arange(self.width)) % self.width


def sample_continuously(
    params: Params, prompts: np.ndarray, lengths: np.ndarray, temperature: np.ndarray, prefill_size: int, row_count: int,
    seed: int, step: int, config: GemmaConfig, execution: ExecutionConfig, sampling: Sampling, wanted: np.ndarray | None = None,
) -> Iterator[Finished]:  # fmt: skip
    """One sample of each prompt at each of n temperatures, yielded as they end.  [count, P], [count], [n]

    Sample i is one of prompt i // n, at temperature i % n; its key is `row_keys(seed, step, i)`. `wanted` names the samples to
    draw (default: all). `prefill_size` prompts are prefilled at a time and `row_count` rows decode at a time; both must be
    multiples of the number of devices.
    """
    per_prompt, devices = len(temperature), max(jax.sharding.get_abstract_mesh().size, 1)
    wanted = np.arange(len(prompts) * per_prompt) if wanted is None else wanted
    scheduler = Scheduler(wanted, per_prompt, prefill_size, row_count, sampling.width, devices)
    limits = np.full(row_count, sampling.width, np.int32)
    count, prefilled, state = jnp.int32(0), cast(Any, None), cast(Any, None)  # the first prefill comes before their first use
    while scheduler.unfinished:
        while scheduler.can_start:
            if scheduler.must_load:
                here = scheduler.next_prompts()
                prefilled = prefill(params, to_devices(prompts[here], "QP"), to_devices(lengths[here], "Q"), config, execution)
                if state is None:
                    state = empty_state(prefilled, row_count, config, execution, sampling)
            source = scheduler.start(int(count))
            if (source < 0).all():
                break
            index = np.maximum(scheduler.samples, 0).reshape(-1)
            state = refill(
                state, prefilled, to_devices(source, "B."), row_keys(seed, step, to_devices(index, "B")),
                to_devices(temperature[index % per_prompt], "B"), to_devices(limits, "B"), config, execution,
            )  # fmt: skip
        state, count = decode_chunk(params, state, count, jnp.int32(scheduler.keep), config, execution, sampling)
        alive, tokens, ages, truncated = to_host((state.alive, state.tokens, state.lengths, state.truncated))
        rows, ended, slots = scheduler.finish(alive)
        yield Finished(ended, np.take_along_axis(tokens[rows], slots, axis=1), ages[rows], truncated[rows])


@partial(jax.jit, static_argnames=("count", "config", "execution", "sampling"))
def empty_state(
    prefilled: PrefillResult, count: int, config: GemmaConfig, execution: ExecutionConfig, sampling: Sampling
) -> DecodeState:
    """`count` rows without work; `prefilled` gives the shapes."""
    zeros = jnp.zeros(len(prefilled.lengths), jnp.int32, out_sharding=execution.at("B"))
    state = init_decode_state(prefilled, row_keys(0, 0, zeros), zeros.astype(jnp.float32), zeros, config, execution, sampling)
    share = rows_per_device(state)
    devices = len(zeros) // share
    copies = jnp.broadcast_to(jnp.arange(count // devices) % share, (devices, count // devices))
    return compact_batch(replace(state, alive=zeros > 0), jax.sharding.reshard(copies, execution.at("B.")), execution)


@partial(jax.jit, static_argnames=("config", "execution"), donate_argnames="state")
def refill(
    state: DecodeState,
    prefilled: PrefillResult,
    source: Array,
    keys: Array,
    temperature: Array,
    limits: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
) -> DecodeState:
    """Start a new sample in each row whose `source` is not -1.  [devices, rows per device], B keys, B, B

    `source` is the index of a prompt in the device's share of `prefilled`. Keys, temperatures and limits of other rows are not
    read.
    """
    new = lax.reshape(source >= 0, (source.size,), out_sharding=execution.at("B"))
    source = jnp.maximum(source, 0)

    def choose(fresh, old, axis=0):
        others = [i for i in range(old.ndim) if i != axis]
        return jnp.where(jnp.expand_dims(new, others), fresh, old)

    axis = 0 if isinstance(state.prefix.k, tuple) else 1  # stacked keys and values have L first
    kv = gather_kv(unroll_kv(prefilled.kv, config, execution), source, execution)
    k, v = jax.tree.map(partial(choose, axis=axis), (kv.k, kv.v), (state.prefix.k, state.prefix.v))
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
        prefix=KV(k, v, choose(kv.positions, state.prefix.positions)),
        cache=replace(state.cache, positions=jax.tree.map(partial(choose, FAR), state.cache.positions)),
    )


@partial(MeshJit, static_argnames=("config", "execution", "sampling"), donate_argnames="state")
def decode_chunk(
    params: Params,
    state: DecodeState,
    count: Array,
    keep: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
) -> tuple[DecodeState, Array]:
    """Decode until every device has at most `keep` rows alive. -> the state, the new `count` of decode steps"""
    return decode_until(unroll(params, config, execution), state, count, keep, config, execution, sampling)
