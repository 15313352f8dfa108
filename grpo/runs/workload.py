"""A training run as planner and benchmark see it: a model's dimensions without its weights, completions of given lengths."""

from dataclasses import dataclass

import numpy as np

from data.batches import natural_lengths
from grpo.config import Config, flag
from grpo.errors import ConfigError
from models.presets import MODELS


@dataclass(frozen=True)
class Workload(Config):
    model: str = flag("", f"one of {', '.join(MODELS)}; default: the preset's, or the config.json in --model_path", "data")
    mean_length: int = flag(0, "completions of natural length around this mean; 0: all of max_new_tokens", "rollout", least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.model and self.model not in MODELS:
            raise ConfigError(f"model {self.model!r} is unknown; one of {', '.join(MODELS)}")
        if not 0 <= self.mean_length <= self.max_new_tokens:
            raise ConfigError(f"mean_length {self.mean_length} must be 0 to max_new_tokens {self.max_new_tokens}")


def row_limits(config: Workload, step: int) -> np.ndarray:
    """The length of each completion of a step.  -> B"""
    if not config.mean_length:
        return np.full(config.rows, config.max_new_tokens)
    return np.asarray(natural_lengths(step, config.rows, config.mean_length, config.max_new_tokens))


def layouts(devices: int) -> list[int]:
    """The values of `rollout_tp` that `--autotune` compares."""
    return [tp for tp in (1, 2, 4, 8) if devices % tp == 0]
