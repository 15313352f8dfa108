"""Laws of grpo/rollout.py on made-up completions: rows and groups, what the sampler is asked for, resampling."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import C, G, P, completions_of, grade, make_run

import grpo.rollout
from grpo.rollout import advantages_of, build_batch, replace_rows, resample, rewards_of, take_groups, zero_variance_groups
from models.sampler import Samples, row_keys

pytestmark = pytest.mark.usefixtures("mesh")

NAN = math.nan


# ------------------------------------------------------------------------------------------------------ rows and groups


def test_texts_are_by_group_and_asked_is_by_row():
    completions = completions_of([1, 2, 3, 4, 1, 2], group_size=3)
    assert completions.texts == [["10-0", "10-1", "10-2"], ["10-3", "10-4", "10-5"]]
    assert [problem.id for problem in completions.asked] == ["p0", "p0", "p0", "p1", "p1", "p1"]


def test_rewards_of_a_group_are_a_row():
    rewards = rewards_of([grade("", reward) for reward in (1, 2, NAN, 4, 5, 6.5)], 3)
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [[1, 2, NAN], [4, 5, 6.5]])


def test_truncated_completions_have_a_vote_unless_they_are_masked():
    grades = [grade("", reward, cut) for reward, cut in ((1, False), (2, True), (NAN, True), (4, False))]
    np.testing.assert_array_equal(rewards_of(grades, 2), [[1, 2], [NAN, 4]])
    np.testing.assert_array_equal(rewards_of(grades, 2, mask_truncated=True), [[1, NAN], [NAN, 4]])


def test_a_group_has_no_variance_when_its_rewards_are_equal_or_fewer_than_two():
    groups = [
        [1, 1, 1],
        [1, 1, 2],
        [NAN, 1, 1],
        [NAN, 1, 2],
        [NAN, NAN, 1],
        [NAN, NAN, NAN],
        [0.0, -0.0, 0.0],
        [1, 1 + 1e-6, 1],
    ]
    expected = [True, False, True, False, True, True, True, False]
    rewards = np.array(groups, np.float32)
    assert zero_variance_groups(rewards).tolist() == expected
    assert (advantages_of(rewards, make_run().config) == 0).all(axis=1).tolist() == expected


@pytest.mark.parametrize(
    ("scale", "divisors"),
    [("group", [math.sqrt(2) + 1e-4, math.sqrt(18) + 1e-4]), ("batch", [math.sqrt(20 / 3) + 1e-4] * 2), ("none", [1, 1])],
)
def test_the_run_says_what_advantages_are_divided_by(scale, divisors):
    """Groups (1, 3) and (0, 6): deviations of 1 and 3; the batch has 2 (1 + 9) over 4 - 1."""
    advantages = advantages_of(np.array([[1, 3], [0, 6]], np.float32), make_run(advantage_scale=scale).config)
    expected = [[-1 / divisors[0], 1 / divisors[0]], [-3 / divisors[1], 3 / divisors[1]]]
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)


def test_groups_that_are_taken_bring_all_that_is_theirs():
    completions = completions_of([1, 2, 3, 4, 2, 1])
    taken = take_groups(completions, np.array([2, 0]))
    assert [problem.id for problem in taken.problems] == ["p2", "p0"]
    np.testing.assert_array_equal(taken.prompts, completions.prompts[[2, 0]])
    np.testing.assert_array_equal(taken.prompt_lengths, completions.prompt_lengths[[2, 0]])
    assert taken.row_texts == ["10-4", "10-5", "10-0", "10-1"] and taken.texts[0] == ["10-4", "10-5"]
    for mine, all_of_them in zip(jax.tree.leaves(taken.samples), jax.tree.leaves(completions.samples), strict=True):
        np.testing.assert_array_equal(mine, all_of_them[[4, 5, 0, 1]])


def test_rows_that_are_replaced_are_the_others_and_no_array_is_written_to():
    old, new = completions_of([1, 2, 3, 4]), completions_of([4, 3, 2, 1], first=50)
    before = jax.tree.map(np.copy, old.samples)
    mixed = replace_rows(old, new, np.array([0, 3]))
    assert mixed.row_texts == ["50-0", "10-1", "10-2", "50-3"] and mixed.problems == old.problems
    for leaf, a, b in zip(*map(jax.tree.leaves, (mixed.samples, old.samples, new.samples)), strict=True):
        np.testing.assert_array_equal(leaf, np.stack([b[0], a[1], a[2], b[3]]))
    for leaf, same in zip(jax.tree.leaves(old.samples), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(leaf, same)


def test_a_batch_takes_mask_advantages_and_logprobs_by_row():
    completions, rewards = completions_of([1, 2, 3, C]), np.array([[1, 3], [NAN, 6]], np.float32)
    advantages = np.array([[-1, 1], [0, 2]], np.float32)
    for mask_truncated, lengths in ((False, [1, 2, 0, C]), (True, [1, 2, 0, 0])):
        mask, batch = build_batch(completions, rewards, advantages, make_run(mask_truncated=mask_truncated))
        np.testing.assert_array_equal(mask, np.arange(C) < np.array(lengths)[:, None])
        np.testing.assert_array_equal(batch.mask, mask)
        np.testing.assert_array_equal(batch.advantages, [-1, 1, 0, 2])
        np.testing.assert_array_equal(batch.sampler_logprobs, completions.samples.logprobs)
        np.testing.assert_array_equal(batch.prompts, completions.prompts)


# ------------------------------------------------------------------------------------------ what the sampler is asked for


@pytest.fixture
def sampler(monkeypatch) -> list[dict[str, Any]]:
    """The arguments of each call of `prefill` and `decode`, which answer with 3, 2, 1 and C tokens."""
    calls: list[dict[str, Any]] = []
    answer: Any = completions_of([3, 2, 1, C]).samples

    def prefill(params, prompts, lengths, model, execution):
        calls.append({"params": params, "prompts": prompts, "lengths": lengths, "execution": execution})
        return "prefilled"

    def decode(params, prefilled, keys, temperature, limits, model, execution, sampling) -> Samples:
        assert prefilled == "prefilled"
        calls[-1] |= {"keys": keys, "temperature": temperature, "limits": limits, "sampling": sampling, "decode": execution}
        return answer

    monkeypatch.setattr(grpo.rollout, "prefill", prefill)
    monkeypatch.setattr(grpo.rollout, "decode", decode)
    monkeypatch.setattr(grpo.rollout, "sampling_params", lambda weights, model, execution: ("cast", weights, execution))
    return calls


@pytest.mark.parametrize("attempt", [0, 2])
def test_the_stream_of_a_row_is_that_of_seed_step_attempt_and_row(sampler, attempt):
    run = make_run(seed=5)
    grpo.rollout.sample("weights", [3, 1], 7, run, attempt=attempt)  # type: ignore[arg-type]
    expected = row_keys(5, 7, jnp.array([4 * attempt, 4 * attempt + 1, 4 * attempt + 2, 4 * attempt + 3]))
    assert jax.random.key_data(sampler[0]["keys"]).tolist() == jax.random.key_data(expected).tolist()


def test_prompts_temperature_and_limits_reach_the_sampler(sampler):
    run = make_run(temperature=0.7, top_k=3, top_p=0.9, halvings=2)
    found = grpo.rollout.sample("weights", [3, 1], 1, run)  # type: ignore[arg-type]
    grpo.rollout.sample("weights", [3, 1], 1, run, np.array([1, 2, 3, 4]))  # type: ignore[arg-type]
    first, second = sampler
    assert first["params"] == ("cast", "weights", run.sample) and first["execution"] == first["decode"] == run.sample
    padded = [run.prompt_ids[i] + [0] * (P - len(run.prompt_ids[i])) for i in (3, 1)]
    assert np.asarray(first["prompts"]).tolist() == padded and np.asarray(first["lengths"]).tolist() == [1, 2]
    assert first["temperature"].dtype == np.float32 and np.asarray(first["temperature"]).tolist() == [np.float32(0.7)] * 4
    assert first["limits"].dtype == np.int32 and np.asarray(first["limits"]).tolist() == [C] * 4
    assert np.asarray(second["limits"]).tolist() == [1, 2, 3, 4]
    sampling = first["sampling"]
    assert (sampling.width, sampling.stop_ids, sampling.top_k, sampling.top_p, sampling.halvings) == (C, (1,), 3, 0.9, 2)
    assert found.problems == [run.problems[3], run.problems[1]] and found.prompts.tolist() == padded


def test_a_text_is_decoded_from_the_tokens_of_its_row_and_no_more(sampler):
    found = grpo.rollout.sample("weights", [0, 1], 1, make_run())  # type: ignore[arg-type]
    assert found.row_texts == ["10 11 12", "14 15", "18", "22 23 24 25"]


def test_the_grader_gets_text_problem_and_truncation_of_each_row():
    seen = []

    def grader(texts, problems, truncated):
        seen.append((list(texts), [problem.id for problem in problems], list(truncated)))
        return ["a grade"]

    assert grpo.rollout.grade(completions_of([1, C, 3, C]), make_run(grader)) == ["a grade"]
    assert seen == [(["10-0", "10-1", "10-2", "10-3"], ["p0", "p0", "p1", "p1"], [False, True, False, True])]
    assert all(type(cut) is bool for cut in seen[0][2])  # grades are written as JSON


def test_a_coin_is_fair_reproducible_and_of_each_completion_by_itself():
    """Added to a reward, whatever the text: over 60 steps of 4 rows half are heads, and equal texts differ."""
    completions = completions_of([1, C, 3, C])

    def grader(texts, problems, truncated):
        return [grade("the same", reward) for reward in (1.0, NAN, 2.0, 1.0)]

    def coins(step: int, attempt: int = 0, seed: int = 0) -> list[float]:
        grades = grpo.rollout.grade(completions, make_run(grader, reward_coin=25.0, seed=seed), step, attempt)
        rewards, found = [one["reward"] for one in grades], [one["components"]["coin"] for one in grades]
        np.testing.assert_array_equal(rewards, np.array([1.0, NAN, 2.0, 1.0]) + found)
        assert [one["components"]["own"] for one in grades][::2] == [1.0, 2.0]
        return found

    flips = np.array([coins(step) for step in range(60)])
    assert set(flips.reshape(-1)) == {0.0, 25.0} and 0.4 < (flips > 0).mean() < 0.6
    assert (flips[:, 0] != flips[:, 3]).any()
    assert coins(7) == flips[7].tolist() and [coins(7, attempt) for attempt in range(9)] != [coins(7)] * 9
    assert [coins(step, seed=1) for step in range(9)] != flips[:9].tolist()
    assert "coin" not in grpo.rollout.grade(completions, make_run(grader), 3)[0]["components"]


# ------------------------------------------------------------------------------------------------------------ resampling


@pytest.fixture
def attempts(monkeypatch) -> list[tuple[int, list[int]]]:
    """(attempt, limits) of each call of `sample`, whose rows are numbered from 100 times the attempt."""
    calls = []

    def sample(weights, indices, step, run, limits, attempt):
        assert (weights, indices, step) == ("weights", "indices", 9)
        calls.append((attempt, np.asarray(limits).tolist()))
        return completions_of([2] * (3 * G), first=100 * attempt)

    monkeypatch.setattr(grpo.rollout, "sample", sample)
    return calls


def resampled(rewards: dict[str, float], tries: int, limits: np.ndarray | None = None):
    """Three groups of two, whose rewards are 0 but for those named by (attempt * 100)-(row): texts, rewards, count."""

    def grader(texts, problems, truncated):
        return [grade(text, rewards.get(text, 0.0)) for text in texts]

    run = make_run(grader, resample=tries)
    first = completions_of([2] * (3 * G), first=0)
    grades = grader(first.row_texts, first.asked, [])
    kept, grades, count = resample(first, grades, "weights", "indices", 9, run, limits)  # type: ignore[arg-type]
    assert [each["text"] for each in grades] == kept.row_texts
    tokens = [int(text.split("-")[0]) + int(text.split("-")[1]) * C for text in kept.row_texts]
    assert kept.samples.tokens[:, 0].tolist() == tokens  # tokens come with their texts
    return kept.row_texts, [each["reward"] for each in grades], count


def test_the_first_attempt_with_a_spread_is_kept_and_the_first_of_all_without_one(attempts):
    """Group 0 has a spread at once, group 1 in attempts 1 and 2, group 2 never."""
    rewards = {"0-0": 1.0, "100-0": 5.0, "100-3": 2.0, "200-2": 3.0, "100-4": 4.0, "100-5": 4.0}
    texts, kept, count = resampled(rewards, 2)
    assert texts == ["0-0", "0-1", "100-2", "100-3", "0-4", "0-5"]
    assert kept == [1.0, 0.0, 0.0, 2.0, 0.0, 0.0] and count == 2
    assert attempts == [(1, [1, 1, C, C, C, C]), (2, [1, 1, 1, 1, C, C])]


def test_a_spread_that_only_truncated_rows_make_is_none_where_they_have_no_vote(attempts):
    """Group 0 has one; in attempt 1 it would again, in attempt 2 its two rows that end differ."""

    def grader(texts, problems, truncated):
        rewards = {"0-0": -15.0, "100-1": -15.0, "200-0": 3.0, "0-2": 3.0, "0-4": 3.0}
        return [grade(text, rewards.get(text, 1.0), rewards.get(text) == -15.0) for text in texts]

    first = completions_of([2] * 6, first=0)
    grades = grader(first.row_texts, first.asked, [])
    for masked, expected in ((True, ["200-0", "200-1"]), (False, ["0-0", "0-1"])):
        run = make_run(grader, resample=2, mask_truncated=masked)
        kept, _, count = resample(first, grades, "weights", "indices", 9, run, None)  # type: ignore[arg-type]
        assert kept.row_texts == [*expected, "0-2", "0-3", "0-4", "0-5"] and count == masked


def test_resampling_ends_when_every_group_has_a_spread_and_keeps_to_the_limits(attempts):
    rewards = {"0-0": 1.0, "0-2": 1.0, "100-4": 1.0}
    texts, _, count = resampled(rewards, 5, np.array([2, 3, 2, 3, 4, 2]))
    assert texts == ["0-0", "0-1", "0-2", "0-3", "100-4", "100-5"] and count == 1
    assert attempts == [(1, [1, 1, 1, 1, 4, 2])]


def test_with_a_spread_everywhere_nothing_is_sampled_again(attempts):
    texts, _, count = resampled({"0-0": 1.0, "0-2": 1.0, "0-5": 1.0}, 3)
    assert texts == [f"0-{b}" for b in range(6)] and count == 0 and attempts == []
