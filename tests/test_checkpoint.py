"""Laws of grpo/checkpoint.py: what is restored is what was saved, bit for bit, and a digest sees every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from grpo.checkpoint import Checkpoints, digest
from models.sharding import STORE, make_mesh, spec

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


def test_restored_is_saved_bit_for_bit_on_every_layout(tmp_path, meshes):
    """From 8 devices to 1, from there to 4 x 2, and back to 8: each leaf lies as the target's does."""
    state = lay_out(host_tree(), meshes[8])
    for hop, devices in enumerate((1, 4, 8)):
        writer = Checkpoints(tmp_path / str(hop), keep=2)
        writer.save(3, state, {"step": 3})
        writer.close()
        like = lay_out(jax.tree.map(np.zeros_like, host_tree()), meshes[devices])
        reader = Checkpoints(tmp_path / str(hop), keep=2)
        step, state = reader.restore(like)
        reader.close()
        assert step == 3
        assert_same_bits(state, host_tree())
        for name, leaf in state.items():
            assert leaf.sharding == like[name].sharding and len(leaf.sharding.device_set) == meshes[devices].size
    assert meshes[4].shape["tp"] == 2 and state["tall"].sharding.shard_shape((24, 4)) == (3, 4)  # cut, not copied


def test_the_newest_step_is_restored_and_the_oldest_given_up(tmp_path, meshes):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    like = lay_out(host_tree(), meshes[1])
    for step in (1, 2, 10):
        checkpoints.save(step, like | {"count": jnp.asarray(step, jnp.int32)}, {"step": step, "name": f"after {step}"})
    assert checkpoints.latest() == 10
    assert checkpoints.meta() == {"step": 10, "name": "after 10"}
    step, state = checkpoints.restore(like)
    assert step == 10 and int(state["count"]) == 10
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["10", "2"]
    checkpoints.close()


def test_saving_a_step_again_leaves_it_alone(tmp_path, meshes):
    checkpoints = Checkpoints(tmp_path, keep=2)
    like = lay_out(host_tree(), meshes[1])
    checkpoints.save(4, like, {"first": True})
    checkpoints.save(4, like | {"count": jnp.asarray(99, jnp.int32)}, {"first": False})
    assert checkpoints.meta() == {"first": True}
    assert int(checkpoints.restore(like)[1]["count"]) == 7
    checkpoints.close()


def test_a_step_that_was_not_finished_is_no_step(tmp_path, meshes):
    """What a killed process leaves behind: a folder under a temporary name."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    like = lay_out(host_tree(), meshes[1])
    checkpoints.save(1, like, {"step": 1})
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp-1").mkdir()
    reopened = Checkpoints(tmp_path, keep=2)
    assert reopened.latest() == 1
    assert_same_bits(reopened.restore(like)[1], host_tree())
    reopened.close()


# -------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_is_the_same_on_every_mesh(meshes):
    digests = {digest(lay_out(host_tree(), mesh)) for mesh in meshes.values()}
    assert len(digests) == 1
    (one,) = digests
    assert len(one) == 16 and int(one, 16) >= 0


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


@pytest.mark.parametrize("distance", [1, 2, 256, 512, 1 << 12, 1 << 15, 1 << 16])
@pytest.mark.parametrize(("one", "other"), [(1.0, 2.0), (1.0, -1.0), (0.0, 1.0), (0.375, 0.40625)])
def test_two_swapped_elements_change_the_digest(one, other, distance):
    """Also a power of two apart, and of values whose bits differ only at the top: as weights read from bfloat16 do."""
    leaf = np.zeros(2**16 + 2, np.float32)
    leaf[1], leaf[1 + distance] = one, other
    swapped = leaf.copy()
    swapped[1], swapped[1 + distance] = other, one
    assert digest({"w": jnp.asarray(leaf)}) != digest({"w": jnp.asarray(swapped)})


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
