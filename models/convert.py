"""A Hugging Face folder of Gemma 1, 2 or 3 -> `GemmaConfig` and `Params`, straight onto the mesh; and back.

One table names every weight. A projection is stored [out, in] there and used [in, out] here: the only change on the way.
Norm scales are stored without the 1 in both. Each device reads its own slice of each file; no array is ever whole in host
memory on top of what the devices hold. Left out: pickled checkpoints (`.bin`, `.pth`), which could run code.
"""

import json
import math
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

PICKLED = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
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
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON{pointer_hint(path)}: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object")
    return values


KINDS = {int: "a whole number above 0", float: "a number above 0", list: "a list", dict: "an object"}


class Settings:
    """The values of a JSON file, each checked as it is asked for."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values = path, values

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; `default` where the file is silent or says null."""
        value = self.values.get(key)
        if value is None:
            return default
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not fits or (kind in (int, float) and not 0 < value < math.inf):
            raise ModelError(f"{self.path}: {key} {str(value)[:40]!r} must be {KINDS[kind]}")
        return value

    def need(self, key: str, kind: type = int) -> Any:
        if (value := self.get(key, kind)) is None:
            raise ModelError(f"{self.path}: {key} is missing")
        return value

    def part(self, key: str) -> "Settings":
        """An object inside this one; empty where there is none."""
        return Settings(self.path, self.get(key, dict, {}))

    def __or__(self, other: "Settings") -> "Settings":
        """Both, the other's values first."""
        return Settings(self.path, self.values | other.values)


def read_config(folder: str | Path) -> GemmaConfig:
    """The dimensions from `config.json`, in transformers' older dialect (`rope_theta`, ...) or newer (`rope_parameters`)."""
    path = Path(folder) / "config.json"
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


class Weights:
    """The tensors of a folder by name, read slice by slice. Checks names and shards before anything is read."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.handles: dict[Path, Any] = {}
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = Settings(index, read_json(index)).need("weight_map", dict)
            self.files = {name: self.checked(file, index) for name, file in weight_map.items()}
        elif (self.folder / "model.safetensors").is_file():
            file = self.folder / "model.safetensors"
            self.files = dict.fromkeys(self.opened(file).keys(), file)
        else:
            pickled = sorted(file.name for file in self.folder.iterdir() if file.suffix in PICKLED)
            hint = f"; {pickled[0]} may be a pickle, which could run code, and is not read: convert it" if pickled else ""
            raise ModelError(f"{self.folder} holds no model.safetensors and no model.safetensors.index.json{hint}")
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
                hint = pointer_hint(file)
                raise ModelError(f"{file} is not a whole safetensors file{hint}; download it again: {error}") from None
            except OSError as error:
                raise ModelError(f"{file} cannot be read: {error}") from None
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


def pointer_hint(file: Path) -> str:
    """What to say of a file that git-lfs has not fetched."""
    with file.open("rb") as opened:
        return " (it is a git-lfs pointer: run git lfs pull)" if opened.read(8) == b"version " else ""


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
