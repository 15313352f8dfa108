"""Relay sessions and Active Review: which problems each session trains on, when, and at which learning rates.

Session k takes the next `new_problems` problems and reviews min(round(review_ratio * new), all before) earlier ones, drawn
without replacement from (seed, k); its steps go through the union in orders drawn from (seed, k, epoch). So a session is a pure
function of configuration and problems, and a resumed run needs no stored position.
"""

import math
from dataclasses import dataclass

import numpy as np

from data.batches import step_indices
from grpo.config import Config
from grpo.errors import ConfigError

REVIEW = 2**31  # in the place of an epoch: the random stream that draws the problems to review


@dataclass(frozen=True)
class Session:
    """One session. Steps are counted through the whole run: this session has steps start + 1 to end."""

    number: int  # from 1
    new: np.ndarray  # indices of the problems that it sees for the first time
    review: np.ndarray  # indices of problems that an earlier session has seen
    start: int
    end: int
    seed: int
    prompts_per_step: int

    def problems_of(self, step: int) -> np.ndarray:
        """Indices of the Q problems of a step."""
        problems = np.concatenate([self.new, self.review])
        order = step_indices(step - self.start - 1, self.prompts_per_step, len(problems), self.seed, self.number)
        return problems[order]


def plan_sessions(config: Config, count: int) -> list[Session]:
    """All sessions of a run over `count` problems. Raises ConfigError when a session has too few."""
    sessions: list[Session] = []
    seen = end = 0
    for number in range(1, max(config.sessions, config.session) + 1):
        new = np.arange(seen, min(seen + (config.new_problems or count), count))
        if not len(new):
            raise ConfigError(f"session {number} has no new problems: earlier ones take all {count}; lower new_problems")
        drawn = min(round(config.review_ratio * len(new)), seen)
        review = np.random.default_rng([config.seed, number, REVIEW]).choice(seen, drawn, replace=False)
        problems = len(new) + len(review)
        if problems < config.prompts_per_step:
            raise ConfigError(
                f"prompts_per_step {config.prompts_per_step} must be at most {problems}, the problems of session {number}"
            )
        steps = -(-problems * config.epochs // config.prompts_per_step)
        start, end = end, end + min(steps, config.max_steps or steps)
        sessions.append(Session(number, new, np.sort(review), start, end, config.seed, config.prompts_per_step))
        seen += len(new)
    return sessions


def learning_rates(step: int, session: Session, run_end: int, config: Config) -> list[float]:
    """The rate of each of the mu updates of a step. The schedule spans the session, or the run, which ends at `run_end`."""
    mu = config.updates_per_rollout
    first, last = (session.start, session.end) if config.schedule == "session" else (0, run_end)
    updates = [(step - first - 1) * mu + i for i in range(mu)]
    return [learning_rate(i, (last - first) * mu, config.learning_rate, config.warmup_steps) for i in updates]


def learning_rate(update: int, updates: int, peak: float, warmup_steps: int) -> float:
    """The rate of an update, counted from 0, among `updates`: linear warm-up to `peak`, then a cosine to a tenth of it.

    The cosine would arrive with the next update. With at most twice `warmup_steps` updates the warm-up takes less than half of
    them, and the cosine arrives with the last one: a short session has its peak and its tenth, and a single update the peak.
    """
    warmup = min(warmup_steps, (updates - 1) // 2)
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    span = updates - warmup - (warmup < warmup_steps)
    return peak * (0.55 + 0.45 * math.cos(math.pi * (update - warmup) / max(span, 1)))
