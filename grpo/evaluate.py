"""Accuracy on held-out problems: each answered greedily and once by sampling, through a batch that stays full.

Left out: voting over several samples.
"""

from typing import Any

import numpy as np

from data.problems import Problem
from data.prompts import pad_prompts
from data.tokenizer import Tokenizer
from grpo.config import Config
from grpo.metrics import wilson
from grpo.rollout import RewardFunction, judge, sampling
from models.gemma import Compute, GemmaConfig, Params
from models.queue import sample_queue

EVALUATION = 2**30  # the "step" of the random stream: no training step shares it, and every evaluation draws the same


def evaluate(
    view: Params, problems: list[Problem], prompt_ids: list[list[int]], tokenizer: Tokenizer, model: GemmaConfig,
    compute: Compute, config: Config, rewards: dict[str, RewardFunction], sampled: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Greedy and, unless left out, sampled figures of `problems`, as proportions; `low` and `high` bound greedy accuracy
    (Wilson, 95%).
    """

    def mean(values) -> float:
        return float(np.mean(list(values)))

    prompts, lengths = pad_prompts(prompt_ids, config.max_prompt_tokens, tokenizer.pad_id)
    names = ["greedy", "sampled"] if sampled else ["greedy"]
    temperature = np.array([0.0, config.temperature][: len(names)], np.float32)
    records: list[list[dict[str, Any]]] = [[{} for _ in names] for _ in problems]
    for done in sample_queue(
        view, prompts, lengths, temperature, config.prompts_per_step, config.rows, config.seed, EVALUATION, model, compute,
        sampling(tokenizer, config),
    ):  # fmt: skip
        for index, ids, length, truncated in zip(done.index, done.tokens, done.lengths, done.truncated, strict=True):
            i, column = divmod(int(index), len(names))
            text = tokenizer.decode(ids[:length])
            records[i][column] = judge(text, problems[i], bool(truncated), config, rewards) | {"length": int(length)}
    low, high = wilson(sum(greedy["accuracy"]["tagged"] for greedy, *_ in records), len(records))
    figures: dict[str, Any] = {"n": len(records), "low": low, "high": high}
    for column, name in enumerate(names):
        chosen = [samples[column] for samples in records]
        figures[name] = mean(r["accuracy"]["tagged"] for r in chosen)
        figures |= {
            f"{name}_strict": mean(r["accuracy"]["strict"] for r in chosen),
            f"{name}_flexible": mean(r["accuracy"]["flexible"] for r in chosen),
            f"{name}_format": mean(not r["format"]["violation"] for r in chosen),
            f"{name}_reward": mean(r["reward"] for r in chosen),
            f"{name}_length": mean(r["length"] for r in chosen),
        }
    return figures
