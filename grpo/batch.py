"""The batch of one step: which completion tokens count, how completions are packed, and how it is split into microbatches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from data.batches import Packed, pack, pair
from models.sharding import to_devices, to_host


@flax.struct.dataclass
class Batch:
    """What one step trains on. Row b is a completion of question b // G.

    Where two questions share packed rows, their prompts are one row of `prompts`, and `order` says which of the step's
    completions each row is.
    """

    prompts: Array  # QP, right-padded; or [Q/2, 2P]
    lengths: Array  # Q
    packed: Packed  # the completions without their padding
    mask: Any  # BC, 1 where a completion token counts, the stop token included; None before the rewards are there
    sampler_logprobs: Array  # BC
    advantages: Any  # B; None before the rewards are there
    old_logprobs: Any = None  # BC, when a rollout is used for more than one update
    ref_logprobs: Any = None  # BC, when beta > 0
    order: Any = None  # B; None: they are in order

    def place(self, x: np.ndarray) -> np.ndarray:
        """Completions' values on the host in the order of the batch.  B..."""
        return x if self.order is None else x[to_host(self.order)]

    def restore(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `place`."""
        return x if self.order is None else x[np.argsort(to_host(self.order))]


def loss_mask(lengths: np.ndarray, truncated: np.ndarray, rewards: np.ndarray, width: int, mask_truncated: bool) -> np.ndarray:
    """Which tokens count: those of every completion with a reward, except truncated ones under `mask_truncated`.

    B, B, QG (NaN: no reward), C -> BC, bool
    """
    mask = (np.arange(width) < lengths[:, None]) & ~np.isnan(rewards).reshape(-1, 1)
    return mask & ~truncated[:, None] if mask_truncated else mask


def make_batch(
    prompts: np.ndarray, prompt_lengths: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, logprobs: np.ndarray,
    mask: np.ndarray | None, advantages: np.ndarray | None, packing: int, parts: int = 0, put: Callable = to_devices,
) -> Batch:  # fmt: skip
    """Host arrays QP, Q, BC, B, BC, BC, B -> the batch, on the devices, or where `put(array, letters)` places it.

    The completions of two questions share rows where this saves slots, and where pairs of questions divide over `parts`: the
    devices times the microbatches; 0: never. The longest group is then paired with the shortest.
    """
    Q, order = len(prompts), None
    packed = pack(tokens, lengths, prompt_lengths, packing)
    if packing and parts and Q % (2 * parts) == 0:
        questions = pair(lengths.reshape(Q, -1).sum(axis=1))
        rows = np.arange(len(tokens), dtype=np.int32).reshape(Q, -1)[questions].reshape(-1)
        paired = pack(tokens[rows], lengths[rows], prompt_lengths[questions], packing, together=2)
        if paired.tokens.size < packed.tokens.size:
            packed, order = paired, rows
            prompts, prompt_lengths = prompts[questions].reshape(Q // 2, -1), prompt_lengths[questions]
    batch: Any = Batch(prompts, prompt_lengths, packed, None, logprobs, advantages, order=order)  # type: ignore[arg-type]
    mask = None if mask is None else mask.astype(np.float32)
    rows = {"mask": mask, "sampler_logprobs": logprobs, "advantages": advantages}
    batch = replace(batch, **{name: x if x is None or order is None else x[order] for name, x in rows.items()})
    return jax.tree.map(put, batch, batch_axes(batch))


def batch_axes(batch: Batch) -> Any:
    """The letters of each array of a batch (models/sharding.py)."""
    letters = {"prompts": "QP", "lengths": "Q", "advantages": "B", "order": "B", "packed": Packed(*["BC"] * 4)}
    return replace(batch, **{name: letters.get(name, "BC") for name, x in vars(batch).items() if x is not None})


def split(tree: Any, Q: int, parts: int, at) -> Any:
    """Microbatches: every leaf [Q*g, ...] -> [parts, Q/parts*g, ...]. Groups stay whole, each part on all devices."""

    def split_leaf(x: Array) -> Array:
        dims = "." * (x.ndim - 1)
        x = lax.reshape(x, (Q // parts, parts, x.shape[0] // Q, *x.shape[1:]), out_sharding=at("Q.." + dims))
        x = jnp.moveaxis(x, 1, 0)
        return lax.reshape(x, (parts, x.shape[1] * x.shape[2], *x.shape[3:]), out_sharding=at(".B" + dims))

    return jax.tree.map(split_leaf, tree)


def unsplit(x: Array, Q: int, at) -> Array:
    """The inverse of `split` for an array of rows.  [parts, B/parts, C] -> BC"""
    parts, rows, C = x.shape
    x = lax.reshape(x, (parts, Q // parts, parts * rows // Q, C), out_sharding=at(".Q.."))
    return lax.reshape(jnp.moveaxis(x, 0, 1), (parts * rows, C), out_sharding=at("BC"))
