"""Decoding: one token per row through the model, against cached keys and values. Letters are those of gemma.py.

A cache is stacked on L like the weights, and its slots are read where they lie. Or layers are unrolled (`unroll`, `unroll_kv`):
each has arrays of its own, which is faster on a CPU and a GPU, and compiles longer.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from models.gemma import (
    FAR,
    KV,
    TYPES,
    ExecutionConfig,
    GemmaConfig,
    Params,
    attend,
    attention_inputs,
    attention_out_and_mlp,
    embed,
    embed_per_layer,
    layer_window,
    rms_norm,
    rope_table,
    scan_layers,
    unstack,
)


def forward_cached(
    params: Params, tokens: Array, positions: Array, count: Array, prefix: KV, cache: KV, config: GemmaConfig,
    execution: ExecutionConfig,
) -> tuple[Array, KV]:  # fmt: skip
    """One token per row.  B, B1, scalar, (LQKPH, QP), (LBKCH, BC) -> BD, cache

    Their keys and values go to slot count % C of the cache, where its `positions` are theirs already. Layers, prefix and cache
    are stacked on L, or all three are unrolled (`unroll`, `unroll_kv`). From a stacked cache attention reads the fewest of
    `read_widths` slots that hold everything written: one branch for each width, because a shape cannot depend on `count`.
    """
    table = lax.optimization_barrier(rope_table(positions, config))  # otherwise XLA on CPU recomputes the sines for each head
    apart = isinstance(params.layers, tuple)
    most = None if apart else max(each.shape[1] for each in jax.tree.leaves(cache.positions))

    def step(kind, local, carry, index, w, token, _):
        x, all_k, all_v = carry
        own_positions = by_type(cache.positions, local)
        slot = count % own_positions.shape[1]
        q, k, v = attention_inputs(x, w, table[local], kind, execution)
        if k is not None:
            all_k = write_slot(all_k, local, index, jnp.moveaxis(k, 1, 3 if apart else 2), slot, axis=3 if apart else 2)
            all_v = write_slot(all_v, local, index, jnp.moveaxis(v, 1, 2), slot, axis=2)
            all_k, all_v = laid_out(all_k, keys=True), laid_out(all_v, keys=False)

        def mix(width):
            of_prompt = read_slots(prefix.k, prefix.v, prefix.positions, local, index, prefix.positions.shape[1])
            own = read_slots(all_k, all_v, own_positions, local, index, width)
            return attend(q, [of_prompt, own], positions, layer_window(local, kind), kind, execution.at)

        widths = read_widths(own_positions.shape[1], most)
        mixed = lax.switch(jnp.minimum(count // widths[0], len(widths) - 1), [partial(mix, width) for width in widths])
        return (attention_out_and_mlp(x, w, mixed, token, kind, execution), all_k, all_v), None

    x = embed(params, tokens[:, None], config, execution)
    per_layer = embed_per_layer(params, tokens[:, None], x, config, execution)
    (x, k, v), _ = scan_layers(step, (x, cache.k, cache.v), params.layers, per_layer, config, execution, learning=False)
    return rms_norm(x[:, 0], params.final_norm, config), KV(k, v, cache.positions)


def read_widths(slots: int, most: int | None = None) -> list[int]:
    """How many slots of a cache attention may read: multiples of 128, at most eight of the largest one's `most`; or all."""
    size = slots if most is None else 128 * -(-most // 1024)
    return [*range(size, slots, size), slots]


def read_slots(k: Any, v: Any, positions: Array, local: Any, index: Any, width: int) -> KV:
    """The first `width` slots of one layer's keys and values, of which unrolled layers have no more."""
    k, v = by_type(k, local), by_type(v, local)
    if isinstance(k, tuple):
        return KV(k[index], v[index], positions)
    size = 1, *k.shape[1:3], width, k.shape[4]
    k, v = (lax.dynamic_slice(each, (index, 0, 0, 0, 0), size)[0] for each in (k, v))
    return KV(jnp.swapaxes(k, 2, 3), v, positions[:, :width])


def write_slot(cache: Any, local: Any, index: Any, new: Array, slot: Array, axis: int) -> Any:
    """Write `new` into one slot of one layer's cache. -> the cache of all layers"""
    where: list[Any] = [0, 0, 0, 0]
    where[axis] = slot
    if isinstance(cache, dict):
        return cache | {TYPES[local]: write_slot(cache[TYPES[local]], local, index, new, slot, axis)}
    if isinstance(cache, tuple):
        return (*cache[:index], lax.dynamic_update_slice(cache[index], new, where), *cache[index + 1 :])
    return lax.dynamic_update_slice(cache, new[None], (index, *where))


def laid_out(cache: Any, keys: bool) -> Any:
    """A stacked cache in the layout in which attention on a TPU reads it. Keys of one head have their slots side by side.

    Left to itself, a newer compiler for TPUs (libtpu 0.0.52) takes the best layout for writing, and then copies the whole cache
    in each branch of attention.
    """

    def pin(x):
        order = (0, 1, 2, 4, 3) if keys and x.shape[2] == 1 else (0, 1, 2, 3, 4)
        return with_layout_constraint(x, Layout(major_to_minor=order))

    def on_tpu(x):
        return lax.platform_dependent(x, tpu=pin, default=lambda x: x)

    return cache if isinstance(cache, tuple) else jax.tree.map(on_tpu, cache)


def by_type(tree: Any, local: Any) -> Any:
    """What holds for a local or for a global layer, of a dict with something for each (Gemma 4) or of one thing for both."""
    return tree[TYPES[local]] if isinstance(tree, dict) else tree


def empty_kv(rows: int, width: int, config: GemmaConfig, execution: ExecutionConfig) -> KV:
    """Keys and values of `width` free slots in each row; in Gemma 4 local layers have none beyond their window."""
    own = {name: kind for name, kind in config.kinds.items() if kind.own_layers}
    slots = {name: min(width, kind.sliding_window) if name == "local" else width for name, kind in own.items()}

    def zeros(name: str) -> Array:
        shape = own[name].num_layers, rows, own[name].num_kv_heads, slots[name], own[name].head_dim
        return jnp.zeros(shape, execution.dtype, out_sharding=execution.at("LBKCH"))

    at = execution.at("BC")
    positions = {name: jnp.full((rows, count), FAR, jnp.int32, out_sharding=at) for name, count in slots.items()}
    kv = {name: zeros(name) for name in own}
    return KV(kv.get("", kv), kv.get("", kv), positions.get("", positions))


def unroll(params: Params, config: GemmaConfig, execution: ExecutionConfig) -> Params:
    """With `execution.unroll`, weights prepared for a decoding loop: a tuple of layers, and a transposed copy of the head."""
    head = lax.optimization_barrier(params.embedding.T)
    return replace(params, layers=unstack(params.layers, config, execution), head=head) if execution.unroll else params


def unroll_kv(kv: KV, config: GemmaConfig, execution: ExecutionConfig) -> KV:
    """The same for keys and values: LBKSH, LBKSH -> tuples of L times BKHS and L times BKSH, of layers that have any."""
    if not execution.unroll:
        return kv
    k, v = (unstack(each, config, execution, config.own_layers) for each in (kv.k, kv.v))
    return KV(tuple(jnp.swapaxes(each, 2, 3) for each in k), v, kv.positions)
