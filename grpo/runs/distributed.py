"""Several processes as one run: each host starts the same script for its own devices, and all of them compute the same.

Samples are gathered on every process (`models.sharding.to_host`). What may differ between hosts, such as a user's reward or
the clock, is broadcast from process 0 (`broadcast_from_main`). Process 0 writes the records; all processes write checkpoints.
"""

import json
import os
import sys
import time
import traceback
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from grpo.config import Config
from grpo.errors import ConfigError

# Seconds without a heartbeat after which a process counts as lost; seconds that finished processes wait for the others.
HEARTBEAT, SHUTDOWN = 30, 60


def join(config: Config) -> None:
    """Connect to the other processes, if there are any. Must be called before anything else asks jax for devices."""
    if not config.coordinator:
        if config.processes > 1:
            raise ConfigError(f"processes {config.processes} need a coordinator: HOST:PORT of process 0, or auto")
        return
    if config.coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN)
        return
    if config.process_id >= config.processes:
        raise ConfigError(f"process_id {config.process_id} must be below processes {config.processes}")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"coordinator {config.coordinator!r} cannot be reached: {str(error).splitlines()[0]}") from None


def leave(error: BaseException) -> None:
    """If this process is one of several, end it with its error without waiting for the others, which notice and end too."""
    if not jax.distributed.is_initialized():
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        if "Gloo" in str(error):  # the message on a CPU; elsewhere jax itself ends the process with a message
            print(
                "error: another process of this run is gone; the same command continues from the last checkpoint",
                file=sys.stderr,
            )
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(1)  # the others notice when process 0 is missing: it leaves last
    os._exit(int(error.code or 0) if isinstance(error, SystemExit) else 1)


def is_main_process() -> bool:
    """Whether this process prints and writes the records."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0  # alone, it needs no device to know


def print_main(text: str) -> None:
    """Print a line on the main process only."""
    if is_main_process():
        print(text, flush=True)


def broadcast_from_main(value: Any) -> Any:
    """The value that process 0 has, on every process. It must be JSON."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if is_main_process() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(1 << (size - 1).bit_length(), np.uint8)  # powers of two: every size compiles a program
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer))[:size])


def all_processes(ok: bool) -> bool:
    """Whether `ok` is true on every process."""
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(ok)).all())
