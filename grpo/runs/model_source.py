"""Finds and loads a model: any format, a run or one of its checkpoints, adapters, or a model on a hub.

    RUN_DIR, RUN_DIR/checkpoints/STEP      the run's newest checkpoint, or a given one; RUN_DIR/model has its config and
                                           tokenizer; a LoRA run has adapters on its base model
    a folder, a tree, a .gguf file         Hugging Face, Flax (Kaggle), llama.cpp: what models/formats/containers.py reads
    adapters from peft or Tunix            LoRA, on the model at `base_path`
    hf:OWNER/NAME                          a Hugging Face folder or PEFT adapters, downloaded first (hub.py)
    kaggle:OWNER/...                       any model folder, downloaded first

The model is identified before any weight is read.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from data.tokenizer import has_tokenizer
from grpo.config import HUBS
from grpo.errors import ConfigError, RunError
from grpo.reports.jsonl import rewrite
from grpo.runs.checkpoint import open_params, read_adapters, read_digest, read_meta, read_params, saved_steps
from grpo.runs.hub import download
from models.formats.adapters import SETTINGS, LoadedAdapters, is_tunix, peft_folder, read_peft, read_tunix
from models.formats.containers import is_tree, locate, read_json
from models.formats.convert import Reader, load_params, open_weights, place_params, read_config
from models.formats.save import config_json, write_json
from models.gemma import GemmaConfig, Params, shapes
from models.lora import PROJECTIONS, Adapter, adapter_axes, attach
from models.sharding import ROLLOUT, spec

# The files of a model folder other than its weights.
DESCRIPTION = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

TABLE = "per_layer.table"  # a Gemma 4's table of per-layer embeddings, frozen by default


@dataclass(frozen=True)
class Model:
    """A model that can be loaded."""

    path: Path  # what was asked for, hf:OWNER/NAME too
    found: str  # a description for the user
    folder: Path  # of the tokenizer, and of config.json if there is one
    config: GemmaConfig
    load: Callable[..., Params]  # (mesh, rules, dtype[, keep]) reads the weights as `load_params` does; adapters merged
    open: Callable[[], Reader] | None = None  # reads them leaf by leaf, on the host; adapters merged
    run_dir: Path | None = None  # the run that made it, when it is a checkpoint
    meta: dict[str, Any] = field(default_factory=dict)  # the meta of that checkpoint
    under: "Model | None" = None  # the base model of its adapters, if it is LoRA
    adapters: Callable[[], LoadedAdapters] | None = None
    trained_from: "Callable[[], Model] | None" = None  # finds the model that the run or the adapters were trained from

    def load_policy(self, mesh: Mesh, dtype: str) -> Params:
        """The weights for sampling in `dtype`. Adapters stay apart, as in training: merged, they would be rounded away."""
        if not (self.adapters and self.under and self.under.open):
            return self.load(mesh, ROLLOUT, dtype)
        loaded, letters = self.adapters(), adapter_axes(self.config, PROJECTIONS)

        def place(leaf: np.ndarray, letters: str) -> jax.Array:
            sharding = NamedSharding(mesh, spec(letters, ROLLOUT))
            return jax.make_array_from_callback(leaf.shape, sharding, leaf.astype(dtype).__getitem__)

        placed = {name: Adapter(place(w.a, letters[name].a), place(w.b, letters[name].b)) for name, w in loaded.weights.items()}
        return attach(place_params(self.under.open(), self.config, mesh, ROLLOUT, dtype), placed, loaded.scale)

    @property
    def line(self) -> str:
        """Description, family and size, and whether it is a base model."""
        return f"{self.found}: {self.size}{', a base model (no chat template)' if self.is_base else ''}"

    @property
    def is_base(self) -> bool:
        """Whether a Gemma, whose tokenizer has settings, has no chat template in them: instruction tuning comes with one."""
        settings = self.folder / "tokenizer_config.json"
        if self.config.vocab_size < 200_000 or not settings.is_file() or any(self.folder.glob("chat_template.*")):
            return False
        return "chat_template" not in read_json(settings)

    @property
    def size(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes(self.config)))
        return f"Gemma {self.config.family}, {count / 1e6:.1f}M parameters, {self.config.num_layers} layers"


def find_model(path: str | Path, base_path: str | Path = "", adapter_alpha: float = 0.0) -> Model:
    """The model at `path`. `base_path` is the base model of adapters, or the new place of a run's base model.

    `adapter_alpha` is the alpha of adapters that do not store it. Raises ConfigError or ModelError if there is no model.
    """
    try:
        return look_up(path, base_path, adapter_alpha)
    except RecursionError:
        raise ConfigError(f"{path}: its base model leads back to itself; give the --base_path of another") from None


def look_up(path: str | Path, base_path: str | Path, adapter_alpha: float) -> Model:
    """`find_model`, unless it goes round in circles."""
    asked, path = Path(path), download(path)
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(asked)):
        raise ConfigError(f"{path} does not exist on this machine; a model of Hugging Face's hub is hf:{path}")
    if (path / "checkpoints").is_dir():
        steps = saved_steps(path / "checkpoints")
        if not steps:
            raise ConfigError(f"model_path {path} is a run without a checkpoint yet; train on, or give its base model")
        return find_checkpoint(path / "checkpoints" / str(steps[-1]), path, base_path, adapter_alpha)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return find_checkpoint(path, path.parent.parent, base_path, adapter_alpha)
    if folder := peft_folder(path):
        named = str(read_json(folder / SETTINGS).get("base_model_name_or_path") or "")
        under = find_base(f"PEFT adapters {path}", base_path or (named if Path(named).is_dir() else ""))
        trained = f" (trained on {named})" if named and Path(named).name != under.path.name else ""
        return with_adapters(
            asked, f"PEFT adapters {path}{trained}", under, partial(read_peft, folder, under.config, under.open)
        )
    if is_tunix(path):
        under = find_base(f"LoRA tree {path}", base_path)
        if not adapter_alpha > 0:
            raise ConfigError(f"LoRA tree {path} does not say its alpha: give --adapter_alpha, as it was trained")
        return with_adapters(asked, f"LoRA tree {path}", under, partial(read_tunix, path, under.config, adapter_alpha))
    config, found = read_config(path), locate(path)
    kind, folder = "Hugging Face folder", found
    if is_tree(found) or found.is_file():
        kind = "Flax checkpoint" if is_tree(found) else "GGUF file"
        folder = next((place for place in (found, found.parent) if has_tokenizer(place)), found.parent)
    return Model(
        asked, f"{kind} {found}", folder, config, partial(load_params, found, config), partial(open_weights, found, config)
    )


def find_base(what: str, base_path: str | Path) -> Model:
    """The base model of adapters."""
    if not base_path:
        raise ConfigError(f"{what}: adapters need the model that they were trained on; give --base_path")
    return find_model(base_path)


def with_adapters(path: Path, found: str, under: Model, adapters: Callable[[], LoadedAdapters]) -> Model:
    """`under` with adapters. `adapters` reads them, and raises if they belong to another model."""

    def open_merged() -> Reader:
        assert under.open
        return adapters().on(under.open(), under.config)

    def load(*placement: Any) -> Params:
        return place_params(open_merged(), under.config, *placement)

    return Model(
        path, f"{found} on {under.found}", under.folder, under.config, load, open_merged, under=under, adapters=adapters,
        trained_from=lambda: under,
    )  # fmt: skip


def find_checkpoint(folder: Path, run_dir: Path, base_path: str | Path, adapter_alpha: float) -> Model:
    """The weights of one checkpoint of a run. `base_path` replaces the run's own model_path."""
    try:
        meta = read_meta(folder)
        saved = meta["config"]
        base_path = str(base_path or saved["model_path"])
        trained_from = partial(
            find_model, base_path, saved.get("base_path", ""), adapter_alpha or saved.get("adapter_alpha", 0.0)
        )
    except Exception as error:
        raise ConfigError(f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); give another step") from None
    found, is_there = f"step {meta['step']} of the run {run_dir}", base_path.startswith(HUBS) or Path(base_path).exists()
    described = run_dir / "model"
    if saved.get("lora_rank"):
        if not is_there:
            raise ConfigError(f"{run_dir} has adapters for the model in {base_path}, which is not there; give --base_path DIR")
        under = trained_from()
        model = with_adapters(folder, found, under, partial(read_adapters_of, under, folder, meta))
        return replace(model, folder=described if described.is_dir() else under.folder, run_dir=run_dir, meta=meta)
    if not described.is_dir():
        if not is_there:
            raise ConfigError(f"{run_dir} holds no model/ with its config.json and tokenizer; give --base_path DIR")
        described = trained_from().folder
    config = read_config(described)
    load, read = partial(read_params, folder, config), partial(open_params, folder, config)
    if config.per_layer_dim and f"params.{TABLE}" not in meta["digests"]:  # it was frozen: it is that of the base model
        if not is_there:
            raise ConfigError(f"{run_dir} has no {TABLE}, which is that of the model in {base_path}; give --base_path DIR")
        under = trained_from()
        read = partial(open_with_table, under, folder, meta, config)
        load = lambda *placement: place_params(read(), config, *placement)  # noqa: E731
    return Model(folder, found, described, config, load, read, run_dir, meta, trained_from=trained_from)


def read_adapters_of(base: Model, folder: Path, meta: dict[str, Any]) -> LoadedAdapters:
    """The adapters of a LoRA run's checkpoint. ConfigError unless they were trained on `base`."""
    opened_base(base, folder, meta)
    return read_adapters(folder)


def opened_base(base: Model, folder: Path, meta: dict[str, Any]) -> Reader:
    """A reader of the model that the checkpoint in `folder` builds on. ConfigError if `base` is another one."""
    assert base.open
    if read_digest(base.open(), base.config) != meta["belongs_to"]["model"]:
        raise ConfigError(f"{base.path} is not the model that {folder} was trained on; give --base_path DIR")
    return base.open()


def open_with_table(base: Model, folder: Path, meta: dict[str, Any], config: GemmaConfig) -> Reader:
    """A reader of a checkpoint's weights, and of the frozen table of per-layer embeddings in its base model."""
    frozen, trained = opened_base(base, folder, meta), open_params(folder, config)
    return lambda leaf, layer, index: (frozen if leaf == TABLE else trained)(leaf, layer, index)


def copy_description(model: Model, folder: Path) -> None:
    """Copy config and tokenizer files, so that a run's directory can be read without its base model. RunError for a link."""
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        raise RunError(f"{folder} is a link, and what it leads to would be overwritten; remove it")
    for name in DESCRIPTION:
        if (model.folder / name).is_file():
            rewrite(folder / name, (model.folder / name).read_bytes())
    if not (folder / "config.json").is_file():
        write_json(folder / "config.json", config_json(model.config))
