"""The phases of a step, one call each, for a notebook: load, sample, score, loss, train_step.

    policy = load()                                  the embedded model, or any other, with the presets and settings of train.py
    completions = sample(policy, problems)           a group of completions for each problem
    batch, rewards = score(policy, completions)      rewards and advantages, and log-probabilities under the reference
    value, terms = loss(policy, batch)               the loss, and its terms for each token
    policy, stats = train_step(policy, batch)        one update

Each call is the function that `grpo.step.one_step` calls, with the same arguments. Nothing is written to disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

import grpo.rollout
import grpo.step
from data.prompts import drop_long
from grpo.batch import Batch
from grpo.config import PRESETS
from grpo.errors import ConfigError
from grpo.rollout import Completions
from grpo.step import Run
from grpo.update import AGGREGATIONS, TrainState, batch_loss, init_state, policy, reference_of, sampling_params, starting_point
from models.gemma import Params
from models.sharding import MeshJit, check_divides, to_host

compiled_loss = MeshJit(batch_loss, static_argnames=("model", "execution", "config"))


@dataclass(frozen=True)
class Policy:
    """A model in training, after `step` updates."""

    run: Run
    state: TrainState
    base: Params | None  # the frozen weights with LoRA, else None
    reference: Params | None  # the policy before the first step; None when beta is 0
    step: int = 0

    @property
    def weights(self) -> Params:
        return policy(self.state.params, self.base, self.run.update)


def load(preset: str = "tiny", **settings: Any) -> Policy:
    """A model with its settings: `load("gemma2-2b", model_path=DIR, group_size=4)`.

    `policy.run.problems` are made-up ones unless `data` says otherwise. Raises ConfigError, DataError or ModelError.
    """
    from grpo.runs.setup import load_base, prepare  # the only way from the algorithm to what surrounds a run

    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown: one of {', '.join(PRESETS)}")
    run = prepare(replace(PRESETS[preset], **({"data": "arithmetic"} | settings)))
    with jax.set_mesh(run.mesh):
        weights = load_base(run)
        trained, base = starting_point(weights, run.model, run.train.dtype, run.config.seed, run.update)
        reference = reference_of(trained, base, run.train.dtype, run.update) if run.config.beta else None
        return Policy(run, init_state(trained, run.update), base, reference)


def sample(policy: Policy, problems: Sequence[Any]) -> Completions:
    """`group_size` completions of each problem (`data.problems.Problem`). The same policy draws the same ones again."""
    run, config = policy.run, policy.run.config
    check_divides("problems", len(problems), run.mesh)
    kept, ids, long = drop_long(list(problems), run.tokenizer, config.system_prompt, config.max_prompt_tokens)  # type: ignore[arg-type]
    if long:
        raise ConfigError(f"problem {long[0].id} has a prompt above max_prompt_tokens {config.max_prompt_tokens}")
    with jax.set_mesh(run.mesh):
        params = sampling_params(policy.weights, run.model, run.sample)
        return grpo.rollout.sample_groups(params, kept, ids, policy.step + 1, run)


def score(policy: Policy, completions: Completions, rewards: Any = None) -> tuple[Batch, np.ndarray]:
    """The batch that an update trains on, and the rewards QG: those given (NaN: no vote), or those of the settings.

    As in training, log-probabilities of an old policy are in the batch only with `updates_per_rollout` above 1.
    """
    run, config = policy.run, policy.run.config
    if rewards is None:
        rewards = grpo.rollout.rewards_of(grpo.rollout.grade(completions, run, policy.step + 1), config.group_size)
    rewards = np.asarray(rewards, np.float32).reshape(len(completions.problems), config.group_size)
    if config.mask_truncated:  # no loss, so no vote
        rewards = np.where(np.reshape(completions.samples.truncated, rewards.shape), np.float32(np.nan), rewards)
    with jax.set_mesh(run.mesh):
        advantages = grpo.rollout.advantages_of(rewards, config)
        _, batch = grpo.rollout.build_batch(completions, rewards, advantages, run)
        return grpo.step.add_logprobs(batch, policy.weights, policy.reference, run), rewards


def loss(policy: Policy, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a batch under the policy as it is now, and its terms for each token of the completions, in their order.  BC

    `grpo.loss.grpo_loss` names the terms.
    """
    run, update = policy.run, policy.run.update
    with jax.set_mesh(run.mesh):
        weights = AGGREGATIONS[update.aggregation](batch.mask)
        execution = replace(run.train, remat="none")
        value, terms = compiled_loss(policy.state.params, policy.base, batch, weights, run.model, execution, update)
        return float(value), {name: batch.restore(term) for name, term in to_host(terms).items()}


def train_step(policy: Policy, batch: Batch, rate: float | None = None) -> tuple[Policy, dict[str, float]]:
    """One update, at `rate` or at the settings' learning rate: the policy after it, and its statistics. Without anything to
    learn (`grpo.update.learnable`) there is none: the same weights and no statistics.

    Use only the new policy from here on: the update reuses the memory of the old one.
    """
    run = policy.run
    with jax.set_mesh(run.mesh):
        if not grpo.step.learnable(batch.mask, batch.advantages, policy.weights, policy.reference):
            return replace(policy, step=policy.step + 1), {}
        rates = [run.config.learning_rate if rate is None else rate]
        state, stats, _ = grpo.step.update(policy.state, batch, rates, run, policy.base)
        figures = {name: float(value) for name, value in to_host(stats).items()}
    return replace(policy, state=state, step=policy.step + 1), figures
