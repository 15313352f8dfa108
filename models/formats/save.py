"""Write a Hugging Face folder (safetensors, an index, config.json) from `Params`, or from anything that reads weights by leaf.

One tensor is in host memory at a time, however large the model is. The caller copies the tokenizer's files.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.formats.containers import INDEX, WHOLE, Settings, read_json
from models.formats.convert import ARCHITECTURES, Reader, layers_of, leaf_names, read_text_config
from models.formats.weight_names import array_shape, from_ours, hugging_face
from models.gemma import GemmaConfig, Params, kind_of, shapes


@dataclass(frozen=True)
class Tensor:
    """One tensor to be written. `make` computes its values when they are written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def tensors(config: GemmaConfig, read: Reader) -> list[Tensor]:
    """All tensors of the Hugging Face folder of the weights that `read` reads."""

    def tensor(leaf: str, letters: str, layer: int) -> Tensor:
        place, ours, kind = hugging_face(leaf, config).of(layer), letters.removeprefix("L"), config.kind(kind_of(leaf))
        whole = tuple(slice(0, size) for size in array_shape(ours, kind))
        make = lambda: from_ours(read(leaf, layer, whole), place, ours)  # noqa: E731
        return Tensor("model." + place.name, array_shape(place.letters, kind), make)

    names = leaf_names(config).items()
    return [tensor(leaf, letters, layer) for leaf, letters in names for layer in layers_of(leaf, config)]


def write_weights(folder: Path, tensors: list[Tensor], dtype: str, shard_bytes: int = 5 * 10**9) -> None:
    """Write `model.safetensors`, or with more than `shard_bytes` shards and their index."""
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor_bytes(tensor, dtype) > shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(tensor)
        size += tensor_bytes(tensor, dtype)
    if len(shards) == 1:
        return write_safetensors(folder / WHOLE, tensors, dtype)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, dtype)
    weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    total = {"total_size": sum(tensor_bytes(tensor, dtype) for tensor in tensors)}
    write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def tensor_bytes(tensor: Tensor, dtype: str) -> int:
    """The bytes of a tensor in a file."""
    return math.prod(tensor.shape) * jnp.dtype(dtype).itemsize


def write_safetensors(file: Path, tensors: list[Tensor], dtype: str) -> None:
    """Write the length of the header, a JSON header with the offsets of all tensors, and their bytes.

    Done by hand because the safetensors library wants all tensors in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers writes this mark and looks for it
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor_bytes(tensor, dtype)
        offsets = {"dtype": {"float32": "F32", "bfloat16": "BF16"}[dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        header[tensor.name] = offsets
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = tensor.make().astype(jnp.dtype(dtype))
            assert array.shape == tensor.shape, tensor
            opened.write(np.ascontiguousarray(array).view(np.uint8).data)


def write_json(path: Path, values: dict) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(values, indent=1) + "\n")


def save_params(folder: str | Path, params: Params, config: GemmaConfig, config_json: dict, dtype: str = "float32") -> None:
    """Write weights and `config.json` as a Hugging Face folder, in `dtype`."""
    assert jax.tree.map(lambda p: p.shape, params) == jax.tree.map(lambda s: s.shape, shapes(config))
    leaves = dict(zip(leaf_names(config), jax.tree.leaves(params), strict=True))

    def read(leaf: str, layer: int, _: Any) -> np.ndarray:
        return np.asarray(leaves[leaf][layers_of(leaf, config).index(layer)] if leaf.startswith("layers.") else leaves[leaf])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, tensors(config, read), dtype)
    write_json(folder / "config.json", config_json)


def text_config(path: Path) -> dict:
    """The values of a `config.json`; of a multimodal one those of the text model alone, whose weights alone are written."""
    given = Settings(path, read_json(path))
    if "text_config" not in given.values:
        return given.values
    kept = ("dtype", "torch_dtype", "transformers_version")
    outer = {key: x for key, x in given.values.items() if key in kept or (key.endswith("token_id") and "image" not in key)}
    read = read_text_config(given)
    architecture = next(name for name, kind in ARCHITECTURES.items() if kind == read["model_type"])
    named = {"architectures": [architecture], "model_type": read["model_type"], "tie_word_embeddings": True}
    return read | outer | given.values["text_config"] | named


def config_json(config: GemmaConfig, token_ids: dict[str, Any] | None = None) -> dict:
    """A `config.json` for a model that came without one, with the keys of transformers 4 and 5, and with `token_ids`."""
    family = config.family
    linear = {"rope_type": "linear", "factor": config.rope_factor} if config.rope_factor != 1 else {"rope_type": "default"}
    values = {
        "architectures": [["GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"][family - 1]],
        "model_type": ["gemma", "gemma2", "gemma3_text"][family - 1],
        "num_hidden_layers": config.num_layers, "hidden_size": config.embed_dim, "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": 32_768 if family == 3 else 8192, "tie_word_embeddings": True, "attention_bias": False,
        "rope_theta": config.rope_base, **(token_ids or {}),
    }  # fmt: skip
    if family == 1:
        return values | {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": linear | {"rope_theta": config.rope_base}}
    kinds = ["sliding_attention" if local else "full_attention" for local in config.local_layers]
    scalar = round(config.query_scale**-2, 6)
    values |= {
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar, "layer_types": kinds,
        "sliding_window": config.sliding_window, "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
    }  # fmt: skip
    if family == 2:
        return values | {"rope_parameters": linear | {"rope_theta": config.rope_base}}
    local = {"rope_type": "default", "rope_theta": config.rope_local_base}
    return values | {
        "rope_local_base_freq": config.rope_local_base, "rope_scaling": linear if config.rope_factor != 1 else None,
        "rope_parameters": {"full_attention": linear | {"rope_theta": config.rope_base}, "sliding_attention": local},
    }  # fmt: skip
