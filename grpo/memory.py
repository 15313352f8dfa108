"""Memory of a step: what stays resident on the devices, and which rematerialisation and decoding fit in what is left."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo.batch import Batch
from grpo.config import Config
from grpo.update import UpdateConfig, freezes_table
from models.gemma import ExecutionConfig, GemmaConfig, axes, shapes, split_table
from models.lora import count_adapters
from models.sharding import ROLLOUT, spec


def resident_bytes(model: GemmaConfig, dtype: str, config: UpdateConfig) -> float:
    """Bytes of float32 weights, moments and gradients and of the frozen weights, all devices together."""
    all_shapes, width = shapes(model), jnp.dtype(dtype).itemsize
    weights = count(all_shapes)
    if config.lora_rank:
        return width * weights + 16 * count_adapters(model, config.lora_names, config.lora_rank)
    frozen = count(split_table(all_shapes)[1]) if freezes_table(model, config) else 0
    return (16 + width * (config.beta > 0)) * (weights - frozen) + width * frozen


def count(tree: Any) -> int:
    """The numbers in a tree of arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def choose_remat(
    execution: ExecutionConfig, model: GemmaConfig, batch: Batch, config: UpdateConfig, mesh: Mesh, memory: float
) -> ExecutionConfig:
    """Replaces remat `auto` by `dots` (keep the results of products and attention) where `memory` allows it; else by `full`.

    `memory` is bytes a device. Counts the resident bytes and what `dots` keeps for each slot of the packed rows, and leaves a
    fifth of the memory free. GPUs below compute capability 8 compute, and keep, bfloat16 in float32.
    """
    if execution.remat != "auto":
        return execution
    slots = (batch.prompts.size + batch.packed.tokens.size) / config.microbatches
    numbers = sum(kind.num_layers * kept_by_layer(kind) for kind in model.kinds.values())
    old_gpu = float(getattr(mesh.devices.flat[0], "compute_capability", 8)) < 8
    kept = slots * numbers * (4 if old_gpu else jnp.dtype(execution.dtype).itemsize)
    needed = (resident_bytes(model, execution.dtype, config) + kept) / mesh.size
    return replace(execution, remat="dots" if needed < 0.8 * memory else "full")


def unroll_decoding(
    execution: ExecutionConfig, model: GemmaConfig, config: Config, mesh: Mesh, memory: float
) -> ExecutionConfig:
    """How a rollout decodes: with unrolled layers where nine tenths of `memory` (bytes a device) hold a second copy of weights.

    In a loop over layers a GPU copies the cache and some weights at every step. A TPU then reads weights only when a product
    needs them; where each weight is an array of its own, it fetches the next one during the product before. CPUs keep the loop.
    So does Gemma 4 on a TPU, whose unrolled programs were not compiled.
    """
    platform = mesh.devices.flat[0].platform
    if execution.unroll or not (platform in ("gpu", "cuda") or (platform == "tpu" and model.family < 4)):
        return execution
    update, width = UpdateConfig.of(config), jnp.dtype(execution.dtype).itemsize
    trained = count_adapters(model, update.lora_names, config.lora_rank) or count(shapes(model))
    resident = resident_bytes(model, execution.dtype, update) - 4 * trained  # no gradient lives while decoding
    cache = width * config.rows * (config.max_prompt_tokens + config.max_new_tokens) * 2 * model.cache_width
    copies = 1 if config.lora_rank and mesh.size == 1 else 2  # one device samples from the frozen base itself
    weights = copies * width * sum(jax.tree.leaves(jax.tree.map(partial(held, mesh), axes(model), shapes(model))))
    return replace(execution, unroll=(resident + cache) / mesh.size + weights < 0.9 * memory)


def held(mesh: Mesh, letters: str, leaf: Any) -> int:
    """The numbers of a leaf of the weights that each device holds while sampling."""
    return leaf.size // math.prod(mesh.shape[axis] for axis in spec(letters, ROLLOUT) if axis)


def kept_by_layer(kind: GemmaConfig) -> int:
    """Numbers that `dots` keeps of a token in one layer: the results of its products, and of attention."""
    heads = kind.projected_heads + kind.num_heads
    return heads * kind.head_dim + 2 * kind.embed_dim + 2 * kind.mlp_dim + 2 * kind.per_layer_dim


def device_memory(mesh: Mesh) -> float:
    """Bytes that a device can hold; 0 where it does not say, as a CPU."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 0)
