"""Load a checkpoint of Gemma 1, 2, 3 or 4, in any format that containers.py reads, as `GemmaConfig` and `Params` on a mesh.

weight_names.py maps the names of weights. Each device reads its own slices where the format allows it, so no whole array is in
host memory besides what the devices hold. Not supported: pickled checkpoints (`.bin`, `.pth`), which could run code.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from models import ModelError
from models.formats.containers import Container, Settings, is_tree, locate, open_container, read_json
from models.formats.weight_names import to_ours
from models.gemma import FAR, GemmaConfig, Params, axes, kind_of, leaf_name, leaf_shape
from models.presets import MODELS, TINY
from models.sharding import Rules, spec

FAMILIES = {  # by transformers' model_type
    "gemma": 1, "gemma2": 2, "gemma3": 3, "gemma3_text": 3, "gemma4": 4, "gemma4_text": 4, "gemma4_unified": 4,
    "gemma4_unified_text": 4,
}  # fmt: skip
ARCHITECTURES = {
    "GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3", "Gemma4ForCausalLM": "gemma4_text", "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4UnifiedForCausalLM": "gemma4_unified_text", "Gemma4UnifiedForConditionalGeneration": "gemma4_unified",
}  # fmt: skip
EMBEDDED = Path(__file__).parents[1] / "tiny" / "config.json"


def read_config(path: str | Path) -> GemmaConfig:
    """The dimensions of the model at `path`, from the `config.json` in it or next to it, or else from the preset that fits it.

    Raises ModelError.
    """
    found = locate(Path(path))
    if not is_tree(found) and found.suffix != ".gguf":
        return parse_config(found / "config.json")
    for beside in (found / "config.json", found.parent / "config.json"):
        if beside.is_file():
            return parse_config(beside)
    container = open_container(found)
    for config in MODELS.values():
        try:
            check_weights(container, config)
        except ModelError:
            continue
        return config
    raise ModelError(f"{found} fits none of {', '.join(MODELS)}; put the config.json of its Hugging Face twin next to it")


def parse_config(path: Path) -> GemmaConfig:
    """The dimensions in a `config.json`, as transformers reads it. Raises ModelError."""
    given = Settings(path, read_json(path))
    if given.values == read_json(EMBEDDED):  # transformers takes a second to start
        return TINY
    values = Settings(path, read_text_config(given))
    family = FAMILIES[values.values["model_type"]]
    check_features(values, family)
    heads, kv_heads, head_dim = (values.need(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads % kv_heads:
        raise ModelError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    layers = values.need("num_hidden_layers")
    local = local_layers(values) if family > 1 else (False,) * layers
    known = ("default", "linear", "proportional") if family == 4 else ("default", "linear")
    rope = rope_parameters(values, "full_attention", known)
    rope_local = rope_parameters(values, "sliding_attention", ("default",)) if any(local) else None
    query_scalar = {1: head_dim, 4: 1}.get(family) or values.need("query_pre_attn_scalar", float)
    return GemmaConfig(
        num_layers=layers,
        embed_dim=values.need("hidden_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=values.need("intermediate_size"),
        vocab_size=values.need("vocab_size"),
        query_scale=query_scalar**-0.5,
        local_layers=local,
        sliding_window=values.need("sliding_window") if any(local) else FAR,
        rope_base=rope.need("rope_theta", float),
        rope_local_base=rope_local.need("rope_theta", float) if rope_local else 1e4,
        rope_factor=rope_factor(rope),
        attn_softcap=values.get("attn_logit_softcapping", float) if family > 1 else None,
        final_softcap=values.get("final_logit_softcapping", float) if family > 1 else None,
        post_norms=family > 1,
        qk_norms=family > 2,
        norm_eps=values.need("rms_norm_eps", float),
        **(gemma4_fields(values, local, rope) if family == 4 else {}),
    )


def rope_factor(rope: Settings) -> float:
    """What positions are divided by. A factor of the type "default" has no meaning; "proportional" may lack one."""
    kind = rope.values["rope_type"]
    return 1.0 if kind == "default" else rope.need("factor", float) if kind == "linear" else rope.get("factor", float, 1.0)


def gemma4_fields(values: Settings, local: tuple[bool, ...], rope: Settings) -> dict[str, Any]:
    """The fields of `GemmaConfig` that only Gemma 4 has. Raises ModelError."""
    path, said = values.path, values.values
    if said.get("enable_moe_block"):
        raise ModelError(f"{path}: enable_moe_block is true; experts are not supported")
    shared, per_layer = (said.get(key) and values.need(key) for key in ("num_kv_shared_layers", "hidden_size_per_layer_input"))
    if per_layer and said["vocab_size_per_layer_input"] != said["vocab_size"]:
        raise ModelError(f"{path}: vocab_size_per_layer_input and vocab_size must be equal")
    if shared and not set(local[-shared:]) <= set(local[:-shared]):
        raise ModelError(f"{path}: num_kv_shared_layers {shared} leaves no layer of each type with keys and values of its own")
    sizes = {int(layer): Settings(path, one) for layer, one in said["per_layer_config"].items()}
    of_global = [sizes.pop(layer, Settings(path, {})) for layer, is_local in enumerate(local) if not is_local]
    if sizes or any(one.values != of_global[0].values for one in of_global):
        raise ModelError(f"{path}: per_layer_config must give all full_attention layers the same sizes, and no other layer any")
    if other := set(of_global[0].values) - {"head_dim", "num_key_value_heads"}:
        raise ModelError(f"{path}: {min(other)} in per_layer_config is not supported")
    return dict(
        norm_offset=0.0,
        global_head_dim=of_global[0].get("head_dim", int, said["head_dim"]),
        global_kv_heads=of_global[0].get("num_key_value_heads", int, 0),
        rope_fraction=rope.get("partial_rotary_factor", float, 1.0) if rope.values["rope_type"] == "proportional" else 1.0,
        values_are_keys=bool(said.get("attention_k_eq_v")),
        shared_layers=shared or 0,
        shared_mlp_dim=2 * said["intermediate_size"] if said.get("use_double_wide_mlp") else 0,
        per_layer_dim=per_layer or 0,
    )


def read_text_config(given: Settings) -> dict[str, Any]:
    """What transformers reads in a `config.json`, of the text model: one form for every dialect, with its defaults.

    Raises ModelError.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise to install torch
    from transformers import CONFIG_MAPPING

    text = given.part("text_config") if "text_config" in given.values else given
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size"):
        text.need(key)  # the defaults are those of some model
    text.get("sliding_window_pattern", int)  # transformers checks none of these
    text.part("rope_scaling")
    for kind in ("full_attention", "sliding_attention"):
        text.part("rope_parameters").part(kind)
    architecture = (given.get("architectures", list) or ["none"])[0]
    said = given.values.get("model_type") or ARCHITECTURES.get(str(architecture))
    if said not in list(FAMILIES):
        what = f"model_type {said}" if said else f"architecture {architecture}"
        known = FAMILIES if said else ARCHITECTURES
        raise ModelError(f"{given.path}: {what} is unknown; one of {', '.join(known)} is needed")
    try:
        config = CONFIG_MAPPING[said].from_dict(given.values)
        values = config.get_text_config().to_dict()
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"{given.path}: transformers cannot read it: {reason}") from None
    return values | {"tie_word_embeddings": config.tie_word_embeddings and values["tie_word_embeddings"]}


def check_features(values: Settings, family: int) -> None:
    """Raises ModelError for a model with features that we do not implement."""
    path, said = values.path, values.values
    activation = said.get("hidden_act" if family == 1 else "hidden_activation")
    if activation not in ("gelu_pytorch_tanh", "gelu_new"):  # two names of one function; "gelu" is another one
        raise ModelError(f"{path}: activation {activation} is unknown; gelu_pytorch_tanh is needed")
    if said.get("attention_bias") or said.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise ModelError(f"{path}: attention_bias and use_bidirectional_attention are not supported; both must be false")
    if not said["tie_word_embeddings"]:
        raise ModelError(f"{path}: tie_word_embeddings is false; a separate vocabulary head is not supported")


def local_layers(values: Settings) -> tuple[bool, ...]:
    """Which layers have a sliding window."""
    kinds = values.need("layer_types", list)
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ModelError(f"{values.path}: layer type {kind!r} must be sliding_attention or full_attention")
    return tuple(kind == "sliding_attention" for kind in kinds)


def rope_parameters(values: Settings, layers: str, known: tuple[str, ...]) -> Settings:
    """`rope_theta`, `rope_type` and `factor` of "full_attention" or "sliding_attention" layers. Raises ModelError."""
    rope = values.part("rope_parameters")
    rope = rope.part(layers) if layers in rope.values else rope
    kind = rope.values["rope_type"]
    if kind not in known:
        raise ModelError(f"{rope.path}: rope_type {kind} of {layers} is not supported; {' or '.join(known)} is needed")
    if rope.values.get("type", kind) != kind:
        raise ModelError(f'{rope.path}: transformers passes over "type": "{rope.values["type"]}" of RoPE; write "rope_type"')
    return rope


def leaf_names(config: GemmaConfig) -> dict[str, str]:
    """The letters of each leaf of our tree: {"embedding": "VD", "layers.q": "LDA", ...}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(axes(config))
    return {leaf_name(path): letters.upper() for path, letters in flat}


def layers_of(leaf: str, config: GemmaConfig) -> list[int]:
    """The numbers of the layers that are stacked in a leaf; a leaf that is not stacked counts as one layer."""
    return config.layers_of(kind_of(leaf)) if leaf.startswith("layers.") else [0]


def check_weights(container: Container, config: GemmaConfig) -> None:
    """Raises ModelError unless the container holds all weights of this model, and no others."""
    wanted = set()
    for leaf in leaf_names(config):
        place = container.place(leaf, config)
        for layer in layers_of(leaf, config):
            container.check(place.of(layer), config.kind(kind_of(leaf)))
            wanted.add(place.of(layer).name)
    for leaf in ("layers.k", "layers.v", "layers.k_norm"):  # a file may have them for sharing layers too, which need none
        wanted |= {container.place(leaf, config).of(layer).name for layer in range(config.own_layers, config.num_layers)}
    if container.head in container.names:
        wanted.add(container.head)
        check_equal(container, container.head, container.place("embedding", config).name)
    extra = sorted(name for name in set(container.names) - wanted if not container.ignored(name))
    if extra:
        raise ModelError(f"{container.path}: weight {extra[0]} has no place in this model ({len(extra)} such)")


def check_equal(container: Container, head: str, embedding: str) -> None:
    """Raises ModelError if a vocabulary head differs from the embedding: a Gemma has one matrix for both."""
    shape = container.shape(embedding)
    if container.shape(head) != shape or not same(shape, partial(container.read, head), partial(container.read, embedding)):
        raise ModelError(f"{container.path}: {head} differs from {embedding}; a separate vocabulary head is not supported")


def same(shape: tuple[int, ...], one: Callable[[tuple], np.ndarray], other: Callable[[tuple], np.ndarray]) -> bool:
    """Whether two readers of a matrix of this shape give the same; some rows at a time, because a vocabulary's is large."""
    rows, columns = shape
    pieces = ((slice(start, min(start + 2**14, rows)), slice(0, columns)) for start in range(0, rows, 2**14))
    return all(np.array_equal(one(piece), other(piece)) for piece in pieces)


def finite(weight: np.ndarray, path: Path, name: str) -> np.ndarray:
    """The weight. Raises ModelError if it holds NaN or an infinity."""
    if not np.isfinite(weight).all():
        raise ModelError(f"{path}: weight {name} holds NaN or an infinity; the file, or the training that wrote it, is broken")
    return weight


Keep = Callable[[str, jax.Array], jax.Array]  # (leaf, its array) -> what is kept of it
Reader = Callable[[str, int, Any], np.ndarray]  # (leaf, layer, index) -> the slice `index` of one layer's weight, in our layout


def open_weights(path: str | Path, config: GemmaConfig) -> Reader:
    """A reader of the weights at `path`; slices have the dtype in which they are stored. Raises ModelError."""
    container = open_container(Path(path))
    check_weights(container, config)
    letters = leaf_names(config)
    places = {leaf: container.place(leaf, config) for leaf in letters}

    def read(leaf: str, layer: int, index: Any) -> np.ndarray:
        place, ours = places[leaf].of(layer), letters[leaf].removeprefix("L")
        return to_ours(lambda at: finite(container.read(place.name, at), container.path, place.name), place, ours, index)

    return read


def as_it_is(leaf: str, array: jax.Array) -> jax.Array:
    return array


def load_params(
    path: str | Path, config: GemmaConfig, mesh: Mesh, rules: Rules, dtype: str = "float32", keep: Keep = as_it_is
) -> Params:
    """The weights at `path`, sharded over `mesh` by `rules` and cast to `dtype`; see `load_leaves`. Raises ModelError."""
    return place_params(open_weights(path, config), config, mesh, rules, dtype, keep)


def place_params(read: Reader, config: GemmaConfig, mesh: Mesh, rules: Rules, dtype: str, keep: Keep = as_it_is) -> Params:
    """The weights that `read` reads, sharded over `mesh` by `rules` and cast to `dtype`; each device reads its own slices."""

    def load(leaf: str, letters: str) -> jax.Array:
        shape, layers = leaf_shape(leaf, letters, config), layers_of(leaf, config)

        def slice_of(index: Any) -> np.ndarray:
            index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
            if letters[0] != "L":
                return read(leaf, 0, index).astype(dtype)
            stacked = np.empty([part.stop - part.start for part in index], jnp.dtype(dtype))
            for i, layer in enumerate(layers[index[0]]):
                stacked[i] = read(leaf, layer, index[1:])
            return stacked

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec(letters, rules)), slice_of)

    return load_leaves(load, config, keep)


def load_leaves(load: Callable[[str, str], jax.Array], config: GemmaConfig, keep: Keep) -> Params:
    """The tree of `load(leaf, letters)`, of which `keep(leaf, array)` is kept. The largest leaf comes first: if `keep` narrows,
    the wide form of one leaf at a time is in memory, and that of the largest while no other is there."""
    leaves, tree = jax.tree.flatten(axes(config))
    letters = dict(zip(leaf_names(config), leaves, strict=True))
    sizes = {leaf: math.prod(leaf_shape(leaf, letters[leaf], config)) for leaf in letters}
    kept = {leaf: keep(leaf, load(leaf, letters[leaf])) for leaf in sorted(letters, key=sizes.__getitem__, reverse=True)}
    return jax.tree.unflatten(tree, [kept[leaf] for leaf in letters])
