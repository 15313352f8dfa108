"""Metrics for other eyes: TensorBoard and Weights & Biases, beside the JSON lines, which stay the record.

Each has a thread of its own, which is given figures and asked for nothing. One that fails, hangs or falls behind is named in a
warning, and the run goes on without it. Names are TRL's where the meaning is the same. Left out: texts and pictures.
"""

import json
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grpo.config import TRACKERS
from grpo.errors import ConfigError

Figures = dict[str, float]
Write = Callable[[int, Figures], None]  # the figures of a step
Open = tuple[Write, Callable[[], None]]  # and how to end

BEHIND = 1000  # records that a tracker may not have taken yet
ENDING = 20.0  # seconds that all of them have to end

TRL = {  # ours -> TRL's name of the same figure; those that are not here have one name in both
    "kl/k3": "kl",
    "lr": "learning_rate",
    "clip/low": "clip_ratio/low_mean",
    "clip/high": "clip_ratio/high_mean",
    "frac_truncated": "completions/clipped_ratio",
    "logp_diff_sampler_trainer/mean": "sampling/sampling_logp_difference/mean",
    "logp_diff_sampler_trainer/max": "sampling/sampling_logp_difference/max",
    "time/step": "step_time",
}


def check_installed(names: str) -> None:
    """ConfigError where the package of one of `names` is missing."""
    for name in filter(None, names.split(",")):
        if find_spec(TRACKERS[name]) is None:
            raise ConfigError(f'track {name!r} needs the package {TRACKERS[name]}: pip install -e ".[{name}]"')


class Trackers:
    """What `names` lists ("tensorboard,wandb"), for a run in `folder`."""

    def __init__(self, names: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None]):
        self.names, self.folder, self.config, self.warn = list(filter(None, names.split(","))), folder, config, warn
        self.trackers: dict[str, Tracker] = {}

    def open(self, done: int) -> None:
        """Begin, or go on after step `done`."""
        connect = {"tensorboard": tensorboard, "wandb": wandb}
        self.trackers = {name: Tracker(connect[name], self.folder, self.config, done) for name in self.names}

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Finite numbers of a step; anything else that `figures` holds is left out."""
        numbers = {TRL.get(name, name): float(value) for name, value in figures.items() if is_number(value)}
        for name, tracker in [*self.trackers.items()]:
            try:
                tracker.records.put_nowait((step, numbers))
            except queue.Full:
                tracker.fault = tracker.fault or "it is too slow"
            if tracker.fault:
                self.give_up(name)

    def close(self) -> None:
        """Let them finish, all at once and for a while."""
        deadline = time.monotonic() + ENDING
        for tracker in self.trackers.values():
            tracker.end()
        for name, tracker in [*self.trackers.items()]:
            tracker.join(max(deadline - time.monotonic(), 0))
            if tracker.is_alive() or tracker.fault:
                self.give_up(name)

    def give_up(self, name: str) -> None:
        fault = self.trackers.pop(name).fault or f"it has not ended after {ENDING:.0f} s"
        self.warn(f"{name} gets no more figures: {' '.join(fault.split())[:300]}; metrics.jsonl has them all")


class Tracker(threading.Thread):
    """One back end, at its own pace."""

    def __init__(self, connect: Callable[[Path, dict[str, Any], int], Open], folder: Path, config: dict[str, Any], done: int):
        super().__init__(daemon=True)
        self.records: queue.Queue[tuple[int, Figures] | None] = queue.Queue(BEHIND)
        self.connect, self.arguments, self.fault = connect, (folder, config, done), ""
        self.start()

    def run(self) -> None:
        try:
            write, close = self.connect(*self.arguments)
            while (record := self.records.get()) is not None:
                write(*record)
            close()
        except BaseException as error:  # not even its SystemExit is the run's
            self.fault = f"{type(error).__name__}: {error}"

    def end(self) -> None:
        """There is nothing more to take."""
        if not self.records.full():
            self.records.put_nowait(None)


def tensorboard(folder: Path, config: dict[str, Any], done: int) -> Open:
    """RUN_DIR/tensorboard. Events of steps that a resumed run does again are hidden."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
    writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def write(step: int, figures: Figures) -> None:
        for name, figure in figures.items():
            writer.add_scalar(name, figure, step)

    return write, writer.close


def wandb(folder: Path, config: dict[str, Any], done: int) -> Open:
    """One run for the directory, whatever resumes it. WANDB_MODE=offline, WANDB_PROJECT and the like are as they always are."""
    import wandb

    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    settings = wandb.Settings(silent=True, console="off", init_timeout=60, login_timeout=10)
    run = wandb.init(
        id=identity.read_text(), resume="allow", name=folder.name, dir=str(folder), config=config, settings=settings
    )
    run.define_metric("*", step_metric="step")  # its own count would refuse the steps that a resumed run does again
    return lambda step, figures: run.log({"step": step, **figures}), run.finish


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
