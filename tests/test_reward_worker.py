"""Laws of grpo/runs/reward_worker.py: whatever a reward does, its row has no score, others have theirs, no process stays."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from data.problems import Problem
from grpo.errors import ConfigError, RunError
from grpo.runs.reward_worker import UserRewards

REWARDS = '''
import ctypes, os, re, signal, subprocess, sys, time

def length(completion, problem):
    return len(completion)

def fields(completion, problem):
    return 1000 * len(problem.id) + 100 * len(problem.question) + 10 * len(problem.answer) + len(problem.solution)

def knows_jax(completion, problem):
    return "jax" in sys.modules

def talks(completion, problem):
    print("a line by print")
    os.write(1, b"a line by write\\n")
    subprocess.run(["echo", "a line by echo"])
    return len(sys.stdin.read())

def obeys(completion, problem):
    """Does what the completion says; else its length."""
    match completion:
        case "loop":
            while True:
                pass
        case "sleep":
            time.sleep(1000)
        case "C call":  # holds the interpreter's lock: no thread and no signal handler of Python's runs
            re.match("(a|aa)+$", "a" * 60 + "b")
        case "exit":
            os._exit(3)
        case "crash":
            ctypes.string_at(0)
        case "sys.exit":
            sys.exit(0)
        case "raise":
            raise ValueError("a fault\\nof two lines")
        case "raise another":
            return [][1]
        case "value":
            return eval(problem.answer)
    return len(completion)

def child(completion, problem):
    """Start a process that would outlive it."""
    return subprocess.Popen(["sleep", "1000"]).pid

def pid(completion, problem):
    return os.getpid()
'''
PROBLEM = Problem("p1", "how many?", "18", "10 + 8")


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path / "mine.py"


def score(rewards: UserRewards, *texts: str, problem: Problem = PROBLEM) -> list[float]:
    """Values of the only function."""
    (values,) = rewards.score(list(texts), [problem] * len(texts)).values()
    return values


def running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int) -> bool:
    """Whether the process is gone within ten seconds."""
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(pid)


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


# ----------------------------------------------------------------------------------------------------------- what it gives


def test_every_function_scores_every_completion(file):
    texts = ["", "two\nlines", 'say "\u2028"', "é" * 100_000, "\x00"]
    problems = [Problem("p" * i, "q", "1", "s" * i) for i in range(5)]
    with UserRewards(f"{file}:length,{file}:fields") as rewards:
        assert rewards.names == ["length", "fields"]
        values = rewards.score(texts, problems)
        assert rewards.score([], []) == {"length": [], "fields": []}
    assert values == {"length": [0, 9, 7, 100_000, 1], "fields": [110 + 1001 * i for i in range(5)]}
    assert all(type(value) is float for value in values["length"])


def test_without_functions_there_is_no_worker():
    with UserRewards("") as rewards:
        assert rewards.score(["a"], [PROBLEM]) == {} and rewards.stop is None


def test_the_worker_imports_no_jax(file):
    with UserRewards(f"{file}:knows_jax") as rewards:
        assert score(rewards, "a") == [0]


def test_what_a_function_prints_goes_to_stderr_and_it_reads_nothing(file, capfd):
    with UserRewards(f"{file}:talks") as rewards:
        assert score(rewards, "a", "b") == [0, 0]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["a line by print", "a line by write", "a line by echo"] * 2


# ------------------------------------------------------------------------------------------------------- rows without a score


@pytest.mark.parametrize("value", ["None", "float('nan')", "float('inf')", "-float('inf')", "10**400"])
def test_fault_15_a_value_that_is_not_finite_is_no_score(file, value, capfd):
    with UserRewards(f"{file}:obeys") as rewards:
        values = score(rewards, "four", "value", "three", "value", problem=Problem("p7", "", value))
    assert values == pytest.approx([4, math.nan, 5, math.nan], nan_ok=True)
    assert sum(rewards.faults.values()) == 2
    assert capfd.readouterr().err.count("warning: reward obeys ") == 1


def test_fault_16_what_a_function_raises_is_printed_once_a_kind_and_counted(file, capfd):
    texts = ["raise", "four", "raise", "raise another", "sys.exit", "raise", "four"]
    with UserRewards(f"{file}:obeys") as rewards:
        pid = rewards.process.pid
        assert score(rewards, *texts) == pytest.approx([math.nan, 4, *[math.nan] * 4, 4], nan_ok=True)
        assert score(rewards, "raise") == pytest.approx([math.nan], nan_ok=True)
        assert rewards.process.pid == pid  # nothing had to be killed
    assert rewards.faults == {("obeys", "ValueError"): 4, ("obeys", "IndexError"): 1, ("obeys", "SystemExit"): 1}
    err = capfd.readouterr().err
    assert err.count("Traceback") == err.count("warning: ") == 3
    assert "warning: reward obeys raised ValueError: a fault of two lines for problem p1" in err
    assert err.count(f'File "{file}", line') == 3 and "grpo/runs/reward_worker.py" not in err


@pytest.mark.parametrize("value", ["'5'", "[1.0]", "1j", "print"])
def test_fault_16_a_value_that_is_no_number_ends_the_run(file, value):
    with UserRewards(f"{file}:obeys") as rewards:
        with pytest.raises(RunError, match=r"^reward obeys gave .+ for problem p7: must be a number$") as error:
            score(rewards, "four", "value", problem=Problem("p7", "", value))
        assert repr(eval(value)) in str(error.value)
        assert score(rewards, "four") == [4]


@pytest.mark.parametrize("hang", ["loop", "sleep", "C call"])
def test_fault_17_a_function_that_hangs_is_killed_and_the_rest_goes_on(file, hang, capfd):
    with UserRewards(f"{file}:obeys", timeout=1.0) as rewards:
        first, start = rewards.process.pid, time.monotonic()
        assert score(rewards, "four", hang, "three") == pytest.approx([4, math.nan, 5], nan_ok=True)
        assert 1.0 < time.monotonic() - start < 10
        assert rewards.process.pid != first and not running(first)
    assert rewards.faults == {("obeys", "timeout"): 1}
    assert "warning: reward obeys took over 1.0 s for problem p1; such rows are left out\n" in capfd.readouterr().err


@pytest.mark.parametrize(("death", "reason"), [("exit", "died with exit code 3"), ("crash", "died of SIGSEGV")])
def test_a_function_that_ends_its_process_is_as_one_that_hangs(file, death, reason, capfd):
    with UserRewards(f"{file}:obeys") as rewards:
        assert score(rewards, "four", death, "three") == pytest.approx([4, math.nan, 5], nan_ok=True)
    assert f"warning: reward obeys {reason} for problem p1" in capfd.readouterr().err


def test_a_worker_that_dies_between_two_calls_costs_one_row(file, capfd):
    with UserRewards(f"{file}:obeys") as rewards:
        os.kill(rewards.process.pid, signal.SIGKILL)
        assert score(rewards, "four", "three") == pytest.approx([math.nan, 5], nan_ok=True)
    assert "died of SIGKILL" in capfd.readouterr().err


def test_after_three_kills_the_rest_of_the_call_has_no_score(file, capfd):
    with UserRewards(f"{file}:obeys,{file}:length") as rewards:
        values = rewards.score(["exit", "four", "exit", "exit", "four", "four"], [PROBLEM] * 6)
        assert values["obeys"] == pytest.approx([math.nan, 4, *[math.nan] * 4], nan_ok=True)
        assert values["length"] == pytest.approx([4, 4, 4, *[math.nan] * 3], nan_ok=True)
        assert "the other 2 rows are unscorable" in capfd.readouterr().err
        assert rewards.score(["four"], [PROBLEM]) == {"obeys": [4], "length": [4]}  # the next call has its own three


@pytest.mark.parametrize(
    ("text", "reason"),
    [("raise", "raised ValueError: a fault of two lines"), ("sleep", "took over 1.0 s"), ("exit", "died with exit code 3"),
     ("value", "gave nan")],
)  # fmt: skip
def test_strict_rewards_end_the_run_at_the_first_row_without_a_score(file, text, reason):
    with UserRewards(f"{file}:obeys", timeout=1.0, strict=True) as rewards:
        with pytest.raises(RunError) as error:
            score(rewards, "four", text, problem=Problem("p7", "", "float('nan')"))
        assert str(error.value) == f"reward obeys {reason} for problem p7 (strict_rewards)"


def test_an_interrupted_call_leaves_no_reply_for_the_next(file):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with UserRewards(f"{file}:obeys") as rewards:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                score(rewards, "sleep")
            assert score(rewards, "four", "three") == [4, 5]
    finally:
        signal.signal(signal.SIGALRM, before)


# -------------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("missing.py:f", "", "'missing.py:f': file 'missing.py' does not exist; give FILE.py:FUNCTION"),
        ("f", "", "'f': file '' does not exist; give FILE.py:FUNCTION"),
        ("{file}:g", "def f(c, p): return 1", "'{file}:g': {file} has no function 'g'"),
        ("{file}:f", "f = 3", "'{file}:f': {file} has no function 'f'"),
        ("{file}:f", "\nimport nowhere", "'{file}:f': {file} fails: ModuleNotFoundError: No module named 'nowhere', line 2"),
        ("{file}:f", "def f(:", "'{file}:f': {file} fails: SyntaxError: invalid syntax (bad.py, line 1)"),
        ("{file}:f", "raise SystemExit(0)", "'{file}:f': {file} fails: SystemExit: 0, line 1"),
        ("{file}:f", "import os; os._exit(4)", "f: the worker died with exit code 4 while it imported"),
        ("{file}:correct", "def correct(c, p): return 1", "'{file}:correct': the name 'correct' is taken"),
        ("{file}:f,{file}:f", "def f(c, p): return 1", "'{file}:f': the name 'f' is taken"),
        ("{folder}/mine.txt:f", "", "'{folder}/mine.txt:f': '{folder}/mine.txt' is no .py file"),
    ],
)
def test_a_mistake_is_one_line_at_the_start(tmp_path, name, source, message):
    file = tmp_path / "bad.py"
    file.write_text(source)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError) as error:
        UserRewards(name.format(file=file, folder=tmp_path))
    assert str(error.value).startswith("reward " + message.format(file=file, folder=tmp_path))
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_imported_again_ends_the_run(file):
    with UserRewards(f"{file}:obeys") as rewards:
        file.write_text("import nowhere")
        with pytest.raises(RunError, match=r"No module named 'nowhere', line 1 \(when restarted\)$"):
            score(rewards, "exit", "four")


# ---------------------------------------------------------------------------------------------------------------- the end


@linux
@pytest.mark.parametrize("how", ["close", "garbage"])
def test_a_worker_and_what_it_started_end_with_their_owner(file, how):
    rewards = UserRewards(f"{file}:child,{file}:pid")
    values = rewards.score(["a"], [PROBLEM])
    pids = [int(value) for (value,) in values.values()]
    assert all(map(running, pids))
    if how == "close":
        rewards.close()
    del rewards
    assert all(map(ends, pids))


@linux
@pytest.mark.parametrize("doing", ["nothing", "loop", "C call"])
def test_fault_2_a_worker_dies_with_a_parent_that_is_killed(file, doing):
    with parent(file, f"print(rewards.process.pid, flush=True); score({doing!r}); time.sleep(1000)") as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        time.sleep(0.5)  # the call is under way
        assert running(pid)
        process.kill()
        assert ends(pid)


def test_ctrl_c_does_not_reach_the_worker(file):
    """A terminal sends it to the whole process group; this parent goes on, as one that finishes its step does."""
    code = """
        signal.signal(signal.SIGINT, lambda *_: None)
        first = rewards.process.pid
        os.killpg(0, signal.SIGINT)
        time.sleep(0.3)
        print(score("four"), rewards.process.pid == first, flush=True)
    """
    with parent(file, code) as process:
        assert process.communicate(timeout=60)[0] == "{'obeys': [4.0]} True\n"


def parent(file: Path, code: str) -> subprocess.Popen:
    """A process of its own group that has a worker."""
    begin = f"""
        import os, signal, time
        from data.problems import Problem
        from grpo.runs.reward_worker import UserRewards
        rewards = UserRewards({str(file)!r} + ":obeys", timeout=1000)
        score = lambda text: rewards.score([text], [Problem("p1", "", "")])
    """
    source = textwrap.dedent(begin) + textwrap.dedent(code)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )  # fmt: skip
