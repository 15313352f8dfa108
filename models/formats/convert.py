"""A checkpoint of Gemma 1, 2 or 3, in any form that containers.py reads -> `GemmaConfig` and `Params`, straight onto the mesh;
the way back is save.py.

weight_names.py names every weight. Each device reads its own slice, as far as the form allows; no array is ever whole in
host memory on top of what the devices hold. Left out: pickled checkpoints (`.bin`, `.pth`), which could run code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from models import ModelError
from models.formats.containers import Container, Settings, is_tree, locate, open_container, read_json
from models.formats.weight_names import to_ours
from models.gemma import FAR, GemmaConfig, Params, axes
from models.presets import MODELS
from models.sharding import Rules, spec

FAMILIES = {
    "GemmaForCausalLM": 1, "Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 3, "Gemma3ForConditionalGeneration": 3,
}  # fmt: skip

# What transformers takes for granted where a config.json is silent; the first multimodal ones name little but sizes.
DEFAULTS = {
    1: {},
    2: {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    3: dict(vocab_size=262_208, num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256),
}


def read_config(path: str | Path) -> GemmaConfig:
    """The dimensions of the model at `path`: from its `config.json`, or one beside it; else those of the preset that fits."""
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
    raise ModelError(f"{found} fits none of {', '.join(MODELS)}; put the config.json of its Hugging Face twin beside it")


def parse_config(path: Path) -> GemmaConfig:
    """`config.json`, in transformers' older dialect (`rope_theta`, ...) or newer (`rope_parameters`)."""
    given = Settings(path, read_json(path))
    architecture = (given.get("architectures", list) or ["none"])[0]
    if architecture not in list(FAMILIES):
        raise ModelError(f"{path}: architecture {architecture} is unknown; one of {', '.join(FAMILIES)} is needed")
    family = FAMILIES[architecture]
    values = Settings(path, DEFAULTS[family]) | given | given.part("text_config")
    said = values.values

    activation = said.get("hidden_activation") or said.get("hidden_act") or "gelu_pytorch_tanh"
    if activation not in ("gelu", "gelu_pytorch_tanh"):  # "gelu" in a Gemma config has always meant the tanh form
        raise ModelError(f"{path}: activation {activation} is unknown; gelu_pytorch_tanh is needed")
    if said.get("attention_bias") or said.get("use_bidirectional_attention"):
        raise ModelError(f"{path}: attention_bias and use_bidirectional_attention are not supported; both must be false")
    if said.get("tie_word_embeddings") is False:
        raise ModelError(f"{path}: tie_word_embeddings is false; a head of its own is not supported")
    layers, head_dim = values.need("num_hidden_layers"), values.need("head_dim")
    heads, kv_heads = values.need("num_attention_heads"), values.need("num_key_value_heads")
    if heads % kv_heads:
        raise ModelError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ModelError(f"{path}: head_dim {head_dim} must be even")  # RoPE turns pairs
    local = local_layers(values, layers, family)
    if len(local) != layers:
        raise ModelError(f"{path}: layer_types names {len(local)} layers, num_hidden_layers says {layers}")
    rope, rope_local = rope_parameters(values, family)
    for kind, parameters, known in (("global", rope, ("default", "linear")), ("local", rope_local, ("default",))):
        rope_type = parameters.values.get("rope_type") or parameters.values.get("type") or "default"
        if rope_type not in known and (kind == "global" or any(local)):
            raise ModelError(f"{path}: rope_type {rope_type} of {kind} layers is unknown; {' or '.join(known)} is needed")
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
        rope_factor=rope.get("factor", float, 1.0),
        attn_softcap=values.get("attn_logit_softcapping", float) if family > 1 else None,
        final_softcap=values.get("final_logit_softcapping", float) if family > 1 else None,
        post_norms=family > 1,
        qk_norms=family == 3,
        norm_eps=values.get("rms_norm_eps", float, 1e-6),
    )


def local_layers(values: Settings, layers: int, family: int) -> tuple[bool, ...]:
    """Which layers see only a window: none in Gemma 1, every other in 2 (the first one too), five of six in 3."""
    if family == 1:
        return (False,) * layers
    if kinds := values.get("layer_types", list):
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                raise ModelError(f"{values.path}: layer type {kind!r} must be sliding_attention or full_attention")
        return tuple(kind == "sliding_attention" for kind in kinds)
    pattern = values.get("sliding_window_pattern", int) or values.get("_sliding_window_pattern", int, 6)
    return tuple((i + 1) % (2 if family == 2 else pattern) != 0 for i in range(layers))


def rope_parameters(values: Settings, family: int) -> tuple[Settings, Settings]:
    """RoPE of global and of local layers: perhaps `rope_theta`, `rope_type` and `factor`."""
    given, scaling = values.part("rope_parameters"), values.part("rope_scaling")
    theta = Settings(values.path, {"rope_theta": values.get("rope_theta", float)}) | scaling
    if family < 3:
        return theta | given, theta | given
    local = Settings(values.path, {"rope_theta": values.get("rope_local_base_freq", float)})
    return theta | given.part("full_attention"), local | given.part("sliding_attention")


def leaf_names(config: GemmaConfig) -> dict[str, str]:
    """Our leaf -> its letters: {"embedding": "VD", "layers.q": "LDA", ...}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(axes(config))
    return {jax.tree_util.keystr(path, simple=True, separator="."): letters.upper() for path, letters in flat}


def layers_of(letters: str, config: GemmaConfig) -> range:
    """The layers that a leaf has; one that is not stacked counts as one."""
    return range(config.num_layers if letters[0] == "L" else 1)


def check_weights(container: Container, config: GemmaConfig) -> None:
    """Raises ModelError unless the container holds the weights of this model, whole, and none of another."""
    wanted = set()
    for leaf, letters in leaf_names(config).items():
        place = container.place(leaf, config)
        for layer in layers_of(letters, config):
            container.check(place.of(layer), config)
            wanted.add(place.of(layer).name)
    extra = sorted(name for name in set(container.names) - wanted if not container.passed_over(name))
    if extra:
        raise ModelError(f"{container.path}: weight {extra[0]} has no place in this model ({len(extra)} such)")


Reader = Callable[[str, int, Any], np.ndarray]  # (leaf, layer, index) -> that slice of one layer's weight, in our form


def open_weights(path: str | Path, config: GemmaConfig) -> Reader:
    """What reads the weights at `path`, slice by slice, in the dtype they are stored in. Raises ModelError."""
    container = open_container(Path(path))
    check_weights(container, config)
    letters = leaf_names(config)
    places = {leaf: container.place(leaf, config) for leaf in letters}

    def read(leaf: str, layer: int, index: Any) -> np.ndarray:
        place, ours = places[leaf].of(layer), letters[leaf].removeprefix("L")
        return to_ours(lambda at: container.read(place.name, at), place, ours, index)

    return read


def load_params(path: str | Path, config: GemmaConfig, mesh: Mesh, rules: Rules, dtype: str = "float32") -> Params:
    """The weights at `path`, each leaf laid out by `rules` on `mesh` and cast to `dtype`. Raises ModelError."""
    return place_params(open_weights(path, config), config, mesh, rules, dtype)


def place_params(read: Reader, config: GemmaConfig, mesh: Mesh, rules: Rules, dtype: str) -> Params:
    """What `read` gives, laid out by `rules` on `mesh`; each device asks for its own slices."""

    def load(path: Any, letters: str) -> jax.Array:
        leaf = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = tuple(config.sizes[letter] for letter in letters)

        def slice_of(index: Any) -> np.ndarray:
            index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
            if letters[0] != "L":
                return read(leaf, 0, index).astype(dtype)
            stacked = np.empty([part.stop - part.start for part in index], jnp.dtype(dtype))
            for i, layer in enumerate(range(index[0].start, index[0].stop)):
                stacked[i] = read(leaf, layer, index[1:])
            return stacked

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec(letters, rules)), slice_of)

    return jax.tree_util.tree_map_with_path(load, axes(config))
