"""Majority votes over several answers to a problem, and the statistics of accuracies. Plain Python over plain values.

An answer is a number in canonical form (18.0 and 18 are the same answer), a canonical text (grpo/reward.py), or None, which
abstains. The answer with the most
votes wins; ties go to the answer sampled at the lowest temperature, then to the first sample.

All figures have the same denominator, the N problems: a problem without an answer, or without samples, counts as wrong.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from decimal import Decimal
from statistics import NormalDist, fmean
from typing import Any

Answer = str | None

READINGS = ("tagged", "strict", "flexible")
WAYS = ("greedy", "consensus")
Z = NormalDist().inv_cdf(0.975)  # 1.96: the normal quantile of a two-sided 95% interval


def canonical(number: Decimal | str | None) -> Answer:
    """A number without redundant zeros and signs: `18.0` -> `18`, `-0` -> `0`. None stays None."""
    if number is None:
        return None
    text = format(Decimal(number), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def gold_of(problem: Mapping[str, Any]) -> str:
    """The gold answer of a line of problems.jsonl, as samples are compared with it; older lines hold numbers only."""
    if "gold" in problem:
        return problem["gold"]
    try:
        return str(canonical(problem["answer"]))
    except ArithmeticError:  # no number
        return problem["answer"]


def majority_vote(answers: Sequence[Answer], temperatures: Sequence[float]) -> Answer:
    """The winning answer; None if all samples abstain."""
    votes = Counter(answer for answer in answers if answer is not None)
    by_temperature = sorted(zip(temperatures, answers, strict=True), key=lambda pair: pair[0])
    return next((answer for _, answer in by_temperature if answer is not None and votes[answer] == max(votes.values())), None)


def agreement(answers: Sequence[Answer]) -> float:
    """Share of the samples, abstentions included, that give the winning answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes.values(), default=0) / len(answers)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that at least one of k samples is right, drawn without replacement from n samples of which `right` are.

    An unbiased estimate for k new samples (Chen et al. 2021, arXiv:2107.03374).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Answer], temperatures: Sequence[float], gold: str) -> list[float]:
    """For k = 1 to n: the share of all subsets of k samples whose majority vote is the gold answer. Exact, ties included.

    The subsets are counted, not listed. Suppose that the gold answer has `count` votes, the first of them at place `first` in
    order of temperature. It wins if each rival has fewer votes, or as many but all of them after `first`.
    """
    n = len(answers)
    places: dict[Answer, list[int]] = defaultdict(list)  # of each answer, in order of temperature
    for place, i in enumerate(sorted(range(n), key=lambda i: temperatures[i])):
        places[answers[i]].append(place)
    golden = places.pop(gold, [])
    places.pop(None, None)

    wins = [0] * (n + 1)  # subsets won, by size
    for count in range(1, len(golden) + 1):
        rivals = [rival for rival in places.values() if len(rival) >= count]
        others = n - len(golden) - sum(map(len, rivals))  # they abstain, or their answers cannot reach `count` votes
        free = [math.comb(others, m) for m in range(others + 1)]
        for i, first in enumerate(golden[: len(golden) - count + 1]):
            rest = math.comb(len(golden) - i - 1, count - 1)  # ways to choose the other votes, all of them after `first`
            ways = free
            for rival in rivals:
                ways = convolve(ways, ways_to_lose(rival, count, first))
            for m, number in enumerate(ways):
                wins[count + m] += rest * number
    return [wins[k] / math.comb(n, k) for k in range(1, n + 1)]


def ways_to_lose(rival: list[int], count: int, first: int) -> list[int]:
    """How many subsets of the rival's samples lose against `count` votes, the earliest of them at `first`; by subset size."""
    after = sum(place > first for place in rival)
    return [*(math.comb(len(rival), m) for m in range(count)), math.comb(after, count)]


def convolve(a: list[int], b: list[int]) -> list[int]:
    """Ways to choose m samples of two disjoint sets, from the ways to choose of each; in exact integers."""
    ways = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            ways[i + j] += x * y
    return ways


def wilson(right: float, n: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927); unlike the normal interval, it is sensible at 0 and at n.

    `right` and `n` may be effective counts, which need not be whole numbers (scipy's binomtest takes whole numbers only).
    """
    if n == 0:
        return 0.0, 1.0
    p = right / n
    centre, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = (centre - spread) / (1 + Z**2 / n), (centre + spread) / (1 + Z**2 / n)
    return max(low, 0.0), min(high, 1.0)  # rounding may leave -1e-17


def mcnemar(fixed: int, broke: int) -> float:
    """Exact two-sided p value of McNemar's test, whose null hypothesis is that a change is as likely to fix as to break."""
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(fixed, fixed + broke).pvalue) if fixed + broke else 1.0


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """The same problems answered in two ways: how many the second way fixes, and how many it breaks."""
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
    """The answers of samples. `tagged`: the number in the answer tags; `strict`: the same, but malformed samples abstain;
    `flexible`: the last number of the text.
    """
    if reading == "flexible":
        return [sample["flexible_answer"] for sample in samples]
    return [None if reading == "strict" and sample["format"]["violation"] else sample["answer"] for sample in samples]


def model_figures(
    problems: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], temperatures: Sequence[float]
) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    """(figures, solved) of one model: its accuracies and curves, and which problems it solves greedily and by vote.

    Sample 0 of a problem is greedy; sample j is drawn at `temperatures[j - 1]` and votes.
    """
    by_problem: dict[str, list[dict[str, Any]]] = {problem["id"]: [] for problem in problems}
    for sample in sorted(samples, key=lambda sample: sample["sample"]):
        by_problem[sample["problem"]].append(sample)
    right: dict[tuple[str, str], list[bool]] = {(way, reading): [] for way in WAYS for reading in READINGS}
    agreements, passes, majorities = [], [], []
    for problem in problems:
        greedy, voters, gold = by_problem[problem["id"]][:1], by_problem[problem["id"]][1:], gold_of(problem)
        answers = {reading: read_answers(voters, reading) or [None] * len(temperatures) for reading in READINGS}
        for reading in READINGS:
            right["greedy", reading].append(read_answers(greedy, reading) == [gold])
            right["consensus", reading].append(majority_vote(answers[reading], temperatures) == gold)
        tagged = answers["tagged"]
        agreements.append(agreement(tagged))
        passes.append([pass_at_k(len(tagged), tagged.count(gold), k) for k in range(1, len(tagged) + 1)])
        majorities.append(maj_at_k(tagged, temperatures, gold))
    solved = {way: right[way, "tagged"] for way in WAYS}
    figures = {way: accuracy_by_reading({reading: right[way, reading] for reading in READINGS}) for way in WAYS} | {
        "paired": paired(solved["greedy"], solved["consensus"]),
        "agreement": fmean(agreements),
        "pass_at_k": [fmean(column) for column in zip(*passes, strict=True)],
        "maj_at_k": [fmean(column) for column in zip(*majorities, strict=True)],
        "tokens": sum(sample["length"] for sample in samples),
        "seconds": sum(sample["seconds"] for sample in samples),
    }
    return figures, solved


def accuracy_by_reading(right: dict[str, list[bool]]) -> dict[str, float]:
    """The accuracy of each reading, and the 95% interval `low` to `high` of the tagged one."""
    low, high = wilson(sum(right["tagged"]), len(right["tagged"]))
    return {reading: fmean(solved) for reading, solved in right.items()} | {"low": low, "high": high}
