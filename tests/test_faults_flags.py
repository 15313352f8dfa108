"""Faults of flags, by their numbers: run directories, values, names, and what does not divide over the devices.

Each ends in one line on stderr and exit code 2.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from faults import command, ended, make_config, mistake
from training import devices

import grpo.runs.setup
import grpo.runs.trainer
import grpo.step
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.runs.run_dir import open_run_dir
from scripts import train as train_script


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(tmp_path_factory.mktemp("faults"))


def test_fault_28_run_directories(config, tmp_path, capsys):
    """A path is its owner's choice, also one with blanks, `..` or a leading dash; what cannot be a directory is one line."""
    (tmp_path / "file").write_text("kept")
    for path, reason in {
        "a\0b": "must not hold a NUL character",
        tmp_path / "file": "cannot be used: File exists",
        tmp_path / "file" / "run": "cannot be used: Not a directory",
        tmp_path / ("x" * 300): "cannot be used: File name too long",
    }.items():
        line = mistake(capsys, config, run_dir=path)
        assert line.startswith("run_dir ") and reason in line
    assert "--run_dir: expected one argument" in ended(capsys, 2, ["--run_dir", "-x"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"
    for name in ("a b", "sub/../c", "-dash"):
        with open_run_dir(replace(config, run_dir=f"{tmp_path}/{name}")) as opened:
            assert opened.is_dir() and opened.resolve().parent == tmp_path


@pytest.mark.skipif(sys.platform != "linux" or not Path("/sys/kernel").is_dir(), reason="needs a file system that refuses")
def test_fault_28_run_directory_that_may_not_be_made(config, capsys):
    assert "run_dir /sys/x cannot be used: " in mistake(capsys, config, run_dir="/sys/x")


BAD_FLAGS = {
    "a typo": ("--leraning_rate=1", "unknown flag --leraning_rate; did you mean --learning_rate?"),
    "quoted": ('--learning_rate="1e-5"', "--learning_rate: '\"1e-5\"' must be a number"),
    "true for a number": ("--learning_rate=true", "--learning_rate: 'true' must be a number"),
    "true for a count": ("--group_size=true", "--group_size: 'true' must be a whole number"),
    "a fraction": ("--group_size=2.0", "'2.0' must be a whole number"),
    "an underscore": ("--group_size=1_6", "'1_6' must be a whole number"),
    "other digits": ("--group_size=٣", "'٣' must be a whole number"),
    "an underscore in a float": ("--beta=1_0", "'1_0' must be a number"),
    "5,000 digits": ("--seed=" + "9" * 5000, "must be a whole number"),
    "NaN": ("--beta=nan", "beta nan must be a finite number"),
    "infinity": ("--temperature=1e400", "temperature inf must be a finite number"),
    "negative": ("--beta=-1", "beta -1.0 must not be negative"),
    "too large for an index": ("--max_new_tokens=1000000000000", "max_new_tokens 1000000000000 must be below 2147483648"),
    "no boolean": ("--unroll=yes", "--unroll: 'yes' must be true or false"),
    "no choice": ("--aggregation=grop", "aggregation"),
    "a section": ("--loss.beta=1", "unknown flag --loss.beta; --help lists them"),
}


@pytest.fixture
def never_started(monkeypatch) -> None:
    monkeypatch.setattr(train_script, "train", None)


@pytest.mark.usefixtures("never_started")
@pytest.mark.parametrize(("flag", "reason"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_fault_29_bad_flags(capsys, flag, reason):
    error = ended(capsys, 2, [flag])
    assert reason in error and len(error) < 300


@pytest.mark.usefixtures("never_started")
@pytest.mark.parametrize(
    ("twice", "reason"),
    [
        (["--beta=0", "--beta", "0"], "--beta is given 2 times; give it once"),
        (["--max-steps=1", "--max_steps=2"], "--max_steps is given 2 times; give it once"),
        (["tiny", "--preset=tiny"], "unexpected word 'tiny': settings are given as --flag value"),
    ],
)
def test_fault_29_a_flag_given_twice(capsys, twice, reason):
    """Neither the first nor the last counts in silence."""
    assert reason in ended(capsys, 2, twice)


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1E-05", "+1e-5"])
def test_fault_29_both_forms_of_a_float(text):
    assert train_script.parse(Config, [f"--learning_rate={text}"], "", {"custom": Config()}).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", "1e-5"), ("learning_rate", True), ("seed", True), ("group_size", 8.0), ("unroll", 1), ("data", None)],
)
def test_fault_29_wrong_types_in_a_notebook(config, name, value):
    with pytest.raises(ConfigError, match=f"^{name} {value!r} must be "):
        replace(config, **{name: value})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rollout_tp": 3}, "rollout_tp 3 does not divide 8 devices; use one of [1, 2, 4, 8]"),
        ({"rollout_tp": 16}, "use one of [1, 2, 4, 8]"),
        ({"prompts_per_step": 4}, "4 must divide over 8 devices; use a multiple of 8"),
        ({"prompts_per_step": 8, "microbatches": 2}, "prompts_per_step 8 / microbatches 2 = 4 must divide over 8 devices"),
        ({"prompts_per_step": 8, "microbatches": 16}, "prompts_per_step 8 must divide into microbatches 16"),
        ({"prompts_per_step": 16, "microbatches": 3}, "must divide into microbatches 3"),
    ],
)
def test_fault_30_what_does_not_divide_over_the_devices(config, capsys, monkeypatch, changes, reason):
    """Said before anything is compiled, with the legal values."""
    monkeypatch.setattr(grpo.runs.trainer, "load_base", None)
    assert reason in ended(capsys, 2, command(config, **changes), count=8)


def test_fault_30_one_kv_head_on_many_devices(config):
    """K = 1 with tp > 1 is legal: attention is whole on every device while sampling."""
    with devices(8):
        prepared = grpo.runs.setup.prepare(replace(config, prompts_per_step=8, rollout_tp=8))
    assert prepared.model.num_kv_heads == 1 and prepared.mesh.shape["tp"] == 8
