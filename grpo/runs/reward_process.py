"""The process that runs reward functions of the user. Its owner, and the protocol, are in grpo/runs/reward_worker.py.

    python -m grpo.runs.reward_process PARENT '{"brevity": "brevity.py"}'

A function has one of three forms, each also as `async def`:

    row      (completion, problem) -> number
    batch    (completions, problems) -> list of numbers
    trl      (completions, prompts, answer, ..., **columns) -> list of numbers; everything is a list, given by name

What its code prints goes to stderr. On Linux the functions run in a child of this process, which outlives it just long enough
to kill all that they have started, also in sessions of their own. This file imports nothing but the standard library, until the
user's file does.
"""

import contextlib
import ctypes
import importlib.util
import inspect
import json
import numbers
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, nan
from os import _exit, getpid, read, write  # by name: the user's code may replace what it finds in a module
from pathlib import Path
from traceback import extract_tb, format_exception
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.errors import ConfigError

if TYPE_CHECKING:
    import asyncio

LARGEST = 1e15  # of a value: its square must be a float32
FORMS = "(completion, problem), (completions, problems), or TRL's (completions, **columns)"
GIVEN = ("prompts", "completions", "id", "question", "answer", "solution")  # what TRL's form gets besides the data's columns
NO_PROBLEM = {"answer", "answers", "ground_truth", "gold", "label", "reference", "solution", "target"}
KILL_SECONDS = 5.0
TO_THREAD = 256  # calls by asyncio.to_thread that wait at the same time; by default they are about as many as cores

Outcome = dict[str, Any]  # {"value": 1.0}; {"kind", "reason", "traceback"}: no value; {"wrong", "must"}: ends the run


def own(name: str) -> Any:
    """A copy of a package that only this file has: the user's code may replace any part of the other one."""
    others = {found: sys.modules.pop(found) for found in [*sys.modules] if found.partition(".")[0] == name}
    mine = importlib.import_module(name)
    sys.modules.update(others)
    return mine


own_json = own("json")


class Form(NamedTuple):
    """How a function is called."""

    kind: str  # "row", "batch" or "trl"
    asynchronous: bool
    needs: tuple[str, ...] = ()  # trl: the names that it cannot do without
    takes: tuple[str, ...] | None = None  # trl: the names that it takes; None: all


@dataclass(frozen=True)
class Request:
    """A call of a function: for one completion, or for several at a time."""

    number: int  # its replies carry it
    function: str
    rows: Sequence[int]  # names of the completions, which the replies carry too
    texts: Sequence[str]
    problems: Sequence[Any]  # data.problems.Problem
    seconds: float  # most of the call; with an asynchronous row function, of each of its rows
    messages: bool = False  # trl: prompts and completions are conversations


def main(parent: int, files: dict[str, str]) -> None:
    if sys.platform == "linux":
        keep_worker(parent)
    me, source, sink = getpid(), os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.register_at_fork(after_in_child=lambda: [close(fd) for fd in (source, sink)])

    def reply(number: int, row: int, outcome: Outcome) -> None:
        if getpid() != me:  # the function has forked, and this is the child
            _exit(0)
        line = b"\n" + own_json.dumps([number, row, outcome]).encode() + b"\n"  # begins a line, whatever else was written
        while line:
            line = line[write(sink, line) :]

    try:
        functions = load(files)
        forms = {name: form_of(function, f"{files[name]}:{name}") for name, function in functions.items()}
    except ConfigError as error:
        return reply(0, 0, {"error": str(error)})
    reply(0, 0, {"ready": forms})
    for request in requests_from(source):
        answer(request, functions[request.function], forms[request.function], reply)


def close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def requests_from(source: int) -> Iterator[Request]:
    """A line of JSON each. Ends when the owner closes the pipe."""
    from data.problems import Problem

    parts: list[bytes] = []
    while data := read(source, 1 << 20):
        parts.append(data)
        if data.endswith(b"\n"):  # the owner waits for replies before it sends the next
            fields, parts = own_json.loads(b"".join(parts)), []
            yield Request(**fields | {"problems": tuple(Problem(**problem) for problem in fields["problems"])})


# ------------------------------------------------------------------------------------------------------- the user's functions


def load(files: dict[str, str]) -> dict[str, Callable[..., Any]]:
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
                at = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename.endswith(path)]
                line = f", line {at[-1]}" if at else ""
                raise ConfigError(f"reward '{path}:{function}': {path} fails: {describe(error)}{line}") from None
        functions[function] = getattr(modules[path], function, None)
        if not callable(functions[function]):
            raise ConfigError(f"reward '{path}:{function}': {path} has no function {function!r}")
    return functions


def form_of(function: Callable[..., Any], name: str) -> Form:
    """The form that the names of its parameters tell. ConfigError when it has none of the three."""
    asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin
        return Form("row", asynchronous)
    parameters = list(signature.parameters.values())
    names = [parameter.name for parameter in parameters]
    varied = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    fixed = [parameter for parameter in parameters if parameter.kind not in varied]
    needs = tuple(parameter.name for parameter in fixed if parameter.default is parameter.empty)
    shown = f"reward {name!r}: takes ({', '.join(map(str, parameters))})"
    if "problems" in names[1:2] and len(needs) <= 2:
        return Form("batch", asynchronous)
    if "completions" in names:
        if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in fixed):
            raise ConfigError(f"{shown[:200]}: its columns are given by name; leave out the /")
        takes = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else tuple(p.name for p in fixed)
        return Form("trl", asynchronous, needs, takes)
    try:
        signature.bind("", None)
    except TypeError:
        raise ConfigError(f"{shown[:200]}; give {FORMS}") from None
    if names[:1] == ["prompts"] or NO_PROBLEM & set(names[1:2]):
        raise ConfigError(f"{shown[:200]}; give {FORMS}; the gold answer of a problem is problem.answer")
    return Form("row", asynchronous)


def answer(request: Request, function: Callable[..., Any], form: Form, reply: Callable[[int, int, Outcome], None]) -> None:
    """Calls the function and replies once for each row."""
    if form.kind != "row":
        for row, outcome in zip(request.rows, batch_outcomes(request, function, form), strict=True):
            reply(request.number, row, outcome)
    elif form.asynchronous:
        event_loop().run_until_complete(answer_together(request, function, reply))
    else:
        for row, text, problem in zip(request.rows, request.texts, request.problems, strict=True):
            reply(request.number, row, attempt(lambda text=text, problem=problem: checked(finished(function(text, problem)))))


async def answer_together(request: Request, function: Callable[..., Any], reply: Callable[[int, int, Outcome], None]) -> None:
    """All rows of the request at the same time. A row that takes too long is cancelled, and others are not."""
    import asyncio  # takes half of a worker's start, and most functions do without

    async def one(text: str, problem: Any, row: int) -> None:
        try:
            outcome = checked(await function(text, problem))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            outcome = fault(error)
        reply(request.number, row, outcome)

    rows = {
        asyncio.ensure_future(one(text, problem, row)): row
        for row, text, problem in zip(request.rows, request.texts, request.problems, strict=True)
    }
    _, late = await asyncio.wait(rows, timeout=request.seconds)
    for task in late:
        task.cancel()
    for task in late:
        reply(request.number, rows[task], {"kind": "timeout", "reason": f"took over {request.seconds} s"})
    if late:
        await asyncio.wait(late, timeout=1.0)


def batch_outcomes(request: Request, function: Callable[..., Any], form: Form) -> list[Outcome]:
    """One call for all rows."""
    texts, problems = list(request.texts), list(request.problems)
    found: list[Any] = []

    def call() -> Outcome:
        given = (texts, problems) if form.kind == "batch" else ()
        named = trl_columns(texts, problems, form, request.messages) if form.kind == "trl" else {}
        values = finished(function(*given, **named))
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Sequence) or isinstance(values, str):
            return {"wrong": repr(values)[:80], "must": f"a list of {len(texts)} numbers"}
        if len(values) != len(texts):
            return {"wrong": f"a list of {len(values)}", "must": f"a list of {len(texts)} numbers"}
        found.extend(values)
        return {}

    outcome = attempt(call)
    return [checked(value) for value in found] if found and not outcome else [outcome] * len(texts)


def trl_columns(texts: list[str], problems: list[Any], form: Form, messages: bool) -> dict[str, list[Any]]:
    """What TRL gives: prompts, completions, and a list for each column of the data, None where a row has none."""
    columns: dict[str, list[Any]] = {"prompts": [problem.question for problem in problems], "completions": texts}
    if messages:
        for name, role in (("prompts", "user"), ("completions", "assistant")):
            columns[name] = [[{"role": role, "content": text}] for text in columns[name]]
    for name in GIVEN[2:]:
        columns[name] = [getattr(problem, name) for problem in problems]
    for name in {name: None for problem in problems for name in problem.columns if name not in ("prompts", "completions")}:
        columns[name] = [problem.columns.get(name) for problem in problems]
    if form.takes is None:
        return columns
    return {name: columns.get(name, [None] * len(texts)) for name in form.takes if name in columns or name in form.needs}


def attempt(call: Callable[[], Outcome]) -> Outcome:
    """What the call gives, or the reason why it gives nothing."""
    try:
        return call()
    except BaseException as error:  # sys.exit() too
        return fault(error)


def fault(error: BaseException) -> Outcome:
    """What the user's code has raised, with the traceback of its own frames."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    lines = "".join(format_exception(type(error), error, frames))
    return {"kind": type(error).__name__, "reason": f"raised {describe(error)}", "traceback": lines[-4000:]}


def checked(value: Any) -> Outcome:
    """A value as it is reported."""
    if value is not None and not isinstance(value, numbers.Real):
        return {"wrong": repr(value)[:80], "must": "a number"}
    try:
        number = nan if value is None else float(value)
    except OverflowError as error:
        return fault(error)
    if isfinite(number) and abs(number) > LARGEST:
        return {"kind": "value", "reason": f"gave {number}, beyond {LARGEST:g}"}
    return {"value": number} if isfinite(number) else {"kind": "value", "reason": f"gave {number}"}


def finished(value: Any) -> Any:
    """The value, of an asynchronous function after it has ended."""

    async def wait() -> Any:
        return await value

    return event_loop().run_until_complete(wait()) if inspect.isawaitable(value) else value


@cache
def event_loop() -> "asyncio.AbstractEventLoop":
    """One loop for all calls: what a function keeps, such as an open connection, stays usable."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    loop = asyncio.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(TO_THREAD))
    return loop


def describe(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero`, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# ------------------------------------------------------------------------------------------------------ Linux: nothing stays


def keep_worker(parent: int) -> None:
    """Returns in a child, the worker. This process waits for it, and then kills all that it has started.

    It ends when the worker ends, in the same way, or by SIGTERM, which it also gets when its parent (the thread that started
    it) dies. Orphans become its children, whatever session they are in, so that it finds them.
    """

    over = False  # whether it ends already: a second signal must not interrupt that

    def end(*_) -> None:
        nonlocal over
        if not over:
            over = True
            raise SystemExit(0)

    PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
    prctl = ctypes.CDLL(None).prctl
    signal.signal(signal.SIGTERM, end)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        raise SystemExit
    me, worker = os.getpid(), os.fork()
    if worker == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != me:
            os._exit(0)
        return
    status = 0
    try:
        close(0)
        close(1)
        while (ended := os.waitpid(-1, 0))[0] != worker:
            pass
        status, over = ended[1], True
    except SystemExit:
        pass
    kill_children()
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker has left a core, if there is to be one
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(me, number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


def kill_children() -> None:
    """Kill all descendants: children of children become children when those die."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        for pid in children_of(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def children_of(parent: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    yield int(entry.name)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
