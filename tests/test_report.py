"""Laws of scripts/report.py, called in process."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from test_page import make_evaluation, make_run
from test_sample import load

from grpo.errors import ConfigError, RunError
from grpo.reports.page import find_evaluations


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make_run(folder / "run")
    make_evaluation(folder / "run" / "consensus")
    return folder


def test_a_page_of_a_run_and_what_it_holds(folder, capsys):
    result = load("report")([str(folder / "run"), str(folder / "run"), "--megabytes", "0.01"])
    report = folder / "run" / "report.html"
    assert (result["report"], result["bytes"]) == (str(report), report.stat().st_size)
    assert (result["runs"], result["steps"], result["groups_with_tokens"]) == (2, 40, 1)
    assert result["completions"] + result["completions_left_out"] == 320 and 0 < result["completions"] < 320
    assert "completions are not in this page" in capsys.readouterr().out
    json.dumps(result, allow_nan=False)


def test_every_analysis_of_the_run_and_of_its_evaluation_is_in_one_file(folder):
    run = folder / "run"
    result = load("report")([str(run)])
    found = json.loads(Path(result["analyses"]).read_text(), parse_constant=pytest.fail)
    assert set(found) == {"run", "gain_by_model", "evaluation", "hard_cases"}
    assert sum(bin["n"] for bin in found["run"]["by_length"]) == 320
    for of_model in found["evaluation"].values():
        assert sum(bin["n"] for bin in of_model["by_length_tokens"]) > 0 <= of_model["calibration_error"]
        assert {"by_length", "within_problem", "calibration", "gain_by_difficulty"} < set(of_model)
    assert [case["id"] for case in found["hard_cases"]] == ["e3"]


def test_the_gain_of_every_checkpoint_that_was_evaluated(folder, tmp_path):
    """The base appears once; no result, no gain. Without RUN/consensus the page shows the latest step."""
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    for name, right in {"consensus": 60, "consensus-9": 30, "consensus-20": 40, "consensus-30": None}.items():
        shutil.copytree(folder / "run" / "consensus", run / name, dirs_exist_ok=True)
        paired = {"fixed": 10, "broke": 5, "both_right": right, "both_wrong": 0}
        figures = {"greedy": {"tagged": (right or 0) / 100}, "consensus": {"tagged": 0.7}, "paired": paired}
        if right:
            (run / name / "result.json").write_text(json.dumps({"models": {"base": figures, "trained": figures}}))
    gains = json.loads(Path(load("report")([str(run)])["analyses"]).read_text())["gain_by_model"]
    assert {row["name"]: row["single"] for row in gains} == {
        "run, step 9, trained": 0.3, "run, step 20, trained": 0.4, "run, base": 0.6, "run, trained": 0.6
    }  # fmt: skip
    shutil.rmtree(run / "consensus")
    assert [path.name for path in find_evaluations(run)] == ["consensus-30", "consensus-20", "consensus-9"]
    assert "hard_cases" in json.loads(Path(load("report")([str(run)])["analyses"]).read_text())


def test_plots_are_drawn_of_a_run_with_sessions_and_an_evaluation_with_a_result(folder, tmp_path, monkeypatch):
    main, drawn = load("report"), []
    for name in ("draw_training", "draw_evaluation"):
        monkeypatch.setattr(sys.modules["report"], name, lambda source, path: drawn.append((source, path)))
    run, evaluation = folder / "run", tmp_path / "evaluation"
    assert main([str(run)])["pictures"] == [str(run / "training.png")]
    shutil.copytree(run / "consensus", evaluation)
    (evaluation / "result.json").write_text("{}")
    result = main([str(run), "--evaluation", str(evaluation)])
    assert result["pictures"] == [str(run / "training.png"), str(run / "evaluation.png")]
    assert drawn == [(run, run / "training.png")] * 2 + [(evaluation, run / "evaluation.png")]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give the directory of a run"),
        (["NONE"], "run_dir '.*NONE' holds no run"),
        (["run", "--evaluation", "NONE"], "evaluation '.*NONE' is not a directory"),
        (["run", "--evaluation", "run"], "evaluation '.*run' holds no evaluation"),
        (["run", "--megabytes", "-1"], "megabytes -1.0 must not be negative"),
    ],
)
def test_the_users_mistakes(folder, argv, message):
    words = [str(folder / word) if word in ("run", "NONE") else word for word in argv]
    with pytest.raises(ConfigError, match=message):
        load("report")(words)


def test_an_error_of_drawing_is_a_warning(folder, capsys, monkeypatch):
    main = load("report")

    def broken(source, path):
        raise ValueError("no such\naxis")

    monkeypatch.setattr(sys.modules["report"], "draw_training", broken)
    result = main([str(folder / "run")])
    assert result["pictures"] == [] and Path(result["report"]).is_file()
    assert capsys.readouterr().err == f"warning: {folder / 'run' / 'training.png'} could not be drawn: no such axis\n"


def test_a_page_that_cannot_be_written(folder, tmp_path):
    run = make_run(tmp_path / "run")
    (run / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report.html cannot be written: Is a directory"):
        load("report")([str(run)])
