"""What a script that computes with jax does around its work: compiled programs are cached, errors of memory are explained.

Exit codes are those of outcome.py; a run stopped by SIGINT or SIGTERM ends with 130 or 143.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from grpo.errors import RunError
from grpo.runs.distributed import is_main_process, leave
from grpo.runs.interrupts import Stopped
from grpo.runs.outcome import errors_as_exit_codes, print_result


def run_script(main: Callable[[list[str]], dict[str, Any]], argv: list[str], short: Sequence[str] = ()) -> None:
    """Run a script and print its result as one line of JSON; on a terminal only its keys in `short`, if there are any."""
    keep_compiled_programs()
    try:
        try:
            with errors_as_exit_codes(), memory_explained():
                result = main(argv)
        except Stopped as stopped:
            raise SystemExit(stopped.code) from None
    except BaseException as error:
        leave(error)
        raise
    if is_main_process():
        print_result(result, short)


@contextmanager
def memory_explained() -> Iterator[None]:
    """Out of memory, on a device or on the host, while compiling or running: one line with what XLA counted, and what helps."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        counted = str(error).strip().partition("\n")[0][:300] or "on the host"
        knobs = "raise microbatches, or lower group_size or max_new_tokens; checkpoints are as they were"
        raise RunError(f"out of memory ({counted}): {knobs}") from error


def keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache directory, so that a second start compiles nothing.

    JAX_COMPILATION_CACHE_DIR names another, JAX_ENABLE_COMPILATION_CACHE=0 does without.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "grpo-gemma"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
