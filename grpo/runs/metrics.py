"""The record of a run: one JSON object a line in files that a resumed run continues, and what a person sees meanwhile.

Left out: TensorBoard and the like (trackers.py); pictures, which are drawn from these files.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax

from grpo.config import RunError
from grpo.runs.distributed import broadcast_from_main, is_main_process


class JsonLines:
    """A file of one JSON object a line. Opening it for a resumed run drops what lies after `step`; None keeps all.

    Process 0 writes; every process remembers the records that were there before, and those that `write` adds.
    """

    def __init__(self, path: Path, step: int | None, remember: bool = True):
        self.path = path
        kept, whole = self.read(step) if is_main_process() else ([], True)
        if is_main_process() and not (whole and path.exists()):
            rewrite(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        self.records: list[dict[str, Any]] = broadcast_from_main(kept if remember else [])

    def read(self, step: int | None) -> tuple[list[dict[str, Any]], bool]:
        """The records up to `step`, and whether the file holds nothing else, such as a torn last line."""
        kept: list[dict[str, Any]] = []
        text = self.path.read_text("utf-8", errors="replace") if self.path.is_file() else ""
        lines = text.split("\n")  # not splitlines: a completion may hold U+2028
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = json.loads(line)
                kept += [record] if step is None or record["step"] <= step else []
            except (ValueError, KeyError, TypeError):
                print(f"warning: {self.path}:{number} is no record, and is left out", file=sys.stderr, flush=True)
        return kept, len(kept) == len(lines) - 1 and not lines[-1]

    def write(self, record: dict[str, Any]) -> None:
        """Add one record, and remember it as a resumed run would read it."""
        self.write_all([record])
        self.records.append(strict(record))

    def write_all(self, records: list[dict[str, Any]]) -> None:
        if is_main_process():
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(strict(record), ensure_ascii=False) + "\n" for record in records)
            except OSError as error:
                raise RunError(f"{self.path} cannot be written: {error.strerror}") from None


def rewrite(path: Path, text: str) -> None:
    """Replace a file as a whole: there is always the old one or the new one."""
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.replace(path)


def strict(value: Any) -> Any:
    """NaN and infinities become null: JSON has no others."""
    if isinstance(value, dict):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, list):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CompileCounter:
    """How many programs XLA has compiled in this process: more after the first step means a shape that changes.

    What came from the cache of compiled programs does not count.
    """

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.add)
        jax.monitoring.register_event_listener(self.subtract)

    def add(self, event: str, duration_secs: float, **_) -> None:
        self.count += event.endswith("backend_compile_duration")

    def subtract(self, event: str, **_) -> None:
        self.count -= event.endswith("compilation_cache/cache_hits")


class Progress:
    """One line a step: rewritten in place on a terminal, else printed."""

    def __init__(self, steps: int):
        self.steps, self.first, self.start = steps, 0, 0.0
        self.terminal = sys.stdout.isatty()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if not self.first:  # the first step compiles: the time left is judged by the others
            self.first, self.start = step, now
        pace = (now - self.start) / max(step - self.first, 1)
        left = f"{clock((self.steps - step) * pace)} left" if step > self.first else "compiled"
        line = (
            f"step {step}/{self.steps}  reward {metrics['reward']:6.2f}  accuracy {metrics['accuracy']:5.1%}  "
            f"length {metrics['completions/mean_length']:5.1f}  kl {metrics.get('kl/k3', 0):.4f}  "
            f"{metrics['time/step']:.2f} s  {left}"
        )
        last = step == self.steps
        print("\r\x1b[K" + line if self.terminal else line, end="" if self.terminal and not last else "\n", flush=True)

    def warn(self, line: str) -> None:
        print("\n" * self.terminal + f"warning: {line}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """`3:07` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
