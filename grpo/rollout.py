"""The rollout of a step: prompts -> completions -> grades -> rewards -> batch. The only place where tokens become text.

    completions = sample(weights, indices, step, run)         tokens and logprobs BC, texts B
    batch       = pack_batch(completions, run)                  on the devices, before there are rewards
    grades      = grade(completions, run)                       plain Python over text and problem
    mask, batch = weigh(batch, completions, rewards, advantages, run)

Every function takes the run (`grpo.step.Run`) for its settings. Resampling, off by default, is at the end.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax import Array

from data.batches import pad_prompts
from grpo.batch import Batch, loss_mask, make_batch
from grpo.config import Config
from grpo.loss import batch_std, group_advantages, group_std, no_scale
from grpo.memory import device_memory, unroll_decoding
from grpo.timing import phase
from grpo.update import sampling_params
from models.gemma import Params
from models.sampler import PrefillResult, Samples, Sampling, decode, prefill, row_keys
from models.sharding import to_devices, to_host

if TYPE_CHECKING:
    from grpo.step import Run

SCALES = {"group": group_std, "batch": batch_std, "none": no_scale}

COIN = 2**31  # the random stream of `reward_coin`

Grade = dict[str, Any]  # of a completion: text, reward (NaN: none), components, accuracy ({}: no gold), format, truncated
Grader = Callable[[Sequence[str], Sequence[Any], Iterable[bool]], list[Grade]]  # texts, problems, truncated -> grades


class Detokenizer(Protocol):
    """The part of `data.tokenizer.Tokenizer` that a rollout uses."""

    @property
    def pad_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def decode(self, ids: Any) -> str: ...


@dataclass(frozen=True)
class Completions:
    """A group of G completions for each of Q problems, on the host. Row b belongs to problem b // G."""

    problems: list[Any]  # Q; only the grader looks at them
    prompts: np.ndarray  # QP, right-padded ids
    prompt_lengths: np.ndarray  # Q
    samples: Samples  # tokens and logprobs BC, lengths and truncated B
    row_texts: list[str]  # B

    @property
    def texts(self) -> list[list[str]]:
        """The texts by group.  QG"""
        G = len(self.row_texts) // len(self.problems)
        return [self.row_texts[b : b + G] for b in range(0, len(self.row_texts), G)]

    @property
    def asked(self) -> list[Any]:
        """The problem of each row.  B"""
        G = len(self.row_texts) // len(self.problems)
        return [problem for problem in self.problems for _ in range(G)]


def sample(
    weights: Params, indices: Sequence[int] | np.ndarray, step: int, run: "Run", limits: np.ndarray | None = None,
    attempt: int = 0,
) -> Completions:  # fmt: skip
    """A group of completions for each problem of `run.problems` at `indices`, under the policy `weights`."""
    params = cast_and_reshard(weights, run)  # freed on return: the update needs its memory
    problems, prompt_ids = [run.problems[i] for i in indices], [run.prompt_ids[i] for i in indices]
    return sample_groups(params, problems, prompt_ids, step, run, limits, attempt)


@phase("sampling_params")
def cast_and_reshard(weights: Params, run: "Run") -> Params:
    return sampling_params(weights, run.model, run.sample)


def sample_groups(
    params: Params, problems: Sequence[Any], prompt_ids: Sequence[Sequence[int]], step: int, run: "Run",
    limits: np.ndarray | None = None, attempt: int = 0,
) -> Completions:  # fmt: skip
    """`group_size` completions of every prompt under `params`, which come from `sampling_params`.

    The random stream of a row depends on (seed, step, attempt, row) alone. `limits` B are the most tokens of each row,
    `max_new_tokens` by default.
    """
    config, tokenizer = run.config, run.tokenizer
    B = len(prompt_ids) * config.group_size
    prompts, lengths = pad_prompts(prompt_ids, config.max_prompt_tokens, tokenizer.pad_id)
    prefilled = prefill_prompts(params, prompts, lengths, run)
    keys = row_keys(config.seed, step, to_devices(attempt * B + np.arange(B), "B"))
    samples = decode_groups(params, prefilled, keys, np.full(B, config.max_new_tokens) if limits is None else limits, run)
    texts = [tokenizer.decode(ids[:length]) for ids, length in zip(samples.tokens, samples.lengths, strict=True)]
    return Completions(list(problems), prompts, lengths, samples, texts)


@phase("prefill")
def prefill_prompts(params: Params, prompts: np.ndarray, lengths: np.ndarray, run: "Run") -> PrefillResult:
    """The keys and values of right-padded prompts, computed once for each group.  QP, Q"""
    return prefill(params, to_devices(prompts, "QP"), to_devices(lengths, "Q"), run.model, run.sample)


@phase("decode")
def decode_groups(params: Params, prefilled: PrefillResult, keys: Array, limits: np.ndarray, run: "Run") -> Samples:
    """Up to `limits` tokens for each of B rows, at the run's temperature: samples on the host."""
    temperature = np.full(len(keys), run.config.temperature, np.float32)
    rows = keys, to_devices(temperature, "B"), to_devices(np.asarray(limits, np.int32), "B")
    execution = unroll_decoding(run.sample, run.model, run.config, run.mesh, device_memory(run.mesh))
    return to_host(decode(params, prefilled, *rows, run.model, execution, sampling_config(run.tokenizer, run.config)))


def sampling_config(tokenizer: Detokenizer, config: Config) -> Sampling:
    """How tokens are drawn under the settings of a run."""
    return Sampling(config.max_new_tokens, tokenizer.stop_ids, config.top_k, config.top_p, config.halvings)


@phase("reward")
def grade(completions: Completions, run: "Run", step: int = 0, attempt: int = 0) -> list[Grade]:
    """A grade of every completion.  B

    With `reward_coin`, each has a coin of its own, drawn from (seed, step, attempt): equal texts may differ in it.
    """
    grades = run.grade(completions.row_texts, completions.asked, completions.samples.truncated.tolist())
    if not run.config.reward_coin:
        return grades
    coins = run.config.reward_coin * np.random.default_rng([run.config.seed, step, attempt, COIN]).integers(2, size=len(grades))
    return [
        each | {"reward": each["reward"] + coin, "components": each["components"] | {"coin": coin}}
        for each, coin in zip(grades, coins.tolist(), strict=True)
    ]


def rewards_of(grades: list[Grade], group_size: int, mask_truncated: bool = False) -> np.ndarray:
    """Rewards by group; NaN where a completion has no vote: without a reward, or truncated under `mask_truncated`.  B -> QG

    A row that gets no loss must not move the mean and the spread of its group either: the penalty of a truncated completion
    would make a wrong one that ended look good.
    """
    votes = [math.nan if mask_truncated and grade["truncated"] else grade["reward"] for grade in grades]
    return np.array(votes, np.float32).reshape(-1, group_size)


@phase("reference")  # it waits for the devices: what the rewards have left of that phase
def advantages_of(rewards: np.ndarray, config: Config) -> np.ndarray:
    """`grpo.loss.group_advantages` with the run's scale, on the host.  QG -> QG"""
    return np.asarray(group_advantages(rewards, SCALES[config.advantage_scale]))


def pack_batch(completions: Completions, run: "Run") -> Batch:
    """The batch without what depends on rewards, and without log-probabilities of old policy and reference."""
    samples: Any = completions.samples  # numpy arrays: they are on the host
    config = run.config
    return make_batch(
        completions.prompts, completions.prompt_lengths, samples.tokens, samples.lengths, samples.logprobs, None, None,
        config.packing, run.mesh.size * config.microbatches,
    )  # fmt: skip


def weigh(
    batch: Batch, completions: Completions, rewards: np.ndarray, advantages: np.ndarray, run: "Run"
) -> tuple[np.ndarray, Batch]:  # fmt: skip
    """(the tokens that count, BC on the host; the batch with them and with the advantages).  rewards, advantages QG"""
    samples: Any = completions.samples
    mask = loss_mask(samples.lengths, samples.truncated, rewards, run.config.max_new_tokens, run.config.mask_truncated)
    weights, advantages = batch.place(mask.astype(np.float32)), batch.place(advantages.reshape(-1))
    return mask, replace(batch, mask=to_devices(weights, "BC"), advantages=to_devices(advantages, "B"))


def build_batch(
    completions: Completions, rewards: np.ndarray, advantages: np.ndarray, run: "Run"
) -> tuple[np.ndarray, Batch]:  # fmt: skip
    """`pack_batch` and `weigh` in one, where the rewards are there."""
    return weigh(pack_batch(completions, run), completions, rewards, advantages, run)


# ------------------------------------------------------------------------------------------------------------ resampling


def zero_variance_groups(rewards: np.ndarray) -> np.ndarray:
    """Groups whose rewards (NaN: no vote) are all equal, or that have none: every advantage is 0.  QG -> Q, bool"""
    return np.array([len(set(group[~np.isnan(group)].tolist())) < 2 for group in rewards], bool)


def resample(
    completions: Completions, grades: list[Grade], weights: Params, indices: Sequence[int] | np.ndarray, step: int,
    run: "Run", limits: np.ndarray | None,
) -> tuple[Completions, list[Grade], int]:  # fmt: skip
    """Samples zero-variance groups again, up to `config.resample` times, and keeps a group's first attempt with a spread.

    Returns completions, grades, and how many groups were sampled again. In an attempt the other rows stop after one token.
    """
    config, G = run.config, run.config.group_size

    def zero_variance(grades: list[Grade]) -> np.ndarray:
        return zero_variance_groups(rewards_of(grades, G, config.mask_truncated))

    full = np.full(len(grades), config.max_new_tokens) if limits is None else limits
    equal = zero_variance(grades)
    resampled = int(equal.sum())
    for attempt in range(1, config.resample + 1):
        if not equal.any():
            break
        rows = np.flatnonzero(np.repeat(equal, G))
        others = sample(weights, indices, step, run, np.where(np.repeat(equal, G), full, 1), attempt)
        fresh = grade(take_groups(others, np.flatnonzero(equal)), run, step, attempt)
        kept = ~np.repeat(zero_variance(fresh), G)
        completions, grades = replace_rows(completions, others, rows[kept]), list(grades)
        for b, other, keep in zip(rows, fresh, kept, strict=True):
            if keep:
                grades[b] = other
        equal = zero_variance(grades)
    return completions, grades, resampled


def take_groups(completions: Completions, groups: np.ndarray) -> Completions:
    """The completions of some groups alone."""
    G = len(completions.row_texts) // len(completions.problems)
    rows = (groups[:, None] * G + np.arange(G)).reshape(-1)
    return Completions(
        [completions.problems[q] for q in groups], completions.prompts[groups], completions.prompt_lengths[groups],
        jax.tree.map(lambda leaf: leaf[rows], completions.samples), [completions.row_texts[b] for b in rows],
    )  # fmt: skip


def replace_rows(completions: Completions, others: Completions, rows: np.ndarray) -> Completions:
    """`completions` with some rows taken from `others`, which answer the same prompts."""

    def choose(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        old = old.copy()
        old[rows] = new[rows]
        return old

    chosen = set(rows.tolist())
    texts = [
        new if b in chosen else old for b, (old, new) in enumerate(zip(completions.row_texts, others.row_texts, strict=True))
    ]
    return replace(completions, samples=jax.tree.map(choose, completions.samples, others.samples), row_texts=texts)
