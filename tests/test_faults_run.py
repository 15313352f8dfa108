"""Faults while a run goes on, by their numbers: degenerate completions, other data, gradients, memory, clocks.

What cannot go on ends in one line on stderr and exit code 1; everything else leaves a run going. One tiny model and one
configuration serve all runs, so that they compile once.
"""

import json
import math
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import STEPS, C, G, Q, command, ended, make_config
from safetensors.numpy import load_file, save_file
from test_convert import WHOLE
from training import devices, final_state, lines, run

import grpo.runs.setup
import grpo.runs.trainer
import grpo.step
from data.tokenizer import load_tokenizer
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.reward import extract_answer
from grpo.runs.cli import run_script
from grpo.runs.console import Progress
from grpo.runs.run_dir import open_run_dir

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(tmp_path_factory.mktemp("faults"))


def steer(folder: Path, stop: float) -> None:
    """Weights for which every piece is as likely as the others, but those that end a completion are not: `stop` 100, always
    sampled; -100, never."""
    tensors = load_file(folder / WHOLE)
    tokenizer = load_tokenizer(folder)
    embedding = np.zeros_like(tensors["model.embed_tokens.weight"])
    embedding[:, 0] = 1
    embedding[list(tokenizer.stop_ids), 0] = stop
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = np.zeros_like(tensors[name])
    save_file(tensors | {"model.embed_tokens.weight": embedding}, folder / WHOLE)


def steered_run(config: Config, stop: float) -> dict[str, Any]:
    """The files of a run with `steer`ed weights; model and run directory are as before afterwards."""
    weights = Path(config.model_path) / WHOLE
    before = weights.read_bytes()
    steer(weights.parent, stop)
    try:
        result = run(config)
        directory = Path(config.run_dir)
        return {"result": result, **{name: lines(directory / f"{name}.jsonl") for name in ("metrics", "completions")}}
    finally:
        weights.write_bytes(before)
        shutil.rmtree(config.run_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def silent(config) -> dict[str, Any]:
    """A run whose completions all end at once."""
    return steered_run(config, 100.0)


@pytest.fixture(scope="module")
def endless(config) -> dict[str, Any]:
    """A run whose completions all hit the length limit, which leaves them out of the loss."""
    return steered_run(config, -100.0)


def not_finite(metrics: list[dict[str, Any]]) -> set[str]:
    """The metrics without a finite value in some step; null is how a record says so."""
    figures = [(name, value) for record in metrics for name, value in record.items() if name != "alarms"]
    return {name for name, value in figures if value is None or not math.isfinite(value)}


def test_fault_18_empty_completion(silent):
    """The stop token comes first: one token counts, the reward is that of a violated format, no mean is 0/0."""
    assert len(silent["completions"]) == STEPS * Q * G
    for record in silent["completions"]:
        assert (record["text"], record["length"], record["truncated"]) == ("", 1, False)
        assert record["components"] == {"correct": 0, "reasoning_tags": 0, "answer_tags": 0, "operators": 0, "violation": -15}
        assert not any(record["accuracy"].values()) and record["format"]["violation"]
    assert not not_finite(silent["metrics"])
    for record in silent["metrics"]:
        assert record["completions/mean_length"] == record["completions/mean_terminated_length"] == 1
        assert record["completions/mean_words"] == record["frac_truncated"] == 0


def test_fault_19_all_rewards_of_a_group_equal(silent):
    """Standard deviation 0: the advantages are exactly 0, the policy is its reference; a step without an update is a step."""
    assert all(record["advantage"] == 0 for record in silent["completions"])
    assert not not_finite(silent["metrics"])
    assert [record["step"] for record in silent["metrics"]] == [1, 2]
    for record in silent["metrics"]:
        assert record["frac_reward_zero_std"] == 1 and record["reward_std"] == 0
        assert record["skipped_update"] == 1 and "grad_norm" not in record
    assert silent["result"]["steps"] == STEPS


def test_fault_20_completion_hits_the_length_limit(endless):
    """Flagged and counted, no stop token made up; with every completion masked there is no update, and no 0/0."""
    for record in endless["completions"]:
        assert record["truncated"] and record["length"] == C
        assert record["components"]["violation"] == -15
    assert not_finite(endless["metrics"]) == {"entropy", "reward_std"}  # of no token, and of no completion with a vote
    for record in endless["metrics"]:
        assert record["frac_truncated"] == 1 and record["completions/mean_length"] == C
        assert record["skipped_update"] == 1 and "loss" not in record


def test_fault_26_control_pieces_and_tags_in_text(config, silent):
    """A question cannot end its turn, and its own `<answer>` does not count for the completion; nor can a completion."""
    with devices(1):
        prepared = grpo.runs.setup.prepare(config)
    tokenizer = prepared.tokenizer
    for ids in prepared.prompt_ids:
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
        assert (ids.count(tokenizer.end_of_turn_id), ids.count(tokenizer.piece_id("<start_of_turn>"))) == (1, 2)
        assert tokenizer.eos_id not in ids
        assert "<answer>" in tokenizer.decode(ids)
    assert all(record["components"]["answer_tags"] == 0 for record in silent["completions"])
    assert all(record["accuracy"] == dict.fromkeys(("tagged", "strict", "flexible"), False) for record in silent["completions"])
    spelled = "<reasoning>1 + 1</reasoning><answer>2<end_of_turn></answer>"
    assert not set(tokenizer.encode(spelled)) & {*tokenizer.stop_ids, tokenizer.bos_id}
    assert tokenizer.decode(tokenizer.encode(spelled)) == spelled and extract_answer(spelled) is None


@pytest.fixture
def data(tmp_path) -> Path:
    """Forty problems of its own."""
    questions = [json.dumps({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"}) for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(questions) + "\n")
    return tmp_path / "data.jsonl"


def test_fault_12_another_data_file_under_the_same_name(config, data, tmp_path, capsys):
    """The problems have a fingerprint, whatever the path: an edited file is noticed, a moved one is not another."""
    config = replace(config, data=str(data), run_dir=str(tmp_path / "run"), new_problems=20)
    assert run(replace(config, max_steps=2))["steps"] == 2
    moved = data.rename(tmp_path / "moved.jsonl")
    config = replace(config, data=str(moved))
    assert run(replace(config, max_steps=3))["steps"] == 3
    moved.write_text(moved.read_text().replace("What", "How much"))
    config = replace(config, max_steps=4)
    assert "belongs to another data: " in ended(capsys, 2, command(config))
    assert run(replace(config, allow_change="data"))["steps"] == 4
    faster = replace(config, max_steps=5, learning_rate=1e-3)
    ended(capsys, 2, command(faster))
    assert run(replace(faster, allow_change="data,learning_rate"))["steps"] == 5


def test_fault_13_a_run_directory_has_one_process(config, tmp_path):
    """The second is refused, by the first one's number; a lock that is left behind is none."""
    config = replace(config, run_dir=str(tmp_path / "run"))
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    for _ in range(2):
        with open_run_dir(config), pytest.raises(ConfigError, match=f"run is in use by {owner}; "), open_run_dir(config):
            pytest.fail("opened twice")


def checkpoint_files(config: Config) -> dict[str, bytes]:
    folder = Path(config.run_dir) / "checkpoints"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("free_run_dir")
def test_fault_33_non_finite_gradient(config, monkeypatch):
    """The update is skipped and counted, the run goes on, and what it resumes from is bit for bit the state before."""
    real, states = grpo.step.train_step, []

    def poisoned(state, batch, *rest):
        states.append(jax.device_get((state.params, state.opt_state)))
        return real(state, replace(batch, advantages=batch.advantages + jnp.nan) if len(states) == 2 else batch, *rest)

    monkeypatch.setattr(grpo.step, "learnable", lambda *_: True)
    monkeypatch.setattr(grpo.step, "train_step", poisoned)
    result = run(config)
    assert result["steps"] == STEPS
    assert [record["bad_updates"] for record in lines(Path(config.run_dir) / "metrics.jsonl")] == [0, 1]
    state = final_state(config)
    assert int(state.bad_updates) == int(state.bad_in_a_row) == 1
    for saved, before in zip(jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(saved, before)


@pytest.mark.usefixtures("free_run_dir")
def test_fault_34_out_of_memory(config, capsys, monkeypatch):
    """In the second update: one line with the bytes and three ways out, exit code 1, the checkpoint as it was and resumable."""
    real, checkpoints = grpo.step.train_step, []

    def exhausted(*args):
        if checkpoints:
            jnp.zeros((2**23, 2**23))  # 2^48 bytes: no machine has them
        checkpoints.append(None)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(grpo.step, "learnable", lambda *_: True)
        patch.setattr(grpo.step, "train_step", exhausted)
        line = ended(capsys, 1, command(config))
    assert line.startswith("out of memory (RESOURCE_EXHAUSTED: Out of memory") and "281474976710656 bytes" in line
    assert all(knob in line for knob in ("microbatches", "group_size", "max_new_tokens"))
    before = checkpoint_files(config)
    assert {name.split("/")[0] for name in before} == {"1"}
    result = run(config)
    assert "resumed     after step 1" in capsys.readouterr().out and result["steps"] == STEPS
    after = checkpoint_files(config)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory (on the host): "),
        (np.exceptions.DTypePromotionError("x"), None),
        (jax.errors.JaxRuntimeError("INTERNAL: something else"), None),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 15G hbm.\n\nTotal"
            ),
            "out of memory (RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 15G hbm.): raise",
        ),
    ],
    ids=["host", "another", "internal", "at compile time"],
)
def test_fault_34_only_a_lack_of_memory_is_explained_so(capsys, error, says):
    """The host's, and a TPU compiler's report of many lines; any other error keeps its traceback."""

    def main(argv):
        raise error

    if says:
        assert ended(capsys, 1, [], main).startswith(says)
    else:
        with pytest.raises(type(error)):
            run_script(main, [])


@pytest.mark.usefixtures("free_run_dir")
def test_fault_36_clocks_jump_and_the_network_is_down(config, capsys, monkeypatch):
    """The wall clock goes back an hour at every look and nothing can connect: the run ends, its record is whole."""
    hours = iter(range(10**6))

    def unreachable(*args):
        raise OSError(101, "Network is unreachable")

    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 3600 * next(hours))
        patch.setattr(time, "time_ns", lambda: int((now - 3600 * next(hours)) * 1e9))
        patch.setattr(socket.socket, "connect", unreachable)
        result = run(config)
    assert next(hours) > 0, "nobody looked at the clock"
    metrics = lines(Path(config.run_dir) / "metrics.jsonl")
    assert result["steps"] == STEPS == len(metrics) and 0 <= result["seconds"] < 600
    assert not not_finite(metrics)
    for record in metrics:
        assert all(value >= 0 for name, value in record.items() if name.startswith("time/"))
    progress = Progress(3)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: -3600.0 * next(hours))
        for step in (1, 2, 3):
            progress.show(step, metrics[0])
    left = [line.rsplit("  ", 1)[1] for line in capsys.readouterr().out.splitlines() if line.endswith(" left")]
    assert left and not any("-" in text for text in left)
