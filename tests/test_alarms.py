"""Laws of grpo/runs/alarms.py, on made-up histories: each alarm rings for what it names, and for nothing near it."""

from typing import Any

import numpy as np
import pytest

from grpo.runs.alarms import ENTROPY_LOW, KL_HIGH, KL_WINDOW, WINDOW, alarms, diagnose, zero_variance_steps

HEALTHY = {
    "accuracy": 0.4, "format/strict": 0.9, "entropy": 0.4, "kl/k3": 0.05, "logp_diff_sampler_trainer/mean": 0.001,
    "frac_reward_zero_std": 0.1, "frac_unscorable": 0.0, "frac_truncated": 0.0,
}  # fmt: skip
NOISE = 0.05  # of a step's accuracy and format, as 128 completions have


def history(steps: int, seed: int = 0, **courses) -> list[dict]:
    """Steps with noise around `HEALTHY`; a course is a constant, or a function of the part of the run that is over."""
    rng = np.random.default_rng(seed)
    figures: dict[str, Any] = {**HEALTHY, **{name.replace("__", "/"): value for name, value in courses.items()}}
    records = []
    for step in range(1, steps + 1):
        record: dict[str, Any] = {name: value(step / steps) if callable(value) else value for name, value in figures.items()}
        for name in ("accuracy", "format/strict"):
            record[name] = float(np.clip(record[name] + NOISE * rng.normal(), 0, 1))
        records.append({"step": step} | record)
    return records


def rang(records: list[dict]) -> list[str]:
    """Every alarm that ringed after some step, in order."""
    return list(dict.fromkeys(name for step in range(1, len(records) + 1) for name in alarms(records[:step])))


def rising(low: float, high: float):
    return lambda part: low + (high - low) * part


# ----------------------------------------------------------------------------------------------------------------- alarms


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_rings_nothing(seed):
    assert rang(history(200, seed)) == []


def test_learning_rings_nothing():
    """Accuracy and format rise, entropy falls to a fifth, the KL grows: what a good run looks like."""
    good = history(
        200, accuracy=rising(0.1, 0.9), format__strict=rising(0.5, 1), entropy=rising(0.4, 0.08), kl__k3=rising(0, 0.3)
    )
    assert rang(good) == []


@pytest.mark.parametrize("steps", [60, 400])
def test_format_that_rises_while_accuracy_falls_rings(steps):
    """Also slowly, and where accuracy ends no lower than it began."""
    records = history(steps, format__strict=rising(0.6, 0.9), accuracy=lambda part: 0.6 - 0.8 * abs(part - 0.5))
    assert rang(records) == ["format_without_accuracy"]
    line = alarms(records)["format_without_accuracy"]
    assert "accuracy fell from " in line and "format rose to " in line and "\n" not in line


@pytest.mark.parametrize(
    "courses",
    [
        {"accuracy": rising(0.6, 0.2)},  # format stays
        {"accuracy": rising(0.6, 0.2), "format__strict": rising(0.9, 0.6)},  # both fall
        {"accuracy": rising(0.4, 0.38), "format__strict": rising(0.5, 0.9)},  # too little to be told from noise
        {"format__strict": rising(0.5, 0.9)},  # accuracy stays
    ],
)
def test_only_both_together_are_the_format_alarm(courses):
    assert rang(history(200, **courses)) == []


def test_an_entropy_that_collapses_rings():
    records = history(100, entropy=lambda part: 0.5 if part < 0.6 else 0.001)
    assert rang(records) == ["entropy_collapse"]
    first = next(step for step in range(1, 101) if alarms(records[:step]))
    assert 60 < first <= 60 + WINDOW
    assert "entropy fell from 0.500 to 0.001 nats a token" in alarms(records)["entropy_collapse"]


@pytest.mark.parametrize("entropy", [0.5 * ENTROPY_LOW, rising(0.3, 0.04)])
def test_an_entropy_that_was_always_low_or_only_falls_is_none(entropy):
    assert rang(history(100, entropy=entropy)) == []


def test_a_kl_that_explodes_rings_within_few_steps_and_stops_when_it_is_over():
    records = history(60, kl__k3=lambda part: 2 * KL_HIGH if 0.5 < part <= 0.75 else 0.1)
    ringing = [step for step in range(1, 61) if "kl_explosion" in alarms(records[:step])]
    assert rang(records) == ["kl_explosion"]
    assert 30 < ringing[0] <= 30 + KL_WINDOW and 45 <= ringing[-1] < 45 + KL_WINDOW
    assert rang(history(60, kl__k3=lambda part: 2 * KL_HIGH if part == 0.5 else 0.1)) == []  # one step is no course


def test_a_sampler_unlike_the_trainer_rings():
    assert rang(history(10, logp_diff_sampler_trainer__mean=0.3)) == ["sampler_gap"]


@pytest.mark.parametrize("missing", [None, float("nan"), "absent"])
def test_steps_without_a_figure_are_left_out(missing):
    """A skipped update has no KL, a run without a reference never has one, and JSON has no NaN."""
    records = history(60, entropy=lambda part: 0.4 if part < 0.5 else 0.001, kl__k3=2 * KL_HIGH)
    for record in records[::3]:
        for name in ("entropy", "kl/k3"):
            record[name] = missing
            if missing == "absent":
                del record[name]
    assert set(rang(records)) == {"entropy_collapse", "kl_explosion"}
    for record in records:
        record["kl/k3"] = None
    assert rang(records) == ["entropy_collapse"]


# ------------------------------------------------------------------------------------------------------------- dead steps


def test_dead_steps_are_counted_from_the_end():
    for zeros, count in (([], 0), ([1, 1], 2), ([1, 0.9, 1, 1, 1], 3), ([1, 1, 0.99], 0), ([0, 1], 1)):
        assert zero_variance_steps([{"frac_reward_zero_std": zero} for zero in zeros]) == count


@pytest.mark.parametrize(
    ("figures", "cause", "change"),
    [
        ({"frac_unscorable": 1.0, "frac_truncated": 1.0}, "the rewards fail", "--strict_rewards"),
        ({"frac_truncated": 1.0, "accuracy": 0.0, "format/strict": 0.0}, "hit the length limit", "--max_new_tokens"),
        ({"accuracy": 0.97}, "all are right", "harder problems by --data"),
        ({"accuracy": 0.0, "format/strict": 0.02}, "none has the format", "--system_prompt"),
        ({"accuracy": 0.01, "format/strict": 0.98}, "all are wrong", "easier problems by --data"),
        ({"accuracy": 0.5, "format/strict": 0.98}, "are equally good", "--resample"),
    ],
)
def test_the_diagnosis_says_which_it_is_with_figures(figures, cause, change):
    """Of the dead steps only: what was before them is as different as can be."""
    before = [HEALTHY | {"step": 1, "frac_truncated": 0.5, "accuracy": 0.5}] * 30
    dead = [HEALTHY | figures | {"step": step, "frac_reward_zero_std": 1.0} for step in range(31, 35)]
    line = diagnose([*before, *dead])
    assert line.startswith("steps 31-34 had no group with two different rewards")
    assert cause in line and change in line and "\n" not in line
    right = (HEALTHY | figures)["accuracy"]
    assert f"answers right {right:.0%}" in line
