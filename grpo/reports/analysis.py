"""What can be learned from the records of a run or of an evaluation, each figure with its n and a 95% interval.

Samples are the lines of an evaluation's samples.jsonl, or those of a run's completions.jsonl, of one model. Answers to the same
problem are no independent draws: intervals count problems, not samples. Results are plain lists and dicts, as JSON has them.
Left out: drawing (pictures.py); votes and the intervals of single proportions (consensus.py).
"""

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.reports.consensus import agreement, majority_vote, wilson

Records = Sequence[Mapping[str, Any]]

REASONING = re.compile(r"<reasoning>(.*?)(?:</reasoning>|<answer>|$)", re.DOTALL)
BINS = 10  # at most, of any histogram


# -------------------------------------------------------------------------------------------------------------- intervals


def t_quantile(df: int) -> float:
    """97.5% point of Student's t: exact at 1 and 2 degrees of freedom, else within 0.3%: Cornish and Fisher's expansion."""
    if df < 3:
        return {1: 12.706205, 2: 4.302653}[df]
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    terms += ((79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,)
    return z + sum(term / df**power for power, term in enumerate(terms, start=1))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Student's interval of the mean of independent values; none for fewer than two."""
    n = len(values)
    if n < 2:
        return None, None
    mean, spread = statistics.fmean(values), t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean - spread, mean + spread


def gain_interval(gains: Sequence[float]) -> tuple[float, float]:
    """Of the mean of differences of paired proportions, each from -1 to 1. Agresti and Min (2005): half a problem of each of
    the four outcomes is added, so that the interval has a width even where nothing changes.
    """
    n = len(gains) + 2
    mean = math.fsum(gains) / n
    spread = 1.959964 * math.sqrt(((math.fsum(gain * gain for gain in gains) + 1) / n - mean**2) / n)
    return max(mean - spread, -1.0), min(mean + spread, 1.0)


def proportion(samples: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """The share of (problem, right) that are right: Wilson's interval at the number of independent samples worth as much.

    That number is p (1 - p) over the linearised variance of the ratio, which comes from how much problems differ from each
    other: the number of problems where each has one sample, or equal ones as many; less where few of them hold most samples;
    never more than all samples. Where problems do not differ at all, it is their number. Of no samples, None.
    """
    if not samples:
        return {"n": 0, "problems": 0, "accuracy": None, "ci_low": None, "ci_high": None}
    groups: dict[str, list[bool]] = defaultdict(list)
    for problem, right in samples:
        groups[problem].append(right)
    n, m, p = len(samples), len(groups), statistics.fmean(right for _, right in samples)
    variance = sum((sum(group) - p * len(group)) ** 2 for group in groups.values()) / n**2
    worth = min(max(p * (1 - p) / variance, 1), n) if variance else m
    low, high = wilson(p * worth, worth)
    return {"n": n, "problems": m, "accuracy": p, "ci_low": low, "ci_high": high}


# ----------------------------------------------------------------------------------------------------------------- length


def measure(sample: Mapping[str, Any], unit: str) -> int:
    """How long a sample is: the words of its reasoning (of the whole text where it opens none), or all its tokens."""
    if unit == "tokens":
        return sample["length"]
    found = REASONING.search(sample["text"])
    return len((found[1] if found else sample["text"]).split())


def by_length(samples: Records, problems: Records, unit: str) -> list[dict[str, Any]]:
    """Accuracy by length: bins of a round width, the last one open. `gold`: the share of the problems' own solutions that
    fall into a bin, in words; None in tokens, or without solutions. A bin may hold solutions alone.

    Length and difficulty go together: a bin says which lengths are right, not which would be. See `within_problem`.
    """
    lengths = [measure(sample, unit) for sample in samples]
    gold = [len(problem["solution"].split()) for problem in problems if problem["solution"]] if unit == "words" else []
    if not lengths:
        return []
    most = sorted([*lengths, *gold])[int(0.98 * (len(lengths) + len(gold)))]
    width = next(w * 10**p for p in range(9) for w in (1, 2, 5) if most < BINS * w * 10**p)
    last = most // width

    def place(length: int) -> int:
        return min(length // width, last)

    found: dict[int, list[tuple[str, bool]]] = defaultdict(list)
    for sample, length in zip(samples, lengths, strict=True):
        found[place(length)].append((sample["problem"], sample["accuracy"]["tagged"]))
    of_gold = Counter(map(place, gold))
    return [
        {"low": i * width, "high": (i + 1) * width if i < last else max(*lengths, *gold, i * width) + 1}
        | proportion(found[i])
        | {"gold": of_gold[i] / len(gold) if gold else None}
        for i in sorted({*found, *of_gold})
    ]


def within_problem(samples: Records, unit: str) -> dict[str, Any]:
    """Right against wrong answers to the same problem, of one model at one step: mean length of the right ones minus that of
    the wrong ones, averaged over the problems that have both, with Student's interval over problems.

    Difficulty is the same on both sides, so this is what length itself has to do with being right. Temperature is not: hot
    samples are longer and more often wrong.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        groups[sample["problem"], sample.get("model"), sample.get("step")].append(sample)
    differences: dict[str, list[float]] = defaultdict(list)
    right = wrong = 0
    for (problem, *_), group in groups.items():
        sides = [[measure(s, unit) for s in group if s["accuracy"]["tagged"] == side] for side in (True, False)]
        if all(sides):
            differences[problem].append(statistics.fmean(sides[0]) - statistics.fmean(sides[1]))
            right, wrong = right + len(sides[0]), wrong + len(sides[1])
    each = [statistics.fmean(values) for values in differences.values()]
    low, high = mean_interval(each)
    mean = statistics.fmean(each) if each else None
    return {"problems": len(each), "right": right, "wrong": wrong, "difference": mean, "low": low, "high": high}


# -------------------------------------------------------------------------------------------------------------- consensus


def votes_of(samples: Records) -> dict[str, list[Mapping[str, Any]]]:
    """The samples of each problem that vote, in their order: all but number 0, which is greedy. Problems are in the order of
    their ids, so that the order of the lines changes nothing; one that has fewer votes than another, as after a kill, is left
    out.
    """
    votes: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample["sample"]):
        if sample["sample"] > 0:
            votes[sample["problem"]].append(sample)
    most = max(map(len, votes.values()), default=0)
    return {problem: group for problem, group in sorted(votes.items()) if len(group) == most}


def vote(samples: Records) -> tuple[str | None, bool]:
    """The answer that wins, and whether it is right."""
    winner = majority_vote([sample["answer"] for sample in samples], [sample["temperature"] for sample in samples])
    right = winner is not None and any(s["accuracy"]["tagged"] for s in samples if s["answer"] == winner)
    return winner, right


def gain_by_difficulty(samples: Records) -> list[dict[str, Any]]:
    """What a vote adds to a single sample, by how hard a problem is.

    Binned by the very samples that vote, problems that were unlucky would seem hard, and gain by regression to the mean. So a
    problem's votes are dealt into two halves, other ones from problem to problem: the smaller half says how hard it is
    (`low` to `high`: how many of it are right), the other half votes, and is compared with its own mean accuracy.
    """
    bins: dict[float, list[tuple[float, bool]]] = defaultdict(list)
    for number, dealt in enumerate(votes_of(samples).values()):
        n = len(dealt)
        if n < 3:
            continue
        order = [dealt[(number + i) % n] for i in range(n)]
        judges, voters = order[: n // 2], sorted(order[n // 2 :], key=lambda sample: sample["sample"])
        ease = statistics.fmean(sample["accuracy"]["tagged"] for sample in judges)
        bins[ease].append((statistics.fmean(sample["accuracy"]["tagged"] for sample in voters), vote(voters)[1]))
    joined: dict[tuple[float, float], list[tuple[float, bool]]] = defaultdict(list)
    for ease, pairs in bins.items():
        edge = min(int(ease * BINS), BINS - 1) / BINS
        joined[(ease, ease) if len(bins) <= BINS else (edge, edge + 1 / BINS)] += pairs
    found = []
    for (low, high), pairs in sorted(joined.items()):
        gains = [consensus - single for single, consensus in pairs]
        gain_low, gain_high = gain_interval(gains)
        single, consensus = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        found.append(
            {"low": low, "high": high, "n": len(pairs), "single": single, "consensus": consensus, "gain": consensus - single}
            | {"gain_low": gain_low, "gain_high": gain_high}
        )
    return found


def gain_by_model(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the vote adds to the greedy answer, for models by name, the weakest first. `results` are figures as an evaluation's
    result.json has them under `models`.

    An interval bounds a model's gain. That of a weak greedy figure is large in part because the figure was unlucky: the two
    share the greedy answers, which matters where n is small.
    """
    rows = []
    for name, figures in results.items():
        counts = figures["paired"]
        unchanged = counts["both_right"] + counts["both_wrong"]
        low, high = gain_interval([1.0] * counts["fixed"] + [-1.0] * counts["broke"] + [0.0] * unchanged)
        single, consensus = figures["greedy"]["tagged"], figures["consensus"]["tagged"]
        n = unchanged + counts["fixed"] + counts["broke"]
        rows.append(
            {"name": name, "n": n, "single": single, "consensus": consensus, "gain": consensus - single}
            | {"low": low, "high": high}
        )
    return sorted(rows, key=lambda row: row["single"])


def calibration(samples: Records) -> list[dict[str, Any]]:
    """How often the vote is right, by the share of samples that agree with it: a bin for each share, or ten bins of shares
    where there are more than ten.
    """
    voted = [(agreement([sample["answer"] for sample in group]), vote(group)[1]) for group in votes_of(samples).values()]
    shares = {share for share, _ in voted}
    bins: dict[tuple[float, float], list[tuple[float, bool]]] = defaultdict(list)
    for share, right in voted:
        edge = min(int(share * BINS), BINS - 1) / BINS
        bins[(share, share) if len(shares) <= BINS + 1 else (edge, edge + 1 / BINS)].append((share, right))
    found = []
    for (low, high), pairs in sorted(bins.items()):
        n, right = len(pairs), sum(right for _, right in pairs)
        ci_low, ci_high = wilson(right, n)
        found.append(
            {"low": low, "high": high, "n": n, "agreement": statistics.fmean(share for share, _ in pairs)}
            | {"accuracy": right / n, "ci_low": ci_low, "ci_high": ci_high}
        )
    return found


def calibration_error(bins: Records) -> float | None:
    """The expected calibration error of `calibration`'s bins: the mean distance of agreement and accuracy over problems.

    Never below 0, so chance alone makes it positive, the more so the fewer problems there are.
    """
    n = sum(found["n"] for found in bins)
    return sum(found["n"] * abs(found["agreement"] - found["accuracy"]) for found in bins) / n if n else None


def hard_cases(samples: Records, problems: Records) -> list[dict[str, Any]]:
    """The problems that no model solves, neither greedily nor by vote, with what each of them says. A problem of which some
    model's samples are missing is none of them.
    """
    models = sorted({sample["model"] for sample in samples})
    greedy = {(sample["model"], sample["problem"]): sample for sample in samples if sample["sample"] == 0}
    votes = {model: votes_of([sample for sample in samples if sample["model"] == model]) for model in models}
    cases = []
    for problem in problems:
        name = problem["id"]
        if not models or not all((model, name) in greedy and name in votes[model] for model in models):
            continue
        case = {key: problem[key] for key in ("id", "question", "answer", "solution")}
        solved = False
        for model in models:
            first, voters = greedy[model, name], votes[model][name]
            winner, right = vote(voters)
            solved |= right or first["accuracy"]["tagged"]
            counts = Counter(sample["answer"] for sample in voters)
            case[model] = {
                "greedy": first["answer"],
                "vote": winner,
                "votes": [{"answer": answer, "count": count} for answer, count in counts.most_common()],
                "texts": [sample["text"] for sample in (first, *voters)],
            }
        if not solved:
            cases.append(case)
    return cases


def of_lengths(samples: Records, problems: Records = ()) -> dict[str, Any]:
    """What length has to do with being right, in words of reasoning and in tokens."""
    found = {}
    for unit, suffix in (("words", ""), ("tokens", "_tokens")):
        found[f"by_length{suffix}"] = by_length(samples, problems, unit)
        found[f"within_problem{suffix}"] = within_problem(samples, unit)
    return found


def of_model(samples: Records, problems: Records) -> dict[str, Any]:
    """All of one model's samples in an evaluation."""
    bins = calibration(samples)
    agreed = {"calibration": bins, "calibration_error": calibration_error(bins)}
    return of_lengths(samples, problems) | agreed | {"gain_by_difficulty": gain_by_difficulty(samples)}


# --------------------------------------------------------------------------------------------------------------- training


def of_run(metrics: Records, evaluations: Records, completions: Records) -> dict[str, Any]:
    """All of a run. Its completions are those of a policy that changes: within a problem of a step it is one."""
    return {
        "format_against_accuracy": format_against_accuracy(metrics),
        "retention": retention(evaluations),
        **of_lengths(completions),
    }


def format_against_accuracy(metrics: Records, windows: int = 20) -> dict[str, list[Any]]:
    """Format rates beside accuracy over training, as means of up to `windows` windows of steps; `step` is a window's middle,
    `n` its steps. `low` and `high` bound the accuracy: Student's interval over the steps, None for a window of one.

    `well_formed` is the accuracy among well-formed completions: when format improves and it does not, the model has learned
    the form only.
    """
    names = {
        "reasoning": "format/reasoning",
        "answer": "format/answer",
        "strict": "format/strict",
        "accuracy": "accuracy",
        "accuracy_strict": "accuracy/strict",
    }
    metrics = [record for record in metrics if all(record.get(key) is not None for key in names.values())]
    width = max(-(-len(metrics) // windows), 1)
    found: dict[str, list[Any]] = {name: [] for name in ("step", "n", *names, "well_formed", "low", "high")}
    for start in range(0, len(metrics), width):
        window = metrics[start : start + width]
        means = {name: statistics.fmean(record[key] for record in window) for name, key in names.items()}
        low, high = mean_interval([record["accuracy"] for record in window])
        middle = statistics.fmean(record["step"] for record in window)
        means |= {"well_formed": means["accuracy_strict"] / means["strict"] if means["strict"] else None}
        if low is not None and high is not None:
            low, high = max(low, 0.0), min(high, 1.0)
        for name, value in ({"step": middle, "n": len(window), "low": low, "high": high} | means).items():
            found[name].append(value)
    return found


def retention(evaluations: Records) -> list[dict[str, Any]]:
    """Greedy accuracy on each session's own problems, after it and after every later one."""
    found: dict[str, dict[str, Any]] = {}
    for record in evaluations:
        for session, figures in record.get("retention", {}).items():
            row = found.setdefault(
                session, {"session": int(session), "steps": [], "n": [], "accuracy": [], "low": [], "high": []}
            )
            row["steps"].append(record["step"])
            row["accuracy"].append(figures["greedy"])
            for name in ("n", "low", "high"):
                row[name].append(figures[name])
    return sorted(found.values(), key=lambda row: row["session"])
