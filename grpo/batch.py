"""The batch of one step: which completion tokens count, how completions are packed, and how it is split into microbatches."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from data.batches import Packed, pack
from models.sharding import to_devices


@flax.struct.dataclass
class Batch:
    """What one step trains on. Row b is a completion of question b // G."""

    prompts: Array  # QP, right-padded
    lengths: Array  # Q
    packed: Packed  # the completions without their padding
    mask: Any  # BC, 1 where a completion token counts, the stop token included; None before the rewards are there
    sampler_logprobs: Array  # BC
    advantages: Any  # B; None before the rewards are there
    old_logprobs: Any = None  # BC, when a rollout is used for more than one update
    ref_logprobs: Any = None  # BC, when beta > 0


def loss_mask(lengths: np.ndarray, truncated: np.ndarray, rewards: np.ndarray, width: int, mask_truncated: bool) -> np.ndarray:
    """Which tokens count: those of every completion with a reward, except truncated ones under `mask_truncated`.

    B, B, QG (NaN: no reward), C -> BC, bool
    """
    mask = (np.arange(width) < lengths[:, None]) & ~np.isnan(rewards).reshape(-1, 1)
    return mask & ~truncated[:, None] if mask_truncated else mask


def make_batch(
    prompts: np.ndarray, prompt_lengths: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, logprobs: np.ndarray,
    mask: np.ndarray | None, advantages: np.ndarray | None, packing: int,
) -> Batch:  # fmt: skip
    """Host arrays QP, Q, BC, B, BC, BC, B -> the batch, on the devices."""
    packed = pack(tokens, lengths, prompt_lengths, packing)
    return Batch(
        prompts=to_devices(prompts, "QP"),
        lengths=to_devices(prompt_lengths, "Q"),
        packed=Packed(*(to_devices(x, "BC") for x in packed)),
        mask=None if mask is None else to_devices(mask.astype(np.float32), "BC"),
        sampler_logprobs=to_devices(logprobs, "BC"),
        advantages=None if advantages is None else to_devices(advantages, "B"),
    )


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
