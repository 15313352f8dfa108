"""Laws of grpo/runs/trackers.py: figures arrive under TRL's names, and nothing that a back end does reaches the run."""

import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import grpo.runs.trackers
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.runs.trackers import Trackers, check_installed


def read_events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, figure) of every scalar in a folder of TensorBoard's events, by the file format: length, crc, event, crc."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found += [
                (event.step, value.tag, value.simple_value) for value in event.summary.value if not value.HasField("tensor")
            ]
            at += 16 + length
    return found


class Listener:
    """A back end that keeps what it is given; `write` and `close` can be made to misbehave."""

    def __init__(self, monkeypatch, misbehave: Any = lambda place: None):
        self.records, self.ended, self.done = [], False, None

        def connect(folder, config, done):
            self.done = done
            misbehave("connect")

            def write(step, figures):
                misbehave("write")
                self.records.append((step, figures))

            def close():
                misbehave("close")
                self.ended = True

            return write, close

        monkeypatch.setattr(grpo.runs.trackers, "wandb", connect)


def follow(tmp_path, names="wandb", steps=3, done=0) -> list[str]:
    """Warnings of a run of a few steps."""
    warnings: list[str] = []
    trackers = Trackers(names, tmp_path, {"seed": 0}, warnings.append)
    trackers.open(done)
    for step in range(done + 1, done + steps + 1):
        trackers.write(
            step, {"reward": float(step), "kl/k3": 0.5, "broken": float("nan"), "alarms": ["kl"], "frac_truncated": 0}
        )
        time.sleep(0.01)
    trackers.close()
    return warnings


def test_figures_arrive_in_order_under_trls_names_without_what_is_no_number(tmp_path, monkeypatch):
    listener = Listener(monkeypatch)
    assert follow(tmp_path, done=7) == []
    kept = {"kl": 0.5, "completions/clipped_ratio": 0.0}
    assert listener.records == [(step, {"reward": float(step), **kept}) for step in (8, 9, 10)]
    assert listener.done == 7 and listener.ended


@pytest.mark.parametrize("place", ["connect", "write", "close"])
@pytest.mark.parametrize(
    "fault", [OSError("no network"), SystemExit(3), KeyboardInterrupt()], ids=lambda fault: type(fault).__name__
)
def test_one_that_fails_is_named_once_and_left(tmp_path, monkeypatch, place, fault):
    def misbehave(where):
        if where == place:
            raise fault

    Listener(monkeypatch, misbehave)
    (warning,) = follow(tmp_path)
    assert warning.startswith(f"wandb gets no more figures: {type(fault).__name__}: {fault}".strip())
    assert warning.endswith("metrics.jsonl has them all")


@pytest.mark.parametrize("place", ["connect", "write", "close"])
def test_one_that_hangs_holds_nothing_up(tmp_path, monkeypatch, place):
    monkeypatch.setattr(grpo.runs.trackers, "ENDING", 0.2)
    free = threading.Event()
    Listener(monkeypatch, lambda where: free.wait() if where == place else None)
    start = time.monotonic()
    (warning,) = follow(tmp_path)
    free.set()
    assert "it has not ended after 0 s" in warning and time.monotonic() - start < 5


def test_two_that_hang_hold_up_no_longer_than_one(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo.runs.trackers, "ENDING", 1.0)
    free = threading.Event()
    Listener(monkeypatch, lambda where: free.wait() if where == "close" else None)
    monkeypatch.setattr(grpo.runs.trackers, "tensorboard", grpo.runs.trackers.wandb)
    trackers = Trackers("wandb,tensorboard", tmp_path, {}, lambda warning: None)
    trackers.open(0)
    start = time.monotonic()
    trackers.close()
    free.set()
    assert 1.0 <= time.monotonic() - start < 1.9 and not trackers.trackers


def test_one_that_falls_behind_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo.runs.trackers, "BEHIND", 5)
    free = threading.Event()
    Listener(monkeypatch, lambda where: free.wait() if where == "write" else None)
    (warning,) = follow(tmp_path, steps=20)
    free.set()
    assert "it is too slow" in warning


def test_others_go_on_where_one_fails(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")

    def misbehave(where):
        raise OSError("no network")

    Listener(monkeypatch, misbehave)
    assert len(follow(tmp_path, "wandb,tensorboard")) == 1
    events = read_events(tmp_path / "tensorboard")
    assert [(step, figure) for step, name, figure in events if name == "reward"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert {name for _, name, _ in events} == {"reward", "kl", "completions/clipped_ratio"}


def test_wandb_offline_keeps_the_figures_in_one_run_that_a_resumed_one_goes_on_with(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow(tmp_path) == []
    identity = (tmp_path / "wandb_id").read_text()
    assert follow(tmp_path, done=3) == []
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(runs) >= 1 and (tmp_path / "wandb_id").read_text() == identity
    deadline = time.monotonic() + 20  # another process writes the files
    while (
        not (written := all(b"completions/clipped_ratio" in run.read_bytes() for run in runs)) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert written


def test_what_cannot_be_tracked_is_said_at_the_door(monkeypatch):
    with pytest.raises(ConfigError, match="track 'mlflow' must be one of tensorboard, wandb"):
        Config(track="tensorboard,mlflow")
    monkeypatch.setattr(grpo.runs.trackers, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(ConfigError, match=r'track \'wandb\' needs the package wandb: pip install -e "\.\[wandb\]"'):
        check_installed("tensorboard,wandb")
    check_installed("tensorboard")
    check_installed("")
