"""From problems to a scored batch: prompts -> samples -> text -> rewards -> advantages. Text and tensors meet here only.

Left out: which problems (session.py), what the batch does to the policy (update.py).
"""

import math
import time
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import numpy as np
from jax import Array

from data.batches import Packed, pack, pad_prompts
from data.problems import Problem
from data.tokenizer import Tokenizer
from grpo.config import Config, RunError
from grpo.loss import batch_std, group_advantages, group_std, no_scale
from grpo.reward import accuracies, format_checks, score
from grpo.runs.distributed import broadcast_from_main, is_main_process
from grpo.runs.reward_worker import UserRewards
from models.gemma import ExecutionConfig, GemmaConfig, Params
from models.sampler import PrefillResult, Samples, Sampling, decode, prefill, row_keys
from models.sharding import to_devices, to_host

SCALES = {"group": group_std, "batch": batch_std, "none": no_scale}


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


def rollout(
    view: Params, problems: list[Problem], prompt_ids: list[list[int]], step: int, tokenizer: Tokenizer, model: GemmaConfig,
    execution: ExecutionConfig, config: Config, rewards: UserRewards,
) -> tuple[Batch, list[dict[str, Any]], dict[str, float]]:  # fmt: skip
    """A group of completions for each of Q problems, scored: the batch, a record of each completion, the step's metrics.

    Groups that teach nothing are sampled again, up to `resample` times; the first attempt of a group that does is kept.
    """
    Q, G = len(problems), config.group_size
    B = Q * G
    asked = [problem for problem in problems for _ in range(G)]
    limits = np.array(config.limits(step, B), np.int32)
    prompts, lengths = pad_prompts(prompt_ids, config.max_prompt_tokens, tokenizer.pad_id)
    start = time.perf_counter()
    prefix = jax.block_until_ready(prefill(view, to_devices(prompts, "QP"), to_devices(lengths, "Q"), model, execution))
    times = {"time/prefill": time.perf_counter() - start, "time/decode": 0.0, "time/reward": 0.0}

    def attempt(number: int, rows: np.ndarray) -> tuple[Samples, list[dict[str, Any]]]:
        """Samples of all rows, of which those not in `rows` stop at once; records of `rows`."""
        start = time.perf_counter()
        wanted = np.ones_like(limits)
        wanted[rows] = limits[rows]
        samples, texts = generate(view, prefix, number * B + np.arange(B), wanted, step, tokenizer, model, execution, config)
        middle = time.perf_counter()
        records = grade_everywhere([texts[b] for b in rows], [asked[b] for b in rows], samples.truncated[rows], config, rewards)
        times["time/decode"] += middle - start
        times["time/reward"] += time.perf_counter() - middle
        return samples, records

    samples, records = attempt(0, np.arange(B))
    dead = zero_variance_groups(records, G)
    resampled = int(dead.sum()) if config.resample else 0
    for number in range(1, config.resample + 1):
        if not dead.any():
            break
        rows = np.flatnonzero(np.repeat(dead, G))
        others, other_records = attempt(number, rows)
        kept = ~np.repeat(zero_variance_groups(other_records, G), G)
        samples = replace_rows(samples, others, rows[kept])
        for b, record, keep in zip(rows, other_records, kept, strict=True):
            records[b] = record if keep else records[b]
        dead = zero_variance_groups(records, G)

    rewards_of = np.array([record["reward"] for record in records], np.float32).reshape(Q, G)
    advantages = np.asarray(group_advantages(rewards_of, SCALES[config.advantage_scale])).reshape(-1)
    mask = counted(samples, rewards_of, config)
    batch = make_batch(prompts, lengths, samples, mask, advantages, config)
    records = [
        {"step": step, "problem": problem.id, "answer": problem.answer, **record}
        | {"advantage": float(advantage), "length": int(length)}
        for problem, record, advantage, length in zip(asked, records, advantages, samples.lengths, strict=True)
    ]
    return batch, records, summarise(records, G, mask, np.asarray(samples.logprobs)) | {"resampled_groups": resampled} | times


def counted(samples: Samples, rewards: np.ndarray, config: Config) -> np.ndarray:  # B, QG -> BC, of bools
    """Which tokens count: all of a completion, unless it has no reward (NaN), or was cut off and `mask_truncated` says so."""
    mask = (np.arange(config.max_new_tokens) < np.asarray(samples.lengths)[:, None]) & ~np.isnan(rewards).reshape(-1, 1)
    return mask & ~np.asarray(samples.truncated)[:, None] if config.mask_truncated else mask


def make_batch(
    prompts: np.ndarray, lengths: np.ndarray, samples: Samples, mask: np.ndarray, advantages: np.ndarray, config: Config
) -> Batch:
    """QP, Q, samples on the host, BC, B -> what one step trains on, on the devices."""
    packed = pack(np.asarray(samples.tokens), np.asarray(samples.lengths), lengths, config.packing)
    return Batch(
        prompts=to_devices(prompts, "QP"),
        lengths=to_devices(lengths, "Q"),
        packed=Packed(*(to_devices(x, "BC") for x in packed)),
        mask=to_devices(mask.astype(np.float32), "BC"),
        sampler_logprobs=to_devices(samples.logprobs, "BC"),
        advantages=to_devices(advantages, "B"),
    )


def generate(
    view: Params,
    prefix: PrefillResult,
    rows: np.ndarray,
    limits: np.ndarray,
    step: int,
    tokenizer: Tokenizer,
    model: GemmaConfig,
    execution: ExecutionConfig,
    config: Config,
) -> tuple[Samples, list[str]]:
    """A completion of up to `limits` tokens for each of `rows`, which name random streams: samples on the host, and text."""
    keys = row_keys(config.seed, step, to_devices(rows, "B"))
    temperature = np.full(len(rows), config.temperature, np.float32)
    settings = to_devices(temperature, "B"), to_devices(limits, "B")
    samples = to_host(decode(view, prefix, keys, *settings, model, execution, sampling(tokenizer, config)))
    return samples, [tokenizer.decode(ids[:length]) for ids, length in zip(samples.tokens, samples.lengths, strict=True)]


def sampling(tokenizer: Tokenizer, config: Config) -> Sampling:
    return Sampling(config.max_new_tokens, tokenizer.stop_ids, config.top_k, config.top_p, config.halvings)


def grade_everywhere(
    texts: list[str], problems: list[Problem], truncated: Iterable[bool], config: Config, rewards: UserRewards
) -> list[dict[str, Any]]:
    """A record of each completion: its reward and components, its three accuracies, its format.

    Plain Python values, process 0's on every process. The reward is NaN where one of the user's functions gave none.
    """
    fault, records = "", []
    if is_main_process():
        try:
            records = grade(texts, problems, truncated, config, rewards)
        except RunError as error:
            fault = str(error)  # it ends the run on every process
    fault, records = broadcast_from_main([fault, records])
    if fault:
        raise RunError(fault)
    return records


def grade(
    texts: list[str], problems: list[Problem], truncated: Iterable[bool], config: Config, rewards: UserRewards
) -> list[dict[str, Any]]:
    """`judge_all` on this process alone."""
    theirs = rewards.score(texts, problems)
    records = []
    for b, (text, problem, cut) in enumerate(zip(texts, problems, map(bool, truncated), strict=True)):
        components, total = score(text, problem, cut, config.reward_weights)
        added = {name: values[b] for name, values in theirs.items()}
        records.append({
            "text": text,
            "reward": total + sum(added.values()),
            "components": components | added,
            "accuracy": accuracies(text, problem.answer, cut),
            "format": format_checks(text, cut),
            "truncated": cut,
        })  # fmt: skip
    return records


def zero_variance_groups(records: list[dict[str, Any]], G: int) -> np.ndarray:  # -> Q
    """Whether the scored rewards of a group are all equal, or none: every advantage is then 0."""
    totals = np.array([record["reward"] for record in records], np.float32).reshape(-1, G)
    return np.array([len(set(group[~np.isnan(group)].tolist())) < 2 for group in totals], bool)


def replace_rows(samples: Samples, others: Samples, rows: np.ndarray) -> Samples:
    def choose(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        old = old.copy()
        old[rows] = new[rows]
        return old

    return jax.tree.map(choose, samples, others)


def summarise(records: list[dict[str, Any]], G: int, mask: np.ndarray, logprobs: np.ndarray) -> dict[str, float]:
    """The metrics of a rollout. Those of rewards are over the completions that have one, and NaN if none has.

    `entropy` is the mean of -logπ over sampled tokens: an unbiased estimate, in nats.
    """

    def mean(values) -> float:
        values = list(values)
        return float(np.mean(values)) if values else math.nan

    lengths = np.array([record["length"] for record in records])
    ended = lengths[[not record["truncated"] for record in records]]
    advantages = np.array([record["advantage"] for record in records])
    scored = [record for record in records if not math.isnan(record["reward"])]
    groups = np.array([record["reward"] for record in records]).reshape(-1, G)
    spreads = [np.nanstd(group, ddof=1) for group in groups if np.isfinite(group).sum() > 1]
    metrics = {
        "reward": mean(r["reward"] for r in scored),
        "reward_std": mean(spreads),
        "accuracy": mean(r["accuracy"]["tagged"] for r in records),
        "accuracy/strict": mean(r["accuracy"]["strict"] for r in records),
        "accuracy/flexible": mean(r["accuracy"]["flexible"] for r in records),
        "format/strict": mean(not r["format"]["violation"] for r in records),
        "format/reasoning": mean(r["format"]["reasoning_tags"] for r in records),
        "format/answer": mean(r["format"]["answer_tags"] for r in records),
        "frac_reward_zero_std": mean(zero_variance_groups(records, G)),
        "frac_unscorable": 1 - len(scored) / len(records),
        "skipped_update": int(not mask.any()),  # no completion says anything: the optimizer does not even see it
        "frac_truncated": mean(r["truncated"] for r in records),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()) if len(ended) else 0.0,
        "completions/mean_words": mean(len(r["text"].split()) for r in records),
        "advantage/abs_mean": float(np.abs(advantages).mean()),
        "advantage/max": float(np.abs(advantages).max()),
        "entropy": float(-(logprobs * mask).sum() / mask.sum()) if mask.any() else math.nan,
    }
    for name in records[0]["components"]:
        values = [r["components"][name] for r in scored]
        metrics[f"rewards/{name}/mean"] = mean(values)
        metrics[f"rewards/{name}/std"] = float(np.std(values)) if values else math.nan
    return metrics
