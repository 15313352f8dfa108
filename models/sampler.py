"""Sampling: one prefill of each prompt, shared by its group, then one compiled loop until every row has stopped.

Row b continues prompt b // G at its own temperature; 0 is greedy. The random number of a token depends on (seed, step, row,
position) alone, so a row's sample is the same on any number of devices and beside any neighbours. Drawing inverts the
cumulative distribution with one uniform a row, in two levels, instead of one Gumbel a vocabulary entry; top-k and top-p find
their threshold by bisection, so that nothing ever sorts 256,000 entries and the vocabulary may be cut over devices.

The log-probability that comes with each token is that of the full softmax at the row's temperature, as the trainer computes
it, whatever top-k and top-p left out. Left out: beams, penalties, speculation.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from models.gemma import (
    FAR,
    KV,
    ExecutionConfig,
    GemmaConfig,
    Params,
    forward,
    forward_cached,
    last_slot,
    prompt_slots,
    repeat,
    unroll,
    unroll_kv,
    vocab_logits,
)


@flax.struct.dataclass
class PrefillResult:
    """What decoding needs of the prompts."""

    kv: KV  # LQKPH
    hidden: Array  # QD: of each prompt's last token
    lengths: Array  # Q


@flax.struct.dataclass
class Samples:
    tokens: Array  # BC, the stop token included, padding behind it
    logprobs: Array  # BC, 0 behind the stop token
    lengths: Array  # B, the stop token counted
    truncated: Array  # B, no stop token within C


@flax.struct.dataclass
class DecodeState:
    """Completions under way. Tokens and cache are rings of C slots: all rows write to the same slot, whatever their age."""

    keys: Array  # B
    temperature: Array  # B
    starts: Array  # B, length of the prompt
    lengths: Array  # B, tokens so far
    limits: Array  # B, tokens at most
    alive: Array  # B
    truncated: Array  # B
    tokens: Array  # BC
    logprobs: Array  # BC
    hidden: Array  # BD, of the last token
    prefix: KV  # keys and values of Q prompts, each read by B / Q rows
    cache: KV  # and of the completions


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and how many at most."""

    width: int  # C
    stop_ids: tuple[int, ...]
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    halvings: int = 0  # times that the batch may halve as rows stop


@partial(jax.jit, static_argnames=("config", "execution"))
def prefill(params: Params, prompts: Array, lengths: Array, config: GemmaConfig, execution: ExecutionConfig) -> PrefillResult:
    """Right-padded prompts -> their keys and values, and the hidden states to continue from.  QP, Q"""
    hidden, kv = forward(params, prompts, prompt_slots(lengths, prompts.shape[1]), config, execution)
    return PrefillResult(kv, last_slot(hidden, lengths), lengths)


def row_keys(seed: int, step: int, state: Array) -> Array:  # B -> B keys
    """The random stream of each row of a step; `rows` are indices that do not depend on the layout."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(state)


@partial(jax.jit, static_argnames=("config", "execution", "sampling"))
def decode(
    params: Params,
    prefix: PrefillResult,
    keys: Array,
    temperature: Array,
    limits: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
) -> Samples:
    """Up to `limits` <= C tokens a row; B = len(keys) rows in groups of B / Q. Ends as soon as every row has stopped."""
    params, short = unroll(params, config, execution), replace(sampling, width=-(-sampling.width // 2))
    state = init_decode_state(
        prefix, keys, temperature, limits, config, execution, short
    )  # half as many slots to read, until they are full
    state, count = decode_until(params, state, 0, to_keep(state, sampling), config, execution, short, short.width)
    return decode_compacting(params, grow_slots(state, sampling.width), count, config, execution, sampling)


def sample(
    params: Params,
    prompts: Array,
    lengths: Array,
    keys: Array,
    temperature: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
) -> Samples:
    """`prefill`, then `decode`: QP, Q, B keys, B -> Samples."""
    prefix = prefill(params, prompts, lengths, config, execution)
    limits = jnp.full(keys.shape, sampling.width, jnp.int32)
    return decode(params, prefix, keys, temperature, limits, config, execution, sampling)


def init_decode_state(
    prefix: PrefillResult,
    keys: Array,
    temperature: Array,
    limits: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
) -> DecodeState:
    """Rows before their first token.  B keys, B, B"""
    (B,), Q, C = keys.shape, len(prefix.lengths), sampling.width
    at = execution.at
    zeros = partial(jnp.zeros, B, out_sharding=at("B"))
    grid = partial(jnp.zeros, (B, C), out_sharding=at("BC"))
    shape = (config.num_layers, B, config.num_kv_heads, C, config.head_dim)
    empty = jnp.zeros(shape, execution.dtype, out_sharding=at("LBKCH"))
    keys, temperature, limits = (jax.sharding.reshard(x, at("B")) for x in (keys, temperature, limits))
    return DecodeState(
        keys, temperature, repeat(prefix.lengths, B // Q, at), zeros(jnp.int32), limits, ~zeros(bool), zeros(bool),
        grid(jnp.int32), grid(jnp.float32), repeat(prefix.hidden, B // Q, at), unroll_kv(prefix.kv, execution),
        unroll_kv(KV(empty, empty, grid(jnp.int32) + FAR), execution),
    )  # fmt: skip


def decode_compacting(
    params: Params, state: DecodeState, count: Array, config: GemmaConfig, execution: ExecutionConfig, sampling: Sampling
) -> Samples:
    """Decode until every row has stopped.

    Once no device has more than half of its rows alive, those go on in a batch of half the size, up to `halvings` times: on a
    device that computes, and does not only wait for memory, the last long completions then cost little.
    """
    half = to_keep(state, sampling)
    state, count = decode_until(params, state, count, half, config, execution, sampling)
    samples = Samples(state.tokens, state.logprobs, state.lengths, state.truncated)
    if not half:
        return samples
    order = jnp.argsort(~by_device(state.alive, execution), axis=1)  # of each device's rows, those alive first
    fewer = replace(sampling, halvings=sampling.halvings - 1)
    going = decode_compacting(params, compact_batch(state, order[:, :half], execution), count, config, execution, fewer)
    done = jax.tree.map(lambda x: gather_rows(x, order[:, half:], execution), samples)

    def merge(going, done):
        both = jnp.concatenate([by_device(going, execution), by_device(done, execution)], axis=1)
        both = lax.reshape(both, (len(state.keys), *both.shape[2:]), out_sharding=execution.at("B" + "." * (both.ndim - 2)))
        return gather_rows(both, jnp.argsort(order, axis=1), execution)

    return jax.tree.map(merge, going, done)


def to_keep(state: DecodeState, sampling: Sampling) -> int:
    """With no more rows alive on a device than these, the batch halves; 0 if it does not."""
    count = rows_a_device(state)
    return 0 if sampling.halvings == 0 or count % 2 else count // 2


def grow_slots(state: DecodeState, width: int) -> DecodeState:
    """The same rows with `width` slots: those that are there, then empty ones."""

    def pad(x, axis, value=0):
        sides = [(0, 0)] * x.ndim
        sides[axis] = (0, width - state.tokens.shape[1])
        return jnp.pad(x, sides, constant_values=value)

    k, v = jax.tree.map(partial(pad, axis=3), state.cache.k), jax.tree.map(partial(pad, axis=-2), state.cache.v)
    cache = KV(k, v, pad(state.cache.positions, 1, FAR))
    return replace(state, tokens=pad(state.tokens, 1), logprobs=pad(state.logprobs, 1), cache=cache)


def decode_until(
    params: Params,
    state: DecodeState,
    count: ArrayLike,
    keep: ArrayLike,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
    until: int = FAR,
) -> tuple[DecodeState, Array]:
    """Decode until no device has more than `keep` rows alive; `count` is of steps, and says which slot is written.

    It goes no further than to `until`, where a ring that may not close yet is full.
    """
    uniform = random_numbers(state.keys, sampling.width, execution.at)

    def going(carry):
        state, count = carry
        return jnp.any(by_device(state.alive, execution).sum(axis=1) > keep) & (count < until)

    def step(carry):
        state, count = carry
        state = next_token(params, state, uniform, count % sampling.width, config, execution, sampling)
        return state, count + 1

    return lax.while_loop(going, step, (state, jnp.int32(count)))


def random_numbers(keys: Array, width: int, at) -> Array:  # B keys -> BC
    """The uniform number of each token that a row may draw: all at once, as a CPU is slow to hash a few at a time."""
    ages = jax.sharding.reshard(jnp.tile(jnp.arange(width), len(keys)), at("B"))
    numbers = jax.vmap(lambda key, age: jax.random.uniform(jax.random.fold_in(key, age)))(repeat(keys, width, at), ages)
    return lax.reshape(numbers, (len(keys), width), out_sharding=at("BC"))


def next_token(
    params: Params,
    state: DecodeState,
    uniform: Array,
    slot: Array,
    config: GemmaConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
) -> DecodeState:
    """Draw a token for every row, and run it through the model.  uniform BC: see `random_numbers`"""
    at = execution.at
    logits = vocab_logits(state.hidden[:, None], params, config, execution)[:, 0]
    uniform = jnp.where(jnp.arange(sampling.width) == state.lengths[:, None], uniform, 0.0).sum(axis=1)
    uniform, temperature = (jax.sharding.reshard(x, at("W")) for x in (uniform, state.temperature))
    drawn = draw(logits, uniform, temperature, sampling, execution)
    tokens, logprobs = (jax.sharding.reshard(x, at("B")) for x in drawn)
    cache = replace(state.cache, positions=write(state.cache.positions, state.starts + state.lengths, slot, state.alive))
    hidden, cache = forward_cached(params, tokens, slot, state.prefix, cache, config, execution)
    stopped = jnp.isin(tokens, jnp.array(sampling.stop_ids))
    lengths = state.lengths + state.alive
    full = lengths >= state.limits
    return replace(
        state,
        tokens=write(state.tokens, tokens, slot, state.alive),
        logprobs=write(state.logprobs, logprobs, slot, state.alive),
        lengths=lengths,
        alive=state.alive & ~stopped & ~full,
        truncated=state.truncated | (state.alive & ~stopped & full),
        hidden=hidden,
        cache=cache,
    )


def rows_a_device(state: DecodeState) -> int:
    return len(state.keys) // max(jax.sharding.get_abstract_mesh().size, 1)


def by_device(x: Array, execution: ExecutionConfig, axis: int = 0) -> Array:
    """Rows as a grid of devices and their own rows.  B... -> [devices, rows of each, ...]"""
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    shape = (*x.shape[:axis], devices, x.shape[axis] // devices, *x.shape[axis + 1 :])
    return lax.reshape(x, shape, out_sharding=execution.at("." * axis + "B" + "." * (x.ndim - axis)))


def gather_rows(x: Array, index: Array, execution: ExecutionConfig, axis: int = 0) -> Array:
    """The rows of `index` [devices, n], numbered within each device: none moves between devices.  B... -> devices * n..."""
    x = jax.vmap(partial(jnp.take, axis=axis), in_axes=(axis, 0), out_axes=axis)(by_device(x, execution, axis), index)
    shape = (*x.shape[:axis], index.size, *x.shape[axis + 2 :])
    return lax.reshape(x, shape, out_sharding=execution.at("." * axis + "B" + "." * (x.ndim - axis - 2)))


def gather_kv(kv: KV, index: Array, execution: ExecutionConfig) -> KV:
    axis = 0 if isinstance(kv.k, tuple) else 1  # behind L, where layers are stacked
    k, v = jax.tree.map(lambda x: gather_rows(x, index, execution, axis), (kv.k, kv.v))
    return KV(k, v, gather_rows(kv.positions, index, execution))


def compact_batch(state: DecodeState, index: Array, execution: ExecutionConfig) -> DecodeState:
    """The rows of `index` [devices, n], each with a copy of its prompt's keys and values."""
    group = len(state.keys) // len(state.prefix.positions)
    plain = jax.tree.map(lambda x: gather_rows(x, index, execution), replace(state, prefix=None, cache=None))
    return replace(
        plain, prefix=gather_kv(state.prefix, index // group, execution), cache=gather_kv(state.cache, index, execution)
    )


def write(grid: Array, column: Array, slot: Array, alive: Array) -> Array:
    """`column` B into a slot of `grid` BC, where the row is alive: one that has stopped keeps what it wrote a ring ago."""
    old = lax.dynamic_slice_in_dim(grid, slot, 1, axis=1)
    return lax.dynamic_update_slice_in_dim(grid, jnp.where(alive[:, None], column[:, None], old), slot, axis=1)


def draw(
    logits: Array, uniform: Array, temperature: Array, sampling: Sampling, execution: ExecutionConfig
) -> tuple[Array, Array]:
    """One token a row from softmax(logits / temperature), cut to top-k and top-p; the best one where temperature is 0.

    WV, W, W -> tokens W, and their log-probabilities under the whole softmax, W: as `pick_logprobs` has them, from the
    exponentials that are there already. `uniform` lies in [0, 1).
    """
    greedy = temperature == 0
    temperatures = jnp.where(greedy, 1.0, temperature)[:, None]
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp((logits - top) / temperatures)
    total = weights.sum(axis=-1)
    if sampling.top_k:
        weights = keep_heaviest(weights, count_entries, jnp.full_like(uniform, sampling.top_k))
    if sampling.top_p < 1:
        weights = keep_heaviest(weights, lambda kept: kept.sum(axis=-1), sampling.top_p * weights.sum(axis=-1))
    weights = jnp.where(greedy[:, None], logits == top, weights)
    tokens, weight = invert_cdf(weights, jnp.where(greedy, 0.0, uniform), execution)
    return tokens, jnp.log(weight / total)


def count_entries(weights: Array) -> Array:  # WV -> W
    return jnp.where(weights > 0, 1.0, 0.0).sum(axis=-1)  # a CPU adds floats faster than integers


def keep_heaviest(weights: Array, measure, target: Array) -> Array:
    """Zero all but the smallest set of heaviest entries whose `measure` reaches `target`; ties stay together.  WV, W -> WV

    Bisects the threshold over the bit patterns of float32, which order non-negative numbers: exact, no sort. Ends after 31
    passes, or as soon as every row meets its target exactly: what lies between the bounds then adds nothing to the measure.
    """

    def going(bounds):
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
    low, _, _ = lax.while_loop(going, halve, (low, low + 0x7F800000, jnp.full_like(target, -1)))
    return jnp.where(bits >= low[:, None], weights, 0.0)


def invert_cdf(weights: Array, uniform: Array, execution: ExecutionConfig) -> tuple[Array, Array]:
    """The entry at which the running sum of `weights` passes uniform * total, and its weight.  WV, W -> W, W

    A block is found first, then the entry in it.

    Never an entry of weight zero: the target stays below the total, and a running sum rises only at positive weights.
    """
    W, V = weights.shape
    size = block_size(V)
    blocks = lax.reshape(weights, (W, V // size, size), out_sharding=execution.at("WV."))
    sums = jax.sharding.reshard(blocks.sum(axis=-1), execution.at("W."))
    index, fraction, _ = find(sums, uniform)
    chosen = jnp.arange(V // size) == index[:, None]
    inside, _, weight = find(jnp.where(chosen[..., None], blocks, 0.0).sum(axis=1), fraction)
    return index * size + inside, weight


def find(weights: Array, uniform: Array) -> tuple[Array, Array, Array]:  # Wn, W -> W, W, W
    """The first index whose running sum exceeds uniform * total; how far into its weight that lies, in [0, 1); its weight."""
    below_one = jnp.float32(1 - 2**-24)
    running = jnp.cumsum(weights, axis=-1)
    target = jnp.minimum(uniform, below_one) * running[:, -1]
    index = (running <= target[:, None]).sum(axis=-1, dtype=jnp.int32)
    chosen = jnp.arange(weights.shape[-1]) == index[:, None]
    weight, end = (jnp.where(chosen, x, 0.0).sum(axis=-1) for x in (weights, running))
    return index, jnp.clip((target - (end - weight)) / weight, 0.0, below_one), weight


def block_size(V: int) -> int:
    """The largest divisor of V / 8 up to sqrt(V), so that blocks may be cut over up to eight devices; else of V."""
    count = V // 8 if V % 8 == 0 else V
    return max(d for d in range(1, math.isqrt(V) + 1) if count % d == 0)
