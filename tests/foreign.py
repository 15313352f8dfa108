"""Checkpoints as others publish them, written from a Hugging Face folder by hand: what the readers are tested on.

Layouts: Google's Flax trees of Gemma on Kaggle, what Tunix saves, llama.cpp's GGUF. Nothing here uses our table of names.
"""

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file

PADDING = 128  # rows that Gemma 1 and 2 have below their vocabulary


def hugging_face(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and the tensors, without "model."."""
    tensors = {name.removeprefix("model."): array for name, array in load_file(folder / "model.safetensors").items()}
    return json.loads((folder / "config.json").read_text()), tensors


def flax_modules(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Module -> its arrays, in the shapes of google/gemma, gemma-2 and gemma-3 `/flax` on Kaggle."""
    config, hf = hugging_face(folder)
    N, K, H, D = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"))
    family = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}[config["model_type"]]
    embedding = hf["embed_tokens.weight"]
    if family < 3:
        embedding = np.concatenate([embedding, np.full((PADDING, D), 7.0, embedding.dtype)])
    modules = {"embedder": {"input_embedding": embedding}, "final_norm": {"scale": hf["norm.weight"]}}
    for i in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"layers.{i}."): array for name, array in hf.items() if name.startswith(f"layers.{i}.")}

        def heads(name: str, count: int, layer=layer) -> np.ndarray:  # (count*H, D) -> (count, D, H)
            return layer[f"self_attn.{name}_proj.weight"].reshape(count, H, D).transpose(0, 2, 1)

        q, k, v = heads("q", N), heads("k", K), heads("v", K)
        attention = {"attn_vec_einsum": {"w": layer["self_attn.o_proj.weight"].reshape(D, N, H).transpose(1, 2, 0)}}
        if N == K:
            attention["qkv_einsum"] = {"w": np.stack([q, k, v])}
        else:
            attention |= {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack([k, v])}}
        if family == 3:
            attention |= {f"_{n}_norm": {"scale": layer[f"self_attn.{n[0]}_norm.weight"]} for n in ("query", "key")}
        gating = np.stack([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]])  # (2, F, D)
        norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
        if family > 1:
            norms |= {
                "post_attention_norm": "post_attention_layernorm",
                "pre_ffw_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            }
        modules |= {f"layer_{i}/attn/{name}": leaf for name, leaf in attention.items()}
        modules |= {f"layer_{i}/{ours}": {"scale": layer[f"{theirs}.weight"]} for ours, theirs in norms.items()}
        modules[f"layer_{i}/mlp/gating_einsum"] = {"w": gating if family == 3 else gating.transpose(0, 2, 1)}
        modules[f"layer_{i}/mlp/linear"] = {"w": layer["mlp.down_proj.weight"].T}
    return modules


def nested(modules: dict[str, dict]) -> dict:
    """{"layer_0/attn/q_einsum": {...}} -> {"layer_0": {"attn": {"q_einsum": {...}}}}"""
    tree: dict = {}
    for name, leaf in modules.items():
        node = tree
        for part in name.split("/"):
            node = node.setdefault(part, {})
        node.update(leaf)
    return tree


def write_tree(path: Path, tree: dict, ocdbt: bool = True) -> None:
    ocp.PyTreeCheckpointer(use_ocdbt=ocdbt).save(path.absolute(), tree)


def write_flax(path: Path, folder: Path, form: str = "flat", dtype=None) -> None:
    """`flat` as on Kaggle, `nested`, `bare` (nested, without the "w" of the MLP), `directories` (flat, before OCDBT)."""
    modules = flax_modules(folder)
    if dtype is not None:
        modules = {name: {key: x.astype(dtype) for key, x in leaf.items()} for name, leaf in modules.items()}
    if form in ("flat", "directories"):
        return write_tree(path, {f"transformer/{name}": leaf for name, leaf in modules.items()}, ocdbt=form == "flat")
    tree = nested(modules)
    if form == "bare":
        for name in [name for name in tree if name.startswith("layer_")]:
            tree[name]["mlp"] = {key: leaf["w"] for key, leaf in tree[name]["mlp"].items()}
    write_tree(path, {"transformer": tree} if form == "nested" else {"params": tree})


def tunix_adapters(config: dict, rank: int, value: bool = True, seed: int = 0) -> dict:
    """Random adapters as Tunix saves them with qwix's names, from the values of a config.json; older ones end in `value`."""
    random = np.random.default_rng(seed)
    N, K, H, D, F = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size")
    )

    def normal(*shape: int):
        array = random.normal(size=shape).astype(np.float32) * 0.1
        return {"value": array} if value else array

    def pair(name: str, a: tuple, b: tuple) -> dict:
        return {f"{name}_lora_a": normal(*a), f"{name}_lora_b": normal(*b)}

    def layer() -> dict:
        attn = {
            "q_einsum": pair("w", (D, rank), (rank, N, H)),
            "kv_einsum": pair("w", (D, rank), (rank, 2, K, H)),
            "attn_vec_einsum": pair("w", (N, H, rank), (rank, D)),
        }
        mlp = {name: pair("kernel", (D, rank), (rank, F)) for name in ("gate_proj", "up_proj")}
        return {"attn": attn, "mlp": mlp | {"down_proj": pair("kernel", (F, rank), (rank, D))}}

    return {"layers": {str(i): layer() for i in range(config["num_hidden_layers"])}}


def tunix_merged(config: dict, hf: dict[str, np.ndarray], tree: dict, scale: float) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder with those adapters added, by hand."""
    out = dict(hf)
    D = config["hidden_size"]
    for i, layer in tree["layers"].items():

        def delta(group: str, module: str, key: str, layer=layer) -> np.ndarray:
            a, b = (layer[group][module][f"{key}_lora_{side}"] for side in "ab")
            a, b = (x["value"] if isinstance(x, dict) else x for x in (a, b))
            return scale * np.tensordot(a, b, 1).astype(np.float32)

        kv = delta("attn", "kv_einsum", "w")  # (D, 2, K, H)
        deltas = {
            "self_attn.q_proj": delta("attn", "q_einsum", "w").reshape(D, -1),
            "self_attn.k_proj": kv[:, 0].reshape(D, -1),
            "self_attn.v_proj": kv[:, 1].reshape(D, -1),
            "self_attn.o_proj": delta("attn", "attn_vec_einsum", "w").reshape(-1, D),
            **{f"mlp.{name}": delta("mlp", name, "kernel") for name in ("gate_proj", "up_proj", "down_proj")},
        }
        for name, change in deltas.items():
            out[f"layers.{i}.{name}.weight"] = out[f"layers.{i}.{name}.weight"] + change.T
    return out


def write_gguf(path: Path, folder: Path, kind: str = "F32") -> None:
    """A file as llama.cpp's convert_hf_to_gguf.py makes it of a Hugging Face folder, matrices stored as `kind`."""
    import gguf

    config, hf = hugging_face(folder)
    family = config["model_type"].removesuffix("_text")
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], layers)
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(layers)
    writer.add_embedding_length(config["hidden_size"])
    for name, array in hf.items():
        name = "output" if name == "lm_head.weight" else names.get_name(f"model.{name.removesuffix('.weight')}")
        if array.ndim == 1:  # llama.cpp's norms carry the 1
            writer.add_tensor(f"{name}.weight", array.astype(np.float32) + (family != "gemma4"))
        else:
            dtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(array.astype(np.float32), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
