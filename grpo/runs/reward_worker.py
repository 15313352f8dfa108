"""Reward functions of the user, in processes of their own: they may wait, print, raise, hang or crash, and the run continues.

    with UserRewards("brevity.py:brevity", workers=4) as rewards:
        rewards.score(texts, problems)          {"brevity": [-0.12, nan, ...]}, nan: no reward

Every worker holds all functions (grpo/runs/reward_process.py, which has their forms). Requests are lines of JSON in one pipe,
replies in another: [number of the request, row, outcome]. A line that answers no open request is ignored, so what a function
writes there, a child that it forks or a late reply cannot shift the others. A worker that takes too long is killed, and another
one started.
"""

import contextlib
import hashlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data.problems import Problem, completion_of
from grpo.errors import ConfigError, RunError
from grpo.reward import WEIGHTS
from grpo.runs.reward_process import GIVEN, Form, Outcome, Request

START_SECONDS = 300.0  # for the user's imports, which may be large
GRACE = 2.0  # seconds beyond its own that an asynchronous function has to be cancelled in
MAX_KILLS = 3  # of each worker in one call of `score`: a function that hangs for three rows hangs for most
MAX_LINE = 1 << 24  # bytes of a reply

START = Request(0, "", (0,), (), (), START_SECONDS)  # what a worker that imports is busy with


class UserRewards:
    """Reward functions by name, in `workers` processes.

    `timeout` is in seconds per row; a call for several rows at once has that for each. With `strict`, a row without a reward
    ends the run.
    """

    def __init__(self, spec: str = "", timeout: float = 10.0, strict: bool = False, workers: int = 1):
        self.files = find_functions(spec)
        self.names, self.timeout, self.strict = list(self.files), timeout, strict
        self.faults: Counter[tuple[str, str]] = Counter()  # by function and kind, over the whole run
        self.forms: dict[str, Form] = {}
        self.messages: set[str] = set()  # functions in TRL's form that expect conversations
        self.asked = 0  # requests so far
        self.workers: list[Worker] = []
        if self.names:
            self.workers = [Worker(self.files) for _ in range(workers)]
            try:
                while any(worker.request for worker in self.workers):
                    list(self.replies())
            except RunError as error:
                self.close()
                raise ConfigError(str(error)) from None
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "UserRewards":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.signal_end()
        for worker in self.workers:
            worker.stop()

    @property
    def fingerprint(self) -> str:
        """SHA-256 prefix (16 hex digits) of the reward files."""
        return reward_fingerprint(self.files)

    def check(self, problems: list[Problem]) -> None:
        """Before a run: whether functions in TRL's form get what they ask for. ConfigError if not.

        Each is called once with two completions of the first problem; if it fails with texts, with conversations.
        """
        columns = dict.fromkeys(name for problem in problems for name in problem.columns)
        for name, form in self.forms.items():
            if form.kind != "trl":
                continue
            missing = [need for need in form.needs if need not in (*GIVEN, *columns)]
            if missing:
                known = ", ".join(dict.fromkeys([*GIVEN, *columns]))
                raise ConfigError(
                    f"reward '{self.files[name]}:{name}': takes {', '.join(missing)}, no column of the data; there are {known}"
                )
            texts, asked = [completion_of(problems[0]) or "text"] * 2, problems[:1] * 2
            trial = self.request(name, [0, 1], texts, asked, 2 * self.timeout)
            reasons = []
            for messages in (False, True):
                found = [outcome for *_, outcome in self.outcomes(deque([replace(trial, messages=messages)]))]
                bad = next((o for o in found if "value" not in o and o.get("kind") != "value"), None)
                if bad is None:
                    self.messages |= {name} if messages else set()
                    break
                reasons.append(bad.get("reason") or f"gave {bad['wrong']}")
            else:
                raise ConfigError(f"reward '{self.files[name]}:{name}': fails when it is tried: it {reasons[0]}")

    def score(self, texts: list[str], problems: list[Problem]) -> dict[str, list[float]]:
        """The value of every function for every completion; nan where it gave none."""
        values = {name: [math.nan] * len(texts) for name in self.names}
        waiting, kills = deque(self.requests(texts, problems) if texts else []), Counter[int]()
        with closing(self.outcomes(waiting)) as outcomes:
            for request, row, outcome in outcomes:
                name, problem = request.function, problems[row]
                if "wrong" in outcome:
                    where = f" for problem {problem.id}" if self.forms[name].kind == "row" else ""
                    raise RunError(f"reward {name} gave {outcome['wrong']}{where}: must be {outcome['must']}")
                values[name][row] = outcome.get("value", math.nan)
                if "value" not in outcome:
                    self.report(name, problem, outcome)
                kills[request.number] |= "killed" in outcome
                if waiting and kills.total() == MAX_KILLS * len(self.workers):
                    left = len({row for request in waiting for row in request.rows})
                    print(f"warning: {kills.total()} rewards killed; {left} more rows are unscorable", file=sys.stderr)
                    waiting.clear()
        return values

    def requests(self, texts: list[str], problems: list[Problem]) -> Iterator[Request]:
        """What is asked of the workers: batches first, because they take longest, then rows in their order."""
        B, together = len(texts), [name for name in self.names if self.forms[name].kind != "row"]
        for name in together:
            yield self.request(name, range(B), texts, problems, self.timeout * B)
        for name in self.names:
            if name not in together and self.forms[name].asynchronous:
                parts = min(len(self.workers), B)
                for part in range(parts):
                    yield self.request(name, range(part, B, parts), texts, problems, self.timeout)
        for row in range(B):
            for name in self.names:
                if name not in together and not self.forms[name].asynchronous:
                    yield self.request(name, [row], texts, problems, self.timeout)

    def request(self, name: str, rows: Any, texts: list[str], problems: list[Problem], seconds: float) -> Request:
        self.asked += 1
        chosen = tuple(texts[row] for row in rows), tuple(problems[row] for row in rows)
        return Request(self.asked, name, tuple(rows), *chosen, seconds, name in self.messages)

    def outcomes(self, waiting: deque[Request]) -> Generator[tuple[Request, int, Outcome], None, None]:
        """Gives the requests to idle workers, in order, and yields what comes back, as it comes."""
        try:
            while waiting or any(worker.request not in (None, START) for worker in self.workers):
                for i, worker in enumerate(self.workers):
                    if waiting and not worker.alive:
                        self.workers[i] = worker = Worker(self.files)
                    if waiting and worker.request is None:
                        request = waiting.popleft()
                        form = self.forms[request.function]
                        worker.give(request, GRACE if form.asynchronous and form.kind == "row" else 0.0)
                yield from self.replies()
        except RunError as error:
            raise RunError(f"{error} (when restarted)") from None
        finally:
            for worker in self.workers:
                if worker.request not in (None, START):
                    worker.stop()

    def replies(self) -> Iterator[tuple[Request, int, Outcome]]:
        """What the workers say until the next one says something, or has taken too long."""
        busy = {worker.process.stdout.fileno(): worker for worker in self.workers if worker.request}  # type: ignore[union-attr]
        poll = select.poll()
        for fd, worker in busy.items():
            poll.register(fd, select.POLLIN)
            if worker.unsent:
                poll.register(worker.process.stdin.fileno(), select.POLLOUT)  # type: ignore[union-attr]
        left = max(0.0, min(worker.deadline for worker in busy.values()) - time.monotonic())
        ready = {fd for fd, _ in poll.poll(math.ceil(1000 * left))}
        for fd, worker in busy.items():
            worker.send()
            for request, row, outcome in worker.receive(fd in ready):
                if request is not START:
                    yield request, row, outcome
                elif "ready" in outcome:
                    self.forms = {name: Form(*form) for name, form in outcome["ready"].items()}
                else:
                    raise RunError(outcome.get("error") or f"reward {', '.join(self.names)}: the worker {outcome['reason']} "
                                   "while it imported")  # fmt: skip

    def report(self, name: str, problem: Problem, fault: Outcome) -> None:
        """Counts a fault, and prints the first of each kind."""
        line = f"reward {name} {fault['reason']} for problem {problem.id}"
        if self.strict:
            raise RunError(f"{line} (strict_rewards)")
        self.faults[name, fault["kind"]] += 1
        if self.faults[name, fault["kind"]] == 1:
            print(f"warning: {line}; such rows are left out\n{fault.get('traceback', '')}", end="", file=sys.stderr, flush=True)


class Worker:
    """A process that runs the functions: the request that it is busy with, and the bytes on their way to and from it."""

    def __init__(self, files: dict[str, str]):
        command = [sys.executable, "-P", "-u", "-m", "grpo.runs.reward_process", str(os.getpid()), json.dumps(files)]
        # It imports from the same paths, leaves the accelerator to us, and does not receive Ctrl-C.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=env, start_new_session=True)
        assert self.process.stdin
        os.set_blocking(self.process.stdin.fileno(), False)
        self.stop = weakref.finalize(self, stop, self.process)  # at the latest when this object or the program ends
        self.request: Request | None = START
        self.open = {0}  # rows of the request without an outcome
        self.deadline = time.monotonic() + START_SECONDS
        self.unsent, self.received, self.warned = b"", b"", False

    @property
    def alive(self) -> bool:
        return self.stop.alive

    def signal_end(self) -> None:
        """Ask it to end, without waiting."""
        with contextlib.suppress(ProcessLookupError):
            if self.alive:
                self.process.terminate()

    def give(self, request: Request, grace: float) -> None:
        """The worker is idle: let it work on a request."""
        self.request, self.open, self.deadline = request, set(request.rows), time.monotonic() + request.seconds + grace
        self.unsent = json.dumps(asdict(request)).encode() + b"\n"
        self.send()

    def send(self) -> None:
        """As much of the request as the pipe takes."""
        assert self.process.stdin
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # how it died is read from the other pipe
            while self.unsent:
                self.unsent = self.unsent[os.write(self.process.stdin.fileno(), self.unsent) :]

    def receive(self, ready: bool) -> Iterator[tuple[Request, int, Outcome]]:
        """The outcomes that have come; those of all open rows if the worker has died or its time is over."""
        assert self.process.stdout
        request, ended = self.request, False
        if request is None:
            return
        if ready:
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            ended = not data
            *lines, self.received = (self.received + data).split(b"\n")
            for line in filter(None, lines):
                if (found := self.outcome_in(line)) is None:
                    self.warn(line)
                    continue
                row, outcome = found
                self.open.discard(row)
                if not self.open:
                    self.request = None
                yield request, row, outcome
        if self.request is None or not (ended or time.monotonic() >= self.deadline or len(self.received) > MAX_LINE):
            return
        if ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2.0)  # what it died of
        self.stop()
        code = self.process.returncode
        died = f"died of {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
        rows, self.open, self.request = sorted(self.open), set(), None
        outcome = (
            {"kind": "death", "reason": died} if ended else {"kind": "timeout", "reason": f"took over {request.seconds} s"}
        )
        for row in rows:
            yield request, row, outcome | {"killed": True}

    def outcome_in(self, line: bytes) -> tuple[int, Outcome] | None:
        """(row, outcome) of a reply to the open request; None if the line is none."""
        try:
            number, row, outcome = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            return None
        fits = self.request and number == self.request.number and isinstance(row, int) and row in self.open
        return (row, outcome) if fits and isinstance(outcome, dict) else None

    def warn(self, line: bytes) -> None:
        """Once, that something else than a reply came through the pipe; a late reply is one."""
        if not self.warned and not line.startswith(b"["):
            self.warned = True
            text = line[:40].decode(errors="replace")
            print(
                f"warning: a reward writes {text!r} to a pipe that is not its own; it is ignored", file=sys.stderr, flush=True
            )


def reward_fingerprint(files: dict[str, str]) -> str:
    content = [(name, Path(path).read_bytes()) for name, path in files.items()]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def find_functions(spec: str) -> dict[str, str]:
    """`my.py:brevity,other.py:f` -> {"brevity": "my.py", "f": "other.py"}. Checks what can be checked without importing."""
    files: dict[str, str] = {}
    for name in filter(None, spec.split(",")):
        path, _, function = name.rpartition(":")
        if name.endswith(".py"):
            raise ConfigError(f"reward {name!r} names no function; give {name}:FUNCTION")
        if not Path(path).is_file():
            raise ConfigError(f"reward {name!r}: file {path!r} does not exist; give FILE.py:FUNCTION")
        if Path(path).suffix != ".py":
            raise ConfigError(f"reward {name!r}: {path!r} is no .py file; give FILE.py:FUNCTION")
        if function in {*WEIGHTS, "coin", *files}:
            raise ConfigError(f"reward {name!r}: the name {function!r} is taken; give the function another")
        files[function] = path
    return files


def stop(process: subprocess.Popen) -> None:
    """End the worker and all processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # already gone
        if sys.platform == "linux":
            process.terminate()  # it kills them, those in sessions of their own too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10.0)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]
