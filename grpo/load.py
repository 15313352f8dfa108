"""A model from wherever it lies: a Hugging Face folder, or a checkpoint of a run.

    RUN_DIR, RUN_DIR/checkpoints/STEP      the run's newest checkpoint, or one of them; RUN_DIR/model says how to read it
    anything else                          a Hugging Face folder

What is found is known before any weight is read. Left out: optimizer states (checkpoint.py).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from grpo.checkpoint import read_meta, read_params, saved_steps
from grpo.config import ConfigError
from models.convert import load_params, read_config
from models.gemma import GemmaConfig, Params
from models.sharding import Rules

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
    folder: Path  # of config.json and the tokenizer
    config: GemmaConfig
    load: Callable[[Mesh, Rules, str], Params]  # reads the weights, each leaf cast to a dtype and laid out
    run_dir: Path | None = None  # the run that made it, when it is a checkpoint
    meta: dict[str, Any] = field(default_factory=dict)  # what that checkpoint says of itself

    @property
    def base(self) -> str:
        """What the run was trained from; empty when it is no checkpoint."""
        return self.meta["config"]["model_path"] if self.meta else ""


def find_model(path: str | Path, base_path: str | Path = "") -> Model:
    """The model at `path`. `base_path` says where a run's base model is now, if it has moved.

    Raises ConfigError or ModelError when there is none.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        steps = saved_steps(path / "checkpoints")
        if not steps:
            raise ConfigError(f"model_path {path} is a run without a checkpoint yet; train on, or give its base model")
        return find_checkpoint(path / "checkpoints" / str(steps[-1]), path, base_path)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return find_checkpoint(path, path.parent.parent, base_path)
    config = read_config(path)
    return Model(path, f"Hugging Face folder {path}", path, config, partial(load_params, path, config))


def find_checkpoint(folder: Path, run_dir: Path, base_path: str | Path) -> Model:
    """The weights of one checkpoint of a run."""
    try:
        meta = read_meta(folder)
        described = next(
            place for place in (run_dir / "model", Path(base_path or meta["config"]["model_path"])) if place.is_dir()
        )
    except StopIteration:
        raise ConfigError(f"{run_dir} holds no model/ with its config.json and tokenizer; give --base_path DIR") from None
    except Exception as error:
        raise ConfigError(f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); give another step") from None
    config = read_config(described)
    found = f"step {meta['step']} of the run {run_dir}"
    return Model(folder, found, described, config, partial(read_params, folder, config), run_dir, meta)


def copy_description(model: Model, folder: Path) -> None:
    """What a model folder holds beside its weights, so that a run's directory can be read without its base model."""
    folder.mkdir(exist_ok=True)
    for name in DESCRIPTION:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
