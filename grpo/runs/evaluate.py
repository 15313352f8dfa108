"""Accuracy on held-out problems: each is answered greedily and once by sampling, with continuous batching.

consensus_eval.py draws several samples a problem, which vote.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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

EVALUATION = 2**30  # the "step" of the random stream: no training step shares it, and every evaluation draws the same samples


class Completion(NamedTuple):
    """Sample `index` of a list of prompts. With n temperatures, prompt q has the samples q * n to (q + 1) * n - 1."""

    index: int
    tokens: list[int]  # the stop token included
    text: str
    truncated: bool


def evaluate(
    params: Params, problems: list[Problem], prompt_ids: list[list[int]], run: Run, sampled: bool = True,
    report: Callable[[int, int], None] = lambda done, wanted: None,
) -> dict[str, Any]:  # fmt: skip
    """Greedy and, with `sampled`, sampled figures of `problems` under the sampling parameters `params`.

    Accuracies and formats are proportions, lengths are in tokens; `low` and `high` bound the greedy accuracy (Wilson, 95%).
    Accuracies are those of the `n` problems with a gold answer, and absent if there are none: then `n` counts all problems.
    `report` hears how many of the wanted samples have ended.
    """
    names = ["greedy", "sampled"] if sampled else ["greedy"]  # of the samples of each problem, in order
    temperatures = [0.0, run.config.temperature][: len(names)]
    completions: list[Completion] = []
    for ended in complete(params, prompt_ids, temperatures, run.tokenizer, run.model, run.sample, run.config):
        completions += ended
        report(len(completions), len(names) * len(problems))
    completions.sort()
    asked = [problem for problem in problems for _ in names]
    texts, truncated = [completion.text for completion in completions], [completion.truncated for completion in completions]
    grades = run.grade(texts, asked, truncated)
    known = [grade["accuracy"]["tagged"] for grade in grades[:: len(names)] if grade["accuracy"]]
    low, high = wilson(sum(known), len(known))
    figures: dict[str, Any] = {"n": len(known), "low": low, "high": high} if known else {"n": len(problems)}
    for column, name in enumerate(names):
        figures |= mean_figures(name, grades[column :: len(names)], completions[column :: len(names)])
    return figures


def mean_figures(name: str, grades: Sequence[Any], completions: Sequence[Completion]) -> dict[str, Any]:
    """Means over completions, one a problem; their keys begin with `name`. The reward is None if no completion has one."""

    def mean(values) -> float:
        return float(np.mean(list(values)))

    rewards = [grade["reward"] for grade in grades if not math.isnan(grade["reward"])]
    known = [grade["accuracy"] for grade in grades if grade["accuracy"]]
    readings = {"": "tagged", "_strict": "strict", "_flexible": "flexible"} if known else {}
    return {
        **{name + end: mean(accuracy[reading] for accuracy in known) for end, reading in readings.items()},
        f"{name}_format": mean(not grade["format"]["violation"] for grade in grades),
        f"{name}_reward": mean(rewards) if rewards else None,
        f"{name}_length": mean(len(completion.tokens) for completion in completions),
    }


def complete(
    params: Params, prompt_ids: list[list[int]], temperatures: list[float], tokenizer: Detokenizer, model: GemmaConfig,
    execution: ExecutionConfig, config: Config, wanted: np.ndarray | None = None,
) -> Iterator[list[Completion]]:  # fmt: skip
    """Yields the samples of every prompt at every temperature as they end; with `wanted`, only those with these indices.

    Each prompt is prefilled once.
    """
    prompts, lengths = pad_prompts(prompt_ids, config.max_prompt_tokens, tokenizer.pad_id)
    for done in sample_continuously(
        params, prompts, lengths, np.array(temperatures, np.float32), config.prompts_per_step, config.rows, config.seed,
        EVALUATION, model, execution, sampling_config(tokenizer, config), wanted,
    ):  # fmt: skip
        rows = zip(done.index.tolist(), done.tokens, done.lengths, done.truncated.tolist(), strict=True)
        ended = [(index, tokens[:length].tolist(), truncated) for index, tokens, length, truncated in rows]
        yield [Completion(index, ids, tokenizer.decode(ids), truncated) for index, ids, truncated in ended]
