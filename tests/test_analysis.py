"""The analyses of records, on records made by hand whose figures are known."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from grpo.reports.analysis import (
    by_length,
    calibration,
    calibration_error,
    format_against_accuracy,
    gain_by_difficulty,
    gain_by_model,
    gain_interval,
    hard_cases,
    mean_interval,
    proportion,
    retention,
    sample_length,
    within_problem,
)
from grpo.reports.consensus import wilson

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def sample(problem: str, number: int, answer: str | None, gold: str, words: int = 3, length: int = 9, **more) -> dict:
    text = f"<reasoning>{'w ' * words}</reasoning><answer>{answer}</answer>"
    return {
        "problem": problem, "sample": number, "temperature": TEMPERATURES[number], "text": text, "length": length,
        "answer": answer, "accuracy": {"tagged": answer == gold}, **more,
    }  # fmt: skip


def answered(problem: str, answers: str, gold: str = "1", **more) -> list[dict]:
    """Samples 0 (greedy), 1, ... of a problem; `-` abstains."""
    return [sample(problem, i, None if a == "-" else a, gold, **more) for i, a in enumerate(answers)]


def problem(name: str, words: int = 0) -> dict:
    return {"id": name, "question": f"{name}?", "answer": "1", "solution": "w " * words}


# -------------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("df", "value"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (10**5, 1.9600)]
)
def test_the_interval_of_a_mean_is_students(df, value):
    """Its half width over the standard error is the quantile that every textbook tabulates."""
    values = [float(i % 7) for i in range(df + 1)]
    low, high = mean_interval(values)
    assert low is not None and high is not None
    assert (high - low) / 2 / (np.std(values, ddof=1) / math.sqrt(df + 1)) == pytest.approx(value, abs=6e-5)


def test_the_interval_of_a_mean():
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert low is not None and high is not None
    assert (low + high) / 2 == pytest.approx(3.5)
    assert high - 3.5 == pytest.approx(2.571 * math.sqrt(3.5 / 6), rel=1e-3)
    assert mean_interval([4.0]) == mean_interval([]) == (None, None)


def test_the_interval_of_a_gain_is_agresti_and_mins():
    """As for a table of 12 fixed, 5 broken, 83 unchanged, each cell raised by a half; it has a width where nothing changes."""
    low, high = gain_interval([1.0] * 12 + [-1.0] * 5 + [0.0] * 83)
    n, b, c = 102, 12.5, 5.5
    spread = NormalDist().inv_cdf(0.975) * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    assert (low, high) == pytest.approx(((b - c) / n - spread, (b - c) / n + spread))
    low, high = gain_interval([0.0] * 50)
    assert low == -high < -0.01


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_interval_of_a_gain_holds_the_truth_as_often_as_it_says(rate):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        outcomes = rng.choice([1.0, -1.0, 0.0], 40, p=[rate, rate / 2, 1 - 1.5 * rate])
        low, high = gain_interval(outcomes.tolist())
        held += low <= rate / 2 <= high
    assert 0.92 <= held / 1000 <= 0.99


def test_a_proportion_counts_problems_where_samples_agree_and_samples_elsewhere():
    alone = proportion([(str(i), i < 30) for i in range(100)])
    assert (alone["n"], alone["problems"], alone["accuracy"]) == (100, 100, 0.3)
    assert (alone["ci_low"], alone["ci_high"]) == pytest.approx(wilson(30, 100))
    copies = proportion([(str(i), i < 30) for i in range(100) for _ in range(8)])
    assert (copies["ci_low"], copies["ci_high"]) == pytest.approx(wilson(30, 100))
    mixed = proportion([(str(i), j < 2) for i in range(100) for j in range(8)])  # every problem has two of eight right
    assert (mixed["ci_low"], mixed["ci_high"]) == pytest.approx(wilson(25, 100))  # no spread seen: no more than the problems
    spread = proportion([(str(i), (i * 8 + j) * 7919 % 800 < 200) for i in range(100) for j in range(8)])
    assert wilson(25, 100)[0] < spread["ci_low"] <= wilson(200, 800)[0]
    sure = proportion([("a", True), ("a", True), ("b", True)])
    assert (sure["ci_low"], sure["ci_high"]) == pytest.approx(wilson(9 / 5, 9 / 5))  # of 2 and 1 samples


def test_a_proportion_of_uneven_problems_is_worth_less_than_their_number():
    """One problem of fifty wrong samples beside 49 of one right sample each: half of what is known is one problem's luck."""
    samples = [("a", False)] * 50 + [(str(i), True) for i in range(49)]
    p, worth = 49 / 99, 99**2 / (50**2 + 49)  # were the 50 one sample, repeated
    found = proportion(samples)
    assert 3.5 < worth < 4 and (found["ci_low"], found["ci_high"]) == pytest.approx(wilson(p * worth, worth))
    assert found["ci_high"] - found["ci_low"] > 0.6


def test_what_a_sample_is_worth_by_hand():
    """Five problems of 40 samples, 20, 24, 16, 28 and 12 of them right: between the problems and the samples."""
    rights = (20, 24, 16, 28, 12)
    found = proportion([(str(i), j < right) for i, right in enumerate(rights) for j in range(40)])
    variance = (0 + 16 + 16 + 64 + 64) / 200**2 * 5 / 4
    worth = 0.25 / variance * (1.959964 / 2.776445) ** 2
    assert 5 < worth < 30 and (found["ci_low"], found["ci_high"]) == pytest.approx(wilson(0.5 * worth, worth), rel=1e-6)


RATES = {
    "uniform": lambda rng, m: rng.random(m),
    "alike": lambda rng, m: np.full(m, 0.5),
    "easy": lambda rng, m: rng.beta(4, 1, m),
}


def coverage(m: int, rates: str, runs: int) -> float:
    """How often the interval of `proportion` holds the truth, for m problems of 4 samples each."""
    rng, truth, held = np.random.default_rng(m), {"uniform": 0.5, "alike": 0.5, "easy": 0.8}[rates], 0
    for _ in range(runs):
        right = rng.random((m, 4)) < RATES[rates](rng, m)[:, None]
        found = proportion([(str(i), bool(one)) for i, row in enumerate(right) for one in row])
        held += found["ci_low"] <= truth <= found["ci_high"]
    return held / runs


@pytest.mark.parametrize(("m", "runs"), [(5, 600), (10, 600), (20, 300)])
def test_the_interval_of_a_proportion_holds_the_truth_also_with_few_problems(m, runs):
    """Without the m / (m - 1) and Student's quantile: .91, .93, .94."""
    assert coverage(m, "uniform", runs) > 0.95 - 2 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.long
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("m", [2, 3, 5, 10, 20, 50])
def test_the_interval_of_a_proportion_holds_the_truth_in_many_simulations(m, rates):
    runs = 8000
    assert coverage(m, rates, runs) > 0.95 - 4 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("rate", [0.5, 0.95])
def test_the_interval_of_a_gain_of_fractions_is_not_too_narrow(rate):
    """A vote of three against the mean of its voters; wrong voters never agree, so two right ones win."""
    truth = 3 * rate**2 - 2 * rate**3 - rate
    for n in (3, 10, 40):
        rng, held = np.random.default_rng(n), 0
        for _ in range(400):
            right = (rng.random((n, 3)) < rate).sum(axis=1)
            low, high = gain_interval(((right > 1) - right / 3).tolist())
            held += low <= truth <= high
        assert held / 400 >= 0.95


# ----------------------------------------------------------------------------------------------------------------- length


def test_words_are_those_of_the_reasoning():
    assert sample_length({"text": "<reasoning>a b  c\nd</reasoning><answer>9</answer>"}, "words") == 4
    assert sample_length({"text": "<reasoning>a b<answer>9</answer>"}, "words") == 2
    assert sample_length({"text": "<reasoning>a b c"}, "words") == 3
    assert sample_length({"text": "It is nine."}, "words") == 3
    assert sample_length({"text": "", "length": 7}, "tokens") == 7


def test_accuracy_by_length():
    """Two short samples of one problem wrong, three of other problems right; one giant in the last, open bin."""
    samples = [sample("a", 1, "2", "1", words=3), sample("a", 2, "2", "1", words=4)]
    samples += [sample(name, 1, "1", "1", words=words, length=70) for name, words in (("b", 12), ("c", 14), ("d", 31))]
    samples += [sample(f"e{i}", 1, "1", "1", words=22) for i in range(100)] + [sample("f", 1, "2", "1", words=500)]
    problems = [problem("a", 13), problem("b", 22), problem("c", 24), problem("d", 90), problem("e")]
    problems += [problem("g", 7)]
    bins = by_length(samples, problems, "words")
    assert [(b["low"], b["high"], b["n"], b["problems"], b["accuracy"], b["gold"]) for b in bins] == [
        (0, 5, 2, 1, 0.0, 0.0), (5, 10, 0, 0, None, 0.2), (10, 15, 2, 2, 1.0, 0.2), (20, 25, 100, 100, 1.0, 0.4),
        (30, 501, 2, 2, 0.5, 0.2),
    ]  # fmt: skip
    assert (bins[2]["ci_low"], bins[2]["ci_high"]) == wilson(2, 2)
    tokens = by_length(samples, problems, "tokens")
    assert [(b["low"], b["high"], b["n"], b["gold"]) for b in tokens] == [(0, 10, 103, None), (70, 71, 3, None)]
    assert by_length([], problems, "words") == []
    assert {b["gold"] for b in by_length(samples, [problem("a")], "words")} == {None}


def test_right_against_wrong_answers_to_the_same_problem():
    """Differences of 4, 6 and 2 words. Problems that are all right or all wrong, another step, another model do not count."""
    samples = []
    for name, right, wrong in (("a", (9, 11), (6,)), ("b", (8,), (1, 3)), ("c", (5,), (3,))):
        samples += [sample(name, 1, "1", "1", words=words, step=1) for words in right]
        samples += [sample(name, 2, "2", "1", words=words, step=1) for words in wrong]
    samples += [sample("d", 1, "1", "1", words=50, step=1), sample("d", 2, "2", "1", words=1, step=2)]
    found = within_problem(samples, "words")
    assert (found["problems"], found["right"], found["wrong"]) == (3, 4, 4)
    assert found["difference"] == pytest.approx(4) and (found["low"], found["high"]) == mean_interval([4, 6, 2])
    again = samples + [dict(s, step=3) for s in samples if s["problem"] == "a"]  # one problem twice is still one
    assert within_problem(again, "words")["problems"] == 3 and within_problem(again, "words")["low"] == found["low"]
    nothing = {"problems": 0, "right": 0, "wrong": 0, "difference": None, "low": None, "high": None}
    assert within_problem(samples[-2:], "words") == nothing


# -------------------------------------------------------------------------------------------------------------- consensus


def test_gain_by_difficulty():
    """Number 0 votes nowhere. Of five votes two judge, beginning with another one in each problem; the other three vote."""
    samples = answered("a", "211112") + answered("b", "122111") + answered("c", "122222") + answered("d", "11")
    bins = gain_by_difficulty(samples)
    # a: 1 and 2 judge (11), 1 1 2 vote; b: 2 and 3 judge (21), 2 1 1 vote; c: 3 and 4 judge (22), 2 2 2 vote; d has one vote
    assert [(b["low"], b["high"], b["n"], b["consensus"]) for b in bins] == [(0, 0, 1, 0), (0.5, 0.5, 1, 1), (1, 1, 1, 1)]
    assert [b["single"] for b in bins] == pytest.approx([0, 2 / 3, 2 / 3])
    assert [b["gain"] for b in bins] == pytest.approx([0, 1 / 3, 1 / 3])
    assert (bins[1]["gain_low"], bins[1]["gain_high"]) == pytest.approx(gain_interval([1 / 3]))


def test_samples_in_any_order_give_the_same_figures():
    rng = np.random.default_rng(0)
    samples = [one for i in range(30) for one in answered(str(i), "".join(rng.choice(list("12-"), 6)), model="base")]
    shuffled = [samples[i] for i in rng.permutation(len(samples))]
    problems = [problem(str(i)) for i in range(30)]
    for figures in (gain_by_difficulty, calibration, lambda records: hard_cases(records, problems)):
        assert figures(shuffled) == figures(samples) != []


def test_a_problem_with_missing_samples_is_left_out():
    """After a kill: a hot sample is not taken for the greedy one, and a vote of four not for one of five."""
    whole = answered("a", "222233", model="base") + answered("b", "222233", model="base")
    for lost in (0, 5):
        samples = [one for one in whole if (one["problem"], one["sample"]) != ("b", lost)]
        assert [case["id"] for case in hard_cases(samples, [problem("a"), problem("b")])] == ["a"]
        votes = 2 if lost == 0 else 1  # the greedy one does not vote
        assert sum(found["n"] for found in calibration(samples)) == votes
        assert sum(found["n"] for found in gain_by_difficulty(samples)) == votes


def test_gain_by_difficulty_sees_no_regression_to_the_mean():
    """Every problem is equally hard and wrong answers never agree: whatever the judges say, the gain is the same."""
    rng = np.random.default_rng(0)
    right = rng.random((6000, 5)) < 0.5
    samples = []
    for i, row in enumerate(right):
        samples += answered(str(i), ["2", *("1" if r else f"wrong {j}" for j, r in enumerate(row))])  # type: ignore[arg-type]
    bins = gain_by_difficulty(samples)
    assert sum(b["n"] for b in bins) == 6000
    assert [b["single"] for b in bins] == pytest.approx([0.5] * 3, abs=0.03)
    gains = [b["gain"] for b in bins]
    assert max(gains) - min(gains) < 0.04
    assert all(b["gain_low"] < b["gain"] < b["gain_high"] for b in bins)


def test_gain_by_model():
    def figures(fixed: int, broke: int, both_right: int, both_wrong: int) -> dict:
        n = fixed + broke + both_right + both_wrong
        paired = {"fixed": fixed, "broke": broke, "both_right": both_right, "both_wrong": both_wrong}
        return {
            "greedy": {"tagged": (broke + both_right) / n},
            "consensus": {"tagged": (fixed + both_right) / n},
            "paired": paired,
        }

    strong, weak = gain_by_model({"strong": figures(1, 2, 90, 7), "weak": figures(20, 5, 30, 45)})[::-1]
    assert (weak["name"], weak["n"], weak["single"], weak["consensus"]) == ("weak", 100, 0.35, 0.5)
    assert weak["gain"] == pytest.approx(0.15)
    assert (weak["low"], weak["high"]) == gain_interval([1.0] * 20 + [-1.0] * 5 + [0.0] * 75)
    assert strong["low"] < 0 < strong["high"] and strong["gain"] == pytest.approx(-0.01)


def test_agreement_as_confidence():
    """Shares 1 (right), 0.6 (right), 0.6 (wrong), 0 (nothing to vote on)."""
    samples = answered("a", "211111") + answered("b", "22-111") + answered("c", "1222-1") + answered("d", "1-----")
    bins = calibration(samples)
    assert [(b["low"], b["n"], b["accuracy"]) for b in bins] == [(0, 1, 0), (0.6, 2, 0.5), (1, 1, 1)]
    assert [b["agreement"] for b in bins] == pytest.approx([0, 0.6, 1])
    assert (bins[1]["ci_low"], bins[1]["ci_high"]) == wilson(1, 2)
    assert calibration_error(bins) == pytest.approx((0 + 2 * 0.1 + 0) / 4)
    assert calibration_error(calibration([])) is None


def test_many_shares_of_agreement_are_ten_bins():
    samples = [
        dict(sample(str(k), 1, "1" if j < k else f"other {j}", "1"), sample=j + 1) for k in range(1, 31) for j in range(30)
    ]
    bins = calibration(samples)
    assert [round(10 * b["low"]) for b in bins] == list(range(10)) and sum(b["n"] for b in bins) == 30
    assert bins[-1]["high"] == 1 and bins[-1]["agreement"] == pytest.approx(np.mean([27, 28, 29, 30]) / 30)


def test_hard_cases_are_those_that_nobody_solves():
    base = answered("a", "222333", model="base") + answered("b", "222222", model="base") + answered("c", "2-2222", model="base")
    trained = answered("a", "2-4444", model="trained") + answered("b", "211122", model="trained")
    problems = [problem("a", 4), problem("b"), problem("c"), problem("d")]
    (case,) = hard_cases(base[::-1] + trained, problems)
    assert (case["id"], case["question"], case["answer"], case["solution"]) == ("a", "a?", "1", "w w w w ")
    assert case["base"]["votes"] == [{"answer": "3", "count": 3}, {"answer": "2", "count": 2}]
    assert (case["base"]["greedy"], case["base"]["vote"]) == ("2", "3")
    assert case["trained"]["votes"] == [{"answer": "4", "count": 4}, {"answer": None, "count": 1}]
    assert case["trained"]["texts"] == [s["text"] for s in trained[:6]]
    assert [case["id"] for case in hard_cases(base, problems)] == ["a", "b", "c"]  # of base alone; d was not asked
    assert hard_cases(answered("a", "1222", model="base"), problems) == []  # greedily right


# --------------------------------------------------------------------------------------------------------------- training


def test_format_beside_accuracy():
    metrics = [
        {
            "step": step, "format/reasoning": 1.0, "format/answer": 0.5, "format/strict": 0.5, "accuracy": step / 100,
            "accuracy/strict": step / 200,
        }
        for step in range(1, 51)
    ]  # fmt: skip
    found = format_against_accuracy(metrics, windows=20)
    assert found["n"] == [3] * 16 + [2] and found["step"][:2] == [2, 5] and found["step"][-1] == 49.5
    assert found["accuracy"][:2] == pytest.approx([0.02, 0.05]) and found["well_formed"][1] == pytest.approx(0.05)
    assert (found["low"][1], found["high"][1]) == mean_interval([0.04, 0.05, 0.06])
    assert set(found["reasoning"]) == {1.0} and set(found["answer"]) == set(found["strict"]) == {0.5}
    few = format_against_accuracy([metrics[0] | {"format/strict": 0.0}])
    assert (few["low"], few["high"], few["well_formed"]) == ([None], [None], [None])
    assert format_against_accuracy([])["step"] == []


def test_retention_is_each_sessions_own_curve():
    def figures(greedy: float) -> dict:
        return {"n": 20, "greedy": greedy, "low": greedy - 0.1, "high": greedy + 0.1, "greedy_format": 1.0}

    evaluations = [
        {"step": 0, "accuracy": figures(0.2)},
        {"step": 5, "retention": {"1": figures(0.6)}},
        {"step": 9, "retention": {"1": figures(0.5), "2": figures(0.7)}},
    ]
    assert retention(evaluations) == [
        {"session": 1, "steps": [5, 9], "n": [20, 20], "accuracy": [0.6, 0.5], "low": [0.5, 0.4], "high": [0.7, 0.6]},
        {"session": 2, "steps": [9], "n": [20], "accuracy": [0.7], "low": [pytest.approx(0.6)], "high": [pytest.approx(0.8)]},
    ]
