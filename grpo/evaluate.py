"""Accuracy on held-out problems: each answered greedily and once by sampling, from one prefill.

Left out: voting over several samples.
"""

from typing import Any

import numpy as np

from data.problems import Problem
from data.prompts import pad_prompts
from data.tokenizer import Tokenizer
from grpo.config import Config
from grpo.metrics import wilson
from grpo.rollout import RewardFunction, generate, judge
from models.gemma import Compute, GemmaConfig, Params

EVALUATION = 2**30  # the "step" of the random stream: no training step shares it, and every evaluation draws the same


def evaluate(
    view: Params, problems: list[Problem], prompt_ids: list[list[int]], tokenizer: Tokenizer, model: GemmaConfig,
    compute: Compute, config: Config, rewards: dict[str, RewardFunction],
) -> dict[str, Any]:  # fmt: skip
    """Greedy and sampled figures of `problems`, as proportions; `low` and `high` bound greedy accuracy (Wilson, 95%)."""

    def mean(values) -> float:
        return float(np.mean(list(values)))

    records: list[list[dict[str, Any]]] = []
    Q = config.prompts_per_step
    for start in range(0, len(problems), Q):
        here = range(start, min(start + Q, len(problems)))
        padded = [*here] + [here[0]] * (Q - len(here))  # one shape for all batches; the copies are not counted
        prompts, lengths = pad_prompts([prompt_ids[i] for i in padded], config.max_prompt_tokens, tokenizer.pad_id)
        temperature = np.tile(np.array([0.0, config.temperature], np.float32), Q)
        rows = (2 * (start + np.arange(Q))[:, None] + [0, 1]).reshape(-1)
        samples, texts, _ = generate(view, prompts, lengths, temperature, rows, EVALUATION, tokenizer, model, compute, config)
        for question, i in enumerate(here):
            pair = [2 * question, 2 * question + 1]
            records.append([
                judge(texts[b], problems[i], bool(samples.truncated[b]), config, rewards) | {"length": int(samples.lengths[b])}
                for b in pair
            ])  # fmt: skip
    low, high = wilson(sum(greedy["accuracy"]["tagged"] for greedy, _ in records), len(records))
    figures: dict[str, Any] = {"n": len(records), "low": low, "high": high}
    for name, column in (("greedy", 0), ("sampled", 1)):
        chosen = [pair[column] for pair in records]
        figures[name] = mean(r["accuracy"]["tagged"] for r in chosen)
        figures |= {
            f"{name}_strict": mean(r["accuracy"]["strict"] for r in chosen),
            f"{name}_flexible": mean(r["accuracy"]["flexible"] for r in chosen),
            f"{name}_format": mean(not r["format"]["violation"] for r in chosen),
            f"{name}_reward": mean(r["reward"] for r in chosen),
            f"{name}_length": mean(r["length"] for r in chosen),
        }
    return figures
