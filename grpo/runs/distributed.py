"""Several processes as one run: each host starts the same script for its own devices, and all of them compute the same.

Samples come to every process (`models.sharding.fetch`); what may differ between hosts, such as a user's reward or the clock,
is process 0's word, which `agree` hands to the others. Process 0 writes the records; checkpoints are written by all.
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

# Seconds without a sign of life, after which a process is given up; seconds that those which are done wait for the others.
HEARTBEAT, SHUTDOWN = 30, 60


def join(config: Config) -> None:
    """Find the other processes, if there are any. Must come before anything else asks jax for devices."""
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
    """End this process with its error, if it is one of several, and do not wait for the others: they notice, and end too."""
    if not jax.distributed.is_initialized():
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        if "Gloo" in str(error):  # what a CPU says; elsewhere jax itself ends the process, and says why
            print(
                "error: another process of this run is gone; the same command goes on from the last checkpoint", file=sys.stderr
            )
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(1)  # process 0 is what the others would find missing: the last one to go
    os._exit(int(error.code or 0) if isinstance(error, SystemExit) else 1)


def is_main_process() -> bool:
    """Whether this process prints and writes the records."""
    return jax.process_index() == 0


def print_main(text: str) -> None:
    """Print a line, once for all processes."""
    if is_main_process():
        print(text, flush=True)


def broadcast_from_main(value: Any) -> Any:
    """Process 0's value, of the kind that JSON can hold, on every process."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if is_main_process() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(1 << (size - 1).bit_length(), np.uint8)  # few sizes: each is a program of its own
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer))[:size])


def all_processes(ok: bool) -> bool:
    """Whether it holds on every process."""
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(ok)).all())
