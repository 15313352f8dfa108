"""Grading of completions: the built-in reward and the user's reward functions, on process 0, for every process."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data.problems import Problem
from grpo.config import Config
from grpo.errors import RunError
from grpo.reward import accuracies, format_checks, score
from grpo.rollout import Grade
from grpo.runs.distributed import broadcast_from_main, is_main_process
from grpo.runs.reward_worker import UserRewards


def make_grader(config: Config, rewards: UserRewards) -> Callable[..., list[Grade]]:
    """The `grade` of a run: (texts, problems, truncated) -> a grade of each completion, the same on every process."""

    def grade(texts: Sequence[str], problems: Sequence[Problem], truncated: Iterable[bool]) -> list[Grade]:
        fault, grades = "", []
        if is_main_process():
            try:
                grades = grade_completions(texts, problems, truncated, config.reward_weights, rewards)
            except RunError as error:
                fault = str(error)  # ends the run on every process
        fault, grades = broadcast_from_main([fault, grades])
        if fault:
            raise RunError(fault)
        return grades

    return grade


def grade_completions(
    texts: Sequence[str],
    problems: Sequence[Problem],
    truncated: Iterable[bool],
    weights: dict[str, float],
    rewards: UserRewards,
) -> list[Grade]:
    """A grade of each completion, on this process: its reward and components, three accuracies, format. Plain Python values.

    The reward is NaN where one of the user's functions gave none.
    """
    theirs = rewards.score(list(texts), list(problems))
    grades: list[dict[str, Any]] = []
    for b, (text, problem, cut) in enumerate(zip(texts, problems, map(bool, truncated), strict=True)):
        components, total = score(text, problem, cut, weights)
        added = {name: values[b] for name, values in theirs.items()}
        grades.append({
            "text": text,
            "reward": total + sum(added.values()),
            "components": components | added,
            "accuracy": accuracies(text, problem.answer, cut),
            "format": format_checks(text, cut),
            "truncated": cut,
        })  # fmt: skip
    return grades
