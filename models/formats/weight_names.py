"""One table of all weights: their names in our tree and in Hugging Face, GGUF and Flax, and their axes in each format.

Axes are letters as in gemma.py, and they define every conversion: our `DA` is Hugging Face's `AD` transposed, and Flax's `NDH`
has the heads as an axis of their own, in front (A = N*H, E = K*H). A digit is an axis of that many matrices in one array, of
which the weight is the `part`-th. A norm scale w multiplies by 1 + w, in Gemma 4 by w; GGUF stores what it multiplies by, all
others store w. Names are those of one layer, whose number replaces {}; our leaves are stacked on L.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.gemma import GemmaConfig

# fmt: off
#    ours                    Hugging Face, after "model."                    GGUF                                    axes
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
    "layers.layer_gate":    ("layers.{}.per_layer_input_gate",              "blk.{}.inp_gate",                       "UD"),
    "layers.layer_out":     ("layers.{}.per_layer_projection",              "blk.{}.proj",                           "DU"),
    "layers.post_layer_norm":("layers.{}.post_per_layer_input_norm",        "blk.{}.post_norm",                      "D"),
    "layers.scale":         ("layers.{}.layer_scalar",                      "blk.{}.layer_output_scale",             "1"),
    "final_norm":           ("norm",                                        "output_norm",                           "D"),
    "per_layer.table":      ("embed_tokens_per_layer",                      "per_layer_token_embd",                  "VZ"),
    "per_layer.projection": ("per_layer_model_projection",                  "per_layer_model_proj",                  "ZD"),
    "per_layer.norm":       ("per_layer_projection_norm",                   "per_layer_proj_norm",                   "U"),
}
GEMMA1_PRE_MLP_NORM = "layers.{}.post_attention_layernorm"  # Hugging Face's name in a model with two norms per layer

# Flax has several forms; the names and shapes in a file decide which one it has. The first is that of Google's checkpoints of
# Gemma 1 and 2. Gemma 3 has gate and up transposed, models with as many key as query heads have q, k and v in one array, and
# Tunix has gate and up in separate arrays. Names are without their last part ("w", "scale", "kernel"), which some writers omit.
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

HEADS = {"A": "NH", "E": "KH"}  # the axes that a joined axis consists of


@dataclass(frozen=True)
class Place:
    """Where a checkpoint stores a weight."""

    name: str  # of the array; {} stands for the layer
    letters: str  # the array's axes
    part: int = 0  # which of its matrices, in an array of several
    offset: float = 0.0  # stored value minus our value

    def of(self, layer: int) -> "Place":
        """The place in one layer."""
        return replace(self, name=self.name.format(layer))


def without_kind(leaf: str) -> str:
    """The leaf's name in the tables: "layers.q" for "layers.local.q"."""
    parts = leaf.split(".")
    return f"{parts[0]}.{parts[-1]}" if len(parts) == 3 else leaf


def hugging_face(leaf: str, config: GemmaConfig) -> Place:
    """Where a Hugging Face folder stores a leaf of our tree, such as "layers.q"; the name is without its "model."."""
    leaf = without_kind(leaf)
    name, _, letters = TABLE[leaf]
    if leaf == "layers.pre_mlp_norm" and not config.post_norms:
        name = GEMMA1_PRE_MLP_NORM
    return Place(name if leaf == "layers.scale" else name + ".weight", letters)


def gguf(leaf: str, config: GemmaConfig) -> Place:
    """Where a GGUF file stores a leaf of our tree."""
    _, name, letters = TABLE[without_kind(leaf)]
    return Place(name + ".weight", letters, offset=config.norm_offset if "norm" in leaf else 0.0)


def flax(leaf: str) -> list[Place]:
    """Where a Flax tree may store a leaf of our tree."""
    return [Place(*form) for form in FLAX[without_kind(leaf)]]


def array_shape(letters: str, config: GemmaConfig, rank: int = 0) -> tuple[int, ...]:
    """The shape of an array with these axes. `rank` is the size of J, in adapters."""
    sizes = config.sizes | {"N": config.num_heads, "K": config.num_kv_heads, "J": rank}
    return tuple(int(letter) if letter.isdecimal() else sizes[letter] for letter in letters)


def to_ours(read: Callable[[tuple], np.ndarray], place: Place, ours: str, index: Sequence[slice]) -> np.ndarray:
    """The slice `index` of one layer's weight, whose axes are `ours`. `read` returns a slice of the array at `place`."""
    wanted = dict(zip(ours, index, strict=True))
    array = read(tuple(place.part if c.isdecimal() else wanted.get(c, slice(None)) for c in place.letters))
    theirs = [c for c in place.letters if not c.isdecimal()]
    sizes = dict(zip(theirs, array.shape, strict=True))
    parts = [c if c in sizes else HEADS[c] for c in ours]  # for each of our axes, the stored axes that it consists of
    array = array.transpose([theirs.index(c) for c in "".join(parts)])
    array = array.reshape([int(np.prod([sizes[c] for c in part])) for part in parts])
    array = array[tuple(slice(None) if c in sizes else wanted[c] for c in ours)]  # axes that were split are read whole
    return array - np.asarray(place.offset, array.dtype) if place.offset else array


def from_ours(array: np.ndarray, place: Place, ours: str) -> np.ndarray:
    """One layer's weight as Hugging Face stores it, which has the same axes in another order, or one number as an array."""
    if not ours:
        return array.reshape(1)
    return np.ascontiguousarray(array.transpose([ours.index(c) for c in place.letters]))
