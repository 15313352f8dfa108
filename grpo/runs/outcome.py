"""How a script ends: errors that a user can act on as one line and an exit code, the result as one line of JSON. No jax.

Exit codes: 0 success; 2 a mistake of the user; 1 a run that cannot continue (one line) or a bug (a traceback). An output that
nobody can read any more, such as a closed pipe or a log on a full disk, ends no script.
"""

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from data import DataError
from grpo.errors import ConfigError, RunError
from grpo.runs.flags import fail
from models import ModelError

# What the file system may say of a path: a mistake of the user, or a machine that is at its end. Others are bugs of ours.
WRONG_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EROFS}
MACHINE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}


def run_main(main: Callable[[list[str]], dict[str, Any]], argv: list[str], short: Sequence[str] = ()) -> None:
    """Run a script that needs no jax, and print its result. `short`: see `print_result`."""
    with lasting_output():
        with errors_as_exit_codes():
            result = main(argv)
        print_result(result, short)


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """A ConfigError, DataError or ModelError ends the program with one line and exit code 2, a RunError with exit code 1.

    So does an error of the file system that names a file, with 2 where another path helps, and with 1 where the disk is full.
    """
    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        fail(str(error))
    except RunError as error:
        fail(str(error), code=1)
    except OSError as error:
        if error.filename is None or error.errno not in WRONG_PATH | MACHINE:
            raise
        path = str(error.filename)
        path = path if len(path) <= 400 else f"{path[:100]}... ({len(path)} characters)"
        fail(f"{path}: {error.strerror}", code=2 if error.errno in WRONG_PATH else 1)


def print_result(result: dict[str, Any], short: Sequence[str] = ()) -> None:
    """Print a result as one line of JSON. On a terminal, only its keys in `short`, if there are any."""
    if short and sys.stdout.isatty():
        result = {key: result[key] for key in short}
    print(json.dumps(result), flush=True)


@contextmanager
def lasting_output() -> Iterator[None]:
    """In this context, nothing that is printed raises: a character that an output does not have is escaped, and an output that
    fails is given up, with one warning on stderr.
    """
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = LastingOutput(sys.stdout, 1), LastingOutput(sys.stderr, 2)  # type: ignore[assignment]
    try:
        yield
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        sys.stdout, sys.stderr = former


class LastingOutput:
    """A text stream that goes to nowhere once it has failed. `number` is 1 for stdout and 2 for stderr."""

    def __init__(self, stream: TextIO | None, number: int):
        self.number = number
        self.stream = stream or self.nowhere()  # None: it was closed when Python started
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, method: str, *text: str) -> None:
        try:
            getattr(self.stream, method)(*text)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what is still buffered goes there too
            self.stream = self.nowhere()
            if self.number == 1:
                reason = getattr(error, "strerror", None) or error
                print(f"warning: standard output is gone ({reason}); nothing more is printed", file=sys.stderr, flush=True)

    def nowhere(self) -> TextIO:
        """A stream to nowhere. A descriptor that is free becomes one too: else the next file that is opened would get it."""
        try:
            os.fstat(self.number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.number)
        return open(os.devnull, "w")
