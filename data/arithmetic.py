"""Generated word problems for runs without a download: chains of 2, 3 or 4 operations on a number of things.

    "Ann has 10 pens. Ann gives 3 away. Then Ann gets 2. How many pens now?"     10 - 3 = 7. 7 + 2 = 9.

All intermediate values are whole numbers from 0 to 99, and the words are few, so a vocabulary of a few hundred pieces is
enough. A demonstration shows its work or only gives the result. Both are correct; training can find out which is rewarded.

Numbers and operations alone determine the split, so no chain is in two splits, whatever its names and things.
"""

import random
import zlib

from data import DataError
from data.problems import Problem, completion_of

LARGEST_VALUE, LARGEST_START, LARGEST_OPERAND = 99, 50, 10
LENGTHS = (2, 3, 4)
NAMES = ("Ann", "Ben", "Eva", "Max", "Sam", "Tom")
THINGS = ("pens", "cups", "eggs", "nuts", "hats", "keys")
SENTENCES = {
    "+": ("{name} finds {operand} more.", "Then {name} gets {operand}."),
    "-": ("{name} gives {operand} away.", "Then {name} loses {operand}."),
    "*": ("{name} doubles the {things}.", "Then the number doubles."),
    "/": ("{name} gives half away.", "Then {name} loses half."),
}
SPLIT_TENTHS = {"train": range(8), "tune": range(8, 9), "test": range(9, 10)}
# One draw in ten is a test chain, so this many draws without a new one mean that fewer than 1 in 1,000 are left.
DRAWS_BEFORE_GIVING_UP = 10_000

SESSION_PROBLEMS = 4000  # problems of a session that sets no number of its own

Step = tuple[str, int]  # ("+", 2), ("-", 3), ("*", 2) or ("/", 2)


def make_problems(count: int, seed: int, split: str) -> list[Problem]:
    """`count` problems of `split` ("train", "tune" or "test"), all with different chains, of lengths 2, 3, 4 in turn.

    The id is the chain ("10-3+2"), the solution its steps. Raises DataError for an unknown split, a negative count, or
    more problems than there are chains of the shortest length (about 6,000 in "test").
    """
    if split not in SPLIT_TENTHS:
        raise DataError(f'no split "{split}": must be one of {", ".join(SPLIT_TENTHS)}')
    if count < 0:
        raise DataError(f"cannot make {count} problems: must be at least 0")
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = _draw_new_problem(rng, LENGTHS[len(problems) % len(LENGTHS)], split, problems)
        if problem is None:
            raise DataError(f'cannot make {count} different problems in split "{split}": found {len(problems)}')
        problems[problem.id] = problem
    return list(problems.values())


def training_problems(new_problems: int, sessions: int, seed: int) -> list[Problem]:
    """The training problems of a run, `new_problems` for each session; 0 means 4,000. Raises DataError."""
    return make_problems((new_problems or SESSION_PROBLEMS) * sessions, seed, "train")


def demonstration(problem: Problem, style: str) -> str:
    """A completion with the right answer: "worked" shows every step, "terse" only the result, "slip" breaks the format.

    A slip is the worked text without `</reasoning>`. If it were terse, learning the format would favor showing work, for
    a reason unrelated to being right. Raises DataError for an unknown style.
    """
    answer = f"<answer>{problem.answer}</answer>"
    if style == "worked":
        return completion_of(problem)
    if style == "terse":
        return f"<reasoning>{problem.answer}</reasoning>{answer}"
    if style == "slip":
        return f"<reasoning>{problem.solution}{answer}"
    raise DataError(f'no style "{style}": must be worked, terse or slip')


def _draw_new_problem(rng: random.Random, length: int, split: str, taken: dict[str, Problem]) -> Problem | None:
    for _ in range(DRAWS_BEFORE_GIVING_UP):
        start, steps = _draw_chain(rng, length)
        chain = str(start) + "".join(f"{symbol}{operand}" for symbol, operand in steps)
        # crc32, because hash() differs from process to process.
        if chain not in taken and zlib.crc32(chain.encode()) % 10 in SPLIT_TENTHS[split]:
            return _tell(rng, chain, start, steps)
    return None


def _draw_chain(rng: random.Random, length: int) -> tuple[int, list[Step]]:
    start = value = rng.randint(2, LARGEST_START)
    steps = []
    for _ in range(length):
        symbol, operand = rng.choice(_possible_steps(rng, value))
        value = _apply(value, symbol, operand)
        steps.append((symbol, operand))
    return start, steps


def _possible_steps(rng: random.Random, value: int) -> list[Step]:
    """One step of each kind whose result is a whole number in 0..99; 0 is neither doubled nor halved."""
    steps = []
    if value < LARGEST_VALUE:
        steps.append(("+", rng.randint(1, min(LARGEST_OPERAND, LARGEST_VALUE - value))))
    if value > 0:
        steps.append(("-", rng.randint(1, min(LARGEST_OPERAND, value))))
    if 0 < 2 * value <= LARGEST_VALUE:
        steps.append(("*", 2))
    if value > 0 and value % 2 == 0:
        steps.append(("/", 2))
    return steps


def _apply(value: int, symbol: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[symbol]


def _tell(rng: random.Random, chain: str, start: int, steps: list[Step]) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    question, solution, value = [f"{name} has {start} {things}."], [], start
    for symbol, operand in steps:
        result = _apply(value, symbol, operand)
        question.append(rng.choice(SENTENCES[symbol]).format(name=name, things=things, operand=operand))
        solution.append(f"{value} {symbol} {operand} = {result}.")
        value = result
    question.append(f"How many {things} now?")
    return Problem(chain, " ".join(question), str(value), " ".join(solution))
