"""Attacks beyond the numbered faults, by name: hostile and damaged files, links, paths, outputs and machines.

Each ends in one line and an exit code, or is survived; docs/reliability.md counts them and names the tests of the others.
"""

import errno
import io
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import test_page
from faults import command, ended, make_config
from training import devices, run

import grpo.runs.metrics
import grpo.runs.setup
from data.problems import Problem, load_problems
from grpo.config import TINY_MODEL, Config
from grpo.errors import ConfigError, RunError
from grpo.reports.jsonl import parse_json, read_records, rewrite
from grpo.reports.page import read_analyses, read_page, render
from grpo.runs.cli import keep_compiled_programs, run_script
from grpo.runs.consensus_eval import open_evaluation
from grpo.runs.metrics import JsonLines
from grpo.runs.model_source import copy_description, find_model
from grpo.runs.outcome import lasting_output, run_main
from grpo.runs.reward_worker import UserRewards
from grpo.runs.run_dir import open_run_dir
from models import ModelError
from scripts import evaluate_consensus, export, report, sample

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ROOT = Path(__file__).parents[1]
DEEP = "[" * 100_000
LONG = "x" * 300


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(tmp_path_factory.mktemp("attacks"))


# ------------------------------------------------------------------------------------------------------------- the output


class Broken(io.StringIO):
    """A pipe that nobody reads, or a full disk."""

    def __init__(self, number: int, works: int = 0):
        super().__init__()
        self.number, self.works = number, works

    def write(self, text: str) -> int:
        self.works -= 1
        if self.works < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("works", [0, 3])
def test_a_closed_or_full_stdout_ends_nothing(number, works, monkeypatch, capsys):
    """It is given up with one warning; what comes after it is done."""
    done = []

    def main(argv: list[str]) -> dict[str, Any]:
        for line in range(5):
            print(line, flush=True)
        done.append(True)
        return {}

    monkeypatch.setattr(sys, "stdout", Broken(number, works))
    run_script(main, [])
    assert done
    assert capsys.readouterr().err == f"warning: standard output is gone ({os.strerror(number)}); nothing more is printed\n"


def test_a_stderr_that_is_gone_ends_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Broken(errno.ENOSPC))
    with lasting_output():
        print("warning", file=sys.stderr)
        print("further")
    assert capsys.readouterr().out == "further\n"


def test_streams_that_were_closed_before_the_start(monkeypatch):
    """`>&-`: Python has None there."""
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_output():
        assert not sys.stdout.isatty()
        print("nowhere")
    assert sys.stdout is None


def test_a_character_that_the_output_does_not_have(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    run_main(lambda argv: print("runs/ümlaut") or {}, [])
    assert output.buffer.getvalue() == b"runs/\\xfcmlaut\n{}\n"


# -------------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("platform", ["cuda", "rocm", "nonsense"])
def test_a_machine_without_the_device_that_was_asked_for(platform):
    environment = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "scripts/train.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: JAX_PLATFORMS={platform}: no such device can be used here")
    assert 'pip install -e ".[tpu]"' in done.stderr and done.stderr.count("\n") == 1


def test_no_cluster_and_too_few_devices(config, capsys):
    assert "coordinator auto: no cluster" in ended(capsys, 2, command(config, coordinator="auto"))
    assert "rollout_tp 16 does not divide 1 devices" in ended(capsys, 2, command(config, rollout_tp=16))


@pytest.mark.parametrize("damage", [b"", b"torn"])
def test_entries_of_the_compile_cache_that_cannot_be_read_are_replaced(damage, tmp_path, monkeypatch, recwarn):
    """By the process that meets them; it says nothing."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    compilation_cache = pytest.importorskip("jax.experimental.compilation_cache.compilation_cache")

    def compile_something() -> None:
        compilation_cache.reset_cache()
        jax.clear_caches()
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))

    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        keep_compiled_programs()
        compile_something()
        entries = {path: path.read_bytes() for path in tmp_path.glob("*-cache")}
        for path in entries:
            path.write_bytes(damage)
        compile_something()
        assert entries and {path for path in entries if path.read_bytes() == damage} == set()
        assert not [warning for warning in recwarn if "cache" in str(warning.message)]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_fault_34_a_real_limit_of_memory(config, tmp_path):
    """The kernel refuses memory while the run starts or trains: one line or Python's own death, never a damaged record."""
    config = replace(config, run_dir=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "scripts/train.py", *command(config)], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1200 << 20, 1200 << 20)),
    )  # fmt: skip
    assert done.returncode != 0
    assert not (tmp_path / "run" / "checkpoints").exists() or run(config)["steps"] == config.max_steps


# ---------------------------------------------------------------------------------------------------------------- the paths


@pytest.mark.parametrize(
    "name", ["model_path", "base_path", "data", "reward", "run_dir", "relay_from", "pass_rates", "eval_data"]
)
def test_a_path_of_300_characters(config, name, capsys, tmp_path):
    """Of every setting that is one."""
    value = {"data": f"{LONG}.jsonl", "eval_data": f"{LONG}.jsonl", "reward": f"{LONG}.py:f"}.get(name, LONG)
    if name == "base_path":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
        config = replace(config, model_path=str(tmp_path))
    line = ended(capsys, 2, command(replace(config, run_dir=str(tmp_path / "run")), **{name: value}))
    assert "File name too long" in line or "does not exist" in line or "cannot be" in line, line


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        (report, [LONG]), (report, ["x", "--evaluation", LONG]), (sample, ["--prompt=x", "--model_path", LONG]),
        (export, ["--out=x", "--model_path", LONG]), (evaluate_consensus, ["--model_path", LONG]),
    ],
)  # fmt: skip
def test_a_path_of_300_characters_in_the_other_scripts(script, argv, capsys):
    line = ended(capsys, 2, argv, script.main)
    assert "File name too long" in line or "does not exist" in line or "holds no run" in line


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EIO, 1), (errno.EFBIG, 1), (errno.EROFS, 2), (errno.EACCES, 2)],
)
def test_what_the_file_system_says_is_one_line(config, number, code, tmp_path, monkeypatch, capsys):
    """Such as a disk that is full when a run starts again."""

    def full(path: Path, content: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(grpo.runs.metrics, "rewrite", full)
    line = ended(capsys, code, command(config, run_dir=str(tmp_path / "run")))
    assert line == f"{tmp_path / 'run' / 'config.json'}: {os.strerror(number)}"


def test_another_error_of_the_system_is_a_bug():
    def main(argv: list[str]) -> dict[str, Any]:
        raise FileNotFoundError(errno.ENOENT, "No such file", "ours")

    with pytest.raises(FileNotFoundError):
        run_main(main, [])


def test_fault_9_a_directory_that_is_not_ours_also_for_root(config, tmp_path):
    """As the user nobody, where root runs the tests."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        place = tmp_path / "run" if os.geteuid() == 65534 else Path("/root/run")
        with (
            pytest.raises(ConfigError, match="cannot be used: Permission denied"),
            open_run_dir(replace(config, run_dir=str(place))),
        ):
            pass
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


# ---------------------------------------------------------------------------------------------------------------- the links


@pytest.fixture
def precious(tmp_path) -> Iterator[Path]:
    """A file of somebody's, to which no test writes."""
    path = tmp_path / "precious"
    path.write_text("mine\n")
    yield path
    assert path.read_text() == "mine\n"


def test_a_link_at_the_lock_is_not_followed(config, precious, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with (
        pytest.raises(ConfigError, match="Too many levels of symbolic links"),
        open_run_dir(replace(config, run_dir=str(tmp_path / "run"))),
    ):
        pass
    with pytest.raises(ConfigError, match="Too many levels of symbolic links"), open_evaluation(tmp_path / "run", [], [], {}):
        pass


@pytest.mark.parametrize("planted", ["a.part", "a.json"])
def test_a_link_where_a_file_is_replaced_is_not_followed(precious, tmp_path, planted):
    (tmp_path / planted).symlink_to(precious)
    rewrite(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new" and not (tmp_path / "a.json").is_symlink()


def test_a_link_at_a_record_is_replaced(precious, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(precious)
    log = JsonLines(tmp_path / "metrics.jsonl", -1)
    log.write({"step": 1})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to(precious)
    with pytest.raises(RunError, match="Too many levels of symbolic links"):
        log.write({"step": 2})


def test_a_link_at_the_copy_of_the_tokenizer_is_not_followed(config, precious, tmp_path):
    base, folder = find_model(config.model_path), tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(precious)
    copy_description(base, folder)
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RunError, match="is a link"):
        copy_description(base, folder)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.filterwarnings("ignore:os.fork", "ignore:This process")
def test_a_report_killed_while_it_is_written_leaves_the_old_one(tmp_path):
    rewrite(tmp_path / "report.html", "old")
    if (child := os.fork()) == 0:
        Path.replace = lambda self, target: os._exit(9)  # type: ignore[assignment, method-assign]
        rewrite(tmp_path / "report.html", "new")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "report.html").read_text() == "old"
    rewrite(tmp_path / "report.html", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "new")]


# ---------------------------------------------------------------------------------------------------------------- the models


@contextmanager
def model_with(config: Config, folder: Path, **values: Any) -> Iterator[Path]:
    shutil.copytree(config.model_path, folder)
    settings = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(settings))
    yield folder


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**18}, {"num_hidden_layers": 1001}, {"vocab_size": 10**400},
        {"hidden_size": 2**40}, {"head_dim": 10**30}, {"rms_norm_eps": 10**400}, {"num_attention_heads": 10**18},
        {"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 10**400}, {"rope_theta": 10**400},
    ],
    ids=lambda values: next(reversed(values)),
)  # fmt: skip
def test_sizes_that_no_model_has(config, values, tmp_path, capsys):
    """Refused at once, before anything is made for each layer."""
    with model_with(config, tmp_path / "model", **values) as folder:
        line = ended(capsys, 2, command(config, model_path=str(folder)))
    assert "transformers cannot read it" in line or (next(reversed(values)) in line and " at most " in line)


def gguf_with(kind: int, length: int, inner: int = 0) -> bytes:
    """A GGUF file of one array of that many elements."""
    name = b"tokenizer.ggml.tokens"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    return header + struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, kind, length) + bytes(inner)


@pytest.mark.parametrize(
    "content",
    [gguf_with(0, 2**40), gguf_with(8, 2**40), gguf_with(9, 2**62), gguf_with(0, 2**63 + 5), gguf_with(9, 4, 4000)],
    ids=["bytes", "texts", "arrays", "unsigned", "nested"],
)
def test_an_array_of_a_gguf_file_that_is_longer_than_the_file(content, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    shutil.copy(Path(TINY_MODEL) / "config.json", tmp_path)
    model = find_model(path)
    with pytest.raises(ModelError, match="is not a whole GGUF file"):
        assert model.open and model.open()


def test_a_name_twice_in_the_header_of_a_weight_file(config, tmp_path, capsys):
    """The second one has other bytes."""
    shutil.copytree(config.model_path, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size].decode(), content[8 + size :]
    again = {"dtype": "F32", "shape": [16], "data_offsets": [len(data), len(data) + 64]}
    header = header.rstrip()[:-1] + f', "model.norm.weight": {json.dumps(again)}' + "}"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data + bytes(64))
    line = ended(capsys, 2, command(config, model_path=str(tmp_path / "model")))
    assert "is not a whole safetensors file" in line


@pytest.mark.parametrize("named", [5, [1], {}, "x" * 5000, "nul\0", ""])
def test_a_base_of_adapters_that_is_none(config, named, tmp_path, capsys):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": named}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    line = ended(capsys, 2, command(config, model_path=str(tmp_path)))
    assert "adapters need the model" in line or "File name too long" in line or "does not exist" in line


def test_adapters_that_lead_back_to_themselves(config, tmp_path, capsys):
    """One that names itself as its base, and two that name each other."""
    for name, base in (("a", "a"), ("b", "c"), ("c", "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / base).mkdir(exist_ok=True)
        settings = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
    for name in "abc":
        line = ended(capsys, 2, command(config, model_path=str(tmp_path / name)))
        assert line.endswith("its base model leads back to itself; give the --base_path of another")


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("model_path", "google/gemma-3-270m-it", "is hf:google/gemma-3-270m-it"),
        ("data", "gsm8k", "did you mean openai/gsm8k?"),
        ("reward", "brevity.py", "names no function; give brevity.py:FUNCTION"),
    ],
)  # fmt: skip
def test_what_was_probably_meant(config, setting, value, says, capsys):
    assert says in ended(capsys, 2, command(config, **{setting: value}))


def test_a_word_too_many_is_no_typo(capsys):
    assert (
        ended(capsys, 2, ["tiny", "extra"]) == "unexpected word 'extra': settings are given as --flag value; --help lists them"
    )


def test_a_base_model_is_named_as_one(config, tmp_path):
    model = find_model(config.model_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    real = replace(model, folder=tmp_path, config=replace(model.config, vocab_size=262_144))
    assert real.line.endswith(", a base model (no chat template)") and not model.is_base
    (tmp_path / "chat_template.jinja").write_text("")
    assert not real.is_base


def test_without_a_network_the_hub_is_not_tried_again_and_again(monkeypatch):
    """Nor are its flags other ones afterwards."""
    constants, settings = pytest.importorskip("huggingface_hub.constants"), pytest.importorskip("datasets.config")
    seen = []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: seen.append((constants.HF_HUB_OFFLINE, settings.HF_HUB_OFFLINE)) or 1 / 0
    )
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="cannot get openai/gsm8k from the hub"):
        load_problems("openai/gsm8k")
    assert seen == [(True, True)] and constants.HF_HUB_OFFLINE is False


# --------------------------------------------------------------------------------------------------------------- the records


@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 100_000, "[" * 60 + "]" * 60, '{"step": 1, "a": ' + "[" * 300 + "]" * 300 + "}"]
)
def test_json_that_is_nested_too_deep(text, tmp_path):
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(text)
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{text}\n{{"step": 2}}\n')
    notes: list[str] = []
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl", notes, "step")] == [1, 2]
    assert notes == ["skipped 1 malformed line of metrics.jsonl (2)"]


@pytest.mark.parametrize("content", [DEEP, "5", '["x"]', "null", "{", '"x"', b"\xff"])
def test_a_run_whose_settings_are_no_object(config, content, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    line = ended(capsys, 2, command(config, run_dir=str(tmp_path / "run")))
    assert "cannot be used" in line and path.read_bytes() == before


def test_records_that_are_gone_are_said_and_lines_that_are_none_are_skipped(config, tmp_path, capsys):
    config = replace(config, run_dir=str(tmp_path / "run"), eval_problems=0)
    run(config)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + f"\n{DEEP}\n[]\n")
    run(config)
    assert capsys.readouterr().err == (
        "warning: skipped 2 malformed lines of metrics.jsonl (2, 3)\n"
        "warning: metrics.jsonl has records of 1 of 2 steps: curves and result.json lack them\n"
    )


@pytest.mark.parametrize("content", ['["temperatures"]', "5", DEEP, '{"a": 1}', "null", "["])
def test_an_evaluation_whose_settings_are_none(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="does not belong to an evaluation"), open_evaluation(tmp_path, [], [1.0], {}):
        pass


@pytest.mark.parametrize("line", ["{}", "[]", "5", DEEP, '{"model": "base"}', '{"model": [], "problem": {}, "sample": "x"}'])
def test_samples_of_an_evaluation_that_are_none(line, tmp_path, capsys):
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with open_evaluation(tmp_path, [], [1.0], {}) as evaluation:
        assert evaluation.file.records == [] == evaluation.samples_of("base")
    assert "skipped 1 malformed line of samples.jsonl (1)" in capsys.readouterr().err


HOSTILE = [None, -5, "x", [], {}, [1], {"a": 1}, 10**30]


def changed(record: Any) -> Iterator[Any]:
    """The record with one value of it, at any depth, replaced or left out."""
    yield from HOSTILE

    def places(value: Any, path: tuple) -> Iterator[tuple]:
        keys = list(value) if isinstance(value, dict) else [0] if isinstance(value, list) and value else []
        for key in keys:
            yield (*path, key)
            yield from places(value[key], (*path, key))

    for path in places(record, ()):
        for hostile in [*HOSTILE, "gone"]:
            copy = json.loads(json.dumps(record))
            inside = copy
            for key in path[:-1]:
                inside = inside[key]
            if hostile == "gone":
                del inside[path[-1]]
            else:
                inside[path[-1]] = hostile
            yield copy


def test_a_report_of_hostile_files(tmp_path, monkeypatch):
    """Every value of every file of a run and its evaluation, replaced by something else: the page, or one line."""
    monkeypatch.setattr(test_page, "STEPS", 5)
    folder, tried = test_page.make_run(tmp_path / "run"), 0
    evaluation = test_page.make_evaluation(folder / "consensus")
    for path in [*folder.glob("*.json*"), *evaluation.glob("*.json*")]:
        text = path.read_text()
        first, rest = text.split("\n", 1) if path.suffix == ".jsonl" else (text, "")
        for record in changed(json.loads(first)):
            path.write_text(f"{json.dumps(record)}\n{rest}")
            tried += 1
            with suppress(ConfigError):
                page = read_page([folder], evaluation, 64)
                read_analyses(folder, page, evaluation)
                render(page)
        path.write_text(text)
    assert tried > 900


# ------------------------------------------------------------------------------------------------- processes that disagree


def test_what_processes_must_have_alike(config, tmp_path):
    """Each file that a run reads has its own fingerprint, so that the one that differs on a machine is named."""
    shutil.copytree(config.model_path, tmp_path / "model")
    shutil.copy(config.data, tmp_path / "data.jsonl")
    (tmp_path / "reward.py").write_text("def f(completion, problem):\n    return 0.0\n")
    config = replace(
        config, model_path=str(tmp_path / "model"), data=str(tmp_path / "data.jsonl"), reward=f"{tmp_path / 'reward.py'}:f"
    )

    def identity() -> dict[str, str]:
        with devices(1):
            prepared = grpo.runs.setup.prepare(config)
        with prepared.rewards:
            return grpo.runs.setup.identity_of(prepared)

    def differing(path: str, old: bytes, new: bytes) -> set[str]:
        before, content = identity(), (tmp_path / path).read_bytes()
        assert old in content
        (tmp_path / path).write_bytes(content.replace(old, new))
        after = identity()
        (tmp_path / path).write_bytes(content)
        return {name for name in before if before[name] != after[name]}

    weights = (tmp_path / "model" / "model.safetensors").read_bytes()[-8:]
    assert differing("model/model.safetensors", weights, weights[:-1] + bytes([weights[-1] ^ 1])) == {"model"}
    assert differing("data.jsonl", b"What is 3", b"What is 9") == {"set of problems"}
    assert differing("data.jsonl", b"#### 4", b"#### 5") == {"set of problems"}
    assert differing("reward.py", b"0.0", b"1.0") == {"reward file"}
    swapped = differing("model/tokenizer.json", b'"a":', b'"\xc3\xa4":')
    assert "tokenizer" in swapped
    assert grpo.runs.setup.settings_of(config) == grpo.runs.setup.settings_of(replace(config, process_id=3))
    assert grpo.runs.setup.settings_of(config) != grpo.runs.setup.settings_of(replace(config, seed=1))


def test_the_fault_of_one_process_is_that_of_all(config, monkeypatch):
    said = {}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(grpo.runs.setup, "check_same", lambda mine, fault: said.update(mine | {"fault": fault}) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.runs.setup.prepare_alike(config, lambda: find_model("nowhere"), lambda model: {})
    assert said["fault"].startswith("nowhere/config.json is missing") and said["learning_rate"] == "0.0003" and said["code"]
    assert "process_id" not in said


# ---------------------------------------------------------------------------------------------------------------- the rewards

STOPS = """
import os

def stops(completion, problem):
    os.kill(os.getpid(), 19)
    return 1.0
"""


@pytest.mark.parametrize(
    "replaced",
    [
        "json.dumps = json.loads = lambda *args, **named: 'x'",
        "json.JSONEncoder.encode = json.JSONEncoder.iterencode = json.JSONDecoder.decode = lambda *args, **named: 'x'",
        "json.encoder.c_make_encoder = json.encoder.encode_basestring_ascii = json.scanner.c_make_scanner = None",
        "json.JSONEncoder.__init__ = json.JSONDecoder.__init__ = None",
        "os.write = lambda fd, data: len(data)",
        "os.read = lambda fd, size: b''",
        "os.getpid = lambda: 1; os._exit = lambda code: None",
        "sys.stdout = sys.stderr = None",
        "sys.stdout.close(); sys.stderr.close()",
        "os.close(0); os.close(1); os.close(2)",
        "print = builtins.print = None",
        "math.isfinite = math.nan = traceback.format_exception = traceback.extract_tb = None",
        "time.monotonic = time.sleep = lambda *args: 0.0",
        "inspect.signature = None",
    ],
)
def test_a_reward_that_replaces_what_its_process_works_with(replaced, tmp_path):
    """It is graded as any other, one that raises too."""
    modules = "builtins, inspect, json, json.scanner, math, os, sys, time, traceback"
    functions = "def size(completion, problem):\n    return len(completion)\n\ndef raises(completion, problem):\n    1 / 0\n"
    (tmp_path / "reward.py").write_text(f"import {modules}\n\n{replaced}\n\n{functions}")
    problems, began = [Problem(str(i), "q", "1") for i in range(3)], time.monotonic()
    with UserRewards(",".join(f"{tmp_path / 'reward.py'}:{name}" for name in ("size", "raises"))) as rewards:
        values = rewards.score(["a", "bb", "ccc"], problems)
    assert values["size"] == [1.0, 2.0, 3.0] and all(map(math.isnan, values["raises"]))
    assert rewards.faults == {("raises", "ZeroDivisionError"): 3}
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("replaced", ["inspect.iscoroutinefunction", "builtins.isinstance"])
def test_a_reward_that_replaces_more_is_refused_at_once(replaced, tmp_path):
    (tmp_path / "reward.py").write_text(
        f"import builtins, inspect\n\n{replaced} = None\n\n\ndef f(completion, problem):\n    return 1\n"
    )
    began = time.monotonic()
    with pytest.raises(ConfigError, match="the worker died with exit code 1 while it imported"):
        UserRewards(f"{tmp_path / 'reward.py'}:f")
    assert time.monotonic() - began < 20


def test_a_worker_that_stops_reading_is_ended_by_its_time(tmp_path):
    """Its pipe is full and nobody reads it: writing waits no longer than the reward may take."""
    (tmp_path / "reward.py").write_text(STOPS)
    began = time.monotonic()
    with UserRewards(f"{tmp_path / 'reward.py'}:stops", timeout=0.5) as rewards:
        values = rewards.score(["x" * 300_000] * 2, [Problem(str(i), "q", "1") for i in range(2)])
        assert all(map(math.isnan, values["stops"]))
    assert time.monotonic() - began < 20
