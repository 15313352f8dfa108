"""Log metrics to TensorBoard and Weights & Biases, in addition to the JSON lines, which remain the record.

Each tracker has its own thread. A tracker that fails, hangs or falls behind is named in a warning, and the run continues
without it. Names are those of TRL where the meaning is the same. Texts and pictures are not logged.
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
from grpo.reports.jsonl import rewrite

Figures = dict[str, float]
Write = Callable[[int, Figures], None]  # the figures of a step
Open = tuple[Write, Callable[[], None]]  # and how to end

BEHIND = 1000  # most records that a tracker may lag behind
ENDING = 20.0  # seconds that all trackers together have to finish

TRL = {  # our name -> TRL's name of the same figure; other figures have the same name in both
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
    """The trackers in `names` ("tensorboard,wandb"), for a run in `folder`."""

    def __init__(self, names: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None]):
        self.names, self.folder, self.config, self.warn = list(filter(None, names.split(","))), folder, config, warn
        self.trackers: dict[str, Tracker] = {}

    def open(self, done: int) -> None:
        """Start, or continue after step `done`."""
        connect = {"tensorboard": tensorboard, "wandb": wandb}
        self.trackers = {name: Tracker(connect[name], self.folder, self.config, done) for name in self.names}

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Log the finite numbers of a step; other values in `figures` are ignored."""
        numbers = {TRL.get(name, name): float(value) for name, value in figures.items() if is_number(value)}
        for name, tracker in [*self.trackers.items()]:
            try:
                tracker.records.put_nowait((step, numbers))
            except queue.Full:
                tracker.fault = tracker.fault or "it is too slow"
            if tracker.fault:
                self.give_up(name)

    def close(self) -> None:
        """Wait until all trackers have finished, at most `ENDING` seconds."""
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
    """The thread of one tracker."""

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
        except BaseException as error:  # not even its SystemExit may end the run
            self.fault = f"{type(error).__name__}: {error}"

    def end(self) -> None:
        """No more records will come."""
        if not self.records.full():
            self.records.put_nowait(None)


def tensorboard(folder: Path, config: dict[str, Any], done: int) -> Open:
    """RUN_DIR/tensorboard. Events of steps that a resumed run repeats are hidden."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
    writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def write(step: int, figures: Figures) -> None:
        for name, figure in figures.items():
            writer.add_scalar(name, figure, step)

    return write, writer.close


def wandb(folder: Path, config: dict[str, Any], done: int) -> Open:
    """One run per directory, also when it is resumed. WANDB_MODE, WANDB_PROJECT and the other variables work as usual."""
    import wandb

    identity = folder / "wandb_id"
    if not identity.exists():
        rewrite(identity, secrets.token_hex(4))
    settings = wandb.Settings(silent=True, console="off", init_timeout=60, login_timeout=10)
    run = wandb.init(
        id=identity.read_text(), resume="allow", name=folder.name, dir=str(folder), config=config, settings=settings
    )
    run.define_metric("*", step_metric="step")  # W&B's own step counter would refuse the steps that a resumed run repeats
    return lambda step, figures: run.log({"step": step, **figures}), run.finish


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
