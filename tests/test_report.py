"""Laws of scripts/report.py, called in process."""

import json
from pathlib import Path

import pytest
from test_page import make_evaluation, make_run
from test_sample import load

from grpo.config import ConfigError, RunError


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


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give the directory of a run"),
        (["NONE"], "run_dir '.*NONE' holds no run"),
        (["run", "--evaluation", "NONE"], "evaluation '.*NONE' is no directory"),
        (["run", "--evaluation", "run"], "evaluation '.*run' holds none"),
        (["run", "--megabytes", "-1"], "megabytes -1.0 must be at least 0"),
    ],
)
def test_the_users_mistakes(folder, argv, message):
    words = [str(folder / word) if word in ("run", "NONE") else word for word in argv]
    with pytest.raises(ConfigError, match=message):
        load("report")(words)


def test_a_page_that_cannot_be_written(folder, tmp_path):
    run = make_run(tmp_path / "run")
    (run / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report.html cannot be written: Is a directory"):
        load("report")([str(run)])
