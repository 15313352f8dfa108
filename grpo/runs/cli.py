"""What every script does around its work: the user's mistakes end in one line, the result in one line of JSON.

Exit codes: 0 done, 2 the user's mistake, 1 a run that cannot go on (one line) or our own mistake (a traceback), 130 and 143
stopped by SIGINT and SIGTERM.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from data import DataError
from grpo.errors import ConfigError, RunError
from grpo.runs.distributed import leave, print_main
from grpo.runs.flags import fail
from grpo.runs.interrupts import Stopped
from models import ModelError


def run_script(main: Callable[[list[str]], dict[str, Any]], argv: list[str]) -> None:
    if getattr(sys.modules["__main__"], "main", None) is main:  # this process is that script, and nobody's notebook
        use_huge_pages()
    keep_compiled_programs()
    try:
        try:
            with memory_explained():
                result = main(argv)
        except (ConfigError, DataError, ModelError) as error:
            fail(str(error))
        except RunError as error:
            fail(str(error), code=1)
        except Stopped as stopped:
            raise SystemExit(stopped.code) from None
    except BaseException as error:
        leave(error)
        raise
    print_main(json.dumps(result))


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


def use_huge_pages() -> None:
    """Start this program once more, its arrays in huge pages that stay its own: a quarter off an update on a CPU.

    A step on a CPU allocates gigabytes and frees them again; page by page, the kernel takes as long as the arithmetic. One
    arena for all threads, as the others are too small for large arrays and would give them back.
    Whoever sets GLIBC_TUNABLES, to whatever value, keeps it. Without glibc the variable means nothing.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        never = str(2**40)
        tunables = {"hugetlb": "1", "arena_max": "1", "mmap_threshold": never, "trim_threshold": never}
        os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables.items())
        sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)


def keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache directory, so that a second start compiles nothing.

    JAX_COMPILATION_CACHE_DIR names another, JAX_ENABLE_COMPILATION_CACHE=0 does without.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "grpo-gemma"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
