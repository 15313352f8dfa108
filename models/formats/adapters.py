"""Read LoRA adapters of Tunix and PEFT into host memory; write them as a PEFT folder.

    Tunix    an orbax tree: layers.3.attn.q_einsum.w_lora_a (D, r) and w_lora_b (r, N, H), and so on; k and v share A, and
             have one B (r, 2, K, H). It does not store alpha.
    PEFT     adapter_model.safetensors: ...layers.3.self_attn.q_proj.lora_A.weight (r, D) and lora_B.weight (N*H, r), and so on;
             adapter_config.json.

Both name projections as their models do, so weight_names.py applies. Projections of one layer or another may have adapters of
another rank or alpha, or none: they are padded with zeros. Not supported: DoRA, biases, adapters on the embedding, and every
setting of peft that is not known to leave the rule of application and the base as they are.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models import ModelError
from models.formats import weight_names
from models.formats.containers import Container, OrbaxTree, Safetensors, Settings, by_name, locate, read_json
from models.formats.convert import Reader, finite, layers_of, same
from models.formats.save import Tensor, write_json, write_safetensors
from models.formats.weight_names import HEADS, Place
from models.gemma import GemmaConfig, kind_of
from models.lora import PROJECTIONS, Adapter, projections

ADAPTER_WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# The settings of peft that are read, those without effect on what adapters compute, and those that must have one of certain
# values. Any other must be null, false or empty.
READ = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save",
)  # fmt: skip
WITHOUT_EFFECT = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config",
    "fan_in_fan_out",  # of another kind of layer than Gemma has
)  # fmt: skip
NEEDED = {
    "peft_type": ["LORA"], "bias": ["none"], "use_dora": [False],
    "init_lora_weights": [True, False, "gaussian", "orthogonal"],
}  # fmt: skip
CACHED = 2**16  # elements of a product that are computed at a time, few enough to stay in the CPU's cache


@dataclass(frozen=True)
class LoadedAdapters:
    """The adapters of a model, as float32 arrays on the host."""

    weights: dict[str, Adapter]  # by the projection's name
    rank: int
    scale: float  # alpha / rank

    def on(self, read: Reader, config: GemmaConfig) -> Reader:
        """A reader of the base that `read` reads with these adapters merged into it, in float32.

        Each element is bit-identical on every machine and in every slice, so that a digest of the weights identifies them.
        """

        def merged(leaf: str, layer: int, index: Any) -> np.ndarray:
            base, found = read(leaf, layer, index), self.weights.get(leaf.removeprefix("layers."))
            if found is None:
                return base
            rows, columns = index
            layer = layers_of(leaf, config).index(layer)
            product = ordered_product(found.a[layer, rows], found.b[layer][:, columns])
            return base.astype(np.float32) + np.float32(self.scale) * product

        return merged


def ordered_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b in float32, with terms added from first to last. BLAS does not guarantee an order of summation."""
    out = np.zeros((len(a), b.shape[1]), np.float32)
    count = max(CACHED // b.shape[1], 1)
    for start in range(0, len(a), count):
        rows = slice(start, start + count)
        for j in range(len(b)):
            out[rows] += a[rows, j, None] * b[j]
    return out


def peft_folder(path: Path) -> Path | None:
    """The folder of peft's adapters: `path`, or the one in it, as peft saves a named adapter. ModelError for several."""
    if (path / SETTINGS).is_file() or not path.is_dir() or (path / "config.json").is_file():
        return path if (path / SETTINGS).is_file() else None
    inside = sorted(file.parent for file in path.glob(f"*/{SETTINGS}"))
    if len(inside) > 1:
        raise ModelError(f"{path} holds several adapters; name one of {', '.join(folder.name for folder in inside)}")
    return inside[0] if inside else None


def is_tunix(path: Path) -> bool:
    """Whether `path` is an orbax tree of adapters, or the folder in which Tunix saves one."""
    path = tree_of(path)
    return (path / "manifest.ocdbt").is_file() and any("lora_a" in n for n in OrbaxTree(path).names)


def tree_of(path: Path) -> Path:
    """The orbax tree at `path` or in its folder `model_params`."""
    return path / "model_params" if (path / "model_params").is_dir() else locate(path)


# ------------------------------------------------------------------------------------------------------------------- reading


def read_peft(folder: Path, config: GemmaConfig, base: Callable[[], Reader] | None = None) -> LoadedAdapters:
    """The adapters in a folder that peft wrote. `base` reads the model below them. Raises ModelError."""
    settings = Settings(folder / SETTINGS, read_json(folder / SETTINGS))
    said = settings.values
    for key, value in said.items():
        allowed = NEEDED.get(key, [False, "", [], {}])
        if value is not None and key not in READ + WITHOUT_EFFECT and value not in allowed:
            wanted = " or ".join(map(str, NEEDED[key])) + " is needed" if key in NEEDED else "it must be empty"
            raise ModelError(f"{settings.path}: {key} {str(value)[:40]} is not supported; {wanted}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is missing: adapters are only read from safetensors")
    container = AdapterFile(folder)
    container.check_saved(config, base)

    def module(projection: str, layer: int) -> str:
        return weight_names.hugging_face(f"layers.{projection}", config).of(layer).name.removesuffix(".weight")

    def rank_of(projection: str, layer: int) -> int:
        name = module(projection, layer)
        stored, rank = f"{name}.lora_A.weight", matched(said.get("rank_pattern"), name, settings.need("r"))
        if not is_target(said, name, layer):
            if stored in container.names:
                raise ModelError(f"{container.path}: {name} has an adapter, but {SETTINGS} does not name it in target_modules")
            return 0
        if stored in container.names and container.shape(stored)[0] != rank:
            raise ModelError(
                f"{settings.path}: r {rank} is not the rank of the weights of {name}, {container.shape(stored)[0]}"
            )
        return rank

    def place(projection: str, side: str) -> Place:
        weight = weight_names.hugging_face(f"layers.{projection}", config)
        letters = f"J{weight.letters[1]}" if side == "a" else f"{weight.letters[0]}J"
        return Place(weight.name.removesuffix(".weight") + f".lora_{side.upper()}.weight", letters)

    weights, rank = read_all(container, config, place, rank_of)
    alpha = settings.need("lora_alpha", float)

    def scale(name: str) -> float:
        rank = matched(said.get("rank_pattern"), name, said["r"])
        return matched(said.get("alpha_pattern"), name, alpha) / (rank**0.5 if said.get("use_rslora") else rank)

    scales = {name: [scale(module(name, layer)) for layer in layers_of(f"layers.{name}", config)] for name in weights}
    largest = max(max(row) for row in scales.values())
    for name, row in scales.items():
        weights[name].b[:] *= (np.asarray(row) / largest).astype(np.float32)[:, None, None]  # 1 where all are alike
    return LoadedAdapters(weights, rank, largest)


def matched(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """What peft's `rank_pattern` or `alpha_pattern` says of a module."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", f"model.{module}"))
    return next(found, default)


def is_target(said: dict[str, Any], module: str, layer: int) -> bool:
    """Whether peft puts an adapter on a module. `target_modules` is a regular expression, or a list of ends of names."""
    names = [prefix + module for prefix in ("", "model.", "model.language_model.", "language_model.model.")]

    def named(wanted: str | list[str] | None) -> bool:
        if isinstance(wanted, str):
            return wanted == "all-linear" or any(re.fullmatch(wanted, name) for name in names)
        return any(name == one or name.endswith(f".{one}") for one in wanted or [] for name in names)

    layers = said.get("layers_to_transform")
    chosen = layers is None or layer == layers or (isinstance(layers, list) and (not layers or layer in layers))
    return chosen and named(said.get("target_modules")) and not named(said.get("exclude_modules"))


def read_tunix(path: Path, config: GemmaConfig, alpha: float) -> LoadedAdapters:
    """The adapters in a tree that Tunix saved. Raises ModelError."""
    container = OrbaxTree(tree_of(path))

    def place(projection: str, side: str) -> Place:
        stored = [
            weight for weight in weight_names.flax(f"layers.{projection}") if f"{weight.of(0).name}/lora_a" in container.names
        ]
        weight = stored[0] if stored else weight_names.flax(f"layers.{projection}")[-1]
        _, rows, columns = projections(config, [projection])[projection].upper()
        several = "".join(letter for letter in weight.letters if letter.isdecimal())
        letters = HEADS.get(rows, rows) + "J" if side == "a" else "J" + several + HEADS.get(columns, columns)
        return Place(f"{weight.name}/lora_{side}", letters, weight.part)

    def rank_of(projection: str, layer: int) -> int:
        first = place(projection, "a")
        if first.of(0).name not in container.names:
            return 0
        return container.shape(first.of(0).name)[first.letters.index("J")]

    weights, rank = read_all(container, config, place, rank_of)
    return LoadedAdapters(weights, rank, alpha / rank)


class AdapterFile(Safetensors):
    """`adapter_model.safetensors`; its names are prefixed names of the model's weights."""

    def __init__(self, folder: Path):
        self.path, self.handles = folder, {}
        file = folder / ADAPTER_WEIGHTS
        self.files = dict.fromkeys(self.opened(file).keys(), file)
        # an adapter may have a name: lora_A.default.weight
        self.names = by_name(
            folder, self.files, r"^(base_model\.)?(model\.)*(language_model\.)?(model\.)?|(?<=\.lora_[AB])\.\w+(?=\.weight)"
        )

    def check_saved(self, config: GemmaConfig, base: Callable[[], Reader] | None) -> None:
        """Passes over a whole embedding or vocabulary head that equals the base's. Raises ModelError for another one."""
        shape = weight_names.array_shape("VD", config)
        for name in {"embed_tokens.weight", "lm_head.weight"} & set(self.names):
            ours = partial(base(), "embedding", 0) if base and self.shape(name) == shape else None
            if not (ours and same(shape, partial(self.read, name), ours)):
                raise ModelError(f"{self.path}: {name} was trained beside the adapters; only the base's own is supported")
            del self.names[name]


def read_all(
    container: Container, config: GemmaConfig, place: Callable[[str, str], Place], rank_of: Callable[[str, int], int]
) -> tuple[dict[str, Adapter], int]:
    """The adapters of every projection that has them, and their highest rank. `place(projection, side)` is that of "a" or "b".

    `rank_of(projection, layer)` is 0 where there is none. Where a rank is lower, the rest is zeros.
    """
    letters = projections(config, PROJECTIONS)
    layers = {name: layers_of(f"layers.{name}", config) for name in letters}
    ranks = {name: [rank_of(name, layer) for layer in layers[name]] for name in letters}
    highest = max(max(row) for row in ranks.values())
    if not any(place(name, "a").of(layer).name in container.names for name in ranks for layer in layers[name]):
        raise ModelError(f"{container.path} holds no adapters of a Gemma, such as {place(next(iter(letters)), 'a').of(0).name}")
    wanted = set()

    def read(projection: str, side: str) -> np.ndarray:
        at, kind = place(projection, side), config.kind(kind_of(f"layers.{projection}"))
        _, rows, columns = letters[projection].upper()
        ours = f"{rows}J" if side == "a" else f"J{columns}"
        stacked = np.zeros((kind.num_layers, *weight_names.array_shape(ours, kind, highest)), np.float32)
        for i, (layer, rank) in enumerate(zip(layers[projection], ranks[projection], strict=True)):
            if not rank:
                continue
            one = at.of(layer)
            container.check(one, kind, rank)
            wanted.add(one.name)
            index = tuple(slice(0, size) for size in weight_names.array_shape(ours, kind, rank))
            found = weight_names.to_ours(lambda cut, name=one.name: container.read(name, cut), one, ours, index)
            stacked[i][index] = finite(found, container.path, one.name)
        return stacked

    weights = {name: Adapter(read(name, "a"), read(name, "b")) for name, row in ranks.items() if any(row)}
    extra = sorted(set(container.names) - wanted)
    if extra:
        raise ModelError(f"{container.path}: weight {extra[0]} has no place in this model ({len(extra)} such)")
    return weights, highest


# ------------------------------------------------------------------------------------------------------------------- writing


def write_peft(folder: Path, adapters: LoadedAdapters, config: GemmaConfig, base: str, dtype: str = "float32") -> None:
    """Write the adapters as a folder that peft loads on top of the model `base`."""

    def tensor(projection: str, i: int, layer: int, side: str) -> Tensor:
        name = weight_names.hugging_face(f"layers.{projection}", config).of(layer).name.removesuffix(".weight")
        array = getattr(adapters.weights[projection], side)[i].T
        return Tensor(f"base_model.model.model.{name}.lora_{side.upper()}.weight", array.shape, lambda: array)

    names = adapters.weights
    numbered = [(name, i, layer) for name in names for i, layer in enumerate(layers_of(f"layers.{name}", config))]
    write_safetensors(folder / ADAPTER_WEIGHTS, [tensor(*where, side) for where in numbered for side in "ab"], dtype)
    stored = (weight_names.hugging_face(f"layers.{name}", config).name.removesuffix(".weight") for name in names)
    modules = list(dict.fromkeys(name.rpartition(".")[2] for name in stored))
    alpha = adapters.scale * adapters.rank
    write_json(folder / SETTINGS, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": adapters.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "target_modules": modules, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
    })  # fmt: skip
