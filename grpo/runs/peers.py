"""Who takes part in a run of several processes, and who is still there: one TCP connection from each to process 0.

Before jax starts, process 0 listens on the coordinator's address until all others have called; a process id that is taken, and
a number of processes that differs, are refused there. jax's coordinator then takes the port over. The connections stay: a
process that dies closes its own, and one that hangs falls silent, which the others say in one line and end, before jax's
runtime ends them with a stack of C++. Nobody is authenticated: the port must not be public.
"""

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from grpo.errors import ConfigError

WAIT = 300.0  # seconds for all processes to start
PULSE = 2.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without one after which a process is lost; a long call that holds Python's lock sends none
PATIENCE = 40.0  # seconds that others go on after a process has ended with an error
ALIVE, DONE, FAILED = b".", b"d", b"f"
GONE = "another process of this run is gone ({}); the same command on all of them continues from the last checkpoint"


def split_address(address: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT`. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"coordinator {address!r} must be HOST:PORT of process 0, such as 10.0.0.2:1234, or auto")
    return host.strip("[]"), int(port)


def meet(address: str, processes: int, me: int) -> dict[int, socket.socket]:
    """Wait until all processes are there: the connections to the others, on process 0; to it, on others. Raises ConfigError."""
    return wait_for_others(address, processes) if me == 0 else call(address, processes, me)


def wait_for_others(address: str, processes: int) -> dict[int, socket.socket]:
    (host, port), found, deadline = split_address(address), dict[int, socket.socket](), time.monotonic() + WAIT
    everywhere = host == "::" and socket.has_dualstack_ipv6()
    host = "0.0.0.0" if host == "::" and not everywhere else host
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        server = socket.create_server((host, port), family=family, dualstack_ipv6=everywhere)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigError(
            f"coordinator {address}: process 0 cannot listen there ({reason}); give an address of its machine, and a free port"
        ) from None
    with server:
        while len(found) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection = server.accept()[0]
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, processes) if i not in found)
                raise ConfigError(f"coordinator {address}: process {missing} has not come in {WAIT:.0f} s") from None
            try:
                connection.settimeout(5.0)
                caller, count = (int(number) for number in json.loads(connection.makefile().readline(100)))
            except (OSError, ValueError, TypeError):
                connection.close()  # none of ours
                continue
            if count != processes:
                refusal = f"process {caller} was started with processes {count}, process 0 with {processes}"
            elif caller in found or not 0 < caller < processes:
                refusal = f"process_id {caller} is taken; every process needs its own"
            else:
                found[caller] = connection
                continue
            with suppress(OSError), connection:
                connection.sendall(json.dumps(refusal).encode() + b"\n")
            if count != processes:
                raise ConfigError(refusal)
    for connection in found.values():
        with suppress(OSError):
            connection.sendall(b'""\n')
    return found


def call(address: str, processes: int, me: int) -> dict[int, socket.socket]:
    deadline, connection = time.monotonic() + WAIT, None
    while connection is None:
        try:
            connection = socket.create_connection(split_address(address), timeout=5.0)
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() > deadline:
                raise ConfigError(f"coordinator {address!r} cannot be reached: {error.strerror or error}") from None
            time.sleep(0.2)
    try:
        connection.sendall(json.dumps([me, processes]).encode() + b"\n")
        connection.settimeout(max(deadline - time.monotonic(), 5.0))
        refusal = json.loads(connection.makefile(errors="replace").readline(1000) or '"process 0 has ended"')
    except (OSError, ValueError):
        refusal = "what listens there does not wait for processes: a run that has all of its own, or another program"
    if refusal:
        connection.close()
        raise ConfigError(f"coordinator {address}: {refusal}")
    return {0: connection}


class Watch(threading.Thread):
    """Ends this process with one line when another one is gone."""

    def __init__(self, peers: dict[int, socket.socket], end: Callable[[int], None] = os._exit):
        super().__init__(daemon=True)
        self.peers, self.end, self.over = peers, end, threading.Event()
        self.heard = dict.fromkeys(peers, time.monotonic())
        self.failed = float("inf")  # when the first of the others has ended with an error
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            self.tell(ALIVE)
            until = time.monotonic() + PULSE
            while not self.over.is_set() and self.peers and (left := until - time.monotonic()) > 0:
                ready = select.select(list(self.peers.values()), [], [], left)[0]
                for process in [i for i, connection in self.peers.items() if connection in ready]:
                    self.hear(process)
            now = time.monotonic()
            for process, heard in self.heard.items():
                if process in self.peers and now - heard > SILENCE:
                    self.lost(f"process {process} has been silent for {SILENCE:.0f} s")
            if now - self.failed > PATIENCE:
                self.lost("it has ended with an error")
            if not self.peers:
                time.sleep(PULSE)

    def hear(self, process: int) -> None:
        try:
            said = self.peers[process].recv(1000)
        except OSError:
            said = b""
        self.heard[process] = time.monotonic()
        if not said:
            self.lost(f"process {process} has closed its connection")
        elif DONE in said or FAILED in said:
            del self.peers[process]
            if FAILED in said:
                self.failed = min(self.failed, time.monotonic())

    def tell(self, what: bytes) -> None:
        for connection in [*self.peers.values()]:
            with suppress(OSError):  # a connection that is broken is noticed by `hear`
                connection.sendall(what)

    def lost(self, how: str) -> None:
        if self.over.is_set():
            return
        print(f"error: {GONE.format(how)}", file=sys.stderr, flush=True)
        others = [connection for connection in self.peers.values() if connection.fileno() >= 0]
        for connection in others:
            connection.close()  # so that the others say it too
        if len(others) > 1:
            time.sleep(1)  # before jax's runtime ends them, because the coordinator is gone
        self.end(1)

    def leave(self, failed: bool) -> None:
        """This process ends by itself: the others do not call it lost."""
        self.over.set()
        self.tell(FAILED if failed else DONE)
