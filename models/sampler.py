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
    Compute,
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
class Prefix:
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
class Rows:
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


@partial(jax.jit, static_argnames=("config", "compute"))
def prefill(params: Params, prompts: Array, lengths: Array, config: GemmaConfig, compute: Compute) -> Prefix:
    """Right-padded prompts -> their keys and values, and the hidden states to continue from.  QP, Q"""
    hidden, kv = forward(params, prompts, prompt_slots(lengths, prompts.shape[1]), config, compute)
    return Prefix(kv, last_slot(hidden, lengths), lengths)


def row_keys(seed: int, step: int, rows: Array) -> Array:  # B -> B keys
    """The random stream of each row of a step; `rows` are indices that do not depend on the layout."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


@partial(jax.jit, static_argnames=("config", "compute", "sampling"))
def decode(
    params: Params, prefix: Prefix, keys: Array, temperature: Array, limits: Array, config: GemmaConfig, compute: Compute,
    sampling: Sampling,
) -> Samples:  # fmt: skip
    """Up to `limits` <= C tokens a row; B = len(keys) rows in groups of B / Q. Ends as soon as every row has stopped."""
    params, short = unroll(params, config, compute), replace(sampling, width=-(-sampling.width // 2))
    rows = start(prefix, keys, temperature, limits, config, compute, short)  # half as many slots to read, until they are full
    rows, count = advance(params, rows, 0, to_keep(rows, sampling), config, compute, short, short.width)
    return drain(params, widen(rows, sampling.width), count, config, compute, sampling)


def sample(
    params: Params, prompts: Array, lengths: Array, keys: Array, temperature: Array, config: GemmaConfig, compute: Compute,
    sampling: Sampling,
) -> Samples:  # fmt: skip
    """`prefill`, then `decode`: QP, Q, B keys, B -> Samples."""
    prefix = prefill(params, prompts, lengths, config, compute)
    limits = jnp.full(keys.shape, sampling.width, jnp.int32)
    return decode(params, prefix, keys, temperature, limits, config, compute, sampling)


def start(
    prefix: Prefix, keys: Array, temperature: Array, limits: Array, config: GemmaConfig, compute: Compute, sampling: Sampling
) -> Rows:
    """Rows before their first token.  B keys, B, B"""
    (B,), Q, C = keys.shape, len(prefix.lengths), sampling.width
    at = compute.at
    zeros = partial(jnp.zeros, B, out_sharding=at("B"))
    grid = partial(jnp.zeros, (B, C), out_sharding=at("BC"))
    shape = (config.num_layers, B, config.num_kv_heads, C, config.head_dim)
    empty = jnp.zeros(shape, compute.dtype, out_sharding=at("LBKCH"))
    keys, temperature, limits = (jax.sharding.reshard(x, at("B")) for x in (keys, temperature, limits))
    return Rows(
        keys, temperature, repeat(prefix.lengths, B // Q, at), zeros(jnp.int32), limits, ~zeros(bool), zeros(bool),
        grid(jnp.int32), grid(jnp.float32), repeat(prefix.hidden, B // Q, at), unroll_kv(prefix.kv, compute),
        unroll_kv(KV(empty, empty, grid(jnp.int32) + FAR), compute),
    )  # fmt: skip


def drain(params: Params, rows: Rows, count: Array, config: GemmaConfig, compute: Compute, sampling: Sampling) -> Samples:
    """Decode until every row has stopped.

    Once no device has more than half of its rows alive, those go on in a batch of half the size, up to `halvings` times: on a
    device that computes, and does not only wait for memory, the last long completions then cost little.
    """
    half = to_keep(rows, sampling)
    rows, count = advance(params, rows, count, half, config, compute, sampling)
    samples = Samples(rows.tokens, rows.logprobs, rows.lengths, rows.truncated)
    if not half:
        return samples
    order = jnp.argsort(~by_device(rows.alive, compute), axis=1)  # of each device's rows, those alive first
    fewer = replace(sampling, halvings=sampling.halvings - 1)
    going = drain(params, take(rows, order[:, :half], compute), count, config, compute, fewer)
    done = jax.tree.map(lambda x: pick(x, order[:, half:], compute), samples)

    def merge(going, done):
        both = jnp.concatenate([by_device(going, compute), by_device(done, compute)], axis=1)
        both = lax.reshape(both, (len(rows.keys), *both.shape[2:]), out_sharding=compute.at("B" + "." * (both.ndim - 2)))
        return pick(both, jnp.argsort(order, axis=1), compute)

    return jax.tree.map(merge, going, done)


def to_keep(rows: Rows, sampling: Sampling) -> int:
    """With no more rows alive on a device than these, the batch halves; 0 if it does not."""
    count = rows_a_device(rows)
    return 0 if sampling.halvings == 0 or count % 2 else count // 2


def widen(rows: Rows, width: int) -> Rows:
    """The same rows with `width` slots: those that are there, then empty ones."""

    def pad(x, axis, value=0):
        sides = [(0, 0)] * x.ndim
        sides[axis] = (0, width - rows.tokens.shape[1])
        return jnp.pad(x, sides, constant_values=value)

    k, v = jax.tree.map(partial(pad, axis=3), rows.cache.k), jax.tree.map(partial(pad, axis=-2), rows.cache.v)
    cache = KV(k, v, pad(rows.cache.positions, 1, FAR))
    return replace(rows, tokens=pad(rows.tokens, 1), logprobs=pad(rows.logprobs, 1), cache=cache)


def advance(
    params: Params, rows: Rows, count: ArrayLike, keep: ArrayLike, config: GemmaConfig, compute: Compute, sampling: Sampling,
    until: int = FAR,
) -> tuple[Rows, Array]:  # fmt: skip
    """Decode until no device has more than `keep` rows alive; `count` is of steps, and says which slot is written.

    It goes no further than to `until`, where a ring that may not close yet is full.
    """
    uniform = random_numbers(rows.keys, sampling.width, compute.at)

    def going(carry):
        rows, count = carry
        return jnp.any(by_device(rows.alive, compute).sum(axis=1) > keep) & (count < until)

    def step(carry):
        rows, count = carry
        rows = next_token(params, rows, uniform, count % sampling.width, config, compute, sampling)
        return rows, count + 1

    return lax.while_loop(going, step, (rows, jnp.int32(count)))


def random_numbers(keys: Array, width: int, at) -> Array:  # B keys -> BC
    """The uniform number of each token that a row may draw: all at once, as a CPU is slow to hash a few at a time."""
    ages = jax.sharding.reshard(jnp.tile(jnp.arange(width), len(keys)), at("B"))
    numbers = jax.vmap(lambda key, age: jax.random.uniform(jax.random.fold_in(key, age)))(repeat(keys, width, at), ages)
    return lax.reshape(numbers, (len(keys), width), out_sharding=at("BC"))


def next_token(
    params: Params, rows: Rows, uniform: Array, slot: Array, config: GemmaConfig, compute: Compute, sampling: Sampling
) -> Rows:
    """Draw a token for every row, and run it through the model.  uniform BC: see `random_numbers`"""
    at = compute.at
    logits = vocab_logits(rows.hidden[:, None], params, config, compute)[:, 0]
    uniform = jnp.where(jnp.arange(sampling.width) == rows.lengths[:, None], uniform, 0.0).sum(axis=1)
    uniform, temperature = (jax.sharding.reshard(x, at("W")) for x in (uniform, rows.temperature))
    drawn = draw(logits, uniform, temperature, sampling, compute)
    tokens, logprobs = (jax.sharding.reshard(x, at("B")) for x in drawn)
    cache = replace(rows.cache, positions=write(rows.cache.positions, rows.starts + rows.lengths, slot, rows.alive))
    hidden, cache = forward_cached(params, tokens, slot, rows.prefix, cache, config, compute)
    stopped = jnp.isin(tokens, jnp.array(sampling.stop_ids))
    lengths = rows.lengths + rows.alive
    full = lengths >= rows.limits
    return replace(
        rows,
        tokens=write(rows.tokens, tokens, slot, rows.alive),
        logprobs=write(rows.logprobs, logprobs, slot, rows.alive),
        lengths=lengths,
        alive=rows.alive & ~stopped & ~full,
        truncated=rows.truncated | (rows.alive & ~stopped & full),
        hidden=hidden,
        cache=cache,
    )


def rows_a_device(rows: Rows) -> int:
    return len(rows.keys) // max(jax.sharding.get_abstract_mesh().size, 1)


def by_device(x: Array, compute: Compute, axis: int = 0) -> Array:
    """Rows as a grid of devices and their own rows.  B... -> [devices, rows of each, ...]"""
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    shape = (*x.shape[:axis], devices, x.shape[axis] // devices, *x.shape[axis + 1 :])
    return lax.reshape(x, shape, out_sharding=compute.at("." * axis + "B" + "." * (x.ndim - axis)))


def pick(x: Array, index: Array, compute: Compute, axis: int = 0) -> Array:
    """The rows of `index` [devices, n], numbered within each device: none moves between devices.  B... -> devices * n..."""
    x = jax.vmap(partial(jnp.take, axis=axis), in_axes=(axis, 0), out_axes=axis)(by_device(x, compute, axis), index)
    shape = (*x.shape[:axis], index.size, *x.shape[axis + 2 :])
    return lax.reshape(x, shape, out_sharding=compute.at("." * axis + "B" + "." * (x.ndim - axis - 2)))


def pick_kv(kv: KV, index: Array, compute: Compute) -> KV:
    axis = 0 if isinstance(kv.k, tuple) else 1  # behind L, where layers are stacked
    k, v = jax.tree.map(lambda x: pick(x, index, compute, axis), (kv.k, kv.v))
    return KV(k, v, pick(kv.positions, index, compute))


def take(rows: Rows, index: Array, compute: Compute) -> Rows:
    """The rows of `index` [devices, n], each with a copy of its prompt's keys and values."""
    group = len(rows.keys) // len(rows.prefix.positions)
    plain = jax.tree.map(lambda x: pick(x, index, compute), replace(rows, prefix=None, cache=None))
    return replace(plain, prefix=pick_kv(rows.prefix, index // group, compute), cache=pick_kv(rows.cache, index, compute))


def write(grid: Array, column: Array, slot: Array, alive: Array) -> Array:
    """`column` B into a slot of `grid` BC, where the row is alive: one that has stopped keeps what it wrote a ring ago."""
    old = lax.dynamic_slice_in_dim(grid, slot, 1, axis=1)
    return lax.dynamic_update_slice_in_dim(grid, jnp.where(alive[:, None], column[:, None], old), slot, axis=1)


def draw(logits: Array, uniform: Array, temperature: Array, sampling: Sampling, compute: Compute) -> tuple[Array, Array]:
    """One token a row from softmax(logits / temperature), cut to top-k and top-p; the best one where temperature is 0.

    WV, W, W -> tokens W, and their log-probabilities under the whole softmax, W: as `pick_logprobs` has them, from the
    exponentials that are there already. `uniform` lies in [0, 1).
    """
    greedy = temperature == 0
    heat = jnp.where(greedy, 1.0, temperature)[:, None]
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp((logits - top) / heat)
    total = weights.sum(axis=-1)
    if sampling.top_k:
        weights = keep_heaviest(weights, count_entries, jnp.full_like(uniform, sampling.top_k))
    if sampling.top_p < 1:
        weights = keep_heaviest(weights, lambda kept: kept.sum(axis=-1), sampling.top_p * weights.sum(axis=-1))
    weights = jnp.where(greedy[:, None], logits == top, weights)
    tokens, weight = invert_cdf(weights, jnp.where(greedy, 0.0, uniform), compute)
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


def invert_cdf(weights: Array, uniform: Array, compute: Compute) -> tuple[Array, Array]:
    """The entry at which the running sum of `weights` passes uniform * total, and its weight.  WV, W -> W, W

    A block is found first, then the entry in it.

    Never an entry of weight zero: the target stays below the total, and a running sum rises only at positive weights.
    """
    W, V = weights.shape
    size = block_size(V)
    blocks = lax.reshape(weights, (W, V // size, size), out_sharding=compute.at("WV."))
    sums = jax.sharding.reshard(blocks.sum(axis=-1), compute.at("W."))
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
