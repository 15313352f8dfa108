"""Signals and time limits: a run that is asked to stop saves at the next safe point and exits with the code of the signal.

A single process installs its own handlers. With several processes, jax's coordinator notices a SIGTERM to any of them and
chooses a step after which all stop.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

from grpo.runs.distributed import broadcast_from_main

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """The run was asked to stop; nothing is lost. `code` is 128 + the signal, such as 143, or 0 when `max_hours` are over.

    A BaseException like KeyboardInterrupt: it may be raised anywhere, and no `except Exception` catches it by mistake.
    """

    def __init__(self, reason: str, code: int):
        super().__init__(reason)
        self.code = code


class Interrupts:
    """Context in which SIGINT, SIGTERM and SIGHUP raise `Stopped`: at once, or inside `held` when `check` is called.

    A SIGHUP that is ignored stays so: `nohup` ignores it. SIGINT is heard even if ignored, as a shell does to what it starts in
    the background.
    """

    def __init__(self, max_hours: float):
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self.asked = 0  # the signal that came
        self.holding = False
        self.former: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                    self.former[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def handle(self, number: int, _) -> None:
        if self.asked:  # the second signal ends the process at once
            os._exit(128 + number)
        self.asked = number
        if not self.holding:
            self.stop()

    def stop(self) -> None:
        raise Stopped(signal.Signals(self.asked).name, 128 + self.asked)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside this context a signal waits for `check` or for the end of the context."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.asked:
            self.stop()

    def due(self, step: int) -> bool:
        """Whether the run has to stop after `step`: the same answer on every process."""
        if jax.process_count() > 1:
            late = broadcast_from_main(time.monotonic() > self.deadline)
            return multihost_utils.reached_preemption_sync_point(step) or late
        return bool(self.asked) or time.monotonic() > self.deadline

    def check(self) -> None:
        """Raise `Stopped` with the reason why `due` is true."""
        if self.asked:
            self.stop()
        late = broadcast_from_main(time.monotonic() > self.deadline)
        raise Stopped("max_hours" if late else "SIGTERM", 0 if late else 128 + signal.SIGTERM)
