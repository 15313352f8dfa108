"""Laws of grpo/runs/model_source.py: a model is the same from wherever it is loaded, and what cannot be loaded is named."""

import shutil
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from data.tokenizer import load_tokenizer
from grpo.config import TINY_MODEL, Config
from grpo.errors import ConfigError, RunError
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.model_source import copy_description, find_model
from grpo.update import UpdateConfig, init_state
from models.sharding import ROLLOUT, STORE, make_mesh

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")  # orbax's


@pytest.fixture(scope="module")
def run(mesh, tmp_path_factory) -> Path:
    """A run's directory: the tiny model's weights at step 3, twice of them at step 7."""
    base, folder = find_model(TINY_MODEL), tmp_path_factory.mktemp("run")
    params = base.load(mesh, STORE, "float32")
    copy_description(base, folder / "model")
    with closing(Checkpoints(folder / "checkpoints", keep=2)) as checkpoints:
        for step, times in ((3, 1), (7, 2)):
            state = init_state(jax.tree.map(lambda leaf, times=times: times * leaf, params), UpdateConfig.of(Config()))
            checkpoints.save(step, state, {"step": step, "config": {"model_path": TINY_MODEL}}, wait=True)
    return folder


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "copy"))


def assert_same(params, others, times=1):
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(times * np.asarray(leaf), np.asarray(other))


def test_a_run_gives_the_weights_that_it_saved_and_the_newest_unless_a_step_is_named(run, mesh):
    base = find_model(TINY_MODEL).load(mesh, STORE, "float32")
    newest, third = find_model(run), find_model(run / "checkpoints" / "3")
    assert_same(base, newest.load(mesh, STORE, "float32"), times=2)
    assert_same(base, third.load(mesh, STORE, "float32"))
    assert (newest.meta["step"], third.meta["step"]) == (7, 3)
    for model in (newest, third):
        assert model.trained_from and model.trained_from().path == Path(TINY_MODEL) and model.run_dir == run
    assert newest.config == find_model(TINY_MODEL).config


def test_each_device_reads_its_own_part(run, mesh):
    whole = find_model(run).load(mesh, STORE, "float32")
    eight = make_mesh(4)
    for rules, dtype in ((STORE, "float32"), (ROLLOUT, "bfloat16")):
        spread = find_model(run).load(eight, rules, dtype)
        assert len(spread.embedding.sharding.device_set) == 8
        assert_same(jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), whole), spread)


def test_a_run_needs_neither_its_base_nor_the_place_where_it_was_made(run, tmp_path, mesh):
    moved = copied(run, tmp_path)
    model = find_model(moved)
    assert model.folder == moved / "model"
    assert load_tokenizer(model.folder).fingerprint == load_tokenizer(TINY_MODEL).fingerprint
    shutil.rmtree(moved / "model")
    assert find_model(moved, TINY_MODEL).folder == Path(TINY_MODEL) == find_model(moved).folder
    meta = moved / "checkpoints" / "7" / "meta" / "metadata"
    assert TINY_MODEL in meta.read_text()


def test_a_flipped_bit_is_not_loaded(run, tmp_path, mesh):
    """Of the arrays, wherever it lies: the weights are as they were, or it is an error."""
    moved = copied(run, tmp_path)
    base, faults = find_model(TINY_MODEL).load(mesh, STORE, "float32"), []
    for file in sorted((moved / "checkpoints" / "7" / "state").rglob("*")):
        whole = file.read_bytes() if file.is_file() else b""
        for place in (len(whole) // 3, len(whole) // 2) if len(whole) > 10_000 else ():
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            try:
                assert_same(base, find_model(moved).load(mesh, STORE, "float32"), times=2)  # it was Adam's
            except RunError as error:
                faults.append(str(error))
            file.write_bytes(whole)
    assert faults and all("checkpoints/7 is damaged" in fault and "give another step" in fault for fault in faults)


def test_what_cannot_be_loaded_is_named(run, tmp_path):
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a run without a checkpoint yet"):
        find_model(empty)
    with pytest.raises(ConfigError, match="checkpoints/9 cannot be read"):
        find_model(run / "checkpoints" / "9")
    moved = copied(run, tmp_path)
    (moved / "checkpoints" / "7" / "meta" / "metadata").write_text("{}")
    with pytest.raises(ConfigError, match="checkpoints/7 cannot be read"):
        find_model(moved)
