"""How a script ends: errors that a user can act on as one line and an exit code, the result as one line of JSON. No jax.

Exit codes: 0 success; 2 a mistake of the user; 1 a run that cannot continue (one line) or a bug (a traceback).
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data import DataError
from grpo.errors import ConfigError, RunError
from grpo.runs.flags import fail
from models import ModelError


def run_main(main: Callable[[list[str]], dict[str, Any]], argv: list[str], short: Sequence[str] = ()) -> None:
    """Run a script that needs no jax, and print its result. `short`: see `print_result`."""
    with errors_as_exit_codes():
        result = main(argv)
    print_result(result, short)


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """A ConfigError, DataError or ModelError ends the program with one line and exit code 2, a RunError with exit code 1."""
    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        fail(str(error))
    except RunError as error:
        fail(str(error), code=1)


def print_result(result: dict[str, Any], short: Sequence[str] = ()) -> None:
    """Print a result as one line of JSON. On a terminal, only its keys in `short`, if there are any."""
    if short and sys.stdout.isatty():
        result = {key: result[key] for key in short}
    print(json.dumps(result), flush=True)
