"""The metrics of a step, and the record of a run: files of one JSON object a line that a resumed run continues."""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo.errors import RunError
from grpo.reports.jsonl import has_only, read_records, rewrite
from grpo.rollout import Grade, rewards_of, zero_variance_groups
from grpo.runs.distributed import broadcast_from_main, is_main_process
from grpo.step import Run, StepResult

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW  # a link that somebody has planted is not followed


def step_metrics(result: StepResult, seconds: dict[str, float], bad_updates_in_a_row: int, run: Run) -> dict[str, Any]:
    """The record of a step in metrics.jsonl. `seconds` are those of its phases and of the whole `step`."""
    sampled = int(result.completions.samples.lengths.sum())
    memory = run.mesh.local_devices[0].memory_stats() or {}
    names = ("prefill", "decode", "reward", "reference", "update", "step")
    metrics: dict[str, Any] = rollout_metrics(result, run.config.mask_truncated)
    metrics |= {"resampled_groups": result.resampled}
    if run.config.resample and result.drawn:
        metrics["reward/before_resampling"] = mean_of(g["reward"] for g in result.drawn if not math.isnan(g["reward"]))
        if drawn := accuracy_metrics(result.drawn):
            metrics["accuracy/before_resampling"] = drawn["accuracy"]
    metrics |= {f"time/{name}": seconds.get(name, 0.0) for name in names}
    metrics |= {
        "tokens_per_s/decode": sampled / seconds["decode"],
        "bad_updates_in_a_row": bad_updates_in_a_row,
        "hbm_peak": memory.get("peak_bytes_in_use", 0),
        "lr": result.rates[-1],
        "tokens_per_s/total": sampled / seconds["step"],
    }
    return metrics | {name: float(value) for name, value in jax.device_get(result.stats).items()}


def rollout_metrics(result: StepResult, mask_truncated: bool = False) -> dict[str, Any]:
    """The metrics of a rollout. Those of rewards are over the completions that have one, and NaN if none has.

    `reward_std` and `frac_reward_zero_std` are over those with a vote: under `mask_truncated` truncated ones have none.

    `entropy` is the mean of -log π over the sampled tokens that count, in nats; an unbiased estimate unless top_k or top_p cut
    the distribution. With `resample` all are of the groups that were chosen, which have a spread more often than the policy's;
    `reward/before_resampling` and `accuracy/before_resampling` are of every group's first attempt: those of the policy.
    """
    grades, mask, samples = result.grades, result.mask, result.completions.samples
    lengths, advantages = samples.lengths, result.advantages
    ended = lengths[~samples.truncated]
    scored = [grade for grade in grades if not math.isnan(grade["reward"])]
    groups = rewards_of(grades, advantages.shape[1], mask_truncated).astype(float)
    spreads = [np.nanstd(group, ddof=1) for group in groups if np.isfinite(group).sum() > 1]
    metrics = {
        "reward": mean_of(grade["reward"] for grade in scored),
        "reward_std": mean_of(spreads),
        **accuracy_metrics(grades),
        "format/strict": mean_of(not grade["format"]["violation"] for grade in grades),
        "format/reasoning": mean_of(grade["format"]["reasoning_tags"] for grade in grades),
        "format/answer": mean_of(grade["format"]["answer_tags"] for grade in grades),
        "frac_reward_zero_std": mean_of(zero_variance_groups(groups)),
        "frac_unscorable": 1 - len(scored) / len(grades),
        "skipped_update": int(not result.stats),  # nothing could be learned: the optimizer was not called
        "frac_truncated": mean_of(samples.truncated),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()) if len(ended) else 0.0,
        "completions/mean_words": mean_of(len(text.split()) for text in result.completions.row_texts),
        "advantage/abs_mean": float(np.abs(advantages.astype(float)).mean()),
        "advantage/max": float(np.abs(advantages.astype(float)).max()),
        "entropy": float(-(samples.logprobs * mask).sum() / mask.sum()) if mask.any() else math.nan,
    }
    for name in grades[0]["components"]:
        values = [grade["components"][name] for grade in scored]
        metrics[f"rewards/{name}/mean"] = mean_of(values)
        metrics[f"rewards/{name}/std"] = float(np.std(values)) if values else math.nan
    return metrics


def accuracy_metrics(grades: list[Grade]) -> dict[str, float]:
    """The three readings, over the completions of problems with a gold answer; nothing if there are none."""
    known = [grade["accuracy"] for grade in grades if grade["accuracy"]]
    names = {"accuracy": "tagged", "accuracy/strict": "strict", "accuracy/flexible": "flexible"} if known else {}
    return {name: mean_of(accuracy[reading] for accuracy in known) for name, reading in names.items()}


def mean_of(values: Iterable[Any]) -> float:
    """NaN for no values."""
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def completion_records(step: int, result: StepResult) -> list[dict[str, Any]]:
    """The lines of completions.jsonl."""
    grades: list[Grade] = result.grades
    rows = zip(result.completions.asked, grades, result.advantages.reshape(-1), result.completions.samples.lengths, strict=True)
    return [
        {"step": step, "problem": problem.id, "answer": problem.answer, **grade}
        | {"advantage": float(advantage), "length": int(length)}
        for problem, grade, advantage, length in rows
    ]


class JsonLines:
    """A file of one JSON object a line. Opening it for a resumed run drops the records after `step`; None keeps all.

    Process 0 writes. Every process remembers the records that were there before and those that `write` adds.
    """

    def __init__(self, path: Path, step: int | None, *keys: str, remember: bool = True):
        """`keys` are those that every record has."""
        self.path = path
        kept, whole = self.read(step, keys) if is_main_process() else ([], True)
        if is_main_process() and not (whole and path.exists() and not path.is_symlink()):
            rewrite(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        self.records: list[dict[str, Any]] = broadcast_from_main(kept if remember else [])

    def read(self, step: int | None, keys: Sequence[str]) -> tuple[list[dict[str, Any]], bool]:
        """The records up to `step`, and whether the file holds nothing else, such as a torn last line."""
        notes: list[str] = []
        kept = list(read_records(self.path, notes, *keys, step=step))
        for note in notes:
            print(f"warning: {note}", file=sys.stderr, flush=True)
        return kept, not self.path.exists() or has_only(self.path, len(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, and remember it as a resumed run would read it."""
        self.write_all([record])
        self.records.append(strict(record))

    def write_all(self, records: list[dict[str, Any]]) -> None:
        if is_main_process():
            try:
                with open(os.open(self.path, APPEND, 0o666), "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(strict(record), ensure_ascii=False) + "\n" for record in records)
            except OSError as error:
                raise RunError(f"{self.path} cannot be written: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as indented JSON, atomically."""
    rewrite(path, json.dumps(value, indent=1) + "\n")


def strict(value: Any) -> Any:
    """NaN and infinities become null: JSON has no others."""
    if isinstance(value, dict):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, list):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CompileCounter:
    """Number of programs that XLA has compiled in this process; more after the first step means a shape that changes.

    Programs from the compilation cache do not count.
    """

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.add)
        jax.monitoring.register_event_listener(self.subtract)

    def add(self, event: str, duration_secs: float, **_) -> None:
        self.count += event.endswith("backend_compile_duration")

    def subtract(self, event: str, **_) -> None:
        self.count -= event.endswith("compilation_cache/cache_hits")
