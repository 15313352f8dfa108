"""Faults of a model folder, by their numbers: malicious, incomplete or foreign weights, tokenizer and config.json.

Each ends in one line on stderr and exit code 2.
"""

import ast
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from faults import ended, make_config, mistake
from safetensors.numpy import load_file, save_file
from test_convert import INDEX, WHOLE
from training import devices

import grpo.runs.setup
import grpo.runs.trainer
import grpo.step
from data.prompts import encode_prompt
from data.tokenizer import load_tokenizer
from grpo.config import Config
from models import ModelError
from models.formats.convert import read_config
from scripts import sample

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def model(config, tmp_path) -> Path:
    """A copy of the model folder to spoil."""
    return Path(shutil.copytree(config.model_path, tmp_path / "model"))


def safetensors(header: dict | bytes, body: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def tensor(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


FOREIGN = {
    "a header of 100 GB": (struct.pack("<Q", 100 * 2**30) + b"{}", "header too large"),
    "a header of 2^64 bytes": (struct.pack("<Q", 2**64 - 1) + b"{}", "header too large"),
    "overlapping tensors": (safetensors({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, 12), "is not a whole safetensors"),
    "offsets past the end": (safetensors({"a": tensor(0, 800, [200])}), "is not a whole safetensors"),
    "a negative size": (safetensors({"a": tensor(0, 8, [-2])}), "is not a whole safetensors"),
    "a size that overflows": (safetensors({"a": tensor(0, 8, [2**40, 2**40])}), "is not a whole safetensors"),
    "a name with ../": (safetensors({"../../x": tensor(0, 8, [2])}), "weight embed_tokens.weight is missing"),
    "garbage": (safetensors(b"\xff" * 40), "is not a whole safetensors"),
}


@pytest.mark.parametrize(("content", "reason"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.usefixtures("free_run_dir")
def test_fault_27_malicious_safetensors(config, model, capsys, content, reason):
    (model / WHOLE).write_bytes(content)
    assert reason in mistake(capsys, config, model_path=model)


@pytest.mark.usefixtures("free_run_dir")
def test_fault_27_pickles_are_never_loaded(config, model, capsys):
    """Under any name: a pickle that would leave a file behind leaves none."""
    mark = model / "executed"
    pickled = b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    (model / WHOLE).write_bytes(pickled)
    assert "is not a whole safetensors file" in mistake(capsys, config, model_path=model)
    (model / WHOLE).unlink()
    for name in ("pytorch_model.bin", "model.pt", "weights.pkl"):
        (model / name).write_bytes(pickled)
        assert f"{name} may be a pickle, which could run code: convert it" in mistake(capsys, config, model_path=model)
        (model / INDEX).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": name}}))
        assert f"{name} is not a whole safetensors file" in mistake(capsys, config, model_path=model)
        (model / name).unlink()
        (model / INDEX).unlink()
    assert not mark.exists()


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../other.safetensors", "leaves the folder"),
        ("/etc/passwd", "leaves the folder"),
        ("sub/x.safetensors", "leaves the folder"),
        (None, "leaves the folder"),
        ("..", "is missing"),
        ("a\0b", "is missing"),
    ],
)
@pytest.mark.usefixtures("free_run_dir")
def test_fault_27_index_that_leaves_the_folder(config, model, capsys, file, reason):
    (model / WHOLE).rename(model.parent / "other.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": file}}))
    assert reason in mistake(capsys, config, model_path=model)


@pytest.mark.parametrize("weight_map", [None, [1], "x", 5])
@pytest.mark.usefixtures("free_run_dir")
def test_fault_27_index_without_a_map(config, model, capsys, weight_map):
    (model / WHOLE).unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert f"{INDEX}: weight_map" in mistake(capsys, config, model_path=model)


@pytest.mark.usefixtures("free_run_dir")
def test_fault_27_links(config, model, capsys):
    """A link to a file is how Hugging Face's cache keeps weights, and is followed; one that leads nowhere is named."""
    blob = model.parent / "blobs" / "abc"
    blob.parent.mkdir()
    (model / WHOLE).rename(blob)
    (model / WHOLE).symlink_to("../blobs/abc")
    with devices(1):
        prepared = grpo.runs.setup.prepare(replace(config, model_path=str(model)))
    with jax.set_mesh(prepared.mesh):
        grpo.runs.trainer.load_base(prepared)
    for target in ("gone", WHOLE):
        (model / WHOLE).unlink()
        (model / WHOLE).symlink_to(target)
        assert "holds no model.safetensors" in mistake(capsys, config, model_path=model)


def test_fault_27_no_code_of_ours_unpickles_or_evaluates():
    """No pickle module, no call of eval, exec or compile on text, no `allow_pickle`."""
    sources = [path for name in ("data", "grpo", "models", "scripts") for path in (ROOT / name).rglob("*.py")]
    assert len(sources) > 20
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, path
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in ("eval", "exec", "compile"), path
                assert "allow_pickle" not in [keyword.arg for keyword in node.keywords], path


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("pieces", "rows", "fits"),
    [
        (256_000, 256_000, True),  # Gemma 1 and 2
        (262_144, 262_144, True),  # Gemma 3
        (262_144, 262_208, True),  # Gemma 3, the multimodal folders
        (262_144, 256_000, False),
        (256_000, 262_144, False),
        (256_000, 262_208, False),
        (256_001, 256_000, False),
    ],
)
def test_fault_31_tokenizer_of_another_family(pieces, rows, fits):
    tokenizer: Any = SimpleNamespace(vocab_size=pieces, folder="DIR")
    model: Any = SimpleNamespace(vocab_size=rows)
    if fits:
        grpo.runs.setup.check_tokenizer(tokenizer, model)
    else:
        with pytest.raises(ModelError, match=f"{pieces} pieces, the model {rows} rows: not this model's tokenizer"):
            grpo.runs.setup.check_tokenizer(tokenizer, model)


def test_fault_31_tokenizer_that_does_not_fit(config, model, capsys):
    """Training and sampling refuse a tokenizer of another size, without a special piece, or damaged."""
    path = model / "tokenizer.json"
    whole = path.read_text()
    spoiled = {
        whole.replace("<start_of_turn>", "<|im_start|>"): 'has no piece "<start_of_turn>": not a Gemma tokenizer',
        (ROOT / "models/tiny/tokenizer.json").read_text(): "has 616 pieces, the model 360 rows: not this model's tokenizer",
        "version https://git-lfs.github.com/spec/v1\n": f"cannot read {path}",
        "[" * 100_000: f"cannot read {path}",
    }
    for content, reason in spoiled.items():
        path.write_text(content)
        assert reason in mistake(capsys, config, model_path=model)
        assert reason in ended(capsys, 2, [f"--model_path={model}", "--prompt=How many?"], sample.main)


def test_fault_31_one_bos(model):
    """Also with a tokenizer.json that puts a BOS in front of whatever it encodes."""
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    special = {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": [bos], "special_tokens": special}
    change_json(
        model / "tokenizer.json", post_processor=processor | {"pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}]}
    )
    tokenizer = load_tokenizer(model)
    assert encode_prompt(tokenizer, "How many?").count(tokenizer.bos_id) == 1


BAD_CONFIGS = {
    "text for a count": ({"num_hidden_layers": "2"}, "num_hidden_layers '2' must be a whole number above 0"),
    "a fraction": ({"num_hidden_layers": 2.0}, "num_hidden_layers '2.0' must be a whole number"),
    "no layers": ({"num_hidden_layers": 0}, "must be a whole number above 0"),
    "a negative size": ({"head_dim": -8}, "head_dim '-8' must be"),
    "true for a size": ({"vocab_size": True}, "Field 'vocab_size' expected int, got bool (value: True)"),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 must be a multiple of num_key_value_heads 2"),
    "odd heads": ({"head_dim": 7}, "requires an even rotary dimension, but got `head_dim`=7"),
    "a number for the architectures": ({"architectures": 5}, "architectures '5' must be a list"),
    "lists in the architectures": ({"architectures": [["x"]]}, "architecture ['x'] is unknown"),
    "a list for the text part": ({"text_config": [1]}, "text_config '[1]' must be an object"),
    "a RoPE base that is text": ({"rope_theta": "x"}, "rope_theta 'x' must be a number above 0"),
    "a negative RoPE base": ({"rope_theta": -1}, "rope_theta '-1' must be a number above 0"),
    "RoPE as text": ({"rope_scaling": "x"}, "rope_scaling 'x' must be an object"),
    "RoPE as a list": ({"rope_parameters": [1]}, "rope_parameters '[1]' must be an object"),
    "an epsilon that is text": ({"rms_norm_eps": "a"}, "Field 'rms_norm_eps' expected float, got str (value: 'a')"),
    "NaN": ({"rms_norm_eps": math.nan}, "rms_norm_eps 'nan' must be a number above 0"),
    "other layers": ({"num_hidden_layers": 3}, "weight layers.2.input_layernorm.weight is missing"),
    "another width": ({"hidden_size": 32}, "has shape (360, 16), config.json says (360, 32)"),
}


@pytest.mark.parametrize(("changes", "reason"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
@pytest.mark.usefixtures("free_run_dir")
def test_fault_32_config_json_that_makes_no_sense(config, model, capsys, changes, reason):
    change_json(model / "config.json", **changes)
    assert reason in mistake(capsys, config, model_path=model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": 5}, "Field 'layer_types' expected a list, got int"),
        ({"layer_types": ["sliding", "sliding", "full"]}, "`layer_types` entries must be in ('full_attention', 'sliding"),
        ({"layer_types": None, "sliding_window_pattern": -1}, "sliding_window_pattern '-1' must be"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar '0' must be a number above 0"),
        ({"sliding_window": "a"}, "Field 'sliding_window' expected int, got str (value: 'a')"),
        ({"final_logit_softcapping": "x"}, "Field 'final_logit_softcapping' expected float, got str (value: 'x')"),
        ({"rope_parameters": {"full_attention": 5}}, "full_attention '5' must be an object"),
    ],
)
def test_fault_32_config_json_of_gemma_3(tmp_path, changes, reason):
    shutil.copy(ROOT / "models/tiny/config.json", tmp_path)
    read_config(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(ModelError) as error:
        read_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: ") and reason in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is not JSON (it is a git-lfs pointer: run git lfs pull)"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"[]", "holds no JSON object"),
    ],
    ids=["pointer", "nested", "not UTF-8", "a list"],
)
def test_fault_32_config_json_that_is_none(config, model, capsys, content, reason):
    (model / "config.json").write_bytes(content)
    assert f"{model / 'config.json'} {reason}" in mistake(capsys, config, model_path=model)


def spoil(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WHOLE)
        change(tensors)
        save_file(tensors, folder / WHOLE)

    return apply


def write_index(folder: Path, shard: str, keep: Callable[[Path], Any] = lambda path: None) -> None:
    """An index of one weight in place of the whole file, which `keep` may move to the shard."""
    keep(folder / shard)
    (folder / WHOLE).unlink(missing_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: shard}}))


NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"
BAD_WEIGHTS = {
    "NaN": (spoil(lambda t: t[NORM].__setitem__(3, np.nan)), "weight norm.weight holds NaN or an infinity"),
    "an infinity in a layer": (
        spoil(lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((0, 0), np.inf)),
        "weight layers.1.mlp.up_proj.weight holds NaN or an infinity",
    ),
    "another head": (
        spoil(lambda t: t.update({"lm_head.weight": t[TABLE] * np.float32(1.01)})),
        "lm_head.weight differs from embed_tokens.weight; a separate vocabulary head is not supported",
    ),
    "a head of another size": (
        spoil(lambda t: t.update({"lm_head.weight": t[TABLE][:8]})),
        "lm_head.weight differs from embed_tokens.weight",
    ),
    "a weight twice": (
        spoil(lambda t: t.update({"language_model.model.norm.weight": t[NORM]})),
        "are the same weight, stored twice; one must go",
    ),
    "a tensor missing": (spoil(lambda t: t.pop(NORM)), "weight norm.weight is missing"),
    "a wrong shape": (spoil(lambda t: t.update({NORM: t[NORM][:8]})), "norm.weight has shape (8,), config.json says (16,)"),
    "integers": (spoil(lambda t: t.update({NORM: t[NORM].astype(np.int8)})), "norm.weight is I8; F32, F16 or BF16 is needed"),
    "one too many": (spoil(lambda t: t.update({"model.x": t[NORM]})), "weight x has no place in this model"),
    "half a file": (lambda d: os.truncate(d / WHOLE, 20_000), "is not a whole safetensors file"),
    "a pointer": (lambda d: (d / WHOLE).write_text("version https://git-lfs"), "it is a git-lfs pointer: run git lfs pull"),
    "no file": (lambda d: (d / WHOLE).unlink(), "holds no model.safetensors"),
    "a shard missing": (
        lambda d: write_index(d, "model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors is missing, but model.safetensors.index.json names it",
    ),
    "an index without a tensor": (
        lambda d: write_index(d, "model-00001-of-00001.safetensors", (d / WHOLE).rename),
        "weight embed_tokens.weight is missing",
    ),
}


@pytest.mark.parametrize(("change", "reason"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
@pytest.mark.usefixtures("free_run_dir")
def test_fault_32_incomplete_weights(config, model, capsys, change, reason):
    change(model)
    assert reason in mistake(capsys, config, model_path=model)


def test_fault_32_both_dialects_load_equally(tmp_path):
    """Older transformers: `rope_theta`, `rope_scaling`, `sliding_window_pattern`; newer: `rope_parameters`, `layer_types`."""
    values = json.loads((ROOT / "tests/references/gemma3-gqa/config.json").read_text())
    for name in (
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rope_local_base_freq",
        "layer_types",
        "sliding_window_pattern",
    ):
        values.pop(name, None)
    layers = 12
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    new = {"layer_types": kinds, "rope_parameters": {"full_attention": full, "sliding_attention": {"rope_theta": 2e4}}}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    configs = []
    for dialect in (new, old | {"sliding_window_pattern": 6}):
        (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": layers} | dialect))
        configs.append(read_config(tmp_path))
    assert configs[0] == configs[1] and configs[0].rope_base == 5e5 and configs[0].rope_factor == 8
