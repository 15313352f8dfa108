"""Laws of foreign adapters: Tunix's trees and PEFT folders merge as their own formulas say, and exports load in peft."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from foreign import hugging_face, tunix_adapters, tunix_merged, write_tree
from make_references import REFERENCES, load, pad, real_logits
from safetensors.numpy import load_file, save_file
from test_export import EXPORT, export, script

from data.tokenizer import load_tokenizer
from grpo.config import TINY_MODEL, Config
from grpo.errors import ConfigError
from grpo.runs.checkpoint import Checkpoints, digest, read_digest, sealed
from grpo.runs.model_source import copy_description, find_model
from grpo.update import UpdateConfig, init_state
from models import ModelError
from models.formats.adapters import ordered_product
from models.formats.convert import load_params
from models.lora import init_adapters
from models.sharding import ROLLOUT, STORE, make_mesh

pytestmark = [
    pytest.mark.usefixtures("mesh"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine"),  # orbax's
]
RANK, ALPHA = 4, 6.0
CHANGE_THE_BASE = [f"{name}_config" for name in ("corda", "eva", "loftq", "lora_ga", "arrow", "kasa", "velora", "monteclora")]
GEMMA2 = REFERENCES / "gemma2-gqa"


@pytest.fixture(autouse=True)
def any_tokenizer(monkeypatch):
    """The small tokenizer's pieces are more than the rows of these models."""
    monkeypatch.setattr(EXPORT, "check_tokenizer", lambda *_: None)


@pytest.fixture
def base(tmp_path, small_tokenizer_folder):
    """A Gemma 2 with a tokenizer."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in (GEMMA2 / "config.json", GEMMA2 / "model.safetensors", small_tokenizer_folder / "tokenizer.json"):
        shutil.copy(file, folder)
    return folder


def write_tunix(path, name: str = "gemma2-gqa", **form):
    """A tree, and the weights that it makes of its base."""
    config, tensors = hugging_face(REFERENCES / name)
    tree = tunix_adapters(config, RANK, **form)
    write_tree(path, tree)
    return path, tunix_merged(config, tensors, tree, ALPHA / RANK)


def save_merged(folder, name: str, tensors):
    """The merged weights as a folder of their own."""
    folder.mkdir()
    shutil.copy(REFERENCES / name / "config.json", folder)
    save_file({f"model.{key}": np.ascontiguousarray(x) for key, x in tensors.items()}, folder / "model.safetensors")
    return folder


def expect_close(ours, theirs) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["gemma1-mqa", "gemma2-gqa", "gemma3-gqa"])
@pytest.mark.parametrize("value", [True, False])
def test_a_tunix_tree_adds_a_times_b_to_every_projection(name, value, tmp_path, mesh):
    path, expected = write_tunix(tmp_path / "actor" / "500" / "model_params", name, value=value)
    merged = save_merged(tmp_path / "merged", name, expected)
    for place in (path, path.parent):  # as Tunix lays it out, or the step itself
        model = find_model(place, REFERENCES / name, ALPHA)
        expect_close(model.load(mesh, STORE, "float32"), load_params(merged, model.config, mesh, STORE))
    assert model.adapters and model.adapters().rank == RANK and model.folder == REFERENCES / name
    assert f"LoRA tree {path.parent} on Hugging Face folder" in model.line and f"Gemma {name[5]}, " in model.line


def test_any_devices_merge_to_the_same_bits_and_so_does_the_host(tmp_path, mesh):
    """A run on adapters is known by a digest of the merged weights, and may go on elsewhere."""
    path, _ = write_tunix(tmp_path / "lora", "gemma3-gqa")
    model = find_model(path, REFERENCES / "gemma3-gqa", ALPHA)
    assert model.open
    for on in (mesh, make_mesh(2)):
        with jax.set_mesh(on):
            assert digest(model.load(on, STORE, "float32")) == read_digest(model.open(), model.config)
    expect_close(model.load(make_mesh(4), ROLLOUT, "float32"), model.load(mesh, STORE, "float32"))


def test_an_element_of_a_product_does_not_depend_on_the_slice():
    """And is, to rounding, that of the exact product; summed from the first term on."""
    numbers = np.random.default_rng(0)
    a, b = (numbers.normal(size=shape).astype(np.float32) for shape in ((300, 33), (33, 700)))
    whole = ordered_product(a, b)
    for rows, columns in ((slice(7, 8), slice(3, 4)), (slice(0, 300), slice(96, 107)), (slice(131, 260), slice(0, 700))):
        assert (ordered_product(a[rows], b[:, columns]) == whole[rows, columns]).all()
    np.testing.assert_allclose(whole, a.astype(np.float64) @ b, rtol=0, atol=2e-5)


def test_some_projections_may_have_none(tmp_path, mesh):
    config, _ = hugging_face(GEMMA2)
    tree = tunix_adapters(config, RANK)
    whole = load_params(GEMMA2, find_model(GEMMA2).config, mesh, STORE)
    for layer in tree["layers"].values():
        del layer["mlp"], layer["attn"]["kv_einsum"]
    write_tree(tmp_path / "lora", tree)
    adapters = find_model(tmp_path / "lora", GEMMA2, ALPHA)
    params = adapters.load(mesh, STORE, "float32")
    assert (np.asarray(params.layers.k) == np.asarray(whole.layers.k)).all()
    assert (np.asarray(params.layers.down) == np.asarray(whole.layers.down)).all()
    assert not (np.asarray(params.layers.q) == np.asarray(whole.layers.q)).any()


def test_a_tunix_tree_becomes_a_folder_for_transformers(base, tmp_path):
    path, expected = write_tunix(tmp_path / "lora")
    out = export(path, tmp_path / "out", "--base_path", str(base), "--adapter_alpha", str(ALPHA), "--dtype", "float32")
    ours = load_file(out / "model.safetensors")
    for name, theirs in expected.items():
        np.testing.assert_allclose(ours[f"model.{name}"], theirs, rtol=0, atol=2e-6)
    assert json.loads((out / "config.json").read_text()).keys() == json.loads((base / "config.json").read_text()).keys()


@pytest.mark.long
def test_peft_loads_our_adapters_and_computes_what_we_merge(base, tmp_path, mesh):
    peft = pytest.importorskip("peft")
    path, expected = write_tunix(tmp_path / "lora")
    flags = ("--base_path", str(base), "--adapter_alpha", str(ALPHA), "--dtype", "float32")
    adapters = export(path, tmp_path / "adapters", "--lora", "peft", *flags)
    assert not list(adapters.glob("model*.safetensors")) and not (adapters / "config.json").exists()
    rows = [np.arange(2, 20), np.arange(7, 15)]
    merged = real_logits(load(save_merged(tmp_path / "merged", "gemma2-gqa", expected)), *pad(rows, "right"))
    plain = load(base)
    with_adapters = peft.PeftModel.from_pretrained(plain, str(adapters)).eval()
    theirs = real_logits(with_adapters, *pad(rows, "right"))
    np.testing.assert_allclose(theirs, merged, rtol=0, atol=1e-5)
    assert np.abs(real_logits(load(base), *pad(rows, "right")) - theirs).max() > 0.1

    # and back: the folder names its base, and gives the same weights
    model = find_model(adapters)
    assert model.under and model.under.path == base and "PEFT adapters" in model.found
    expect_close(model.load(mesh, STORE, "float32"), find_model(path, base, ALPHA).load(mesh, STORE, "float32"))


def test_sampling_with_adapters_is_sampling_of_the_exported_folder(base, tmp_path, monkeypatch):
    """The recipe of a Tunix run on Gemma 2: import, look at it, export."""
    path, _ = write_tunix(tmp_path / "lora")
    flags = ("--base_path", str(base), "--adapter_alpha", str(ALPHA))
    out = export(path, tmp_path / "out", *flags, "--dtype", "float32")
    sample = script("sample")
    monkeypatch.setattr(sample, "check_tokenizer", lambda *_: None)
    for folder in (out, base):
        (folder / "tokenizer.json").unlink()
    words = ["--ids", "[[2,17,9,33],[2,5]]", "--max_new_tokens", "8", "--temperature", "1"]
    with_adapters, exported, plain = (
        [one["token_ids"] for one in sample.main(["--model_path", str(place), *more, *words])["completions"]]
        for place, more in ((path, flags), (out, ()), (base, ()))
    )
    assert with_adapters == exported != plain


@pytest.fixture
def lora_run(base, tmp_path, mesh):
    """A run's directory that holds adapters on `base`, as if trained."""
    return write_run(tmp_path / "run", mesh, model_path=str(base))


def write_run(folder: Path, mesh, **start) -> Path:
    """A run of LoRA that began with the model that `find_model(*start)` finds."""
    model = find_model(*start.values())
    settings = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_targets": "q,v,down"}
    adapters = init_adapters(jax.random.key(0), model.config, ["q", "v", "down"], RANK, STORE)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), adapters)
    meta = {"step": 5, "config": {**start, **settings}}
    meta["belongs_to"] = {"model": digest(model.load(mesh, STORE, "float32"))}
    (folder / "model").mkdir(parents=True)
    copy_description(model, folder / "model")
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        checkpoints.save(5, init_state(adapters, UpdateConfig.of(Config())), meta, wait=True)
    return folder


@pytest.mark.long
def test_a_lora_run_is_exported_merged_or_as_its_adapters(lora_run, base, tmp_path, mesh):
    peft = pytest.importorskip("peft")
    merged = export(lora_run, tmp_path / "merged", "--dtype", "float32")
    adapters = export(lora_run, tmp_path / "peft", "--lora", "peft", "--dtype", "float32")
    trained = find_model(lora_run).load(mesh, STORE, "float32")
    expect_close(find_model(merged).load(mesh, STORE, "float32"), trained)
    expect_close(find_model(adapters, base).load(mesh, STORE, "float32"), trained)
    assert (np.asarray(trained.layers.v) != np.asarray(find_model(base).load(mesh, STORE, "float32").layers.v)).all()
    settings = json.loads((adapters / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (RANK, 6)
    assert set(settings["target_modules"]) == {"q_proj", "v_proj", "down_proj"}
    rows = [np.arange(2, 20), np.arange(7, 15)]
    theirs = real_logits(peft.PeftModel.from_pretrained(load(base), str(adapters)).eval(), *pad(rows, "right"))
    np.testing.assert_allclose(theirs, real_logits(load(merged), *pad(rows, "right")), rtol=0, atol=1e-5)


def test_a_base_that_was_downloaded_keeps_its_name(lora_run, base, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.runs.model_source.download", lambda path: base if str(path).startswith("hf:") else Path(path))
    out = export(lora_run, tmp_path / "peft", "--lora", "peft", "--base_path", "hf:google/one@main")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "google/one"
    assert "adapters for one@main" in (out / "README.md").read_text()
    assert find_model("hf:google/one").path.resolve().name == "one"


def test_adapters_are_written_in_float32_unless_told(lora_run, tmp_path, capsys):
    for dtype, flags in (("float32", ()), ("bfloat16", ("--dtype", "bfloat16"))):
        out = export(lora_run, tmp_path / dtype, "--lora", "peft", *flags)
        assert {str(x.dtype) for x in load_file(out / "adapter_model.safetensors").values()} == {dtype}
        assert f"written to {out} in {dtype}" in capsys.readouterr().err


def test_adapters_of_a_run_are_not_exported_on_another_base(lora_run, base, tmp_path, mesh):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors")
    flags = ("--base_path", str(other))
    reason = "other is not the model that"
    expect_error(ConfigError, reason, lambda: export(lora_run, tmp_path / "out", *flags))
    expect_error(ConfigError, reason, find_model(lora_run, other).load, mesh, STORE, "float32")
    shutil.rmtree(base)
    expect_error(ConfigError, "base, which is not there; give --base_path DIR", find_model, lora_run)
    assert not (tmp_path / "out").exists()


def test_a_run_on_adapters_finds_them_and_what_they_lie_on(base, tmp_path, mesh):
    """Adapters on adapters, and a run on that run: by the settings that it saved alone."""
    path, _ = write_tunix(tmp_path / "lora")
    start = {"model_path": str(path), "base_path": str(base), "adapter_alpha": ALPHA}
    one = find_model(write_run(tmp_path / "one", mesh, **start))
    two = find_model(write_run(tmp_path / "two", mesh, model_path=str(tmp_path / "one")))
    below = find_model(*start.values())
    for model, under in ((one, below), (two, one)):
        assert model.open and model.trained_from and model.trained_from().found == under.found
        params, before = (one.load(mesh, STORE, "float32") for one in (model, under))
        assert digest(params) == read_digest(model.open(), model.config) != digest(before)
    evaluation = script("evaluate_consensus")
    full = Path(shutil.copytree(tmp_path / "one", tmp_path / "full"))
    meta = json.loads((full / "checkpoints" / "5" / "meta" / "metadata").read_text())
    (full / "checkpoints" / "5" / "meta" / "metadata").write_text(json.dumps(sealed(meta | {"config": start})))
    for place, under in ((tmp_path / "one", below), (tmp_path / "two", one), (full, below)):
        compared = evaluation.find_models(evaluation.ConsensusConfig(model_path=str(place)))
        assert list(compared) == ["base", "trained"] and compared["base"].found == under.found
        assert compared["trained"].run_dir == place
    assert below.trained_from and below.trained_from().path == base and find_model(base).trained_from is None


# Mistakes: one line each.


def expect_error(kind, reason: str, function, *arguments) -> None:
    with pytest.raises(kind) as error:
        function(*arguments)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_what_adapters_do_not_say_is_asked_for(tmp_path):
    path, _ = write_tunix(tmp_path / "lora")
    expect_error(ConfigError, "adapters need the model that they were trained on; give --base_path", find_model, path)
    expect_error(ConfigError, "lora does not say its alpha: give --adapter_alpha", find_model, path, GEMMA2)
    other = find_model(path, REFERENCES / "gemma3-gqa", ALPHA)
    expect_error(ModelError, "lora: weight layer_3/attn/q_einsum/lora_a is missing", other.adapters)


def test_a_tree_that_is_not_whole_is_named(tmp_path):
    config, _ = hugging_face(GEMMA2)
    for change, reason in (
        (lambda tree: tree["layers"]["2"]["attn"]["q_einsum"].pop("w_lora_b"), "layer_2/attn/q_einsum/lora_b is missing"),
        (lambda tree: tree["layers"].pop("1"), "weight layer_1/attn/q_einsum/lora_a is missing"),
        (lambda tree: tree.update(rngs={"key": np.ones(2, np.float32)}), "weight rngs/key has no place in this model (1 such)"),
        (lambda tree: tree["layers"]["0"]["mlp"]["up_proj"].update(kernel_lora_a=np.ones((40, 3), np.float32)), "(40, 3)"),
    ):
        tree = tunix_adapters(config, RANK, value=False)
        change(tree)
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        write_tree(path, tree)
        expect_error(ModelError, reason, find_model(path, GEMMA2, ALPHA).adapters)


def test_peft_folders_of_another_kind_are_refused(base, tmp_path):
    path, _ = write_tunix(tmp_path / "lora")
    folder = export(path, tmp_path / "p", "--lora", "peft", "--base_path", str(base), "--adapter_alpha", str(ALPHA))
    written = json.loads((folder / "adapter_config.json").read_text())
    for changes, reason in (
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported; LORA is needed"),
        ({"use_dora": True}, "use_dora True is not supported; False is needed"),
        ({"rank_pattern": {"q_proj": 2}}, "r 2 is not the rank of the weights of layers.0.self_attn.q_proj, 4"),
        ({"r": 8}, "r 8 is not the rank of the weights of layers.0.self_attn.q_proj, 4"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights pissa is not supported; True or False or gaussian or orthogonal is needed",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora is not supported"),
        *(({key: {"x": 1}}, f"{key} {{'x': 1}} is not supported; it must be empty") for key in CHANGE_THE_BASE),
        ({"of_next_year": 7}, "of_next_year 7 is not supported; it must be empty"),
        ({"lora_bias": True}, "lora_bias True is not supported; it must be empty"),
        ({"target_modules": ["q_proj"]}, "layers.0.self_attn.k_proj has an adapter, but adapter_config.json does not name it"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(written | changes))
        expect_error(ModelError, reason, find_model(folder).adapters)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(written))
    for change, reason in (
        (lambda t: t.pop(next(iter(t))), "is missing"),
        (lambda t: t[next(iter(t))].__setitem__((0, 0), np.nan), "holds NaN or an infinity"),
        (lambda t: t.update({"base_model.model.lm_head.weight": np.ones((64, 16), np.float32)}), "trained beside the adapters"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": np.ones((72, 40), np.float32)}),  # 8 rows more
            "embed_tokens.weight was trained beside the adapters",
        ),
        (
            lambda t: t.update({next(iter(t)).replace("model.model", "model"): t[next(iter(t))]}),
            "the same weight, stored twice",
        ),
    ):
        changed = {name: tensor.copy() for name, tensor in tensors.items()}
        change(changed)
        save_file(changed, folder / "adapter_model.safetensors")
        expect_error(ModelError, reason, find_model(folder).adapters)
    (folder / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": "google/gemma-2-2b"}))
    assert f"(trained on google/gemma-2-2b) on Hugging Face folder {base}" in find_model(folder, base).line
    expect_error(ConfigError, "give --base_path", find_model, folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").touch()
    expect_error(ModelError, "adapter_model.safetensors is missing: adapters are only read", find_model(folder, base).adapters)


def test_projections_and_layers_may_have_adapters_of_their_own(base, tmp_path, mesh):
    """Rank and alpha of one projection, a layer without any, names with `.default`, a folder with a name, the base's own
    embedding: by the formula W + alpha / rank (B A).
    """
    config, tensors = hugging_face(base)
    numbers, layers = np.random.default_rng(0), range(config["num_hidden_layers"])
    for layers_of, settings in (
        ([1], {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
        ([0], {"target_modules": r".*layers\.0\.(self_attn\.q_proj|mlp\.down_proj)"}),
        (list(layers), {"target_modules": ["self_attn.q_proj", "mlp.down_proj"], "exclude_modules": ["x_proj"]}),
    ):
        saved = {"base_model.model.model.embed_tokens.weight": tensors["embed_tokens.weight"]}
        expected = dict(tensors)
        for layer in layers_of:
            for name, rank, alpha in (("self_attn.q_proj", 2, 5.0), ("mlp.down_proj", RANK, ALPHA)):
                module = f"layers.{layer}.{name}"
                rows, columns = tensors[f"{module}.weight"].shape
                b, a = (numbers.normal(0, 0.1, shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
                saved |= {f"base_model.model.model.{module}.lora_{s}.default.weight": x for s, x in (("A", a), ("B", b))}
                expected[f"{module}.weight"] = tensors[f"{module}.weight"] + alpha / rank * (b @ a)
        folder = tmp_path / f"of{len(layers_of)}{layers_of[0]}"
        (folder / "mine").mkdir(parents=True)
        save_file(saved, folder / "mine" / "adapter_model.safetensors")
        patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 5}}
        said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "init_lora_weights": "gaussian", **patterns, **settings}
        said["fan_in_fan_out"] = True  # peft sets it back, as Gemma's layers are not of that kind
        (folder / "mine" / "adapter_config.json").write_text(json.dumps(said))
        model = find_model(folder, base)
        merged = save_merged(tmp_path / f"merged{folder.name}", "gemma2-gqa", expected)
        expect_close(model.load(mesh, STORE, "float32"), load_params(merged, model.config, mesh, STORE))


def test_the_embedded_model_has_no_adapters():
    model = find_model(TINY_MODEL)
    assert model.adapters is None and model.line.endswith("Gemma 3, 0.6M parameters, 3 layers")
    assert load_tokenizer(model.folder).fingerprint == load_tokenizer(TINY_MODEL).fingerprint
