"""Laws of scripts/evaluate_consensus.py: one denominator, samples that survive a kill -9, nothing that belongs elsewhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_peers import free_port
from test_sample import load
from training import xla_flags

import grpo.runs.consensus_eval
from data.arithmetic import make_problems
from data.datasets import choose_problems
from data.prompts import drop_long
from data.tokenizer import load_tokenizer
from grpo.config import PRESETS, TINY_MODEL
from grpo.errors import ConfigError
from grpo.reports.consensus import canonical, model_figures, wilson
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.evaluate import Completion, complete
from grpo.runs.interrupts import Stopped
from grpo.runs.model_source import copy_description, find_model
from grpo.update import UpdateConfig, init_state
from models.gemma import ExecutionConfig
from models.sharding import ROLLOUT, STORE, make_mesh

pytestmark = [
    pytest.mark.usefixtures("quick_to_compile"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine"),  # orbax's
]

ROOT = Path(__file__).parents[1]
N, C = 40, 32
KEYS = ["n", "models", "fixed", "broke", "both_right", "both_wrong", "mcnemar_p", "agreement", "tokens_per_s"]

evaluate = load("evaluate_consensus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model as base, a bent copy of it as trained, and problems."""
    folder = tmp_path_factory.mktemp("consensus")
    for name, scale in (("base", 1.0), ("model", 1.3)):
        shutil.copytree(TINY_MODEL, folder / name)
        weights = load_file(folder / name / "model.safetensors")
        weights["model.norm.weight"] = scale * weights["model.norm.weight"]
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
    problems = make_problems(N, 0, "test")
    problems.sort(key=lambda problem: -len(problem.question))
    lines = [{"question": p.question, "answer": f"{p.solution}\n#### {p.answer}"} for p in problems]
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def one_device(monkeypatch):
    """Compiles sooner than eight."""
    monkeypatch.setattr(sys.modules["evaluate_consensus"], "make_mesh", lambda tp: make_mesh(tp, jax.devices()[:1]))


def flags(folder: Path, out: str | Path, **changes: Any) -> list[str]:
    values = {
        "model_path": folder / "model", "base_path": folder / "base", "data": folder / "problems.jsonl", "system_prompt": "",
        "max_new_tokens": C, "batch_size": 8, "temperatures": "0.5,1.0", "samples": 2, "out": folder / out,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in (values | changes).items()]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def samples(folder: Path) -> dict[tuple, dict[str, Any]]:
    """What was sampled, by its number; each stands there once."""
    records = read(folder / "samples.jsonl")
    found = {(r["model"], r["problem"], r["sample"]): {k: v for k, v in r.items() if k != "seconds"} for r in records}
    assert len(found) == len(records)
    return found


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, Any]:
    """An evaluation that nothing interrupts, on eight devices."""
    return evaluate(flags(folder, "whole"))


def test_the_result_has_one_denominator_and_both_models(folder, whole):
    assert list(whole)[: len(KEYS)] == KEYS and list(whole["models"]) == ["base", "trained"]
    assert whole == json.loads((folder / "whole" / "result.json").read_text())
    assert whole["n"] == N
    for name in ("base", "trained"):
        found = whole["models"][name]
        assert sum(found["paired"][key] for key in ("fixed", "broke", "both_right", "both_wrong")) == N
        for way in ("greedy", "consensus"):
            right = round(found[way]["tagged"] * N)
            assert (found[way]["low"], found[way]["high"]) == wilson(right, N)
        assert len(found["pass_at_k"]) == len(found["maj_at_k"]) == 4
    assert {key: whole[key] for key in whole["models"]["trained"]["paired"]} == whole["models"]["trained"]["paired"]
    assert whole["agreement"] == whole["models"]["trained"]["agreement"]


def test_every_sample_is_a_line_with_what_it_answered(folder, whole):
    found, problems = samples(folder / "whole"), read(folder / "whole" / "problems.jsonl")
    assert [problem["id"] for problem in problems] == [f"problems.jsonl:{i + 1}" for i in range(N)]
    assert found.keys() == {(m, p["id"], j) for m in ("base", "trained") for p in problems for j in range(5)}
    gold = {problem["id"]: problem["answer"] for problem in problems}
    for (_, problem, j), record in found.items():
        assert record["temperature"] == [0, 0.5, 0.5, 1.0, 1.0][j]
        assert record["accuracy"]["tagged"] == (record["answer"] == canonical(gold[problem]))
        assert record["accuracy"]["flexible"] == (record["flexible_answer"] == canonical(gold[problem]))
        assert 1 <= record["length"] <= C and (record["length"] == C or not record["truncated"])
    texts = {(m, j): [found[m, p["id"], j]["text"] for p in problems] for m in ("base", "trained") for j in range(5)}
    assert len(set(map(tuple, texts.values()))) == 10  # models, temperatures and samples all differ
    assert 50 < sum(record["accuracy"]["tagged"] for record in found.values()) < 350


def test_the_same_command_again_samples_nothing(folder, whole, monkeypatch):
    before = (folder / "whole" / "samples.jsonl").read_bytes()
    monkeypatch.setattr("models.continuous_batching.prefill", lambda *_: pytest.fail("a prompt was prefilled"))
    assert evaluate(flags(folder, "whole")) == whole
    assert (folder / "whole" / "samples.jsonl").read_bytes() == before


def script(folder: Path, argv: list[str], count: int = 1, at: Path = ROOT) -> subprocess.Popen:
    """The program on `count` devices, as a user starts it in a directory."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {
        "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_ENABLE_COMPILATION_CACHE": "1",
    } | ({"XLA_FLAGS": xla_flags(count)} if count > 1 else {})  # fmt: skip
    command, pipe = [sys.executable, str(ROOT / "scripts" / "evaluate_consensus.py"), *argv], subprocess.PIPE
    return subprocess.Popen(command, cwd=at, env=env, stdout=pipe, stderr=pipe, text=True)


def pair(folder: Path, first: list[str], second: list[str], count: int = 1, at: tuple[Path, Path] = (ROOT, ROOT)) -> list:
    """Two processes of one evaluation, each with its flags and its directory, until both have ended: (exit code, out, err)."""
    joined = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    flags = (first, second)
    processes = [script(folder, [*flags[i], *joined, f"--process_id={i}"], count, at[i]) for i in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(lambda process: process.communicate(timeout=120), processes))
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


@pytest.mark.long
def test_kill_9_loses_no_sample_and_what_is_sampled_later_is_the_same(folder, whole):
    """Killed twice, the second time among the second model's samples, then left alone; one device, other batches."""
    argv, file = flags(folder, "killed", batch_size=2), folder / "killed" / "samples.jsonl"
    kept = b""
    for lines in (90, 5 * N + 30):
        process = script(folder, argv)
        while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -9 and process.communicate()[0].count("\n") < 8  # it was at work
        written = file.read_bytes()
        assert written.startswith(kept) and written.count(b"\n") < 10 * N
        kept = written[: written.rfind(b"\n") + 1]
    process = script(folder, argv)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "", err
    assert file.read_bytes().startswith(kept)
    assert samples(folder / "killed") == samples(folder / "whole")
    result = json.loads(out.splitlines()[-1])
    timed = ("seconds", "tokens_per_s")
    assert drop(result, timed) == drop(whole, timed)


@pytest.mark.long
def test_kill_9_loses_no_sample_in_bfloat16(folder, whole):
    """Rounding depends on the batch, so what is sampled later may differ; what was written stays, and nothing is missing."""
    argv, file = flags(folder, "killed16", dtype="bfloat16"), folder / "killed16" / "samples.jsonl"
    process = script(folder, argv)
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 90):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9 and process.communicate()[0].count("\n") < 8
    kept = file.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    process = script(folder, argv)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "", err
    assert file.read_bytes().startswith(kept) and kept.count(b"\n") >= 90
    assert samples(folder / "killed16").keys() == samples(folder / "whole").keys()


@pytest.mark.long
def test_two_processes_go_on_as_one(folder, whole):
    """2 processes x 4 devices, from the first 90 samples of 1 x 8: the others are the same, and so are the figures."""
    file = folder / "pair" / "samples.jsonl"
    file.parent.mkdir()
    shutil.copy(folder / "whole" / "config.json", file.parent)
    kept = b"".join((folder / "whole" / "samples.jsonl").read_bytes().splitlines(keepends=True)[:90])
    file.write_bytes(kept)
    argv = flags(folder, "pair")
    (code, out, err), second = pair(folder, argv, argv, count=4)
    assert code == second[0] == 0 and err == second[2] == "", (err, second)
    assert not any(line.startswith(("{", "problems")) for line in second[1].splitlines())  # Gloo prints a line everywhere
    assert file.read_bytes().startswith(kept) and samples(folder / "pair") == samples(folder / "whole")
    timed = ("seconds", "tokens_per_s")
    assert drop(json.loads(out.splitlines()[-1]), timed) == drop(whole, timed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "another seed than process 0, 1 instead of 0"),
        ({"data": "{0}/other.jsonl"}, "another data than process 0, '{0}/other.jsonl' instead of '{0}/problems.jsonl'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_processes_of_other_settings_end_together(folder, changed, said):
    shutil.copy(folder / "problems.jsonl", folder / "other.jsonl")
    changed = {name: str(value).format(folder) for name, value in changed.items()}
    for code, _, err in pair(folder, flags(folder, "unequal"), flags(folder, "unequal", **changed)):
        assert code == 2 and err.count("\n") == 1
        assert err.startswith(f"error: process 1 has {said.format(folder)}"), err
    assert not (folder / "unequal").exists()


@pytest.mark.parametrize(
    ("file", "name"), [("problems.jsonl", "set of problems"), ("model/model.safetensors", "trained model")], ids=str
)
def test_processes_of_other_files_end_together(folder, tmp_path, file, name):
    """Files that have the same name on two machines, but not the same content."""
    for i in range(2):
        shutil.copytree(folder / "model", tmp_path / str(i) / "model")
        shutil.copy(folder / "problems.jsonl", tmp_path / str(i))
    content = (tmp_path / "1" / file).read_bytes()
    old, new = (content[-1:], bytes([content[-1] ^ 1])) if "model" in file else (b"#### ", b"#### 1")
    (tmp_path / "1" / file).write_bytes(content[: content.rindex(old)] + new + content[content.rindex(old) + len(old) :])
    argv = flags(folder, "unequal", model_path="model", data="problems.jsonl")
    for code, _, err in pair(folder, argv, argv, at=(tmp_path / "0", tmp_path / "1")):
        assert code == 2 and err.count("\n") == 1
        assert err.startswith(f"error: process 1 has another {name} than process 0, "), err


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(folder, whole, monkeypatch, capsys):
    """After the first samples: they are kept, and the others follow."""
    progress = sys.modules["evaluate_consensus"].SampleProgress
    real = progress.add

    def interrupt(progress, ended):
        real(progress, ended)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress, "add", interrupt)
    with pytest.raises(Stopped) as stopped:
        evaluate(flags(folder, "stopped"))
    monkeypatch.undo()
    assert stopped.value.code == 130 and "stopped by SIGINT; the same command resumes" in capsys.readouterr().out
    some = samples(folder / "stopped")
    assert 0 < len(some) < 5 * N and some.items() <= samples(folder / "whole").items()
    evaluate(flags(folder, "stopped"))
    assert samples(folder / "stopped") == samples(folder / "whole")


def drop(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: drop(x, names) for key, x in value.items() if key not in names}
    return value


def test_a_torn_or_foreign_line_is_sampled_again(folder, whole, capsys):
    shutil.copytree(folder / "whole", folder / "torn")
    file = folder / "torn" / "samples.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([*lines[:30], b"\0\0", *lines[31:-4], lines[-4][:50]]))
    evaluate(flags(folder, "torn"))
    assert samples(folder / "torn") == samples(folder / "whole")
    assert "warning: skipped 1 malformed line of samples.jsonl (31)\n" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_progress_is_plain_lines_in_a_pipe_and_one_bar_on_a_terminal(terminal, capsys, monkeypatch):
    """30 samples of 7 tokens: 4 were there, then some end together every 4 seconds, which is too often for a line each."""
    script, clock = sys.modules["evaluate_consensus"], iter([100.0, 104.0, 108.0, 112.0, 116.0])
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(script, "tqdm", partial(script.tqdm, mininterval=0))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    progress = script.SampleProgress(4, 30)
    for count in (2, 6, 6, 6, 6):
        progress.add([Completion(0, [1] * 7, "", False)] * count)
    progress.close()
    out, err = capsys.readouterr()
    assert err == ""
    if terminal:
        assert "30/30" in out and "10 tokens/s" in out and out.count("\n") == 1
    else:
        assert out.splitlines() == [
            "6/30 samples", "24/30 samples  10 tokens/s  0:04 left", "30/30 samples  10 tokens/s  0:00 left",
        ]  # fmt: skip


def test_the_last_line_on_a_terminal_is_short(whole):
    line = json.dumps({key: whole[key] for key in sys.modules["evaluate_consensus"].SHORT})
    assert len(line) < 220 and {"n", "fixed", "broke", "mcnemar_p"} <= json.loads(line).keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperatures": "0.5,0.9"}, "temperatures [0.5, 0.5, 1.0, 1.0] -> [0.5, 0.5, 0.9, 0.9]"),
        ({"samples": 1}, "temperatures"),
        ({"max_new_tokens": 8}, "max_new_tokens 32 -> 8"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"top_k": 3}, "top_k 0 -> 3"),
        ({"system_prompt": "Think."}, "system_prompt  -> Think."),
        ({"limit": 39}, "problems"),
        ({"base_path": ""}, "models"),
        ({"dtype": "bfloat16"}, "dtype float32 -> bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_directory_of_other_settings_is_refused(folder, whole, changes, said):
    before = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    with pytest.raises(ConfigError) as error:
        evaluate(flags(folder, "whole", **changes))
    assert str(error.value).startswith(f"{folder / 'whole'} holds another evaluation (") and said in str(error.value)
    assert str(error.value).endswith("; give another --out") and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in (folder / "whole").iterdir()} == before


@pytest.mark.parametrize("name", [pytest.param("base", marks=pytest.mark.long), "trained"])
def test_a_directory_of_another_model_is_refused_wherever_that_lies(folder, whole, tmp_path, name):
    """The same weights elsewhere are the same model; other weights are not."""
    shutil.copytree(folder / "model", tmp_path / "moved")
    evaluate(flags(folder, "whole", model_path=tmp_path / "moved"))
    changes = {"trained": {"model_path": folder / "base"}, "base": {"base_path": folder / "model"}}[name]
    with pytest.raises(ConfigError, match=rf"holds another evaluation \({name}_weights [0-9a-f]* -> [0-9a-f]*\)"):
        evaluate(flags(folder, "whole", **changes))


def test_other_directories_are_left_alone(folder, whole, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(PRESETS["tiny"])))
    with pytest.raises(ConfigError, match="does not belong to an evaluation; give another --out"):
        evaluate(flags(folder, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == asdict(PRESETS["tiny"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out .*/file cannot be used: File exists"):
        evaluate(flags(folder, tmp_path / "file"))
    with (
        grpo.runs.consensus_eval.open_evaluation(tmp_path / "busy", make_problems(3, 0, "test"), [1.0], {}),
        pytest.raises(ConfigError, match=f"busy is in use by process {os.getpid()}"),
    ):
        evaluate(flags(folder, tmp_path / "busy"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_path": ""}, "model_path is needed"),
        ({"temperatures": "0.5,hot"}, "temperatures '0.5,hot' must be numbers above 0, such as 0.2,0.6,1.0"),
        ({"temperatures": "0"}, "temperatures '0' must be numbers above 0"),
        ({"samples": 0}, "samples 0 must be at least 1"),
        ({"batch_size": 3}, "batch_size 3 must divide over 8 devices"),
        ({"max_new_tokens": -1}, "max_new_tokens -1 must not be negative"),
        ({"limit": -1}, "limit -1 must not be negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_used_is_named(folder, tmp_path, changes, said):
    with pytest.raises(Exception, match=said):
        evaluate(flags(folder, tmp_path / "never", **changes))
    assert not (tmp_path / "never").exists()


def test_a_prompt_that_is_too_long_is_wrong_and_named(folder, one_device, capsys):
    """The denominator stays; without the flag, nothing is too long."""
    result = evaluate(flags(folder, "short", base_path="", max_prompt_tokens=40))
    long = result["too_long"]["trained"]
    assert result["n"] == N and 0 < len(long) < N
    greedy = [r for r in read(folder / "short" / "samples.jsonl") if r["sample"] == 0]
    assert len(greedy) == N - len(long) and not {r["problem"] for r in greedy} & set(long)
    assert result["models"]["trained"]["greedy"]["tagged"] == sum(r["accuracy"]["tagged"] for r in greedy) / N > 0
    shown = capsys.readouterr().out
    assert f"trained: {len(long)} problems count as wrong because their prompts are too long: {', '.join(long)}" in shown


def test_one_model_alone_is_said_to_be_alone(folder, capsys):
    result = evaluate(flags(folder, "alone", base_path="", limit=39))
    assert result["models"]["base"] is None and result["trained_against_base"] is None and result["n"] == 39
    shown = capsys.readouterr().out
    assert "no base model: this model was not made by a run" in shown and "\nbase " not in shown


def test_a_run_brings_its_base_its_held_out_problems_and_its_settings(one_device, tmp_path):
    """The tiny model's weights as a run's checkpoint: trained and base are one model, and give the same answers."""
    base, run = find_model(TINY_MODEL), tmp_path / "run"
    config = replace(PRESETS["tiny"], eval_problems=24, run_dir=str(run), new_problems=50)
    mesh = make_mesh(1, jax.devices()[:1])
    with jax.set_mesh(mesh), closing(Checkpoints(run / "checkpoints", keep=1)) as checkpoints:
        state = init_state(base.load(mesh, STORE, "float32"), UpdateConfig.of(config))
        checkpoints.save(2, state, {"step": 2, "config": asdict(config)}, wait=True)
    (run / "model").mkdir()
    copy_description(base, run / "model")
    result = evaluate([f"--model_path={run}", "--temperatures=0.6"])
    problems = read(run / "consensus" / "problems.jsonl")
    assert [p["id"] for p in problems] == [p.id for p in choose_problems(config)[1]] and len(problems) == 24
    settings = json.loads((run / "consensus" / "config.json").read_text())
    assert (settings["system_prompt"], settings["max_new_tokens"]) == ("", 32)
    assert result["models"]["base"]["greedy"] == result["models"]["trained"]["greedy"]
    folder_of = sys.modules["evaluate_consensus"].default_folder
    for asked, name in {run: "consensus", run / "checkpoints" / "2": "consensus-2"}.items():
        assert folder_of(str(asked), find_model(asked)) == run / name
    assert 0.2 < result["models"]["trained"]["greedy"]["tagged"] < 0.8
    found, _ = model_figures(problems, [r for r in read(run / "consensus" / "samples.jsonl") if r["model"] == "base"], [0.6])
    assert found == result["models"]["base"]


def test_greedy_answers_are_those_of_transformers_generate(gemma270m):
    """Token for token, on prompts of several lengths in one batch beside samples at a temperature."""
    import transformers

    torch = pytest.importorskip("torch")
    model, tokenizer = find_model(gemma270m), load_tokenizer(gemma270m)
    config = replace(PRESETS["tiny"], prompts_per_step=2, group_size=2, max_new_tokens=24)
    problems, prompt_ids, _ = drop_long(make_problems(4, 0, "test"), tokenizer, "Think, then answer.", 100)
    config = replace(config, max_prompt_tokens=max(map(len, prompt_ids)))
    mesh = make_mesh(1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        view = model.load(mesh, ROLLOUT, "float32")
        execution = ExecutionConfig(ROLLOUT, "float32")
        ours = [
            completion
            for ended in complete(view, prompt_ids, [0.0, 1.0], tokenizer, model.config, execution, config)
            for completion in ended
        ]
    peer: Any = transformers.AutoModelForCausalLM.from_pretrained(gemma270m, dtype=torch.float32).eval()
    for completion in ours:
        if completion.index % 2 == 0:
            prompt = torch.tensor([prompt_ids[completion.index // 2]])
            with torch.no_grad():
                theirs = peer.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, top_k=None, top_p=None,
                    eos_token_id=list(tokenizer.stop_ids),
                )  # fmt: skip
            assert completion.tokens == theirs[0, prompt.shape[1] :].tolist()
    assert len(ours) == 2 * len(problems) and np.ptp([len(ids) for ids in prompt_ids]) > 5
