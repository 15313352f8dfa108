"""Laws of data/curriculum.py: what is left out is what was measured to teach nothing, and a run keeps its choice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import CONFIG

from data import DataError
from data.curriculum import choose_by_rate, read_pass_rates
from data.problems import Problem
from grpo.session import plan_sessions

PROBLEMS = [Problem(f"p{i}", f"question {i}", "1") for i in range(1000)]


def write(folder: Path, verdicts: dict[str, list[bool]], model: str = "trained") -> str:
    """An evaluation whose problem `id` has these voters, after a greedy sample that says the opposite."""
    folder.mkdir(exist_ok=True)
    problems = [{"id": id, "question": f"question  {id[1:]}\n", "answer": "1"} for id in verdicts]
    samples = [
        {"model": model, "problem": id, "sample": j, "accuracy": {"tagged": right, "strict": False, "flexible": True}}
        for id, row in verdicts.items()
        for j, right in enumerate([not row[0], *row])
    ]
    for name, records in (("problems", problems), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def test_rates_are_those_of_the_voters(tmp_path):
    found = read_pass_rates(write(tmp_path, {"p0": [False] * 4, "p1": [True] * 4, "p2": [True, False, False, False]}))
    assert found == {"question 0": 0.0, "question 1": 1.0, "question 2": 0.25}


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_only_problems_that_never_or_always_succeed_are_left_out(keep):
    rates = {f"question {i}": (0.0, 1.0, 0.5, 0.01)[i % 4] for i in range(800)}
    chosen = choose_by_rate(PROBLEMS, rates, keep, seed=1)
    left = {problem.id for problem in chosen.problems}
    assert {f"p{i}" for i in range(1000) if i >= 800 or i % 4 > 1} <= left
    assert [problem for problem in PROBLEMS if problem.id in left] == chosen.problems
    assert chosen.never + chosen.always == 1000 - len(chosen.problems) and chosen.unmeasured == 200
    for kept in (200 - chosen.never, 200 - chosen.always):
        assert kept == pytest.approx(200 * keep, abs=0 if keep in (0, 1) else 5 * (200 * 0.3 * 0.7) ** 0.5)
    assert choose_by_rate(PROBLEMS, rates, keep, seed=1) == chosen
    assert keep in (0, 1) or choose_by_rate(PROBLEMS, rates, keep, seed=2) != chosen
    fewer = choose_by_rate(PROBLEMS[:500], rates, keep, seed=1)  # the choice of one problem does not depend on others
    assert fewer.problems == [problem for problem in chosen.problems if int(problem.id[1:]) < 500]


def test_sessions_and_their_reviews_are_of_the_chosen_problems():
    chosen = choose_by_rate(PROBLEMS, {f"question {i}": float(i % 2) for i in range(0, 1000, 3)}, 0.0, 0)
    sessions = plan_sessions(replace(CONFIG, sessions=3, new_problems=100), len(chosen.problems))
    assert [(len(session.new), len(session.review)) for session in sessions] == [(100, 0), (100, 100), (100, 100)]
    assert all(int(chosen.problems[i].id[1:]) % 3 for session in sessions for i in (*session.new, *session.review))


def test_what_cannot_be_used_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"problems\.jsonl cannot be read \(No such file or directory\); give an --out"):
        read_pass_rates(str(tmp_path / "nowhere"))
    for verdicts, model in (({"p0": [True]}, "trained"), ({"p0": [True] * 3}, "base")):
        with pytest.raises(DataError, match="samples of a problem, needs at least 2"):
            read_pass_rates(write(tmp_path, verdicts, model))
    folder = write(tmp_path, {"p0": [True] * 3})
    (tmp_path / "samples.jsonl").write_text('{"model": "trained"')
    with pytest.raises(DataError, match=r"samples\.jsonl:1 is no record of an evaluation: it needs model, problem"):
        read_pass_rates(folder)
    with pytest.raises(DataError, match="all 2 problems always or never succeed"):
        choose_by_rate(PROBLEMS[:2], {"question 0": 0.0, "question 1": 1.0}, 0.0, 0)
