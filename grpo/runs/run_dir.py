"""The directory of a run: made, locked for one process, and checked against the settings of the run that it holds."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from grpo.config import Config, current_names
from grpo.errors import ConfigError
from grpo.reports.jsonl import parse_json
from grpo.runs.distributed import broadcast_from_main, is_main_process

# A path may change, not what it leads to: that has a fingerprint (grpo/runs/resume.py).
FREE_TO_CHANGE = {field.name for field in fields(Config) if field.metadata["free"]}

LOCK = ".lock"


def run_dir(config: Config) -> Path:
    return Path(config.run_dir or f"runs/{config.preset}-seed{config.seed}")


@contextmanager
def open_run_dir(config: Config) -> Iterator[Path]:
    """The run's directory, created if needed and locked for this process.

    Raises ConfigError when it holds a run with other settings, is in use, or cannot be used.
    """
    folder, fault, lock = run_dir(config), "", None
    if is_main_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder)
            if (folder / "config.json").exists():
                check_settings(dict(parse_json((folder / "config.json").read_text("utf-8"))), config, folder)
        except ConfigError as error:
            fault = str(error)
        except (OSError, ValueError, TypeError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            fault = f"run_dir {folder} cannot be used: {reason}; give another --run_dir"
    fault = broadcast_from_main(fault)
    try:
        if fault:
            raise ConfigError(fault)
        yield folder
    finally:
        if lock is not None:
            os.close(lock)


def take_lock(folder: Path) -> int:
    """An open file that this process holds locked until it ends, however it ends. ConfigError when another process has it."""
    import fcntl  # not on Windows

    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 200).decode(errors="replace")
        os.close(lock)
        raise ConfigError(f"{folder} is in use by {owner or 'another process'}; wait, or give another") from None
    if not (folder / LOCK).exists() or not os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
        os.close(lock)
        raise ConfigError(f"{folder} was in use until now; try again")  # the folder was renamed, or its lock removed
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def check_settings(saved: dict[str, Any], config: Config, where: Path) -> None:
    """ConfigError that names the settings which affect the result and differ from those of the run in `where`."""
    saved = current_names(saved)
    now, allowed = asdict(config), FREE_TO_CHANGE | {*config.allow_change.split(",")}
    if config.schedule == "run":
        allowed -= {"max_steps", "epochs"}  # they, and the number of sessions, determine how long the cosine is
    else:
        allowed |= {"sessions"}
    defaults = {field.name: field.default for field in fields(Config)}
    differing = [name for name in now if name not in allowed and saved.get(name, defaults[name]) != now[name]]
    if differing:
        changes = ", ".join(f"{name} {saved.get(name, defaults[name])!r} -> {now[name]!r}" for name in differing)
        raise ConfigError(
            f"{where} holds a run with other settings ({changes}); use another --run_dir, the same settings, or --allow_change"
        )
