"""The problems of a run: those to train on, in order, and those to evaluate on."""

from typing import Protocol

from data import DataError
from data.arithmetic import make_problems, training_problems
from data.batches import epoch_order
from data.problems import Problem, Reading, load_problems, question_key, split_problems


class DataSettings(Protocol):
    """The settings that determine which problems a run has."""

    @property
    def data(self) -> str: ...  # "arithmetic", a file, or the dataset's name on the hub
    @property
    def eval_data(self) -> str: ...  # the same, or "arithmetic:tune" or "arithmetic:test"; empty: held out from `data`
    @property
    def question_key(self) -> str: ...  # these three as in `Reading`
    @property
    def answer_key(self) -> str: ...
    @property
    def answer_pattern(self) -> str: ...
    @property
    def reward(self) -> str: ...  # with one of the user's, a problem needs no answer
    @property
    def eval_problems(self) -> int: ...
    @property
    def new_problems(self) -> int: ...  # of each session; 0: all
    @property
    def sessions(self) -> int: ...
    @property
    def session(self) -> int: ...  # the last one to run; 0: all
    @property
    def seed(self) -> int: ...


def choose_problems(settings: DataSettings, demonstrated: bool = False) -> tuple[list[Problem], list[Problem]]:
    """(train, evaluate): the problems to train on, in the order in which sessions take them, and the problems to evaluate on.

    No question is in both. The evaluation problems do not depend on the seed. `demonstrated`: for
    supervised fine-tuning, as in `load_problems`. Raises DataError.
    """
    if settings.data == "arithmetic":
        return choose_arithmetic(settings)
    reading = Reading(settings.question_key, settings.answer_key, settings.answer_pattern, bool(settings.reward))
    problems = load_problems(settings.data, demonstrated, reading)
    if settings.eval_data:
        held_out = load_problems(settings.eval_data, demonstrated, reading)[: settings.eval_problems]
        asked = {question_key(problem) for problem in held_out}
        count = len(problems)
        problems = [problem for problem in problems if question_key(problem) not in asked]
        if not problems:
            raise DataError(f"all {count} problems of data {settings.data!r} are in eval_data too: none is left to train on")
    else:
        problems, held_out = split_problems(problems, settings.eval_problems, seed=0)
    return [problems[i] for i in epoch_order(len(problems), settings.seed, 0, 0)], held_out


def choose_arithmetic(settings: DataSettings) -> tuple[list[Problem], list[Problem]]:
    """The same for generated problems, whose splits share no chain of operations."""
    split = settings.eval_data.removeprefix("arithmetic:") or "test"
    if split not in ("tune", "test"):
        raise DataError(f"eval_data {settings.eval_data!r} must be arithmetic:tune or arithmetic:test with --data arithmetic")
    problems = training_problems(settings.new_problems, max(settings.sessions, settings.session), settings.seed)
    return problems, make_problems(settings.eval_problems, 0, split)
