"""Faults of machines and users that a run survives, in processes of their own; each test names those that it covers.

`pytest --long tests/test_faults.py` kills and stops a run in every phase of 72 steps; without the flag, once while a checkpoint
is saved in 12 steps.
"""

import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from training import REWARDS, lines, without_times, write_model, xla_flags

import grpo.runs.checkpoint
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.interrupts import Interrupts, Stopped
from grpo.runs.model_source import find_model
from models.sharding import STORE, make_mesh

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds that any wait may take before it is called a hang
KILLS = 1  # in each phase; with 5 and 80 steps it takes ten minutes
SMALL = {
    "data": "arithmetic", "sessions": 2, "prompts_per_step": 2, "group_size": 4, "max_prompt_tokens": 192,
    "max_new_tokens": 16, "eval_problems": 4, "retention_problems": 2, "remat": "none", "logprob_chunk": 16,
    "learning_rate": 3e-4, "save_every": 1,
}  # fmt: skip


@dataclass
class Process:
    """scripts/train.py under way, its output read as it comes."""

    popen: subprocess.Popen
    output: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # to stderr; read all the time, because a full pipe stops the process
    waiting: queue.Queue = field(default_factory=queue.Queue)

    def __post_init__(self):
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.listener = threading.Thread(target=lambda: self.said.extend(self.popen.stderr or ()), daemon=True)
        self.reader.start()
        self.listener.start()

    def read(self) -> None:
        for line in self.popen.stdout or ():
            self.output.append(line.rstrip("\n"))
            self.waiting.put(self.output[-1])
        self.waiting.put(None)

    def wait_for(self, start: str, times: int = 1) -> str:
        """The n-th next line that starts so; fails when the process ends before."""
        while True:
            line = self.waiting.get(timeout=PATIENCE)
            assert line is not None, f"ended before {start!r}: {self.output[-5:]} {self.errors()}"
            times -= line.startswith(start)
            if times == 0:
                return line

    def errors(self) -> str:
        self.popen.wait(PATIENCE)
        self.listener.join(PATIENCE)
        return "".join(self.said)

    def end(self) -> int:
        """Its exit code."""
        code = self.popen.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def result(self) -> dict[str, Any]:
        assert self.end() == 0, self.errors()
        return json.loads(self.output[-1])


class Launcher:
    """Starts runs of one small model, and never leaves one behind."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.started = folder, []
        self.steps = steps  # of session 1; session 2 has twice as many
        self.files = {"model_path": folder / "model", "reward": f"{folder / 'rewards.py'}:variety"}

    def __call__(self, *argv: str, devices: int = 1, traced: bool = True, shell: str = "", **environment: str) -> Process:
        """`shell` is a line for bash, whose "$@" is the command."""
        env = os.environ | {
            "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_COMPILATION_CACHE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"), "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": xla_flags(devices),
        } | environment  # fmt: skip
        script = "tests/traced_run.py" if traced else "scripts/train.py"
        given = [flag for flag in argv if flag.startswith("--")]
        base = [f"--{name}={value}" for name, value in ({"new_problems": 2 * self.steps} | SMALL | self.files).items()]
        base = [flag for flag in base if flag.split("=")[0] not in {flag.split("=")[0] for flag in given}]
        command = [sys.executable, script, *base, *argv]
        command = ["bash", "-c", shell, "bash", *command] if shell else command
        popen = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started.append(popen)
        return Process(popen)


@pytest.fixture(scope="module")
def launch(tmp_path_factory, request) -> Iterator[Launcher]:
    folder = tmp_path_factory.mktemp("faults")
    write_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    launcher = Launcher(folder, steps=24 if request.config.getoption("--long") else 4)
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and runs leave it so
    yield launcher
    signal.signal(signal.SIGHUP, former)
    for popen in launcher.started:
        popen.kill()


@pytest.fixture(scope="module")
def whole(launch) -> Path:
    """The directory of a run that nothing happened to."""
    folder = launch.folder / "whole"
    launch("--run_dir", str(folder)).result()
    assert all(record["grad_norm"] > 0 for record in lines(folder / "metrics.jsonl"))  # every step matters
    return folder


def records(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for times; of the checkpoints, the digests of every leaf of the last."""
    found: dict[str, Any] = {name: without_times(lines(folder / f"{name}.jsonl")) for name in ("metrics", "evaluations")}
    found |= {name: lines(folder / f"{name}.jsonl") for name in ("completions", "tokens")}
    result = json.loads((folder / "result.json").read_text())
    found["result"] = {name: result[name] for name in ("steps", "finished", "sessions", "params_digest")}
    last = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    found["digests"] = json.loads((folder / "checkpoints" / str(last) / "meta" / "metadata").read_text())["digests"]
    return found


def pieces_of(record: dict[str, Any]) -> list[Any]:
    return [record["problem"], *(completion["pieces"] for completion in record["completions"])]


def assert_same_run(folder: Path, whole: Path) -> None:
    for name, found in records(whole).items():
        assert records(folder)[name] == found, name


def kill(launch, phase: str, times: int, delay: float, *argv: str) -> None:
    """Start a run, and kill it so many seconds after the n-th beginning of a phase."""
    process = launch(*argv)
    process.wait_for(f"phase {phase}", times)
    time.sleep(delay)
    process.popen.kill()
    assert process.end() == -signal.SIGKILL


def assert_complete(folder: Path, whole: Path) -> None:
    """The records of an uninterrupted run, and no half-written step."""
    assert_same_run(folder, whole)
    assert not list(folder.rglob("*tmp*")) and not list(folder.rglob("*.part"))


def test_faults_1_to_5_a_run_killed_while_saving_ends_as_an_uninterrupted_one(launch, whole):
    """Bit for bit: parameters, moments, samples, metrics."""
    argv = "--run_dir", str(launch.folder / "killed")
    kill(launch, "save", 2, 0.01, *argv)
    launch(*argv).result()
    assert_complete(launch.folder / "killed", whole)


@pytest.mark.long
@pytest.mark.parametrize("async_save", ["true", "false"])
def test_faults_1_to_5_kill_9_in_every_phase(launch, whole, async_save):
    """Killed at random moments of rollout, reward, update, save, retention and evaluation, again and again."""
    rng = random.Random(async_save)
    folder = launch.folder / f"killed-{async_save}"
    argv = "--run_dir", str(folder), "--async_save", async_save
    kills = ["rollout", "reward", "update", "save", "retention"] * KILLS
    rng.shuffle(kills)
    for phase, times in [(phase, 2) for phase in kills] + [("evaluation", 1)]:  # the one at the end of session 1
        kill(launch, phase, times, rng.random() * 0.04, *argv)
    launch(*argv).result()
    assert_complete(folder, whole)


def stop(launch, folder: Path, number: int, phase: str, times: int, every: int) -> int:
    """Signal a run at the n-th beginning of a phase; the step after which it says that it has stopped, and has saved."""
    process = launch("--run_dir", str(folder), "--save_every", str(every))
    process.wait_for(f"phase {phase}", times)
    process.popen.send_signal(number)
    assert process.end() == 128 + number, process.errors()
    stopped = next(line for line in process.output if line.startswith("stopped "))
    assert signal.Signals(number).name in stopped
    step = int(stopped.split("after step ")[1].split(";")[0])
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == step > 0
    return step


def test_fault_7_a_signal_saves_and_ends(launch, whole):
    """In the rollout of step 3; the same command then ends as an uninterrupted run."""
    folder = launch.folder / "stopped"
    assert stop(launch, folder, signal.SIGTERM, "rollout", 3, 1000) == 3
    launch("--run_dir", str(folder)).result()
    assert_same_run(folder, whole)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_faults_6_and_7_a_signal_in_every_phase_saves_and_ends(launch, whole, number):
    """In the rollout, in the middle of an asynchronous save, and in the evaluation; the run then goes on as if nothing was."""
    folder = launch.folder / f"stopped-{number}"
    for phase, times, every in (("rollout", 3, 1000), ("save", 2, 1), ("evaluation", 1, 1000)):
        step = stop(launch, folder, number, phase, times, every)
    assert step == launch.steps  # the end of session 1
    launch("--run_dir", str(folder)).result()
    assert_same_run(folder, whole)


@pytest.mark.parametrize("name, heard", [("SIGINT", True), ("SIGTERM", True), ("SIGHUP", False)])
def test_a_signal_that_the_parent_ignores(name, heard):
    """A shell ignores SIGINT in what it starts in the background, and nohup ignores SIGHUP: only nohup means it."""
    number = getattr(signal, name)
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.raises(Stopped) if heard else nullcontext(), Interrupts(0):
            signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_IGN  # as before
    finally:
        signal.signal(number, former)


def test_fault_6_a_second_signal_ends_at_once(launch):
    """The first one waits for a step that takes very long, the second one does not."""
    folder = launch.folder / "twice"
    (launch.folder / "slow.py").write_text("import time\ndef slow(completion, problem):\n    time.sleep(8)\n    return 0.0\n")
    process = launch("--run_dir", str(folder), "--eval_problems", "0", "--reward", f"{launch.folder / 'slow.py'}:slow")
    process.wait_for("phase reward")
    process.popen.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.popen.poll() is None
    process.popen.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.end() == 130
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("shell", "reason"),
    [
        ('"$@" | head -3; exit ${PIPESTATUS[0]}', "Broken pipe"),
        pytest.param('exec "$@" >/dev/full', "No space left on device", marks=pytest.mark.long),
        pytest.param('exec "$@" >&-', "", marks=pytest.mark.long),
    ],
    ids=["head", "full", "closed"],
)
def test_fault_36_an_output_that_is_gone(launch, shell, reason, tmp_path):
    """`train.py | head`: one warning, and the run trains and saves to its end."""
    process = launch("--run_dir", str(tmp_path), "--new_problems=8", shell=shell)
    assert process.end() == 0, process.errors()
    said = [line for line in process.errors().splitlines() if line.startswith("warning: standard output is gone")]
    assert said == ([f"warning: standard output is gone ({reason}); nothing more is printed"] if reason else [])
    assert json.loads((tmp_path / "result.json").read_text())["finished"] and (tmp_path / "checkpoints" / "12").is_dir()


@pytest.mark.long
def test_the_hours_are_over(launch, whole):
    """--max_hours: saved, and ended without an error; the same command goes on."""
    folder = launch.folder / "hours"
    result = launch("--run_dir", str(folder), "--max_hours", "0.0000001", "--save_every", "1000").result()
    assert (result["steps"], result["finished"]) == (1, False)
    assert launch("--run_dir", str(folder)).result()["finished"]
    assert_same_run(folder, whole)


@pytest.mark.long
def test_fault_13_a_run_directory_has_one_process(launch):
    """The second is refused, and changes nothing; what a killed one leaves is no lock."""
    folder = launch.folder / "locked"
    first = launch("--run_dir", str(folder))
    first.wait_for("phase update")
    second = launch("--run_dir", str(folder), traced=False)
    assert second.end() == 2
    owner = f"process {first.popen.pid} on {socket.gethostname()}"
    assert second.errors() == f"error: {folder} is in use by {owner}; wait, or give another\n"
    first.popen.kill()
    first.end()
    third = launch("--run_dir", str(folder))
    third.wait_for("phase update")
    third.popen.kill()


@pytest.mark.long
def test_fault_9_a_directory_that_cannot_be_written(launch, tmp_path):
    """Refused before a model is loaded."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300), Path("/proc/run")):
        process = launch("--run_dir", str(place), traced=False)
        assert process.end() == 2
        errors = process.errors()
        assert errors.startswith(f"error: run_dir {place} cannot be used: ") and errors.count("\n") == 1
        assert not process.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_fault_9_a_directory_that_is_read_only(launch, tmp_path):
    tmp_path.chmod(0o500)
    process = launch("--run_dir", str(tmp_path / "run"), traced=False)
    assert process.end() == 2 and "cannot be used: Permission denied" in process.errors()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 24 MB; skips where it may not be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.long
def test_fault_8_no_room_for_a_checkpoint(launch, small_disk):
    """Less than a save wants to leave free: a warning, then the end, by name and number."""
    process = launch("--run_dir", str(small_disk / "run"), traced=False)
    assert process.end() == 1
    warning, error = process.errors().splitlines()
    for line, start in ((warning, "warning: "), (error, "error: ")):
        assert line.startswith(f"{start}checkpoint {small_disk / 'run' / 'checkpoints'}") and "MB needed" in line
    assert [record["step"] for record in lines(small_disk / "run" / "metrics.jsonl")] == [1, 2]


def test_fault_8_the_disk_fills_while_a_checkpoint_is_written(small_disk, monkeypatch, capsys):
    """orbax meets the end of the disk: its half-written files go, the older checkpoint stays and can be restored."""
    monkeypatch.setattr(grpo.runs.checkpoint, "SPARE", -(10**12))  # as if something else took the room meanwhile
    state = {"leaf": jax.random.normal(jax.random.key(0), (4, 2**20))}  # 16 MB that do not compress
    with closing(Checkpoints(small_disk / "checkpoints")) as checkpoints:
        checkpoints.save(1, state, {"step": 1}, wait=True)
        checkpoints.save(2, state, {"step": 2})
        checkpoints.settle()
        assert "checkpoints/2 could not be saved: " in capsys.readouterr().err
        assert [path.name for path in checkpoints.folder.iterdir()] == ["1"]
        restored = checkpoints.restore(state, lambda meta: None)
        assert restored is not None and (restored.state["leaf"] == state["leaf"]).all()


@pytest.mark.long
def test_fault_8_the_kernel_lets_no_checkpoint_be_written(launch):
    """A limit of the size of files (18 KB), which root has too: a warning, then the end; no half of a checkpoint stays.

    The embedding alone has 23 KB, however tensorstore spreads arrays over files; the records of two steps have 12.
    """
    folder = launch.folder / "limited"
    process = launch("--run_dir", str(folder), shell='ulimit -f 18; exec "$@"')
    assert process.end() == 1
    said = [line for line in process.errors().splitlines() if "could not be saved" in line]
    assert [line.split()[0] for line in said] == ["warning:", "error:"]
    assert "never retrieved" not in process.errors()  # each of orbax's tasks would say so, with a traceback
    assert not list((folder / "checkpoints").iterdir())


@pytest.mark.long
def test_faults_1_to_5_lora_killed_and_a_relay_killed_at_its_start(launch, tmp_path):
    """Adapters: killed in a step and in a save. The relay that follows is killed while it copies the first one's state."""
    lora = "--lora_rank=2", "--lora_alpha=4", "--reference=session_start", "--new_problems=8"
    one, two, whole = tmp_path / "one", tmp_path / "two", tmp_path / "whole"
    launch(f"--run_dir={whole}", *lora).result()
    for phase in ("update", "save"):
        kill(launch, phase, 2, 0.01, f"--run_dir={one}", "--session=1", *lora)
    launch(f"--run_dir={one}", "--session=1", *lora).result()
    relay = f"--run_dir={two}", "--session=2", f"--relay_from={one}", *lora
    kill(launch, "save", 1, 0.01, *relay)
    launch(*relay).result()
    for name in ("metrics", "result", "digests"):
        assert records(two)[name] == records(whole)[name], name


@pytest.mark.long
def test_fault_14_a_relay_from_a_directory_that_is_only_read(launch, whole, tmp_path):
    """Session 1 in one directory, session 2 in another: the same run. Where it came from is on record."""
    first, second = tmp_path / "first", tmp_path / "second"
    launch("--run_dir", str(first), "--session", "1").result()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    for path in first.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    process = launch("--run_dir", str(second), "--session", "2", "--relay_from", str(first))
    process.wait_for("phase update", 3)
    process.popen.kill()  # once relayed, the new directory is enough
    process.end()
    first.chmod(0o755)
    (first / "checkpoints").chmod(0o755)
    first.rename(tmp_path / "gone")
    launch("--run_dir", str(second), "--session", "2").result()
    assert {path: stamp for path, stamp in before.items()} == {
        first / path.relative_to(tmp_path / "gone"): path.stat().st_mtime_ns for path in (tmp_path / "gone").rglob("*")
    }
    found, expected = records(second), records(whole)
    for name in ("completions", "tokens"):  # those of session 1 stayed where they were
        found[name] = [record for record in expected[name] if record["step"] <= launch.steps] + found[name]
    assert found == expected
    meta = json.loads((second / "checkpoints" / str(3 * launch.steps) / "meta" / "metadata").read_text())
    assert [(origin["run_dir"], origin["step"]) for origin in meta["provenance"]] == [(str(first), launch.steps)]


def refused(launch, whole: Path, *argv: str, relay: bool = True) -> str:
    """The line with which a relay from `whole` is refused."""
    target = launch.folder / f"refused-{time.monotonic_ns()}"
    process = launch("--run_dir", str(target), "--relay_from", str(whole), *argv, traced=False)
    assert process.end() == 2
    errors = process.errors()
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert not (target / "metrics.jsonl").exists()
    return errors


@pytest.mark.long
def test_fault_12_a_checkpoint_of_something_else_is_refused(launch, whole, tmp_path):
    """Named: the settings, the model, the tokenizer, the data that differ."""
    assert f"{whole} holds a run with other settings (beta 0.04 -> 0.0, learning_rate 0.0003 -> 0.1)" in refused(
        launch, whole, "--learning_rate=0.1", "--beta=0"
    )
    other = shutil.copytree(launch.folder / "model", tmp_path / "model")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-3] ^= 64
    (other / "model.safetensors").write_bytes(weights)
    assert "belongs to another model: " in refused(launch, whole, "--model_path", str(other))
    renamed = shutil.copytree(launch.folder / "model", tmp_path / "renamed")
    pieces = json.loads((renamed / "tokenizer.json").read_text())
    vocab = pieces["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(pieces))
    assert "belongs to another tokenizer: " in refused(launch, whole, "--model_path", str(renamed))
    rewards = launch.folder / "rewards.py"
    rewards.write_text(REWARDS + "# edited")
    assert "belongs to another reward: " in refused(launch, whole)
    rewards.write_text(REWARDS)
    assert "system_prompt" in refused(launch, whole, "--system_prompt", "Count.")
    assert f"has {3 * launch.steps} steps already" in refused(launch, whole, "--max_steps", "9")


@pytest.mark.parametrize("how", ["flipped bits", pytest.param("emptied", marks=pytest.mark.long)])
def test_faults_10_and_11_a_damaged_newest_checkpoint_is_done_again(launch, whole, tmp_path, how):
    """The run falls back to the one before, says so, repeats its steps, and ends as if nothing had happened."""
    folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
    last = 3 * launch.steps
    newest = folder / "checkpoints" / str(last)
    for path in newest.rglob("d/*"):
        octets = bytearray(path.read_bytes())
        octets[len(octets) // 2] ^= 1
        path.write_bytes(octets if how == "flipped bits" else b"")
    process = launch("--run_dir", str(folder))
    process.result()
    assert f"warning: checkpoint {newest} is damaged: " in process.errors()  # orbax may add a traceback of its own
    assert f"resumed     after step {last - 1}" in process.output
    assert (folder / "checkpoints" / f"{last}.damaged").is_dir()
    assert_same_run(folder, whole)


def test_fault_11_when_no_checkpoint_is_good_the_run_does_not_begin_anew(launch, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "ruined"))
    for path in folder.rglob("metadata"):
        path.write_text("{}")
    before = (folder / "metrics.jsonl").read_bytes()
    process = launch("--run_dir", str(folder), traced=False)
    assert process.end() == 1
    assert process.errors().splitlines()[-1].startswith(f"error: no checkpoint in {folder / 'checkpoints'} can be restored (")
    assert (folder / "metrics.jsonl").read_bytes() == before


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# Sums over processes round in another order, and Adam divides a gradient near 0 by its own size. So at a large learning rate
# weights soon differ enough for another sample, on some CPUs in step 6.
SHARED = [
    "--prompts_per_step=16", "--new_problems=64", "--eval_problems=8", "--retention_problems=8", "--logprob_chunk=64",
    "--learning_rate=1e-5",
]  # fmt: skip


@pytest.fixture(scope="module")
def single(launch) -> Path:
    """The directory of one process with eight devices, where two with four each give the same."""
    folder = launch.folder / "single"
    launch(f"--run_dir={folder}", *SHARED, devices=8).result()
    return folder


def weights_of(folder: Path) -> np.ndarray:
    """All weights of a model, or of a run's last checkpoint, in one vector."""
    last = find_model(folder)
    return np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(last.load(make_mesh(devices=jax.devices()[:1]), STORE, "float32"))]
    )


def assert_same_to_rounding(folder: Path, single: Path) -> None:
    """The same samples; the same losses and weights, whose sums have another order."""
    found, expected = records(folder), records(single)
    assert found["completions"] == expected["completions"]
    assert [pieces_of(record) for record in found["tokens"]] == [pieces_of(record) for record in expected["tokens"]]
    for record, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert record.pop("alarms") == other.pop("alarms")
        assert record == pytest.approx(other, rel=1e-3, abs=1e-4)
    assert [record["accuracy"] for record in found["evaluations"]] == [record["accuracy"] for record in expected["evaluations"]]
    ours, theirs, start = map(weights_of, (folder, single, single.parent / "model"))
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs - start)  # one update of the twelve moves much further


@pytest.mark.long
def test_fault_35_two_processes_are_one_run_and_end_together(launch, single):
    """2 processes x 4 devices against 1 x 8. One of the two is killed; the other ends soon, and not as if all were well. The
    two start again from the last checkpoint, and end with the same samples and, to rounding, the same losses as the one.
    """
    double = launch.folder / "double"

    def start() -> list[Process]:
        joined = [f"--run_dir={double}", *SHARED, f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
        return [launch(*joined, f"--process_id={i}", devices=4) for i in range(2)]

    first, second = start()
    first.wait_for("step 6/")
    second.popen.kill()
    began = time.monotonic()
    assert first.end() not in (0, 2)
    assert time.monotonic() - began < 60
    errors = first.errors()
    assert "another process of this run is gone" in errors or "another task died" in errors

    first, second = start()
    first.wait_for("step 8/")
    second.popen.terminate()  # noticed by both, which save after the same step
    assert [first.end(), second.end()] == [143, 143], first.errors() + second.errors()
    stopped = next(line for line in first.output if line.startswith("stopped     by SIGTERM after step "))
    saved = max(int(path.name) for path in (double / "checkpoints").iterdir() if path.name.isdigit())
    assert int(stopped.split()[5].rstrip(";")) == saved >= 8

    first, second = start()
    result = first.result()
    assert second.end() == 0 and not any(line.startswith(("{", "step", "model")) for line in second.output)
    steps = [int(line.split("after step ")[1]) for line in first.output if line.startswith("resumed")]
    assert steps == [saved] and result["finished"]
    assert_same_to_rounding(double, single)


@dataclass
class Network:
    """Two network namespaces with a cable between them. `enter[i]` is a line for bash that starts a command in one of them."""

    names: tuple[str, str] = (f"grpo-{os.getpid()}-0", f"grpo-{os.getpid()}-1")
    addresses: tuple[str, str] = ("10.213.0.1", "10.213.0.2")
    enter: list[str] = field(default_factory=list)

    def ip(self, line: str) -> None:
        subprocess.run(["ip", *line.split()], check=True, capture_output=True)

    def set_cable(self, state: str) -> None:
        self.ip(f"-n {self.names[0]} link set cable {state}")

    def build(self) -> None:
        for name in self.names:
            self.ip(f"netns add {name}")
        self.ip(f"-n {self.names[0]} link add cable type veth peer name cable netns {self.names[1]}")
        for name, address in zip(self.names, self.addresses, strict=True):
            for line in ("link set lo up", f"addr add {address}/24 dev cable", "link set cable up"):
                self.ip(f"-n {name} {line}")
            named = f"echo {address} > /proc/sys/kernel/hostname"  # Gloo uses the address that the host's name has
            self.enter.append(f'ip netns exec {name} unshare --uts bash -c \'{named} && exec "$@"\' bash "$@"')
            subprocess.run(["bash", "-c", self.enter[-1], "bash", "true"], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        network.build()
        yield network
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', b'') or error}")
    finally:
        for name in network.names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.long
def test_a_network_that_splits(launch, single, network):
    """Of two processes with four devices each. For a while: they wait, and go on. For good: both say so and end, the side whose
    interface is down and the one that only hears nothing; when it is whole again, they resume and end as one process.
    """
    folder = launch.folder / "split"

    def start() -> list[Process]:
        joined = [f"--run_dir={folder}", *SHARED, f"--coordinator={network.addresses[0]}:2345", "--processes=2"]
        return [launch(*joined, f"--process_id={i}", devices=4, shell=network.enter[i]) for i in range(2)]

    processes = start()
    processes[0].wait_for("step 2/")
    network.set_cable("down")
    time.sleep(15)
    network.set_cable("up")
    processes[0].wait_for("step 4/")
    network.set_cable("down")
    began = time.monotonic()
    assert [process.end() for process in processes] == [1, 1]
    assert time.monotonic() - began < 70
    for i, process in enumerate(processes):
        said = f"error: another process of this run is gone (process {1 - i} has been silent for 45 s); "
        errors = process.errors()
        assert errors.startswith(said) and errors.count("\n") == 1, errors

    network.set_cable("up")
    processes = start()
    assert [process.end() for process in processes] == [0, 0], [process.errors() for process in processes]
    assert any(line.startswith("resumed") for line in processes[0].output)
    assert_same_to_rounding(folder, single)
