"""Accuracy on held-out problems: each answered greedily and once by sampling, through a batch that stays full.

Left out: voting over several samples (vote.py).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from data.batches import pad_prompts
from data.problems import Problem
from grpo.config import Config
from grpo.reports.consensus import wilson
from grpo.rollout import Detokenizer, sampling_config
from grpo.step import Run
from models.continuous_batching import sample_continuously
from models.gemma import ExecutionConfig, GemmaConfig, Params

EVALUATION = 2**30  # the "step" of the random stream: no training step shares it, and every evaluation draws the same


def evaluate(
    params: Params, problems: list[Problem], prompt_ids: list[list[int]], run: Run, sampled: bool = True
) -> dict[str, Any]:
    """Greedy and, with `sampled`, sampled figures of `problems` under the sampling parameters `params`, as proportions.

    `low` and `high` bound the greedy accuracy (Wilson, 95%).
    """

    def mean(values) -> float:
        return float(np.mean(list(values)))

    names = ["greedy", "sampled"] if sampled else ["greedy"]  # they take turns
    temperature = [0.0, run.config.temperature][: len(names)]
    asked = [problem for problem in problems for _ in names]
    completions = sorted(
        completion
        for ended in complete(params, prompt_ids, temperature, run.tokenizer, run.model, run.sample, run.config)
        for completion in ended
    )
    texts, truncated = [completion.text for completion in completions], [completion.truncated for completion in completions]
    records = run.grade(texts, asked, truncated)
    low, high = wilson(sum(record["accuracy"]["tagged"] for record in records[:: len(names)]), len(problems))
    figures: dict[str, Any] = {"n": len(problems), "low": low, "high": high}
    for column, name in enumerate(names):
        chosen = records[column :: len(names)]
        scored = [r["reward"] for r in chosen if not math.isnan(r["reward"])]
        figures[name] = mean(r["accuracy"]["tagged"] for r in chosen)
        figures |= {
            f"{name}_strict": mean(r["accuracy"]["strict"] for r in chosen),
            f"{name}_flexible": mean(r["accuracy"]["flexible"] for r in chosen),
            f"{name}_format": mean(not r["format"]["violation"] for r in chosen),
            f"{name}_reward": mean(scored) if scored else None,
            f"{name}_length": mean(len(completion.tokens) for completion in completions[column :: len(names)]),
        }
    return figures


class Completion(NamedTuple):
    """Sample i of a list of prompts; prompt q has i = q * n to (q + 1) * n - 1, one for each of n temperatures."""

    index: int
    tokens: list[int]  # the stop token included
    text: str
    truncated: bool


def complete(
    params: Params, prompt_ids: list[list[int]], temperature: list[float], tokenizer: Detokenizer, model: GemmaConfig,
    execution: ExecutionConfig, config: Config, wanted: np.ndarray | None = None,
) -> Iterator[list[Completion]]:  # fmt: skip
    """Samples of every prompt at every temperature, or of them the `wanted` ones, as they end. A prompt is prefilled once."""
    prompts, lengths = pad_prompts(prompt_ids, config.max_prompt_tokens, tokenizer.pad_id)
    for done in sample_continuously(
        params, prompts, lengths, np.array(temperature, np.float32), config.prompts_per_step, config.rows, config.seed,
        EVALUATION, model, execution, sampling_config(tokenizer, config), wanted,
    ):  # fmt: skip
        ended = zip(done.index.tolist(), done.tokens, done.lengths, done.truncated.tolist(), strict=True)
        tokens = [(i, row[:length].tolist(), cut) for i, row, length, cut in ended]
        yield [Completion(i, ids, tokenizer.decode(ids), cut) for i, ids, cut in tokens]
