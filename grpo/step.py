"""One training step, line by line: start here, then read grpo/loss.py. Q questions, G completions each, B = Q*G, C tokens."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh

from grpo import rollout
from grpo.batch import Batch
from grpo.config import Config
from grpo.memory import choose_remat, device_memory
from grpo.session import Session, learning_rates
from grpo.timing import phase
from grpo.update import TrainState, UpdateConfig, completion_logprobs, learnable, policy, train_step
from models.gemma import ExecutionConfig, GemmaConfig, Params


@dataclass(frozen=True)
class Run:
    """What a step works with. `grpo.runs.setup.prepare` loads and checks it."""

    config: Config
    mesh: Mesh
    model: GemmaConfig
    tokenizer: rollout.Detokenizer
    problems: list[Any]  # data.problems.Problem; only the grader looks inside
    prompt_ids: list[list[int]]  # of every problem
    grade: rollout.Grader
    sessions: list[Session]
    train: ExecutionConfig  # how update and reference run
    sample: ExecutionConfig  # how the rollout runs

    @property
    def update(self) -> UpdateConfig:
        return UpdateConfig.of(self.config)


@dataclass(frozen=True)
class StepResult:
    """What one step did; `stats` and `terms` are of the last update, and empty if there was none: nothing could be learned."""

    completions: rollout.Completions
    grades: list[rollout.Grade]  # B
    advantages: np.ndarray  # QG
    mask: np.ndarray  # BC, the tokens that count
    batch: Batch
    rates: list[float]  # the learning rate of each update
    stats: dict[str, Array]
    terms: dict[str, Array]  # the loss's terms for each token, BC
    resampled: int  # groups that were sampled again
    drawn: list[rollout.Grade] | None = None  # B, of the first attempt: before groups were sampled again


def one_step(
    step: int, session: Session, state: TrainState, run: Run, reference: Params | None = None, base: Params | None = None,
    limits: np.ndarray | None = None,
) -> tuple[TrainState, StepResult]:  # fmt: skip
    """One rollout and its mu updates; none, and the state as it is, when nothing can be learned (`grpo.update.learnable`).

    `state` is donated: do not use it again. `reference`: the frozen policy of the KL; None when beta is 0. `base`: the frozen
    weights below the adapters; None without LoRA. `limits` B: the most tokens of each row, for benchmarks.
    """
    indices = session.problems_of(step)  # Q
    weights = policy(state.params, base, run.update)
    completions = rollout.sample(weights, indices, step, run, limits)  # tokens BC, logprobs BC, texts B
    batch = rollout.pack_batch(completions, run)  # packed rows, on the devices
    if not run.config.resample:  # only begins: the devices work while the host grades
        batch = add_logprobs(batch, weights, reference, run)
    drawn = grades = rollout.grade(completions, run, step)  # plain Python over text: reward, components
    if resampled := run.config.resample:
        completions, grades, resampled = rollout.resample(completions, drawn, weights, indices, step, run, limits)
        batch = add_logprobs(rollout.pack_batch(completions, run), weights, reference, run)
    rewards = rollout.rewards_of(grades, run.config.group_size, run.config.mask_truncated)  # QG
    advantages = rollout.advantages_of(rewards, run.config)  # QG: (reward - mean) / std of each group
    mask, batch = rollout.weigh(batch, completions, rewards, advantages, run)
    rates, stats, terms = learning_rates(step, session, run.sessions[-1].end, run.config), {}, {}
    if learnable(mask, advantages, weights, reference):  # else the optimizer is not called
        state, stats, terms = update(state, batch, rates, run, base)
    return state, StepResult(completions, grades, advantages, mask, batch, rates, stats, terms, resampled, drawn)


@phase("reference", wait=False)
def add_logprobs(batch: Batch, weights: Params, reference: Params | None, run: Run) -> Batch:
    """Adds log-probabilities of the reference and, when mu > 1, of the old policy (with mu = 1 that is the policy itself)."""
    old = weights if run.config.updates_per_rollout > 1 else None
    needed, rest = {"ref_logprobs": reference, "old_logprobs": old}, (batch, run.model, run.train, run.update)
    return replace(batch, **{name: completion_logprobs(of, *rest) for name, of in needed.items() if of is not None})


@phase("update")
def update(state: TrainState, batch: Batch, rates: list[float], run: Run, base: Params | None = None) -> tuple:
    """One optimizer update for each of `rates`: the state after them; statistics and per-token terms of the last one."""
    stats, terms = {}, {}
    execution = choose_remat(run.train, run.model, batch, run.update, run.mesh, device_memory(run.mesh))
    for rate in rates:
        state, stats, terms = train_step(state, batch, rate, run.model, execution, run.update, base)
    return state, stats, terms
