"""Alarms: failures of reinforcement learning that do not crash, detected from a run's metrics.

Pure functions of the history (the records of metrics.jsonl), so that a resumed run raises the same alarms as an uninterrupted
one. A figure may be missing or null in a step.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

History = Sequence[dict[str, Any]]

WINDOW = 20  # steps whose means are compared: the accuracy of single steps varies by a tenth
NOISE = 4.0  # standard errors: with one comparison a step, three would be exceeded by chance
ACCURACY_FALLS, FORMAT_RISES = 0.05, 0.02  # smaller changes do not matter, however significant
ENTROPY_LOW = 0.02  # nats a token: one nat in fifty tokens, a choice among about three texts
ENTROPY_FALLS = 0.1  # of the initial entropy: healthy learning removes three quarters of it
KL_WINDOW = 5  # steps: an exploding KL doubles within a few
KL_HIGH = 1.0  # nats a token from the reference; healthy runs stay below 0.3
GAP_HIGH = 0.1  # nats a token between sampler and trainer: rounding to bfloat16 alone gives about 0.02
MOST = 0.9  # share of the rows from which one cause explains the step


def alarms(history: History) -> dict[str, str]:
    """The alarms that are active after the last step: name -> one line."""
    found = {}
    now, first = history[-WINDOW:], history[:WINDOW]
    full = len(history) >= 2 * WINDOW
    if full:
        blocks = [history[i : i + WINDOW] for i in range(0, len(history) - 2 * WINDOW + 1, WINDOW)]  # none overlaps with now
        best = max(blocks, key=lambda block: mean(block, "accuracy"))
        if change(best, now, "accuracy") < -ACCURACY_FALLS and change(best, now, "format/strict") > FORMAT_RISES:
            found["format_without_accuracy"] = (
                f"accuracy fell from {mean(best, 'accuracy'):.1%} (steps {span(best)}) to {mean(now, 'accuracy'):.1%} "
                f"while format rose to {mean(now, 'format/strict'):.1%}: lower the weights of the format, or --learning_rate"
            )
    entropy, before = mean(now, "entropy"), mean(first, "entropy")
    if full and entropy < min(ENTROPY_LOW, ENTROPY_FALLS * before):
        found["entropy_collapse"] = (
            f"entropy fell from {before:.3f} to {entropy:.3f} nats a token: samples hardly differ; "
            "raise --temperature, --epsilon_high or --beta, or lower --learning_rate"
        )
    kl, gap = (mean(history[-KL_WINDOW:], name) for name in ("kl/k3", "logp_diff_sampler_trainer/mean"))
    if len(history) >= KL_WINDOW and kl > KL_HIGH:
        found["kl_explosion"] = f"KL to the reference is {kl:.2f} nats a token; lower --learning_rate or raise --beta"
    if len(history) >= KL_WINDOW and gap > GAP_HIGH:
        found["sampler_gap"] = f"sampler and trainer differ by {gap:.2f} nats a token: they do not use the same weights"
    return found


def values(history: Iterable[dict[str, Any]], name: str) -> np.ndarray:
    """A figure of all steps that have it."""
    found = np.array([record.get(name) for record in history], float)  # None becomes NaN
    return found[np.isfinite(found)]


def mean(history: Iterable[dict[str, Any]], name: str) -> float:
    """The mean of a figure; NaN, which compares false with everything, if no step has it."""
    found = values(history, name)
    return float(found.mean()) if len(found) else float("nan")


def change(before: History, after: History, name: str) -> float:
    """The change of the mean; 0 if it may be chance."""
    one, other = values(before, name), values(after, name)
    if len(one) < 2 or len(other) < 2:
        return 0.0
    moved = other.mean() - one.mean()
    error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    return float(moved) if abs(moved) > NOISE * error else 0.0


def span(history: History) -> str:
    return f"{history[0]['step']}-{history[-1]['step']}"


def zero_variance_steps(history: History) -> int:
    """Number of last steps in a row in which every group had equal rewards."""
    alive = [i for i, record in enumerate(history) if record["frac_reward_zero_std"] < 1]
    return len(history) - (alive[-1] + 1 if alive else 0)


def diagnose(history: History) -> str:
    """Why nothing is learned in the zero-variance steps at the end, with figures and what to change: one line."""
    stuck = history[-zero_variance_steps(history) :]
    unscorable, truncated, format_right, right = (
        mean(stuck, name) for name in ("frac_unscorable", "frac_truncated", "format/strict", "accuracy")
    )
    if unscorable > MOST:
        cause = "the rewards fail; --strict_rewards true stops at the first failure"
    elif truncated > MOST:
        cause = "completions hit the length limit; raise --max_new_tokens"
    elif right > MOST:
        cause = "all are right; give harder problems by --data"
    elif format_right < 1 - MOST:
        cause = "none has the format; use an instruction-tuned --model_path, or a --system_prompt that shows the tags"
    elif right < 1 - MOST:
        cause = "all are wrong; give easier problems by --data, a better --model_path or a larger --group_size"
    else:
        cause = "the completions of a group are equally good; raise --temperature, --group_size or --resample"
    return (
        f"steps {span(stuck)} had no group with two different rewards, so nothing was learned: {cause} "
        f"(unscorable {unscorable:.0%}, truncated {truncated:.0%}, format right {format_right:.0%}"
        f"{'' if np.isnan(right) else f', answers right {right:.0%}'})"
    )
