"""Lower bounds on time: how fast each part of a step could run on a chip, from the model's dimensions alone. Plain Python.

Every bound is that of ONE chip, the work being cut evenly over `devices`, and is what the layout of sharding.py cannot avoid:

    flops          of the model only: two a weight and token, four a (query, key) pair, head and feature; for an update, three
                   times the forward pass. Nothing recomputed, no padding, no norms
    memory_bytes   weights and keys and values read, each once; what the optimizer reads and writes
    network_bytes  received from other chips: gathered weights and rows, scattered gradients

Work, memory and network overlap perfectly, so the slowest of the three decides. Two things wait their turn: the collectives
of a decode step, each of which the next product needs, and the optimizer, which needs the norm of the whole gradient. Left
out: activations, the random draw, the host.

Letters are those of gemma.py. `width` is bytes a number (2: bfloat16), `tp` the devices that share one copy of the MLP and
the vocabulary while sampling (sharding.ROLLOUT). Dividing a measured time into a bound gives MFU or MBU, whichever binds.
"""

from __future__ import annotations  # GemmaConfig is a name here only: this file loads without jax

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.gemma import GemmaConfig

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Nominal peaks of one chip; `dataclasses.replace` them by measured ones."""

    name: str
    flops: float  # bfloat16 a second, dense
    memory: float  # bytes that programs may use
    bandwidth: float  # bytes of memory a second
    link: float  # bytes a second one way over one link to another chip
    links: int  # of the chip with the fewest: a corner of a 2x4 slice has two
    hop: float = 1e-6  # seconds from chip to chip; 1 us is ideal, 2.5 us has been seen on v5e (scaling book, "Sharding")

    def network(self, received: float, devices: int) -> float:
        """Seconds for a chip in a ring of `devices` to receive so many bytes; two chips share a single link."""
        return received / (self.link * min(self.links, devices - 1)) if devices > 1 else 0.0


# v5e, v6e: cloud.google.com/tpu/docs/v5e and v6e; what of a link is usable, one way: jax-ml/scaling-book, tpus.md; memory: what
# the compiler grants. H100 SXM, H200: NVIDIA's data sheets, without sparsity; NVLink carries 900 GB/s both ways together.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 45e9, 2),
        Chip("v6e", 918e12, 31.25 * GIB, 1640e9, 90e9, 2),
        Chip("H100", 989e12, 80e9, 3.35e12, 450e9, 1),
        Chip("H200", 989e12, 141e9, 4.8e12, 450e9, 1),
    )
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, as in "NVIDIA H100 80GB HBM3"; None for a CPU or one without an entry."""
    kind = device_kind.replace("TPU v5 lite", "v5e").replace("TPU v6 lite", "v6e")
    return next((chip for name, chip in CHIPS.items() if name in kind), None)


@dataclass(frozen=True)
class Bound:
    """What one chip must at least do, and the seconds that takes; bounds of consecutive parts add up."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    network_bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Bound) -> Bound:
        return Bound(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def overlapped(chip: Chip, devices: int, flops: float, memory: float, network: float) -> Bound:
    """All three at once: the slowest decides."""
    seconds = max(flops / chip.flops, memory / chip.bandwidth, chip.network(network, devices))
    return Bound(flops, memory, network, seconds)


def attention_weights(model: GemmaConfig) -> int:
    """Entries of q, k, v and o, in all layers."""
    return 2 * model.num_layers * model.embed_dim * (model.num_heads + model.num_kv_heads) * model.head_dim


def mlp_weights(model: GemmaConfig) -> int:
    """Entries of gate, up and down, in all layers."""
    return 3 * model.num_layers * model.embed_dim * model.mlp_dim


def head_weights(model: GemmaConfig) -> int:
    """Entries of the embedding, which is also the head."""
    return model.vocab_size * model.embed_dim


def attention_pairs(model: GemmaConfig, start: int, stop: int) -> int:
    """(query, key) pairs of one sequence's queries at positions start, ..., stop - 1, summed over layers."""

    def seen(window: int) -> int:
        """sum of min(position + 1, window)"""
        full = min(max(window, start), stop)  # from here on, a whole window
        return (full * (full + 1) - start * (start + 1)) // 2 + (stop - full) * window

    return sum(seen(model.sliding_window if local else stop) for local in model.local_layers)


def forward_flops(model: GemmaConfig, body_tokens: int, head_tokens: int, pairs: int) -> float:
    """Of one forward pass, on all chips together; `pairs` is the sum of `attention_pairs` over sequences."""
    body = attention_weights(model) + mlp_weights(model)
    dense = 2 * (body * body_tokens + head_weights(model) * head_tokens)
    return dense + 4 * model.num_heads * model.head_dim * pairs


def group_pairs(model: GemmaConfig, prompts: Sequence[int], lengths: Sequence[int]) -> int:
    """`attention_pairs` of prompts Q, each computed once, and their completions B, question by question."""
    G = len(lengths) // len(prompts)
    completions = (attention_pairs(model, prompts[b // G], prompts[b // G] + length) for b, length in enumerate(lengths))
    return sum(attention_pairs(model, 0, prompt) for prompt in prompts) + sum(completions)


def forward_logprobs(
    model: GemmaConfig, chip: Chip, devices: int, body_tokens: int, head_tokens: int, pairs: int, *, width: int = 2
) -> Bound:
    """Log-probabilities of `head_tokens`: a layer's weights are gathered (FSDP), rows travel to the vocabulary."""
    body = attention_weights(model) + mlp_weights(model)
    flops = forward_flops(model, body_tokens, head_tokens, pairs) / devices
    memory = width * (body + head_weights(model) / devices)
    network = width * received(devices) * (body + head_tokens * model.embed_dim)
    return overlapped(chip, devices, flops, memory, network)


def update(
    model: GemmaConfig, chip: Chip, devices: int, body_tokens: int, head_tokens: int, pairs: int, *, width: int = 2,
    adapters: int = 0,
) -> Bound:  # fmt: skip
    """One optimizer update: forward and backward each gather and read the weights, the gradient is scattered once.

    Then AdamW reads and writes the float32 weights and both moments and reads the gradient. With LoRA gradient and optimizer
    are those of the `adapters`, so many numbers: of the weights' own products, two in three are left.
    """
    body = attention_weights(model) + mlp_weights(model)
    forward = forward_logprobs(model, chip, devices, body_tokens, head_tokens, pairs, width=width)
    flops = 3 * forward.flops
    if adapters:
        own = 2 * (body * body_tokens + head_weights(model) * head_tokens)  # in one forward pass; attention has no weight
        flops += (3 * 2 * adapters * body_tokens - own) / devices
    network = 2 * forward.network_bytes + width * received(devices) * (adapters or body)
    passes = overlapped(chip, devices, flops, 2 * forward.memory_bytes, network)
    state = 4 * (3 * 2 + 1) * (adapters or body + head_weights(model)) / devices
    return passes + Bound(memory_bytes=state, seconds=state / chip.bandwidth)


def sampling_params(model: GemmaConfig, chip: Chip, devices: int, tp: int, *, width: int = 2, adapters: int = 0) -> Bound:
    """Float32 weights (or a base and so many `adapters`), cast and laid out: attention whole, the rest cut over `tp`."""
    cut = mlp_weights(model) + head_weights(model)
    count = attention_weights(model) + cut
    view = attention_weights(model) + cut / tp
    read = (width * count + 4 * adapters if adapters else 4 * count) / devices
    return overlapped(chip, devices, 0.0, read + width * view, width * (view - count / devices))


def prefill(model: GemmaConfig, chip: Chip, devices: int, tp: int, prompts: Sequence[int], *, width: int = 2) -> Bound:
    """Keys and values of prompts of so many tokens; rows travel to the MLP and back."""
    tokens = sum(prompts)
    flops = forward_flops(model, tokens, 0, sum(attention_pairs(model, 0, prompt) for prompt in prompts)) / devices
    kept = 2 * model.num_layers * model.num_kv_heads * model.head_dim * tokens / devices
    memory = width * (attention_weights(model) + mlp_weights(model) / tp + kept)
    network = width * 2 * model.num_layers * received(tp) * tokens / (devices // tp) * model.embed_dim
    return overlapped(chip, tp, flops, memory, network)


def decode_step(
    model: GemmaConfig, chip: Chip, devices: int, tp: int, rows: int, prompts: Sequence[int], own: int, *, width: int = 2
) -> Bound:
    """One token for each of `rows`, which have sampled `own` tokens before it and share the keys of `prompts` evenly.

    Attention weights are read whole, the MLP and the vocabulary by their tp-th part, a prompt's keys and values once for its
    group. In each layer the rows of a `tp` group are gathered for the MLP and its outputs scattered back, then gathered once
    more for the vocabulary; one last exchange picks the token. Nothing hides these: the next product waits for them.
    """
    L, D, kv_width = model.num_layers, model.embed_dim, 2 * model.num_kv_heads * model.head_dim
    G = rows / len(prompts)
    pairs = sum(G * attention_pairs(model, prompt + own, prompt + own + 1) for prompt in prompts)
    flops = forward_flops(model, rows, rows, 0) + 4 * model.num_heads * model.head_dim * pairs
    keys = sum(shared_keys(model, prompt, own) + G * own_keys(model, own) for prompt in prompts)
    weights = attention_weights(model) + (mlp_weights(model) + head_weights(model)) / tp
    memory = width * (weights + kv_width * keys / devices)
    network = width * (2 * L + 1) * received(tp) * rows / (devices // tp) * D
    latency = (2 * L + 2) * (tp // 2) * chip.hop
    seconds = max(flops / devices / chip.flops, memory / chip.bandwidth) + chip.network(network, tp) + latency
    return Bound(flops / devices, memory, network, seconds)


def own_keys(model: GemmaConfig, own: int) -> int:
    """Keys among a row's own tokens that its next token reads (itself aside), summed over layers."""
    return sum(min(own, model.sliding_window - 1) if local else own for local in model.local_layers)


def shared_keys(model: GemmaConfig, prompt: int, own: int) -> int:
    """Keys of its prompt that a row's next token reads, after `own` tokens, summed over layers."""
    left = max(model.sliding_window - 1 - own, 0)
    return sum(min(prompt, left) if local else prompt for local in model.local_layers)


def decode(
    model: GemmaConfig, chip: Chip, devices: int, tp: int, prompts: Sequence[int], lengths: Sequence[int], *, width: int = 2
) -> Bound:
    """Completions of the given lengths B, question by question: a step for each token of the longest, of the rows still alive.

    The prompts of groups that have ended are no longer read; rows alive count as spread evenly over the others.
    """
    G = len(lengths) // len(prompts)
    total = Bound()
    for own in range(max(lengths)):
        alive = [b for b, length in enumerate(lengths) if length > own]
        open_prompts = [prompts[q] for q in sorted({b // G for b in alive})]
        total += decode_step(model, chip, devices, tp, len(alive), open_prompts, own, width=width)
    return total


def received(devices: int) -> float:
    """The part of an array, cut over so many chips, that a chip must receive to hold all of it."""
    return (devices - 1) / devices
