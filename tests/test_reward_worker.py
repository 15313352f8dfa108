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
        assert rewards.score(["a"], [PROBLEM]) == {} and not rewards.workers


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
        pid = rewards.workers[0].process.pid
        assert score(rewards, *texts) == pytest.approx([math.nan, 4, *[math.nan] * 4, 4], nan_ok=True)
        assert score(rewards, "raise") == pytest.approx([math.nan], nan_ok=True)
        assert rewards.workers[0].process.pid == pid  # nothing had to be killed
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
        first, start = rewards.workers[0].process.pid, time.monotonic()
        assert score(rewards, "four", hang, "three") == pytest.approx([4, math.nan, 5], nan_ok=True)
        assert 1.0 < time.monotonic() - start < 10
        assert rewards.workers[0].process.pid != first and not running(first)
    assert rewards.faults == {("obeys", "timeout"): 1}
    assert "warning: reward obeys took over 1.0 s for problem p1; such rows are left out\n" in capfd.readouterr().err


@pytest.mark.parametrize(("death", "reason"), [("exit", "died with exit code 3"), ("crash", "died of SIGSEGV")])
def test_a_function_that_ends_its_process_is_as_one_that_hangs(file, death, reason, capfd):
    with UserRewards(f"{file}:obeys") as rewards:
        assert score(rewards, "four", death, "three") == pytest.approx([4, math.nan, 5], nan_ok=True)
    assert f"warning: reward obeys {reason} for problem p1" in capfd.readouterr().err


def test_a_worker_that_dies_between_two_calls_costs_one_row(file, capfd):
    with UserRewards(f"{file}:obeys") as rewards:
        os.kill(rewards.workers[0].process.pid, signal.SIGKILL)
        assert score(rewards, "four", "three") == pytest.approx([math.nan, 5], nan_ok=True)
    assert "died of SIGKILL" in capfd.readouterr().err


def test_after_three_kills_the_rest_of_the_call_has_no_score(file, capfd):
    with UserRewards(f"{file}:obeys,{file}:length") as rewards:
        values = rewards.score(["exit", "four", "exit", "exit", "four", "four"], [PROBLEM] * 6)
        assert values["obeys"] == pytest.approx([math.nan, 4, *[math.nan] * 4], nan_ok=True)
        assert values["length"] == pytest.approx([4, 4, 4, *[math.nan] * 3], nan_ok=True)
        assert "3 rewards killed; 3 more rows are unscorable" in capfd.readouterr().err
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
    with parent(file, f"print(rewards.workers[0].process.pid, flush=True); score({doing!r}); time.sleep(1000)") as process:
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
        first = rewards.workers[0].process.pid
        os.killpg(0, signal.SIGINT)
        time.sleep(0.3)
        print(score("four"), rewards.workers[0].process.pid == first, flush=True)
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


# ------------------------------------------------------------------------------------------------------ forms of a function

FORMS = '''
import asyncio, os, threading, time

async def waits(completion, problem):
    await asyncio.sleep(10 if completion == "late" else 0.3)
    if completion == "raise":
        raise ValueError("no")
    return len(completion)

async def blocks(completion, problem):
    if completion == "late":
        time.sleep(100)
    return len(completion)

def ranks(completions, problems):
    """The longest of the batch gets 1."""
    return [float(len(text) == max(map(len, completions))) for text in completions]

async def waits_for_all(completions, problems):
    await asyncio.sleep(0.01)
    return [len(text) for text in completions]

def short(completions, problems):
    return [1.0]

def no_list(completions, problems):
    return 1.0

def texts(completions, problems):
    return ["1"] * len(completions)

def some(completions, problems):
    return [None if text == "none" else 1e39 if text == "huge" else 1.0 for text in completions]

def raises(completions, problems):
    return [1 / len(text) for text in completions]

def naps(completion, problem):
    time.sleep(0.3)
    return len(completion)

def place(completion, problem):
    time.sleep(0.05)
    return os.getpid()

def trl(completions, **kwargs):
    return [float(len(text)) for text in completions]

def matches(prompts, completions, answer, level, **kwargs):
    return [float(p == "how many?" and a == "18" and lv == 3) for p, a, lv in zip(prompts, answer, level)]

async def speaks(completions, **kwargs):
    return [float(len(turns[0]["content"])) for turns in completions]

def asks_for_more(completions, ground_truth):
    return [0.0] * len(completions)

def fails(completions, **kwargs):
    return [text["content"] for text in completions]
'''


@pytest.fixture
def forms(tmp_path) -> Path:
    (tmp_path / "forms.py").write_text(FORMS)
    return tmp_path / "forms.py"


def test_rows_of_an_asynchronous_function_wait_together_and_fail_alone(forms):
    with UserRewards(f"{forms}:waits", timeout=1.5) as rewards:
        first, start = rewards.workers[0].process.pid, time.monotonic()
        assert score(rewards, *["four"] * 40) == [4] * 40
        assert time.monotonic() - start < 1.5  # one after another they would take 12 s
        assert score(rewards, "four", "late", "raise", "three") == pytest.approx([4, math.nan, math.nan, 5], nan_ok=True)
        assert rewards.workers[0].process.pid == first
    assert rewards.faults == {("waits", "timeout"): 1, ("waits", "ValueError"): 1}


def test_an_asynchronous_function_that_blocks_is_killed(forms, monkeypatch):
    monkeypatch.setattr("grpo.runs.reward_worker.GRACE", 0.2)
    with UserRewards(f"{forms}:blocks", timeout=0.5) as rewards:
        assert score(rewards, "four", "late", "three") == pytest.approx([4, math.nan, math.nan], nan_ok=True)
        assert score(rewards, "four") == [4]


def test_a_batch_function_sees_all_completions_in_one_call(forms):
    with UserRewards(f"{forms}:ranks,{forms}:waits_for_all,{forms}:trl", workers=2) as rewards:
        values = rewards.score(["a", "four", "abc", "five"], [PROBLEM] * 4)
    assert values == {"ranks": [0, 1, 0, 1], "waits_for_all": [1, 4, 3, 4], "trl": [1, 4, 3, 4]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "gave a list of 1: must be a list of 2 numbers"),
        ("no_list", "gave 1.0: must be a list of 2 numbers"),
        ("texts", "gave '1': must be a number"),
    ],
)
def test_a_batch_function_must_give_a_number_for_each_completion(forms, name, message):
    with UserRewards(f"{forms}:{name}") as rewards, pytest.raises(RunError, match=f"^reward {name} {message}$"):
        score(rewards, "a", "b")


def test_a_batch_function_may_leave_rows_out_and_fails_for_all(forms, capfd):
    with UserRewards(f"{forms}:some,{forms}:raises") as rewards:
        values = rewards.score(["none", "four", "huge"], [PROBLEM] * 3)
        assert values["some"] == pytest.approx([math.nan, 1, math.nan], nan_ok=True)
        assert values["raises"] == [1 / 4] * 3
        assert rewards.score(["", "four"], [PROBLEM] * 2)["raises"] == pytest.approx([math.nan] * 2, nan_ok=True)
    assert "gave nan" in (err := capfd.readouterr().err) and "gave 1e+39, beyond 1e+15" not in err  # one line a kind
    assert rewards.faults == {("some", "value"): 2, ("raises", "ZeroDivisionError"): 2}


def test_workers_share_the_rows_and_wait_at_the_same_time(forms):
    with UserRewards(f"{forms}:naps", workers=4) as rewards:
        start = time.monotonic()
        assert score(rewards, *map("x".__mul__, range(16))) == list(range(16))
        assert time.monotonic() - start < 2.5  # 4.8 s one after another
    with UserRewards(f"{forms}:place", workers=3) as rewards:
        assert len(set(score(rewards, *["x"] * 12))) == 3


# -------------------------------------------------------------------------------------------------------- TRL's signature

LEVEL = Problem("p1", "how many?", "18", "10 + 8", {"level": 3})


def test_a_function_of_trl_gets_columns_by_name_and_conversations_where_it_expects_them(forms):
    with UserRewards(f"{forms}:matches,{forms}:speaks,{forms}:trl") as rewards:
        rewards.check([LEVEL])
        values = rewards.score(["four", "abc"], [LEVEL, Problem("p2", "how many?", "18")])
    assert values == {"matches": [1, 0], "speaks": [4, 3], "trl": [4, 3]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("asks_for_more", "takes ground_truth, no column of the data; there are prompts, completions, id, question, answer, "
         "solution, level"),
        ("fails", "fails when it is tried: it raised TypeError: string indices must be integers"),
        ("short_trl", "fails when it is tried: it gave a list of 1"),
    ],
)  # fmt: skip
def test_a_function_of_trl_that_cannot_work_is_refused_before_the_run(forms, name, message):
    with forms.open("a") as file:
        file.write("\ndef short_trl(completions, **kwargs):\n    return [1.0]\n")
    with UserRewards(f"{forms}:{name}") as rewards, pytest.raises(ConfigError) as error:
        rewards.check([LEVEL])
    assert str(error.value).startswith(f"reward '{forms}:{name}': {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "parameters",
    ["data_source, solution_str, ground_truth, extra_info=None", "completion", "solution_str, ground_truth", "*, text",
     "prompts, responses", "completions, answer, /"],
)  # fmt: skip
def test_another_signature_is_refused_by_one_line(tmp_path, parameters):
    (tmp_path / "other.py").write_text(f"def f({parameters}):\n    return 1.0\n")
    with pytest.raises(ConfigError, match=r"^reward '.*other\.py:f': takes \(.*\)") as error:
        UserRewards(f"{tmp_path / 'other.py'}:f")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- nothing shifts

INTRUDERS = '''
import ctypes, multiprocessing, os, subprocess, sys, threading, time

def forks(completion, problem):
    os.fork()
    return len(completion)

def forks_past_python(completion, problem):
    ctypes.CDLL(None).fork()  # no hook of Python's runs
    return len(completion)

def pool(completion, problem):
    with multiprocessing.get_context("fork").Pool(2) as workers:
        return sum(workers.map(len, [completion, completion]))

def write_everywhere(data):
    for fd in range(3, 30):
        try:
            os.write(fd, data)
        except OSError:
            pass

def floods(completion, problem):
    write_everywhere(b'garbage [1, 0, {"value": 9}]\\n[7')
    return len(completion)

def forges(completion, problem):
    """What a late reply to an earlier request would look like."""
    write_everywhere(b'[0, 0, {"value": 99}]\\n[1, 77, {"value": 99}]\\n')
    return len(completion)

def leaves(completion, problem):
    """A grandchild in a session of its own; its parent is gone."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        os.write(write, str(process.pid).encode())
        os._exit(0)
    pid = int(os.read(read, 20))
    if completion == "crash":
        open(problem.question, "w").write(str(pid))
        ctypes.string_at(0)
    return pid
'''


@pytest.fixture
def intruders(tmp_path) -> Path:
    (tmp_path / "intruders.py").write_text(INTRUDERS)
    return tmp_path / "intruders.py"


@pytest.mark.parametrize("name", ["forks", "forks_past_python", "floods", "forges"])
def test_what_else_comes_through_the_pipes_shifts_no_value(intruders, name):
    with UserRewards(f"{intruders}:{name}", workers=2) as rewards:
        for lengths in ([1, 2, 3, 4], [9, 8, 7, 6, 5], [1]):
            assert score(rewards, *map("x".__mul__, lengths)) == lengths


def test_a_function_may_use_a_pool_of_processes(intruders):
    with UserRewards(f"{intruders}:pool") as rewards:
        assert score(rewards, "four", "abc") == [8, 6]


@linux
@pytest.mark.parametrize("how", ["close", "crash", "kill"])
def test_what_has_left_the_session_ends_too(intruders, tmp_path, how):
    note = tmp_path / "pid"
    with UserRewards(f"{intruders}:leaves") as rewards:
        text = "crash" if how == "crash" else "x"
        (value,) = score(rewards, text, problem=Problem("p", str(note), ""))
        pid = int(note.read_text()) if how == "crash" else int(value)
        assert how == "crash" or running(pid)
        if how == "kill":
            os.kill(rewards.workers[0].process.pid, signal.SIGTERM)
        if how != "close":
            assert ends(pid)
    assert ends(pid)
