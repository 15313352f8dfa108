"""Laws of scripts/export.py: others load what it writes and compute what we compute; nothing of anybody's is overwritten."""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from foreign import write_flax
from make_references import REFERENCES, VARIANTS, load, pad, real_logits
from safetensors.numpy import load_file

from data.prompts import encode_prompt
from data.tokenizer import load_tokenizer
from grpo.config import TINY_MODEL, Config
from grpo.errors import ConfigError, RunError
from grpo.reports.model_card import model_card
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.model_source import copy_description, find_model
from grpo.update import UpdateConfig, init_state
from models.formats.convert import load_params, read_config
from models.formats.save import tensors, text_config, write_weights
from models.sharding import STORE

ROOT = Path(__file__).parents[1]
TINY = Path(TINY_MODEL)
QUESTIONS = ("Ann has 3 pens and buys 4. How many pens has she?", "Bob had 12 nuts and ate 5. How many nuts are left?")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")  # orbax's


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXPORT = script("export")


def export(model: Path, out: Path, *argv: str) -> Path:
    EXPORT.main(["--model_path", str(model), "--out", str(out), *argv])
    return Path(out)


@pytest.fixture(scope="module")
def run(mesh, tmp_path_factory) -> Path:
    """A run's directory, as if it had trained the tiny model for 7 steps and evaluated it twice."""
    base, folder = find_model(TINY), tmp_path_factory.mktemp("runs") / "lucky"
    (folder / "model").mkdir(parents=True)
    params = jax.tree.map(lambda leaf: 1.01 * leaf, base.load(mesh, STORE, "float32"))
    copy_description(base, folder / "model")
    with closing(Checkpoints(folder / "checkpoints", keep=2)) as checkpoints:
        for step in (3, 7):
            config = {"model_path": TINY_MODEL, "data": "arithmetic", "system_prompt": "Think.", "run_dir": "/home/me/lucky"}
            checkpoints.save(step, init_state(params, UpdateConfig.of(Config())), {"step": step, "config": config}, wait=True)
    figures = {
        "n": 500,
        "low": 0.45,
        "high": 0.54,
        "greedy": 0.494,
        "greedy_format": 0.998,
        "sampled": 0.1,
        "sampled_length": 8,
    }
    lines = [{"step": 0, "accuracy": figures}, {"step": 7, "accuracy": figures | {"greedy": 0.968}}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def assert_generates_the_same(folder: Path, model: Path) -> None:
    """transformers' greedy tokens on an exported folder are our own on what was exported."""
    torch, tokenizer = pytest.importorskip("torch"), load_tokenizer(folder)
    ids = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    ours = script("sample").main(["--model_path", str(model), "--ids", json.dumps(ids), "--max_new_tokens", "16"])
    generate = load(folder).generate  # type: ignore[attr-defined]
    for prompt, completion in zip(ids, ours["completions"], strict=True):
        out = generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
        assert out == completion["token_ids"] and len(out) > 3


@pytest.mark.long
def test_transformers_generates_our_tokens_from_the_embedded_model(tmp_path):
    assert_generates_the_same(export(TINY, tmp_path / "out", "--dtype", "float32"), TINY)


def test_an_exported_folder_has_the_tensors_of_its_model(tmp_path):
    folder = export(TINY, tmp_path / "out", "--dtype", "float32")
    assert load_file(folder / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()


def test_settings_of_a_quantisation_that_is_gone_are_not_exported(tmp_path):
    """Merged QLoRA folders have them, and transformers would quantise anew."""
    folder = Path(shutil.copytree(TINY, tmp_path / "merged"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert json.loads((export(folder, tmp_path / "out") / "config.json").read_text()) == config


@pytest.mark.long
def test_transformers_generates_our_tokens_from_a_run(run, tmp_path):
    assert_generates_the_same(export(run, tmp_path / "out", "--dtype", "float32"), run)


def test_bfloat16_is_the_default_and_what_was_bfloat16_is_the_same_to_the_bit(tmp_path):
    folder = export(TINY, tmp_path / "out")
    ours, theirs = load_file(folder / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert {str(x.dtype) for x in ours.values()} == {"bfloat16"}
    assert all((ours[name].view(np.uint16) == theirs[name].view(np.uint16)).all() for name in theirs)
    before, after = (json.loads((place / "config.json").read_text()) for place in (TINY, folder))
    assert after == before  # it is bfloat16 already
    before, after = (json.loads((place / "generation_config.json").read_text()) for place in (TINY, folder))
    assert after == before and sorted(load_tokenizer(TINY).stop_ids) == after["eos_token_id"]


@pytest.fixture
def export_flax(small_tokenizer_folder, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Exports a variant from a flax checkpoint without any config.json."""

    def export_variant(name: str) -> Path:
        monkeypatch.setattr("models.formats.convert.MODELS", {"it": read_config(REFERENCES / name)})
        monkeypatch.setattr(EXPORT, "check_tokenizer", lambda *_: None)  # the small one has more pieces than these models rows
        write_flax(tmp_path / "kaggle" / "it", REFERENCES / name)
        shutil.copy(small_tokenizer_folder / "tokenizer.json", tmp_path / "kaggle")
        return export(tmp_path / "kaggle", tmp_path / "out", "--dtype", "float32")

    return export_variant


def assert_transformers_computes(folder: Path, reference: Path) -> None:
    values = np.load(reference / "reference.npz")
    rows = [row[:length] for row, length in zip(values["tokens"], values["lengths"], strict=True)]
    np.testing.assert_allclose(real_logits(load(folder), *pad(rows, "right")), values["right"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_flax_checkpoint_becomes_a_folder_of_the_same_weights(name, export_flax):
    """Without any config.json: then it is ours, and says in transformers' words what the preset says."""
    folder, reference = export_flax(name), REFERENCES / name
    assert read_config(folder) == read_config(reference)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(load_tokenizer(folder).stop_ids)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors")
    assert all((ours[key] == theirs[key]).all() for key in theirs) and ours.keys() == theirs.keys()


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_what_a_flax_checkpoint_becomes(name, export_flax):
    pytest.importorskip("torch")
    assert_transformers_computes(export_flax(name), REFERENCES / name)


def test_shards_hold_what_one_file_holds(tmp_path, mesh):
    source = REFERENCES / "gemma3-gqa"
    config, one = read_config(source), load_file(source / "model.safetensors")
    read = find_model(source).open
    assert read
    write_weights(tmp_path, tensors(config, read()), "float32", shard_bytes=20_000)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in one.values())
    assert all(file.stat().st_size < 20_000 + 4000 for file in files)
    params = load_params(tmp_path, config, mesh, STORE)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(load_params(source, config, mesh, STORE)), strict=True):
        assert (np.asarray(ours) == np.asarray(theirs)).all()


def test_one_tensor_at_a_time_is_made(tmp_path):
    read, made = find_model(REFERENCES / "gemma2-gqa").open, []
    assert read
    weights = tensors(read_config(REFERENCES / "gemma2-gqa"), read())
    for i, tensor in enumerate(weights):  # each is made when its turn comes, and what came before is on disk or in a buffer
        make = tensor.make
        object.__setattr__(tensor, "make", lambda i=i, make=make: made.append(i) or make())
    write_weights(tmp_path, weights, "float32")
    assert made == list(range(len(weights)))


@pytest.fixture
def multimodal(tmp_path, small_tokenizer_folder, monkeypatch) -> Path:
    """The folder of a Gemma 3 with a vision tower, of which only the text part is there."""
    monkeypatch.setattr(EXPORT, "check_tokenizer", lambda *_: None)
    source, folder = REFERENCES / "gemma3-gqa", tmp_path / "multimodal"
    folder.mkdir()
    values = json.loads((source / "config.json").read_text())
    inner = {key: value for key, value in values.items() if key != "architectures"}
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner,
        "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 16}, "image_token_index": 9, "eos_token_id": [1, 106],
        "mm_tokens_per_image": 256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole))
    shutil.copy(source / "model.safetensors", folder)
    shutil.copy(small_tokenizer_folder / "tokenizer.json", folder)
    return folder


def test_the_text_part_of_a_multimodal_model_is_a_text_model(multimodal, tmp_path):
    """transformers would look for a vision tower, by the base's own config.json."""
    source = REFERENCES / "gemma3-gqa"
    out = export(multimodal, tmp_path / "out", "--dtype", "float32")
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["Gemma3ForCausalLM"] and written["model_type"] == "gemma3_text"
    assert not {"vision_config", "text_config", "image_token_index", "mm_tokens_per_image"} & written.keys()
    assert read_config(out) == read_config(multimodal) == read_config(source)
    assert text_config(source / "config.json") == json.loads((source / "config.json").read_text())


@pytest.mark.long
def test_transformers_reads_the_text_part_of_a_multimodal_model(multimodal, tmp_path):
    pytest.importorskip("torch")
    assert_transformers_computes(export(multimodal, tmp_path / "out", "--dtype", "float32"), REFERENCES / "gemma3-gqa")


# What lies beside the weights.


def test_sums_are_of_every_file(tmp_path):
    folder = export(TINY, tmp_path / "out")
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.name != "SHA256SUMS"
    }
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= sums.keys()


def test_the_tokenizer_is_the_same_and_its_template_gives_our_prompts(tmp_path):
    import transformers

    folder = export(TINY, tmp_path / "out")
    assert (folder / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for question in (*QUESTIONS, "  two\n\nlines "):
        turns = [{"role": "user", "content": question}]
        text = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert theirs(text, add_special_tokens=False)["input_ids"] == encode_prompt(ours, question)


def test_a_template_of_the_base_is_kept(tmp_path):
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    own = EXPORT.CHAT_TEMPLATE.replace("model", "answer")
    (base / "chat_template.jinja").write_text(own)
    assert (export(base, tmp_path / "out") / "chat_template.jinja").read_text() == own


def test_the_card_has_the_results_of_the_run_and_no_paths_of_this_machine(run, tmp_path):
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "| 7 | 96.8% | 45.0% to 54.0% | 99.8% | 10.0% | 8.0 |" in card and "| 0 | 49.4% |" in card
    assert '"data": "arithmetic"' in card and "Think.\n\nQUESTION" in card and "Step 7 of a GRPO run" in card
    assert "/home/me" not in card and str(ROOT) not in card
    found = script("export").find_model(run)
    paths = {"model_path": "/home/me/adapters/", "base_path": "/home/me/gemma", "reward": "/home/me/a.py:f,/home/me/b.py:g"}
    found.meta["config"] |= paths | {"data": "/home/me/train.jsonl", "eval_data": "/home/me/test.jsonl"}
    card = model_card("lucky", found.size, "float32", run_dir=run, meta=found.meta)
    assert "/home/me" not in card and '"base_path": "gemma"' in card and '"reward": "a.py:f,b.py:g"' in card
    assert "500 problems (test.jsonl)" in card and '"model_path": "adapters"' in card
    found.meta["config"] |= {"model_path": "hf:google/gemma-3-1b-it", "data": "openai/gsm8k", "eval_data": ""}
    card = model_card("lucky", found.size, "float32", run_dir=run, meta=found.meta)
    assert '"hf:google/gemma-3-1b-it"' in card and "held out from openai/gsm8k" in card
    early = (export(run / "checkpoints" / "3", tmp_path / "early") / "README.md").read_text()
    assert "not evaluated at step 3" in early and "%" not in early
    plain = (export(TINY, tmp_path / "plain") / "README.md").read_text()
    assert "## Results" not in plain and "Gemma 3, 0.6M parameters" in plain


# What is there already, and mistakes.


def test_an_earlier_export_is_replaced_and_nothing_else(run, tmp_path):
    out = export(TINY, tmp_path / "out", "--dtype", "float32")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "SHA256SUMS").touch()  # one that was killed
    export(run, out)
    assert "Step 7" in (out / "README.md").read_text() and not (tmp_path / "out.part").exists()
    (out / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ConfigError, match="out exists and is not an earlier export; remove it"):
        export(TINY, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (tmp_path / "empty").mkdir()
    export(TINY, tmp_path / "empty")
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part" / "mine").touch()
    with pytest.raises(ConfigError, match=r"other\.part exists and is not an earlier export"):
        export(TINY, tmp_path / "other")


def test_the_folder_may_be_where_one_is(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(TINY.absolute(), Path("."))
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert (tmp_path / "here" / "README.md").read_text().count("# here") == 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="exists and is not an earlier export"):
        export(TINY.absolute(), Path("."))


def test_mistakes_are_one_line_and_leave_nothing_behind(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, bare)
    for argv, reason in (
        ((TINY, tmp_path / "file"), "file exists and is not an earlier export"),
        ((TINY, tmp_path / "file" / "below"), "cannot be written"),
        ((TINY, TINY), "is the model itself"),
        ((bare, tmp_path / "out"), "bare holds no tokenizer.json and no tokenizer.model"),
        ((TINY, tmp_path / "out", "--lora", "peft"), "has no adapters; leave --lora out"),
        ((tmp_path / "absent", tmp_path / "out"), "absent/config.json is missing"),
    ):
        with pytest.raises(ValueError) as error:
            export(*argv)  # type: ignore[arg-type]
        assert reason in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="has 1 MB free, 68 MB are needed"):
        export(TINY, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "file"]


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    files = sorted((copy / "checkpoints" / "7" / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = files[-1].read_bytes()
    faults = []
    for place in range(1000, len(data), len(data) // 12):
        files[-1].write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        try:
            export(copy, tmp_path / "out")
        except RunError as error:
            faults.append(str(error))
            assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert faults and all("is damaged" in fault for fault in faults)


def write_export(out: Path, content: str) -> None:
    """A small export."""
    with EXPORT.new_folder(out, SimpleNamespace(path=Path("m"), folder=Path("m"))) as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(content)
        (folder / EXPORT.SUMS).write_text("".join(f"{content}  {name}\n" for name in ("config.json", "model.safetensors")))


def killed_at(number: int, call: Callable[[], None]) -> bool:
    """Whether a process that makes this call ends, killed, before its n-th change of a directory."""
    if (child := os.fork()) == 0:
        count = 0

        def counted(change: Callable) -> Callable:
            def changed(*args, **named):
                nonlocal count
                count += 1
                if count == number:
                    os._exit(9)
                return change(*args, **named)

            return changed

        for name in ("unlink", "rename", "rmdir", "mkdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        setattr(EXPORT, "exchange", counted(EXPORT.exchange))  # noqa: B010 (a module that pyright does not know)
        call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:os.fork", "ignore:This process")
@pytest.mark.parametrize("exchanges", [True, False])
def test_an_export_killed_at_any_moment_leaves_the_old_or_the_new_one(tmp_path, exchanges, monkeypatch):
    """Whole, and the same command then works, without leftovers; also where two folders cannot be exchanged."""
    if not exchanges:
        monkeypatch.setattr(EXPORT, "exchange", lambda one, other: False)
    out, number, seen = tmp_path / "out", 1, []
    write_export(out, "old")
    while killed_at(number, lambda: write_export(out, "new")):
        place = out if out.exists() else tmp_path / "out.replaced"
        assert exchanges is False or place == out
        found = {file.name: file.read_text() for file in place.iterdir() if file.name != EXPORT.LOCK}
        assert set(found) == {"config.json", "model.safetensors", EXPORT.SUMS}
        seen.append(found["config.json"])
        assert found["model.safetensors"] == seen[-1] and seen[-1] in found[EXPORT.SUMS]
        write_export(out, "old")
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["SHA256SUMS", "config.json", "model.safetensors", "out"]
        assert (out / "config.json").read_text() == "old"
        number += 1
    assert {"old", "new"} == set(seen) and number > 8
    assert (out / "config.json").read_text() == "new"


def test_two_exports_into_one_folder_do_not_mix(tmp_path):
    out = tmp_path / "out"
    with EXPORT.new_folder(out, SimpleNamespace(path=Path("m"), folder=Path("m"))) as folder:
        (folder / "config.json").write_text("first")
        with pytest.raises(ConfigError, match="is in use by process"):
            write_export(out, "second")
        (folder / EXPORT.SUMS).write_text("x  config.json\n")
    assert [file.name for file in sorted(out.iterdir())] == [EXPORT.SUMS, "config.json"]


def test_links_planted_where_an_export_writes_are_not_followed(tmp_path):
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.mkdir()
    (precious / EXPORT.SUMS).write_text("mine")
    (tmp_path / "out.part").symlink_to(precious)
    with pytest.raises(ConfigError, match=r"out\.part exists and is not an earlier export"):
        write_export(out, "x")
    (tmp_path / "out.part").unlink()
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / EXPORT.LOCK).symlink_to(precious / EXPORT.SUMS)
    with pytest.raises(ConfigError, match="cannot be written: Too many levels of symbolic links"):
        write_export(out, "x")
    (tmp_path / "out.part" / EXPORT.LOCK).unlink()
    for name in ("config.json", EXPORT.SUMS):
        (tmp_path / "out.part" / name).symlink_to(precious / EXPORT.SUMS)
    write_export(out, "x")
    assert [(file.name, file.read_text()) for file in precious.iterdir()] == [(EXPORT.SUMS, "mine")]
