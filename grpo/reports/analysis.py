"""Statistics of the records of a run or of an evaluation, each with its n and a 95% interval.

Samples are the lines of an evaluation's samples.jsonl, or of a run's completions.jsonl. Unless stated otherwise they come from
one model. Answers to the same problem are not independent, so intervals are over problems, not over samples. Results are plain
lists and dicts that JSON can hold. Votes and the intervals of single proportions are in consensus.py, plots in plots.py.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from grpo.reports.consensus import Z, agreement, majority_vote, wilson

Records = Sequence[Mapping[str, Any]]

REASONING = re.compile(r"<reasoning>(.*?)(?:</reasoning>|<answer>|$)", re.DOTALL)
BINS = 10  # most bins of lengths and of difficulties; agreement has one more where each share has its own
FORMAT_METRICS = {
    "reasoning": "format/reasoning",
    "answer": "format/answer",
    "strict": "format/strict",
    "accuracy": "accuracy",
    "accuracy_strict": "accuracy/strict",
}


# -------------------------------------------------------------------------------------------------------------- intervals


def mean_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Student's 95% interval of the mean of independent values; (None, None) for fewer than two."""
    from scipy.special import stdtrit  # takes a while to import

    n = len(values)
    if n < 2:
        return None, None
    mean, spread = fmean(values), float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n)
    return mean - spread, mean + spread


def gain_interval(gains: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of differences of paired proportions, each from -1 to 1 (Agresti and Min 2005).

    Half a problem is added to each of the four outcomes, so the interval has a width even if nothing changes. For differences
    that are fractions, as of a vote and the mean of its voters, there are no such cells. It then is too wide rather than too
    narrow: simulated, it held the truth 97 to 100 times in 100, where Student's fell to 24 with few problems.
    """
    n = len(gains) + 2
    mean = math.fsum(gains) / n
    spread = Z * math.sqrt(((math.fsum(gain * gain for gain in gains) + 1) / n - mean**2) / n)
    return max(mean - spread, -1.0), min(mean + spread, 1.0)


def proportion(samples: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """The share of (problem, right) samples that are right, with Wilson's interval at the effective number of samples.

    That number is p (1 - p) over the linearised variance of the ratio, which is estimated from how much problems differ (with
    m - 1) and widened by Student's quantile. It is at least n^2 / sum of n_i^2, for problems whose n_i samples all agree: the
    number of problems if each has as many samples, less if a few problems have most of them. It is at most the number of
    samples. Where problems do not differ at all it is that least number. Without samples accuracy and interval are None.
    Simulated with 5, 10, 20, 100 problems of 4 samples whose rates are uniform, it holds the truth 98, 97, 95, 95 times in 100.
    """
    from scipy.special import stdtrit  # takes a while to import

    if not samples:
        return {"n": 0, "problems": 0, "accuracy": None, "ci_low": None, "ci_high": None}
    groups: dict[str, list[bool]] = defaultdict(list)
    for problem, right in samples:
        groups[problem].append(right)
    n, m, p = len(samples), len(groups), fmean(right for _, right in samples)
    variance = sum((sum(group) - p * len(group)) ** 2 for group in groups.values()) / n**2 * m / max(m - 1, 1)
    effective = n**2 / sum(len(group) ** 2 for group in groups.values())
    if variance:
        worth = p * (1 - p) / variance * (Z / float(stdtrit(m - 1, 0.975))) ** 2
        effective = min(max(worth, effective), n)
    low, high = wilson(p * effective, effective)
    return {"n": n, "problems": m, "accuracy": p, "ci_low": low, "ci_high": high}


# ----------------------------------------------------------------------------------------------------------------- length


def sample_length(sample: Mapping[str, Any], unit: str) -> int:
    """The length of a sample in `unit`: the words of its reasoning (of the whole text without a tag), or all its tokens."""
    if unit == "tokens":
        return sample["length"]
    reasoning = REASONING.search(sample["text"])
    return len((reasoning[1] if reasoning else sample["text"]).split())


def by_length(samples: Records, problems: Records, unit: str) -> list[dict[str, Any]]:
    """Accuracy by length, in bins of a round width of which the last one is open.

    `gold` is the share of the problems' own solutions whose length in words lies in the bin; it is None for tokens and without
    solutions. A bin may have solutions only.

    Length is confounded with difficulty: the bins do not tell which length would be right. See `within_problem`.
    """
    samples = [sample for sample in samples if sample["accuracy"]]  # of problems with a gold answer
    lengths = [sample_length(sample, unit) for sample in samples]
    gold = [len(problem["solution"].split()) for problem in problems if problem["solution"]] if unit == "words" else []
    if not lengths:
        return []
    most = sorted([*lengths, *gold])[int(0.98 * (len(lengths) + len(gold)))]
    width = next(w * 10**p for p in range(20) for w in (1, 2, 5) if most < BINS * w * 10**p)
    last = most // width

    def bin_of(length: int) -> int:
        return min(length // width, last)

    bins: dict[int, list[tuple[str, bool]]] = defaultdict(list)
    for sample, length in zip(samples, lengths, strict=True):
        bins[bin_of(length)].append((sample["problem"], sample["accuracy"]["tagged"]))
    solutions = Counter(map(bin_of, gold))
    return [
        {"low": i * width, "high": (i + 1) * width if i < last else max(*lengths, *gold, i * width) + 1}
        | proportion(bins[i])
        | {"gold": solutions[i] / len(gold) if gold else None}
        for i in sorted({*bins, *solutions})
    ]


def within_problem(samples: Records, unit: str) -> dict[str, Any]:
    """Mean length of right answers minus that of wrong answers to the same problem, with Student's interval over problems.

    Only problems with both, from one model at one step, count. This removes the effect of difficulty. It does not remove that
    of temperature: samples at a high temperature are longer and more often wrong.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        if sample["accuracy"]:
            groups[sample["problem"], sample.get("model"), sample.get("step")].append(sample)
    differences: dict[str, list[float]] = defaultdict(list)
    n_right = n_wrong = 0
    for (problem, *_), group in groups.items():
        right, wrong = (
            [sample_length(sample, unit) for sample in group if sample["accuracy"]["tagged"] == side] for side in (True, False)
        )
        if right and wrong:
            differences[problem].append(fmean(right) - fmean(wrong))
            n_right, n_wrong = n_right + len(right), n_wrong + len(wrong)
    of_problems = [fmean(values) for values in differences.values()]
    low, high = mean_interval(of_problems)
    return {
        "problems": len(of_problems),
        "right": n_right,
        "wrong": n_wrong,
        "difference": fmean(of_problems) if of_problems else None,
        "low": low,
        "high": high,
    }


# -------------------------------------------------------------------------------------------------------------- consensus


def votes_of(samples: Records) -> dict[str, list[Mapping[str, Any]]]:
    """The samples of each problem that vote, in order: all but number 0, which is greedy.

    Problems are sorted by id, so the order of the lines does not matter. A problem with fewer votes than others, as after a
    kill, is left out.
    """
    votes: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample["sample"]):
        if sample["sample"] > 0:
            votes[sample["problem"]].append(sample)
    most = max(map(len, votes.values()), default=0)
    return {problem: group for problem, group in sorted(votes.items()) if len(group) == most}


def vote(samples: Records) -> tuple[str | None, bool]:
    """(answer, right): the answer that wins, and whether it is right."""
    winner = majority_vote([sample["answer"] for sample in samples], [sample["temperature"] for sample in samples])
    right = winner is not None and any(s["accuracy"]["tagged"] for s in samples if s["answer"] == winner)
    return winner, right


def gain_by_difficulty(samples: Records) -> list[dict[str, Any]]:
    """Accuracy of the vote minus that of a single sample, by the difficulty of the problem.

    If the samples that vote also measured the difficulty, unlucky problems would seem hard and gain by regression to the mean.
    So the votes of a problem are split into two halves, in a way that rotates from problem to problem. The smaller half
    measures the difficulty (a share of `low` to `high` of it is right). The other half votes and is compared with its own mean
    accuracy.
    """
    bins: dict[float, list[tuple[float, bool]]] = defaultdict(list)
    for number, group in enumerate(votes_of(samples).values()):
        n = len(group)
        if n < 3:
            continue
        order = [group[(number + i) % n] for i in range(n)]
        measuring, voting = order[: n // 2], sorted(order[n // 2 :], key=lambda sample: sample["sample"])
        share = fmean(sample["accuracy"]["tagged"] for sample in measuring)
        bins[share].append((fmean(sample["accuracy"]["tagged"] for sample in voting), vote(voting)[1]))
    merged: dict[tuple[float, float], list[tuple[float, bool]]] = defaultdict(list)
    for share, pairs in bins.items():
        merged[bin_edges(share, exact=len(bins) <= BINS)] += pairs
    return [{"low": low, "high": high} | mean_gain(pairs) for (low, high), pairs in sorted(merged.items())]


def bin_edges(share: float, exact: bool) -> tuple[float, float]:
    """(low, high) of the bin of a share: the share itself if `exact`, else its tenth."""
    low = min(int(share * BINS), BINS - 1) / BINS
    return (share, share) if exact else (low, low + 1 / BINS)


def mean_gain(pairs: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """The mean gain of (accuracy of a single sample, vote is right) of problems."""
    single, consensus = (fmean(values) for values in zip(*pairs, strict=True))
    low, high = gain_interval([voted - alone for alone, voted in pairs])
    gain = {"gain": consensus - single, "gain_low": low, "gain_high": high}
    return {"n": len(pairs), "single": single, "consensus": consensus} | gain


def gain_by_model(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy of the vote minus that of the greedy answer, for models by name, the weakest model first.

    `results` are figures as an evaluation's result.json has them under `models`. Gain and greedy accuracy share the greedy
    answers: if n is small, an unlucky greedy accuracy looks like a large gain.
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
    """How often the vote is right, by the share of samples that agree with it.

    Each share has its own bin, unless there are more than eleven shares (0 to 10 of 10 votes): then the bins are tenths.
    """
    voted = [(agreement([sample["answer"] for sample in group]), vote(group)[1]) for group in votes_of(samples).values()]
    exact = len({share for share, _ in voted}) <= BINS + 1
    bins: dict[tuple[float, float], list[tuple[float, bool]]] = defaultdict(list)
    for share, right in voted:
        bins[bin_edges(share, exact)].append((share, right))
    rows = []
    for (low, high), pairs in sorted(bins.items()):
        n, right = len(pairs), sum(right for _, right in pairs)
        ci_low, ci_high = wilson(right, n)
        rows.append(
            {"low": low, "high": high, "n": n, "agreement": fmean(share for share, _ in pairs)}
            | {"accuracy": right / n, "ci_low": ci_low, "ci_high": ci_high}
        )
    return rows


def calibration_error(bins: Records) -> float | None:
    """Expected calibration error of the bins of `calibration`: mean distance of agreement and accuracy over problems.

    It is never below 0, so it is biased upwards, the more so the fewer problems there are. None without problems.
    """
    n = sum(row["n"] for row in bins)
    return sum(row["n"] * abs(row["agreement"] - row["accuracy"]) for row in bins) / n if n else None


def hard_cases(samples: Records, problems: Records) -> list[dict[str, Any]]:
    """The problems that no model solves, neither greedily nor by vote, with the answers of each model.

    `samples` are those of all models. A problem that lacks samples of some model is left out.
    """
    models = sorted({sample["model"] for sample in samples})
    greedy = {(sample["model"], sample["problem"]): sample for sample in samples if sample["sample"] == 0}
    votes = {model: votes_of([sample for sample in samples if sample["model"] == model]) for model in models}
    cases = []
    for problem in problems:
        id = problem["id"]
        if not models or not all((model, id) in greedy and id in votes[model] for model in models):
            continue
        attempts = {model: (greedy[model, id], votes[model][id]) for model in models}
        if not any(first["accuracy"].get("tagged") or vote(voters)[1] for first, voters in attempts.values()):
            case = {key: problem[key] for key in ("id", "question", "answer", "solution")}
            cases.append(case | {model: answers_of(*samples) for model, samples in attempts.items()})
    return cases


def answers_of(greedy: Mapping[str, Any], voters: Records) -> dict[str, Any]:
    """One model's answers to a problem: greedy, by vote, and how many samples vote for each."""
    counts = Counter(sample["answer"] for sample in voters)
    return {
        "greedy": greedy["answer"],
        "vote": vote(voters)[0],
        "votes": [{"answer": answer, "count": count} for answer, count in counts.most_common()],
        "texts": [sample["text"] for sample in (greedy, *voters)],
    }


def analyse_lengths(samples: Records, problems: Records = ()) -> dict[str, Any]:
    """How length relates to accuracy, in words of reasoning and in tokens."""
    return {
        "by_length": by_length(samples, problems, "words"),
        "within_problem": within_problem(samples, "words"),
        "by_length_tokens": by_length(samples, problems, "tokens"),
        "within_problem_tokens": within_problem(samples, "tokens"),
    }


def analyse_model(samples: Records, problems: Records) -> dict[str, Any]:
    """All analyses of one model's samples in an evaluation."""
    bins = calibration(samples)
    agreed = {"calibration": bins, "calibration_error": calibration_error(bins)}
    return analyse_lengths(samples, problems) | agreed | {"gain_by_difficulty": gain_by_difficulty(samples)}


# --------------------------------------------------------------------------------------------------------------- training


def analyse_run(metrics: Records, evaluations: Records, completions: Records) -> dict[str, Any]:
    """All analyses of a run. Its policy changes from step to step; `within_problem` compares answers of one step only."""
    return {
        "format_against_accuracy": format_against_accuracy(metrics),
        "retention": retention(evaluations),
        **analyse_lengths(completions),
    }


def format_against_accuracy(metrics: Records, windows: int = 20) -> dict[str, list[Any]]:
    """Format rates and accuracy over training, as means over at most `windows` windows of steps.

    `step` is the middle of a window, `n` its number of steps. `low` and `high` bound the accuracy: Student's interval over the
    steps, None for a window of one step. `well_formed` is the accuracy among well-formed completions: if the format improves
    and this does not, the model has learned only the format.
    """
    complete = [record for record in metrics if all(record.get(key) is not None for key in FORMAT_METRICS.values())]
    width = max(-(-len(complete) // windows), 1)
    columns: dict[str, list[Any]] = {name: [] for name in ("step", "n", *FORMAT_METRICS, "well_formed", "low", "high")}
    for start in range(0, len(complete), width):
        window = complete[start : start + width]
        means = {name: fmean(record[key] for record in window) for name, key in FORMAT_METRICS.items()}
        low, high = mean_interval([record["accuracy"] for record in window])
        if low is not None and high is not None:
            low, high = max(low, 0.0), min(high, 1.0)
        row = means | {
            "step": fmean(record["step"] for record in window),
            "n": len(window),
            "well_formed": means["accuracy_strict"] / means["strict"] if means["strict"] else None,
            "low": low,
            "high": high,
        }
        for name, value in row.items():
            columns[name].append(value)
    return columns


def retention(evaluations: Records) -> list[dict[str, Any]]:
    """Greedy accuracy on the problems of each session, after it and after every later one."""
    rows: dict[str, dict[str, Any]] = {}
    for record in evaluations:
        for session, figures in record.get("retention", {}).items():
            empty = {"session": int(session), "steps": [], "n": [], "accuracy": [], "low": [], "high": []}
            row = rows.setdefault(session, empty)
            row["steps"].append(record["step"])
            row["accuracy"].append(figures["greedy"])
            for name in ("n", "low", "high"):
                row[name].append(figures[name])
    return sorted(rows.values(), key=lambda row: row["session"])
