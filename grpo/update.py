"""One update: the log-probabilities of a batch, the loss on them, and the optimizer's step. Arrays in, arrays out.

Left out: where the batch comes from (rollout.py), the loss itself (loss.py), the loop (train.py).
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from grpo.config import Config
from grpo.loss import dapo_weights, dr_grpo_weights, grpo_loss, grpo_weights
from grpo.rollout import Batch
from models.gemma import ExecutionConfig, GemmaConfig, Params, axes, forward_group, shapes, token_logprobs
from models.lora import Adapters, attach, count_adapters, init_adapters, merged
from models.sharding import STORE

AGGREGATIONS = {"grpo": grpo_weights, "dapo": dapo_weights, "dr_grpo": dr_grpo_weights}


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds."""

    params: Any  # what is trained, in float32: Params, or Adapters
    opt_state: Any
    bad_updates: Array  # non-finite updates skipped so far
    bad_in_a_row: Array


def learning_rate(update: int, updates: int, config: Config) -> float:
    """Of an update, counted from 0, among `updates`: a linear warm-up to the peak, then a cosine to a tenth of it."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, updates - 1)
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    return peak * (0.55 + 0.45 * math.cos(math.pi * (update - warmup) / max(updates - warmup, 1)))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW, but for the learning rate: `train_step` multiplies by it."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_b1, config.adam_b2),
        optax.add_decayed_weights(config.weight_decay),
    )


def starting_point(weights: Params, model: GemmaConfig, dtype: str, config: Config) -> tuple[Params | Adapters, Params | None]:
    """What is trained, and the frozen base below it: the weights and None, or with LoRA fresh adapters and the weights."""
    if not config.lora_rank:
        return weights, None
    adapters = init_adapters(jax.random.key(config.seed), model, config.lora_names, config.lora_rank, STORE)
    return adapters, narrow(weights, dtype)


def policy(trained: Any, base: Params | None, config: Config) -> Params:
    """The weights of the policy: those that are trained, or the frozen base with the trained adapters on it."""
    return trained if base is None else attach(base, trained, config.lora_scale)


@partial(jax.jit, static_argnames="config")
def init_state(params: Any, config: Config) -> TrainState:
    return TrainState(params, make_optimizer(config).init(params), jnp.int32(0), jnp.int32(0))


@partial(jax.jit, static_argnames=("model", "execution"))
def sampling_params(params: Params, model: GemmaConfig, execution: ExecutionConfig) -> Params:
    """The weights as sampling wants them: adapters merged, cast once a step, laid out so that none moves while decoding."""
    return execution.use(merged(params), axes(model))


def logprobs_of(params: Params, part: Batch, model: GemmaConfig, execution: ExecutionConfig, config: Config) -> Array:  # -> BC
    """log π of every completion token, computed on packed rows."""
    packed, at = part.packed, execution.at
    hidden = forward_group(
        params, part.prompts, part.lengths, packed.tokens, model, execution, packed.positions, packed.segments
    )
    chunk = max(config.logprob_chunk // len(packed.tokens), 1)
    logprobs = token_logprobs(params, hidden, packed.tokens, config.temperature, model, execution, chunk)
    (B, C), Q = packed.slots.shape, len(part.prompts)
    logprobs = lax.reshape(logprobs, (Q, logprobs.size // Q), out_sharding=at("Q."))
    slots = lax.reshape(packed.slots, (Q, B // Q * C), out_sharding=at("Q."))
    return lax.reshape(jnp.take_along_axis(logprobs, slots, axis=1), (B, C), out_sharding=at("BC"))


def split(tree: Any, Q: int, parts: int, at) -> Any:
    """Every leaf [Q*g, ...] -> [parts, Q/parts*g, ...]: whole groups, each part spread over all devices."""

    def cut(x: Array) -> Array:
        rest = "." * (x.ndim - 1)
        x = lax.reshape(x, (Q // parts, parts, x.shape[0] // Q, *x.shape[1:]), out_sharding=at("Q.." + rest))
        x = jnp.moveaxis(x, 1, 0)
        return lax.reshape(x, (parts, x.shape[1] * x.shape[2], *x.shape[3:]), out_sharding=at(".B" + rest))

    return jax.tree.map(cut, tree)


def unsplit(x: Array, Q: int, at) -> Array:
    """[parts, B/parts, C] -> [B, C]: rows as they were before `split`."""
    parts, rows, C = x.shape
    x = lax.reshape(x, (parts, Q // parts, parts * rows // Q, C), out_sharding=at(".Q.."))
    return lax.reshape(jnp.moveaxis(x, 0, 1), (parts * rows, C), out_sharding=at("BC"))


@partial(jax.jit, static_argnames=("model", "execution", "config"))
def completion_logprobs(params: Params, batch: Batch, model: GemmaConfig, execution: ExecutionConfig, config: Config) -> Array:
    """log π of every completion token under `params`, at the sampling temperature: the reference's, or the old policy's.  BC"""
    execution = replace(execution, remat="none")  # there is no backward pass
    if config.microbatches == 1:
        return logprobs_of(params, batch, model, execution, config)
    Q, at = len(batch.prompts), execution.at
    _, picked = lax.scan(
        lambda _, part: (None, logprobs_of(params, part, model, execution, config)),
        None,
        split(batch, Q, config.microbatches, at),
    )
    return unsplit(picked, Q, at)


def batch_loss(
    trained: Any,
    base: Params | None,
    batch: Batch,
    weights: Array,
    model: GemmaConfig,
    execution: ExecutionConfig,
    config: Config,
) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch, or its share in that of a larger one, and its terms for each token.  ... -> scalar, {name: BC}"""
    logprobs = logprobs_of(policy(trained, base, config), batch, model, execution, config)
    old = lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    loss, terms = grpo_loss(
        logprobs, old, batch.ref_logprobs, batch.advantages, weights, beta=config.beta, epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high, sampler_logprobs=batch.sampler_logprobs if config.tis_cap else None,
        tis_cap=config.tis_cap,
    )  # fmt: skip
    return loss, terms | {"logprobs": lax.stop_gradient(logprobs), "old": old, "weight": weights}


@partial(jax.jit, static_argnames=("model", "execution", "config"), donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, rate: ArrayLike, model: GemmaConfig, execution: ExecutionConfig, config: Config,
    base: Params | None = None,
) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:  # fmt: skip
    """One update at the learning rate `rate`, of the weights, or with LoRA of the adapters on a `base`.

    Gives the state after it, figures of the batch, and the loss's terms of each token, BC. A non-finite loss or gradient leaves
    the state as it was, and is counted.
    """
    weights = AGGREGATIONS[config.aggregation](batch.mask)  # over the whole batch: parts only sum

    def gradient(part: Batch, weights: Array):
        part_loss = jax.value_and_grad(batch_loss, has_aux=True)
        return part_loss(state.params, base, part, weights, model, execution, config)

    def accumulate(total, part):
        (loss, terms), grads = gradient(*part)
        return jax.tree.map(jnp.add, total, (loss, grads)), terms

    if config.microbatches == 1:
        (loss, terms), grads = gradient(batch, weights)
    else:
        Q, at = len(batch.prompts), execution.at
        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
        (loss, grads), terms = lax.scan(accumulate, zero, split((batch, weights), Q, config.microbatches, at))
        terms = {name: unsplit(term, Q, at) for name, term in terms.items()}

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params: Any = state.params
    directions, opt_state = make_optimizer(config).update(grads, state.opt_state, params)
    params = jax.tree.map(lambda weight, direction: weight - rate * direction, params, directions)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    new = TrainState(params, opt_state, state.bad_updates + ~finite, jnp.where(finite, 0, state.bad_in_a_row + 1))
    stats = summarise(terms, batch) | {"loss": loss, "grad_norm": grad_norm, "bad_updates": new.bad_updates}
    return new, stats, terms


def summarise(terms: dict[str, Array], batch: Batch) -> dict[str, Array]:
    """Means and extremes of the loss's terms over completion tokens."""
    mask = batch.mask

    def mean(x: Array) -> Array:
        return jnp.where(mask > 0, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)

    def highest(x: Array) -> Array:
        return jnp.where(mask > 0, x, -jnp.inf).max()

    gap = jnp.abs(terms["old"] - batch.sampler_logprobs)
    stats = {
        "ratio/mean": mean(terms["ratio"]),
        "ratio/max": highest(terms["ratio"]),
        "ratio/min": -highest(-terms["ratio"]),
        "clip/low": mean(terms["clipped_low"]),
        "clip/high": mean(terms["clipped_high"]),
        "logp_diff_sampler_trainer/mean": mean(gap),
        "logp_diff_sampler_trainer/max": highest(gap),
    }
    if batch.ref_logprobs is not None:
        stats["kl/k3"] = mean(terms["kl"])
        stats["kl/k3_max"] = highest(terms["kl"])
        stats["kl/k1"] = mean(terms["logprobs"] - batch.ref_logprobs)
    return stats


def resting_bytes(model: GemmaConfig, dtype: str, config: Config) -> float:
    """Of float32 weights, moments and gradients, and of the frozen weights; of all devices together."""
    weights, width = sum(leaf.size for leaf in jax.tree.leaves(shapes(model))), jnp.dtype(dtype).itemsize
    if config.lora_rank:
        return width * weights + 16 * count_adapters(model, config.lora_names, config.lora_rank)
    return (16 + width * (config.beta > 0)) * weights


def choose_remat(
    execution: ExecutionConfig, model: GemmaConfig, batch: Batch, config: Config, devices: int, memory: float
) -> ExecutionConfig:
    """`auto` becomes `dots`, which keeps the results of products, where `memory`, bytes a device, has room; else `full`.

    Counted: what rests, what `dots` keeps for each slot of the packed rows, and a fifth of the memory for the rest. Compiled
    for v5e, Gemma 2 2B at 4,352 slots a chip needs 7.4 GiB by `full` and 12.9 by `dots`; this counts 14.3 for the latter.
    """
    if execution.remat != "auto":
        return execution
    slots = (batch.prompts.size + batch.packed.tokens.size) / config.microbatches
    products = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + 2 * model.embed_dim + 2 * model.mlp_dim
    kept = slots * model.num_layers * products * jnp.dtype(execution.dtype).itemsize
    needed = (resting_bytes(model, execution.dtype, config) + kept) / devices
    return replace(execution, remat="dots" if needed < 0.8 * memory else "full")


def device_memory(mesh: Mesh) -> float:
    """Bytes a device can hold; 0 where it does not say, as a CPU."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 0)


def narrow(params: Params, dtype: str) -> Params:
    """The weights in another dtype. Each leaf is given up for its successor, so that both trees are never there whole."""

    def cast(leaf: Array) -> Array:
        if leaf.dtype == dtype:
            return leaf
        other = leaf.astype(dtype)
        leaf.delete()
        return other

    return jax.tree.map(cast, params)


def frozen(params: Any, dtype: str) -> Any:
    """A copy of what is trained that no update touches, in the dtype of activations."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), params)
