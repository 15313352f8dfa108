"""The GRPO loss: what a group of scored completions does to the policy.

    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)                              group_advantages
    ρ_t  = exp(logπ_t - logπ_old,t)                                       1 while the policy is the one that sampled
    S_t  = min(ρ_t A, clip(ρ_t, 1 - ε_low, 1 + ε_high) A)                 clipped_surrogate
    k3_t = exp(d_t) - d_t - 1,   d_t = logπ_ref,t - logπ_t                kl_k3
    loss = Σ_t w_t (β k3_t - ν_t S_t)                                     grpo_loss

r are the rewards of the G completions of one question; t runs over completion tokens, the stop token included; w_t are the
weights of an aggregation (`grpo_weights`, `dapo_weights`, `dr_grpo_weights`) and sum over everything that one optimizer step
sees, so that splitting a batch changes nothing; ν_t corrects for a sampler that is not quite the trainer. All log-probs are at
the sampling temperature. GRPO: arXiv 2402.03300 (eq. 3, 4). Left out: value functions, per-token rewards, k1 as a loss (its
expected gradient on-policy is zero).

On-policy the loss is close to β·KL, near 0 whatever happens to the reward: watch the reward, not the loss.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def group_std(centred: Array, counts: Array) -> Array:
    """Spread of each group, with n - 1 in the denominator: every group pulls equally hard.  QG, Q1 -> Q1"""
    return jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(counts - 1, 1))


def batch_std(centred: Array, counts: Array) -> Array:
    """Spread of all rewards around their own group's mean: groups keep their relative weight.  QG, Q1 -> scalar"""
    return jnp.sqrt((centred**2).sum() / jnp.maximum(counts.sum() - 1, 1))


def no_scale(centred: Array, counts: Array) -> Array:
    """Plain differences, without the bias towards easy and hard questions (Dr. GRPO, arXiv 2503.20783).  -> scalar"""
    return jnp.float32(1.0)


def group_advantages(rewards: ArrayLike, scale=group_std) -> Array:
    """How much better each completion is than its group.  QG -> QG, float32

    `scale` is `group_std` (GRPO), `batch_std` or `no_scale` (Dr. GRPO); 1e-4 is added to a spread, as in TRL. A group of equal
    rewards gets exactly 0: it is centred on one of its members before the mean is taken, so that no rounding is left over.
    A completion without a score (NaN) gets 0 and is in no mean and no spread.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    scored = ~jnp.isnan(rewards)
    counts = scored.sum(axis=1, keepdims=True)
    member = jnp.take_along_axis(rewards, scored.argmax(axis=1, keepdims=True), axis=1)  # the first that is scored
    centred = jnp.where(scored, rewards - member, 0.0)
    mean = centred.sum(axis=1, keepdims=True) / jnp.maximum(counts, 1)
    centred = jnp.where(scored, centred - mean, 0.0)
    return centred / (scale(centred, counts) + (0.0 if scale is no_scale else 1e-4))


def kl_k3(logprobs: Array, ref_logprobs: Array, cap: float = 10.0) -> Array:
    """Schulman's k3 = exp(d) - d - 1 with d = ref - policy: unbiased for KL(policy || ref), never negative.  BC, BC -> BC

    `expm1(d) - d` errs by rounding of d, exp(d) - d - 1 by rounding of 1: noise where d is small. d is held within ±20 and the
    value below `cap`, so that one token cannot take over a step. http://joschu.net/blog/kl-approx.html
    """
    d = jnp.clip(ref_logprobs - logprobs, -20.0, 20.0)
    return jnp.clip(jnp.expm1(d) - d, 0.0, cap)


def clipped_surrogate(ratio: Array, advantages: Array, epsilon_low: float, epsilon_high: float) -> Array:
    """PPO's pessimistic bound (arXiv 1707.06347, eq. 7), with its own bound upwards (DAPO, arXiv 2503.14476).  BC, B -> BC"""
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    return jnp.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


def tis_weights(old_logprobs: Array, sampler_logprobs: Array, cap: float) -> Array:
    """ν = min(π_old / π_sampler, cap), a constant: corrects for a sampler that rounds unlike the trainer.  BC, BC -> BC"""
    return lax.stop_gradient(jnp.exp(jnp.minimum(old_logprobs - sampler_logprobs, jnp.log(cap))))


def grpo_weights(mask: Array) -> Array:
    """Mean over completions of the mean over their tokens (arXiv 2402.03300).  BC -> BC, sums to 1"""
    B, _ = mask.shape
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1) / B


def dapo_weights(mask: Array) -> Array:
    """Mean over all tokens of the step: long completions count for more (DAPO, arXiv 2503.14476).  BC -> BC, sums to 1"""
    return mask / jnp.maximum(mask.sum(), 1)


def dr_grpo_weights(mask: Array) -> Array:
    """Sum over tokens by a constant, B * C: no reward for length either way (Dr. GRPO, arXiv 2503.20783).  BC -> BC"""
    B, C = mask.shape
    return mask / (B * C)


def grpo_loss(
    logprobs: Array, old_logprobs: Array, ref_logprobs: Array | None, advantages: Array, weights: Array, *,
    beta: float = 0.04, epsilon_low: float = 0.2, epsilon_high: float = 0.2, sampler_logprobs: Array | None = None,
    tis_cap: float = 2.0,
) -> tuple[Array, dict[str, Array]]:  # fmt: skip
    """The loss of a batch or of a part of it, and its terms for each token.  BC, BC, BC, B, BC -> scalar, {name: BC}

    `weights` come from an aggregation over the mask of the whole optimizer step; where they are 0 a token has no effect, be it
    NaN. `ref_logprobs` may be None when `beta` is 0, `sampler_logprobs` when the sampler is trusted. Nats throughout.
    """
    counts = weights > 0
    logprobs = jnp.where(counts, logprobs, 0.0)
    log_ratio = jnp.where(counts, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    surrogate = clipped_surrogate(ratio, advantages, epsilon_low, epsilon_high)
    if sampler_logprobs is not None:
        surrogate = surrogate * jnp.where(counts, tis_weights(old_logprobs, sampler_logprobs, tis_cap), 0.0)
    kl = jnp.zeros_like(logprobs) if ref_logprobs is None else kl_k3(logprobs, jnp.where(counts, ref_logprobs, 0.0))
    loss = (weights * (beta * kl - surrogate)).sum()
    rising, falling = (advantages > 0)[:, None], (advantages < 0)[:, None]
    terms = {
        "kl": kl,
        "ratio": ratio,
        "clipped_low": falling & (ratio < 1 - epsilon_low),
        "clipped_high": rising & (ratio > 1 + epsilon_high),
    }
    return loss, jax.tree.map(lambda term: lax.stop_gradient(term.astype(jnp.float32)), terms)
