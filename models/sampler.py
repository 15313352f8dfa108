"""Sampling: one prefill of each prompt, shared by its group, then one compiled loop until every row has stopped.

Row b continues prompt b // G at its own temperature; 0 is greedy. The random number of a token depends on (seed, step, row,
position) alone, so a row's sample is the same on any number of devices and beside any neighbours. Drawing inverts the
cumulative distribution with one uniform a row, in two levels, instead of one Gumbel a vocabulary entry; top-k and top-p find
their threshold by bisection, so that nothing ever sorts 256,000 entries and the vocabulary may be cut over devices.

The log-probability that comes with each token is that of the full softmax at the row's temperature, as the trainer computes
it, whatever top-k and top-p left out. Left out: beams, penalties, speculation.
"""

import dataclasses
import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax

from models.gemma import (
    KV,
    Compute,
    GemmaConfig,
    Params,
    forward,
    forward_cached,
    last_slot,
    pick_logprobs,
    prompt_slots,
    repeat,
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


@partial(jax.jit, static_argnames=("config", "compute"))
def prefill(params: Params, prompts: Array, lengths: Array, config: GemmaConfig, compute: Compute) -> Prefix:
    """Right-padded prompts -> their keys and values, and the hidden states to continue from.  QP, Q"""
    hidden, kv = forward(params, prompts, prompt_slots(lengths, prompts.shape[1]), config, compute)
    return Prefix(kv, last_slot(hidden, lengths), lengths)


def row_keys(seed: int, step: int, rows: Array) -> Array:  # B -> B keys
    """The random stream of each row of a step; `rows` are indices that do not depend on the layout."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


@partial(jax.jit, static_argnames=("config", "compute", "width", "stop_ids", "top_k", "top_p"))
def decode(
    params: Params, prefix: Prefix, keys: Array, temperature: Array, config: GemmaConfig, compute: Compute, *,
    width: int, stop_ids: tuple[int, ...], top_k: int = 0, top_p: float = 1.0,
) -> Samples:  # fmt: skip
    """Up to C = `width` tokens a row; B = len(keys) rows in groups of B / Q. Ends as soon as every row has stopped."""
    (B,) = keys.shape
    Q = prefix.lengths.shape[0]
    at = compute.at
    zeros = partial(jnp.zeros, out_sharding=at("B"))
    positions = repeat(prefix.lengths, B // Q, at)[:, None] + jnp.arange(width)
    shape = (config.num_layers, B, config.num_kv_heads, width, config.head_dim)
    empty = jnp.zeros(shape, compute.dtype, out_sharding=at("LBKCH"))
    grid = partial(jnp.zeros, (B, width), out_sharding=at("BC"))
    samples = Samples(grid(jnp.int32), grid(jnp.float32), zeros(B, jnp.int32), zeros(B, bool))

    def running(carry):
        slot, alive, *_ = carry
        return (slot < width) & jnp.any(alive)

    def step(carry):
        slot, alive, hidden, cache, samples = carry
        logits = vocab_logits(hidden[:, None], params, config, compute)[:, 0]
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, slot)))(keys)
        uniform, heat = (jax.sharding.reshard(x, at("W")) for x in (uniform, temperature))
        tokens = draw(logits, uniform, heat, top_k, top_p, compute)
        logprobs = pick_logprobs(logits, tokens, heat)
        tokens, logprobs = (jax.sharding.reshard(x, at("B")) for x in (tokens, logprobs))
        samples = Samples(
            tokens=write(samples.tokens, jnp.where(alive, tokens, 0), slot),
            logprobs=write(samples.logprobs, jnp.where(alive, logprobs, 0.0), slot),
            lengths=samples.lengths + alive,
            truncated=samples.truncated,
        )
        for stop in stop_ids:
            alive = alive & (tokens != stop)
        hidden, cache = forward_cached(params, tokens, slot, prefix.kv, cache, config, compute)
        return slot + 1, alive, hidden, cache, samples

    alive = ~zeros(B, bool)
    carry = jnp.int32(0), alive, repeat(prefix.hidden, B // Q, at), KV(empty, empty, positions), samples
    _, alive, _, _, samples = lax.while_loop(running, step, carry)
    return dataclasses.replace(samples, truncated=alive)


def write(grid: Array, column: Array, slot: Array) -> Array:  # BC, B -> BC
    return lax.dynamic_update_slice_in_dim(grid, column[:, None], slot, axis=1)


def draw(logits: Array, uniform: Array, temperature: Array, top_k: int, top_p: float, compute: Compute) -> Array:
    """One token a row from softmax(logits / temperature), cut to top-k and top-p; the best one where temperature is 0.

    WV, W, W -> W. `uniform` lies in [0, 1).
    """
    greedy = (temperature == 0)[:, None]
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp((logits - top) / jnp.where(greedy, 1.0, temperature[:, None]))
    if top_k:
        weights = keep_heaviest(weights, lambda kept: kept.astype(bool).sum(axis=-1), jnp.full_like(uniform, top_k))
    if top_p < 1:
        weights = keep_heaviest(weights, lambda kept: kept.sum(axis=-1), top_p * weights.sum(axis=-1))
    weights = jnp.where(greedy, logits == top, weights)
    return invert_cdf(weights, jnp.where(temperature == 0, 0.0, uniform), compute)


def keep_heaviest(weights: Array, measure, target: Array) -> Array:
    """Zero all but the smallest set of heaviest entries whose `measure` reaches `target`; ties stay together.  WV, W -> WV

    Bisects the threshold over the bit patterns of float32, which order non-negative numbers: exact, 31 passes, no sort.
    """

    def halve(_, bounds):
        low, high = bounds  # measure(weights >= low) reaches the target, measure(weights >= high) does not
        middle = low + (high - low) // 2
        enough = measure(jnp.where(bits >= middle[:, None], weights, 0.0)) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bits = lax.bitcast_convert_type(weights, jnp.int32)
    low = jnp.zeros_like(target, jnp.int32)
    low, _ = lax.fori_loop(0, 31, halve, (low, low + 0x7F800000))
    return jnp.where(bits >= low[:, None], weights, 0.0)


def invert_cdf(weights: Array, uniform: Array, compute: Compute) -> Array:
    """The entry at which the running sum of `weights` passes uniform * total: a block first, then inside it.  WV, W -> W

    Never an entry of weight zero: the target stays below the total, and a running sum rises only at positive weights.
    """
    W, V = weights.shape
    size = block_size(V)
    blocks = lax.reshape(weights, (W, V // size, size), out_sharding=compute.at("WV."))
    sums = jax.sharding.reshard(blocks.sum(axis=-1), compute.at("W."))
    index, fraction = find(sums, uniform)
    chosen = jnp.arange(V // size) == index[:, None]
    inside, _ = find(jnp.where(chosen[..., None], blocks, 0.0).sum(axis=1), fraction)
    return index * size + inside


def find(weights: Array, uniform: Array) -> tuple[Array, Array]:  # Wn, W -> W, W
    """The first index whose running sum exceeds uniform * total, and how far into its weight that point lies, in [0, 1)."""
    below_one = jnp.float32(1 - 2**-24)
    running = jnp.cumsum(weights, axis=-1)
    target = jnp.minimum(uniform, below_one) * running[:, -1]
    index = (running <= target[:, None]).sum(axis=-1, dtype=jnp.int32)
    chosen = jnp.arange(weights.shape[-1]) == index[:, None]
    weight, end = (jnp.where(chosen, x, 0.0).sum(axis=-1) for x in (weights, running))
    return index, jnp.clip((target - (end - weight)) / weight, 0.0, below_one)


def block_size(V: int) -> int:
    """The largest divisor of V / 8 up to sqrt(V), so that blocks may be cut over up to eight devices; else of V."""
    count = V // 8 if V % 8 == 0 else V
    return max(d for d in range(1, math.isqrt(V) + 1) if count % d == 0)


def sample(
    params: Params, prompts: Array, lengths: Array, keys: Array, temperature: Array, config: GemmaConfig, compute: Compute, *,
    width: int, stop_ids: tuple[int, ...], top_k: int = 0, top_p: float = 1.0,
) -> Samples:  # fmt: skip
    """`prefill`, then `decode`: QP, Q, B keys, B -> Samples."""
    prefix = prefill(params, prompts, lengths, config, compute)
    return decode(params, prefix, keys, temperature, config, compute, width=width, stop_ids=stop_ids, top_k=top_k, top_p=top_p)
