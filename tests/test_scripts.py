"""Laws of scripts/train.py as a program: exit codes, one line on stderr for the user's mistakes, JSON as the last line.

0 done, 2 the user's mistake, 1 a run that cannot go on, or our own mistake, with its traceback.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import REWARDS, write_model, xla_flags

from grpo.runs.checkpoint import read_digest
from grpo.runs.model_source import find_model

ROOT = Path(__file__).parents[1]
KEYS = [
    "run_dir", "preset", "seed", "steps", "finished", "accuracy_before", "accuracy_after", "sessions", "reward_first",
    "reward_last", "recompilations", "params_digest", "seconds",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    write_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def train(folder):
    """Run the script on the tiny model; one cache of compiled programs for all calls."""
    small = (
        f"--model_path={folder / 'model'} --data=arithmetic --sessions=1 --new_problems=16 --max_steps=2 --prompts_per_step=2 "
        "--group_size=2 --max_prompt_tokens=192 --max_new_tokens=8 --eval_problems=2 --remat=none --unroll=false "
        "--logprob_chunk=8"
    )

    def train(*argv: str, devices: int = 1) -> subprocess.CompletedProcess:
        env = os.environ | {
            "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_ENABLE_COMPILATION_CACHE": "1", "XLA_FLAGS": xla_flags(devices),
        }  # fmt: skip
        kept = [flag for flag in small.split() if flag.partition("=")[0] not in argv]
        command = [sys.executable, "scripts/train.py", *kept, *argv]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)

    return train


@pytest.fixture(scope="module")
def done(train, folder) -> subprocess.CompletedProcess:
    return train("--run_dir", str(folder / "run"), "--reward", f"{folder / 'rewards.py'}:variety")


def test_a_finished_run_exits_0_and_ends_in_one_line_of_json(done, folder):
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == KEYS
    assert (result["run_dir"], result["preset"], result["seed"], result["steps"]) == (str(folder / "run"), "tiny", 0, 2)
    assert result["recompilations"] == 0 and len(result["params_digest"]) == 16
    assert result == json.loads((folder / "run" / "result.json").read_text())
    assert result["accuracy_before"]["n"] == result["accuracy_after"]["n"] == 2


def test_a_finished_run_is_exported_to_the_bit(done, folder):
    """Trained weights, read out of the exported folder, have the digest that the run gave them."""
    argv = ["--model_path", str(folder / "run"), "--out", str(folder / "exported"), "--dtype", "float32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/export.py", *argv]
    exported = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert exported.returncode == 0 and exported.stderr.startswith(f"step 2 of the run {folder / 'run'}: Gemma 1, ")
    assert json.loads(exported.stdout)["out"] == str(folder / "exported")
    model = find_model(folder / "exported")
    assert model.open
    assert read_digest(model.open(), model.config) == json.loads(done.stdout.splitlines()[-1])["params_digest"]
    again = subprocess.run([*command, "--lora", "peft"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "") and "has no adapters; leave --lora out" in again.stderr.splitlines()[-1]


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (flags, what the line says)."""
    (folder / "bad.jsonl").write_text(
        '{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 2?", "answer": "#### x"}\n'
    )
    other = folder / "other"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text((folder / "model" / "config.json").read_text())
    pieces = (folder / "model" / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(pieces.replace("<start_of_turn>", "<|im_start|>"))
    return {
        "unknown preset": (["--preset", "tinny"], "error: preset 'tinny' is unknown: one of tiny, "),
        "typo": (["--max_new_token", "8"], "error: unknown flag --max_new_token; did you mean --max_new_tokens?"),
        "no model": (
            ["--model_path", str(folder / "none")],
            f"error: {folder / 'none'}/config.json is missing: a model folder holds",
        ),
        "no data": (["--data", "none.jsonl"], 'error: data file "none.jsonl" does not exist'),
        "bad line": (["--data", str(folder / "bad.jsonl")], f"error: {folder / 'bad.jsonl'}:2: answer 'x' is not an answer"),
        "tokenizer": (["--model_path", str(other)], f'error: tokenizer in {other} has no piece "<start_of_turn>": not a Gemma'),
        "rows": (["--prompts_per_step", "3"], "3 must divide over 8 devices"),
    }


LONG = ["unknown preset", "typo", "no data", "bad line", "tokenizer", "rows"]


@pytest.mark.parametrize("name", ["no model", *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_the_users_mistake_is_one_line_and_exit_code_2(train, folder, name):
    argv, message = mistakes(folder)[name]
    ended = train(*argv, "--run_dir", str(folder / "never"), devices=8 if name == "rows" else 1)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: ") and message in ended.stderr
    assert ended.stdout == ""
    assert not (folder / "never").exists()


def test_a_reward_that_is_no_number_is_one_line_and_exit_code_1(done, train, folder):
    ended = train("--run_dir", str(folder / "text"), "--eval_problems", "0", "--reward", f"{folder / 'rewards.py'}:text")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: reward text gave ") and ended.stderr.count("\n") == 1


@pytest.mark.long
def test_a_reward_that_raises_is_a_traceback_and_the_run_goes_on(done, train, folder):
    argv = ["--run_dir", str(folder / "broken"), "--reward", f"{folder / 'rewards.py'}:broken"]
    ended = train(*argv)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("warning: reward broken raised RuntimeError: a fault of the reward's own for problem ")
    assert ended.stderr.count("Traceback") == 1 and "rewards.py" in ended.stderr  # where it happened
    result = json.loads(ended.stdout.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["reward_first"] is None and result["accuracy_before"]["sampled_reward"] is None
    again = train(*argv)
    assert again.returncode == 0 and again.stderr == ""
    assert json.loads(again.stdout.splitlines()[-1])["params_digest"] == result["params_digest"]


@pytest.mark.long
def test_strict_rewards_end_the_run_in_one_line_and_exit_code_1(done, train, folder):
    argv = ["--run_dir", str(folder / "strict"), "--reward", f"{folder / 'rewards.py'}:broken", "--strict_rewards"]
    ended = train(*argv)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: reward broken raised RuntimeError: a fault of the reward's own for problem ")
    assert ended.stderr.count("\n") == 1
