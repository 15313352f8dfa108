"""Laws of grpo/step.py: what a step adds to the batch, and when it updates."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODEL, C, G, Q, completions_of, grade, make_params, make_run, sum_of_ids

import grpo.rollout
import grpo.step
from grpo.rollout import build_batch
from grpo.runs.metrics import rollout_metrics
from grpo.step import add_logprobs, one_step
from grpo.update import completion_logprobs, frozen, init_state, learnable, reference_of, starting_point
from models.gemma import Adapted
from models.lora import Adapter, attach

REWARDS = np.array([[1, 3], [0, 6]], np.float32)


@pytest.fixture(scope="module")
def params(mesh):
    return make_params()


# --------------------------------------------------------------------------------------------------- log-probabilities


@pytest.fixture
def batch(params):
    _, batch = build_batch(completions_of([1, 2, 3, C], first=4), REWARDS, np.sign(REWARDS - 2), make_run())
    return batch


def logprobs(weights, batch) -> np.ndarray:
    run = make_run()
    return np.asarray(completion_logprobs(weights, batch, MODEL, run.train, run.update))


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_old_logprobs_are_the_policys_when_a_rollout_is_used_twice_and_reference_ones_the_references(params, batch, updates):
    reference, run = make_params(1), make_run(updates_per_rollout=updates)
    alone, both = add_logprobs(batch, params, None, run), add_logprobs(batch, params, reference, run)
    assert alone.ref_logprobs is None
    np.testing.assert_array_equal(both.ref_logprobs, logprobs(reference, batch))
    assert np.abs(np.asarray(both.ref_logprobs) - logprobs(params, batch)).max() > 0.1
    for found in (alone, both):
        if updates == 1:
            assert found.old_logprobs is None
        else:
            np.testing.assert_array_equal(found.old_logprobs, logprobs(params, batch))
        assert found.packed is batch.packed and found.mask is batch.mask


# ------------------------------------------------------------------------------------------------------------ one step


@pytest.fixture
def trained(monkeypatch) -> list[SimpleNamespace]:
    """The calls of `train_step`, which counts them in the state; and a sampler whose completions are made up."""
    calls: list[SimpleNamespace] = []

    def train_step(state, batch, rate, model, execution, config, base):
        calls.append(SimpleNamespace(state=state, batch=batch, rate=rate, base=base))
        return (
            SimpleNamespace(params=state.params, updates=state.updates + 1),
            {"update": state.updates},
            {"terms": state.updates},
        )

    def sample(weights, indices, step, run, limits=None, attempt=0):
        return completions_of([1, 2, 3, C], first=4)

    monkeypatch.setattr(grpo.step, "train_step", train_step)
    monkeypatch.setattr(grpo.rollout, "sample", sample)
    return calls


def graded(rewards: Any):
    values = np.asarray(rewards).reshape(-1).tolist()
    return lambda texts, problems, cut: [grade(text, reward) for text, reward in zip(texts, values, strict=True)]


@pytest.mark.parametrize(("schedule", "step"), [("session", 2), ("session", 3), ("run", 2), ("run", 3)])
def test_a_step_makes_one_update_for_each_rate_of_its_schedule_in_order(params, trained, schedule, step):
    """Steps 1 and 2 are session 1, 3 to 6 session 2; two updates a step; one update of warm-up."""
    run = make_run(
        graded(REWARDS), updates_per_rollout=2, schedule=schedule, sessions=2, new_problems=2, max_steps=4, epochs=2,
        warmup_steps=1, beta=0.0,
    )  # fmt: skip
    assert [(session.start, session.end) for session in run.sessions] == [(0, 2), (2, 6)]
    state: Any = SimpleNamespace(params=params, updates=5)
    session = run.sessions[step // 3]
    after, result = one_step(step, session, state, run, base=None)
    first, last = (session.start, session.end) if schedule == "session" else (0, 6)
    total, expected = 2 * (last - first), []
    for update in (2 * (step - 1 - first), 2 * (step - 1 - first) + 1):
        share = (update - 1) / (total - 1)
        expected.append(0.01 * (1 / 2 if update < 1 else 0.55 + 0.45 * np.cos(np.pi * share)))
    assert [call.rate for call in trained] == result.rates == pytest.approx(expected, rel=1e-12)
    assert result.rates[0] != result.rates[1]
    assert [call.state.updates for call in trained] == [5, 6] and after.updates == 7  # type: ignore[attr-defined]
    assert result.stats == {"update": 6} and result.terms == {"terms": 6}  # of the last update
    assert trained[0].batch is trained[1].batch is result.batch and result.batch.old_logprobs is not None


@pytest.mark.parametrize(
    ("rewards", "changes"),
    [(np.full((Q, G), np.nan), {}), (REWARDS, {"mask_truncated": True})],
    ids=["no reward", "all truncated"],
)
def test_when_no_token_counts_there_is_no_update_and_the_state_is_the_same_object(
    params, trained, monkeypatch, rewards, changes
):
    run = make_run(graded(rewards), beta=0.0, **changes)
    if changes:
        monkeypatch.setattr(grpo.rollout, "sample", lambda *arguments: completions_of([C] * 4, first=4))
    state: Any = SimpleNamespace(params=params, updates=5)
    after, result = one_step(1, run.sessions[0], state, run)
    assert after is state and trained == [] and result.stats == result.terms == {}
    assert not result.mask.any() and len(result.rates) == 1


def test_equal_rewards_make_an_update_only_where_the_kl_pulls(params, trained):
    """Towards another reference; the policy itself does not pull."""
    run = make_run(graded(np.ones((Q, G))))
    state: Any = SimpleNamespace(params=params, updates=0)
    _, result = one_step(1, run.sessions[0], state, run, reference=make_params(1))
    assert len(trained) == 1 and not result.advantages.any()
    assert trained[0].batch.ref_logprobs is not None
    after, result = one_step(1, run.sessions[0], state, run, reference=params)
    assert len(trained) == 1 and after is state and result.stats == result.terms == {} and result.mask.any()


def of_dtype(dtype: str, *arguments: Any, **changes: Any):
    run = make_run(*arguments, **changes)
    return replace(run, train=replace(run.train, dtype=dtype), sample=replace(run.sample, dtype=dtype))


def same(one: Any, other: Any) -> bool:
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="default"),
        pytest.param({"updates_per_rollout": 2, "weight_decay": 0.1}, id="mu 2, decay", marks=pytest.mark.long),
        pytest.param({"beta": 0.0, "microbatches": 2}, id="no reference, parts", marks=pytest.mark.long),
        pytest.param({"lora_rank": 2, "beta": 0.5}, id="lora"),
        pytest.param({"unbiased_kl": True, "aggregation": "dapo"}, id="unbiased", marks=pytest.mark.long),
    ],
)
def test_nothing_to_learn_moves_nothing_and_one_group_that_differs_moves_the_policy(params, dtype, changes):
    """Weights, moments and Adam's count, bit for bit, where moments are there: rounding alone would move every weight."""
    equal, mixed = np.ones((Q, G)), np.array([[1, 1], [1, 2]])
    run = of_dtype(dtype, graded(equal), **changes)
    trained, base = starting_point(jax.tree.map(jnp.array, params), MODEL, dtype, 0, run.update)
    reference = reference_of(trained, base, dtype, run.update) if run.config.beta else None
    state = init_state(trained, run.update)
    moments = jax.tree.map(lambda leaf: leaf + jnp.asarray(1, leaf.dtype), state.opt_state)
    state = replace(state, opt_state=moments)
    before = jax.device_get(state)
    after, result = one_step(1, run.sessions[0], state, run, reference, base)
    assert same(jax.device_get(after), before) and result.mask.any() and not result.stats
    after, result = one_step(1, run.sessions[0], after, replace(run, grade=graded(mixed)), reference, base)
    assert result.stats and not same(after.params, before.params)
    after_all = jax.device_get(after)
    after, result = one_step(2, run.sessions[0], after, run, reference, base)  # equal again: now only the KL pulls
    assert same(jax.device_get(after), after_all) == (reference is None) == (not result.stats)


def test_with_adapters_the_reference_is_another_policy_as_soon_as_b_is_not_zero(params, batch):
    """Or as soon as they are not those of the session's start."""
    quiet = replace(batch, advantages=0 * batch.advantages)

    def learns(batch, weights, reference):
        return learnable(batch.mask, batch.advantages, weights, reference)

    def adapted(b: float):
        return attach(params, {"q": Adapter(jnp.full((1, 8, 2), 0.5), jnp.zeros((1, 2, 8)).at[0, 1, 3].set(b))}, 1.5)

    assert not learns(quiet, adapted(0.0), params) and learns(quiet, adapted(1e-9), params)
    assert not learns(quiet, adapted(0.25), adapted(0.25)) and learns(quiet, adapted(0.25), adapted(0.5))
    assert learns(batch, adapted(0.0), params) and not learns(replace(batch, mask=0 * batch.mask), adapted(1.0), params)
    one = replace(params, final_norm=params.final_norm.at[0].set(1.0))
    moved = replace(params, final_norm=params.final_norm.at[0].set(1 + 1e-6))
    assert learns(quiet, moved, one) and not learns(quiet, moved, frozen(one, "bfloat16"))  # the same when cast
    assert not learns(quiet, params, None)


def test_rows_without_a_loss_have_no_vote(params, trained, monkeypatch):
    """Of group 0 one of two ends: alone, it is neither good nor bad, whatever the truncated one's penalty."""
    monkeypatch.setattr(grpo.rollout, "sample", lambda *arguments: completions_of([1, C, 2, 3], first=4))

    def grader(texts, problems, cut):
        return [grade(text, -15.0 if end else reward, end) for text, end, reward in zip(texts, cut, [0, 0, 1, 3], strict=True)]

    state: Any = SimpleNamespace(params=params, updates=0)
    each, known = 1 / (np.sqrt(2) + 1e-4), 7.5 / (np.sqrt(112.5) + 1e-4)
    for masked, first in ((True, [0, 0]), (False, [known, -known])):
        run = make_run(grader, beta=0.0, mask_truncated=masked)
        _, result = one_step(1, run.sessions[0], state, run)
        np.testing.assert_allclose(result.advantages, [first, [-each, each]], rtol=1e-6)
        assert result.mask.sum(axis=1).tolist() == [1, 0 if masked else C, 2, 3]
        metrics = rollout_metrics(result, masked)
        assert metrics["frac_reward_zero_std"] == (0.5 if masked else 0) and metrics["reward"] == pytest.approx((-15 + 4) / 4)
        assert metrics["reward_std"] == pytest.approx(np.sqrt(2) if masked else (np.sqrt(2) + np.sqrt(112.5)) / 2)


def test_the_advantages_and_the_mask_of_a_step_are_those_of_its_rewards(params, trained):
    rewards = np.array([[1, 3], [np.nan, 6]], np.float32)
    run = make_run(graded(rewards), beta=0.0)
    state: Any = SimpleNamespace(params=params, updates=0)
    _, result = one_step(1, run.sessions[0], state, run)
    each = 1 / (np.sqrt(2) + 1e-4)
    np.testing.assert_allclose(result.advantages, [[-each, each], [0, 0]], rtol=1e-6)
    assert result.mask.sum(axis=1).tolist() == [1, 2, 0, C] and result.resampled == 0
    np.testing.assert_array_equal(result.batch.advantages, result.advantages.reshape(-1))
    np.testing.assert_array_equal(result.batch.mask, result.mask)


def test_limits_reach_the_sampler_also_when_it_samples_again(params, trained, monkeypatch):
    """Equal rewards in the first group: its rows are sampled again within their limits, the others to one token."""
    seen = []

    def sample(weights, indices, step, run, limits=None, attempt=0):
        seen.append((attempt, None if limits is None else np.asarray(limits).tolist()))
        return completions_of([1, 2, 3, C], first=4)

    monkeypatch.setattr(grpo.rollout, "sample", sample)

    def grader(texts, problems, cut):
        return [grade(text, reward) for text, reward in zip(texts, [1.0, 1.0, 2.0, 3.0], strict=False)]

    run, state = make_run(grader, resample=1, beta=0.0), SimpleNamespace(params=params, updates=0)
    _, result = one_step(1, run.sessions[0], state, run, limits=np.array([3, 2, 4, 1]))  # type: ignore[arg-type]
    assert seen == [(0, [3, 2, 4, 1]), (1, [3, 2, 1, 1])] and result.resampled == 1


def test_with_lora_the_policy_that_samples_is_the_base_with_its_adapters(params, trained, monkeypatch):
    seen = []

    def sample(weights, indices, step, run, limits=None, attempt=0):
        seen.append((weights, np.asarray(indices).tolist(), step))
        return completions_of([1, 2, 3, C], first=4)

    monkeypatch.setattr(grpo.rollout, "sample", sample)
    run = make_run(graded(REWARDS), beta=0.0, lora_rank=2, lora_alpha=3.0, lora_targets="q")
    adapters = {"q": Adapter(np.full((1, 8, 2), 0.5), np.full((1, 2, 8), 0.25))}
    state: Any = SimpleNamespace(params=adapters, updates=0)
    one_step(2, run.sessions[0], state, run, base=params)
    ((weights, indices, step),) = seen
    assert weights.embedding is params.embedding and weights.layers.k is params.layers.k
    assert isinstance(weights.layers.q, Adapted) and weights.layers.q.scale == 1.5
    assert weights.layers.q.base is params.layers.q and weights.layers.q.a is adapters["q"].a
    assert step == 2 and indices == run.sessions[0].problems_of(2).tolist()
    assert trained[0].base is params and trained[0].state is state


def test_a_real_step_at_two_updates_uses_and_frees_its_state(params, monkeypatch):
    """The sampler's and the trainer's programs together: the policy's own log-probabilities are the sampler's."""
    run = make_run(sum_of_ids, updates_per_rollout=2, beta=0.0)
    state = init_state(jax.tree.map(lambda leaf: leaf + 0, params), run.update)
    after, result = one_step(1, run.sessions[0], state, run)
    assert int(after.opt_state[1].count) == 2 and jax.tree.leaves(state)[0].is_deleted()
    np.testing.assert_allclose(
        np.asarray(result.batch.old_logprobs)[result.mask], result.completions.samples.logprobs[result.mask], atol=1e-4
    )
    assert [each["text"] for each in result.grades] == result.completions.row_texts
    assert float(result.stats["ratio/max"]) > 1.001  # the second update sees a policy that has moved


@pytest.mark.parametrize("resample", [0, 1])
def test_the_devices_have_the_batch_before_rewards_are_computed_unless_groups_are_sampled_again(
    params, trained, resample, monkeypatch
):
    events, begin = [], grpo.step.add_logprobs

    def grader(texts, problems, cut):
        events.append("grade")
        return [grade(text, reward) for text, reward in zip(texts, [1.0, 1.0, 2.0, 3.0], strict=False)]

    monkeypatch.setattr(grpo.step, "add_logprobs", lambda *args, **named: events.append("begin") or begin(*args, **named))
    state: Any = SimpleNamespace(params=params, updates=0)
    run = make_run(grader, resample=resample)
    _, result = one_step(1, run.sessions[0], state, run, reference=make_params(1))
    assert events == (["grade", "grade", "begin"] if resample else ["begin", "grade"])
    np.testing.assert_array_equal(result.batch.ref_logprobs, logprobs(make_params(1), result.batch))
