"""Laws of models/formats/convert.py: a folder comes back bit for bit, each device reads its own slice, mistakes are named."""

import json
import shutil
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_references import REFERENCES, VARIANTS, load, pad, real_logits
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models import ModelError
from models.formats.containers import Safetensors
from models.formats.convert import EMBEDDED as TINY_CONFIG
from models.formats.convert import load_params, read_config
from models.formats.save import save_params
from models.gemma import FAR, GemmaConfig, Params, axes, init_params, shapes
from models.presets import TINY
from models.sharding import ROLLOUT, STORE, make_mesh

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
LINEAR = {"rope_type": "linear", "factor": 8.0}
NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def mesh():
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def folder(tmp_path):
    """A copy of a Gemma 3 folder to spoil."""
    for file in ("config.json", WHOLE):
        shutil.copy(REFERENCES / "gemma3-gqa" / file, tmp_path)
    return tmp_path


def change_config(folder, **changes) -> None:
    """Set keys of config.json; None takes a key away."""
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change_weights(folder, change) -> None:
    tensors = load_file(folder / WHOLE)
    save_file(change(tensors) or tensors, folder / WHOLE)


def split(folder, count: int = 3) -> dict[str, str]:
    """Spread model.safetensors over `count` files with an index, as large models come. -> weight_map"""
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    shards = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: shards[i % count] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        save_file({name: tensors[name] for name, file in weight_map.items() if file == shard}, folder / shard)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map: dict) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder, mesh, rules=STORE, dtype="float32") -> Params:
    return load_params(folder, read_config(folder), mesh, rules, dtype)


def expect_equal(ours: Params, theirs: Params) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        assert (np.asarray(one) == np.asarray(other)).all()


# There and back.


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_comes_back_bit_for_bit(name, tmp_path, mesh):
    source, out = REFERENCES / name, tmp_path / "new" / "out"
    params, values = read(source, mesh), json.loads((source / "config.json").read_text())
    save_params(out, params, read_config(source), values)
    assert json.loads((out / "config.json").read_text()) == values
    expect_equal(read(out, mesh), params)
    ours, theirs = load_file(out / WHOLE), load_file(source / WHOLE)
    assert {name: (x.shape, x.dtype) for name, x in ours.items()} == {name: (x.shape, x.dtype) for name, x in theirs.items()}
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    with safe_open(out / WHOLE, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # as transformers marks its own


def test_a_projection_is_turned_and_nothing_else(mesh):
    params, stored = read(REFERENCES / "gemma3-gqa", mesh), load_file(REFERENCES / "gemma3-gqa" / WHOLE)
    assert (np.asarray(params.layers.down)[1] == stored[NAME].T).all()
    assert (np.asarray(params.layers.q_norm)[1] == stored["model.layers.1.self_attn.q_norm.weight"]).all()
    assert (np.asarray(params.embedding) == stored["model.embed_tokens.weight"]).all()


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_what_we_write(name, tmp_path, mesh):
    pytest.importorskip("torch")
    source, reference = REFERENCES / name, np.load(REFERENCES / name / "reference.npz")
    save_params(tmp_path, read(source, mesh), read_config(source), json.loads((source / "config.json").read_text()))
    rows = [row[:length] for row, length in zip(reference["tokens"], reference["lengths"], strict=True)]
    np.testing.assert_allclose(real_logits(load(tmp_path), *pad(rows, "right")), reference["right"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_load_as_they_are_rounded(folder, mesh, dtype):
    exact = read(folder, mesh)
    change_weights(folder, lambda tensors: {name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()})
    expect_equal(read(folder, mesh), jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), exact))
    expect_equal(read(folder, mesh, dtype=dtype), jax.tree.map(lambda x: x.astype(dtype), exact))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_written_in_the_dtype_asked_for(folder, mesh, dtype):
    params = read(folder, mesh)
    save_params(folder, params, read_config(folder), {}, dtype)
    assert {x.dtype for x in load_file(folder / WHOLE).values()} == {jnp.dtype(dtype)}


def test_several_files_with_an_index_equal_the_single_file(folder, mesh):
    single = read(folder, mesh)
    assert len(set(split(folder).values())) == 3
    expect_equal(read(folder, mesh), single)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_the_text_part_of_a_multimodal_folder_loads(folder, mesh, prefix):
    text, config = read(folder, mesh), read_config(folder)
    values = json.loads((folder / "config.json").read_text())
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16}
    multimodal = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": values, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(multimodal))

    def rename(tensors):
        renamed = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
        outer = "model." if prefix == "model.language_model." else ""
        return renamed | {outer + "vision_tower.post_layernorm.bias": np.ones(3), outer + "multi_modal_projector.w": np.ones(3)}

    change_weights(folder, rename)
    assert read_config(folder) == config
    expect_equal(read(folder, mesh), text)


def test_a_head_that_equals_the_embedding_is_passed_over(folder, mesh):
    """Another one is refused: tests/test_faults_model.py."""
    plain = read(folder, mesh)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    expect_equal(read(folder, mesh), plain)


@pytest.mark.parametrize("shards", [True, False])
def test_a_whole_file_comes_before_the_index_of_an_earlier_save(folder, mesh, shards):
    """As in transformers, whether the old shards are still there or were removed."""
    tensors, plain = load_file(folder / "model.safetensors"), read(folder, mesh)
    old = "model-00001-of-00001.safetensors"
    if shards:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / old)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, old)}))
    expect_equal(read(folder, mesh), plain)


# Reading slices.


def test_each_device_gets_its_slice_and_reads_no_more(mesh, monkeypatch):
    source = REFERENCES / "gemma3-gqa"
    config, one, sizes = read_config(source), read(source, mesh), []
    opened = Safetensors.opened

    class Counted:
        """An open file that notes the size of every piece that is read of it."""

        def __init__(self, weights, file):
            self.handle = opened(weights, file)
            self.keys = self.handle.keys

        def get_slice(self, name):
            self.tensor = self.handle.get_slice(name)
            self.get_shape, self.get_dtype = self.tensor.get_shape, self.tensor.get_dtype
            return self

        def __getitem__(self, index):
            array = self.tensor[index]
            sizes.append(array.size)
            return array

    monkeypatch.setattr(Safetensors, "opened", lambda weights, file: Counted(weights, file))
    for tp, rules in ((1, STORE), (2, STORE), (4, ROLLOUT)):
        sizes.clear()
        whole = make_mesh(tp)
        with jax.set_mesh(whole):
            eight = load_params(source, config, whole, rules)
        expect_equal(eight, one)
        for leaf, full in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
            for shard in leaf.addressable_shards:
                assert (np.asarray(shard.data) == np.asarray(full)[shard.index]).all()
        held = sum(shard.data.size for leaf in jax.tree.leaves(eight) for shard in leaf.addressable_shards)
        assert 0 < sum(sizes) <= held
        if rules is STORE:
            assert max(sizes) == config.vocab_size * config.embed_dim // 8


def test_fresh_weights_have_the_shapes_of_stored_ones(mesh):
    for name in VARIANTS:
        source = REFERENCES / name
        config, stored = read_config(source), read(source, mesh)
        fresh = jax.eval_shape(lambda key, config=config: init_params(key, config, STORE), jax.random.key(0))
        for tree in (stored, fresh, shapes(config)):
            assert jax.tree.structure(tree) == jax.tree.structure(axes(config))
        assert jax.tree.map(lambda x: x.shape, stored) == jax.tree.map(lambda x: x.shape, fresh)
        files = load_file(source / WHOLE).values()
        assert sum(prod(x.shape) for x in jax.tree.leaves(stored)) == sum(x.size for x in files)


# What a config.json leaves unsaid.


def test_a_silent_config_means_what_transformers_takes_for_granted(folder):
    """The first multimodal folders of Gemma 3 name hardly more than the sizes of their text part."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text})
    )
    expected = GemmaConfig(
        num_layers=34, embed_dim=2560, num_heads=8, num_kv_heads=4, head_dim=256, mlp_dim=10240, vocab_size=262_208,
        query_scale=1 / 16, local_layers=((True,) * 5 + (False,)) * 5 + (True,) * 4, sliding_window=1024, rope_base=1e6,
        rope_local_base=1e4, rope_factor=8.0, post_norms=True, qk_norms=True,
    )  # fmt: skip
    assert read_config(folder) == expected


def test_the_embedded_models_preset_is_what_transformers_reads(folder):
    """Its own file is read without transformers, for a fast start."""
    shutil.copy(TINY_CONFIG, folder)
    assert read_config(folder) is TINY
    change_config(folder, use_cache=False)
    assert read_config(folder) == TINY and read_config(folder) is not TINY


def test_gemma_1_has_no_window_and_scales_by_its_head_size():
    config = read_config(REFERENCES / "gemma1-mqa")
    assert config.local_layers == (False, False) and config.sliding_window == FAR
    assert config.query_scale == config.head_dim**-0.5
    windowed = read_config(REFERENCES / "gemma2-gqa")
    assert windowed.local_layers == (True, False, True) and windowed.query_scale == 24**-0.5 != windowed.head_dim**-0.5


# Mistakes: one line each, which names the thing.


def expect_error(reason: str, function, *arguments) -> None:
    with pytest.raises(ModelError) as error:
        function(*arguments)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_of_config_json_name_the_key(folder):
    (folder / "config.json").unlink()
    expect_error(f"{folder / 'config.json'} is missing", read_config, folder)
    for text, reason in (("{", "config.json is not JSON"), ("[]", "config.json holds no JSON object"), ("", "is not JSON")):
        (folder / "config.json").write_text(text)
        expect_error(reason, read_config, folder)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "llama"}, "model_type llama is unknown; one of gemma, gemma2, gemma3, gemma3_text, gemma4, "),
        ({"model_type": None, "architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM is unknown; one of Gemma"),
        ({"model_type": None, "architectures": None}, "architecture none is unknown"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_activation": "silu"}, "activation silu is unknown"),
        ({"hidden_activation": "gelu"}, "activation gelu is unknown; gelu_pytorch_tanh is needed"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"num_hidden_layers": 7}, "transformers cannot read it"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention' must be"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "transformers cannot read it"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "rope_type yarn of full_attention"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic of full"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, 'passes over "type": "linear" of RoPE; write "rope_type"'),
        ({"rope_parameters": {"sliding_attention": LINEAR}}, "rope_type linear of sliding_attention is not supported; default"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(folder, changes, reason):
    read_config(folder)
    change_config(folder, **changes)
    expect_error(reason, read_config, folder)


def test_a_factor_counts_with_the_type_linear_alone_and_of_all_layers(folder):
    """transformers' default RoPE has none; what version 4 wrote comes before `rope_parameters` in Gemma 1 and 2."""
    for parameters, factor in (({"rope_type": "default", "factor": 8.0}, 1.0), ({"rope_type": "linear", "factor": 8.0}, 8.0)):
        change_config(folder, rope_scaling=None, rope_parameters={"full_attention": {"rope_theta": 1e6, **parameters}})
        assert read_config(folder).rope_factor == factor
    linear = {"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    shutil.copy(REFERENCES / "gemma1-mqa" / "config.json", folder)
    change_config(folder, **linear)
    assert read_config(folder).rope_factor == 8
    shutil.copy(REFERENCES / "gemma2-gqa" / "config.json", folder)
    change_config(folder, **linear)
    expect_error("rope_type linear of sliding_attention is not supported; default is needed", read_config, folder)


def test_a_config_that_other_tools_wrote_is_read_as_transformers_reads_it(folder):
    """Without architectures, with another first, in float64 words or in one of two names of the same function."""
    expected = read_config(folder)
    for changes in (
        {"architectures": None},
        {"model_type": None},
        {"architectures": ["PeftModelForCausalLM", "Gemma3ForCausalLM"]},
        {"hidden_activation": "gelu_new"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"auto_map": {"AutoConfig": "evil.Config"}},
    ):
        shutil.copy(REFERENCES / "gemma3-gqa" / "config.json", folder)
        change_config(folder, **changes)
        assert read_config(folder) == expected, changes
    shutil.copy(REFERENCES / "gemma1-mqa" / "config.json", folder)
    change_config(folder, hidden_act="gelu")  # in Gemma 1 alone it has always meant the tanh form
    assert read_config(folder) == read_config(REFERENCES / "gemma1-mqa")
    shutil.copy(REFERENCES / "gemma2-gqa" / "config.json", folder)
    change_config(folder, query_pre_attn_scalar=None)
    assert read_config(folder).query_scale == 256**-0.5


def test_errors_of_weight_files_name_the_file(folder, mesh):
    data = (folder / WHOLE).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 536223056\n"
    spoiled = [
        (data[:-4], "is not a whole safetensors file"),
        (data[:100], "is not a whole safetensors file"),
        (b"", "is not a whole safetensors file"),
        (pointer, "it is a git-lfs pointer: run git lfs pull"),
    ]
    for content, reason in spoiled:
        (folder / WHOLE).write_bytes(content)
        expect_error(reason, read, folder, mesh)
        expect_error(str(folder / WHOLE), read, folder, mesh)
    (folder / WHOLE).unlink()
    expect_error(f"{folder} holds no model.safetensors and no {INDEX}", read, folder, mesh)


def test_errors_of_an_index_name_the_shard(folder, mesh):
    weight_map = split(folder)
    shard = weight_map[NAME]
    for wrong in ("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", 5):
        write_index(folder, weight_map | {NAME: wrong})
        expect_error(f"{wrong!r} leaves the folder", read, folder, mesh)
    write_index(folder, weight_map | {NAME: "absent.safetensors"})
    expect_error(f"{folder / 'absent.safetensors'} is missing, but {INDEX} names it", read, folder, mesh)
    other = next(file for file in weight_map.values() if file != shard)
    write_index(folder, weight_map | {NAME: other})
    expect_error(f"{folder / other} holds no weight {NAME}, but the index says that it does", read, folder, mesh)
    write_index(folder, weight_map)
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-1])
    expect_error(f"{folder / shard} is not a whole safetensors file", read, folder, mesh)
    (folder / INDEX).write_text("not json")
    expect_error(f"{INDEX} is not JSON", read, folder, mesh)
    (folder / INDEX).write_text("{}")
    expect_error(f"{INDEX}: weight_map is missing", read, folder, mesh)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop(NAME), "weight layers.1.mlp.down_proj.weight is missing"),
        (lambda t: t.update({NAME: t[NAME].T.copy()}), "down_proj.weight has shape (48, 40), config.json says (40, 48)"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int8)}), "down_proj.weight is I8; F32, F16 or BF16 is needed"),
        (lambda t: t.update({NAME: t[NAME].astype(np.float64)}), "down_proj.weight is F64; F32, F16 or BF16 is needed"),
        (lambda t: t.update({"model.layers.4.x": t[NAME]}), "weight layers.4.x has no place in this model (1 such)"),
        (lambda t: t.update({"model.y": t[NAME], "model.z": t[NAME]}), "weight y has no place in this model (2 such)"),
    ],
)
def test_errors_of_weights_name_the_weight(folder, mesh, change, reason):
    def changed(tensors):
        change(tensors)
        return tensors

    change_weights(folder, changed)
    expect_error(reason, read, folder, mesh)
    expect_error(str(folder), read, folder, mesh)


def test_a_config_of_another_size_than_the_weights_is_named(folder, mesh):
    change_config(folder, vocab_size=72)
    expect_error("weight embed_tokens.weight has shape (64, 40), config.json says (72, 40)", read, folder, mesh)
