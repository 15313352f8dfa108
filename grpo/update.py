"""One update: the log-probabilities of a batch, its loss, and the optimizer's step. Arrays in, arrays out.

    logπ  = completion_logprobs(params, batch)              under any weights: policy, old policy, reference
    loss  = grpo_loss(logπ, ...)                            grpo/loss.py
    state = train_step(state, batch, learning_rate)         gradient of the loss, AdamW

Parameters, gradients' sums and moments are float32; the forward and backward pass run in the dtype of the execution config.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from grpo.batch import Batch, split, unsplit
from grpo.loss import dapo_weights, dr_grpo_weights, grpo_loss, grpo_weights
from models.gemma import Adapted, ExecutionConfig, GemmaConfig, Params, axes, forward_group, split_table, token_logprobs
from models.lora import Adapters, adapter_axes, attach, attached, init_adapters
from models.sharding import STORE, VMEM_OPTIONS, MeshJit

AGGREGATIONS = {"grpo": grpo_weights, "dapo": dapo_weights, "dr_grpo": dr_grpo_weights}


@dataclass(frozen=True)
class UpdateConfig:
    """The settings that an update reads. `grpo.config.Config` has the same fields, with defaults, bounds and help."""

    beta: float
    unbiased_kl: bool
    epsilon_low: float
    epsilon_high: float
    tis_cap: float
    aggregation: str
    temperature: float
    logprob_chunk: int
    microbatches: int
    max_grad_norm: float
    adam_b1: float
    adam_b2: float
    weight_decay: float
    lora_rank: int
    lora_alpha: float
    lora_targets: str
    train_per_layer: bool

    @classmethod
    def of(cls, config: Any) -> "UpdateConfig":
        """The fields of this class, taken from a larger configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def lora_names(self) -> list[str]:
        """The projections that have adapters."""
        return self.lora_targets.split(",")

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds."""

    params: Any  # what is trained, in float32: Params, or Adapters
    opt_state: Any
    bad_updates: Array  # non-finite updates skipped so far
    bad_in_a_row: Array


def make_optimizer(config: UpdateConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate, which `train_step` multiplies in."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_b1, config.adam_b2),
        optax.add_decayed_weights(config.weight_decay),
    )


def starting_point(
    weights: Params, model: GemmaConfig, dtype: str, seed: int, config: UpdateConfig
) -> tuple[Params | Adapters, Params | None]:
    """(what is trained, the frozen base below it): the weights and None, or with LoRA fresh adapters and the weights.

    Without LoRA the base of a Gemma 4 is its table of per-layer embeddings, unless that is trained too. What is frozen and is
    not yet in `dtype` is cast, and the float32 numbers are freed.
    """
    if not config.lora_rank:
        if not freezes_table(model, config):
            return weights, None
        trained, table = split_table(weights)
        return trained, narrow(table, dtype)
    adapters = init_adapters(jax.random.key(seed), model, config.lora_names, config.lora_rank, STORE)
    return adapters, narrow(weights, dtype)


def policy(trained: Any, base: Params | None, config: UpdateConfig) -> Params:
    """The weights of the policy: the trained ones, those and the frozen table, or the frozen base with adapters attached."""
    if base is None:
        return trained
    if config.lora_rank:
        return attach(base, trained, config.lora_scale)
    return replace(trained, per_layer=replace(trained.per_layer, table=base.per_layer.table))


def freezes_table(model: GemmaConfig, config: UpdateConfig) -> bool:
    """Whether the table of per-layer embeddings is all that is frozen."""
    return bool(model.per_layer_dim and not config.train_per_layer and not config.lora_rank)


def reference_of(trained: Any, base: Params | None, dtype: str, config: UpdateConfig) -> Params:
    """The policy as it is now, as the frozen reference of the KL. With fresh adapters it is the base itself."""
    return base if base is not None and config.lora_rank else policy(frozen(trained, dtype), base, config)


def learnable(mask: Any, advantages: Any, weights: Params, reference: Params | None) -> bool:
    """Whether an update of the policy `weights` can learn anything from a batch.  BC, any shape

    It can if a token counts, and an advantage is not 0 or the KL pulls: there is a reference, and it is another policy.
    Otherwise the exact gradient is 0, and Adam would make full steps of its rounding.
    """
    if not (mask > 0).any():
        return False
    return bool((advantages != 0).any()) or (reference is not None and bool(another_policy(weights, reference)))


@jax.jit
def another_policy(weights: Params, reference: Params) -> Array:
    """Whether two policies differ. They are compared by their weights, in the dtype of the reference, in which both compute;
    adapters whose B is 0 are as none.  -> scalar, bool
    """

    def unlike(theirs: Any, mine: Any) -> Array:
        if not isinstance(mine, Adapted):
            return (mine.astype(theirs.dtype) != theirs).any()
        if not isinstance(theirs, Adapted):
            return unlike(theirs, mine.base) | (mine.b.astype(theirs.dtype) != 0).any()
        return unlike(theirs.base, mine.base) | unlike(theirs.a, mine.a) | unlike(theirs.b, mine.b)

    unlikes = jax.tree.map(unlike, reference, weights, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    return jnp.stack(jax.tree.leaves(unlikes)).any()


@partial(jax.jit, static_argnames="config")
def init_state(params: Any, config: UpdateConfig) -> TrainState:
    """The state before the first update."""
    return TrainState(params, make_optimizer(config).init(params), jnp.int32(0), jnp.int32(0))


def sampling_params(params: Params, model: GemmaConfig, execution: ExecutionConfig) -> Params:
    """Parameters for sampling: cast once a step, resharded so that no weight moves while decoding. Adapters stay apart.

    What is frozen has its dtype already; where it has its place too, as on one device, it is not copied.
    """
    moved = moved_params(params, model, execution)
    return jax.tree.map(lambda new, old: old if new is None else new, moved, params, is_leaf=lambda leaf: leaf is None)


@partial(jax.jit, static_argnames=("model", "execution"))
def moved_params(params: Params, model: GemmaConfig, execution: ExecutionConfig) -> Params:
    """`sampling_params`, with None for each weight that stays where it is."""
    adapted = attached(params)
    letters, mesh = axes(model), jax.sharding.get_abstract_mesh()
    if adapted:
        letters = attach(letters, adapter_axes(model, adapted), next(iter(adapted.values())).scale)

    def use(leaf: Array, letters: str) -> Array | None:
        frozen = ("J" not in letters) if adapted else letters == "VZ" and leaf.dtype != "float32"  # as what is trained
        placed = NamedSharding(mesh, execution.at(letters))
        in_place = mesh.size == 1 or placed.is_equivalent_to(jax.typeof(leaf).sharding, leaf.ndim)
        stays = frozen and in_place and leaf.dtype == execution.dtype
        return None if stays else execution.use(leaf, letters)

    return jax.tree.map(use, params, letters)


def logprobs_of(
    params: Params, batch: Batch, model: GemmaConfig, execution: ExecutionConfig, config: UpdateConfig
) -> Array:  # -> BC
    """log π of every completion token, computed on packed rows, at the sampling temperature."""
    packed, at = batch.packed, execution.at
    (B, C), Q, G = packed.slots.shape, len(batch.prompts), len(packed.slots) // batch.lengths.size
    owners = None if batch.lengths.size == Q else (packed.segments - 1) // G
    hidden = forward_group(
        params, batch.prompts, batch.lengths, packed.tokens, model, execution, packed.positions, packed.segments, owners
    )
    chunk = max(config.logprob_chunk // len(packed.tokens), 1)
    logprobs = token_logprobs(params, hidden, packed.tokens, config.temperature, model, execution, chunk)
    logprobs = lax.reshape(logprobs, (Q, logprobs.size // Q), out_sharding=at("Q."))
    slots = lax.reshape(packed.slots, (Q, B // Q * C), out_sharding=at("Q."))
    return lax.reshape(jnp.take_along_axis(logprobs, slots, axis=1), (B, C), out_sharding=at("BC"))


@partial(MeshJit, static_argnames=("model", "execution", "config"))
def completion_logprobs(
    params: Params, batch: Batch, model: GemmaConfig, execution: ExecutionConfig, config: UpdateConfig
) -> Array:
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
    trained: Any, base: Params | None, batch: Batch, weights: Array, model: GemmaConfig, execution: ExecutionConfig,
    config: UpdateConfig,
) -> tuple[Array, dict[str, Array]]:  # fmt: skip
    """The loss of a batch or of one microbatch, and its terms for each token.  -> scalar, {name: BC}

    `weights` BC are an aggregation over the whole optimizer step, so that the losses of microbatches add up.
    """
    logprobs = logprobs_of(policy(trained, base, config), batch, model, execution, config)
    old = lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    loss, terms = grpo_loss(
        logprobs, old, batch.ref_logprobs, batch.advantages, weights, beta=config.beta, epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high, sampler_logprobs=batch.sampler_logprobs if config.tis_cap else None,
        tis_cap=config.tis_cap, unbiased_kl=config.unbiased_kl,
    )  # fmt: skip
    return loss, terms | {"logprobs": lax.stop_gradient(logprobs), "old": old, "weight": weights}


@partial(MeshJit, more=VMEM_OPTIONS, static_argnames=("model", "execution", "config"), donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, rate: ArrayLike, model: GemmaConfig, execution: ExecutionConfig, config: UpdateConfig,
    base: Params | None = None,
) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:  # fmt: skip
    """One update at the learning rate `rate`: of the weights, or with LoRA of the adapters on the frozen `base`.

    Returns the new state, means and extremes over the batch, and the loss's terms for each token (BC). A non-finite loss or
    gradient leaves the state unchanged and is counted. `state` is donated: do not use it again.
    """
    weights = AGGREGATIONS[config.aggregation](batch.mask)  # over the whole batch: microbatches only sum

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
    stats = token_stats(terms, batch) | {"loss": loss, "grad_norm": grad_norm, "bad_updates": new.bad_updates}
    return new, stats, terms


def token_stats(terms: dict[str, Array], batch: Batch) -> dict[str, Array]:
    """Means and extremes of the loss's terms over the completion tokens that count.

    A step with mu > 1 keeps those of its last update: ratio, clipping and KL of a policy that the updates before it have moved.
    The difference between sampler and trainer is that of the policy that sampled, in every update.
    """
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


@partial(jax.jit, static_argnames=("model", "execution", "config"))
def kept_by_rounding(
    adapters: Adapters, base: Params, batch: Batch, old: Array, model: GemmaConfig, execution: ExecutionConfig,
    config: UpdateConfig,
) -> dict[str, Array]:  # fmt: skip
    """The share of what adapters do to log-probabilities that the trainer and the sampler keep in the dtype of activations.

    It is the slope of their change on that of a float32 pass over the same base, over the tokens that count in one group a
    device: 1 when rounding loses nothing, NaN while B is 0. `old` BC are the trainer's log-probabilities under `adapters`.
    """
    Q, at = len(batch.prompts), execution.at
    parts = split((batch, old), Q, Q // max(jax.sharding.get_abstract_mesh().size, 1), at)
    part, old = jax.tree.map(lambda leaf: leaf[0], parts)
    adapted, rounded = policy(adapters, base, config), replace(execution, remat="none")
    with jax.default_matmul_precision("highest"):  # by default a TPU multiplies float32 matrices in bfloat16
        exact = [logprobs_of(p, part, model, replace(rounded, dtype="float32"), config) for p in (adapted, base)]
    start, true = logprobs_of(base, part, model, rounded, config), (exact[0] - exact[1]) * part.mask

    def slope(logprobs: Array) -> Array:
        return jnp.where(part.mask > 0, (logprobs - start) * true, 0.0).sum() / (true * true).sum()

    return {"lora/kept/trainer": slope(old), "lora/kept/sampler": slope(part.sampler_logprobs)}


def narrow(params: Any, dtype: str) -> Any:
    """A tree of weights in another dtype. Frees each leaf once it is cast, so that the two trees never coexist."""

    def cast(leaf: Array) -> Array:
        if leaf.dtype == dtype:
            return leaf
        narrower = leaf.astype(dtype)
        leaf.delete()
        return narrower

    return jax.tree.map(cast, params)


def frozen(params: Any, dtype: str) -> Any:
    """A copy of the trained parameters that no update touches, in the dtype of activations."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), params)
