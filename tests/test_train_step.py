"""Laws of one update, derived in float64: log-probabilities, loss, statistics, AdamW; on a Gemma of one layer."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import CONFIG, MODEL, C, G, P, make_params

import grpo.update
from data.batches import pack
from grpo.batch import Batch, make_batch
from grpo.update import (
    UpdateConfig,
    completion_logprobs,
    frozen,
    init_state,
    make_optimizer,
    narrow,
    policy,
    starting_point,
    token_stats,
    train_step,
)
from models.gemma import ExecutionConfig, axes, forward, prompt_slots, vocab_logits
from models.lora import Adapter
from models.sharding import ROLLOUT, STORE, make_mesh, reshard, spec, to_devices

pytestmark = pytest.mark.usefixtures("mesh")

Q = 4  # two microbatches then have two groups each, which are not next to each other
EXECUTION = ExecutionConfig()
UPDATE = replace(
    UpdateConfig.of(CONFIG),
    beta=0.1,
    epsilon_low=0.1,
    epsilon_high=0.3,
    weight_decay=0.3,
    tis_cap=1.2,
    max_grad_norm=0.05,
    logprob_chunk=Q * G * C,
)
IN_PARTS = replace(UPDATE, aggregation="dapo", microbatches=2, max_grad_norm=1e3)
LORA = replace(UPDATE, aggregation="dr_grpo", lora_rank=2, lora_alpha=4.0, lora_targets="q,down", max_grad_norm=1e3)
PROMPT_LENGTHS, LENGTHS = np.array([1, P, 2, 1]), np.array([C, 2, 3, 1, C, 2, 1, 3])
ADVANTAGES = np.array([1.0, -0.5, -2.0, 0.7, -1.0, 1.5, 0.6, -0.3], np.float32)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 32, (Q * G, C)) * (np.arange(C) < LENGTHS[:, None])
PROMPTS = RNG.integers(3, 32, (Q, P)) * (np.arange(P) < PROMPT_LENGTHS[:, None])
MASK = (np.arange(C) < LENGTHS[:, None]) & (np.arange(Q * G) != 3)[:, None]  # the last completion does not count


@pytest.fixture(scope="module")
def params(mesh):
    return make_params()


def exact_logprobs(params: Any) -> np.ndarray:
    """Of each completion by itself behind its prompt, unpacked; the softmax in float64.  BC, 0 behind the end"""
    found = np.zeros((Q * G, C))
    rows, lengths = np.zeros((Q * G, P + C), int), np.repeat(PROMPT_LENGTHS, G) + LENGTHS
    for b in range(Q * G):
        start = PROMPT_LENGTHS[b // G]
        rows[b, : lengths[b]] = [*PROMPTS[b // G, :start], *TOKENS[b, : LENGTHS[b]]]
    hidden, _ = forward(params, jnp.asarray(rows), prompt_slots(jnp.asarray(lengths), P + C), MODEL, EXECUTION)
    logits = np.asarray(vocab_logits(hidden, params, MODEL, EXECUTION), float) / UPDATE.temperature
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for b in range(Q * G):
        slots = PROMPT_LENGTHS[b // G] - 1 + np.arange(LENGTHS[b])
        found[b, : LENGTHS[b]] = logprobs[b, slots, TOKENS[b, : LENGTHS[b]]]
    return found


def shifted(logprobs: np.ndarray, seed: int) -> np.ndarray:
    """Another policy's: about a third of the tokens leave the bounds of the ratio."""
    return (logprobs + np.random.default_rng(seed).normal(0, 0.3, logprobs.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def exact(params) -> np.ndarray:
    return exact_logprobs(params)


@pytest.fixture(scope="module")
def batch(exact) -> Batch:
    """Packed, with reference and old policy."""
    batch = make_batch(PROMPTS, PROMPT_LENGTHS, TOKENS, LENGTHS, shifted(exact, 1), MASK, ADVANTAGES, 0)
    return replace(batch, ref_logprobs=jnp.asarray(shifted(exact, 2)), old_logprobs=jnp.asarray(shifted(exact, 3)))


def copied(tree: Any) -> Any:
    """For a function that is given the only copy."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def updated(params: Any, batch: Batch, rate: float, config: UpdateConfig = UPDATE, base: Any = None):
    return train_step(init_state(copied(params), config), batch, rate, MODEL, EXECUTION, config, base)


gradient_of_loss = jax.jit(
    jax.value_and_grad(grpo.update.batch_loss, has_aux=True), static_argnames=("model", "execution", "config")
)


# ------------------------------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize(("finer", "chunk", "parts"), [(0, 4 * Q * G, 1), (2, 1, 1), (0, 4, 2)])
def test_logprobs_equal_the_softmax_at_the_temperature_of_each_completion_alone(params, batch, exact, finer, chunk, parts):
    """However they are packed, in chunks of few tokens or many, whole or in microbatches: in the order of the rows."""
    packed = type(batch.packed)(*map(jnp.asarray, pack(TOKENS, LENGTHS, PROMPT_LENGTHS, finer)))
    config = replace(UPDATE, logprob_chunk=chunk, microbatches=parts)
    got = np.asarray(completion_logprobs(params, replace(batch, packed=packed), MODEL, EXECUTION, config))
    there = np.arange(C) < LENGTHS[:, None]
    np.testing.assert_allclose(got[there], exact[there], rtol=0, atol=1e-5)
    assert np.abs(np.diff(exact[0])).max() > 0.1  # tokens differ


def test_logprobs_without_a_backward_pass_recompute_nothing(params, batch):
    """Under remat full the forward pass alone would still be marked for recomputation."""
    full = replace(EXECUTION, remat="full")
    assert "remat" in str(jax.make_jaxpr(lambda p: grpo.update.logprobs_of(p, batch, MODEL, full, UPDATE))(params))
    traced = completion_logprobs.trace(params, batch, MODEL, full, UPDATE)
    assert "remat" not in str(traced.jaxpr)


# --------------------------------------------------------------------------------------------------- loss and statistics


def exact_loss(logprobs: np.ndarray, old: np.ndarray, ref: np.ndarray, sampler: np.ndarray, config: UpdateConfig) -> Any:
    """(loss, terms) in float64, by the formulas at the top of grpo/loss.py."""
    mask = MASK.astype(float)
    weights = {
        "grpo": mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / len(mask),
        "dapo": mask / mask.sum(),
        "dr_grpo": mask / mask.size,
    }[config.aggregation]
    ratio, a = np.exp(logprobs - old), ADVANTAGES[:, None].astype(float)
    surrogate = np.minimum(ratio * a, np.clip(ratio, 1 - config.epsilon_low, 1 + config.epsilon_high) * a)
    if config.tis_cap:
        surrogate = surrogate * np.minimum(np.exp(old - sampler), config.tis_cap)
    d = ref - logprobs
    kl = np.exp(d) - d - 1
    pull = ratio * kl if config.unbiased_kl else kl
    low, high = (a < 0) & (ratio < 1 - config.epsilon_low), (a > 0) & (ratio > 1 + config.epsilon_high)
    terms = {"ratio": ratio, "kl": kl, "low": low, "high": high, "weight": weights}
    return (weights * (config.beta * pull - surrogate)).sum(), terms


@pytest.mark.parametrize(
    "config",
    [UPDATE, replace(IN_PARTS, unbiased_kl=True), LORA],
    ids=["grpo", "dapo in two parts, unbiased kl", "dr_grpo with lora"],
)
def test_loss_terms_and_statistics_of_an_update_equal_float64(params, batch, exact, config):
    """Fresh adapters change no log-probability."""
    trained, base = start(params, config)
    _, stats, terms = updated(trained, batch, 0.0, config, base)
    old, ref, sampler = (np.asarray(x, float) for x in (batch.old_logprobs, batch.ref_logprobs, batch.sampler_logprobs))
    loss, expected = exact_loss(exact, old, ref, sampler, config)
    assert float(stats["loss"]) == pytest.approx(loss, abs=1e-6) and abs(loss) > 0.01
    for name, values in (
        ("ratio", "ratio"),
        ("kl", "kl"),
        ("clipped_low", "low"),
        ("clipped_high", "high"),
        ("weight", "weight"),
    ):
        np.testing.assert_allclose(np.asarray(terms[name])[MASK], expected[values][MASK], rtol=0, atol=1e-5, err_msg=name)
    assert expected["low"][MASK].any() and expected["high"][MASK].any()
    gap = np.abs(old - sampler)[MASK]
    by_hand = {
        "ratio/mean": expected["ratio"][MASK].mean(), "ratio/max": expected["ratio"][MASK].max(),
        "ratio/min": expected["ratio"][MASK].min(), "clip/low": expected["low"][MASK].mean(),
        "clip/high": expected["high"][MASK].mean(), "logp_diff_sampler_trainer/mean": gap.mean(),
        "logp_diff_sampler_trainer/max": gap.max(), "kl/k3": expected["kl"][MASK].mean(),
        "kl/k3_max": expected["kl"][MASK].max(), "kl/k1": (exact - ref)[MASK].mean(), "loss": loss, "bad_updates": 0,
    }  # fmt: skip
    assert {name: float(value) for name, value in stats.items() if name != "grad_norm"} == pytest.approx(by_hand, abs=1e-5)


def test_without_an_old_policy_the_policy_is_its_own_as_a_constant(params, batch, exact):
    """The loss and its gradient are those of an old policy that is given with the same log-probabilities: not 0."""
    weights, whole = grpo.update.grpo_weights(batch.mask), replace(UPDATE, max_grad_norm=1.0)
    given = replace(batch, old_logprobs=completion_logprobs(params, batch, MODEL, EXECUTION, UPDATE))
    (loss, _), expected = gradient_of_loss(params, None, given, weights, MODEL, EXECUTION, whole)
    (same, terms), grads = gradient_of_loss(params, None, replace(batch, old_logprobs=None), weights, MODEL, EXECUTION, whole)
    assert float(same) == pytest.approx(float(loss), abs=1e-6)
    for leaf, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5 * max(1, float(np.abs(other).max())))
    assert float(optax.tree.norm(grads)) > 0.1
    assert (np.asarray(terms["ratio"]) == 1).all()
    np.testing.assert_allclose(np.asarray(terms["old"])[MASK], exact[MASK], atol=1e-5)


def test_statistics_are_over_the_tokens_that_count_by_hand():
    """Two completions, of two tokens and of one; junk where nothing counts."""
    junk = 1e9
    mask = jnp.asarray([[1.0, 1.0], [1.0, 0.0]])

    def grid(a: float, b: float, c: float) -> jax.Array:
        return jnp.asarray([[a, b], [c, junk]])

    terms = {
        "ratio": grid(0.5, 1.0, 3.0), "clipped_low": grid(1, 0, 0), "clipped_high": grid(0, 1, 1),
        "old": grid(-1.0, -2.0, -3.0), "kl": grid(0.25, 0.0, 1.25), "logprobs": grid(-1.0, -1.0, -2.0),
    }  # fmt: skip
    nothing: Any = None
    batch = Batch(nothing, nothing, nothing, mask, grid(-1.5, -2.0, -2.0), nothing, ref_logprobs=grid(-2.0, -1.5, -2.5))
    expected = {
        "ratio/mean": 1.5, "ratio/max": 3.0, "ratio/min": 0.5, "clip/low": 1 / 3, "clip/high": 2 / 3,
        "logp_diff_sampler_trainer/mean": 0.5, "logp_diff_sampler_trainer/max": 1.0, "kl/k3": 0.5, "kl/k3_max": 1.25,
        "kl/k1": (1.0 + 0.5 + 0.5) / 3,
    }  # fmt: skip
    stats = {name: float(value) for name, value in token_stats(terms, batch).items()}
    assert stats == pytest.approx(expected)
    assert set(token_stats(terms, replace(batch, ref_logprobs=None))) == {
        name for name in expected if not name.startswith("kl/")
    }


# --------------------------------------------------------------------------------------------------------------- AdamW


class ExactAdamW:
    """AdamW in float64 on a dict of arrays; gradients are first scaled down to the norm."""

    def __init__(self, config: UpdateConfig, weights: dict[str, np.ndarray]):
        self.config, self.weights, self.count = config, {name: np.asarray(w, float) for name, w in weights.items()}, 0
        self.m = self.v = {name: np.zeros(w.shape) for name, w in self.weights.items()}

    def step(self, grads: dict[str, np.ndarray], rate: float) -> None:
        c, self.count = self.config, self.count + 1
        norm = np.sqrt(sum((np.asarray(g, float) ** 2).sum() for g in grads.values()))
        clipped = {name: np.asarray(g, float) * min(1.0, c.max_grad_norm / norm) for name, g in grads.items()}
        self.m = {name: c.adam_b1 * self.m[name] + (1 - c.adam_b1) * g for name, g in clipped.items()}
        self.v = {name: c.adam_b2 * self.v[name] + (1 - c.adam_b2) * g**2 for name, g in clipped.items()}
        for name, w in self.weights.items():
            m_hat, v_hat = self.m[name] / (1 - c.adam_b1**self.count), self.v[name] / (1 - c.adam_b2**self.count)
            self.weights[name] = w - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + c.weight_decay * w)


@pytest.mark.parametrize("norm", [1e-7, 1.0, 1e9], ids=["eps counts", "clipped", "not clipped"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_three_updates_of_adamw_equal_float64(norm, decay):
    """Clipping comes before the moments; eps = 1e-8 is added to the root; decay is of the old weight, times the rate."""
    config = replace(UPDATE, max_grad_norm=norm, weight_decay=decay, adam_b1=0.8, adam_b2=0.97)
    rng = np.random.default_rng(4)
    weights = {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    exact, optimizer = ExactAdamW(config, weights), make_optimizer(config)
    params: Any = jax.tree.map(jnp.asarray, weights)
    state = optimizer.init(params)
    for rate, size in ((0.1, 1.0), (0.05, 5.0), (0.2, 0.3)):
        grads = {name: (size * rng.normal(size=w.shape)).astype(np.float32) for name, w in weights.items()}
        directions, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = jax.tree.map(lambda w, direction, rate=rate: w - rate * direction, params, directions)
        exact.step(grads, rate)
        for name in weights:
            np.testing.assert_allclose(params[name], exact.weights[name], rtol=0, atol=2e-6)
    for name in weights:
        np.testing.assert_allclose(state[1].mu[name], exact.m[name], rtol=1e-5, atol=1e-7 * norm)  # type: ignore[index]
        np.testing.assert_allclose(state[1].nu[name], exact.v[name], rtol=1e-5)  # type: ignore[index]


def start(params: Any, config: UpdateConfig) -> tuple[Any, Any]:
    return starting_point(copied(params), MODEL, "float32", 0, config)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


@pytest.mark.parametrize("config", [UPDATE, IN_PARTS, LORA], ids=["clipped", "in two parts", "lora"])
def test_two_updates_move_every_parameter_as_adamw_says(params, batch, config):
    """The gradient is that of the loss over the whole batch; the second is taken where the first update led."""
    trained, base = start(params, config)
    if base is not None:  # fresh adapters have a B of 0, and then A has no gradient
        trained = jax.tree.map(lambda leaf: leaf + 0.1, trained)
    exact, weights = ExactAdamW(config, flat(trained)), grpo.update.AGGREGATIONS[config.aggregation](batch.mask)
    whole = replace(config, microbatches=1, aggregation="grpo", max_grad_norm=1.0)  # the loss reads none of these
    state = init_state(copied(trained), config)
    for rate in (1e-2, 3e-2):
        grads = flat(gradient_of_loss(state.params, base, batch, weights, MODEL, EXECUTION, whole)[1])
        state, stats, _ = train_step(state, batch, rate, MODEL, EXECUTION, config, base)
        total = np.sqrt(sum((g.astype(float) ** 2).sum() for g in grads.values()))
        assert float(stats["grad_norm"]) == pytest.approx(total, rel=1e-5)  # before it is clipped
        assert 0.05 < total < 1e3
        # Where a gradient is as small as its own rounding, its sign decides the direction: follow our own moments there.
        exact.step(grads, rate)
        for name, leaf in flat(state.params).items():
            steady = np.abs(grads[name]) > 1e-4 * np.abs(grads[name]).max()
            assert steady.mean() > 0.1
            np.testing.assert_allclose(leaf[steady], exact.weights[name][steady], rtol=0, atol=2e-3 * rate)
    assert int(state.opt_state[1].count) == 2 and int(state.bad_updates) == int(state.bad_in_a_row) == 0


def test_the_first_state_has_the_parameters_and_nothing_else(params):
    state = init_state(params, UPDATE)
    for leaf, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(leaf, other)
    moments = state.opt_state[1]
    assert jax.tree.structure(moments.mu) == jax.tree.structure(moments.nu) == jax.tree.structure(params)
    for leaf in jax.tree.leaves((moments.mu, moments.nu)):
        assert leaf.dtype == jnp.float32 and not np.asarray(leaf).any()
    assert int(moments.count) == int(state.bad_updates) == int(state.bad_in_a_row) == 0


def with_first_row(values: Any, row: Any, letters: str) -> Any:
    changed = np.asarray(values).copy()
    changed[0] = row
    return to_devices(changed, letters)


@pytest.mark.parametrize(
    ("advantage", "finite_loss", "finite_gradient"),
    [(np.inf, False, False), (1e30, True, False), (2.3e38, False, True)],
    ids=["both", "gradient alone", "loss alone"],
)
def test_an_update_that_is_not_finite_changes_the_counters_only(params, batch, exact, advantage, finite_loss, finite_gradient):
    """The square of a gradient of 1e30 is beyond float32. So is 2.3e38 * (1 + epsilon_high) * tis_cap, of clipped tokens."""
    bad = replace(batch, advantages=with_first_row(ADVANTAGES, advantage, "B"))
    if finite_gradient:
        bad = replace(
            bad,
            old_logprobs=with_first_row(batch.old_logprobs, exact[0] - 1, "BC"),
            sampler_logprobs=with_first_row(batch.sampler_logprobs, exact[0] - 2, "BC"),
        )
    state, stats, _ = updated(params, batch, 1e-2)
    counts = [(int(state.bad_updates), int(state.bad_in_a_row))]
    for each in (bad, bad, batch, bad):
        before = jax.device_get((state.params, state.opt_state))
        state, stats, _ = train_step(state, each, 1e-2, MODEL, EXECUTION, UPDATE)
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state)), strict=True)
        same = [np.array_equal(old, new) for old, new in pairs]
        assert all(same) if each is bad else not any(same)
        assert np.isfinite(float(stats["grad_norm"])) == (each is batch or finite_gradient)
        assert np.isfinite(float(stats["loss"])) == (each is batch or finite_loss)
        counts.append((int(state.bad_updates), int(state.bad_in_a_row)))
        assert float(stats["bad_updates"]) == counts[-1][0]
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


def test_an_update_reuses_the_memory_of_its_state(params, batch):
    state = init_state(copied(params), UPDATE)
    new, *_ = train_step(state, batch, 1e-2, MODEL, EXECUTION, UPDATE)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch)))


# --------------------------------------------------------------------------------------- weights in other types, and LoRA


def test_narrow_frees_the_wide_leaves_and_keeps_those_that_fit():
    wide, fits = jnp.asarray([1.0, 1 / 3]), jnp.asarray([2.0], jnp.bfloat16)
    out: Any = narrow({"wide": wide, "fits": fits}, "bfloat16")  # type: ignore[arg-type]
    assert wide.is_deleted() and out["fits"] is fits and not fits.is_deleted()
    assert out["wide"].dtype == jnp.bfloat16 and out["wide"].tolist() == jnp.asarray([1.0, 1 / 3], jnp.bfloat16).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_frozen_survives_the_end_of_the_original(dtype):
    original = {"w": jnp.asarray([1.0, 1 / 3])}
    kept = frozen(original, dtype)
    expected = jnp.asarray([1.0, 1 / 3], dtype).tolist()
    original["w"].delete()
    assert kept["w"].dtype == dtype and kept["w"].tolist() == expected


def test_without_lora_the_weights_are_trained_and_are_the_policy(params):
    trained, base = starting_point(params, MODEL, "bfloat16", 0, UPDATE)
    assert trained is params and base is None and policy(trained, base, UPDATE) is params


def test_with_lora_fresh_adapters_change_nothing_and_the_base_is_narrow(params, batch):
    config = replace(UPDATE, lora_rank=2, lora_alpha=3.0, lora_targets="q,down")
    trained, base = starting_point(copied(params), MODEL, "bfloat16", 0, config)
    assert set(trained) == {"q", "down"} and base is not None  # type: ignore[arg-type]
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert jax.tree.structure(base) == jax.tree.structure(axes(MODEL))
    other, _ = starting_point(copied(params), MODEL, "bfloat16", 1, config)
    assert not np.array_equal(trained["q"].a, other["q"].a)  # type: ignore[index]  # of the seed


def test_the_policy_of_adapters_is_the_base_and_alpha_over_rank_times_their_product(params, batch):
    config = replace(UPDATE, lora_rank=2, lora_alpha=3.0, lora_targets="q")
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(1, 8, 2)).astype(np.float32), rng.normal(size=(1, 2, 8)).astype(np.float32)
    whole = np.asarray(params.layers.q, float) + 3.0 / 2 * np.einsum("LDJ,LJF->LDF", a.astype(float), b)
    expected = replace(params, layers=replace(params.layers, q=jnp.asarray(whole, jnp.float32)))
    weights = policy({"q": Adapter(jnp.asarray(a), jnp.asarray(b))}, params, config)
    got = completion_logprobs(weights, batch, MODEL, EXECUTION, config)
    np.testing.assert_allclose(np.asarray(got)[MASK], exact_logprobs(expected)[MASK], rtol=0, atol=1e-5)
    assert np.abs(exact_logprobs(expected) - exact_logprobs(params)).max() > 0.01


@pytest.mark.parametrize("devices", [1, 8])
def test_sampling_reads_the_frozen_base_itself_where_nothing_must_move(devices, params):
    """On one device, without a copy. Adapters are always copied: the update frees the trained ones."""
    config = replace(UPDATE, lora_rank=2, lora_alpha=3.0, lora_targets="q,down")
    with jax.set_mesh(make_mesh(devices=jax.devices()[:devices])):
        stored = reshard(jax.tree.map(np.asarray, params), axes(MODEL), STORE)
        for dtype in ("bfloat16", "float32"):
            trained, base = starting_point(copied(stored), MODEL, dtype, 0, config)
            weights = policy(trained, base, config)
            found = grpo.update.sampling_params(weights, MODEL, ExecutionConfig(ROLLOUT, dtype))
            assert jax.tree.structure(found) == jax.tree.structure(weights)
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
            pairs = [(found.layers.q.base, base.layers.q, devices == 1), (found.embedding, base.embedding, devices == 1)]
            for new, old, same in [*pairs, (found.layers.q.a, trained["q"].a, False)]:
                assert (new is old) == same
                np.testing.assert_array_equal(np.asarray(new), np.asarray(old.astype(dtype)))
            if devices == 8:
                assert found.layers.q.base.sharding.spec == spec("LDA", ROLLOUT)
                assert found.layers.down.a.sharding.spec == spec("LFJ", ROLLOUT)
