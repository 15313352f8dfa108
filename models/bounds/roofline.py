"""Roofline: lower bounds on the time of each part of a step, from the model's dimensions alone. Plain Python.

A bound holds for ONE chip, with the work split evenly over `devices`. It counts what the shardings of sharding.py require:

    flops          of the model: two per weight and token, four per (query, key) pair, head and feature; an update takes three
                   forward passes. Recomputation, padding and norms are not counted
    memory_bytes   reads of weights, keys and values, each once; reads and writes of the optimizer
    network_bytes  received from other chips: gathered weights and rows, scattered gradients

Arithmetic, memory and network are assumed to overlap perfectly, so the slowest of them decides. Two parts cannot overlap: the
collectives of a decode step, which the next product waits for, and the optimizer, which waits for the gradient's norm. Not
counted: activations, random numbers, the host.

Letters are those of gemma.py. `width` is the bytes per number (2: bfloat16); `tp` is the number of devices that share one copy
of the MLP and the vocabulary in sampling (sharding.ROLLOUT). A bound divided by the measured time is the MFU where arithmetic
is the slowest, and the MBU where memory is.
"""

from __future__ import annotations  # GemmaConfig is imported for type checkers only, so that this file needs no jax

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.gemma import GemmaConfig

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Nominal peaks of one chip. `dataclasses.replace` puts measured ones in their place."""

    name: str
    flops: float  # per second, dense bfloat16
    memory: float  # bytes that programs may use
    bandwidth: float  # bytes per second to and from memory
    link: float  # bytes per second in one direction over one link to another chip
    links: int  # of the chip with the fewest: a corner of a 2x4 slice has two
    clock: float | None = None  # cycles per second, where a compiler estimates cycles
    hop: float = 1e-6  # seconds from chip to chip; 1 us is ideal, 2.5 us was measured on v5e (scaling book, "Sharding")

    def network(self, received: float, devices: int) -> float:
        """Seconds for a chip in a ring of `devices` to receive this many bytes; two chips share a single link."""
        return received / (self.link * min(self.links, devices - 1)) if devices > 1 else 0.0


# v5e, v6e: cloud.google.com/tpu/docs/v5e and v6e; usable bandwidth of a link in one direction: jax-ml/scaling-book, tpus.md;
# memory: the compiler's limit. GPUs: NVIDIA's data sheets (A100 of 80 GB, A100 and H100 SXM), without sparsity; the link is
# NVLink, or PCIe in T4, L4 and RTX 4090. A T4 has no bfloat16 units, so its peak is that of float32.
# Clock: the peak over the flops of the matrix units in a cycle. v5e: 197e12 / (4 * 128 * 128 * 2).
# v6e: 918e12 / (4 * 256 * 256 * 2). Its compiler expects 0.46e6 flops a cycle of a product of 4096^3, more than two such units
# do, and at this clock the same part of the nominal bandwidth as on v5e, 1 / 1.24, of an addition over 1 GiB.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 45e9, 2, 1.5e9),
        Chip("v6e", 918e12, 31.25 * GIB, 1640e9, 90e9, 2, 1.75e9),
        Chip("T4", 8.1e12, 16e9, 320e9, 16e9, 1),
        Chip("L4", 121e12, 24e9, 300e9, 32e9, 1),
        Chip("RTX 4090", 165e12, 24e9, 1008e9, 32e9, 1),
        Chip("A100", 312e12, 80e9, 2.039e12, 300e9, 1),
        Chip("H100", 989e12, 80e9, 3.35e12, 450e9, 1),
        Chip("H200", 989e12, 141e9, 4.8e12, 450e9, 1),
    )
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip with jax's `device_kind`, such as "NVIDIA H100 80GB HBM3"; None for a CPU and for unknown chips."""
    kind = device_kind.replace("TPU v5 lite", "v5e").replace("TPU v6 lite", "v6e")
    return next((chip for name, chip in CHIPS.items() if re.search(rf"\b{name}\b", kind)), None)  # an L40 is no L4


@dataclass(frozen=True)
class Bound:
    """The least work of one chip, and the seconds that this takes. Bounds of consecutive parts add up."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    network_bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Bound) -> Bound:
        return Bound(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def overlapped(chip: Chip, devices: int, flops: float, memory: float, network: float) -> Bound:
    """The bound of work whose arithmetic, memory traffic and network traffic overlap."""
    seconds = max(flops / chip.flops, memory / chip.bandwidth, chip.network(network, devices))
    return Bound(flops, memory, network, seconds)


def attention_weights(model: GemmaConfig) -> int:
    """Parameters of q, k, v and o in all layers, and of what makes per-layer embeddings: what sampling replicates."""

    def of_layer(kind: GemmaConfig) -> int:
        return kind.embed_dim * ((kind.projected_heads + kind.num_heads) * kind.head_dim + 2 * kind.per_layer_dim)

    in_layers = sum(kind.num_layers * of_layer(kind) for kind in model.kinds.values())
    return in_layers + model.embed_dim * model.num_layers * model.per_layer_dim


def mlp_weights(model: GemmaConfig) -> int:
    """Parameters of gate, up and down in all layers."""
    return sum(3 * kind.num_layers * kind.embed_dim * kind.mlp_dim for kind in model.kinds.values())


def head_weights(model: GemmaConfig) -> int:
    """Parameters of the embedding, which is also the vocabulary head."""
    return model.vocab_size * model.embed_dim


def attention_products(model: GemmaConfig, start: int, stop: int) -> int:
    """Products of a query's number and a key's number in one sequence with queries at positions start, ..., stop - 1.

    Summed over layers and heads.
    """

    def seen(window: int) -> int:
        """The sum of min(position + 1, window)."""
        full = min(max(window, start), stop)  # from this position on, a query sees a whole window
        return (full * (full + 1) - start * (start + 1)) // 2 + (stop - full) * window

    local, all_ = seen(model.sliding_window), seen(stop)
    kinds = model.kinds.values()
    return sum(k.num_heads * k.head_dim * sum(local if near else all_ for near in k.local_layers) for k in kinds)


def forward_flops(model: GemmaConfig, body_tokens: int, head_tokens: int, products: float) -> float:
    """Flops of one forward pass on all chips together; `products` is the sum of `attention_products` over sequences."""
    body = attention_weights(model) + mlp_weights(model)
    dense = 2 * (body * body_tokens + head_weights(model) * head_tokens)
    return dense + 4 * products


def group_products(model: GemmaConfig, prompts: Sequence[int], lengths: Sequence[int]) -> int:
    """`attention_products` of prompts and completions with these lengths, Q and B, question-major; each prompt counts once."""
    G = len(lengths) // len(prompts)
    completions = (attention_products(model, prompts[b // G], prompts[b // G] + length) for b, length in enumerate(lengths))
    return sum(attention_products(model, 0, prompt) for prompt in prompts) + sum(completions)


def logprobs_bound(
    model: GemmaConfig, chip: Chip, devices: int, body_tokens: int, head_tokens: int, products: int, *, width: int = 2
) -> Bound:
    """Log-probabilities of `head_tokens`: weights are gathered layer by layer (FSDP), hidden states sent to the vocabulary."""
    body = attention_weights(model) + mlp_weights(model)
    flops = forward_flops(model, body_tokens, head_tokens, products) / devices
    memory = width * (body + head_weights(model) / devices)
    network = width * received(devices) * (body + head_tokens * model.embed_dim)
    return overlapped(chip, devices, flops, memory, network)


def update_bound(
    model: GemmaConfig, chip: Chip, devices: int, body_tokens: int, head_tokens: int, products: int, *, width: int = 2,
    adapters: int = 0,
) -> Bound:  # fmt: skip
    """One optimizer update: forward and backward pass each gather and read the weights, and the gradient is scattered once.

    Then AdamW reads and writes the float32 weights and both moments, and reads the gradient. With LoRA, gradient and optimizer
    are those of the `adapters` (their number of parameters), and the weights have no gradient: two of three products remain.
    """
    body = attention_weights(model) + mlp_weights(model)
    forward = logprobs_bound(model, chip, devices, body_tokens, head_tokens, products, width=width)
    flops = 3 * forward.flops
    if adapters:
        own = 2 * (body * body_tokens + head_weights(model) * head_tokens)  # the weights' products in one forward pass
        flops += (3 * 2 * adapters * body_tokens - own) / devices
    network = 2 * forward.network_bytes + width * received(devices) * (adapters or body)
    passes = overlapped(chip, devices, flops, 2 * forward.memory_bytes, network)
    state = 4 * (3 * 2 + 1) * (adapters or body + head_weights(model)) / devices
    return passes + Bound(memory_bytes=state, seconds=state / chip.bandwidth)


def sampling_params_bound(
    model: GemmaConfig, chip: Chip, devices: int, tp: int, *, width: int = 2, adapters: int = 0
) -> Bound:  # fmt: skip
    """Casting and resharding the weights: attention becomes whole, the rest sharded over `tp`.

    They are read in float32; with LoRA, a base of `width` bytes per number and float32 `adapters` are. On one chip the base
    stays where it is, and the adapters alone are cast.
    """
    if adapters and devices == 1:
        return overlapped(chip, devices, 0.0, (4 + width) * adapters, 0.0)
    sharded = mlp_weights(model) + head_weights(model)
    count = attention_weights(model) + sharded
    held = attention_weights(model) + sharded / tp
    read = (width * count + 4 * adapters if adapters else 4 * count) / devices
    return overlapped(chip, devices, 0.0, read + width * held, width * (held - count / devices))


def prefill_bound(model: GemmaConfig, chip: Chip, devices: int, tp: int, prompts: Sequence[int], *, width: int = 2) -> Bound:
    """Keys and values of prompts with these lengths; rows are sent to the MLP and back."""
    tokens = sum(prompts)
    flops = forward_flops(model, tokens, 0, sum(attention_products(model, 0, prompt) for prompt in prompts)) / devices
    kept = 2 * model.cache_width * tokens / devices
    memory = width * (attention_weights(model) + mlp_weights(model) / tp + kept)
    network = width * 2 * model.num_layers * received(tp) * tokens / (devices // tp) * model.embed_dim
    return overlapped(chip, tp, flops, memory, network)


def decode_step_bound(
    model: GemmaConfig, chip: Chip, devices: int, tp: int, rows: int, prompts: Sequence[int], own: int, *, width: int = 2
) -> Bound:
    """One token for each of `rows` rows, which have drawn `own` tokens before it; each prompt is read by as many of them.

    A chip reads the attention weights whole, a tp-th of the MLP and the vocabulary, and a prompt's keys and values once for its
    group. In each layer the rows of a `tp` group are gathered for the MLP and its outputs are scattered back; they are gathered
    once more for the vocabulary, and one last exchange picks the token. Nothing overlaps with these: the next product waits.
    """
    L, D = model.num_layers, model.embed_dim
    G = rows / len(prompts)
    products = sum(G * attention_products(model, prompt + own, prompt + own + 1) for prompt in prompts)
    flops = forward_flops(model, rows, rows, products)
    keys = sum(shared_keys(model, prompt, own) + G * own_keys(model, own) for prompt in prompts)
    weights = attention_weights(model) + (mlp_weights(model) + head_weights(model)) / tp
    memory = width * (weights + 2 * keys / devices)
    network = width * (2 * L + 1) * received(tp) * rows / (devices // tp) * D
    latency = (2 * L + 2) * (tp // 2) * chip.hop
    seconds = max(flops / devices / chip.flops, memory / chip.bandwidth) + chip.network(network, tp) + latency
    return Bound(flops / devices, memory, network, seconds)


def kv_width(kind: GemmaConfig) -> int:
    """Numbers of a token's keys in one layer, as many as of its values; layers that share read those of another."""
    return kind.num_kv_heads * kind.head_dim


def own_keys(model: GemmaConfig, own: int) -> int:
    """Numbers of the keys of a row's `own` earlier tokens that its next token attends to, summed over layers."""
    near = min(own, model.sliding_window - 1)
    kinds = model.kinds.values()
    return sum(kv_width(kind) * sum(near if local else own for local in kind.local_layers) for kind in kinds)


def shared_keys(model: GemmaConfig, prompt: int, own: int) -> int:
    """Numbers of the keys of its prompt that a row's next token attends to, after `own` tokens, summed over layers."""
    near = min(prompt, max(model.sliding_window - 1 - own, 0))
    kinds = model.kinds.values()
    return sum(kv_width(kind) * sum(near if local else prompt for local in kind.local_layers) for kind in kinds)


def decode_bound(
    model: GemmaConfig, chip: Chip, devices: int, tp: int, prompts: Sequence[int], lengths: Sequence[int], *, width: int = 2
) -> Bound:
    """Completions with these lengths B, question-major: one step for each token of the longest, with the rows still alive.

    The prompts of groups that have ended are not read, and the rows still alive count as spread evenly over the others.
    """
    G = len(lengths) // len(prompts)
    total = Bound()
    for own in range(max(lengths)):
        alive = [b for b, length in enumerate(lengths) if length > own]
        open_prompts = [prompts[q] for q in sorted({b // G for b in alive})]
        total += decode_step_bound(model, chip, devices, tp, len(alive), open_prompts, own, width=width)
    return total


def received(devices: int) -> float:
    """The share of an array, sharded over this many chips, that a chip must receive to hold all of it."""
    return (devices - 1) / devices
