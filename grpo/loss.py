"""The GRPO loss: how a group of rewarded completions moves the policy.

    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)                              group_advantages
    ρ_t  = exp(logπ_t - logπ_old,t)                                       1 while the policy is the one that sampled
    S_t  = min(ρ_t A, clip(ρ_t, 1 - ε_low, 1 + ε_high) A)                 clipped_surrogate
    k3_t = exp(d_t) - d_t - 1,   d_t = logπ_ref,t - logπ_t                kl_k3
    loss = Σ_t w_t (β k3_t - ν_t S_t)                                     grpo_loss; ρ_t k3_t with kl_unbiased

r are the rewards of the G completions of one question. t runs over completion tokens, the stop token included. w_t are the
weights of an aggregation (`grpo_weights`, `dapo_weights`, `dr_grpo_weights`) over the tokens of a whole optimizer step, so
that splitting a batch changes nothing. ν_t is truncated importance sampling (TIS, `tis_weights`): it corrects for a sampler
whose probabilities differ a little from the trainer's. All log-probabilities are at the sampling temperature.
GRPO: arXiv 2402.03300 (eq. 3, 4). There are no value functions and no per-token rewards.

On-policy the loss is close to β·KL and stays near 0 whatever happens to the reward: watch the reward, not the loss.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def group_std(centred: Array, counts: Array) -> Array:
    """Standard deviation of each group, with n - 1 in the denominator: every group has the same weight.  QG, Q1 -> Q1"""
    return jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(counts - 1, 1))


def batch_std(centred: Array, counts: Array) -> Array:
    """Standard deviation of all rewards around their group means: groups keep their relative weight.  QG, Q1 -> scalar"""
    return jnp.sqrt((centred**2).sum() / jnp.maximum(counts.sum() - 1, 1))


def no_scale(centred: Array, counts: Array) -> Array:
    """Plain differences, without the bias towards easy and hard questions (Dr. GRPO, arXiv 2503.20783).  -> scalar"""
    return jnp.float32(1.0)


@partial(jax.jit, static_argnames="scale")
def group_advantages(rewards: ArrayLike, scale=group_std) -> Array:
    """How much better each completion is than its group.  QG -> QG, float32

    `scale` is `group_std` (GRPO), `batch_std` or `no_scale` (Dr. GRPO); 1e-4 is added to the standard deviation, as in TRL. A
    group of equal rewards gets exactly 0: rewards are first centred on one member of the group, which leaves no rounding.
    A completion without a reward (NaN) gets 0 and enters no mean and no standard deviation.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    scored = ~jnp.isnan(rewards)
    counts = scored.sum(axis=1, keepdims=True)
    member = jnp.take_along_axis(rewards, scored.argmax(axis=1, keepdims=True), axis=1)  # the first one with a reward
    centred = jnp.where(scored, rewards - member, 0.0)
    mean = centred.sum(axis=1, keepdims=True) / jnp.maximum(counts, 1)
    centred = jnp.where(scored, centred - mean, 0.0)
    return centred / (scale(centred, counts) + (0.0 if scale is no_scale else 1e-4))


def kl_k3(logprobs: Array, ref_logprobs: Array, knee: float = 2.61) -> Array:
    """Schulman's k3 = exp(d) - d - 1 with d = ref - policy: unbiased for KL(policy || ref), never negative.  BC, BC -> BC

    Its gradient in the loss, (1 - exp(d)) ∇logπ, is on-policy in expectation that of the other KL: KL(ref || policy). Beyond
    `knee`, where k3 is 10, it continues on its tangent: the value grows, the pull on one token stays exp(knee) - 1 = 12.6, so
    that no token dominates a step and none is let go. Values are finite, d = ±inf included. `expm1(d) - d` has the rounding
    error of d, `exp(d) - d - 1` that of 1, which is noise where d is small. http://joschu.net/blog/kl-approx.html
    """
    d = jnp.clip(ref_logprobs - logprobs, -1e30, 1e30)
    bent = jnp.minimum(d, knee)
    return jnp.maximum(jnp.expm1(bent) - bent, 0.0) + jnp.maximum(d - knee, 0.0) * math.expm1(knee)


def kl_unbiased(logprobs: Array, ref_logprobs: Array, ratio: Array) -> Array:
    """ρ k3: as k3, and its gradient is that of KL(policy || ref) too, off-policy included.  BC, BC, BC -> BC

    For each token behind its prefix, in expectation over the tokens of the policy that sampled; the prefixes stay those that
    were sampled. Differentiated through ρ and k3 the exponentials cancel: the gradient is -ρ d ∇logπ. It is computed in this
    form, because the difference of two large numbers would be rounding noise, and on k3's tangent it would have the wrong sign.
    "Unbiased KL estimate" in DeepSeek-V3.2 (arXiv 2512.02556), `use_bias_correction_kl` in TRL.
    """
    sloped = ratio * lax.stop_gradient(logprobs - ref_logprobs)
    return sloped + lax.stop_gradient(ratio * kl_k3(logprobs, ref_logprobs) - sloped)


def clipped_surrogate(ratio: Array, advantages: Array, epsilon_low: float, epsilon_high: float) -> Array:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7) with a separate upper bound (DAPO, arXiv 2503.14476).  BC, B -> BC"""
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    return jnp.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


def tis_weights(old_logprobs: Array, sampler_logprobs: Array, cap: float) -> Array:
    """Truncated importance sampling: ν = min(π_old / π_sampler, cap), without a gradient.  BC, BC -> BC"""
    return lax.stop_gradient(jnp.exp(jnp.minimum(old_logprobs - sampler_logprobs, jnp.log(cap))))


def grpo_weights(mask: Array) -> Array:
    """Mean over completions of the mean over their tokens (arXiv 2402.03300).  BC -> BC, sums to 1"""
    B, _ = mask.shape
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1) / B


def dapo_weights(mask: Array) -> Array:
    """Mean over all tokens of the step: long completions weigh more (DAPO, arXiv 2503.14476).  BC -> BC, sums to 1"""
    return mask / jnp.maximum(mask.sum(), 1)


def dr_grpo_weights(mask: Array) -> Array:
    """Sum over tokens divided by the constant B * C: no length bias (Dr. GRPO, arXiv 2503.20783).  BC -> BC"""
    B, C = mask.shape
    return mask / (B * C)


def grpo_loss(
    logprobs: Array, old_logprobs: Array, ref_logprobs: Array | None, advantages: Array, weights: Array, *,
    beta: float = 0.04, epsilon_low: float = 0.2, epsilon_high: float = 0.2, sampler_logprobs: Array | None = None,
    tis_cap: float = 2.0, unbiased_kl: bool = False,
) -> tuple[Array, dict[str, Array]]:  # fmt: skip
    """The loss of a batch or of a part of it, and its terms for each token.  BC, BC, BC, B, BC -> scalar, {name: BC}

    `weights` come from an aggregation over the mask of the whole optimizer step. A token of weight 0 has no effect, even if it
    is NaN. `ref_logprobs` may be None when `beta` is 0; without `sampler_logprobs` there is no TIS. The unit is nats.
    """
    counts = weights > 0
    logprobs = jnp.where(counts, logprobs, 0.0)
    log_ratio = jnp.where(counts, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    surrogate = clipped_surrogate(ratio, advantages, epsilon_low, epsilon_high)
    if sampler_logprobs is not None:
        surrogate = surrogate * jnp.where(counts, tis_weights(old_logprobs, sampler_logprobs, tis_cap), 0.0)
    kl = penalty = jnp.zeros_like(logprobs)
    if ref_logprobs is not None:
        reference = jnp.where(counts, ref_logprobs, 0.0)
        kl = penalty = kl_k3(logprobs, reference)
        if unbiased_kl:
            penalty = kl_unbiased(logprobs, reference, ratio)
    loss = (weights * (beta * penalty - surrogate)).sum()
    rising, falling = (advantages > 0)[:, None], (advantages < 0)[:, None]
    terms = {
        "kl": kl,
        "ratio": ratio,
        "clipped_low": falling & (ratio < 1 - epsilon_low),
        "clipped_high": rising & (ratio > 1 + epsilon_high),
    }
    return loss, jax.tree.map(lambda term: lax.stop_gradient(term.astype(jnp.float32)), terms)
