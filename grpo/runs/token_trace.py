"""The terms of the loss for every token of a few groups of a run: the lines of tokens.jsonl.

Rewards and advantages of the same completions are in completions.jsonl, in the same order.
"""

from typing import Any

import numpy as np
from jax import Array

from data.problems import Problem
from data.tokenizer import Tokenizer
from grpo.config import Config
from grpo.rollout import Batch
from models.sampler import Samples
from models.sharding import to_host


def groups_due(step: int, steps: int, config: Config) -> int:
    """How many groups of a step are inspected: its first ones. The inspected groups are spread evenly over all steps."""
    picks = np.linspace(1, steps, config.inspect_groups).round()
    return min(int((picks == step).sum()), config.prompts_per_step)


def token_records(
    problems: list[Problem], samples: Samples, batch: Batch, terms: dict[str, Array], tokenizer: Tokenizer, config: Config
) -> list[dict[str, Any]]:
    """A record of each of the first groups of a batch, those of `problems`, with the loss's terms in the last update.

    `samples` are all completions, on the host. Log-probabilities are in nats; floats have 5 significant digits.
    """
    figures = {
        "logprobs": terms["logprobs"],
        "sampler_logprobs": batch.sampler_logprobs,
        "old_logprobs": terms["old"],
        "ref_logprobs": batch.ref_logprobs,
        "ratio": terms["ratio"],
        "kl": terms["kl"],
        "clipped": terms["clipped_low"] + terms["clipped_high"],
        "weight": terms["weight"],
    }
    names = [name for name in figures if figures[name] is not None]
    fetched = {name: batch.restore(to_host(figures[name])) for name in names}

    def completion(group: int, row: int) -> dict[str, Any]:
        b = group * config.group_size + row
        length = samples.lengths[b]
        ids = samples.tokens[b, :length]
        record = {"row": row, "pieces": tokenizer.pieces(ids), "ids": ids.tolist()}
        for name in names:
            record[name] = [float(f"{x:.5g}") for x in fetched[name][b, :length].tolist()]
        return record | {"clipped": [int(x) for x in record["clipped"]]}

    return [
        {
            "problem": problem.id,
            "question": problem.question,
            "beta": config.beta,
            "epsilon_low": config.epsilon_low,
            "epsilon_high": config.epsilon_high,
            "tis_cap": config.tis_cap,
            "unbiased_kl": config.unbiased_kl,
            "completions": [completion(group, row) for row in range(config.group_size)],
        }
        for group, problem in enumerate(problems)
    ]
