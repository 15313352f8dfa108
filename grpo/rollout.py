"""From problems to a scored batch: prompts -> samples -> text -> rewards -> advantages. Text and tensors meet here only.

Left out: which problems (data/batches.py), what the batch does to the policy (train.py).
"""

import importlib.util
import math
import numbers
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
from jax import Array

from data.batches import Packed, pack
from data.problems import Problem
from data.prompts import pad_prompts
from data.tokenizer import Tokenizer
from grpo.config import Config, ConfigError
from grpo.loss import batch_std, group_advantages, group_std, no_scale
from grpo.reward import WEIGHTS, accuracies, format_checks, score
from models.gemma import Compute, GemmaConfig, Params
from models.sampler import Samples, Sampling, decode, prefill, row_keys
from models.sharding import fetch, put

SCALES = {"group": group_std, "batch": batch_std, "none": no_scale}
RewardFunction = Callable[[str, Problem], float]


@flax.struct.dataclass
class Batch:
    """What one step trains on. Row b answers question b // G."""

    prompts: Array  # QP, right-padded
    lengths: Array  # Q
    packed: Packed  # the completions, without their padding
    mask: Array  # BC, 1 where a completion token counts, the stop token included
    sampler_logprobs: Array  # BC
    advantages: Array  # B
    old_logprobs: Any = None  # BC, when a rollout is used for more than one update
    ref_logprobs: Any = None  # BC, when beta > 0


def load_rewards(names: str) -> dict[str, RewardFunction]:
    """`my.py:brevity,other.py:f` -> {"brevity": <function>, "f": <function>}: the user's own rewards."""
    rewards = {}
    for name in filter(None, names.split(",")):
        path, _, function = name.rpartition(":")
        if not Path(path).is_file():
            raise ConfigError(f"reward {name!r}: file {path!r} does not exist; give FILE.py:FUNCTION")
        module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert module_spec and module_spec.loader
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ConfigError(f"reward {name!r}: {path} has no function {function!r}")
        if function in WEIGHTS or function in rewards:
            raise ConfigError(f"reward {name!r}: the name {function!r} is taken; give the function another")
        rewards[function] = getattr(module, function)
    return rewards


def generate(
    view: Params, prompts: np.ndarray, lengths: np.ndarray, step: int, tokenizer: Tokenizer, model: GemmaConfig,
    compute: Compute, config: Config,
) -> tuple[Samples, list[str], dict[str, float]]:  # fmt: skip
    """A group of completions for each of the prompts QP: samples B on the host, their text, seconds by phase."""
    start = time.perf_counter()
    prefix = prefill(view, put(prompts, "QP"), put(lengths, "Q"), model, compute)
    jax.block_until_ready(prefix)
    middle = time.perf_counter()
    B = len(prompts) * config.group_size
    keys = row_keys(config.seed, step, put(np.arange(B), "B"))
    temperature = put(np.full(B, config.temperature, np.float32), "B")
    limits = put(np.array(config.limits(step, B), np.int32), "B")
    samples = fetch(decode(view, prefix, keys, temperature, limits, model, compute, sampling(tokenizer, config)))
    times = {"time/prefill": middle - start, "time/decode": time.perf_counter() - middle}
    texts = [tokenizer.decode(ids[:length]) for ids, length in zip(samples.tokens, samples.lengths, strict=True)]
    return samples, texts, times


def sampling(tokenizer: Tokenizer, config: Config) -> Sampling:
    return Sampling(config.max_new_tokens, tokenizer.stop_ids, config.top_k, config.top_p, config.halvings)


def judge(text: str, problem: Problem, truncated: bool, config: Config, rewards: dict[str, RewardFunction]) -> dict[str, Any]:
    """One completion's record: its reward and components, its three accuracies, its format."""
    components, total = score(text, problem, truncated, config.reward_weights)
    for name, function in rewards.items():
        value = function(text, problem)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ConfigError(f"reward {name} gave {value!r} for problem {problem.id}: must be a finite number")
        components = {**components, name: float(value)}
        total += float(value)
    return {
        "text": text,
        "reward": total,
        "components": components,
        "accuracy": accuracies(text, problem.answer, truncated),
        "format": format_checks(text, truncated),
        "truncated": truncated,
    }


def rollout(
    view: Params, problems: list[Problem], prompt_ids: list[list[int]], step: int, tokenizer: Tokenizer, model: GemmaConfig,
    compute: Compute, config: Config, rewards: dict[str, RewardFunction],
) -> tuple[Batch, list[dict[str, Any]], dict[str, float]]:  # fmt: skip
    """A group of completions for each of Q problems, scored: the batch, a record of each completion, the step's metrics."""
    Q, G = len(problems), config.group_size
    prompts, lengths = pad_prompts(prompt_ids, config.max_prompt_tokens, tokenizer.pad_id)
    samples, texts, times = generate(view, prompts, lengths, step, tokenizer, model, compute, config)
    start = time.perf_counter()
    truncated = np.asarray(samples.truncated)
    records = [
        {"step": step, "problem": problems[b // G].id, "answer": problems[b // G].answer}
        | judge(texts[b], problems[b // G], bool(truncated[b]), config, rewards)
        for b in range(Q * G)
    ]
    totals = np.array([record["reward"] for record in records], np.float32).reshape(Q, G)
    times["time/reward"] = time.perf_counter() - start
    advantages = np.asarray(group_advantages(totals, SCALES[config.advantage_scale]))
    for record, advantage, length in zip(records, advantages.flat, samples.lengths, strict=True):
        record |= {"advantage": float(advantage), "length": int(length)}
    sampled = np.asarray(samples.lengths)
    mask = np.arange(config.max_new_tokens) < sampled[:, None]
    if config.mask_truncated:
        mask &= ~truncated[:, None]
    batch = Batch(
        prompts=put(prompts, "QP"),
        lengths=put(lengths, "Q"),
        packed=Packed(*(put(x, "BC") for x in pack(np.asarray(samples.tokens), sampled, lengths, config.packing))),
        mask=put(mask.astype(np.float32), "BC"),
        sampler_logprobs=put(samples.logprobs, "BC"),
        advantages=put(advantages.reshape(-1), "B"),
    )
    return batch, records, summarise(records, totals, mask, np.asarray(samples.logprobs)) | times


def summarise(records: list[dict[str, Any]], totals: np.ndarray, mask: np.ndarray, logprobs: np.ndarray) -> dict[str, float]:
    """The metrics of a rollout. `entropy` is the mean of -logπ over sampled tokens: an unbiased estimate, in nats."""

    def mean(values) -> float:
        return float(np.mean(list(values)))

    lengths = np.array([record["length"] for record in records])
    ended = lengths[[not record["truncated"] for record in records]]
    advantages = np.array([record["advantage"] for record in records])
    metrics = {
        "reward": float(totals.mean()),
        "reward_std": float(totals.std(axis=1, ddof=1).mean()),
        "accuracy": mean(r["accuracy"]["tagged"] for r in records),
        "accuracy/strict": mean(r["accuracy"]["strict"] for r in records),
        "accuracy/flexible": mean(r["accuracy"]["flexible"] for r in records),
        "format/strict": mean(not r["format"]["violation"] for r in records),
        "format/reasoning": mean(r["format"]["reasoning_tags"] for r in records),
        "format/answer": mean(r["format"]["answer_tags"] for r in records),
        "frac_reward_zero_std": mean(totals.max(axis=1) == totals.min(axis=1)),
        "frac_truncated": mean(r["truncated"] for r in records),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()) if len(ended) else 0.0,
        "completions/mean_words": mean(len(r["text"].split()) for r in records),
        "advantage/abs_mean": float(np.abs(advantages).mean()),
        "advantage/max": float(np.abs(advantages).max()),
        "entropy": float(-(logprobs * mask).sum() / max(mask.sum(), 1)),
    }
    for name in records[0]["components"]:
        values = [r["components"][name] for r in records]
        metrics[f"rewards/{name}/mean"] = float(np.mean(values))
        metrics[f"rewards/{name}/std"] = float(np.std(values))
    return metrics
