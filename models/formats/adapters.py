"""Read LoRA adapters of Tunix and PEFT into host memory; write them as a PEFT folder.

    Tunix    an orbax tree: layers.3.attn.q_einsum.w_lora_a (D, r) and w_lora_b (r, N, H), and so on; k and v share A, and
             have one B (r, 2, K, H). It does not store alpha.
    PEFT     adapter_model.safetensors: ...layers.3.self_attn.q_proj.lora_A.weight (r, D) and lora_B.weight (N*H, r), and so on;
             adapter_config.json.

Both name projections as their models do, so weight_names.py applies. Not supported: DoRA, biases, ranks or alphas that differ
between projections, adapters on the embedding.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import ModelError
from models.formats import weight_names
from models.formats.containers import Container, OrbaxTree, Safetensors, Settings, locate, read_json
from models.formats.convert import Reader, leaf_names
from models.formats.save import Tensor, write_json, write_safetensors
from models.formats.weight_names import HEADS, Place
from models.gemma import GemmaConfig
from models.lora import PROJECTIONS, Adapter

ADAPTER_WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
CACHED = 2**16  # elements of a product that are computed at a time, few enough to stay in the CPU's cache


@dataclass(frozen=True)
class LoadedAdapters:
    """The adapters of a model, as float32 arrays on the host."""

    weights: dict[str, Adapter]  # by the projection's name
    rank: int
    scale: float  # alpha / rank

    def on(self, read: Reader) -> Reader:
        """A reader of the base that `read` reads with these adapters merged into it, in float32.

        Each element is bit-identical on every machine and in every slice, so that a digest of the weights identifies them.
        """

        def merged(leaf: str, layer: int, index: Any) -> np.ndarray:
            base, found = read(leaf, layer, index), self.weights.get(leaf.removeprefix("layers."))
            if found is None:
                return base
            rows, columns = index
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


def is_peft(path: Path) -> bool:
    """Whether a folder holds adapters of peft."""
    return (path / SETTINGS).is_file()


def is_tunix(path: Path) -> bool:
    """Whether `path` is an orbax tree of adapters, or the folder in which Tunix saves one."""
    path = tree_of(path)
    return (path / "manifest.ocdbt").is_file() and any("lora_a" in n for n in OrbaxTree(path).names)


def tree_of(path: Path) -> Path:
    """The orbax tree at `path` or in its folder `model_params`."""
    return path / "model_params" if (path / "model_params").is_dir() else locate(path)


# ------------------------------------------------------------------------------------------------------------------- reading


def read_peft(folder: Path, config: GemmaConfig) -> LoadedAdapters:
    """The adapters in a folder that peft wrote. Raises ModelError."""
    settings = Settings(folder / SETTINGS, read_json(folder / SETTINGS))
    said = settings.values
    for key, wanted in {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}.items():
        if said.get(key, wanted) not in (wanted, None):
            raise ModelError(f"{settings.path}: {key} {said[key]} is not supported; {wanted} is needed")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"):
        if said.get(key):
            raise ModelError(f"{settings.path}: {key} is not supported; it must be empty")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is missing: adapters are only read from safetensors")
    container = AdapterFile(folder)

    def place(projection: str, side: str) -> Place:
        weight = weight_names.hugging_face(f"layers.{projection}", config)
        letters = f"J{weight.letters[1]}" if side == "a" else f"{weight.letters[0]}J"
        return Place(weight.name.removesuffix(".weight") + f".lora_{side.upper()}.weight", letters)

    weights, rank = read_all(container, config, place)
    if rank != settings.need("r"):
        raise ModelError(f"{settings.path}: r {said['r']} is not the rank of the weights, {rank}")
    alpha = settings.need("lora_alpha", float)
    return LoadedAdapters(weights, rank, alpha / (rank**0.5 if said.get("use_rslora") else rank))


def read_tunix(path: Path, config: GemmaConfig, alpha: float) -> LoadedAdapters:
    """The adapters in a tree that Tunix saved. Raises ModelError."""
    container = OrbaxTree(tree_of(path))

    def place(projection: str, side: str) -> Place:
        stored = [
            weight for weight in weight_names.flax(f"layers.{projection}") if f"{weight.of(0).name}/lora_a" in container.names
        ]
        weight = stored[0] if stored else weight_names.flax(f"layers.{projection}")[-1]
        rows, columns = leaf_names(config)[f"layers.{projection}"].removeprefix("L")
        several = "".join(letter for letter in weight.letters if letter.isdecimal())
        letters = HEADS.get(rows, rows) + "J" if side == "a" else "J" + several + HEADS.get(columns, columns)
        return Place(f"{weight.name}/lora_{side}", letters, weight.part)

    weights, rank = read_all(container, config, place)
    return LoadedAdapters(weights, rank, alpha / rank)


class AdapterFile(Safetensors):
    """`adapter_model.safetensors`; its names are prefixed names of the model's weights."""

    def __init__(self, folder: Path):
        self.path, self.handles = folder, {}
        file = folder / ADAPTER_WEIGHTS
        self.files = dict.fromkeys(self.opened(file).keys(), file)
        self.names = {re.sub(r"^(base_model\.)?(model\.)*(language_model\.)?(model\.)?", "", name): name for name in self.files}


def read_all(container: Container, config: GemmaConfig, place: Callable[[str, str], Place]) -> tuple[dict[str, Adapter], int]:
    """The adapters of every projection that has them, and their rank. `place(projection, side)` says where "a" or "b" is."""
    found = [name for name in PROJECTIONS if place(name, "a").of(0).name in container.names]
    if not found:
        raise ModelError(f"{container.path} holds no adapters of a Gemma, such as {place('q', 'a').of(0).name}")
    first = place(found[0], "a")
    rank = container.shape(first.of(0).name)[first.letters.index("J")]
    wanted = set()

    def read(projection: str, side: str) -> np.ndarray:
        at = place(projection, side)
        rows, columns = leaf_names(config)[f"layers.{projection}"].removeprefix("L")
        ours = f"{rows}J" if side == "a" else f"J{columns}"
        index = tuple(slice(0, size) for size in weight_names.array_shape(ours, config, rank))
        layers = []
        for layer in range(config.num_layers):
            one = at.of(layer)
            container.check(one, config, rank)
            wanted.add(one.name)
            layers.append(weight_names.to_ours(lambda cut, name=one.name: container.read(name, cut), one, ours, index))
        return np.stack(layers).astype(np.float32)

    weights = {projection: Adapter(read(projection, "a"), read(projection, "b")) for projection in found}
    extra = sorted(set(container.names) - wanted)
    if extra:
        raise ModelError(f"{container.path}: weight {extra[0]} has no place in this model ({len(extra)} such)")
    return weights, rank


# ------------------------------------------------------------------------------------------------------------------- writing


def write_peft(folder: Path, adapters: LoadedAdapters, config: GemmaConfig, base: str, dtype: str = "float32") -> None:
    """Write the adapters as a folder that peft loads on top of the model `base`."""

    def tensor(projection: str, layer: int, side: str) -> Tensor:
        name = weight_names.hugging_face(f"layers.{projection}", config).of(layer).name.removesuffix(".weight")
        array = getattr(adapters.weights[projection], side)[layer].T
        return Tensor(f"base_model.model.model.{name}.lora_{side.upper()}.weight", array.shape, lambda: array)

    layers = range(config.num_layers)
    weights = [tensor(name, layer, side) for name in adapters.weights for layer in layers for side in "ab"]
    write_safetensors(folder / ADAPTER_WEIGHTS, weights, dtype)
    modules = [weight_names.TABLE[f"layers.{name}"][0].rpartition(".")[2] for name in adapters.weights]
    alpha = adapters.scale * adapters.rank
    write_json(folder / SETTINGS, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": adapters.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "target_modules": modules, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
    })  # fmt: skip
