"""Laws of scripts/train.py as a program: exit codes, one line on stderr for the user's mistakes, JSON as the last line.

0 done, 2 the user's mistake, 1 our own or that of the user's code, with its traceback.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import REWARDS, write_model

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
        env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
        env |= {
            "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_ENABLE_COMPILATION_CACHE": "1",
        }  # fmt: skip
        if devices > 1:
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
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


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (flags, what the line says)."""
    (folder / "bad.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 2?", "answer": "four"}\n')
    other = folder / "other"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text((folder / "model" / "config.json").read_text())
    pieces = (folder / "model" / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(pieces.replace("<start_of_turn>", "<|im_start|>"))
    return {
        "unknown preset": (["--preset", "tinny"], "error: preset 'tinny' is unknown: one of tiny, "),
        "typo": (["--max_new_token", "8"], "error: --max_new_token is no flag; did you mean --max_new_tokens?"),
        "no model": (
            ["--model_path", str(folder / "none")],
            f"error: {folder / 'none'}/config.json is missing: a model folder holds",
        ),
        "no data": (["--data", "none.jsonl"], 'error: data file "none.jsonl" does not exist'),
        "bad line": (["--data", str(folder / "bad.jsonl")], f'error: {folder / "bad.jsonl"}:2: answer has no "#### number"'),
        "tokenizer": (["--model_path", str(other)], f'error: tokenizer in {other} has no piece "<start_of_turn>": not a Gemma'),
        "rows": (["--prompts_per_step", "3"], "3 must divide over 8 devices"),
    }


@pytest.mark.parametrize("name", ["unknown preset", "typo", "no model", "no data", "bad line", "tokenizer", "rows"])
def test_the_users_mistake_is_one_line_and_exit_code_2(train, folder, name):
    argv, message = mistakes(folder)[name]
    ended = train(*argv, "--run_dir", str(folder / "never"), devices=8 if name == "rows" else 1)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: ") and message in ended.stderr
    assert ended.stdout == ""
    assert not (folder / "never").exists()


def test_a_reward_that_is_no_number_is_one_line_and_exit_code_2(done, train, folder):
    ended = train("--run_dir", str(folder / "nan"), "--eval_problems", "0", "--reward", f"{folder / 'rewards.py'}:not_a_number")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: reward not_a_number gave nan for problem ") and ended.stderr.count("\n") == 1


def test_a_fault_in_the_users_code_is_a_traceback_and_exit_code_1(done, train, folder):
    ended = train("--run_dir", str(folder / "broken"), "--eval_problems", "0", "--reward", f"{folder / 'rewards.py'}:broken")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback") and "RuntimeError: a fault of the reward's own" in ended.stderr
    assert "rewards.py" in ended.stderr  # where it happened
