"""Memory of a step: what stays resident on the devices, and which rematerialisation fits in what is left."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo.batch import Batch
from grpo.update import UpdateConfig
from models.gemma import ExecutionConfig, GemmaConfig, shapes
from models.lora import count_adapters


def resident_bytes(model: GemmaConfig, dtype: str, config: UpdateConfig) -> float:
    """Bytes of float32 weights, moments and gradients and of the frozen weights, all devices together."""
    weights, width = sum(leaf.size for leaf in jax.tree.leaves(shapes(model))), jnp.dtype(dtype).itemsize
    if config.lora_rank:
        return width * weights + 16 * count_adapters(model, config.lora_names, config.lora_rank)
    return (16 + width * (config.beta > 0)) * weights


def choose_remat(
    execution: ExecutionConfig, model: GemmaConfig, batch: Batch, config: UpdateConfig, devices: int, memory: float
) -> ExecutionConfig:
    """Replaces remat `auto` by `dots` (keep the results of products and attention) where `memory` allows it; else by `full`.

    `memory` is bytes a device. Counts the resident bytes and what `dots` keeps for each slot of the packed rows, and leaves a
    fifth of the memory free.
    """
    if execution.remat != "auto":
        return execution
    slots = (batch.prompts.size + batch.packed.tokens.size) / config.microbatches
    products = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim + 2 * model.embed_dim + 2 * model.mlp_dim
    kept = slots * model.num_layers * products * jnp.dtype(execution.dtype).itemsize
    needed = (resident_bytes(model, execution.dtype, config) + kept) / devices
    return replace(execution, remat="dots" if needed < 0.8 * memory else "full")


def device_memory(mesh: Mesh) -> float:
    """Bytes that a device can hold; 0 where it does not say, as a CPU."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 0)
