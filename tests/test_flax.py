"""Laws of the reader of Flax checkpoints: in each form that was published, they give what the Hugging Face folder gives."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from foreign import flax_modules, write_flax, write_tree
from make_references import REFERENCES, VARIANTS

from models import ModelError, presets
from models.formats.containers import OrbaxTree, flax_name
from models.formats.convert import load_params, read_config
from models.sharding import ROLLOUT, STORE, make_mesh

pytestmark = pytest.mark.usefixtures("mesh")


def expect_equal(ours, theirs) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        assert (np.asarray(one) == np.asarray(other)).all()


def kaggle(tmp_path, name: str, form: str = "flat", config: bool = True):
    """A download: RUN/2b-it/ is the tree, files of the model lie beside it. -> its path"""
    write_flax(tmp_path / "2b-it", REFERENCES / name, form)
    if config:
        shutil.copy(REFERENCES / name / "config.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_gives_what_its_hugging_face_folder_gives(name, tmp_path, mesh):
    path, twin = kaggle(tmp_path, name), REFERENCES / name
    config = read_config(twin)
    assert read_config(path) == read_config(path / "2b-it") == config
    expect_equal(load_params(path, config, mesh, STORE), load_params(twin, config, mesh, STORE))


@pytest.mark.parametrize("form", ["nested", "bare", "directories"])
def test_every_form_of_the_tree_is_the_same(form, tmp_path, mesh):
    path, twin = kaggle(tmp_path, "gemma2-gqa", form), REFERENCES / "gemma2-gqa"
    config = read_config(twin)
    expect_equal(load_params(path / "2b-it", config, mesh, STORE), load_params(twin, config, mesh, STORE))


@pytest.mark.parametrize("name", ["gemma1-mha", "gemma2-gqa", "gemma3-gqa"])
def test_without_a_config_json_the_preset_that_fits_is_taken(name, tmp_path, monkeypatch):
    path, config = kaggle(tmp_path, name, config=False), read_config(REFERENCES / name)
    with pytest.raises(ModelError, match=r"2b-it fits none of gemma-2b, .*config\.json of its Hugging Face twin next to it"):
        read_config(path)
    others = {"deeper": replace(config, num_layers=5), "wider": replace(config, mlp_dim=80)}
    family = {"later": replace(config, post_norms=True, qk_norms=not config.qk_norms)}
    monkeypatch.setattr("models.formats.convert.MODELS", presets.MODELS | others | family | {"it": config})
    assert read_config(path) == config


def test_eight_devices_read_their_slices(tmp_path, mesh):
    path, twin = kaggle(tmp_path, "gemma3-gqa"), REFERENCES / "gemma3-gqa"
    config = read_config(twin)
    one = load_params(twin, config, mesh, STORE)
    for tp, rules in ((2, STORE), (4, ROLLOUT)):
        whole = make_mesh(tp)
        with jax.set_mesh(whole):
            expect_equal(load_params(path, config, whole, rules), one)


def test_bfloat16_is_read_as_it_is(tmp_path, mesh):
    write_flax(tmp_path / "tree", REFERENCES / "gemma2-gqa", dtype=jax.numpy.bfloat16)
    config = read_config(REFERENCES / "gemma2-gqa")
    rounded = load_params(REFERENCES / "gemma2-gqa", config, mesh, STORE, "bfloat16")
    expect_equal(load_params(tmp_path / "tree", config, mesh, STORE, "bfloat16"), rounded)


def test_tunix_names_of_a_whole_model_are_known(tmp_path, mesh):
    """`nnx` states have gate and up apart, layers by number, and other words for two things."""
    renamed = {}
    for name, leaf in flax_modules(REFERENCES / "gemma2-gqa").items():
        name = name.replace("post_attention_norm", "post_attn_norm")
        if name.endswith("gating_einsum"):
            for key, w in zip(("gate_proj", "up_proj"), leaf["w"], strict=True):
                renamed[name.replace("gating_einsum", key)] = {"kernel": {"value": w}}
        else:
            kernel = name.endswith("linear")
            renamed[name.replace("mlp/linear", "mlp/down_proj")] = {
                "kernel" if kernel else key: {"value": x} for key, x in leaf.items()
            }
    tree: dict = {"layers": {}}
    for name, leaf in renamed.items():
        node, parts = tree, name.split("/")
        if parts[0].startswith("layer_"):
            node, parts = tree["layers"], [parts[0].removeprefix("layer_"), *parts[1:]]
        for part in parts:
            node = node.setdefault(part, {})
        node.update(leaf)
    write_tree(tmp_path / "tree", tree)
    config = read_config(REFERENCES / "gemma2-gqa")
    expect_equal(
        load_params(tmp_path / "tree", config, mesh, STORE), load_params(REFERENCES / "gemma2-gqa", config, mesh, STORE)
    )


@pytest.mark.parametrize(
    "stored, name",
    [
        ("transformer/layer_0/attn/q_einsum.w", "layer_0/attn/q_einsum"),
        ("transformer.layer_11.mlp.linear.w", "layer_11/mlp/linear"),
        ("params.layer_1.mlp.linear", "layer_1/mlp/linear"),
        ("layers.3.attn.q_einsum.w_lora_a", "layer_3/attn/q_einsum/lora_a"),
        ("layers.3.mlp.gate_proj.kernel_lora_b.value", "layer_3/mlp/gate_proj/lora_b"),
        ("transformer/final_norm.scale", "final_norm"),
    ],
)
def test_names_are_told_whatever_lies_around_them(stored, name):
    assert flax_name(stored) == name


def expect_error(reason: str, path, config, mesh) -> None:
    with pytest.raises(ModelError) as error:
        load_params(path, config, mesh, STORE)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_what_is_wrong_with_a_tree_is_named(tmp_path, mesh):
    config, modules = read_config(REFERENCES / "gemma2-gqa"), flax_modules(REFERENCES / "gemma2-gqa")

    def written(name: str, changes: dict):
        tree = {key: leaf for key, leaf in (modules | changes).items() if leaf}
        write_tree(tmp_path / name, {f"transformer/{key}": leaf for key, leaf in tree.items()})
        return tmp_path / name

    lost = written("lost", {"layer_2/attn/q_einsum": {}})
    expect_error("lost: weight layer_2/attn/q_einsum is missing", lost, config, mesh)
    turned = modules["layer_1/mlp/linear"]["w"].T.copy()
    expect_error(
        "weight layer_1/mlp/linear has shape (40, 48), config.json says (48, 40)",
        written("turned", {"layer_1/mlp/linear": {"w": turned}}), config, mesh,
    )  # fmt: skip
    more = written("more", {"layer_3/mlp/linear": {"w": turned}})
    expect_error("weight layer_3/mlp/linear has no place in this model (1 such)", more, config, mesh)
    counted = written("counted", {"final_norm": {"scale": np.ones(40, np.int32)}})
    expect_error("weight final_norm is int32; floats are needed", counted, config, mesh)
    rows = {"input_embedding": np.zeros((64 + 129, 40), np.float32)}
    expect_error("weight embedder/input_embedding has shape (193, 40)", written("rows", {"embedder": rows}), config, mesh)


def test_a_width_that_is_the_hidden_size_leaves_gate_and_up_ambiguous(tmp_path, mesh):
    modules = flax_modules(REFERENCES / "gemma2-gqa")
    config = replace(read_config(REFERENCES / "gemma2-gqa"), mlp_dim=40)
    for i in range(3):
        modules |= {f"layer_{i}/mlp/gating_einsum": {"w": np.zeros((2, 40, 40))}, f"layer_{i}/mlp/linear": {"w": np.eye(40)}}
    write_tree(tmp_path / "tree", modules)
    expect_error("gating_einsum could be stored as 2DF or 2FD", tmp_path / "tree", config, mesh)


def test_a_damaged_tree_is_one_line(tmp_path, mesh):
    config = read_config(REFERENCES / "gemma2-gqa")
    for file in ("manifest.ocdbt", "data"):
        path = tmp_path / file
        write_flax(path, REFERENCES / "gemma2-gqa")
        largest = path / file if file != "data" else max(path.rglob("d/*"), key=lambda found: found.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:20])
        expect_error(f"{path} cannot be read; download it again", path, config, mesh)


def test_two_models_in_a_folder_must_be_told_apart(tmp_path, mesh):
    for name in ("2b", "2b-it"):
        write_flax(tmp_path / name, REFERENCES / "gemma1-mqa")
    with pytest.raises(ModelError, match="holds several models; name one of 2b, 2b-it"):
        read_config(tmp_path)
    assert OrbaxTree(tmp_path / "2b").names


def test_a_chunk_that_is_missing_is_an_error_not_zeros(tmp_path, mesh):
    """In a tree of directories: a download that left one file out."""
    path = kaggle(tmp_path, "gemma2-gqa", "directories")
    config = read_config(path)
    load_params(path, config, mesh, STORE)
    chunk = next(file for file in sorted((path / "2b-it").rglob("*")) if "mlp" in str(file) and file.name[0].isdecimal())
    chunk.unlink()
    with pytest.raises(ModelError, match="2b-it cannot be read; download it again"):
        load_params(path, config, mesh, STORE)
