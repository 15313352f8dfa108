"""What a script that computes with jax does around its work: compiled programs are cached, errors of devices are explained.

Exit codes are those of outcome.py; a run stopped by SIGINT, SIGTERM or SIGHUP ends with 130, 143 or 129.
"""

import glob
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

from grpo.errors import ConfigError, RunError
from grpo.runs.distributed import is_main_process, leave
from grpo.runs.interrupts import Stopped
from grpo.runs.outcome import errors_as_exit_codes, lasting_output, print_result


def run_script(main: Callable[[list[str]], dict[str, Any]], argv: list[str], short: Sequence[str] = ()) -> None:
    """Run a script and print its result as one line of JSON; on a terminal only its keys in `short`, if there are any."""
    keep_compiled_programs()
    with lasting_output():
        try:
            try:
                with errors_as_exit_codes(), device_errors_explained():
                    result = main(argv)
            except Stopped as stopped:
                raise SystemExit(stopped.code) from None
        except BaseException as error:
            leave(error)
            raise
        if is_main_process():
            print_result(result, short)
        leave()


@contextmanager
def device_errors_explained() -> Iterator[None]:
    """One line for a machine without the devices that were asked for, and for a lack of memory on a device or on the host,
    while compiling or running: with what jax or XLA says, and what helps.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        counted = str(error).strip().partition("\n")[0][:300] or "on the host"
        knobs = "raise microbatches, or lower group_size or max_new_tokens; checkpoints are as they were"
        raise RunError(f"out of memory ({counted}): {knobs}") from error
    except (RuntimeError, AssertionError) as error:  # jax has no type for it, and for JAX_PLATFORMS=cuda no text either
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).name != "xla_bridge.py":
            raise
        asked, said = os.environ.get("JAX_PLATFORMS"), str(error).partition(" (set JAX_PLATFORMS")[0]
        reason = f"JAX_PLATFORMS={asked}: no such device can be used here" if asked else "no device can be used here"
        raise ConfigError(
            f'{reason}{f" ({said})" if said else ""}; pip install -e ".[tpu]" or ".[cuda]" where there is one, or '
            f"JAX_PLATFORMS=cpu"
        ) from None


def keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache directory, so that a second start compiles nothing.

    JAX_COMPILATION_CACHE_DIR names another, JAX_ENABLE_COMPILATION_CACHE=0 does without.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "grpo-gemma"))
    if not isinstance(warnings.showwarning, partial):
        warnings.showwarning = partial(replace_unreadable, warnings.showwarning)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def replace_unreadable(show: Callable[..., None], message: Warning | str, *rest: Any, **named: Any) -> None:
    """jax warns of an entry of the cache that it cannot read, such as one that a kill has torn, and compiles the program, but
    would never replace the entry. Without it, it writes a new one.
    """
    unreadable = re.match(r"Error reading persistent compilation cache entry for '([\w.<>-]+)'", str(message))
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not unreadable or not cache:
        return show(message, *rest, **named)
    for entry in Path(cache).glob(f"{glob.escape(unreadable[1])}-*-cache"):
        with suppress(OSError):
            entry.unlink()
