"""A model from wherever it lies, in whatever form.

    RUN_DIR, RUN_DIR/checkpoints/STEP      the run's newest checkpoint, or one of them; RUN_DIR/model says how to read it;
                                           one of LoRA holds adapters, and needs its base model too, to be merged with them
    a folder, a tree, a .gguf file         Hugging Face, Flax (Kaggle), llama.cpp: what models/containers.py reads
    adapters of peft's or Tunix's          LoRA: they are merged into the model at `base_path`
    hf:OWNER/NAME, kaggle:OWNER/...        one of these, downloaded first (hub.py)

What is found is known before any weight is read. Left out: optimizer states (checkpoint.py).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from grpo.checkpoint import digest, open_params, read_adapters, read_digest, read_meta, read_params, saved_steps
from grpo.config import ConfigError
from grpo.hub import HUBS, fetch
from grpo.update import narrow
from models.adapters import SETTINGS, Adapters, is_peft, is_tunix, read_peft, read_tunix
from models.containers import is_tree, locate, read_json
from models.convert import Reader, load_params, open_weights, place_params, read_config
from models.gemma import GemmaConfig, Params, axes, shapes
from models.lora import adapter_axes, merge
from models.save import config_json, write_json
from models.sharding import STORE, Rules, reshard

# What a model folder holds beside its weights.
DESCRIPTION = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model that can be loaded."""

    path: Path  # what was asked for
    found: str  # what that is, for the user
    folder: Path  # of the tokenizer, and of config.json if there is one
    config: GemmaConfig
    load: Callable[[Mesh, Rules, str], Params]  # reads the weights, each leaf cast to a dtype and laid out
    open: Callable[[], Reader] | None = None  # reads them leaf by leaf, on the host
    run_dir: Path | None = None  # the run that made it, when it is a checkpoint
    meta: dict[str, Any] = field(default_factory=dict)  # what that checkpoint says of itself
    under: "Model | None" = None  # what its adapters lie on, when it is LoRA
    adapters: Callable[[], Adapters] | None = None

    @property
    def base(self) -> str:
        """What the run was trained from; empty when it is no checkpoint."""
        return self.meta["config"]["model_path"] if self.meta else ""

    @property
    def line(self) -> str:
        """What was found, its family and its size."""
        return f"{self.found}: {self.size}"

    @property
    def size(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes(self.config)))
        return f"Gemma {self.config.family}, {count / 1e6:.1f}M parameters, {self.config.num_layers} layers"


def find_model(path: str | Path, base_path: str | Path = "", adapter_alpha: float = 0.0) -> Model:
    """The model at `path`. `base_path` is what adapters lie on, or where a run's base model is now, if it has moved.

    `adapter_alpha` is that of adapters that do not say it themselves. Raises ConfigError or ModelError when there is no model.
    """
    path = fetch(path)
    if (path / "checkpoints").is_dir():
        steps = saved_steps(path / "checkpoints")
        if not steps:
            raise ConfigError(f"model_path {path} is a run without a checkpoint yet; train on, or give its base model")
        return find_checkpoint(path / "checkpoints" / str(steps[-1]), path, base_path)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return find_checkpoint(path, path.parent.parent, base_path)
    if is_peft(path):
        named = read_json(path / SETTINGS).get("base_model_name_or_path") or ""
        under = find_base(f"PEFT adapters {path}", base_path or (named if Path(named).is_dir() else ""))
        return with_adapters(path, f"PEFT adapters {path}", under, partial(read_peft, path, under.config))
    if is_tunix(path):
        under = find_base(f"LoRA tree {path}", base_path)
        if not adapter_alpha > 0:
            raise ConfigError(f"LoRA tree {path} does not say its alpha: give --adapter_alpha, as it was trained")
        return with_adapters(path, f"LoRA tree {path}", under, partial(read_tunix, path, under.config, adapter_alpha))
    config, found = read_config(path), locate(path)
    kind, folder = "Hugging Face folder", found
    if is_tree(found) or found.is_file():
        kind = "Flax checkpoint" if is_tree(found) else "GGUF file"
        folder = next((place for place in (found, found.parent) if has_tokenizer(place)), found.parent)
    return Model(
        path, f"{kind} {found}", folder, config, partial(load_params, found, config), partial(open_weights, found, config)
    )


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def find_base(what: str, base_path: str | Path) -> Model:
    """The model that adapters lie on."""
    if not base_path:
        raise ConfigError(f"{what}: adapters need the model that they were trained on; give --base_path")
    return find_model(base_path)


def with_adapters(path: Path, found: str, under: Model, adapters: Callable[[], Adapters], **run: Any) -> Model:
    """`under` with adapters merged into it, in float32, as they are read."""

    def open_merged() -> Reader:
        assert under.open
        return adapters().on(under.open())

    def load(mesh: Mesh, rules: Rules, dtype: str) -> Params:
        return place_params(open_merged(), under.config, mesh, rules, dtype)

    found = f"{found} on {under.found}"
    return Model(path, found, under.folder, under.config, load, open_merged, under=under, adapters=adapters, **run)


def find_checkpoint(folder: Path, run_dir: Path, base_path: str | Path) -> Model:
    """The weights of one checkpoint of a run."""
    try:
        meta = read_meta(folder)
        saved = meta["config"]
        base_path = str(base_path or saved["model_path"])
        described = next(place for place in (run_dir / "model", Path(base_path)) if place.is_dir())
    except StopIteration:
        raise ConfigError(f"{run_dir} holds no model/ with its config.json and tokenizer; give --base_path DIR") from None
    except Exception as error:
        raise ConfigError(f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); give another step") from None
    config = read_config(described)
    found = f"step {meta['step']} of the run {run_dir}"
    if not saved.get("lora_rank"):
        load = partial(read_params, folder, axes(config), config.sizes)
        return Model(folder, found, described, config, load, partial(open_params, folder), run_dir, meta)
    if not base_path.startswith(HUBS) and not Path(base_path).exists():
        raise ConfigError(f"{run_dir} has adapters for the model in {base_path}, which is not there; give --base_path DIR")
    under, adapters = find_model(base_path), partial(read_adapters, folder)

    def open_merged() -> Reader:
        assert under.open
        read = under.open()
        check_base(read_digest(read, under.config), under, folder, meta)
        return adapters().on(read)

    load = partial(load_merged, under, folder, meta)
    return Model(folder, f"{found} on {under.found}", described, config, load, open_merged, run_dir, meta, under, adapters)


def check_base(found: str, base: Model, folder: Path, meta: dict[str, Any]) -> None:
    if found != meta["belongs_to"]["model"]:
        raise ConfigError(f"{base.path} is not the model that {folder} has adapters for; give --base_path DIR")


def load_merged(base: Model, folder: Path, meta: dict[str, Any], mesh: Mesh, rules: Rules, dtype: str) -> Params:
    """The base model with the adapters of a checkpoint merged, as training samples from it."""
    settings, config = meta["config"], base.config
    rank, targets = settings["lora_rank"], settings["lora_targets"].split(",")
    with jax.set_mesh(mesh):
        weights = base.load(mesh, STORE, "float32")
        check_base(digest(weights), base, folder, meta)
        sizes = config.sizes | {"J": rank}
        adapters = read_params(folder, adapter_axes(config, targets), sizes, mesh, STORE, "float32")
        merging = jax.jit(merge, static_argnums=2, donate_argnums=0)
        return reshard(merging(narrow(weights, dtype), adapters, settings["lora_alpha"] / rank), axes(config), rules)


def copy_description(model: Model, folder: Path) -> None:
    """What a model folder holds beside its weights, so that a run's directory can be read without its base model."""
    folder.mkdir(exist_ok=True)
    for name in DESCRIPTION:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    if not (folder / "config.json").is_file():
        write_json(folder / "config.json", config_json(model.config))
