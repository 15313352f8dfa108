"""Laws of grpo/runs/outcome.py: exit codes, the one line of an error, and the last line of standard output."""

import json
import sys

import pytest

from data import DataError
from grpo.errors import ConfigError, RunError
from grpo.runs.outcome import print_result, run_main
from models import ModelError

RESULT = {"steps": 60, "accuracy": {"greedy": 0.5}, "seconds": 1.5}


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (DataError, 2), (ModelError, 2), (RunError, 1)])
def test_an_error_of_the_user_or_the_run_is_one_line_and_an_exit_code(error, code, capsys):
    def main(argv):
        raise error("what is\nwrong")

    with pytest.raises(SystemExit) as ended:
        run_main(main, [])
    assert ended.value.code == code
    assert capsys.readouterr() == ("", "error: what is wrong\n")


def test_a_bug_keeps_its_traceback():
    def main(argv):
        raise KeyError("step")

    with pytest.raises(KeyError):
        run_main(main, [])


def test_the_result_is_one_line_of_json(capsys):
    run_main(lambda argv: RESULT | {"argv": argv}, ["--x", "1"], short=("steps",))
    assert json.loads(capsys.readouterr().out) == RESULT | {"argv": ["--x", "1"]}


@pytest.mark.parametrize(("short", "shown"), [((), RESULT), (("steps", "seconds"), {"steps": 60, "seconds": 1.5})])
def test_a_terminal_shows_the_short_keys_of_a_result(short, shown, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_result(RESULT, short)
    out = capsys.readouterr().out
    assert json.loads(out) == shown and out.count("\n") == 1
