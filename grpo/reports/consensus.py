"""Voting over several answers to a problem, and the statistics of accuracies: plain Python over plain values.

An answer is a number in its plainest spelling (`plain`: 18.0 and 18 are the same answer), or None, which abstains. The answer
with the most votes wins; a tie goes to the one whose supporter was sampled at the lowest temperature, then to the first sample.

Every figure has one denominator, all N problems: one without an answer, or without a sample, is answered wrongly. Left out:
sampling, and reading answers from text.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

Answer = str | None

READINGS = ("tagged", "strict", "flexible")


def plain(number: Decimal | str | None) -> Answer:
    """The number without needless zeros and signs: `18.0` -> `18`, `-0` -> `0`. None stays None."""
    if number is None:
        return None
    text = format(Decimal(number), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def majority_vote(answers: Sequence[Answer], temperatures: Sequence[float]) -> Answer:
    """The answer that wins; None when all abstain."""
    votes = Counter(answer for answer in answers if answer is not None)
    by_temperature = sorted(zip(temperatures, answers, strict=True), key=lambda pair: pair[0])
    return next((answer for _, answer in by_temperature if answer is not None and votes[answer] == max(votes.values())), None)


def agreement(answers: Sequence[Answer]) -> float:
    """Share of all samples, those that abstain too, that give the winning answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes.values(), default=0) / len(answers)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that at least one of k samples is right, drawn without replacement from n of which `right` are: an unbiased
    estimate for k fresh ones (Chen et al. 2021).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Answer], temperatures: Sequence[float], gold: str) -> list[float]:
    """For k = 1 to n: the share of all subsets of k samples whose vote gives the gold answer. Exact, ties included.

    Subsets are not listed but counted. Order the samples by temperature, and say that the gold answer has `count` votes, the
    first one from sample `first`. It wins when every other answer has fewer votes, or as many, all of them after `first`. The
    numbers of ways to choose those, by how many are chosen, are multiplied as polynomials.

    A polynomial is held as one integer, its value at 2^(n + 1), which no coefficient reaches, as there are 2^n subsets: Python
    multiplies these fast. Answers given too rarely to have `count` votes are any samples, and need no factors of their own.
    """
    n = len(answers)
    places: dict[Answer, list[int]] = defaultdict(list)
    for place, i in enumerate(sorted(range(n), key=lambda i: temperatures[i])):
        places[answers[i]].append(place)
    golden = places.pop(gold, [])
    places.pop(None, None)

    def choose(m: int, k: int) -> int:
        """The term of x^k of (1 + x)^m: the ways to choose k of m."""
        return math.comb(m, k) << k * (n + 1)

    wins = 0
    for count in range(1, len(golden) + 1):
        rivals = [(other, sum(choose(len(other), k) for k in range(count))) for other in places.values() if len(other) >= count]
        others = (1 + choose(1, 1)) ** (n - len(golden) - sum(len(other) for other, _ in rivals))
        for nth, first in enumerate(golden[: len(golden) - count + 1]):
            factors = Counter(fewer + choose(sum(place > first for place in other), count) for other, fewer in rivals)
            losing = math.prod(factor**power for factor, power in factors.items())
            wins += math.comb(len(golden) - nth - 1, count - 1) * losing * others << count * (n + 1)
    return [(wins >> k * (n + 1)) % 2 ** (n + 1) / math.comb(n, k) for k in range(1, n + 1)]


def wilson(right: float, n: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): sensible at 0 and at n, where the normal one is not."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(low, 0.0), min(high, 1.0)  # rounding may leave -1e-17


def mcnemar(fixed: int, broke: int) -> float:
    """Exact two-sided p of McNemar's test: how likely is a split as uneven as this, if either way is a coin's toss?"""
    n = fixed + broke
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(fixed, broke) + 1)) / 2**n)


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """The same problems answered twice: how many the second way fixes, and how many it breaks."""
    counts = Counter(zip(before, after, strict=True))
    fixed, broke = counts[False, True], counts[True, False]
    return {
        "fixed": fixed,
        "broke": broke,
        "both_right": counts[True, True],
        "both_wrong": counts[False, False],
        "mcnemar_p": mcnemar(fixed, broke),
    }


# ---------------------------------------------------------------------------------------------------------------- records


def read_answers(samples: Sequence[dict[str, Any]], reading: str) -> list[Answer]:
    """What samples answer. `tagged`: in their tags; `strict`: the same, of well-formed samples alone; `flexible`: the last
    number of the text.
    """
    if reading == "flexible":
        return [sample["flexible_answer"] for sample in samples]
    return [None if reading == "strict" and sample["format"]["violation"] else sample["answer"] for sample in samples]


def figures(
    problems: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], temperatures: Sequence[float]
) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    """One model's figures from the records of its samples, of which number 0 is greedy and number j is at temperatures[j - 1];
    and which problems it solves, greedily and by vote.
    """
    by_problem: dict[str, list[dict[str, Any]]] = {problem["id"]: [] for problem in problems}
    for sample in sorted(samples, key=lambda sample: sample["sample"]):
        by_problem[sample["problem"]].append(sample)
    n = len(temperatures)
    none: list[Answer] = [None] * n
    right: dict[str, list[bool]] = {f"{way} {reading}": [] for way in ("greedy", "consensus") for reading in READINGS}
    agreed, passes, majorities = [], [], []
    for problem in problems:
        greedy, others, gold = by_problem[problem["id"]][:1], by_problem[problem["id"]][1:], plain(problem["answer"])
        assert gold is not None
        for reading in READINGS:
            right[f"greedy {reading}"].append(read_answers(greedy, reading) == [gold])
            votes = read_answers(others, reading) or none
            right[f"consensus {reading}"].append(majority_vote(votes, temperatures) == gold)
        votes = read_answers(others, "tagged") or none
        agreed.append(agreement(votes))
        passes.append([pass_at_k(n, votes.count(gold), k) for k in range(1, n + 1)])
        majorities.append(maj_at_k(votes, temperatures, gold))

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(problems)

    def accuracy(way: str) -> dict[str, float]:
        low, high = wilson(sum(right[f"{way} tagged"]), len(problems))
        return {reading: mean(right[f"{way} {reading}"]) for reading in READINGS} | {"low": low, "high": high}

    of_model = {
        "greedy": accuracy("greedy"),
        "consensus": accuracy("consensus"),
        "paired": paired(right["greedy tagged"], right["consensus tagged"]),
        "agreement": mean(agreed),
        "pass_at_k": [mean(column) for column in zip(*passes, strict=True)],
        "maj_at_k": [mean(column) for column in zip(*majorities, strict=True)],
        "tokens": sum(sample["length"] for sample in samples),
        "seconds": sum(sample["seconds"] for sample in samples),
    }
    return of_model, {way: right[f"{way} tagged"] for way in ("greedy", "consensus")}
