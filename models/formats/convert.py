"""Load a checkpoint of Gemma 1, 2 or 3, in any format that containers.py reads, as `GemmaConfig` and `Params` on a mesh.

weight_names.py maps the names of weights. Each device reads its own slices where the format allows it, so no whole array is in
host memory besides what the devices hold. Not supported: pickled checkpoints (`.bin`, `.pth`), which could run code.
"""

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
from models.presets import MODELS
from models.sharding import Rules, spec

FAMILIES = {
    "GemmaForCausalLM": 1, "Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 3, "Gemma3ForConditionalGeneration": 3,
}  # fmt: skip

# The defaults of transformers for keys that a config.json may lack. The first multimodal ones hold little besides sizes.
DEFAULTS = {
    1: {},
    2: {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    3: dict(vocab_size=262_208, num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256),
}


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
    """Read a `config.json` with the keys of transformers 4 (`rope_theta`, ...) or 5 (`rope_parameters`). Raises ModelError."""
    raw = read_json(path)
    if str(raw.get("model_type")).startswith("gemma4"):
        from transformers import CONFIG_MAPPING

        return parse_gemma4(Settings(path, CONFIG_MAPPING[raw["model_type"]].from_dict(raw).get_text_config().to_dict()))
    values, family = read_settings(path)
    check_features(values)
    heads, kv_heads, head_dim = (values.need(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads % kv_heads:
        raise ModelError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ModelError(f"{path}: head_dim {head_dim} must be even")  # RoPE rotates pairs
    layers = values.need("num_hidden_layers")
    local = local_layers(values, layers, family)
    rope, rope_local = rope_parameters(values, family, any(local))
    query_scalar = head_dim if family == 1 else values.need("query_pre_attn_scalar", float)
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
        rope_base=rope.get("rope_theta", float, 1e6 if family == 3 else 1e4),
        rope_local_base=rope_local.get("rope_theta", float, 1e4),
        rope_factor=rope.get("factor", float, 1.0) if rope_type(rope) == "linear" else 1.0,
        attn_softcap=values.get("attn_logit_softcapping", float) if family > 1 else None,
        final_softcap=values.get("final_logit_softcapping", float) if family > 1 else None,
        post_norms=family > 1,
        qk_norms=family == 3,
        norm_eps=values.get("rms_norm_eps", float, 1e-6),
    )


def parse_gemma4(values: Settings) -> GemmaConfig:
    """The dimensions of a Gemma 4, from its `config.json` as transformers reads it. Raises ModelError."""
    path, said, layers = values.path, values.values, values.need("num_hidden_layers")
    if said.get("enable_moe_block"):
        raise ModelError(f"{path}: enable_moe_block is true; experts are not supported")
    if said.get("vocab_size_per_layer_input", said["vocab_size"]) != said["vocab_size"]:
        raise ModelError(f"{path}: vocab_size_per_layer_input and vocab_size must be equal")
    local = tuple(kind == "sliding_attention" for kind in values.need("layer_types", list))
    of_layer = {int(layer): sizes for layer, sizes in values.part("per_layer_config").values.items()}
    of_global = [of_layer.get(layer, {}) for layer in range(layers) if not local[layer]]
    unlike = [layer for layer in of_layer if local[layer] or of_layer[layer] != of_global[0]]
    if unlike or set(of_global[0]) - {"head_dim", "num_key_value_heads"}:
        raise ModelError(f"{path}: per_layer_config must give all global layers the same head_dim and num_key_value_heads")
    shared, per_layer = (said.get(key) and values.need(key) for key in ("num_kv_shared_layers", "hidden_size_per_layer_input"))
    rope = values.part("rope_parameters")
    if shared and not set(local[-shared:]) <= set(local[:-shared]):
        raise ModelError(f"{path}: num_kv_shared_layers {shared} leaves no layer of each type with keys and values of its own")
    turned, turned_local = rope.part("full_attention"), rope.part("sliding_attention")
    check_rope_type(turned, "global", ("default", "linear", "proportional"))
    check_rope_type(turned_local, "local", ("default",))
    width, kv_heads = values.need("intermediate_size"), values.need("num_key_value_heads")
    return GemmaConfig(
        num_layers=layers,
        embed_dim=values.need("hidden_size"),
        num_heads=values.need("num_attention_heads"),
        num_kv_heads=kv_heads,
        head_dim=values.need("head_dim"),
        mlp_dim=width,
        vocab_size=values.need("vocab_size"),
        query_scale=1.0,
        local_layers=local,
        sliding_window=values.need("sliding_window"),
        rope_base=turned.need("rope_theta", float),
        rope_local_base=turned_local.need("rope_theta", float),
        rope_factor=turned.get("factor", float, 1.0),
        final_softcap=values.get("final_logit_softcapping", float),
        post_norms=True,
        qk_norms=True,
        norm_eps=values.need("rms_norm_eps", float),
        norm_offset=0.0,
        global_head_dim=of_global[0].get("head_dim", said["head_dim"]),
        global_kv_heads=of_global[0].get("num_key_value_heads", kv_heads),
        rope_fraction=turned.get("partial_rotary_factor", float, 1.0) if rope_type(turned) == "proportional" else 1.0,
        values_are_keys=bool(said.get("attention_k_eq_v")),
        shared_layers=shared or 0,
        shared_mlp_dim=width * 2 if said.get("use_double_wide_mlp") else width,
        per_layer_dim=per_layer or 0,
    )


def read_settings(path: Path) -> tuple[Settings, int]:
    """The values of a `config.json`, its family's defaults below them, a multimodal model's text part above; and the family."""
    given = Settings(path, read_json(path))
    architecture = (given.get("architectures", list) or ["none"])[0]
    if architecture not in list(FAMILIES):
        raise ModelError(f"{path}: architecture {architecture} is unknown; one of {', '.join(FAMILIES)} is needed")
    family = FAMILIES[architecture]
    return Settings(path, DEFAULTS[family]) | given | given.part("text_config"), family


def check_features(values: Settings) -> None:
    """Raises ModelError for a model with features that we do not implement."""
    path, said = values.path, values.values
    activation = said.get("hidden_activation") or said.get("hidden_act") or "gelu_pytorch_tanh"
    if activation not in ("gelu", "gelu_pytorch_tanh"):  # in a Gemma config "gelu" always means the tanh approximation
        raise ModelError(f"{path}: activation {activation} is unknown; gelu_pytorch_tanh is needed")
    if said.get("attention_bias") or said.get("use_bidirectional_attention"):
        raise ModelError(f"{path}: attention_bias and use_bidirectional_attention are not supported; both must be false")
    if said.get("tie_word_embeddings") is False:
        raise ModelError(f"{path}: tie_word_embeddings is false; a separate vocabulary head is not supported")


def local_layers(values: Settings, layers: int, family: int) -> tuple[bool, ...]:
    """Which layers have a sliding window: none in Gemma 1, every other one in 2 from the first on, five of six in 3."""
    if family == 1:
        return (False,) * layers
    if kinds := values.get("layer_types", list):
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                raise ModelError(f"{values.path}: layer type {kind!r} must be sliding_attention or full_attention")
        if len(kinds) != layers:
            raise ModelError(f"{values.path}: layer_types names {len(kinds)} layers, num_hidden_layers says {layers}")
        return tuple(kind == "sliding_attention" for kind in kinds)
    pattern = values.get("sliding_window_pattern", int) or values.get("_sliding_window_pattern", int, 6)
    return tuple((i + 1) % (2 if family == 2 else pattern) != 0 for i in range(layers))


def rope_parameters(values: Settings, family: int, has_local: bool) -> tuple[Settings, Settings]:
    """`rope_theta`, `rope_type` and `factor`, as far as given, of global and of local layers. Raises ModelError."""
    given, scaling = values.part("rope_parameters"), values.part("rope_scaling")
    if scaling.values:  # older ones say "type"
        scaling |= Settings(values.path, {"rope_type": rope_type(scaling)})
    rope = Settings(values.path, {"rope_theta": values.get("rope_theta", float)}) | scaling
    rope_local = Settings(values.path, {"rope_theta": values.get("rope_local_base_freq", float)})
    if family < 3:
        rope = rope_local = Settings(values.path, {"rope_theta": values.get("rope_theta", float)}) | given | scaling
    else:
        rope, rope_local = rope | given.part("full_attention"), rope_local | given.part("sliding_attention")
    check_rope_type(rope, "global", ("default", "linear"))
    if has_local:
        check_rope_type(rope_local, "local", ("default",))
    return rope, rope_local


def check_rope_type(rope: Settings, kind: str, known: tuple[str, ...]) -> None:
    """Raises ModelError for a RoPE that we do not implement in layers of this kind."""
    if rope_type(rope) not in known:
        raise ModelError(
            f"{rope.path}: rope_type {rope_type(rope)} of {kind} layers is unknown; {' or '.join(known)} is needed"
        )


def rope_type(rope: Settings) -> str:
    return str(rope.values.get("rope_type") or rope.values.get("type") or "default")


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


def load_params(path: str | Path, config: GemmaConfig, mesh: Mesh, rules: Rules, dtype: str = "float32") -> Params:
    """The weights at `path`, sharded over `mesh` by `rules` and cast to `dtype`. Raises ModelError."""
    return place_params(open_weights(path, config), config, mesh, rules, dtype)


def place_params(read: Reader, config: GemmaConfig, mesh: Mesh, rules: Rules, dtype: str) -> Params:
    """The weights that `read` reads, sharded over `mesh` by `rules` and cast to `dtype`; each device reads its own slices."""

    def load(path: Any, letters: str) -> jax.Array:
        leaf = leaf_name(path)
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

    return jax.tree_util.tree_map_with_path(load, axes(config))
