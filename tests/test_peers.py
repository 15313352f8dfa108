"""Several processes: who takes part, what they must agree on, and what the others say when one is gone."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import grpo.runs.distributed
import grpo.runs.peers
from grpo.errors import ConfigError
from grpo.runs.distributed import cluster, join
from grpo.runs.peers import Watch, meet, split_address

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.mark.parametrize("address", ["nonsense", "host:", ":1234", "host:x", "host:0", "host:70000", "host:١٢", ""])
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        split_address(address)


def test_an_address_may_be_of_ipv6():
    assert split_address("[::1]:80") == ("::1", 80)


@pytest.mark.parametrize("address", ["203.0.113.7:1234", "nowhere.invalid:1234"])
def test_process_0_listens_on_its_own_machine_only(address):
    """No segmentation fault of the runtime: one line."""
    with pytest.raises(ConfigError, match="process 0 cannot listen there"):
        meet(address, 2, 0)


def test_the_port_is_taken(address):
    with socket.create_server(split_address(address)), pytest.raises(ConfigError, match="Address already in use"):
        meet(address, 2, 0)


def test_a_process_id_twice_another_number_of_processes_and_strangers(address):
    """The second process of a number is refused; what only knocks is left out; the others meet."""
    with ThreadPoolExecutor(4) as pool:
        main = pool.submit(meet, address, 3, 0)
        first = pool.submit(meet, address, 3, 1)
        time.sleep(0.5)
        with closing(socket.create_connection(split_address(address))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(ConfigError, match="process_id 1 is taken"):
                meet(address, 3, 1)
            assert not main.done() and not first.done()
            last = meet(address, 3, 2)
        connections = [*main.result(10).values(), *first.result(10).values(), *last.values()]
    assert list(main.result()) == [1, 2] and list(first.result()) == list(last) == [0]
    assert {connection.getsockname()[0] for connection in connections} == {"127.0.0.1"}
    for connection in connections:
        connection.close()


def test_another_number_of_processes_ends_both(address):
    with ThreadPoolExecutor(1) as pool:
        main = pool.submit(meet, address, 2, 0)
        for end in (lambda: meet(address, 3, 1), lambda: main.result(10)):
            with pytest.raises(ConfigError, match="process 1 was started with processes 3, process 0 with 2"):
                end()


def test_who_has_not_come_is_named(address, monkeypatch):
    monkeypatch.setattr(grpo.runs.peers, "WAIT", 0.3)
    with pytest.raises(ConfigError, match="process 1, 2 has not come"):
        meet(address, 3, 0)
    with pytest.raises(ConfigError, match="cannot be reached: Connection refused"):
        meet(address, 3, 1)


def test_every_address_of_process_0(address):
    """Of a cluster, whose name for a machine may be another one there."""
    port = split_address(address)[1]
    with ThreadPoolExecutor(2) as pool:
        main = pool.submit(meet, f"[::]:{port}", 3, 0)
        second = pool.submit(meet, f"127.0.0.1:{port}", 3, 1)
        connections = [*meet(f"localhost:{port}", 3, 2).values(), *second.result(10).values(), *main.result(10).values()]
    assert len(connections) == 4
    for connection in connections:
        connection.close()


def test_auto_needs_a_cluster():
    assert cluster() is None
    with pytest.raises(ConfigError, match=r"coordinator auto: no cluster tells .*; give HOST:PORT"):
        join("auto", 1, 0)


def environment_of(kind: str, address: str, process_id: int) -> dict[str, str]:
    """What a cluster of this machine alone tells one of two processes."""
    host, port = split_address(address)
    names = {
        "slurm": {"JOB_ID": "77", "STEP_NODELIST": host, "NTASKS": "2", "PROCID": str(process_id), "LOCALID": "0"},
        "ompi": {
            "MCA_orte_hnp_uri": f"1531576320.0;tcp://{host},{host}:34911", "COMM_WORLD_SIZE": "2",
            "COMM_WORLD_RANK": str(process_id), "COMM_WORLD_LOCAL_RANK": "0",
        },
    }  # fmt: skip
    return {"JAX_COORDINATOR_PORT": str(port)} | {f"{kind.upper()}_{name}": value for name, value in names[kind].items()}


@pytest.mark.parametrize("kind", ["slurm", "ompi"])
def test_what_a_cluster_tells(kind, address, monkeypatch):
    for name, value in environment_of(kind, address, 1).items():
        monkeypatch.setenv(name, value)
    assert cluster() == (address, 2, 1)


def test_a_jax_that_does_not_tell_who_takes_part(monkeypatch, capsys):
    """Its own detection is not public. It connects the processes all the same."""
    calls = []
    monkeypatch.setattr("jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params", lambda: 1 / 0)
    monkeypatch.setattr("jax.distributed.initialize", lambda *args, **options: calls.append(args))
    join("auto", 1, 0)
    assert calls == [()] and grpo.runs.distributed.watch is None
    assert capsys.readouterr().err.startswith("warning: this jax does not tell who process 0 is")


@pytest.mark.parametrize("how", ["dies", "silent", "failed", "done"])
def test_a_process_that_is_gone_is_noticed(how, monkeypatch, capsys):
    """At once when it dies, after a while when it is silent or has failed; never when it is done."""
    for name, seconds in {"PULSE": 0.05, "SILENCE": 0.4, "PATIENCE": 0.4}.items():
        monkeypatch.setattr(grpo.runs.peers, name, seconds)
    ours, theirs = socket.socketpair()
    ended, began = threading.Event(), time.monotonic()
    watch = Watch({1: ours}, lambda code: ended.set() or watch.over.set())
    if how == "dies":
        theirs.close()
    elif how != "silent":
        other = Watch({0: theirs}, lambda code: None)
        other.leave(failed=how == "failed")
        other.join()
    assert ended.wait(1.0) == (how != "done")
    assert how != "dies" or time.monotonic() - began < 0.3
    watch.leave(failed=False)
    watch.join()
    said = {"dies": "has closed its connection", "silent": "has been silent", "failed": "has ended with an error", "done": ""}
    assert said[how] in capsys.readouterr().err
    ours.close()
    theirs.close()


@pytest.fixture
def start(address) -> Iterator:
    """Starts tests/joined.py as one of two processes; none stays. `kind`: of the cluster that tells them about each other."""
    started = []

    def start(process_id: int, *argv: str, kind: str = "") -> subprocess.Popen:
        who = ["auto", "1", "0"] if kind else [address, "2", str(process_id)]
        command = [sys.executable, "tests/joined.py", *who, *argv]
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "0"}
        env |= environment_of(kind, address, process_id) if kind else {}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until_joined(*processes: subprocess.Popen) -> None:
    for process in processes:
        assert process.stdout
        assert any(line == "joined\n" for line in process.stdout), process.stderr and process.stderr.read()


@pytest.mark.parametrize(
    ("victim", "number", "kind"),
    [
        *((victim, number, "") for victim in (0, 1) for number in (signal.SIGKILL, signal.SIGSTOP)),
        (0, signal.SIGKILL, "slurm"), (1, signal.SIGSTOP, "ompi"),
    ],
)  # fmt: skip
def test_fault_35_a_process_is_killed_or_stopped(start, address, victim, number, kind):
    """Process 0 too, which has the coordinator: the other says so, and ends without a stack of C++."""
    processes = [start(i, "x", kind=kind) for i in range(2)]
    wait_until_joined(*processes)
    if victim == 1 and number == signal.SIGKILL:  # while they run: the port is open to its own address only, and to nobody new
        listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=False).stdout.split()
        assert not [place for place in listening if place.endswith(address[9:]) and "127.0.0.1" not in place]
        again = start(1, "x")
        assert again.wait(20) == 2
        assert again.stderr.read().startswith(f"error: coordinator {address}: what listens there does not wait for processes")
    processes[victim].send_signal(number)
    other, began = processes[1 - victim], time.monotonic()
    assert other.wait(30) == 1
    assert time.monotonic() - began < 12
    errors = other.stderr.read()
    assert "error: another process of this run is gone" in errors and "Check failure stack trace" not in errors


@pytest.mark.parametrize(
    ("argv", "kind"), [(("y", ""), ""), (("x", "no file here"), ""), (("y", ""), "slurm"), (("y", ""), "ompi")]
)
def test_processes_that_disagree_end_together(start, argv, kind):
    processes = [start(0, "x", kind=kind), start(1, *argv, kind=kind)]
    said = "process 1 has another setting than process 0, y instead of x: all processes need the same command, files and code"
    for process in processes:
        assert process.wait(30) == 2
        assert process.stderr.read() == f"error: {said if argv[0] == 'y' else 'process 1: no file here'}\n"
