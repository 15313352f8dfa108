"""A training run as planner and benchmark see it: a model's dimensions without its weights, completions of given lengths."""

from dataclasses import dataclass

from data.batches import natural_lengths
from grpo.config import Config, ConfigError, flag
from models.presets import MODELS


@dataclass(frozen=True)
class Workload(Config):
    model: str = flag("", f"one of {', '.join(MODELS)}; default: the preset's, or the config.json in --model_path")
    mean_length: int = flag(0, "completions of natural length around this mean; 0: all of max_new_tokens")

    def __post_init__(self):
        super().__post_init__()
        if self.model and self.model not in MODELS:
            raise ConfigError(f"model {self.model!r} is unknown; one of {', '.join(MODELS)}")
        if not 0 <= self.mean_length <= self.max_new_tokens:
            raise ConfigError(f"mean_length {self.mean_length} must be 0 to max_new_tokens {self.max_new_tokens}")

    def limits(self, step: int, rows: int) -> list[int]:
        if not self.mean_length:
            return super().limits(step, rows)
        return natural_lengths(step, rows, self.mean_length, self.max_new_tokens).tolist()
