"""Laws of runs with LoRA: adapters alone are trained, saved, resumed and found again, on the base that they belong to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_lora import merge
from training import devices, interrupted, read_files, run, without_times

import grpo.runs.setup
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.memory import resident_bytes
from grpo.runs.checkpoint import Checkpoints, sealed
from grpo.runs.console import describe_plan
from grpo.runs.model_source import find_model
from grpo.update import init_state, narrow, policy, sampling_params, starting_point
from models.formats.save import save_params
from models.gemma import ExecutionConfig
from models.lora import PROJECTIONS, count_adapters
from models.sharding import ROLLOUT, STORE, make_mesh

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def config(folder) -> Config:
    """Two sessions, of two steps and of four; the reference is the policy at the start of the session."""
    return Config(
        model_path=str(folder / "model"), data="arithmetic", run_dir=str(folder / "lora"), system_prompt="", new_problems=16,
        sessions=2, prompts_per_step=8, group_size=4, max_prompt_tokens=192, max_new_tokens=16, learning_rate=3e-3,
        warmup_steps=1, reward=f"{folder / 'rewards.py'}:variety", eval_problems=0, retention_problems=0, save_every=1,
        remat="none", logprob_chunk=96, packing=0, halvings=0, lora_rank=2, lora_alpha=4.0, reference="session_start",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config):
    result = run(config)
    return result, read_files(config)


def base_of(config: Config):
    with devices(1):
        prepared = grpo.runs.setup.prepare(config)
    return prepared, prepared.base.load(prepared.mesh, STORE, "float32")


def final_state_of(config: Config):
    prepared, weights = base_of(config)
    with jax.set_mesh(prepared.mesh):
        trained, _ = starting_point(weights, prepared.model, "float32", config.seed, prepared.update)
        checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints")
        restored = checkpoints.restore(init_state(trained, prepared.update), lambda meta: None)
        checkpoints.close()
    assert restored is not None
    return jax.device_get(restored.state)


def test_a_run_trains_adapters_and_the_reference_is_below_them(config, finished):
    """By the KL before the first update of a session, and after it."""
    result, files = finished
    metrics = files["metrics.jsonl"]
    assert metrics[0]["kl/k3"] < 1e-9 < 1e-7 < metrics[1]["kl/k3"]
    assert metrics[2]["kl/k3"] < 1e-9 < 1e-7 < metrics[3]["kl/k3"]
    assert all(record["logp_diff_sampler_trainer/max"] < 1e-4 for record in metrics)
    assert not any("lora/kept/trainer" in record for record in metrics)  # float32 rounds nothing away
    state = final_state_of(config)
    assert set(state.params) == set(PROJECTIONS) and all(np.abs(adapter.b).max() > 0 for adapter in state.params.values())
    moments = state.opt_state[1]
    assert jax.tree.structure(moments.mu) == jax.tree.structure(state.params) == jax.tree.structure(moments.nu)
    assert result["steps"] == 6


def test_a_checkpoint_holds_adapters_and_moments_and_nothing_of_the_base(config, finished):
    prepared, weights = base_of(config)
    count = count_adapters(prepared.model, prepared.update.lora_names, config.lora_rank)
    meta = Path(config.run_dir) / "checkpoints" / "6" / "meta" / "metadata"
    names = set(json.loads(meta.read_text())["digests"])
    assert {name for name in names if name.startswith("params.")} == {f"params.{p}.{m}" for p in PROJECTIONS for m in "ab"}
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(final_state_of(config))) == 12 * count + 3 * 4
    resident = resident_bytes(prepared.model, "bfloat16", prepared.update)
    assert resident == 2 * sum(x.size for x in jax.tree.leaves(weights)) + 16 * count
    assert f"({count / 1e6:.1f}M parameters" in describe_plan(prepared)


@pytest.mark.parametrize("place", ["in place", pytest.param("in another directory", marks=pytest.mark.long)])
def test_an_interrupted_run_resumes_bit_exactly(config, finished, tmp_path, place):
    """Stopped in the middle of session 2."""
    broken = replace(config, run_dir=str(tmp_path / "broken"))
    with interrupted(5, "rollout"):
        run(broken)
    resumed = broken
    if place == "in another directory":
        resumed = replace(config, run_dir=str(tmp_path / "relayed"), relay_from=broken.run_dir)
    assert run(resumed)["params_digest"] == finished[0]["params_digest"]
    assert without_times(read_files(resumed)["metrics.jsonl"]) == without_times(finished[1]["metrics.jsonl"])


@pytest.mark.long
def test_a_run_in_bfloat16_measures_what_rounding_keeps_and_resumes_bit_exactly(config, tmp_path):
    """At inspected steps: nothing before the first update, and about all of it in either form once adapters have grown."""
    whole, broken = (replace(config, dtype="bfloat16", run_dir=str(tmp_path / name)) for name in ("whole", "broken"))
    result = run(whole)
    with interrupted(5, "rollout"):
        run(broken)
    assert run(broken)["params_digest"] == result["params_digest"] and result["recompilations"] == 0
    metrics = read_files(whole)["metrics.jsonl"]
    assert without_times(read_files(broken)["metrics.jsonl"]) == without_times(metrics)
    for name in ("lora/kept/trainer", "lora/kept/sampler"):
        assert metrics[0][name] is None and 0.5 < metrics[-1][name] < 1.5  # few tokens


@pytest.mark.parametrize("change", [{"lora_rank": 0, "lora_alpha": 64.0}, {"lora_alpha": 8.0}, {"lora_targets": "q,v"}])
def test_a_run_resumes_with_its_own_adapters_only(config, finished, change):
    with pytest.raises(ConfigError, match=f"holds a run with other settings .*{next(iter(change))}"):
        run(replace(config, **change))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_checkpoint_is_evaluated_with_the_weights_that_sampled_in_training(config, finished, dtype, tp):
    """Bit for bit, adapters apart: in bfloat16 a sum with the base would round most of them away."""
    (prepared, weights), state = base_of(config), final_state_of(config)
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), weights)
    mesh = make_mesh(tp, jax.devices()[: 2 * tp])
    with jax.set_mesh(mesh):
        trained = jax.device_put(policy(state.params, base, prepared.update), NamedSharding(mesh, PartitionSpec()))
        sampled = sampling_params(trained, prepared.model, ExecutionConfig(ROLLOUT, dtype))
        loaded = find_model(config.run_dir).load_policy(mesh, dtype)
    assert jax.tree.structure(loaded) == jax.tree.structure(sampled)  # the scale too
    for leaf, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(sampled), strict=True):
        assert leaf.dtype == other.dtype == dtype and leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
        assert (np.asarray(leaf) == np.asarray(other)).all()
    assert (np.asarray(loaded.layers.gate.b, np.float32) != 0).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_loads_as_the_base_with_its_adapters_merged(config, finished, dtype):
    """In float32, then rounded once."""
    rounding = 2**-8 if dtype == "bfloat16" else 0
    prepared, weights = base_of(config)
    state = final_state_of(config)
    with jax.set_mesh(prepared.mesh):
        expected = narrow(merge(weights, state.params, prepared.update.lora_scale), dtype)
    loaded = find_model(config.run_dir).load(prepared.mesh, STORE, dtype)
    for leaf, other in zip(jax.tree.leaves(expected), jax.tree.leaves(loaded), strict=True):
        assert leaf.dtype == other.dtype == dtype
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (leaf, other)), rtol=rounding, atol=np.spacing(np.float32(4))
        )
    base = find_model(config.model_path).load(prepared.mesh, STORE, dtype)
    assert (np.asarray(loaded.layers.gate) != np.asarray(base.layers.gate)).any()


def test_adapters_find_their_base_or_say_which_they_need(config, finished, tmp_path):
    moved = shutil.copytree(config.run_dir, tmp_path / "moved")
    for meta in moved.glob("checkpoints/*/meta/metadata"):
        said = json.loads(meta.read_text()) | {"config": json.loads(meta.read_text())["config"] | {"model_path": "gone"}}
        meta.write_text(json.dumps(sealed(said)))
    with pytest.raises(ConfigError, match="has adapters for the model in gone, which is not there; give --base_path DIR"):
        find_model(moved)
    prepared, weights = base_of(config)
    for model in (find_model(moved, config.model_path), find_model(config.run_dir)):
        assert model.load(prepared.mesh, STORE, "float32").embedding.shape == weights.embedding.shape
    other = tmp_path / "other"
    shutil.copytree(config.model_path, other)
    said = json.loads((other / "config.json").read_text())
    save_params(other, replace(weights, final_norm=weights.final_norm + 1), prepared.model, said)
    with pytest.raises(
        ConfigError, match=r"other is not the model that .*moved/checkpoints/6 was trained on; give --base_path"
    ):
        find_model(moved, other).load(prepared.mesh, STORE, "float32")
