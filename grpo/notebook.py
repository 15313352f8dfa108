"""The algorithm in five calls, for a notebook: load, sample, score, loss, train_step.

    policy = load()                                  the embedded model, or any other, with the presets and settings of train.py
    completions = sample(policy, problems)           a group of completions for each problem
    batch, rewards = score(policy, completions)      their rewards; and advantages, and what the reference says of their tokens
    value, terms = loss(policy, batch)               the loss, and the part that every token has in it
    policy, stats = train_step(policy, batch)        one update

They are what a step of `grpo.runs.trainer` does, one call after another, by the same functions; nothing is written. Left out:
sessions, evaluation, checkpoints, several processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

import grpo.update
from data.batches import pad_prompts
from data.problems import Problem
from data.prompts import drop_long
from grpo.config import PRESETS, ConfigError
from grpo.loss import group_advantages
from grpo.rollout import SCALES, Batch, counted, generate, grade_everywhere, make_batch
from grpo.runs.setup import Run, prepare
from grpo.update import AGGREGATIONS, TrainState, batch_loss, completion_logprobs, frozen, init_state, starting_point
from models.gemma import Params
from models.sampler import Samples, prefill
from models.sharding import STORE, check_divides, to_devices, to_host

compiled_loss = jax.jit(batch_loss, static_argnames=("model", "execution", "config"))


@dataclass(frozen=True)
class Policy:
    """A model in training, after `step` updates."""

    run: Run
    state: TrainState
    base: Params | None  # with LoRA the frozen weights, else None
    reference: Params | None  # the policy before the first step; None when beta is 0
    step: int = 0

    @property
    def weights(self) -> Params:
        return grpo.update.policy(self.state.params, self.base, self.run.config)


@dataclass(frozen=True)
class Completions:
    """A group of completions for each of Q problems."""

    problems: list[Problem]
    prompts: np.ndarray  # QP, right-padded ids
    lengths: np.ndarray  # Q
    samples: Samples  # on the host: tokens and log-probabilities BC, lengths and truncated B
    texts: list[list[str]]  # QG


def load(preset: str = "tiny", **settings: Any) -> Policy:
    """A model with its settings: `load("gemma2-2b", model_path=DIR, group_size=4)`.

    `policy.run.problems` are made-up ones unless `data` says otherwise. Raises ConfigError, DataError or ModelError.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown: one of {', '.join(PRESETS)}")
    config = replace(PRESETS[preset], **({"data": "arithmetic"} | settings))
    run = prepare(config)
    with jax.set_mesh(run.mesh):
        trained, base = starting_point(run.base.load(run.mesh, STORE, "float32"), run.model, run.train.dtype, config)
        reference = (base or frozen(trained, run.train.dtype)) if config.beta else None
        return Policy(run, init_state(trained, config), base, reference)


def sample(policy: Policy, problems: Sequence[Problem]) -> Completions:
    """`group_size` completions of each problem. The same policy draws the same ones again."""
    run, config = policy.run, policy.run.config
    check_divides("problems", len(problems), run.mesh)
    kept, ids, long = drop_long(list(problems), run.tokenizer, config.system_prompt, config.max_prompt_tokens)
    if long:
        raise ConfigError(f"problem {long[0].id} has a prompt above max_prompt_tokens {config.max_prompt_tokens}")
    prompts, lengths = pad_prompts(ids, config.max_prompt_tokens, run.tokenizer.pad_id)
    rows = np.arange(len(kept) * config.group_size)
    with jax.set_mesh(run.mesh):
        view = grpo.update.sampling_params(policy.weights, run.model, run.sample)
        prefix = prefill(view, to_devices(prompts, "QP"), to_devices(lengths, "Q"), run.model, run.sample)
        limits = np.full(len(rows), config.max_new_tokens, np.int32)
        samples, texts = generate(
            view, prefix, rows, limits, policy.step + 1, run.tokenizer, run.model, run.sample, config
        )  # fmt: skip
    G = config.group_size
    return Completions(kept, prompts, lengths, samples, [texts[i : i + G] for i in range(0, len(texts), G)])


def score(policy: Policy, completions: Completions, rewards: Any = None) -> tuple[Batch, np.ndarray]:
    """What an update learns from completions, and their rewards QG: those given (NaN: none), or those of the settings."""
    run, config = policy.run, policy.run.config
    Q, G = len(completions.problems), config.group_size
    if rewards is None:
        asked = [problem for problem in completions.problems for _ in range(G)]
        texts = [text for group in completions.texts for text in group]
        records = grade_everywhere(texts, asked, np.asarray(completions.samples.truncated), config, run.rewards)
        rewards = [record["reward"] for record in records]
    rewards = np.asarray(rewards, np.float32).reshape(Q, G)
    advantages = np.asarray(group_advantages(rewards, SCALES[config.advantage_scale])).reshape(-1)
    with jax.set_mesh(run.mesh):
        mask = counted(completions.samples, rewards, config)
        batch = make_batch(completions.prompts, completions.lengths, completions.samples, mask, advantages, config)
        under = partial(completion_logprobs, batch=batch, model=run.model, execution=run.train, config=config)
        if policy.reference is not None:
            batch = replace(batch, ref_logprobs=under(policy.reference))
        return replace(batch, old_logprobs=under(policy.weights)), rewards


def loss(policy: Policy, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a batch under the policy as it is now, and its terms for each token: `grpo.loss.grpo_loss` names them.  BC"""
    run, config = policy.run, policy.run.config
    with jax.set_mesh(run.mesh):
        weights = AGGREGATIONS[config.aggregation](batch.mask)
        value, terms = compiled_loss(
            policy.state.params, policy.base, batch, weights, run.model, replace(run.train, remat="none"), config
        )
        return float(value), to_host(terms)


def train_step(policy: Policy, batch: Batch, rate: float | None = None) -> tuple[Policy, dict[str, float]]:
    """One update, at the settings' learning rate unless given: the policy after it, and what `metrics.jsonl` says of it.

    Of the two policies only the new one may be used from here on: the update works in the old one's memory.
    """
    run, config = policy.run, policy.run.config
    rate = config.learning_rate if rate is None else rate
    with jax.set_mesh(run.mesh):
        execution = grpo.update.choose_remat(
            run.train, run.model, batch, config, run.mesh.size, grpo.update.device_memory(run.mesh)
        )
        state, stats, _ = grpo.update.train_step(policy.state, batch, rate, run.model, execution, config, policy.base)
        figures = {name: float(value) for name, value in to_host(stats).items()}
    return replace(policy, state=state, step=policy.step + 1), figures
