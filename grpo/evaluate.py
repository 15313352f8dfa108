"""Accuracy on held-out problems: each answered greedily and once by sampling, through a batch that stays full.

Left out: voting over several samples.
"""

import math
from typing import Any

import numpy as np

from data.problems import Problem
from data.prompts import pad_prompts
from data.tokenizer import Tokenizer
from grpo.config import Config
from grpo.consensus import wilson
from grpo.rollout import judge_all, sampling
from grpo.workers import UserRewards
from models.gemma import Compute, GemmaConfig, Params
from models.queue import sample_queue

EVALUATION = 2**30  # the "step" of the random stream: no training step shares it, and every evaluation draws the same


def evaluate(
    view: Params, problems: list[Problem], prompt_ids: list[list[int]], tokenizer: Tokenizer, model: GemmaConfig,
    compute: Compute, config: Config, rewards: UserRewards, sampled: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Greedy and, unless left out, sampled figures of `problems`, as proportions; `low` and `high` bound greedy accuracy
    (Wilson, 95%).
    """

    def mean(values) -> float:
        return float(np.mean(list(values)))

    prompts, lengths = pad_prompts(prompt_ids, config.max_prompt_tokens, tokenizer.pad_id)
    names = ["greedy", "sampled"] if sampled else ["greedy"]  # they take turns
    temperature = np.array([0.0, config.temperature][: len(names)], np.float32)
    asked = [problem for problem in problems for _ in names]
    texts, sampled_lengths, truncated = [""] * len(asked), [0] * len(asked), [False] * len(asked)
    for done in sample_queue(
        view, prompts, lengths, temperature, config.prompts_per_step, config.rows, config.seed, EVALUATION, model, compute,
        sampling(tokenizer, config),
    ):  # fmt: skip
        for i, ids, length, cut in zip(done.index, done.tokens, done.lengths, done.truncated, strict=True):
            texts[i], sampled_lengths[i], truncated[i] = tokenizer.decode(ids[:length]), int(length), bool(cut)
    records = judge_all(texts, asked, truncated, config, rewards)
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
            f"{name}_length": mean(sampled_lengths[column::2]),
        }
    return figures
