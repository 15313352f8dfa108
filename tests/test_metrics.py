"""Laws of grpo/runs/metrics.py: each metric of a rollout, by hand on two groups of three."""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import C, completions_of, grade, make_run

from grpo.runs.metrics import completion_records, rollout_metrics, step_metrics
from grpo.step import StepResult

NAN = math.nan
LENGTHS = [1, 2, C, 3, C, 2]
REWARDS = [1.0, 4.0, NAN, 2.0, 2.0, 2.0]
ADVANTAGES = np.array([[-0.5, 0.5, 0.0], [0.0, -2.0, 0.0]], np.float32)


def result_of(rewards=REWARDS, mask: Any = None) -> StepResult:
    completions = replace(completions_of(LENGTHS, group_size=3), row_texts=["a", "a b", "a b c", "", "a b c d", "a b"])
    grades = [grade(text, reward) for text, reward in zip(completions.row_texts, rewards, strict=True)]
    grades[0]["accuracy"] = {"tagged": True, "strict": True, "flexible": True}
    grades[1]["accuracy"] = {"tagged": True, "strict": False, "flexible": True}
    grades[2]["accuracy"] = {"tagged": False, "strict": False, "flexible": True}
    grades[0]["format"] = {"violation": False, "reasoning_tags": True, "answer_tags": True}
    grades[1]["format"] = {"violation": True, "reasoning_tags": True, "answer_tags": True}
    grades[2]["format"] = {"violation": True, "reasoning_tags": False, "answer_tags": True}
    if mask is None:
        mask = (np.arange(C) < np.array(LENGTHS)[:, None]) & ~np.isnan(rewards)[:, None]
    batch: Any = None
    return StepResult(completions, grades, ADVANTAGES, mask, batch, [0.1, 0.2], {"loss": jnp.float32(0.5)}, {}, 3)


def test_entropy_is_the_mean_of_minus_logprob_over_the_tokens_that_count():
    """Token c of row b has log-probability -(10 + 4 b + c) / 100; row 2 has no reward."""
    rows = {0: 1, 1: 2, 3: 3, 4: 4, 5: 2}
    values = [(10 + C * b + c) / 100 for b, length in rows.items() for c in range(length)]
    assert rollout_metrics(result_of())["entropy"] == pytest.approx(sum(values) / len(values), rel=1e-6)
    mask = np.zeros((6, C), bool)
    mask[1, 1] = mask[4, 3] = True
    assert rollout_metrics(result_of(mask=mask))["entropy"] == pytest.approx((0.15 + 0.29) / 2, rel=1e-6)


def test_means_of_rewards_are_over_the_completions_that_have_one():
    metrics = rollout_metrics(result_of())
    assert metrics["reward"] == metrics["rewards/own/mean"] == pytest.approx((1 + 4 + 2 + 2 + 2) / 5)
    assert metrics["rewards/own/std"] == pytest.approx(math.sqrt((1.2**2 + 1.8**2 + 3 * 0.2**2) / 5))
    assert metrics["reward_std"] == pytest.approx((math.sqrt(2 * 1.5**2) + 0) / 2)  # of a group, n - 1, then the mean
    assert metrics["frac_reward_zero_std"] == 1 / 2 and metrics["frac_unscorable"] == pytest.approx(1 / 6)


def test_accuracy_format_and_lengths_are_over_all_completions():
    metrics = rollout_metrics(result_of())
    expected = {
        "accuracy": 2 / 6, "accuracy/strict": 1 / 6, "accuracy/flexible": 3 / 6, "format/strict": 1 / 6,
        "format/reasoning": 2 / 6, "format/answer": 3 / 6, "frac_truncated": 2 / 6, "skipped_update": 0,
        "completions/mean_length": (1 + 2 + C + 3 + C + 2) / 6, "completions/max_length": C,
        "completions/mean_terminated_length": (1 + 2 + 3 + 2) / 4, "completions/mean_words": (1 + 2 + 3 + 0 + 4 + 2) / 6,
        "advantage/abs_mean": 3 / 6, "advantage/max": 2.0,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_resampling_also_records_the_policys_own_reward_and_accuracy(mesh):
    chosen = result_of()
    drawn = [grade("", reward) for reward in (1, 1, NAN, 1, 4, 4)]
    drawn[1]["accuracy"] = {"tagged": True, "strict": True, "flexible": True}
    seconds = {"decode": 2.0, "step": 8.0}
    metrics = step_metrics(replace(chosen, drawn=drawn), seconds, 0, make_run(resample=2))
    assert metrics["reward/before_resampling"] == pytest.approx(11 / 5)
    assert metrics["accuracy/before_resampling"] == pytest.approx(1 / 6)
    plain = step_metrics(replace(chosen, drawn=drawn), seconds, 0, make_run())
    assert {name: metrics[name] for name in plain} == plain and set(metrics) - set(plain) == {
        "reward/before_resampling", "accuracy/before_resampling",
    }  # fmt: skip


def test_without_any_reward_there_is_no_mean_and_no_update():
    metrics = rollout_metrics(replace(result_of([NAN] * 6), stats={}))
    for name in ("reward", "reward_std", "entropy", "rewards/own/mean", "rewards/own/std"):
        assert math.isnan(metrics[name]), name
    assert metrics["skipped_update"] == 1 and metrics["frac_unscorable"] == 1 and metrics["frac_reward_zero_std"] == 1


def test_a_step_adds_times_speeds_rate_and_the_updates_statistics(mesh):
    seconds = {"decode": 2.0, "update": 3.0, "step": 8.0, "sampling_params": 1.0}
    metrics = step_metrics(result_of(), seconds, 4, make_run())
    sampled = sum(LENGTHS)  # truncated and unscored ones too
    assert metrics["tokens_per_s/decode"] == sampled / 2 and metrics["tokens_per_s/total"] == sampled / 8
    times = {"prefill": 0, "decode": 2, "reward": 0, "reference": 0, "update": 3, "step": 8}
    assert {name: value for name, value in metrics.items() if name.startswith("time/")} == {
        f"time/{name}": value for name, value in times.items()
    }
    assert metrics["lr"] == 0.2 and metrics["bad_updates_in_a_row"] == 4 and metrics["resampled_groups"] == 3
    assert metrics["loss"] == 0.5 and metrics["hbm_peak"] == 0


def test_a_completions_record_is_its_grade_with_problem_advantage_and_length():
    records = completion_records(7, result_of())
    assert [record["problem"] for record in records] == ["p0"] * 3 + ["p1"] * 3
    assert [record["length"] for record in records] == LENGTHS and {record["step"] for record in records} == {7}
    assert [record["advantage"] for record in records] == ADVANTAGES.reshape(-1).tolist()
    assert records[1]["text"] == "a b" and records[1]["reward"] == 4.0 and records[1]["answer"] == "1"


def test_without_a_gold_answer_there_is_no_accuracy_and_with_some_it_is_theirs():
    result = result_of()
    for each in result.grades[1:]:
        each["accuracy"] = {}
    assert rollout_metrics(result)["accuracy"] == rollout_metrics(result)["accuracy/flexible"] == 1  # of the only one
    result.grades[0]["accuracy"] = {}
    found = rollout_metrics(result)
    assert not any(name.startswith("accuracy") for name in found) and found["reward"] == pytest.approx(11 / 5)
