"""The arrays of a checkpoint by name, read slice by slice: safetensors, orbax trees, GGUF.

Names are those of weight_names.py, without the prefixes and suffixes of some writers. Only the slices that are asked for are
read, and nothing is unpickled. Not supported: orbax trees with stacked layers, optimizer states.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models import ModelError
from models.formats import weight_names
from models.formats.weight_names import Place
from models.gemma import GemmaConfig, kind_of

PICKLED = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def read_json(path: Path) -> dict:
    """The object in a JSON file of a model folder. Raises ModelError."""
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
MOST = {"num_hidden_layers": 1000}  # things are made for each layer; other whole numbers are below 2^31


class Settings:
    """The values of a JSON file; each is checked when it is read."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values = path, values

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default` if it is missing or null. Raises ModelError for a value of another kind."""
        value = self.values.get(key)
        if value is None:
            return default
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        most = MOST.get(key, 2**31 if kind is int else 1e30)
        if not fits or (kind in (int, float) and not 0 < value <= most):
            bound = f" and at most {most:g}" if fits and value > most else ""
            raise ModelError(f"{self.path}: {key} {str(value)[:40]!r} must be {KINDS[kind]}{bound}")
        return value

    def need(self, key: str, kind: type = int) -> Any:
        """The value of `key`. Raises ModelError if it is missing."""
        if (value := self.get(key, kind)) is None:
            raise ModelError(f"{self.path}: {key} is missing")
        return value

    def part(self, key: str) -> "Settings":
        """The object at `key`; an empty one if it is missing."""
        return Settings(self.path, self.get(key, dict, {}))

    def __or__(self, other: "Settings") -> "Settings":
        """The values of both; those of `other` take precedence."""
        return Settings(self.path, self.values | other.values)


class Container:
    """Arrays by name. A subclass knows a format: what it calls the arrays, how large they are, how to read them."""

    path: Path
    names: dict[str, Any]  # the arrays' names in the words of weight_names.py -> what the subclass needs to find them
    spare_rows = 0  # how many rows of padding an embedding may have
    head = ""  # what the format calls a vocabulary head of its own, which a Gemma may have beside an equal embedding

    def places(self, leaf: str, config: GemmaConfig) -> list[Place]:
        """Where this format may store a leaf."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array. Raises ModelError unless it holds floats."""
        raise NotImplementedError

    def read(self, name: str, index: tuple) -> np.ndarray:
        """The slice `index` of an array."""
        raise NotImplementedError

    def ignored(self, name: str) -> bool:
        """Whether a file of this format may hold this array besides the weights of the text model."""
        raise NotImplementedError

    def place(self, leaf: str, config: GemmaConfig) -> Place:
        """Where this file stores a leaf, judged by the names and shapes in it."""
        places = self.places(leaf, config)
        first = (config.layers_of(kind_of(leaf)) or [0])[0]
        found = [place for place in places if place.of(first).name in self.names]
        config = config.kind(kind_of(leaf))
        fit = [place for place in found if self.shape(place.of(first).name) == weight_names.array_shape(place.letters, config)]
        if len(fit) > 1:
            raise ModelError(f"{self.path}: {fit[0].of(0).name} could be stored as {fit[0].letters} or {fit[1].letters}")
        return (fit or found or places)[0]

    def check(self, place: Place, config: GemmaConfig, rank: int = 0) -> None:
        """Raises ModelError unless there is an array of the right shape at `place`. `rank` is that of adapters."""
        if place.name not in self.names:
            plain = {name: re.sub(r"(?<=\.)_\w+\.", "", f".{name}") for name in self.names}  # a._wrapper.b -> a.b
            wrapped = [name for name in plain if plain[name].endswith(f".{place.name}")]
            hint = f", but {wrapped[0]} is there: save the model without its wrapper" if wrapped else ""
            raise ModelError(f"{self.path}: weight {place.name} is missing{hint}")
        found, wanted = self.shape(place.name), weight_names.array_shape(place.letters, config, rank)
        padded = place.letters[0] == "V" and found[1:] == wanted[1:] and 0 <= found[0] - wanted[0] <= self.spare_rows
        if found != wanted and not padded:
            raise ModelError(f"{self.path}: weight {place.name} has shape {found}, config.json says {wanted}")


def locate(path: Path) -> Path:
    """`path`, or the orbax tree or GGUF file inside it when it is a folder without a Hugging Face model.

    Raises ModelError when it holds more than one.
    """
    if not path.is_dir() or is_tree(path) or ((path / "config.json").is_file() and any(path.glob("*.safetensors*"))):
        return path
    inside = sorted(found for found in path.iterdir() if found.suffix == ".gguf" or (found.is_dir() and is_tree(found)))
    if len(inside) > 1:
        raise ModelError(f"{path} holds several models; name one of {', '.join(found.name for found in inside)}")
    return inside[0] if inside else path


def open_container(path: Path) -> Container:
    """The checkpoint at `path`, in any format. Raises ModelError."""
    path = locate(path)
    if path.suffix == ".gguf" and path.is_file():
        return Gguf(path)
    return OrbaxTree(path) if is_tree(path) else Safetensors(path)


def is_tree(folder: Path) -> bool:
    """Whether a folder is an orbax tree, in either of its two layouts."""
    return any((folder / name).is_file() for name in ("manifest.ocdbt", "_METADATA"))


# --------------------------------------------------------------------------------------------------------------- safetensors


class Safetensors(Container):
    """`model.safetensors` of a Hugging Face folder, or its shards."""

    head = "lm_head.weight"

    def __init__(self, folder: Path):
        self.path = folder
        self.handles: dict[Path, Any] = {}
        if (folder / WHOLE).is_file():  # as transformers does: an index beside it is of an earlier save
            self.files = dict.fromkeys(self.opened(folder / WHOLE).keys(), folder / WHOLE)
        elif (folder / INDEX).is_file():
            weight_map = Settings(folder / INDEX, read_json(folder / INDEX)).need("weight_map", dict)
            self.files = {name: self.shard(file) for name, file in weight_map.items()}
        else:
            pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
            hint = f"; {pickled[0]} may be a pickle, which could run code: convert it to safetensors" if pickled else ""
            raise ModelError(f"{folder} holds no {WHOLE} and no {INDEX}{hint}")
        # names start with "model.", in multimodal models with "language_model.model." or "model.language_model."
        self.names = by_name(folder, self.files, r"^(model\.)?(language_model\.)?(model\.)?")

    def shard(self, file: str) -> Path:
        """The path of a shard that the index names. Raises ModelError."""
        if Path(str(file)).name != file:
            raise ModelError(f"{self.path / INDEX}: {file!r} leaves the folder; shards must be next to their index")
        if not (self.path / file).is_file():
            raise ModelError(f"{self.path / file} is missing, but {INDEX} names it")
        return self.path / file

    def opened(self, file: Path):
        """The handle of a file, opened once. Raises ModelError."""
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

    def places(self, leaf: str, config: GemmaConfig) -> list[Place]:
        return [weight_names.hugging_face(leaf, config)]

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.names[name]
        file = self.opened(self.files[stored])
        if stored not in set(file.keys()):
            raise ModelError(f"{self.files[stored]} holds no weight {stored}, but the index says that it does")
        tensor = file.get_slice(stored)
        if tensor.get_dtype() not in ("F32", "F16", "BF16"):
            raise ModelError(f"{self.path}: weight {name} is {tensor.get_dtype()}; F32, F16 or BF16 is needed")
        return tuple(tensor.get_shape())

    def read(self, name: str, index: tuple) -> np.ndarray:
        return self.opened(self.files[self.names[name]]).get_slice(self.names[name])[index]

    def ignored(self, name: str) -> bool:
        towers = "vision_tower", "multi_modal", "audio_tower", "embed_vision", "embed_audio"
        return name.startswith(towers) or "rotary_emb" in name


def by_name(path: Path, stored: Iterable[str], prefix: str) -> dict[str, str]:
    """The stored names by what is left of them without the regular expression `prefix`. ModelError if two are the same then."""
    names: dict[str, str] = {}
    for name in stored:
        short = re.sub(prefix, "", name)
        if short in names:
            raise ModelError(f"{path}: {names[short]} and {name} are the same weight, stored twice; one must go")
        names[short] = name
    return names


def pointer_hint(file: Path) -> str:
    """The hint for a file that git-lfs has not fetched; empty for others."""
    with file.open("rb") as opened:
        return " (it is a git-lfs pointer: run git lfs pull)" if opened.read(8) == b"version " else ""


# --------------------------------------------------------------------------------------------------------------------- orbax


def flax_name(stored: str) -> str:
    """The name in weight_names.py of an array that orbax stored under `stored`.

    transformer/layer_0/attn/q_einsum.w       Google's, flat       -> layer_0/attn/q_einsum
    params.layer_0.mlp.linear                 nested               -> layer_0/mlp/linear
    layers.0.attn.q_einsum.w_lora_a.value     Tunix's adapters     -> layer_0/attn/q_einsum/lora_a
    """
    name = re.sub(r"^(params/|transformer/)*", "", stored.replace(".", "/"))
    name = re.sub(r"^layers/(\d+)/", r"layer_\1/", name.removesuffix("/value"))
    return re.sub(r"/(w|scale|kernel)$", "", re.sub(r"/(w|kernel)_(lora_[ab])$", r"/\2", name))


class OrbaxTree(Container):
    """A tree of arrays that orbax wrote, such as Google's Flax checkpoints on Kaggle and Tunix's checkpoints."""

    spare_rows = 128  # 256,128 rows for 256,000 pieces

    def __init__(self, folder: Path):
        import tensorstore

        self.path, self.arrays = folder, {}
        try:
            files = [key.decode() for key in tensorstore.KvStore.open(self.store("")).result().list().result()]
        except Exception as error:  # tensorstore documents no exception types
            raise self.unreadable(error) from None
        self.drivers = {}  # stored name -> tensorstore driver
        for file in files:
            array, _, last = file.rpartition("/")
            if driver := {".zarray": "zarr", "zarr.json": "zarr3"}.get(last):
                self.drivers[array] = driver
        self.names = {flax_name(name): name for name in self.drivers if name}
        if len(self.names) < len(self.drivers) or not self.names:
            raise ModelError(
                f"{folder} holds {len(self.drivers)} arrays with {len(self.names)} names: not the tree of one model"
            )

    def store(self, name: str) -> dict[str, Any]:
        """The tensorstore spec of the array stored under `name`; "" means the whole tree."""
        base = {"driver": "file", "path": f"{self.path.absolute()}/"}
        if (self.path / "manifest.ocdbt").is_file():
            return {"driver": "ocdbt", "base": base, "path": name}
        return base | {"path": base["path"] + name}

    def unreadable(self, error: Exception) -> ModelError:
        """The error to raise for an error of tensorstore."""
        return ModelError(f"{self.path} cannot be read; download it again: {' '.join(str(error).split())[:200]}")

    def opened(self, name: str):
        """The handle of an array, opened once. Raises ModelError."""
        import tensorstore

        if name not in self.arrays:
            stored = self.names[name]
            try:
                spec = {"driver": self.drivers[stored], "kvstore": self.store(f"{stored}/"), "fill_missing_data_reads": False}
                array = tensorstore.open(spec, open=True).result()  # a chunk that is missing is an error, not zeros
            except Exception as error:
                raise self.unreadable(error) from None
            if not jnp.issubdtype(array.dtype.numpy_dtype, jnp.floating):
                raise ModelError(f"{self.path}: weight {name} is {array.dtype.name}; floats are needed")
            self.arrays[name] = array
        return self.arrays[name]

    def places(self, leaf: str, config: GemmaConfig) -> list[Place]:
        return weight_names.flax(leaf)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.opened(name).shape)

    def read(self, name: str, index: tuple) -> np.ndarray:
        array = self.opened(name)
        try:
            return array[index].read().result()
        except Exception as error:
            raise self.unreadable(error) from None

    def ignored(self, name: str) -> bool:
        return name.startswith(("vision_encoder/", "embedder/mm_"))


# ---------------------------------------------------------------------------------------------------------------------- GGUF


@lru_cache(1)  # reading the vocabulary of 262,144 pieces takes seconds
def gguf_tensors(path: Path, _changed: int) -> dict[str, Any]:
    """The tensors of a GGUF file by name. `_changed` is the time of its last change. Raises ModelError."""
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError:
        raise ModelError(f'{path} needs the package gguf: pip install -e ".[gguf]"') from None

    class BoundedReader(GGUFReader):
        """The reader walks over an array whatever its length; here none is longer than the file has bytes."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > len(self.data) - orig_offs:
                raise ValueError(f"the array at byte {orig_offs} is longer than the file")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        reader = BoundedReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:
        raise ModelError(f"{path} is not a whole GGUF file: {' '.join(str(error).split())[:200]}") from None
    if architecture not in ("gemma", "gemma2", "gemma3", "gemma4"):
        raise ModelError(f"{path}: architecture {architecture} is unknown; gemma, gemma2, gemma3 or gemma4 is needed")
    return {tensor.name: tensor for tensor in reader.tensors}


class Gguf(Container):
    """A GGUF file, as llama.cpp uses. Quantized matrices are read as floats."""

    spare_rows = 128
    head = "output.weight"

    def __init__(self, path: Path):
        self.path = path
        self.names = gguf_tensors(path, path.stat().st_mtime_ns)

    def places(self, leaf: str, config: GemmaConfig) -> list[Place]:
        return [weight_names.gguf(leaf, config)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.names[name].shape))

    def read(self, name: str, index: tuple) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self.names[name]
        if not isinstance(index[0], slice):
            return self.read(name, (slice(index[0], index[0] + 1), *index[1:]))[0]
        try:  # blocks run along rows, so rows are read whole
            return np.asarray(dequantize(tensor.data[index[0]], tensor.tensor_type), np.float32)[:, *index[1:]]
        except NotImplementedError:
            raise ModelError(f"{self.path}: weight {name} is {tensor.tensor_type.name}, which gguf cannot read") from None

    def ignored(self, name: str) -> bool:
        return name == "rope_freqs.weight"
