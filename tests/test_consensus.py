"""Laws of grpo/reports/consensus.py, checked against scipy, closed forms, and all subsets."""

import random
import time
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
from scipy import stats

from grpo.reports.consensus import (
    agreement,
    canonical,
    maj_at_k,
    majority_vote,
    mcnemar,
    model_figures,
    paired,
    pass_at_k,
    wilson,
)
from grpo.reward import extract_answer, parse_gold

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)


# ------------------------------------------------------------------------------------------------------------------- votes


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("018.50", "18.5"),
        ("-0.0", "0"),
        ("+7", "7"),
        ("1200", "1200"),
        ("0.10", "0.1"),
        ("-3.0", "-3"),
    ],
)
def test_equal_numbers_have_one_canonical_form(number, text):
    assert canonical(Decimal(number)) == canonical(number) == text
    assert Decimal(canonical(number) or "") == Decimal(number)


def test_no_digit_is_lost_in_the_canonical_form():
    long = "123456789012345.123456789012345"  # the longest numeral that the parser takes: 30 digits, Decimal's default has 28
    assert canonical(extract_answer(f"<answer>{long}</answer>")) == long


def test_the_vote_counts_numbers_not_spellings():
    answers = [canonical(extract_answer(f"<answer>{text}</answer>")) for text in ("20", "18.0", "20", "$18", "18 pens")]
    assert majority_vote(answers, TEMPERATURES) == canonical(parse_gold("18"))


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2", "3", "2"], "2"),
        (["1", "2", "2", "1", "3"], "1"),  # two each: "1" was sampled at 0.2
        (["3", "2", "1", "1", "2"], "2"),  # "2" at 0.4, "1" at 0.6; "3" at 0.2 has one vote only
        ([None, "4", None, None, None], "4"),
        ([None] * 5, None),
        ([None, None, "7", "5", None], "7"),
    ],
)
def test_most_votes_win_and_ties_go_to_the_lowest_temperature(answers, winner):
    assert majority_vote(answers, TEMPERATURES) == winner
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):  # whatever the order in which the samples come
        assert majority_vote([answers[i] for i in order], [TEMPERATURES[i] for i in order]) == winner


def test_at_one_temperature_a_tie_goes_to_the_first_sample():
    assert majority_vote(["2", "1", "1", "2"], [0.7] * 4) == "2"


def test_agreement_counts_abstentions():
    assert agreement(["1", "1", "2", None, None]) == 2 / 5
    assert agreement([None, None]) == 0
    assert agreement(["1", "1"]) == 1


# ------------------------------------------------------------------------------------------------------------------ curves


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_unbiased():
    """Its mean over the number right of n is 1 - (1 - p)^k, exactly."""
    p, n = Fraction(3, 10), 7
    for k in range(1, n + 1):
        chances = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        assert sum(float(chance) * pass_at_k(n, c, k) for c, chance in enumerate(chances)) == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize("seed", range(40))
def test_maj_at_k_is_the_share_of_subsets_whose_vote_is_right(seed):
    """Every subset of up to nine samples, with abstentions, ties and temperatures that repeat."""
    rng = random.Random(seed)
    n = rng.randint(1, 9)
    answers = [rng.choice(["18", "20", "5", "7", None][: rng.randint(1, 5)]) for _ in range(n)]
    temperatures = [rng.choice(TEMPERATURES) for _ in range(n)]
    curve = maj_at_k(answers, temperatures, "18")
    assert len(curve) == n
    for k in range(1, n + 1):
        votes = [majority_vote([answers[i] for i in s], [temperatures[i] for i in s]) for s in combinations(range(n), k)]
        assert curve[k - 1] == pytest.approx(votes.count("18") / len(votes), abs=1e-15)


@pytest.mark.parametrize("wrong", [64, 7, 2])
def test_maj_at_k_of_many_voters_takes_milliseconds(wrong):
    """Of 128 voters half are right, and the others give `wrong` different answers; an evaluation has thousands of problems."""
    temperatures = [i / 128 for i in range(128)]
    answers = [str(-1 - i // 2 % wrong) if i % 2 else "18" for i in range(128)]
    start = time.process_time()
    curve = maj_at_k(answers, temperatures, "18")
    assert time.process_time() - start < 0.2
    assert curve[0] == 1 / 2 and curve[-1] == 1


def test_maj_at_k_of_the_usual_five_voters_takes_less_than_a_millisecond():
    start = time.process_time()
    for _ in range(100):
        maj_at_k(["18", "20", "18", None, "7"], TEMPERATURES, "18")
    assert time.process_time() - start < 0.1


def test_maj_at_k_of_many_voters_has_its_closed_form():
    """Of 40 voters 25 are right, 15 agree on a wrong answer. Right ones win ties, so j of k win if 2 j >= k."""
    answers, temperatures = ["18"] * 25 + ["20"] * 15, [0.2] * 25 + [1.0] * 15
    for k, share in enumerate(maj_at_k(answers, temperatures, "18"), start=1):
        wins = sum(comb(25, j) * comb(15, k - j) for j in range(-(-k // 2), k + 1))
        assert share == float(Fraction(wins, comb(40, k)))


def test_curves_begin_with_the_accuracy_and_end_with_the_vote():
    answers = ["18", "20", "18", None, "18"]
    assert maj_at_k(answers, TEMPERATURES, "18")[0] == pass_at_k(5, 3, 1) == pytest.approx(3 / 5)  # one sample: its accuracy
    assert maj_at_k(answers, TEMPERATURES, "18")[-1] == 1  # all of them: the vote itself
    assert maj_at_k(answers, TEMPERATURES, "5") == [0] * 5


# --------------------------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_a_proportion_is_wilsons():
    """The two p at which (p - share)^2 = z^2 p (1 - p) / n; never below 0 nor above 1."""
    z = stats.norm.ppf(0.975)
    for right, n in ((0, 7), (7, 7), (3, 7), (60, 100), (1, 1), (2.5, 6.25)):
        for p in wilson(right, n):
            assert 0 <= p <= 1
            assert (p - right / n) ** 2 == pytest.approx(z**2 * p * (1 - p) / n, abs=1e-12)
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (18, 40), (920, 1319), (1, 1000)])
def test_wilson_agrees_with_scipy(right, n):
    interval = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize(("fixed", "broke"), [(0, 0), (0, 1), (1, 0), (3, 3), (21, 14), (0, 40), (700, 619), (9, 2)])
def test_mcnemar_is_the_exact_binomial_test(fixed, broke):
    """Twice the smaller tail of n coin tosses, summed in exact integers."""
    n = fixed + broke
    tail = Fraction(sum(comb(n, i) for i in range(min(fixed, broke) + 1)), 2**n)
    assert mcnemar(fixed, broke) == mcnemar(broke, fixed) == pytest.approx(float(min(2 * tail, Fraction(1))), rel=1e-9)


def test_mcnemar_by_hand():
    """Changes in one direction only: 2 / 2^n. 21 fixed and 14 broken are not significant."""
    assert mcnemar(6, 0) == 2 / 2**6
    assert mcnemar(21, 14) == pytest.approx(0.31, abs=0.005)


def test_paired_counts_each_problem_once():
    before, after = [True, True, False, False, False], [True, False, True, True, False]
    counts = paired(before, after)
    assert counts == {"fixed": 2, "broke": 1, "both_right": 1, "both_wrong": 1, "mcnemar_p": 1.0}
    with pytest.raises(ValueError):
        paired(before, after[:-1])


# ----------------------------------------------------------------------------------------------------------------- records


def record(problem: str, sample: int, answer: str | None, flexible: str | None = "0", violation: bool = False) -> dict:
    return {
        "model": "trained", "problem": problem, "sample": sample, "answer": answer, "flexible_answer": flexible or answer,
        "format": {"violation": violation}, "length": 10, "seconds": 0.5,
    }  # fmt: skip


PROBLEMS = [{"id": "a", "answer": "18.0"}, {"id": "b", "answer": "5"}, {"id": "c", "answer": "7"}]
SAMPLES = [
    # a: greedy wrong, the vote right; among well-formed samples alone it is wrong
    record("a", 0, "20"), record("a", 1, "20"), record("a", 2, "18", violation=True), record("a", 3, "18", flexible=None),
    # b: greedy right and well-formed, though not for the last number; one vote each, the coldest one is wrong
    record("b", 0, "5"), record("b", 1, "6"), record("b", 2, "5"), record("b", 3, None),
    # c: never sampled, as its prompt is too long
]  # fmt: skip


def test_figures_of_records_by_hand():
    found, solved = model_figures(PROBLEMS, SAMPLES, [0.2, 0.6, 1.0])
    assert solved == {"greedy": [False, True, False], "consensus": [True, False, False]}
    assert found["greedy"] == {"tagged": 1 / 3, "strict": 1 / 3, "flexible": 0, **ends(1, 3)}
    # strict: of a's votes 20 at 0.2 and 18 at 1.0 are left, and the tie goes to 20. flexible: a has 0, 0, 18.
    assert found["consensus"] == {"tagged": 1 / 3, "strict": 0, "flexible": 0, **ends(1, 3)}
    assert found["paired"] == {"fixed": 1, "broke": 1, "both_right": 0, "both_wrong": 1, "mcnemar_p": 1.0}
    assert found["agreement"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert found["pass_at_k"] == pytest.approx([(2 / 3 + 1 / 3) / 3, (1 + 2 / 3) / 3, 2 / 3])
    # a: of the pairs of 20 at 0.2, 18 and 18, one is right; b: of 6 at 0.2, 5 and none, also one.
    assert found["maj_at_k"] == pytest.approx([(2 / 3 + 1 / 3) / 3, (1 / 3 + 1 / 3) / 3, 1 / 3])
    assert (found["tokens"], found["seconds"]) == (80, 4.0)


def ends(right: int, n: int) -> dict:
    low, high = wilson(right, n)
    return {"low": low, "high": high}


def test_figures_do_not_depend_on_the_order_of_the_lines():
    shuffled = random.Random(1).sample(SAMPLES, len(SAMPLES))
    assert model_figures(PROBLEMS, shuffled, [0.2, 0.6, 1.0]) == model_figures(PROBLEMS, SAMPLES, [0.2, 0.6, 1.0])


def test_without_any_sample_every_problem_counts_as_wrong():
    found, _ = model_figures(PROBLEMS, [], TEMPERATURES)
    assert found["greedy"]["tagged"] == found["consensus"]["flexible"] == found["agreement"] == 0
    assert found["pass_at_k"] == found["maj_at_k"] == [0] * 5


def test_texts_vote_as_numbers_do():
    """Their canonical forms are those of grpo/reward.py; a line of problems.jsonl has the gold's."""
    problems = [{"id": "a", "gold": "b"}, {"id": "b", "gold": "new york"}, {"id": "c", "answer": "18.0"}]
    answers = {"a": ["b", "b", "c", "b"], "b": ["paris", "paris", "new york", None], "c": ["18", "18", "18", "17"]}
    samples = [
        record(id, i, answer, flexible=answer) | {"length": 1, "seconds": 0.0}
        for id, row in answers.items()
        for i, answer in enumerate(row)
    ]
    figures, solved = model_figures(problems, samples, [1.0, 1.0, 1.0])
    assert solved == {"greedy": [True, False, True], "consensus": [True, False, True]}
    assert figures["pass_at_k"][0] == pytest.approx((2 / 3 + 1 / 3 + 2 / 3) / 3)
