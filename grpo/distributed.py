"""Several processes as one run: each host starts the same script for its own devices, and all of them compute the same.

Samples come to every process (`models.sharding.fetch`); what may differ between hosts, such as a user's reward or the clock,
is process 0's word, which `agree` hands to the others. Process 0 writes the records; checkpoints are written by all.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from grpo.config import Config, ConfigError

HEARTBEAT = 30  # seconds without a sign of life, after which a process is given up and the others stop


def join(config: Config) -> None:
    """Find the other processes, if there are any. Must come before anything else asks jax for devices."""
    if not config.coordinator:
        if config.processes > 1:
            raise ConfigError(f"processes {config.processes} need a coordinator: HOST:PORT of process 0, or auto")
        return
    if config.coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        return
    if config.process_id >= config.processes:
        raise ConfigError(f"process_id {config.process_id} must be below processes {config.processes}")
    try:
        jax.distributed.initialize(config.coordinator, config.processes, config.process_id, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"coordinator {config.coordinator!r} cannot be reached: {str(error).splitlines()[0]}") from None


def is_first() -> bool:
    """Whether this process prints and writes the records."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def agree(value: Any) -> Any:
    """Process 0's value, of the kind that JSON can hold, on every process."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer)).decode())


def everywhere(ok: bool) -> bool:
    """Whether it holds on every process."""
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(ok)).all())
