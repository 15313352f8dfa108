"""Which problems have something to teach: those that a measured model solves sometimes.

A group whose completions are all right, or all wrong, has equal rewards and teaches nothing. `scripts/evaluate_consensus.py`
measures how often a model solves each problem, on training data too; here its files choose what a run trains on.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data import DataError
from data.problems import Problem, question_key

FEWEST = 2  # samples of a problem: one alone is always right or always wrong


class Chosen(NamedTuple):
    """The problems of a run, and how many of all there were are left out or have no measured rate."""

    problems: list[Problem]
    never: int
    always: int
    unmeasured: int


def choose_by_rate(problems: list[Problem], rates: dict[str, float], keep: float, seed: int) -> Chosen:
    """Without the problems that never or always succeed, except a share `keep` of them, in their order.

    Problems without a rate stay. Which ones are kept depends on the seed and on each problem's question alone.
    """

    def draw(problem: Problem) -> float:
        return int(hashlib.sha256(f"{seed} {question_key(problem)}".encode()).hexdigest()[:13], 16) / 16**13

    found = [(problem, rates.get(question_key(problem))) for problem in problems]
    out = [(problem, rate) for problem, rate in found if rate in (0.0, 1.0) and draw(problem) >= keep]
    never = sum(rate == 0 for _, rate in out)
    gone = {id(problem) for problem, _ in out}
    left = [problem for problem in problems if id(problem) not in gone]
    if not left:
        raise DataError(f"by pass_rates all {len(problems)} problems always or never succeed: none is left to train on")
    return Chosen(left, never, len(out) - never, sum(rate is None for _, rate in found))


def read_pass_rates(folder: str) -> dict[str, float]:
    """The share of right samples of each question (its `question_key`), in the directory of an evaluation.

    Only samples that vote count, of the model under test; the greedy one is left out. DataError if they are too few.
    """
    questions = {record["id"]: record["question"] for record in _records(Path(folder) / "problems.jsonl", "id", "question")}
    right: dict[str, list[bool]] = defaultdict(list)
    for record in _records(Path(folder) / "samples.jsonl", "model", "problem", "sample", "accuracy"):
        if record["model"] == "trained" and record["sample"] > 0 and record["problem"] in questions:
            key = question_key(Problem("", questions[record["problem"]], ""))
            right[key].append(record["accuracy"]["tagged"])
    fewest = min(map(len, right.values()), default=0)
    if fewest < FEWEST:
        raise DataError(
            f"pass_rates {folder} has {fewest} samples of a problem, needs at least {FEWEST}: finish the evaluation, with "
            f"more --temperatures or --samples"
        )
    return {key: sum(verdicts) / len(verdicts) for key, verdicts in right.items()}


def _records(path: Path, *needed: str) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"pass_rates: {path} cannot be read ({reason}); give an --out of evaluate_consensus.py") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not all(name in record for name in needed):
            raise DataError(f"pass_rates: {path}:{number} is no record of an evaluation: it needs {', '.join(needed)}")
        yield record
