"""How fast a step and its parts run, with random weights and random tokens at any model's size: nothing is downloaded.

    python scripts/benchmark.py --model gemma2-6m --prompts_per_step 8 --max_prompt_tokens 128 --max_new_tokens 128

No completion stops early, so every row has its full length. Prints medians (min-max) over `--repeats`, after one warm-up, then
one line of JSON.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from data.problems import Problem
from grpo.cli import run_script
from grpo.config import Config, ConfigError, flag, parse
from grpo.rollout import rollout
from grpo.train import Run, completion_logprobs, init_state, one_step, rollout_view, train_step
from models.gemma import Compute, init_params
from models.presets import MODELS
from models.sharding import ROLLOUT, STORE, TRAIN, activation_dtype, check_divides, make_mesh


@dataclass(frozen=True)
class BenchmarkConfig(Config):
    model: str = flag("gemma2-6m", f"one of {', '.join(MODELS)}")
    repeats: int = flag(5, "timed runs of each part")

    def __post_init__(self):
        super().__post_init__()
        if self.model not in MODELS:
            raise ConfigError(f"model {self.model!r} is unknown; one of {', '.join(MODELS)}")


class NumberTokens:
    """Stands for a tokenizer: text is token ids with blanks between. No id stops a completion."""

    pad_id, stop_ids = 0, (-1,)

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def timed(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main(argv: list[str]) -> dict[str, Any]:
    config = parse(BenchmarkConfig, argv, __doc__ or "")
    model, mesh = MODELS[config.model], make_mesh(config.rollout_tp)
    check_divides("prompts_per_step", config.prompts_per_step, mesh)
    dtype = activation_dtype(config.dtype)
    rng = np.random.default_rng(config.seed)
    Q, B = config.prompts_per_step, config.rows
    widths = config.max_prompt_tokens - rng.integers(0, max(config.max_prompt_tokens // 4, 1), Q)
    prompt_ids = [rng.integers(3, model.vocab_size, width).tolist() for width in widths]
    problems = [Problem(str(i), "", str(i)) for i in range(Q)]
    run = Run(
        config, mesh, model, NumberTokens(), problems, prompt_ids, [], [], 0, {},  # type: ignore[arg-type]
        Compute(TRAIN, dtype, config.remat, config.unroll), Compute(ROLLOUT, dtype),
    )  # fmt: skip
    figures: dict[str, list[float]] = {}
    with jax.set_mesh(mesh):
        state = init_state(init_params(jax.random.key(0), model, STORE), config, 1000)
        reference = init_params(jax.random.key(0), model, STORE, dtype)
        view = rollout_view(state.params, model, run.sample)
        counter = iter(range(10**6))

        rollouts = []

        def roll():
            rollouts.append(rollout(view, problems, prompt_ids, next(counter), run.tokenizer, model, run.sample, config, {}))
            return rollouts[-1][0]

        figures["rollout"] = timed(roll, config.repeats)
        for name in ("prefill", "decode"):
            figures[name] = [metrics[f"time/{name}"] for _, _, metrics in rollouts[1:]]
        batch = rollouts[-1][0]

        def refer():
            return completion_logprobs(reference, batch, model, run.train, config)

        figures["reference"] = timed(refer, config.repeats)
        batch = dataclasses.replace(batch, ref_logprobs=refer())

        def update():
            nonlocal state
            state, stats = train_step(state, batch, model, run.train, config, 1000)
            return stats

        figures["update"] = timed(update, config.repeats)

        def step():
            nonlocal state
            state, *_ = one_step(next(counter) + 1, state, reference, run)

        figures["step"] = timed(step, config.repeats)
    sampled = B * config.max_new_tokens
    print(f"{config.model}, {mesh.size} x {mesh.devices.flat[0].device_kind}, {dtype}: {Q} prompts x {config.group_size}, "
          f"{config.max_prompt_tokens} + {config.max_new_tokens} tokens, median (min-max) of {config.repeats}")  # fmt: skip
    phases = {}
    for name, seconds in figures.items():
        middle = statistics.median(seconds)
        print(
            f"{name:10} {middle:8.3f} s ({min(seconds):.3f}-{max(seconds):.3f})   {sampled / middle:10.0f} completion tokens/s"
        )
        phases[name] = {
            "ms": 1e3 * middle, "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds), "tokens_per_s": sampled / middle,
        }  # fmt: skip
    return {"device": mesh.devices.flat[0].device_kind, "preset": config.model, "rows": B, "phases": phases}


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
