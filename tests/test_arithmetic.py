"""Laws of data/arithmetic.py: the stories are true, small, distinct and kept apart by split."""

import re

import pytest

from data import DataError, arithmetic
from data.arithmetic import demonstration, make_problems

SPLITS = ("train", "tune", "test")
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


def chain(question: str) -> list[tuple[str, int]]:
    """The numbers and operations that the question's sentences tell, read back from its words."""
    start, *steps = re.split(r"(?<=[.]) ", question)[:-1]
    patterns = [(r"finds (\d+)|gets (\d+)", "+"), (r"gives (\d+)|loses (\d+)", "-"), (r"double", "*"), (r"half", "/")]
    told = [("start", int(re.findall(r"\d+", start)[0]))]
    for sentence in steps:
        ((symbol, match),) = [(s, m) for pattern, s in patterns if (m := re.search(pattern, sentence))]
        numbers = [int(n) for n in match.groups() if n]
        told.append((symbol, numbers[0] if numbers else 2))
    return told


def test_question_solution_and_answer_tell_the_same_chain():
    for problem in make_problems(300, seed=0, split="train"):
        (_, value), *steps = chain(problem.question)
        worked = [(int(a), symbol, int(b), int(c)) for a, symbol, b, c in STEP.findall(problem.solution)]
        assert [(symbol, b) for _, symbol, b, _ in worked] == steps
        assert " ".join(f"{a} {symbol} {b} = {c}." for a, symbol, b, c in worked) == problem.solution
        for a, symbol, b, c in worked:
            assert a == value
            assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[symbol]
            assert 0 <= c <= 99
            value = c
        assert problem.answer == str(value)


def test_lengths_two_three_and_four_come_in_equal_shares():
    lengths = [p.solution.count("=") for p in make_problems(30, seed=1, split="tune")]
    assert sorted(lengths) == [2] * 10 + [3] * 10 + [4] * 10


def test_problems_are_distinct_and_fixed_by_the_seed():
    problems = make_problems(500, seed=7, split="train")
    assert problems == make_problems(500, seed=7, split="train")
    assert problems[:100] == make_problems(100, seed=7, split="train")
    assert problems != make_problems(500, seed=8, split="train")
    assert len({str(chain(p.question)) for p in problems}) == len({p.id for p in problems}) == 500


def test_no_chain_stands_in_two_splits():
    seen = {s: {str(chain(p.question)) for p in make_problems(2000, seed, s)} for seed, s in enumerate(SPLITS)}
    assert not seen["train"] & seen["tune"]
    assert not seen["train"] & seen["test"]
    assert not seen["tune"] & seen["test"]


def test_the_vocabulary_is_small():
    words = {w for p in make_problems(2000, seed=0, split="train") for w in re.findall(r"[A-Za-z]+", p.question)}
    assert len(words) < 40


def test_asking_for_more_than_there_are_fails_and_ends(monkeypatch):
    monkeypatch.setattr(arithmetic, "LARGEST_START", 2)
    monkeypatch.setattr(arithmetic, "LARGEST_OPERAND", 1)
    with pytest.raises(DataError, match='cannot make 1000 different problems in split "test": found'):
        make_problems(1000, seed=0, split="test")


@pytest.mark.parametrize(("count", "split", "reason"), [(1, "dev", 'no split "dev"'), (-1, "test", "at least 0")])
def test_a_wrong_request_is_an_error(count, split, reason):
    with pytest.raises(DataError, match=reason):
        make_problems(count, seed=0, split=split)


def test_every_demonstration_is_right_and_only_the_slip_breaks_the_format():
    whole = re.compile(r"<reasoning>([^<]+)</reasoning><answer>([^<]+)</answer>")
    for problem in make_problems(30, seed=0, split="train"):
        worked = whole.fullmatch(demonstration(problem, "worked"))
        terse = whole.fullmatch(demonstration(problem, "terse"))
        slip = demonstration(problem, "slip")
        assert worked
        assert worked.groups() == (problem.solution, problem.answer)
        assert terse
        assert terse.groups() == (problem.answer, problem.answer)
        assert not whole.fullmatch(slip)
        assert slip.endswith(f"<answer>{problem.answer}</answer>")


def test_another_style_is_an_error():
    (problem,) = make_problems(1, seed=0, split="train")
    with pytest.raises(DataError, match='no style "long"'):
        demonstration(problem, "long")
