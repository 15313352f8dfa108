"""Sampling: each prompt is prefilled once for its group, then one compiled loop decodes until every row has stopped.

Row b continues prompt b // G at its own temperature; 0 is greedy. The random number of a token depends on (seed, step, row,
position) alone, so a row's sample does not depend on the number of devices or on the other rows. A draw inverts the cumulative
distribution with one uniform number per row, in two levels, instead of one Gumbel variate per vocabulary entry. Top-k and top-p
find their threshold by bisection. So nothing sorts 256,000 entries, and the vocabulary may be sharded.

The log-probability that comes with each token is that of the full softmax at the row's temperature, as the trainer computes it,
whatever top-k and top-p exclude. Not supported: beam search, penalties, speculative decoding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from models.gemma import FAR, KV, ExecutionConfig, GemmaConfig, Params, forward, last_slot, prompt_slots, repeat, vocab_logits
from models.kv_cache import empty_kv, forward_cached, unroll, unroll_kv
from models.sharding import VMEM_OPTIONS, MeshJit


@flax.struct.dataclass
class PrefillResult:
    """What decoding needs to know of the prompts."""

    kv: KV  # k and v LQKPH, positions QP
    hidden: Array  # QD, of each prompt's last token
    lengths: Array  # Q


@flax.struct.dataclass
class Samples:
    """Completions, the stop token included and zeros after it."""

    tokens: Array  # BC
    logprobs: Array  # BC
    lengths: Array  # B, the stop token counted
    truncated: Array  # B, whether the row reached its limit without a stop token


@flax.struct.dataclass
class DecodeState:
    """Completions in progress.

    Tokens, log-probabilities and cache are rings of C slots: step i writes to slot i % C in all rows, whatever their ages.
    """

    keys: Array  # B, random keys
    temperature: Array  # B
    starts: Array  # B, lengths of the prompts
    lengths: Array  # B, tokens drawn so far
    limits: Array  # B, tokens at most
    alive: Array  # B, whether the row has not stopped yet
    truncated: Array  # B
    tokens: Array  # BC
    logprobs: Array  # BC
    hidden: Array  # BD, of the last token
    prefix: KV  # of the prompts: k and v LQKPH, positions QP; each prompt is read by B / Q rows
    cache: KV  # of the completions: k and v LBKCH, positions BC, FAR where nothing is written; local layers keep a window


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and how many at most."""

    width: int  # C
    stop_ids: tuple[int, ...]
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    halvings: int = 0  # how often the batch may halve as rows stop


@partial(MeshJit, static_argnames=("config", "execution"))
def prefill(params: Params, prompts: Array, lengths: Array, config: GemmaConfig, execution: ExecutionConfig) -> PrefillResult:
    """Keys and values of right-padded prompts QP with lengths Q, and the hidden states to continue from."""
    hidden, kv = forward(params, prompts, prompt_slots(lengths, prompts.shape[1]), config, execution)
    return PrefillResult(kv, last_slot(hidden, lengths), lengths)


def row_keys(seed: int, step: int, rows: Array) -> Array:  # B -> B keys
    """The random key of each row of a step. `rows` are indices that do not depend on how rows are laid out."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def sample(
    params: Params, prompts: Array, lengths: Array, keys: Array, temperature: Array, config: GemmaConfig,
    execution: ExecutionConfig, sampling: Sampling,
) -> Samples:  # fmt: skip
    """`prefill`, then `decode` of up to C tokens in each row.  QP, Q, B keys, B -> Samples"""
    prefilled = prefill(params, prompts, lengths, config, execution)
    limits = jnp.full(keys.shape, sampling.width, jnp.int32)
    return decode(params, prefilled, keys, temperature, limits, config, execution, sampling)


@partial(MeshJit, more=VMEM_OPTIONS, static_argnames=("config", "execution", "sampling"))
def decode(
    params: Params,
    prefilled: PrefillResult,
    keys: Array,
    temperature: Array,
    limits: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
) -> Samples:
    """Draw up to `limits` <= C tokens in each row, and end as soon as every row has stopped.  B keys, B, B -> Samples

    Row b continues prompt b // (B / Q). With unrolled layers attention reads all slots of the cache, filled or not. So decoding
    starts with half of the C slots then, and continues with all of them when these are full.
    """
    params = unroll(params, config, execution)
    first = replace(sampling, width=-(-sampling.width // 2)) if execution.unroll else sampling
    state, count = init_decode_state(prefilled, keys, temperature, limits, config, execution, first), jnp.int32(0)
    if execution.unroll:
        keep = rows_after_halving(state, sampling)
        state, count = decode_until(params, state, count, keep, config, execution, first, max_count=first.width)
        state = grow_slots(state, sampling.width, config, execution)
    return decode_compacting(params, state, count, config, execution, sampling)


def init_decode_state(
    prefilled: PrefillResult,
    keys: Array,
    temperature: Array,
    limits: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
) -> DecodeState:
    """Rows before their first token, all alive.  B keys, B, B"""
    (B,), Q, C = keys.shape, len(prefilled.lengths), sampling.width
    at = execution.at
    zeros = partial(jnp.zeros, B, out_sharding=at("B"))
    grid = partial(jnp.zeros, (B, C), out_sharding=at("BC"))
    keys, temperature, limits = (jax.sharding.reshard(x, at("B")) for x in (keys, temperature, limits))
    return DecodeState(
        keys, temperature, repeat(prefilled.lengths, B // Q, at), zeros(jnp.int32), limits, ~zeros(bool), zeros(bool),
        grid(jnp.int32), grid(jnp.float32), repeat(prefilled.hidden, B // Q, at), unroll_kv(prefilled.kv, config, execution),
        unroll_kv(empty_kv(B, C, config, execution), config, execution),
    )  # fmt: skip


def decode_compacting(
    params: Params, state: DecodeState, count: Array, config: GemmaConfig, execution: ExecutionConfig, sampling: Sampling
) -> Samples:
    """Decode until every row has stopped, in a batch that halves up to `halvings` times.

    When at most half of the rows on each device are alive, these are gathered into a batch of half the size and decoded by a
    recursive call; then all rows return to their order. The last long completions cost less that way wherever a decode step
    takes time in proportion to its rows, and not only to the weights it reads.
    """
    half = rows_after_halving(state, sampling)
    state, count = decode_until(params, state, count, half, config, execution, sampling)
    samples = Samples(state.tokens, state.logprobs, state.lengths, state.truncated)
    if half == 0:
        return samples
    order = jnp.argsort(~split_by_device(state.alive, execution), axis=1)  # the rows of each device, alive ones first
    rest = replace(sampling, halvings=sampling.halvings - 1)
    first = decode_compacting(params, compact_batch(state, order[:, :half], execution), count, config, execution, rest)
    second = jax.tree.map(lambda x: gather_rows(x, order[:, half:], execution), samples)  # these have all stopped

    def join(first, second):
        rows = jnp.concatenate([split_by_device(first, execution), split_by_device(second, execution)], axis=1)
        rows = lax.reshape(rows, (len(state.keys), *rows.shape[2:]), out_sharding=execution.at("B" + "." * (rows.ndim - 2)))
        return gather_rows(rows, jnp.argsort(order, axis=1), execution)  # the inverse permutation

    return jax.tree.map(join, first, second)


def rows_after_halving(state: DecodeState, sampling: Sampling) -> int:
    """The rows per device once the batch halves; 0 if it may not halve."""
    count = rows_per_device(state)
    return 0 if sampling.halvings == 0 or count % 2 else count // 2


def grow_slots(state: DecodeState, width: int, config: GemmaConfig, execution: ExecutionConfig) -> DecodeState:
    """The same rows with `width` slots: the present ones, then empty ones."""

    def pad(x: Array, like: Any, value: int = 0) -> Array:
        return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, like.shape, strict=True)], constant_values=value)

    rows = len(state.keys)
    like = jax.eval_shape(lambda: unroll_kv(empty_kv(rows, width, config, execution), config, execution))
    grid = jax.ShapeDtypeStruct((rows, width), "int32")
    k, v = jax.tree.map(pad, (state.cache.k, state.cache.v), (like.k, like.v))
    cache = KV(k, v, jax.tree.map(partial(pad, value=FAR), state.cache.positions, like.positions))
    return replace(state, tokens=pad(state.tokens, grid), logprobs=pad(state.logprobs, grid), cache=cache)


def decode_until(
    params: Params,
    state: DecodeState,
    count: ArrayLike,
    keep: ArrayLike,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
    max_count: int = FAR,
) -> tuple[DecodeState, Array]:
    """Decode until no device has more than `keep` rows alive, or until step `max_count`. -> the state, the new `count`

    `count` is the number of steps taken so far: step i writes to slot i % C.
    """
    uniform = random_numbers(state.keys, sampling.width, execution.at)

    def continues(carry):
        state, count = carry
        return jnp.any(split_by_device(state.alive, execution).sum(axis=1) > keep) & (count < max_count)

    def step(carry):
        state, count = carry
        state = next_token(params, state, uniform, count, config, execution, sampling)
        return state, count + 1

    return lax.while_loop(continues, step, (state, jnp.int32(count)))


def random_numbers(keys: Array, width: int, at) -> Array:  # B keys -> BC
    """The uniform number of each token that a row may draw; all at once, because a CPU is slow at hashing a few at a time."""
    ages = jax.sharding.reshard(jnp.tile(jnp.arange(width), len(keys)), at("B"))
    numbers = jax.vmap(lambda key, age: jax.random.uniform(jax.random.fold_in(key, age)))(repeat(keys, width, at), ages)
    return lax.reshape(numbers, (len(keys), width), out_sharding=at("BC"))


def next_token(
    params: Params,
    state: DecodeState,
    uniform: Array,
    count: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
) -> DecodeState:
    """Draw each row's next token by its `uniform` numbers BC and run it through the model; stopped rows keep what they have."""
    at = execution.at
    logits = vocab_logits(state.hidden[:, None], params, config, execution)[:, 0]
    uniform = jnp.where(jnp.arange(sampling.width) == state.lengths[:, None], uniform, 0.0).sum(axis=1)
    uniform, temperature = (jax.sharding.reshard(x, at("W")) for x in (uniform, state.temperature))
    drawn = draw(logits, uniform, temperature, sampling, execution)
    tokens, logprobs = (jax.sharding.reshard(x, at("B")) for x in drawn)
    positions, slot = state.starts + state.lengths, count % sampling.width

    def put(grid: Array) -> Array:
        return write_column(grid, positions, count % grid.shape[1], state.alive)

    cache = replace(state.cache, positions=jax.tree.map(put, state.cache.positions))
    hidden, cache = forward_cached(params, tokens, positions[:, None], count, state.prefix, cache, config, execution)
    stopped = jnp.isin(tokens, jnp.array(sampling.stop_ids))
    lengths = state.lengths + state.alive
    full = lengths >= state.limits
    return replace(
        state,
        tokens=write_column(state.tokens, tokens, slot, state.alive),
        logprobs=write_column(state.logprobs, logprobs, slot, state.alive),
        lengths=lengths,
        alive=state.alive & ~stopped & ~full,
        truncated=state.truncated | (state.alive & ~stopped & full),
        hidden=hidden,
        cache=cache,
    )


def write_column(grid: Array, column: Array, slot: Array, alive: Array) -> Array:  # BC, B, scalar, B -> BC
    """`grid` with `column` in a slot of the rows that are alive; what a stopped row wrote there a ring ago stays."""
    old = lax.dynamic_slice_in_dim(grid, slot, 1, axis=1)
    return lax.dynamic_update_slice_in_dim(grid, jnp.where(alive[:, None], column[:, None], old), slot, axis=1)


# Rows are rearranged within each device only: none moves to another one.


def rows_per_device(state: DecodeState) -> int:
    return len(state.keys) // max(jax.sharding.get_abstract_mesh().size, 1)


def split_by_device(x: Array, execution: ExecutionConfig, axis: int = 0) -> Array:
    """The rows along `axis` as two axes, devices and the rows of each.  B... -> [devices, rows per device, ...]"""
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    shape = (*x.shape[:axis], devices, x.shape[axis] // devices, *x.shape[axis + 1 :])
    return lax.reshape(x, shape, out_sharding=execution.at("." * axis + "B" + "." * (x.ndim - axis)))


def gather_rows(x: Array, index: Array, execution: ExecutionConfig, axis: int = 0) -> Array:
    """The rows at `index` [devices, n], which counts within each device.  B... -> [devices * n, ...]"""
    x = jax.vmap(partial(jnp.take, axis=axis), in_axes=(axis, 0), out_axes=axis)(split_by_device(x, execution, axis), index)
    shape = (*x.shape[:axis], index.size, *x.shape[axis + 2 :])
    return lax.reshape(x, shape, out_sharding=execution.at("." * axis + "B" + "." * (x.ndim - axis - 2)))


def gather_kv(kv: KV, index: Array, execution: ExecutionConfig) -> KV:
    """`gather_rows` of keys, values and positions."""
    axis = 0 if isinstance(kv.k, tuple) else 1  # stacked keys and values have L first
    k, v = jax.tree.map(lambda x: gather_rows(x, index, execution, axis), (kv.k, kv.v))
    return KV(k, v, jax.tree.map(lambda x: gather_rows(x, index, execution), kv.positions))


def compact_batch(state: DecodeState, index: Array, execution: ExecutionConfig) -> DecodeState:
    """The rows at `index` [devices, n], each with its own copy of its prompt's keys and values."""
    group = len(state.keys) // len(state.prefix.positions)
    rows = jax.tree.map(lambda x: gather_rows(x, index, execution), replace(state, prefix=None, cache=None))
    return replace(
        rows, prefix=gather_kv(state.prefix, index // group, execution), cache=gather_kv(state.cache, index, execution)
    )


# One draw from each row's distribution.


def draw(
    logits: Array, uniform: Array, temperature: Array, sampling: Sampling, execution: ExecutionConfig
) -> tuple[Array, Array]:
    """A token per row from softmax(logits / temperature), restricted by top-k, then top-p; the argmax where temperature is 0.

    WV, W, W -> tokens W, log-probabilities W. `uniform` is in [0, 1). The log-probabilities are those of the unrestricted
    softmax, as `pick_logprobs` defines them, computed from exponentials that are at hand.
    """
    greedy = temperature == 0
    temperatures = jnp.where(greedy, 1.0, temperature)[:, None]
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp((logits - top) / temperatures)
    total = weights.sum(axis=-1)
    if sampling.top_k:
        weights = keep_heaviest(weights, count_entries, jnp.full_like(uniform, sampling.top_k))
    if sampling.top_p < 1:
        share = max(sampling.top_p, 1e-30)  # a float32 that is smaller may count as 0, which nothing must reach
        weights = keep_heaviest(weights, lambda kept: kept.sum(axis=-1), share * weights.sum(axis=-1))
    weights = jnp.where(greedy[:, None], logits == top, weights)
    tokens, weight = invert_cdf(weights, jnp.where(greedy, 0.0, uniform), execution)
    return tokens, jnp.log(weight / total)


def count_entries(weights: Array) -> Array:  # WV -> W
    """How many entries of each row are above 0."""
    return jnp.where(weights > 0, 1.0, 0.0).sum(axis=-1)  # in floats, which a CPU adds faster than integers


def keep_heaviest(weights: Array, measure: Callable[[Array], Array], target: Array) -> Array:
    """Zero all entries but the smallest set of heaviest ones whose `measure` reaches `target`; ties stay together.  WV, W -> WV

    `measure` maps weights WV, some of them zeroed, to W. The threshold is found by bisection over the bit patterns of float32,
    which are ordered as the non-negative numbers are: exact, and without a sort. It takes at most 31 passes. It ends once every
    row meets its target exactly, because entries between the bounds then add nothing to the measure.
    """

    def continues(bounds):
        low, high, reached = bounds
        return jnp.any((high - low > 1) & (reached != target))

    def halve(bounds):
        low, high, reached = bounds  # measure(weights >= low) reaches the target, measure(weights >= high) does not
        middle = low + (high - low) // 2
        measured = measure(jnp.where(bits >= middle[:, None], weights, 0.0))
        enough = measured >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), jnp.where(enough, measured, reached)

    bits = lax.bitcast_convert_type(weights, jnp.int32)
    low = jnp.zeros_like(target, jnp.int32)
    infinity = low + 0x7F800000  # its bit pattern
    low, _, _ = lax.while_loop(continues, halve, (low, infinity, jnp.full_like(target, -1)))
    return jnp.where(bits >= low[:, None], weights, 0.0)


def invert_cdf(weights: Array, uniform: Array, execution: ExecutionConfig) -> tuple[Array, Array]:
    """The entry where the running sum of `weights` passes uniform * total, and its weight.  WV, W -> W, W

    Finds a block of entries first, then the entry inside it. An entry of weight zero is never found: the target is below the
    total, and the running sum increases at positive weights only.
    """
    W, V = weights.shape
    size = block_size(V)
    blocks = lax.reshape(weights, (W, V // size, size), out_sharding=execution.at("WV."))
    sums = jax.sharding.reshard(blocks.sum(axis=-1), execution.at("W."))
    index, fraction, _ = find_crossing(sums, uniform)
    chosen = jnp.arange(V // size) == index[:, None]
    inside, _, weight = find_crossing(jnp.where(chosen[..., None], blocks, 0.0).sum(axis=1), fraction)
    return index * size + inside, weight


def find_crossing(weights: Array, uniform: Array) -> tuple[Array, Array, Array]:  # Wn, W -> W, W, W
    """The first index whose running sum exceeds uniform * total, how far into its weight this lies (in [0, 1)), its weight."""
    below_one = jnp.float32(1 - 2**-24)
    running = jnp.cumsum(weights, axis=-1)
    target = jnp.minimum(uniform, below_one) * running[:, -1]
    index = (running <= target[:, None]).sum(axis=-1, dtype=jnp.int32)
    chosen = jnp.arange(weights.shape[-1]) == index[:, None]
    weight, end = (jnp.where(chosen, x, 0.0).sum(axis=-1) for x in (weights, running))
    return index, jnp.clip((target - (end - weight)) / weight, 0.0, below_one), weight


def block_size(V: int) -> int:
    """The largest divisor of V / 8 up to sqrt(V), so that blocks can be sharded over up to eight devices.

    Of V itself, where 8 does not divide it.
    """
    count = V // 8 if V % 8 == 0 else V
    return max(d for d in range(1, math.isqrt(V) + 1) if count % d == 0)
