"""Laws of training a Gemma 4: the table of per-layer embeddings stays that of the base model, and everything else goes on."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from make_references import REFERENCES
from training import devices, interrupted, read_files, run, without_times, write_model

import grpo.runs.checkpoint
import grpo.runs.setup
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.memory import resident_bytes
from grpo.runs.checkpoint import digest, load_digested, read_digest
from grpo.runs.model_source import find_model
from grpo.update import reference_of, sampling_params, starting_point
from models.formats.convert import open_weights, read_config
from models.formats.save import save_params
from models.gemma import init_params
from models.sharding import STORE, make_mesh

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A random model with the four kinds of layers of E2B, and the tokenizer of the other runs."""
    folder = tmp_path_factory.mktemp("gemma4") / "model"
    write_model(folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    values = json.loads((REFERENCES / "gemma4-e2b" / "config.json").read_text())
    values |= {
        "vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {layer: {"head_dim": 16} for layer in ("1", "3")},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    model = read_config(folder)
    with jax.set_mesh(make_mesh(1, jax.devices()[:1])):
        params = init_params(jax.random.key(0), model, STORE)
    (folder / "model.safetensors").unlink()
    save_params(folder, params, model, values)
    (folder.parent / "rewards.py").write_text("def variety(completion, problem):\n    return len(set(completion)) / 2\n")
    return Config(
        model_path=str(folder), data="arithmetic", run_dir=str(folder.parent / "run"), system_prompt="", new_problems=16,
        sessions=2, prompts_per_step=8, group_size=4, max_prompt_tokens=192, max_new_tokens=12, learning_rate=3e-3,
        warmup_steps=1, reward=f"{folder.parent / 'rewards.py'}:variety", eval_problems=0, retention_problems=0, save_every=1,
        remat="full", logprob_chunk=96, packing=0, halvings=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config):
    return run(config), read_files(config)


def test_a_run_learns_beside_a_reference_that_it_starts_from(config, finished):
    """The KL of the first step is 0, where others had 1e12 (unsloth#4934), and sampler and trainer agree throughout."""
    result, files = finished
    metrics = files["metrics.jsonl"]
    assert metrics[0]["kl/k3"] < 1e-9 < 1e-8 < metrics[-1]["kl/k3"] < 1
    assert all(record["logp_diff_sampler_trainer/max"] < 1e-4 for record in metrics)
    assert all(record["grad_norm"] > 0 for record in metrics) and result["steps"] == 6


def test_the_table_is_frozen_and_left_to_the_base_model(config, finished, tmp_path):
    """No master, no moments, no place in a checkpoint; loading a checkpoint takes it from the base model."""
    meta = json.loads((Path(config.run_dir) / "checkpoints" / "6" / "meta" / "metadata").read_text())
    names = set(meta["digests"])
    assert "params.per_layer.projection" in names and not any("per_layer.table" in name for name in names)
    trained, base = (find_model(path) for path in (config.run_dir, config.model_path))
    mesh = make_mesh(1, jax.devices()[:1])
    ours, theirs = (model.load(mesh, STORE, "float32") for model in (trained, base))
    np.testing.assert_array_equal(ours.per_layer.table, theirs.per_layer.table)
    assert (ours.per_layer.projection != theirs.per_layer.projection).any()
    for kind, layers in ours.layers.items():
        assert (layers.q != theirs.layers[kind].q).any()
        np.testing.assert_array_equal(layers.scale, theirs.layers[kind].scale)
    with pytest.raises(ConfigError, match=r"has no per_layer\.table, which is that of the model in gone; give --base_path DIR"):
        find_model(config.run_dir, "gone")


def test_the_frozen_table_is_held_once_and_in_the_dtype_of_activations(config):
    with devices(1):
        prepared = grpo.runs.setup.prepare(config)
    with jax.set_mesh(prepared.mesh):
        weights = prepared.base.load(prepared.mesh, STORE, "float32")
        count = sum(leaf.size for leaf in jax.tree.leaves(weights))
        trained: Any
        trained, base = starting_point(weights, prepared.model, "bfloat16", 0, prepared.update)
        assert trained.per_layer.table is None and base is not None and base.per_layer.table.dtype == "bfloat16"
        reference = reference_of(trained, base, "bfloat16", prepared.update)
        sampled = sampling_params(reference, prepared.model, replace(prepared.sample, dtype="bfloat16"))
        assert reference.per_layer.table is base.per_layer.table is sampled.per_layer.table
    frozen = base.per_layer.table.size
    assert resident_bytes(prepared.model, "bfloat16", prepared.update) == 2 * frozen + 18 * (count - frozen)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_frozen_is_narrowed_leaf_by_leaf_while_it_is_read(config, monkeypatch, rank):
    """A model of which one device can hold the narrow form loads there; the digest is that of the wide form."""
    with devices(1):
        prepared = grpo.runs.setup.prepare(replace(config, lora_rank=rank, dtype="bfloat16"))
    wide, held = [], {id(array) for array in jax.live_arrays()}
    real_digest = grpo.runs.checkpoint.leaf_digest

    def spy(leaf):
        known = [array for array in jax.live_arrays() if id(array) not in held and array.dtype == "float32" and array.ndim > 1]
        wide.append((leaf.size, sum(array.size for array in known)))
        return real_digest(leaf)

    with jax.set_mesh(prepared.mesh):
        monkeypatch.setattr(grpo.runs.checkpoint, "leaf_digest", spy)
        narrow, fingerprint = load_digested(partial(grpo.runs.setup.load_base, prepared), prepared.model)
        monkeypatch.undo()
        weights = prepared.base.load(prepared.mesh, STORE, "float32")
    assert fingerprint == digest(weights) == read_digest(open_weights(config.model_path, prepared.model), prepared.model)
    sizes = [leaf.size for leaf in jax.tree.leaves(weights)]
    assert [size for size, _ in wide] == sorted(sizes, reverse=True)
    if rank:
        assert all(found <= size for size, found in wide), "only the leaf that is being read is wide"
    table = narrow.per_layer.table
    assert table.dtype == "bfloat16" and narrow.per_layer.projection.dtype == ("bfloat16" if rank else "float32")
    jax.tree.map(lambda kept, leaf: np.testing.assert_array_equal(kept, leaf.astype(kept.dtype)), narrow, weights)


@pytest.mark.parametrize("change", [{}, pytest.param({"lora_rank": 2, "lora_alpha": 4.0}, marks=pytest.mark.long)])
def test_an_interrupted_run_resumes_bit_exactly(config, finished, tmp_path, change):
    if change:
        whole = replace(config, run_dir=str(tmp_path / "whole"), **change)
        result, files = run(whole), read_files(whole)
        assert find_model(whole.run_dir).load(make_mesh(1, jax.devices()[:1]), STORE, "float32")
    else:
        result, files = finished
    broken = replace(config, run_dir=str(tmp_path / "broken"), **change)
    with interrupted(5, "rollout"):
        run(broken)
    assert run(broken)["params_digest"] == result["params_digest"]
    assert without_times(read_files(broken)["metrics.jsonl"]) == without_times(files["metrics.jsonl"])


@pytest.mark.long
def test_the_table_is_trained_when_asked(config, tmp_path):
    asked = replace(config, run_dir=str(tmp_path / "all"), train_per_layer=True, max_steps=1, sessions=1)
    run(asked)
    mesh = make_mesh(1, jax.devices()[:1])
    ours, theirs = (find_model(path).load(mesh, STORE, "float32") for path in (asked.run_dir, config.model_path))
    assert (ours.per_layer.table != theirs.per_layer.table).any()


def test_the_flag_needs_a_table(folder, config, tmp_path):
    other = replace(config, model_path=str(folder / "model"), train_per_layer=True, run_dir=str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"^train_per_layer true: this model has no table of per-layer embeddings; leave it out$"
    ):
        run(other)
    with pytest.raises(ConfigError, match=r"^train_per_layer true: LoRA trains adapters only; leave it out$"):
        run(replace(config, lora_rank=2, train_per_layer=True, run_dir=str(tmp_path / "lora")))
