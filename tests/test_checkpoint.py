"""Laws of grpo/runs/checkpoint.py: what is restored is what was saved, bit for bit, or nothing; and a digest sees every bit."""

import re
import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import grpo.runs.checkpoint
from grpo.errors import ConfigError, RunError
from grpo.runs.checkpoint import Checkpoints, digest
from models.sharding import STORE, make_mesh, spec

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")  # orbax's

LETTERS = {"wide": "LdF", "tall": "Vd", "norm": "d", "half": "VD", "count": ""}


@pytest.fixture(scope="module")
def meshes():
    """Meshes of 1, 4 x 2 and 8 devices."""
    return {1: make_mesh(1, jax.devices()[:1]), 4: make_mesh(2), 8: make_mesh()}


def host_tree() -> dict[str, np.ndarray]:
    """Bits that rounding would lose: denormals, both zeros, infinities, NaN, and bfloat16."""
    rng = np.random.default_rng(0)
    tree = {
        "wide": rng.normal(size=(3, 5, 16)).astype(np.float32),
        "tall": rng.integers(0, 2**32, (24, 4), np.uint32).view(np.float32),
        "norm": np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-30, -1.0], np.float32),
        "half": np.asarray(jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16)),
        "count": np.array(7, np.int32),
    }
    return tree


def lay_out(tree, mesh):
    return {name: jax.device_put(leaf, NamedSharding(mesh, spec(LETTERS[name], STORE))) for name, leaf in tree.items()}


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, same in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        leaf, same = np.asarray(leaf), np.asarray(same)
        assert (leaf.shape, leaf.dtype) == (same.shape, same.dtype)
        assert leaf.tobytes() == same.tobytes()


# --------------------------------------------------------------------------------------------------------- checkpoints


def anything(meta):
    """Accepts whatever the state belongs to."""


def test_restored_is_saved_bit_for_bit_on_every_layout(tmp_path, meshes):
    """From 8 devices to 1, from there to 4 x 2, and back to 8: each leaf lies as the target's does."""
    state = lay_out(host_tree(), meshes[8])
    for hop, devices in enumerate((1, 4, 8)):
        with closing(Checkpoints(tmp_path / str(hop), keep=2)) as writer:
            writer.save(3, state, {"step": 3}, wait=True)
        abstract_like = lay_out(jax.tree.map(np.zeros_like, host_tree()), meshes[devices])
        with closing(Checkpoints(tmp_path / str(hop), keep=2)) as reader:
            restored = reader.restore(abstract_like, anything)
        assert restored is not None and restored.step == 3 and restored.damaged == []
        state = restored.state
        assert_same_bits(state, host_tree())
        for name, leaf in state.items():
            assert leaf.sharding == abstract_like[name].sharding and len(leaf.sharding.device_set) == meshes[devices].size
    assert meshes[4].shape["tp"] == 2 and state["tall"].sharding.shard_shape((24, 4)) == (3, 4)  # cut, not copied


@pytest.fixture
def abstract_like(meshes):
    return lay_out(host_tree(), meshes[1])


@pytest.fixture
def checkpoints(tmp_path):
    with closing(Checkpoints(tmp_path / "checkpoints", keep=2)) as checkpoints:
        yield checkpoints


def fill(checkpoints: Checkpoints, abstract_like, steps=(1, 2, 3), **meta) -> None:
    for step in steps:
        checkpoints.save(step, abstract_like | {"count": jnp.asarray(step, jnp.int32)}, {"step": step, **meta}, wait=True)


def damage(folder: Path, how: str) -> None:
    """Each of these leaves a folder that orbax still takes for a checkpoint, or reads without a word, or reads at its peril."""
    state = folder / "state"
    for data in [path for path in state.rglob("d/*") if path.is_file()]:
        octets = bytearray(data.read_bytes())
        if how == "flipped bit":
            octets[len(octets) // 2] ^= 16
            data.write_bytes(octets)
        elif how == "truncated":
            data.write_bytes(octets[: len(octets) // 2])
        elif how == "array missing":
            data.unlink()
    if how == "state missing":
        shutil.rmtree(state)
    elif how == "manifest":
        (state / "manifest.ocdbt").write_bytes(b"no manifest")
    elif how == "metadata":
        (state / "_METADATA").write_text("{")
    elif how == "meta garbage":
        (folder / "meta" / "metadata").write_text('{"step": 3')
    elif how == "meta changed":
        path = folder / "meta" / "metadata"
        path.write_text(path.read_text().replace('"step": 3', '"step": 2').replace('"step":3', '"step":2'))
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()


DAMAGES = [
    "flipped bit", "truncated", "array missing", "state missing", "manifest", "metadata", "meta garbage", "meta changed",
    "empty folder",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_fault_10_11_a_damaged_checkpoint_gives_way_to_the_one_before(checkpoints, abstract_like, how, capsys):
    fill(checkpoints, abstract_like)
    damage(checkpoints.folder / "3", how)
    restored = checkpoints.restore(abstract_like, anything)
    assert restored.step == 2 and restored.damaged == [3] and int(restored.state["count"]) == 2
    assert_same_bits(restored.state | {"count": np.array(7, np.int32)}, host_tree())
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: checkpoint {checkpoints.folder / '3'} is damaged: ") and warning.count("\n") == 1
    checkpoints.set_aside(restored.damaged)
    assert checkpoints.steps() == [2] and (checkpoints.folder / "3.damaged").is_dir()
    fill(checkpoints, abstract_like, steps=[3])  # its number is free again
    assert checkpoints.restore(abstract_like, anything).step == 3


def test_fault_10_a_flipped_bit_is_named_by_its_leaf_and_without_another_step_the_run_ends(checkpoints, abstract_like, capsys):
    abstract_like["large"] = jax.random.normal(jax.random.key(0), (128, 128))  # small leaves lie in nodes that orbax checks
    fill(checkpoints, abstract_like, steps=[3])
    data = max((checkpoints.folder / "3" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    octets = bytearray(data.read_bytes())
    octets[len(octets) // 2] ^= 16
    data.write_bytes(octets)
    with pytest.raises(RunError, match=r"^no checkpoint in .* can be restored \(3 .* damaged\)$"):
        checkpoints.restore(abstract_like, anything)
    assert "the digest of large is wrong, of 1 leaves in all" in capsys.readouterr().err
    assert checkpoints.steps() == [3]  # nothing is removed


def test_fault_10_sixty_bit_flips(checkpoints, abstract_like):
    """Anywhere in a checkpoint's files: what is restored is always the right state, of this step or of the one before."""
    abstract_like["large"] = jax.random.normal(jax.random.key(0), (64, 64))
    fill(checkpoints, abstract_like, steps=(2, 3))
    rng, fell_back = np.random.default_rng(0), 0
    files = sorted(path for path in (checkpoints.folder / "3").rglob("*") if path.is_file() and path.stat().st_size)
    weights = np.array([path.stat().st_size for path in files], float)
    for _ in range(60):
        path = files[rng.choice(len(files), p=weights / weights.sum())]
        before = path.read_bytes()
        octets = bytearray(before)
        octets[rng.integers(len(octets))] ^= 1 << rng.integers(8)
        path.write_bytes(octets)
        restored = checkpoints.restore(abstract_like, anything)
        path.write_bytes(before)
        assert int(restored.state["count"]) == restored.step == restored.meta["step"]
        assert_same_bits(restored.state | {"count": np.array(7, np.int32)}, host_tree() | {"large": abstract_like["large"]})
        fell_back += restored.step == 2
    assert fell_back > 20  # the others hit what orbax reads no more


def test_what_does_not_belong_is_refused_before_an_array_is_read(checkpoints, abstract_like, monkeypatch):
    fill(checkpoints, abstract_like)
    monkeypatch.setattr(checkpoints, "read_state", None)

    def refuse(meta):
        raise ConfigError(f"another run, step {meta['step']}")

    with pytest.raises(ConfigError, match="another run, step 3"):
        checkpoints.restore(abstract_like, refuse)


def test_the_oldest_are_given_up_but_not_the_last_of_a_session(checkpoints, abstract_like):
    for step in (1, 2, 3, 10):
        fill(checkpoints, abstract_like, steps=[step], final=step == 1)
    assert checkpoints.steps() == [1, 3, 10]
    assert checkpoints.restore(abstract_like, anything).meta["final"] is False


def test_an_old_checkpoint_is_kept_until_the_new_one_is_verified(checkpoints, abstract_like, monkeypatch, capsys):
    """The new one is committed, but on reading it back a leaf differs: it goes, and the old ones stay."""
    fill(checkpoints, abstract_like, steps=(1, 2))
    monkeypatch.setattr(grpo.runs.checkpoint, "host_digest", lambda folder, name: "0" * 16)
    checkpoints.save(3, abstract_like, {"step": 3})
    checkpoints.settle()
    assert checkpoints.steps() == [1, 2]
    assert "is not what was written; one more failure ends the run" in capsys.readouterr().err
    with pytest.raises(RunError, match="twice in a row, so the run stops"):
        checkpoints.save(4, abstract_like, {"step": 4}, wait=True)
    assert checkpoints.steps() == [1, 2]


def test_fault_8_a_full_disk_is_one_warning_then_the_end(checkpoints, abstract_like, monkeypatch, capsys):
    fill(checkpoints, abstract_like, steps=[1])
    free = shutil.disk_usage(checkpoints.folder)._replace(free=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(grpo.runs.checkpoint.shutil, "disk_usage", lambda folder: free)
        checkpoints.save(2, abstract_like, {"step": 2})
        checkpoints.settle()
        warning = capsys.readouterr().err
        assert re.search(r"checkpoints/2 could not be saved: 67 MB needed, 1 MB free; one more failure ends the run", warning)
    fill(checkpoints, abstract_like, steps=[3])  # there is room again: the next failure is the first
    monkeypatch.setattr(grpo.runs.checkpoint.shutil, "disk_usage", lambda folder: free)
    checkpoints.save(4, abstract_like, {"step": 4})
    with pytest.raises(RunError, match="older checkpoints are as they were"):
        checkpoints.save(5, abstract_like, {"step": 5}, wait=True)
    assert checkpoints.steps() == [1, 3]


def test_saving_a_step_again_leaves_it_alone(checkpoints, abstract_like):
    checkpoints.save(4, abstract_like, {"step": 4, "first": True})
    checkpoints.save(4, abstract_like | {"count": jnp.asarray(99, jnp.int32)}, {"step": 4, "first": False}, wait=True)
    restored = checkpoints.restore(abstract_like, anything)
    assert restored.meta["first"] is True and int(restored.state["count"]) == 7


def test_a_step_that_was_not_finished_is_no_step(checkpoints, abstract_like):
    """What a killed process leaves behind: a folder under a temporary name."""
    fill(checkpoints, abstract_like, steps=[1])
    (checkpoints.folder / "2.orbax-checkpoint-tmp-1").mkdir()
    (checkpoints.folder / "best_copy").mkdir()
    (checkpoints.folder / "9").write_text("a file")
    assert checkpoints.restore(abstract_like, anything).step == 1
    checkpoints.clean()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["1", "9", "best_copy"]


def test_one_failure_in_line_ends_no_run(tmp_path, abstract_like, monkeypatch):
    """Without a background too, training goes on to the next save."""
    with closing(Checkpoints(tmp_path, background=False)) as checkpoints:
        free = shutil.disk_usage(tmp_path)._replace(free=0)
        with monkeypatch.context() as patch:
            patch.setattr(grpo.runs.checkpoint.shutil, "disk_usage", lambda folder: free)
            checkpoints.save(1, abstract_like, {"step": 1})
        checkpoints.save(2, abstract_like, {"step": 2})
        assert checkpoints.steps() == [2]


def test_a_step_under_another_steps_name_is_damaged(checkpoints, abstract_like):
    fill(checkpoints, abstract_like, steps=[1])
    shutil.copytree(checkpoints.folder / "1", checkpoints.folder / "7")
    restored = checkpoints.restore(abstract_like, anything)
    assert restored.step == 1 and restored.damaged == [7]


def test_no_step_is_none(checkpoints, abstract_like):
    assert checkpoints.restore(abstract_like, anything) is None


def test_saving_goes_on_beside_the_training(checkpoints, abstract_like):
    """What is written is the state as it was, though the training gives its buffers away meanwhile."""
    state = jax.tree.map(jnp.copy, abstract_like)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints.save(1, state, {"step": 1})
    for _ in range(3):
        state = update(state)
    checkpoints.settle()
    assert_same_bits(checkpoints.restore(abstract_like, anything).state, host_tree())


# -------------------------------------------------------------------------------------------------------------- digest


@pytest.fixture(params=["host", "devices"])
def digesting(request, monkeypatch):
    """Where leaves as small as those of a test are digested."""
    if request.param == "devices":
        monkeypatch.setattr(grpo.runs.checkpoint, "SMALL", 0)


def test_the_digest_is_the_same_on_every_mesh_and_on_the_host(meshes, monkeypatch):
    monkeypatch.setattr(grpo.runs.checkpoint, "leaf_words", None)  # small leaves compile nothing
    digests = {digest(lay_out(host_tree(), mesh)) for mesh in meshes.values()}
    monkeypatch.undo()
    monkeypatch.setattr(grpo.runs.checkpoint, "SMALL", 0)
    digests |= {digest(lay_out(host_tree(), mesh)) for mesh in meshes.values()}
    assert len(digests) == 1
    (one,) = digests
    assert len(one) == 16 and int(one, 16) >= 0


@pytest.mark.usefixtures("digesting")
def test_any_flipped_bit_changes_the_digest(meshes):
    tree, rng = host_tree(), np.random.default_rng(1)
    before = digest(lay_out(tree, meshes[8]))
    for _ in range(200):
        name = rng.choice(list(tree))
        flipped = np.array(tree[name])  # a copy
        octets = flipped.reshape(-1).view(np.uint8)
        octets[rng.integers(octets.size)] ^= np.uint8(1 << rng.integers(8))
        assert digest(lay_out({**tree, name: flipped}, meshes[8])) != before
    assert digest(lay_out(host_tree(), meshes[8])) == before


@pytest.mark.usefixtures("digesting")
@pytest.mark.parametrize("distance", [1, 2, 256, 512, 1 << 12, 1 << 15, 1 << 16])
@pytest.mark.parametrize(("one", "other"), [(1.0, 2.0), (1.0, -1.0), (0.0, 1.0), (0.375, 0.40625)])
def test_two_swapped_elements_change_the_digest(one, other, distance):
    """Also a power of two apart, and of values whose bits differ only at the top: as weights read from bfloat16 do."""
    leaf = np.zeros(2**16 + 2, np.float32)
    leaf[1], leaf[1 + distance] = one, other
    swapped = leaf.copy()
    swapped[1], swapped[1 + distance] = other, one
    assert digest({"w": jnp.asarray(leaf)}) != digest({"w": jnp.asarray(swapped)})


@pytest.mark.usefixtures("digesting")
def test_swapped_rows_and_swapped_layers_change_the_digest():
    rng = np.random.default_rng(2)
    leaf = np.asarray(jnp.asarray(rng.normal(size=(4, 64, 128)), jnp.bfloat16).astype(jnp.float32))
    whole = {digest({"w": jnp.asarray(leaf)})}
    for axis, order in (
        (0, [1, 0, 2, 3]),
        (0, [2, 1, 0, 3]),
        (1, [32, *range(1, 32), 0, *range(33, 64)]),
        (2, range(127, -1, -1)),
    ):
        whole.add(digest({"w": jnp.asarray(leaf.take(list(order), axis=axis))}))
    assert len(whole) == 5


def test_names_shapes_and_dtypes_count():
    ones = jnp.ones(8)
    trees = [
        {"a": ones, "b": ones},
        {"a": ones, "c": ones},
        {"a": {"b": ones}, "b": ones},
        {"a": ones},
        {"a": ones.reshape(2, 4), "b": ones},
        {"a": ones.reshape(4, 2), "b": ones},
        {"a": jax.lax.bitcast_convert_type(ones, jnp.int32), "b": ones},
        {"a": ones, "b": jnp.ones(9)},
        {"a": ones, "b": jnp.zeros(8)},
        {"a": jnp.zeros(8), "b": ones},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)


def test_every_position_of_a_leaf_counts_on_its_own():
    """A single 1 in a row of zeros has a digest of its own at each place, and so has no 1 at all."""
    digests = {digest({"w": jnp.asarray(row)}) for row in np.concatenate([np.eye(64), np.zeros((1, 64))]).astype(np.float32)}
    assert len(digests) == 65
