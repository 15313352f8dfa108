"""Laws of grpo/loss.py. What should come out is written here in float64 numpy, the gradient in closed form."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.loss import (
    batch_std,
    clipped_surrogate,
    dapo_weights,
    dr_grpo_weights,
    group_advantages,
    group_std,
    grpo_loss,
    grpo_weights,
    kl_k3,
    kl_unbiased,
    no_scale,
)

Q, G, C = 3, 4, 6
B = Q * G
LOW, HIGH, CAP = 0.2, 0.3, 1.2  # epsilon_low, epsilon_high, tis_cap
LENGTHS = np.array([6, 1, 3, 4, 2, 6, 5, 0, 3, 3, 1, 6])  # 0: a completion that mask_truncated left out
MASK = (np.arange(C) < LENGTHS[:, None]).astype(np.float32)

SCALES = {"group": group_std, "batch": batch_std, "none": no_scale}
AGGREGATIONS = {"grpo": grpo_weights, "dapo": dapo_weights, "dr_grpo": dr_grpo_weights}


def f32(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def expected_advantages(rewards: np.ndarray, scale: str) -> np.ndarray:  # QG -> QG
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return centred
    spread = rewards.std(axis=1, ddof=1, keepdims=True) if scale == "group" else centred.std(ddof=1)
    return centred / (spread + 1e-4)


def expected_weights(mask: np.ndarray, aggregation: str) -> np.ndarray:  # BC -> BC
    rows, width = mask.shape
    per_row = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mask / {"grpo": rows * per_row, "dapo": mask.sum(), "dr_grpo": rows * width}[aggregation]


def expected_loss(logprobs, old, ref, sampler, advantages, weights, beta, cap=CAP):
    """Loss and gradient: d(ratio)/d(logprob) = ratio where the bound lets it through, d(k3)/d(logprob) = 1 - exp(d)."""
    ratio, advantages = np.exp(logprobs - old), advantages[:, None]
    clipped = np.clip(ratio, 1 - LOW, 1 + HIGH) * advantages
    surrogate = np.minimum(ratio * advantages, clipped)
    slope = np.where(ratio * advantages <= clipped, ratio * advantages, 0.0)
    nu = 1.0 if sampler is None else np.minimum(np.exp(old - sampler), cap)
    d = np.zeros_like(logprobs) if ref is None else ref - logprobs
    loss = (weights * (beta * (np.exp(d) - d - 1) - nu * surrogate)).sum()
    return loss, weights * (beta * (1 - np.exp(d)) - nu * slope)


def random_batch(seed: int = 0):
    """Rewards QG; policy, old, reference and sampler log-probs BC, on which every branch of the loss is taken."""
    rng = np.random.default_rng(seed)
    rewards = rng.choice([30.0, 5.0, -15.0, 0.1], (Q, G)).astype(np.float32)
    old = -rng.exponential(1.5, (B, C)).astype(np.float32)
    logprobs, ref, sampler = (old + rng.normal(0, spread, (B, C)).astype(np.float32) for spread in (0.3, 0.5, 0.2))
    return rewards, logprobs, old, ref, sampler


loss_and_grad = jax.jit(jax.value_and_grad(grpo_loss, has_aux=True), static_argnames="unbiased_kl")


def value_and_grad(*args, **options):
    (loss, terms), grad = loss_and_grad(*args, **options)
    return float(loss), np.asarray(grad), terms


# ----------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_and_gradient_equal_float64(aggregation, scale, corrected, beta, on_policy):
    rewards, logprobs, old, ref, sampler = random_batch()
    old = logprobs if on_policy else old
    advantages = group_advantages(jnp.asarray(rewards), SCALES[scale]).reshape(-1)
    loss, grad, terms = value_and_grad(
        logprobs, old, ref if beta else None, advantages, AGGREGATIONS[aggregation](jnp.asarray(MASK)),
        beta=beta, epsilon_low=LOW, epsilon_high=HIGH, sampler_logprobs=sampler if corrected else None, tis_cap=CAP,
    )  # fmt: skip
    exact = expected_advantages(rewards.astype(float), scale).reshape(-1)
    logprobs, old, ref, sampler = (x.astype(float) for x in (logprobs, old, ref, sampler))
    want, want_grad = expected_loss(
        logprobs, old, ref if beta else None, sampler if corrected else None, exact,
        expected_weights(MASK.astype(float), aggregation), beta,
    )  # fmt: skip
    size = np.abs(exact).max() if scale == "none" else 1.0  # plain differences of rewards reach 30, standard ones about 1
    assert loss == pytest.approx(want, abs=1e-6 * size)
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-6 * size)
    ratio, d = np.exp(logprobs - old), ref - logprobs
    np.testing.assert_allclose(terms["ratio"], np.where(MASK, ratio, 1.0), rtol=1e-6)
    np.testing.assert_allclose(terms["kl"], np.where(MASK, np.exp(d) - d - 1, 0.0) * (beta > 0), rtol=2e-6, atol=1e-7)


def test_the_random_batch_takes_every_branch():
    rewards, logprobs, old, _, sampler = random_batch()
    counts, ratio = MASK > 0, np.exp(logprobs - old)
    rising = (rewards > rewards.mean(axis=1, keepdims=True)).reshape(B, 1) & counts
    for side in (rising, ~rising & counts):
        assert (side & (ratio < 1 - LOW)).any() and (side & (ratio > 1 + HIGH)).any()
    correction = np.exp(old - sampler)[counts]
    assert (correction > CAP).any() and (correction < CAP).any()


def test_on_policy_without_kl_the_gradient_is_reinforce():
    """Through a softmax over 5 pieces: sum over tokens of -w A (onehot - p), the textbook form."""
    rng = np.random.default_rng(1)
    theta = rng.normal(size=(B, C, 5)).astype(np.float32)
    tokens = rng.integers(5, size=(B, C))
    onehot = np.eye(5)[tokens]
    advantages = rng.normal(size=B).astype(np.float32)
    weights = grpo_weights(jnp.asarray(MASK))

    def loss(theta):
        logprobs = (jax.nn.log_softmax(theta) * onehot).sum(axis=-1)
        return grpo_loss(logprobs, jax.lax.stop_gradient(logprobs), None, jnp.asarray(advantages), weights, beta=0.0)[0]

    p = np.exp(theta.astype(float)) / np.exp(theta.astype(float)).sum(axis=-1, keepdims=True)
    want = -(expected_weights(MASK.astype(float), "grpo") * advantages[:, None])[..., None] * (onehot - p)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(theta)), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("advantage", "ratio", "learns"),
    [
        (1.0, 1 + HIGH + 1e-3, False),  # good, and likely enough already
        (1.0, 1 + HIGH - 1e-3, True),
        (1.0, 1 - LOW - 1e-3, True),  # good, but has become less likely: bring it back
        (-1.0, 1 - LOW - 1e-3, False),  # bad, and unlikely enough already
        (-1.0, 1 - LOW + 1e-3, True),
        (-1.0, 1 + HIGH + 1e-3, True),  # bad, and has become more likely: push it down
    ],
)
def test_a_token_is_clipped_exactly_when_the_pessimistic_bound_says_so(advantage, ratio, learns):
    old = f32([[-1.0]])
    logprobs = old + f32(math.log(ratio))
    loss, grad, terms = value_and_grad(
        logprobs, old, None, f32([advantage]), jnp.ones((1, 1)), beta=0.0, epsilon_low=LOW, epsilon_high=HIGH
    )
    assert grad[0, 0] == pytest.approx(-advantage * ratio if learns else 0.0, abs=1e-6)
    assert (grad[0, 0] == 0) == (not learns)
    inside = min(max(ratio, 1 - LOW), 1 + HIGH)
    assert loss == pytest.approx(-min(ratio * advantage, inside * advantage), abs=1e-6)  # a lower bound of what is gained
    assert bool(terms["clipped_high"][0, 0]) == (not learns and advantage > 0)
    assert bool(terms["clipped_low"][0, 0]) == (not learns and advantage < 0)


def test_the_surrogate_is_never_above_the_unclipped_gain():
    ratio = np.linspace(0.1, 3.0, 30, dtype=np.float32)[None].repeat(2, axis=0)
    advantages = f32([1.5, -1.5])
    surrogate = np.asarray(clipped_surrogate(jnp.asarray(ratio), jnp.asarray(advantages), LOW, HIGH))
    assert (surrogate <= ratio * advantages[:, None]).all()
    assert (surrogate < ratio * advantages[:, None]).any(axis=1).all()


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("which", ["logprobs", "old", "ref", "sampler", "all"])
def test_masked_tokens_have_no_effect(which, junk):
    rewards, *arrays = random_batch()
    advantages = group_advantages(jnp.asarray(rewards)).reshape(-1)
    weights = grpo_weights(jnp.asarray(MASK))

    def run(logprobs, old, ref, sampler):
        return value_and_grad(
            logprobs,
            old,
            ref,
            advantages,
            weights,
            epsilon_low=LOW,
            epsilon_high=HIGH,
            sampler_logprobs=sampler,
            tis_cap=CAP,
        )

    names = ("logprobs", "old", "ref", "sampler")
    spoilt = [np.where(MASK > 0, x, junk if which in (name, "all") else x) for name, x in zip(names, arrays, strict=True)]
    (loss, grad, terms), (want, want_grad, want_terms) = run(*map(f32, spoilt)), run(*arrays)
    assert loss == want and math.isfinite(loss)
    np.testing.assert_array_equal(grad, want_grad)
    assert (grad[MASK == 0] == 0).all() and (grad[MASK > 0] != 0).any()
    for name in terms:
        np.testing.assert_array_equal(np.where(MASK, terms[name], 0), np.where(MASK, want_terms[name], 0))


def test_the_sampler_weight_is_a_constant_of_the_policy():
    """It may depend on the policy that is trained (on-policy old = policy): no gradient flows through it."""
    rewards, logprobs, _, _, sampler = random_batch()
    advantages = group_advantages(jnp.asarray(rewards)).reshape(-1)
    weights = dapo_weights(jnp.asarray(MASK))

    def loss(x, constant):
        old = jax.lax.stop_gradient(x) if constant else x
        return grpo_loss(x, old, None, advantages, weights, beta=0.0, sampler_logprobs=jnp.asarray(sampler), tis_cap=CAP)[0]

    nu = np.minimum(np.exp(logprobs.astype(float) - sampler), CAP)
    want = -np.asarray(weights) * nu * np.asarray(advantages)[:, None]
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logprobs), True), want, rtol=0, atol=1e-6)
    assert (np.asarray(jax.grad(loss)(jnp.asarray(logprobs), False)) == 0).all()  # the ratio cancels, and nu adds nothing


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_splitting_a_batch_changes_nothing(aggregation):
    rewards, logprobs, old, ref, sampler = random_batch()
    advantages = group_advantages(jnp.asarray(rewards)).reshape(-1)
    weights = AGGREGATIONS[aggregation](jnp.asarray(MASK))

    def run(rows):
        return value_and_grad(
            logprobs[rows],
            old[rows],
            ref[rows],
            advantages[rows],
            weights[rows],
            sampler_logprobs=sampler[rows],
            tis_cap=CAP,
        )

    whole, whole_grad, _ = run(slice(None))
    pieces = [run(slice(start, start + G)) for start in range(0, B, G)]
    assert sum(loss for loss, _, _ in pieces) == pytest.approx(whole, abs=1e-6)
    np.testing.assert_allclose(np.concatenate([grad for _, grad, _ in pieces]), whole_grad, rtol=1e-6)


def test_permuting_completions_permutes_the_gradient():
    rewards, logprobs, old, ref, sampler = random_batch()
    advantages = group_advantages(jnp.asarray(rewards)).reshape(-1)
    weights = grpo_weights(jnp.asarray(MASK))
    order = np.random.default_rng(2).permutation(B)
    loss, grad, _ = value_and_grad(logprobs, old, ref, advantages, weights, sampler_logprobs=sampler)
    moved, moved_grad, _ = value_and_grad(
        logprobs[order], old[order], ref[order], advantages[order], weights[order], sampler_logprobs=sampler[order]
    )
    assert moved == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(moved_grad, grad[order], rtol=1e-6)


@pytest.mark.parametrize("gap", [25.0, -25.0, 1e4, -1e4])
def test_a_token_far_from_every_other_policy_stays_finite(gap):
    logprobs = f32([[-50.0]])
    for beta, advantage in itertools.product((0.0, 0.04), (1.0, -1.0)):
        far = logprobs + f32(gap)
        loss, grad, terms = value_and_grad(logprobs, far, far, f32([advantage]), jnp.ones((1, 1)), beta=beta)
        assert math.isfinite(loss) and np.isfinite(grad).all()
        assert 0 < terms["ratio"][0, 0] <= math.exp(20) * (1 + 1e-6)
        assert terms["kl"][0, 0] == pytest.approx(exact_tangent(np.array(float(gap))), rel=1e-6)


# --------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 4), (16, 8), (5, 7)])
def test_advantages_equal_float64(scale, shape):
    rewards = np.random.default_rng(3).normal(5, 10, shape).astype(np.float32)
    got = group_advantages(jnp.asarray(rewards), SCALES[scale])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected_advantages(rewards.astype(float), scale), rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_rewards_that_are_missing_are_in_no_mean_and_no_spread(scale, share):
    """Against float64; groups with all, some, one and none of their rewards are met, and the first may be missing."""
    rng = np.random.default_rng(8)
    rewards = rng.normal(5, 10, (60, 5)).astype(np.float32)
    rewards[rng.random(rewards.shape) < share] = np.nan
    counts = np.isfinite(rewards).sum(axis=1)
    assert set(counts) >= ({3, 4, 5} if share < 0.5 else {0, 1, 2, 3}) and np.isnan(rewards[counts > 1, 0]).any()
    exact = np.zeros(rewards.shape)
    for group, row in enumerate(rewards.astype(float)):
        there = np.isfinite(row)
        exact[group, there] = row[there] - (row[there].mean() if there.any() else 0)
        if scale == "group" and there.sum() > 1:
            exact[group, there] /= row[there].std(ddof=1) + 1e-4
    if scale == "batch":
        exact /= math.sqrt((exact**2).sum() / (counts.sum() - 1)) + 1e-4
    got = np.asarray(group_advantages(jnp.asarray(rewards), SCALES[scale]))
    np.testing.assert_allclose(got, exact, rtol=2e-6, atol=5e-6)
    assert (got[np.isnan(rewards)] == 0).all() and (got[counts < 2] == 0).all()
    assert (got[np.isfinite(rewards) & (counts[:, None] > 1)] != 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6])
def test_equal_rewards_beside_missing_ones_get_exactly_zero(scale, value):
    group = [value, np.nan, value, value, value, np.nan, value, value]
    advantages = np.asarray(group_advantages(f32([group, [1, 2, 3, 4, 5, 6, 7, np.nan]]), SCALES[scale]))
    assert (advantages[0] == 0).all() and (advantages[1] != 0).sum() == 6  # 4 is the mean of 1 to 7


@pytest.mark.parametrize("scale", SCALES)
def test_a_missing_reward_is_as_a_smaller_group(scale):
    """To the last bit, whichever of the group it is: sums of whole numbers are exact."""
    want = np.asarray(group_advantages(WHOLE[:1, :7], SCALES[scale]))
    for missing in range(8):
        with_gap = np.insert(WHOLE[:1, :7], missing, np.nan, axis=1)
        got = np.asarray(group_advantages(with_gap, SCALES[scale]))
        np.testing.assert_array_equal(np.delete(got, missing, axis=1), want)


# Whole rewards in groups of 8: every sum and mean below is exact in float32, so that laws hold to the last bit.
WHOLE = f32(np.random.default_rng(4).choice([-15, 0, 5, 5, 30], (5, 8)))


@pytest.mark.parametrize("scale", SCALES)
def test_adding_a_constant_to_a_group_changes_nothing(scale):
    shift = f32([[1000], [0], [-3], [8], [65536]])
    want = np.asarray(group_advantages(jnp.asarray(WHOLE), SCALES[scale]))
    np.testing.assert_array_equal(group_advantages(jnp.asarray(WHOLE + shift), SCALES[scale]), want)
    assert (want != 0).any()


@pytest.mark.parametrize("factor", [1 / 4, 1024])
def test_scaling_all_rewards_scales_only_unscaled_advantages(factor):
    for scale in (group_std, batch_std):  # the 1e-4 beside the spread is all that shows
        before, after = (np.asarray(group_advantages(jnp.asarray(f32(k * WHOLE)), scale), float) for k in (1, factor))
        centred = WHOLE.astype(float) - WHOLE.mean(axis=1, keepdims=True)
        spread = centred.std(axis=1, ddof=1, keepdims=True) if scale is group_std else centred.std(ddof=1)
        np.testing.assert_allclose(after, before * (spread + 1e-4) / (spread + 1e-4 / factor), rtol=1e-6, atol=0)
    before, after = (np.asarray(group_advantages(jnp.asarray(f32(k * WHOLE)), no_scale)) for k in (1, factor))
    np.testing.assert_array_equal(after, f32(factor) * before)


@pytest.mark.parametrize("scale", SCALES)
def test_permuting_completions_permutes_advantages(scale):
    order = np.random.default_rng(5).permutation(8)
    want = np.asarray(group_advantages(jnp.asarray(WHOLE), SCALES[scale]))[:, order]
    np.testing.assert_array_equal(group_advantages(jnp.asarray(WHOLE[:, order]), SCALES[scale]), want)
    questions = np.random.default_rng(6).permutation(5)
    want = np.asarray(group_advantages(jnp.asarray(WHOLE), SCALES[scale]))[questions]
    np.testing.assert_allclose(group_advantages(jnp.asarray(WHOLE[questions]), SCALES[scale]), want, rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -15.0, 0.0])
def test_a_group_of_equal_rewards_gets_exactly_zero(scale, value):
    """Also beside a group that differs, and with G = 7, where the mean of seven tenths is not a tenth."""
    rewards = jnp.asarray(f32([[value] * 7, [1, 2, 3, 4, 5, 6, 8]]))
    for group in (rewards, rewards[:1]):
        advantages = group_advantages(group, SCALES[scale])
        assert (np.asarray(advantages[0]) == 0).all()
    advantages = group_advantages(rewards, SCALES[scale])[:, : B // 2].reshape(-1)
    _, logprobs, old, _, _ = random_batch()
    _, grad, _ = value_and_grad(logprobs, old, None, advantages, grpo_weights(jnp.ones((B, C))), beta=0.0)
    assert (grad[: B // 2] == 0).all() and (grad[B // 2 :] != 0).any() and np.isfinite(grad).all()


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_of_a_group_sum_to_zero(scale):
    rewards = np.random.default_rng(7).normal(1000, 10, (50, 7)).astype(np.float32)
    advantages = np.asarray(group_advantages(jnp.asarray(rewards), SCALES[scale]), float)
    rounding = 7 * 2**-23 * np.abs(advantages).max()  # half a unit in the last place for each of 7, twice
    assert np.abs(advantages.sum(axis=1)).max() <= rounding
    assert (np.abs(advantages).max(axis=1) > 100 * rounding).all()


@pytest.mark.parametrize("gap", [0.5, 1.0, 7.0, 30.0, 1e5])
def test_of_two_completions_the_better_gets_half_the_root_of_two(gap):
    """Half the gap over a spread of gap / sqrt(2), plus the 1e-4."""
    advantages = group_advantages(jnp.asarray([[3.0, 3.0 + gap]]))
    want = (gap / 2) / (gap / math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(advantages, [[-want, want]], rtol=1e-6)
    assert want == pytest.approx(math.sqrt(0.5), rel=1.5e-4 / gap)


# ------------------------------------------------------------------------------------------------------------------ KL


def exact_k3(d: np.ndarray) -> np.ndarray:
    """exp(d) - d - 1 in float64; below 1 by its series, as the subtraction costs float64 its digits too."""
    series = sum(d**k / math.factorial(k) for k in range(2, 25))
    return np.where(np.abs(d) < 1, series, np.expm1(np.clip(d, -20, 20)) - d)


@pytest.mark.parametrize("sign", [1, -1])
def test_k3_errs_by_rounding_of_d_and_is_never_negative(sign):
    """With a knee beyond all d, densely in the bits of float32. exp(d) - d - 1 errs more."""
    smallest, largest = f32([1e-15, 20]).view(np.int32).tolist()
    bits = np.arange(smallest, largest, 997, dtype=np.int32)
    d = sign * np.append(bits.view(np.float32), f32([1e-6, 1e-3, 0.5, 20]))
    got = np.asarray(jax.jit(kl_k3, static_argnums=2)(jnp.zeros_like(d), jnp.asarray(d), 21.0))
    unit = 2.0**-23
    allowed = unit * (2 * np.abs(d.astype(float)) + 2 * np.abs(np.expm1(d.astype(float))))
    assert (got >= 0).all()
    assert (np.abs(got - exact_k3(d.astype(float))) <= allowed).all()
    naive = np.asarray(jnp.exp(jnp.asarray(d)) - d - 1)
    assert (np.abs(naive - exact_k3(d.astype(float))) > allowed).any()


def test_k3_is_not_negative_where_expm1_is_one_rounding_too_low(monkeypatch):
    """A faithful expm1, as a CPU's, is never below d; one that errs by an ulp is, at those d that are looked for here."""
    real = jnp.expm1
    monkeypatch.setattr(jnp, "expm1", lambda x: jnp.nextafter(real(x), jnp.full_like(x, -jnp.inf)))
    d = np.geomspace(1e-10, 1e-3, 10_000).astype(np.float32)
    d = np.concatenate([d, -d])
    negative = d[np.asarray(jnp.expm1(jnp.asarray(d)) - d) < 0]
    assert len(negative) > 100
    assert (np.asarray(kl_k3(jnp.zeros_like(negative), jnp.asarray(negative))) == 0).all()


def test_k3_is_zero_where_the_policies_agree():
    logprobs = -np.random.default_rng(8).exponential(5, 1000).astype(np.float32)
    assert (np.asarray(kl_k3(jnp.asarray(logprobs), jnp.asarray(logprobs))) == 0).all()
    nearest = np.nextafter(logprobs, f32(-np.inf))
    assert (np.asarray(kl_k3(jnp.asarray(nearest), jnp.asarray(logprobs))) >= 0).all()


KNEE = 2.61


def exact_tangent(d: np.ndarray) -> np.ndarray:
    """k3 up to the knee and its tangent beyond it, in float64."""
    return exact_k3(np.minimum(d, KNEE)) + np.maximum(d - KNEE, 0) * math.expm1(KNEE)


def test_k3_has_the_gradient_of_its_formula_and_beyond_the_knee_that_of_its_tangent():
    d = f32([-1e4, -50, -15, -3, -0.51, -0.49, -1e-3, 0, 1e-3, 0.49, 0.51, 2.5, 2.609, 2.611, 3, 12, 50, 1e4])
    grad = jax.vmap(jax.grad(kl_k3))(jnp.zeros_like(d), jnp.asarray(d))
    np.testing.assert_allclose(grad, -np.expm1(np.minimum(d.astype(float), KNEE)), rtol=1e-6, atol=2.0**-23)
    assert grad[-1] == grad[-3] and -12.7 < grad[-1] < -12.5  # a token that has all but vanished is pulled back still


def test_k3_and_its_gradient_are_continuous_at_the_knee_and_the_value_has_no_cap():
    knee = f32(KNEE)
    around = np.array([np.nextafter(knee, f32(0)), knee, np.nextafter(knee, f32(9))])
    values, slopes = jax.vmap(jax.value_and_grad(lambda d: kl_k3(jnp.zeros_like(d), d)))(jnp.asarray(around))
    assert np.ptp(values) < 1e-5 and np.ptp(slopes) < 1e-5
    d = np.linspace(-60, 60, 2001).astype(np.float32)
    np.testing.assert_allclose(kl_k3(jnp.zeros_like(d), jnp.asarray(d)), exact_tangent(d.astype(float)), rtol=1e-6, atol=1e-7)
    assert (np.diff(np.asarray(kl_k3(jnp.zeros(20), jnp.arange(20.0)))) > 1.0 - 1e-6)[1:].all()  # the alarm sees it grow


def test_k3_is_finite_wherever_the_policies_are():
    logprobs, ref = map(f32, ([-np.inf, 0, -1e38, 0, -np.inf, 0], [0, -np.inf, 0, -1e38, -1.0, -1e4]))
    k3 = np.asarray(kl_k3(jnp.asarray(logprobs), jnp.asarray(ref)))
    assert np.isfinite(k3).all() and (k3 > 9_000).all()
    assert np.isfinite(jax.grad(lambda x: kl_k3(x, jnp.asarray(ref)).sum())(jnp.asarray(logprobs))).all()


def two_distributions() -> tuple[np.ndarray, np.ndarray]:
    """Logits of a policy and a reference over 9 pieces; no probability differs so much that k3 is beyond its knee."""
    rng = np.random.default_rng(9)
    theta, other = rng.normal(size=9), rng.normal(size=9)
    return theta, theta + 0.5 * other


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def test_the_mean_of_k3_is_the_kl_of_policy_to_reference():
    """The expectation over every piece at its probability: exact, nothing is sampled."""
    policy, reference = map(softmax, two_distributions())
    k3 = np.asarray(kl_k3(jnp.asarray(np.log(policy), jnp.float32), jnp.asarray(np.log(reference), jnp.float32)), float)
    assert (policy * k3).sum() == pytest.approx((policy * np.log(policy / reference)).sum(), rel=1e-5)
    assert (policy * k3).sum() != pytest.approx((reference * np.log(reference / policy)).sum(), rel=1e-2)


def test_the_mean_gradient_of_k3_is_that_of_the_kl_of_reference_to_policy():
    """d/d(theta) KL(reference || softmax(theta)) = policy - reference."""
    theta, other = two_distributions()
    policy, reference = softmax(theta), softmax(other)
    ref = jnp.asarray(np.log(reference), jnp.float32)

    def expected_k3(theta):
        return (f32(policy) * kl_k3(jax.nn.log_softmax(theta), ref)).sum()

    np.testing.assert_allclose(jax.grad(expected_k3)(f32(theta)), policy - reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_unbiased_form_has_value_and_gradient_of_the_kl_of_policy_to_reference(on_policy):
    """Over every piece, drawn by the old policy. d/d(theta_j) KL(softmax(theta) || reference) = p_j (log p_j/q_j - KL)."""
    theta, other = two_distributions()
    policy, reference = softmax(theta), softmax(other)
    sampled = policy if on_policy else softmax(theta + np.random.default_rng(3).normal(0, 0.4, 9))
    ref, old = f32(np.log(reference)), f32(np.log(sampled))

    def expected(estimate):
        def mean(theta):
            logprobs = jax.nn.log_softmax(theta)
            ratio = jnp.exp(logprobs - (jax.lax.stop_gradient(logprobs) if on_policy else old))
            return (f32(sampled) * estimate(logprobs, jnp.asarray(ref), ratio)).sum()

        return jax.value_and_grad(mean)(f32(theta))

    kl = (policy * np.log(policy / reference)).sum()
    exact = policy * (np.log(policy / reference) - kl)
    for estimate in (kl_unbiased, lambda logprobs, ref, ratio: ratio * kl_k3(logprobs, ref)):
        value, grad = expected(estimate)
        assert float(value) == pytest.approx(kl, rel=1e-5)
        np.testing.assert_allclose(grad, exact, rtol=0, atol=1e-6)
    _, biased = expected(lambda logprobs, ref, ratio: kl_k3(logprobs, ref))
    assert np.abs(np.asarray(biased) - exact).max() > 0.01


def test_the_unbiased_form_pulls_back_in_proportion_to_the_distance_however_far():
    """-ρ d, where differentiating k3's tangent would push the token away."""
    ref = f32([0, 0, 0, -2, -30, 0])
    logprobs, old = f32([-1e-4, -3, -40, 0, 0, -5]), f32([-1e-4, -3, -40, -0.5, 0, -4])
    grad = jax.grad(lambda x: kl_unbiased(x, jnp.asarray(ref), jnp.exp(x - old)).sum())(jnp.asarray(logprobs))
    ratio, d = np.exp((logprobs - old).astype(float)), (ref - logprobs).astype(float)
    np.testing.assert_allclose(grad, -ratio * d, rtol=1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_loss_has_the_chosen_kl(on_policy, unbiased):
    """Without advantages, value and gradient in float64: β w k3 and β w (1 - exp(d)), or β w ρ k3 and -β w ρ d."""
    _, logprobs, old, ref, _ = random_batch(4)
    old, weights = logprobs if on_policy else old, grpo_weights(jnp.asarray(MASK))
    loss, grad, terms = value_and_grad(logprobs, old, ref, jnp.zeros(B), weights, beta=0.3, unbiased_kl=unbiased)
    ratio, d = np.exp((logprobs - old).astype(float)), (ref - logprobs).astype(float)
    exact, slope = (ratio * exact_k3(d), -ratio * d) if unbiased else (exact_k3(d), 1 - np.exp(d))
    weights = expected_weights(MASK.astype(float), "grpo")
    assert loss == pytest.approx((0.3 * weights * exact).sum(), rel=1e-5)
    np.testing.assert_allclose(grad, 0.3 * weights * slope, rtol=0, atol=1e-6)
    np.testing.assert_allclose(terms["kl"], np.where(MASK, exact_k3(d), 0.0), rtol=2e-6, atol=1e-7)  # logged as k3


# ------------------------------------------------------------------------------------------------------------- weights


def random_mask(seed: int, shortest: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return f32(np.arange(31) < rng.integers(shortest, 32, 24)[:, None])


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_the_whole_step_sum_to_one(seed):
    mask = random_mask(seed)
    for weights in (np.asarray(grpo_weights(jnp.asarray(mask)), float), np.asarray(dapo_weights(jnp.asarray(mask)), float)):
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert ((weights > 0) == (mask > 0)).all()


@pytest.mark.parametrize("seed", range(5))
def test_each_aggregation_weighs_as_its_name_says(seed):
    mask = random_mask(seed, shortest=0)
    grpo, dapo, dr_grpo = (np.asarray(f(jnp.asarray(mask)), float) for f in (grpo_weights, dapo_weights, dr_grpo_weights))
    answered = mask.any(axis=1)
    np.testing.assert_allclose(grpo.sum(axis=1), answered / 24, rtol=1e-6)  # each completion alike
    for weights, one in ((dapo, 1 / mask.sum()), (dr_grpo, 1 / (24 * 31))):  # each token alike
        np.testing.assert_allclose(weights, one * mask, rtol=1e-6)


def test_a_token_weighs_the_same_in_dr_grpo_whatever_the_others_do():
    full, short = np.ones((24, 31), np.float32), random_mask(0)
    np.testing.assert_array_equal(dr_grpo_weights(jnp.asarray(short)), short * np.asarray(dr_grpo_weights(jnp.asarray(full))))


def test_a_step_without_a_token_has_no_loss_and_no_gradient():
    _, logprobs, old, ref, _ = random_batch()
    for aggregation in AGGREGATIONS.values():
        loss, grad, _ = value_and_grad(logprobs, old, ref, jnp.ones(B), aggregation(jnp.zeros((B, C))))
        assert loss == 0 and (grad == 0).all()
