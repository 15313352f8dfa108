"""The training state on disk, by orbax: weights, moments, counters, and what they belong to. The only file that knows orbax.

    RUN_DIR/checkpoints/STEP/{state,meta}      committed by a rename, so a step is there whole or not at all

Left out: exporting to other formats (models/convert.py).
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Write the state after `step`; a step that is there already is left alone."""
        if self.latest() == step:
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        saved = self.manager.save(step, args=args)
        assert saved, f"orbax refused to save step {step}"
        self.manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any]:
        """The newest step and its state, each leaf with the shape, dtype and layout of `like`."""
        step = self.latest()
        assert step is not None
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        restored = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        return step, restored["state"]

    def meta(self) -> dict[str, Any]:
        """What was saved beside the newest state."""
        return self.manager.restore(self.latest(), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        self.manager.close()


def scramble(x: Array) -> Array:
    """Murmur3's finalizer: maps 32-bit words one to one, and a flipped bit flips about half of the others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def leaf_words(leaf: Array) -> Array:
    """Two 32-bit words that any changed element changes, whatever devices hold the leaf: sums of scrambles, mod 2^32."""
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    bits = bits.astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # row-major position
        place = jnp.arange(bits.shape[axis], dtype=jnp.uint32) * jnp.uint32(stride % 2**32)
        index = index + place.reshape([-1] + [1] * (bits.ndim - 1 - axis))
        stride *= bits.shape[axis]
    places = (index, index + jnp.uint32(0x9E3779B9))
    return jnp.stack([scramble(bits ^ scramble(place)).sum(dtype=jnp.uint32) for place in places])


def digest(tree: Any) -> str:
    """A fingerprint of a tree of arrays that depends on their values alone, not on how they lie: 16 hex digits."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    lines = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {leaf_words(leaf).tolist()}" for path, leaf in flat]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
