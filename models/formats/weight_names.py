"""One table of every weight: our name for it, Hugging Face's, GGUF's and Flax's, and the order of its axes in each.

Axes are letters as in gemma.py, so nothing but letters says what is turned, cut or joined on the way: ours is `DA`, Hugging
Face's `AD` is its transpose, and Flax's `NDH` has the heads apart and first (A = N*H, E = K*H). A digit is an axis of that many
matrices in one array, of which a weight is the `part`-th. Norm scales lack their 1 everywhere but in GGUF, which stores 1 + w.
The layers' names are those of one layer, {}; ours are stacked on L.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.gemma import GemmaConfig

# fmt: off
#    ours                    Hugging Face, after "model."                    GGUF                                    both
TABLE = {
    "embedding":            ("embed_tokens",                                "token_embd",                            "VD"),
    "layers.pre_attn_norm": ("layers.{}.input_layernorm",                   "blk.{}.attn_norm",                      "D"),
    "layers.q":             ("layers.{}.self_attn.q_proj",                  "blk.{}.attn_q",                         "AD"),
    "layers.k":             ("layers.{}.self_attn.k_proj",                  "blk.{}.attn_k",                         "ED"),
    "layers.v":             ("layers.{}.self_attn.v_proj",                  "blk.{}.attn_v",                         "ED"),
    "layers.o":             ("layers.{}.self_attn.o_proj",                  "blk.{}.attn_output",                    "DA"),
    "layers.q_norm":        ("layers.{}.self_attn.q_norm",                  "blk.{}.attn_q_norm",                    "H"),
    "layers.k_norm":        ("layers.{}.self_attn.k_norm",                  "blk.{}.attn_k_norm",                    "H"),
    "layers.post_attn_norm":("layers.{}.post_attention_layernorm",          "blk.{}.post_attention_norm",            "D"),
    "layers.pre_mlp_norm":  ("layers.{}.pre_feedforward_layernorm",         "blk.{}.ffn_norm",                       "D"),
    "layers.gate":          ("layers.{}.mlp.gate_proj",                     "blk.{}.ffn_gate",                       "FD"),
    "layers.up":            ("layers.{}.mlp.up_proj",                       "blk.{}.ffn_up",                         "FD"),
    "layers.down":          ("layers.{}.mlp.down_proj",                     "blk.{}.ffn_down",                       "DF"),
    "layers.post_mlp_norm": ("layers.{}.post_feedforward_layernorm",        "blk.{}.post_ffw_norm",                  "D"),
    "final_norm":           ("norm",                                        "output_norm",                           "D"),
}
GEMMA1_PRE_MLP_NORM = "layers.{}.post_attention_layernorm"  # Hugging Face's name where there are but two norms

# Flax's forms of it, which the names and shapes that are there decide between. The first is that of Google's checkpoints of
# Gemma 1 and 2; Gemma 3 has gate and up turned, models with as many key as query heads have q, k and v in one, and Tunix has
# gate and up apart. A name lacks its last part ("w", "scale", "kernel"), which some writers leave out.
FLAX = {
    "embedding":            [("embedder/input_embedding", "VD")],
    "layers.pre_attn_norm": [("layer_{}/pre_attention_norm", "D")],
    "layers.q":             [("layer_{}/attn/q_einsum", "NDH"), ("layer_{}/attn/qkv_einsum", "3NDH", 0)],
    "layers.k":             [("layer_{}/attn/kv_einsum", "2KDH", 0), ("layer_{}/attn/qkv_einsum", "3KDH", 1)],
    "layers.v":             [("layer_{}/attn/kv_einsum", "2KDH", 1), ("layer_{}/attn/qkv_einsum", "3KDH", 2)],
    "layers.o":             [("layer_{}/attn/attn_vec_einsum", "NHD")],
    "layers.q_norm":        [("layer_{}/attn/_query_norm", "H")],
    "layers.k_norm":        [("layer_{}/attn/_key_norm", "H")],
    "layers.post_attn_norm":[("layer_{}/post_attention_norm", "D"), ("layer_{}/post_attn_norm", "D")],
    "layers.pre_mlp_norm":  [("layer_{}/pre_ffw_norm", "D")],
    "layers.gate":          [("layer_{}/mlp/gating_einsum", "2DF", 0), ("layer_{}/mlp/gating_einsum", "2FD", 0),
                             ("layer_{}/mlp/gate_proj", "DF")],
    "layers.up":            [("layer_{}/mlp/gating_einsum", "2DF", 1), ("layer_{}/mlp/gating_einsum", "2FD", 1),
                             ("layer_{}/mlp/up_proj", "DF")],
    "layers.down":          [("layer_{}/mlp/linear", "FD"), ("layer_{}/mlp/down_proj", "FD")],
    "layers.post_mlp_norm": [("layer_{}/post_ffw_norm", "D")],
    "final_norm":           [("final_norm", "D")],
}
# fmt: on

HEADS = {"A": "NH", "E": "KH"}  # what the joined axes are made of


@dataclass(frozen=True)
class Place:
    """Where a weight lies in a container."""

    name: str  # of the array; {} is the layer
    letters: str  # the array's axes
    part: int = 0  # which of its matrices, where it holds several
    offset: float = 0.0  # what the stored values are larger by

    def of(self, layer: int) -> "Place":
        return replace(self, name=self.name.format(layer))


def hugging_face(leaf: str, config: GemmaConfig) -> Place:
    name, _, letters = TABLE[leaf]
    if leaf == "layers.pre_mlp_norm" and not config.post_norms:
        name = GEMMA1_PRE_MLP_NORM
    return Place(name + ".weight", letters)


def gguf(leaf: str) -> Place:
    _, name, letters = TABLE[leaf]
    return Place(name + ".weight", letters, offset=1.0 if "norm" in leaf else 0.0)


def flax(leaf: str) -> list[Place]:
    return [Place(*form) for form in FLAX[leaf]]


def shape(letters: str, config: GemmaConfig, **sizes: int) -> tuple[int, ...]:
    """Of an array with these axes; `sizes` are those of letters that no weight has."""
    sizes |= config.sizes | {"N": config.num_heads, "K": config.num_kv_heads}
    return tuple(int(letter) if letter.isdecimal() else sizes[letter] for letter in letters)


def to_ours(read: Callable[[tuple], np.ndarray], place: Place, ours: str, index: Sequence[slice]) -> np.ndarray:
    """A slice of one layer's weight, axes `ours`, as `index` cuts them. `read` gives a slice of the array at `place`."""
    wanted = dict(zip(ours, index, strict=True))
    array = read(tuple(place.part if c.isdecimal() else wanted.get(c, slice(None)) for c in place.letters))
    there = [c for c in place.letters if not c.isdecimal()]
    sizes = dict(zip(there, array.shape, strict=True))
    parts = [c if c in sizes else HEADS[c] for c in ours]  # each of our axes as what it is made of there
    array = array.transpose([there.index(c) for c in "".join(parts)])
    array = array.reshape([int(np.prod([sizes[c] for c in part])) for part in parts])
    array = array[tuple(slice(None) if c in sizes else wanted[c] for c in ours)]  # joined axes were read whole
    return array - np.asarray(place.offset, array.dtype) if place.offset else array


def from_ours(array: np.ndarray, place: Place, ours: str) -> np.ndarray:
    """One layer's weight as Hugging Face stores it: the same axes, perhaps in another order."""
    return np.ascontiguousarray(array.transpose([ours.index(c) for c in place.letters]))
