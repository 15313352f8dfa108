"""A Hugging Face folder of Gemma 1, 2 or 3 -> `GemmaConfig` and `Params`, straight onto the mesh; and back.

One table names every weight. A projection is stored [out, in] there and used [in, out] here: the only change on the way.
Norm scales are stored without the 1 in both. Each device reads its own slice of each file; no array is ever whole in host
memory on top of what the devices hold. Left out: pickled checkpoints (`.bin`, `.pth`), which could run code.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from models import ModelError
from models.gemma import FAR, GemmaConfig, Params, axes, shapes
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

PROJECTIONS = {"q", "k", "v", "o", "gate", "up", "down"}  # transposed on the way


def weight_name(leaf: str, config: GemmaConfig) -> str:
    """The Hugging Face name of one of our leaves, e.g. `layers.q` -> `layers.{}.self_attn.q_proj.weight`."""
    pre_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"  # Gemma 1 has but two norms
    names = {
        "embedding": "embed_tokens",
        "layers.pre_attn_norm": "layers.{}.input_layernorm",
        "layers.q": "layers.{}.self_attn.q_proj",
        "layers.k": "layers.{}.self_attn.k_proj",
        "layers.v": "layers.{}.self_attn.v_proj",
        "layers.o": "layers.{}.self_attn.o_proj",
        "layers.q_norm": "layers.{}.self_attn.q_norm",
        "layers.k_norm": "layers.{}.self_attn.k_norm",
        "layers.post_attn_norm": "layers.{}.post_attention_layernorm",
        "layers.pre_mlp_norm": "layers.{}." + pre_mlp,
        "layers.gate": "layers.{}.mlp.gate_proj",
        "layers.up": "layers.{}.mlp.up_proj",
        "layers.down": "layers.{}.mlp.down_proj",
        "layers.post_mlp_norm": "layers.{}.post_feedforward_layernorm",
        "final_norm": "norm",
    }
    return names[leaf] + ".weight"


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise ModelError(f"{path} is missing: a model folder holds config.json, *.safetensors and a tokenizer")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object")
    return values


def read_config(folder: str | Path) -> GemmaConfig:
    """The dimensions from `config.json`, in transformers' older dialect (`rope_theta`, ...) or newer (`rope_parameters`)."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    architecture = (values.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ModelError(f"{path}: architecture {architecture} is unknown; one of {', '.join(FAMILIES)} is needed")
    family = FAMILIES[architecture]
    values = {**DEFAULTS[family], **values, **(values.get("text_config") or {})}

    def need(key: str):
        if values.get(key) is None:
            raise ModelError(f"{path}: {key} is missing")
        return values[key]

    activation = values.get("hidden_activation") or values.get("hidden_act") or "gelu_pytorch_tanh"
    if activation not in ("gelu", "gelu_pytorch_tanh"):  # "gelu" in a Gemma config has always meant the tanh form
        raise ModelError(f"{path}: activation {activation} is unknown; gelu_pytorch_tanh is needed")
    if values.get("attention_bias") or values.get("use_bidirectional_attention"):
        raise ModelError(f"{path}: attention_bias and use_bidirectional_attention are not supported; both must be false")
    if values.get("tie_word_embeddings") is False:
        raise ModelError(f"{path}: tie_word_embeddings is false; a head of its own is not supported")
    layers, head_dim = need("num_hidden_layers"), need("head_dim")
    local = local_layers(values, layers, family)
    if len(local) != layers:
        raise ModelError(f"{path}: layer_types names {len(local)} layers, num_hidden_layers says {layers}")
    rope, rope_local = rope_parameters(values, family)
    for kind, parameters, known in (("global", rope, ("default", "linear")), ("local", rope_local, ("default",))):
        rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
        if rope_type not in known and (kind == "global" or any(local)):
            raise ModelError(f"{path}: rope_type {rope_type} of {kind} layers is unknown; {' or '.join(known)} is needed")
    query_scalar = head_dim if family == 1 else need("query_pre_attn_scalar")
    return GemmaConfig(
        num_layers=layers,
        embed_dim=need("hidden_size"),
        num_heads=need("num_attention_heads"),
        num_kv_heads=need("num_key_value_heads"),
        head_dim=head_dim,
        mlp_dim=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        query_scale=query_scalar**-0.5,
        local_layers=local,
        sliding_window=need("sliding_window") if any(local) else FAR,
        rope_base=rope["rope_theta"],
        rope_local_base=rope_local["rope_theta"],
        rope_factor=rope.get("factor", 1.0),
        attn_softcap=values.get("attn_logit_softcapping") if family > 1 else None,
        final_softcap=values.get("final_logit_softcapping") if family > 1 else None,
        post_norms=family > 1,
        qk_norms=family == 3,
        norm_eps=values.get("rms_norm_eps", 1e-6),
    )


def local_layers(values: dict, layers: int, family: int) -> tuple[bool, ...]:
    """Which layers see only a window: none in Gemma 1, every other in 2 (the first one too), five of six in 3."""
    if family == 1:
        return (False,) * layers
    if values.get("layer_types"):
        return tuple(kind == "sliding_attention" for kind in values["layer_types"])
    pattern = 2 if family == 2 else values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or 6
    return tuple((i + 1) % pattern != 0 for i in range(layers))


def rope_parameters(values: dict, family: int) -> tuple[dict, dict]:
    """RoPE of global and of local layers: dicts with `rope_theta` and perhaps `rope_type` and `factor`."""
    given, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if family < 3:
        both = {"rope_theta": values.get("rope_theta", 1e4), **scaling, **given}
        return both, both
    full, local = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    return (
        {"rope_theta": values.get("rope_theta", 1e6), **scaling, **full},
        {"rope_theta": values.get("rope_local_base_freq", 1e4), **local},
    )


class Weights:
    """The tensors of a folder by name, read slice by slice. Checks names and shards before anything is read."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.handles: dict[Path, Any] = {}
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = {name: self.checked(file, index) for name, file in read_json(index).get("weight_map", {}).items()}
        elif (self.folder / "model.safetensors").is_file():
            file = self.folder / "model.safetensors"
            self.files = dict.fromkeys(self.opened(file).keys(), file)
        else:
            raise ModelError(f"{self.folder} holds no model.safetensors and no model.safetensors.index.json")
        # a text model lies under "model.", that of a multimodal one under "language_model.model." or "model.language_model."
        short = [name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.") for name in self.files]
        self.names = dict(zip(short, self.files, strict=True))

    def checked(self, file: str, index: Path) -> Path:
        if Path(str(file)).name != file:
            raise ModelError(f"{index}: {file!r} leaves the folder; shards must lie beside their index")
        if not (self.folder / file).is_file():
            raise ModelError(f"{self.folder / file} is missing: {index.name} names it")
        return self.folder / file

    def opened(self, file: Path):
        from safetensors import SafetensorError, safe_open

        if file not in self.handles:
            try:
                self.handles[file] = safe_open(file, framework="numpy")
            except SafetensorError as error:
                pointer = " (it is a git-lfs pointer: run git lfs pull)" if is_lfs_pointer(file) else ""
                raise ModelError(f"{file} is not a whole safetensors file{pointer}; download it again: {error}") from None
        return self.handles[file]

    def slice(self, name: str, index: tuple, transpose: bool, dtype) -> np.ndarray:
        """One tensor's slice; `index` counts in our order of dimensions."""
        tensor = self.opened(self.files[self.names[name]]).get_slice(self.names[name])
        array = tensor[tuple(reversed(index)) if transpose else index]
        return (array.T if transpose else array).astype(dtype)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.names:
            raise ModelError(f"{self.folder}: weight {name} is missing")
        stored = self.names[name]
        file = self.opened(self.files[stored])
        if stored not in set(file.keys()):
            raise ModelError(f"{self.files[stored]} holds no weight {stored}, though the index says so")
        tensor = file.get_slice(stored)
        if tuple(tensor.get_shape()) != shape:
            raise ModelError(f"{self.folder}: weight {name} has shape {tuple(tensor.get_shape())}, config.json says {shape}")
        if tensor.get_dtype() not in ("F32", "F16", "BF16"):
            raise ModelError(f"{self.folder}: weight {name} is {tensor.get_dtype()}; F32, F16 or BF16 is needed")


def is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(8) == b"version "


def leaf_names(config: GemmaConfig) -> dict[str, str]:
    """Our leaf -> its letters: {"embedding": "Vd", "layers.q": "LDA", ...}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(axes(config))
    return {jax.tree_util.keystr(path, simple=True, separator="."): letters for path, letters in flat}


def load_params(folder: str | Path, config: GemmaConfig, mesh: Mesh, rules: Rules, dtype: str = "float32") -> Params:
    """The weights of a folder, each leaf laid out by `rules` on `mesh` and cast to `dtype`. Raises ModelError."""
    weights = Weights(folder)
    names = leaf_names(config)
    wanted = set()
    for leaf, letters in names.items():
        shape = tuple(config.sizes[letter] for letter in letters.removeprefix("L"))
        for layer in range(config.num_layers if letters[0] == "L" else 1):
            name = weight_name(leaf, config).format(layer)
            weights.check(name, shape[::-1] if leaf.split(".")[-1] in PROJECTIONS else shape)
            wanted.add(name)
    text = {name for name in weights.names if not name.startswith(("vision_tower", "multi_modal"))}
    extra = sorted(n for n in text - wanted if n != "lm_head.weight" and "rotary_emb" not in n)
    if extra:
        raise ModelError(f"{folder}: weight {extra[0]} has no place in this model ({len(extra)} such)")

    def load(leaf: str, letters: str, shape: tuple[int, ...]) -> jax.Array:
        sharding = NamedSharding(mesh, spec(letters, rules))
        return jax.make_array_from_callback(shape, sharding, reader(weights, leaf, letters, config, dtype))

    tree = jax.tree.structure(axes(config))
    leaves = [load(leaf, letters, tuple(config.sizes[c] for c in letters)) for leaf, letters in names.items()]
    return jax.tree.unflatten(tree, leaves)


def reader(weights: Weights, leaf: str, letters: str, config: GemmaConfig, dtype: str) -> Callable[[Any], np.ndarray]:
    """What `jax.make_array_from_callback` calls for each device: the device's slice of a leaf, layers stacked."""
    name, transpose = weight_name(leaf, config), leaf.split(".")[-1] in PROJECTIONS

    def read(index: tuple) -> np.ndarray:
        if letters[0] != "L":
            return weights.slice(name, index, transpose, jnp.dtype(dtype))
        layers = range(config.num_layers)[index[0]]
        shape = [len(range(config.sizes[letter])[part]) for letter, part in zip(letters[1:], index[1:], strict=True)]
        stacked = np.empty([len(layers), *shape], jnp.dtype(dtype))
        for i, layer in enumerate(layers):
            stacked[i] = weights.slice(name.format(layer), index[1:], transpose, stacked.dtype)
        return stacked

    return read


def save_params(folder: str | Path, params: Params, config: GemmaConfig, config_json: dict, dtype: str = "float32") -> None:
    """Write `model.safetensors` and `config.json` in Hugging Face's form; the tokenizer's files are the caller's to copy."""
    from safetensors.numpy import save_file

    assert jax.tree.map(lambda p: p.shape, params) == jax.tree.map(lambda s: s.shape, shapes(config))
    tensors = {}
    for (leaf, letters), value in zip(leaf_names(config).items(), jax.tree.leaves(params), strict=True):
        array = np.asarray(value).astype(jnp.dtype(dtype))
        stacked = array if letters[0] == "L" else array[None]
        for layer, one in enumerate(stacked):
            name = "model." + weight_name(leaf, config).format(layer)
            tensors[name] = np.ascontiguousarray(one.T if leaf.split(".")[-1] in PROJECTIONS else one)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(config_json, indent=1) + "\n")
