"""Reward functions of the user, in a separate process: they may print, raise, hang or crash, and the run continues.

    with UserRewards("brevity.py:brevity") as rewards:
        rewards.score(texts, problems)          {"brevity": [-0.12, nan, ...]}, nan: no reward

One worker process holds all functions. Requests and replies are lines of JSON over two pipes, one reply per request. A worker
that takes too long is killed and restarted. This file has both sides: `main` runs in the worker, which imports no jax.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import math
import numbers
import os
import select
import signal
import subprocess
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.problems import Problem
from grpo.errors import ConfigError, RunError
from grpo.reward import WEIGHTS

START_SECONDS = 300.0  # for the user's imports, which may be large
MAX_KILLS = 3  # in one call of `score`: a function that hangs for three rows hangs for most


class UserRewards:
    """Reward functions by name. `timeout` is in seconds per row. With `strict`, a row without a reward ends the run."""

    def __init__(self, spec: str = "", timeout: float = 10.0, strict: bool = False):
        self.files = find_functions(spec)
        self.names, self.timeout, self.strict = list(self.files), timeout, strict
        self.faults: Counter[tuple[str, str]] = Counter()  # by function and kind, over the whole run
        self.stop: weakref.finalize | None = None
        if self.names:
            self.start()

    def __enter__(self) -> "UserRewards":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self.stop:
            self.stop()

    @property
    def fingerprint(self) -> str:
        """SHA-256 prefix (16 hex digits) of the reward files."""
        content = [(name, Path(path).read_bytes()) for name, path in self.files.items()]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def start(self) -> None:
        """Start the worker and wait until it has imported the user's files."""
        command = [sys.executable, "-P", "-u", "-m", "grpo.runs.reward_worker", str(os.getpid()), json.dumps(self.files)]
        # The worker imports from the same paths, leaves the accelerator to us, and does not receive Ctrl-C.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True)
        self.stop = weakref.finalize(self, stop, self.process)  # at the latest when this object or the program ends
        reply = self.read(START_SECONDS)
        if "killed" in reply:
            raise ConfigError(f"reward {', '.join(self.names)}: the worker {reply['reason']} while it imported")
        if "error" in reply:
            self.close()
            raise ConfigError(reply["error"])

    def score(self, texts: list[str], problems: list[Problem]) -> dict[str, list[float]]:
        """The value of every function for every completion; nan where it returned none."""
        values = {name: [math.nan] * len(texts) for name in self.names}
        kills = 0
        for b, (text, problem) in enumerate(zip(texts, problems, strict=True)):
            for name in self.names:
                reply = self.ask({"function": name, "text": text, "problem": asdict(problem)})
                if "wrong" in reply:
                    raise RunError(f"reward {name} gave {reply['wrong']} for problem {problem.id}: must be a number")
                values[name][b] = reply.get("value", math.nan)
                if "value" not in reply:
                    self.report(name, problem, reply)
                kills += "killed" in reply
                if kills == MAX_KILLS:
                    print(
                        f"warning: {kills} rewards killed; the other {len(texts) - b - 1} rows are unscorable", file=sys.stderr
                    )
                    return values
        return values

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if not (self.stop and self.stop.alive):
                self.start()
            assert self.process.stdin
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            return self.read(self.timeout)
        except ConfigError as error:
            raise RunError(f"{error} (when restarted)") from None
        except BrokenPipeError:
            return self.read(self.timeout)  # how it died
        except BaseException:
            self.close()  # a late reply would be taken for the next row's
            raise

    def read(self, seconds: float) -> dict[str, Any]:
        """The worker's next line. If it times out or has died, the worker is stopped and the reply says so."""
        stdout = self.process.stdout
        assert stdout
        poll = select.poll()  # nothing is buffered on our side: one reply per request
        poll.register(stdout, select.POLLIN)
        ready = poll.poll(1000 * seconds)
        line = stdout.readline() if ready else b""
        if line.endswith(b"\n"):
            return json.loads(line)
        self.close()
        code = self.process.returncode
        died = f"died of {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
        return {"kind": "death" if ready else "timeout", "reason": died if ready else f"took over {seconds} s", "killed": True}

    def report(self, name: str, problem: Problem, fault: dict[str, Any]) -> None:
        """Counts a fault, and prints the first of each kind."""
        line = f"reward {name} {fault['reason']} for problem {problem.id}"
        if self.strict:
            raise RunError(f"{line} (strict_rewards)")
        self.faults[name, fault["kind"]] += 1
        if self.faults[name, fault["kind"]] == 1:
            print(f"warning: {line}; such rows are left out\n{fault.get('traceback', '')}", end="", file=sys.stderr, flush=True)


def find_functions(spec: str) -> dict[str, str]:
    """`my.py:brevity,other.py:f` -> {"brevity": "my.py", "f": "other.py"}. Checks what can be checked without importing."""
    files: dict[str, str] = {}
    for name in filter(None, spec.split(",")):
        path, _, function = name.rpartition(":")
        if not Path(path).is_file():
            raise ConfigError(f"reward {name!r}: file {path!r} does not exist; give FILE.py:FUNCTION")
        if Path(path).suffix != ".py":
            raise ConfigError(f"reward {name!r}: {path!r} is no .py file; give FILE.py:FUNCTION")
        if function in {*WEIGHTS, "coin", *files}:
            raise ConfigError(f"reward {name!r}: the name {function!r} is taken; give the function another")
        files[function] = path
    return files


def stop(process: subprocess.Popen) -> None:
    """Kill the worker and all processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # already gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------ inside the worker


def main(parent: int, files: dict[str, str]) -> None:
    die_with(parent)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(
        os.open(os.devnull, os.O_RDONLY), 0
    )  # the pipes carry only our messages: what the user's code prints goes to stderr
    os.dup2(2, 1)

    def reply(record: dict[str, Any]) -> None:
        replies.write(json.dumps(record).encode() + b"\n")
        replies.flush()

    try:
        functions = load(files)
    except ConfigError as error:
        return reply({"error": str(error)})
    reply({"ready": True})
    for line in requests:  # ends when the parent does, which holds the other end
        request = json.loads(line)
        reply(call(functions[request["function"]], request["text"], Problem(**request["problem"])))


def die_with(parent: int) -> None:
    """On Linux this process is killed when its parent (the thread that started it) dies; elsewhere it ends at its next read."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            raise SystemExit


def load(files: dict[str, str]) -> dict[str, Callable[[str, Problem], Any]]:
    """Import each file once and look its functions up."""
    modules: dict[str, Any] = {}
    functions = {}
    for function, path in files.items():
        if path not in modules:
            module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
            assert module_spec and module_spec.loader
            modules[path] = importlib.util.module_from_spec(module_spec)
            try:
                module_spec.loader.exec_module(modules[path])
            except BaseException as error:
                at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
                line = f", line {at[-1]}" if at else ""
                raise ConfigError(f"reward '{path}:{function}': {path} fails: {describe(error)}{line}") from None
        functions[function] = getattr(modules[path], function, None)
        if not callable(functions[function]):
            raise ConfigError(f"reward '{path}:{function}': {path} has no function {function!r}")
    return functions


def call(function: Callable[[str, Problem], Any], text: str, problem: Problem) -> dict[str, Any]:
    """The value of the function, or the reason why there is none."""
    try:
        value = function(text, problem)
        if value is not None and not isinstance(value, numbers.Real):
            return {"wrong": repr(value)[:80]}
        value = math.nan if value is None else float(value)
    except BaseException as error:  # sys.exit() too
        ours = error.__traceback__.tb_next if error.__traceback__ else None
        lines = "".join(traceback.format_exception(type(error), error, ours))
        return {"kind": type(error).__name__, "reason": f"raised {describe(error)}", "traceback": lines[-4000:]}
    return {"value": value} if math.isfinite(value) else {"kind": "value", "reason": f"gave {value}"}


def describe(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero`, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
