"""Attention of packed training rows by a Pallas kernel for TPUs: scores never leave the chip, empty blocks are never computed.

    visible(q, k) = 0 <= position_q - position_k < window  and  segment_k is 0 (the prompt) or segment_q
    out_q = sum_k softmax_k(cap(scale * q.k)) v_k

The kernel is jax's splash attention, which brings its own backward pass. Its mask is data, one for all heads, since boundaries
between completions move with every batch; the kernel's own segments cannot say "my completion, or the prompt". Left out:
decoding, and GPUs. A mesh of CPUs interprets the kernel, which is slow and meant for tests.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, make_splash_mha

LANES = 128  # both sides of a block are multiples of it
BLOCK = 256  # smaller blocks skip more of the mask, larger ones take fewer steps


def splash_attention(
    q: Array, k: Array, v: Array, positions: Array, segments: Array, window: Array, scale: float, cap: float | None, at
) -> Array:
    """Each row's slots attend to its prompt and to their own completion.  QTNH, QTKH, QTKH, QT, QT, scalar -> QTA

    Differentiable in q, k and v. A slot of a negative segment is padding: none but itself sees it, and it sees no other.
    """
    T = q.shape[1]
    block = min(BLOCK, -(-T // LANES) * LANES)
    missing = -T % block
    sides = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    device = jax.sharding.get_abstract_mesh().abstract_device
    make = partial(
        make_splash_mha, block_sizes=BlockSizes(**dict.fromkeys(sides, block)), attn_logits_soft_cap=cap,
        head_shards=1, q_seq_shards=1, interpret=device is not None and device.platform == "cpu",
    )  # fmt: skip

    def row(q, k, v, positions, segments, window):  # TNH, TKH, TKH, T, T, scalar -> TA
        q, k, v = (jnp.pad(jnp.moveaxis(x, 1, 0), ((0, 0), (0, missing), (0, 0))) for x in (q * scale, k, v))
        positions, segments = jnp.pad(positions, (0, missing)), jnp.pad(segments, (0, missing), constant_values=-1)
        segments = jnp.where(segments < 0, ~jnp.arange(T + missing), segments)  # apart, as the softmax of nothing is no number
        age = positions[:, None] - positions
        same = segments[:, None] == segments
        visible = (age >= 0) & (age < window) & (same | ((segments == 0) & (segments[:, None] > 0)))
        kernel = make(visible[None])
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)  # it branches on this flag, traced by now
        mixed: Any = kernel(q, k, v)  # NTH
        return jnp.moveaxis(mixed[:, :T], 0, 1).reshape(T, -1)

    @partial(
        jax.shard_map, check_vma=False, out_specs=at("QTA"),
        in_specs=(at("QTNH"), at("QTKH"), at("QTKH"), at("QT"), at("QT"), at("")),
    )  # fmt: skip
    def rows(q, k, v, positions, segments, window):
        return lax.map(lambda one: row(*one, window=window), (q, k, v, positions, segments))

    return rows(q, k, v, positions, segments, window)
