"""Several processes as one run: each host starts the same script for its own devices, and all of them compute the same.

Samples are gathered on every process (`models.sharding.to_host`). What may differ between hosts, such as a user's reward or
the clock, is broadcast from process 0 (`broadcast_from_main`). Process 0 writes the records; all processes write checkpoints.
"""

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from grpo.errors import ConfigError
from grpo.runs.hub import first_line
from grpo.runs.peers import GONE, WAIT, Watch, meet, split_address
from models.sharding import TRAIN, Rules, spec

# Seconds without a heartbeat after which jax ends all processes, if peers.py has not; seconds that finished processes wait for
# the others.
HEARTBEAT, SHUTDOWN = 100, 60
SAID = 2**15  # bytes that each process says of itself in `check_same`

watch: Watch | None = None


def join(coordinator: str, processes: int, process_id: int) -> None:
    """Connect to the other processes, if there are any. Must be called before anything else asks jax for devices."""
    global watch
    if not coordinator:
        if processes > 1:
            raise ConfigError(f"processes {processes} need a coordinator: HOST:PORT of process 0, or auto")
        return
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": SHUTDOWN}
    address = listen_at = coordinator
    try:
        if coordinator == "auto":
            if (found := cluster()) is None:
                jax.distributed.initialize(**limits)  # says what it lacks; else only jax notices a process that is gone
                print("warning: this jax does not tell who process 0 is: a process that dies is noticed late", file=sys.stderr)
                return
            address, processes, process_id = found
            any_address = f"[::]:{split_address(address)[1]}"  # of a machine whose own name may be another one to itself
            listen_at = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", any_address)
        if process_id >= processes:
            raise ConfigError(f"process_id {process_id} must be below processes {processes}")
        watch = Watch(meet(listen_at if process_id == 0 else address, processes, process_id))
        jax.distributed.initialize(address, processes, process_id, coordinator_bind_address=listen_at, **limits)
    except ConfigError:
        raise
    except (ValueError, RuntimeError) as error:
        reason = f"coordinator {coordinator!r} cannot be reached: {first_line(error)}"
        if coordinator == "auto":
            reason = f"coordinator auto: no cluster tells the processes about each other ({first_line(error)})"
        raise ConfigError(f"{reason}; give HOST:PORT of process 0, --processes and --process_id") from None


def cluster() -> tuple[str, int, int] | None:
    """Address of process 0, number of processes and id of this one, as Cloud TPU, GKE, SLURM or Open MPI tell them; None if
    none does.

    jax has no public function that says it before it connects.
    """
    with suppress(Exception):
        from jax._src.clusters import ClusterEnv

        unset = os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None
        address, processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(*unset, int(WAIT))
        if address is not None and processes is not None and process_id is not None:
            return address, processes, process_id
    return None


def leave(error: BaseException | None = None) -> None:
    """The end of a script. If this process is one of several that has an error, it ends without waiting for the others."""
    code = (error.code or 0) if isinstance(error, SystemExit) else 1
    if watch and (error is None or isinstance(error, SystemExit)):  # a bug says no farewell: the others end at once
        watch.leave(failed=error is not None and 0 < int(code) < 128)  # a signal stops all of them
    if error is None or not jax.distributed.is_initialized():
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        if "Gloo" in str(error):  # the message on a CPU; elsewhere jax itself ends the process with a message
            print(f"error: {GONE.format('a collective failed')}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(1)  # the others notice when process 0 is missing: it leaves last
    os._exit(int(code))


def check_same(mine: dict[str, str], fault: str) -> None:
    """ConfigError on every process unless all have the same `mine`, by name, and none has a `fault`. One collective."""
    said = json.dumps({"fault": fault[:2000]} | mine).encode()
    assert len(said) < SAID, len(said)
    processes = [json.loads(bytes(row)) for row in all_gather(np.frombuffer(said.ljust(SAID), np.uint8))]
    for i, theirs in enumerate(processes):
        if theirs["fault"]:
            raise ConfigError(f"process {i}: {theirs['fault']}")
    for i, theirs in enumerate(processes):
        for name, first in processes[0].items():
            if theirs.get(name) != first:
                raise ConfigError(
                    f"process {i} has another {name} than process 0, {theirs.get(name)} instead of {first}: all processes need "
                    f"the same command, files and code"
                )


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
    return bool(all_gather(np.array(ok)).all())


def all_gather(mine: np.ndarray) -> np.ndarray:
    """`mine` of every process, [processes, ...], once all devices of this process have it.

    `process_allgather` waits for one device. A process that ended after it left devices of others that were still connecting to
    its own, and gloo wrote errors behind the one that was meant to be read.
    """
    if jax.process_count() == 1:
        return mine[None]
    mesh = Mesh(np.reshape(jax.devices(), (jax.process_count(), -1)), ("fsdp", "tp"))
    rows = multihost_utils.host_local_array_to_global_array(mine[None], mesh, spec("Q", Rules(Q="fsdp")))
    everyone = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, spec("", TRAIN)))(rows)
    return np.asarray(jax.block_until_ready(everyone).addressable_data(0))
