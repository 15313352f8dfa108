"""How fast a step and its parts run, and how near to the bound, with random weights at any model's size: nothing is downloaded.

    python scripts/benchmark.py --model gemma3-270m --prompts_per_step 4 --max_new_tokens 64
    python scripts/benchmark.py --model gemma2-2b --mean_length 150 --autotune
    python scripts/benchmark.py --model gemma2-2b --mean_length 150 --lora_rank 64
    python scripts/benchmark.py --model gemma2-2b --transformers         (beside its generate; needs torch and transformers)

Completions run to `--max_new_tokens`, or to natural lengths around `--mean_length`. A bound is that of models/bounds/roofline.py
for the same lengths, at the peaks that this device shows in a large product and a large copy (nominal ones: see CHIPS there). It
counts no padding and nothing recomputed: where arithmetic binds, the percentage is the MFU, where memory does, the MBU.
Medians (min-max) over `--repeats`, after a warm-up that compiles; then one line of JSON.
"""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.problems import Problem
from grpo.config import ConfigError, flag, parse
from grpo.rollout import rollout
from grpo.runs.cli import run_script
from grpo.runs.metrics import CompileCounter
from grpo.runs.model_source import Model
from grpo.runs.reward_worker import UserRewards
from grpo.runs.setup import Run
from grpo.runs.trainer import one_step
from grpo.runs.workload import Workload
from grpo.session import plan_sessions
from grpo.update import (
    choose_remat,
    completion_logprobs,
    device_memory,
    frozen,
    init_state,
    policy,
    sampling_params,
    starting_point,
    train_step,
)
from models.bounds import roofline
from models.bounds.roofline import Bound, Chip
from models.gemma import ExecutionConfig, init_params
from models.lora import count_adapters
from models.presets import MODELS
from models.sharding import ROLLOUT, STORE, TRAIN, activation_dtype, check_divides, make_mesh


@dataclass(frozen=True)
class BenchmarkConfig(Workload):
    model: str = flag("gemma2-6m", f"one of {', '.join(MODELS)}")
    repeats: int = flag(5, "timed runs of each part")
    transformers: bool = flag(False, "time transformers' generate too, on the same device: same sizes, full length")
    autotune: bool = flag(False, "time sampling with every rollout_tp that divides the devices, and go on with the fastest")

    def __post_init__(self):
        super().__post_init__()
        if self.repeats < 1:
            raise ConfigError(f"repeats {self.repeats} must be above 0")
        if self.transformers and self.mean_length:
            raise ConfigError(f"transformers runs all rows to the end: mean_length {self.mean_length} must be 0 beside it")


class NumberTokens:
    """Stands for a tokenizer: text is token ids with blanks between. No id stops a completion."""

    pad_id, stop_ids = 0, (-1,)

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))

    def pieces(self, ids: Any) -> list[str]:
        return list(map(str, ids))


def timed(function: Callable[[int], Any], repeats: int, shapes: int = 1) -> list[float]:
    """Seconds of function(0), ... function(repeats - 1), after `shapes` of them have run uncounted to compile."""
    for i in range(shapes):
        jax.block_until_ready(function(i))
    seconds = []
    for i in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(i))
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_chip(dtype: str) -> Chip:
    """This device's peaks as a large product and a large copy reach them; the network's are nominal."""
    device = jax.local_devices()[0]
    nominal = roofline.find_chip(device.device_kind)
    size, copied = (8192, 2**31) if nominal else (2048, 2**28)
    square = jax.device_put(jnp.ones((size, size), dtype), device)
    long = jax.device_put(jnp.ones(copied // 4, jnp.float32), device)
    product = min(timed(jax.jit(lambda _: square @ square), 5))
    copy = min(timed(jax.jit(lambda i: long + i), 5))
    measured = {"flops": 2 * size**3 / product, "bandwidth": 2 * copied / copy}
    return dataclasses.replace(nominal or Chip(device.device_kind, 0.0, 0.0, 0.0, 1e9, 1), **measured)


def make_run(config: BenchmarkConfig, mesh: Mesh) -> Run:
    """Random prompts, up to a quarter shorter than they may be."""
    model, rng = MODELS[config.model], np.random.default_rng(config.seed)
    check_divides("prompts_per_step", config.prompts_per_step, mesh)
    dtype, Q, P = activation_dtype(config.dtype), config.prompts_per_step, config.max_prompt_tokens
    widths = P - rng.integers(0, max(P // 4, 1), Q)
    prompt_ids = [rng.integers(3, model.vocab_size, width).tolist() for width in widths]
    problems = [Problem(str(i), "", str(i)) for i in range(Q)]
    sessions = plan_sessions(dataclasses.replace(config, epochs=10 * config.repeats), Q)
    weights = Model(
        Path(), f"{config.model}, random weights", Path(), model,
        lambda mesh, rules, dtype: init_params(jax.random.key(0), model, rules, dtype),
    )  # fmt: skip
    return Run(
        config, mesh, weights, model, NumberTokens(), problems, prompt_ids, [], [], [], UserRewards(), sessions,  # type: ignore[arg-type]
        ExecutionConfig(TRAIN, dtype, config.remat, config.unroll), ExecutionConfig(ROLLOUT, dtype, unroll=config.unroll),
    )  # fmt: skip


def measure(run: Run, shapes: int) -> dict[str, list[float]]:
    """Seconds of each phase, `repeats` times: parts of one step after another, then whole steps."""
    config, model = run.config, run.model
    assert isinstance(config, BenchmarkConfig)
    figures: dict[str, list[float]] = {}
    repeats = config.repeats
    with jax.set_mesh(run.mesh):
        trained, base = starting_point(run.base.load(run.mesh, STORE, "float32"), model, run.train.dtype, config)
        reference = base or frozen(trained, run.train.dtype)
        state = init_state(trained, config)
        del trained
        weights = policy(state.params, base, config)
        view = sampling_params(weights, model, run.sample)
        figures["view"] = timed(lambda _: sampling_params(weights, model, run.sample), repeats)
        rolled = []

        def roll(i: int):
            rolled.append(
                rollout(view, run.problems, run.prompt_ids, i + 1, run.tokenizer, model, run.sample, config, run.rewards)
            )
            return rolled[-1][0]

        figures["sample"] = timed(roll, repeats, shapes)
        rolled = rolled[shapes:]
        for name in ("prefill", "decode", "reward"):
            figures[name] = [metrics[f"time/{name}"] for *_, metrics in rolled]
        figures["sample"] = [a - b for a, b in zip(figures["sample"], figures["reward"], strict=True)]
        batches = [batch for batch, *_ in rolled]

        def refer(i: int):
            return completion_logprobs(reference, batches[i], model, run.train, config)

        figures["reference"] = timed(refer, repeats, shapes)
        batches = [dataclasses.replace(batch, ref_logprobs=refer(i)) for i, batch in enumerate(batches)]

        def update(i: int):
            nonlocal state
            execution = choose_remat(run.train, model, batches[i], config, run.mesh.size, device_memory(run.mesh))
            state, stats, _ = train_step(state, batches[i], config.learning_rate, model, execution, config, base)
            return stats

        figures["update"] = timed(update, repeats, shapes)

        def step(i: int):
            nonlocal state
            state, *_ = one_step(i + 1, run.sessions[0], state, base, reference, run)

        figures["step"] = timed(step, repeats, shapes)
    return figures


def bounds(run: Run, chip: Chip, step: int) -> dict[str, Bound]:
    """What each phase of a step must take at least."""
    model, devices, tp = run.model, run.mesh.size, run.mesh.shape["tp"]
    width = jnp.dtype(run.train.dtype).itemsize
    prompts, lengths = [len(ids) for ids in run.prompt_ids], run.config.limits(step, run.config.rows)
    tokens = sum(prompts) + sum(lengths), sum(lengths), roofline.group_pairs(model, prompts, lengths)
    adapters = count_adapters(model, run.config.lora_names, run.config.lora_rank)
    found = {
        "view": roofline.sampling_params_bound(model, chip, devices, tp, width=width, adapters=adapters),
        "prefill": roofline.prefill_bound(model, chip, devices, tp, prompts, width=width),
        "decode": roofline.decode_bound(model, chip, devices, tp, prompts, lengths, width=width),
        "reference": roofline.logprobs_bound(model, chip, devices, *tokens, width=width),
        "update": roofline.update_bound(model, chip, devices, *tokens, width=width, adapters=adapters),
    }
    whole = sum(found.values(), Bound())
    return found | {"sample": found["prefill"] + found["decode"], "step": whole}


def autotune(config: BenchmarkConfig) -> dict[int, float]:
    """Seconds of one rollout by `rollout_tp`, for every k in 1, 2, 4, 8 that divides the devices."""
    seconds = {}
    for k in (k for k in (1, 2, 4, 8) if len(jax.devices()) % k == 0):
        run = make_run(config, make_mesh(k))
        with jax.set_mesh(run.mesh):
            view = sampling_params(run.base.load(run.mesh, STORE, "float32"), run.model, run.sample)

            def roll(i: int, run: Run = run, view: Any = view):
                arguments = run.problems, run.prompt_ids, i, run.tokenizer, run.model, run.sample, config, run.rewards
                return rollout(view, *arguments)[0]

            seconds[k] = statistics.median(timed(roll, 3))
        print(f"rollout_tp {k}: {seconds[k]:.3f} s a rollout", flush=True)
    return seconds


def time_transformers(run: Run) -> list[float]:
    """Seconds of transformers' `generate` for the step's rows: a model of the same dimensions, random too, every row full."""
    import torch
    import transformers

    model, config, count = run.model, run.config, run.config.max_new_tokens
    assert isinstance(config, BenchmarkConfig)
    family = "Gemma3" if model.qk_norms else "Gemma2" if model.post_norms else "Gemma"
    kinds = ["sliding_attention" if local else "full_attention" for local in model.local_layers]
    sizes = dict(
        hidden_size=model.embed_dim, intermediate_size=model.mlp_dim, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim,
        vocab_size=model.vocab_size,
    )  # fmt: skip
    windows = dict(layer_types=kinds, sliding_window=min(model.sliding_window, 2**16)) if model.post_norms else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer_config = getattr(transformers, f"{family.replace('3', '3Text')}Config")(**sizes, **windows)
    with torch.device(device):
        peer = getattr(transformers, f"{family}ForCausalLM")(peer_config).to(getattr(torch, run.train.dtype)).eval()
    width = max(map(len, run.prompt_ids))
    rows = [([0] * (width - len(ids)) + ids, [0] * (width - len(ids)) + [1] * len(ids)) for ids in run.prompt_ids]
    tokens, mask = (torch.tensor(x, device=device).repeat_interleave(config.group_size, dim=0) for x in zip(*rows, strict=True))

    def generate(_: int) -> int:
        with torch.no_grad():
            out = peer.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=True,
                temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, pad_token_id=0,
            )  # fmt: skip
        return int(out[0, -1])  # waits for the device

    return timed(generate, config.repeats)


def peak_gib(mesh: Mesh) -> float:
    """The most that a device has held; of a CPU, this process."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10) / roofline.GIB


def main(argv: list[str]) -> dict[str, Any]:
    config, compiles = parse(BenchmarkConfig, argv, __doc__ or ""), CompileCounter()
    tuned = autotune(config) if config.autotune else {}
    if tuned:
        config = dataclasses.replace(config, rollout_tp=min(tuned, key=tuned.__getitem__))
    run = make_run(config, make_mesh(config.rollout_tp))
    chip = measure_chip(run.train.dtype)
    figures = measure(run, config.repeats if config.mean_length else 1)
    if config.transformers:
        figures["generate"] = time_transformers(run)
    steps = range(1, config.repeats + 1)
    found = [bounds(run, chip, step) for step in steps]
    sampled = statistics.mean(sum(config.limits(step, config.rows)) for step in steps)
    tokens = dict.fromkeys(figures, sampled) | {"view": 0, "prefill": sum(map(len, run.prompt_ids))}
    phases = {
        name: describe(seconds, tokens[name], [bound[name] for bound in found if name in bound])
        for name, seconds in figures.items()
    }
    result = {
        "device": run.mesh.devices.flat[0].device_kind, "devices": run.mesh.size, "preset": config.model, "rows": config.rows,
        "rollout_tp": config.rollout_tp, "dtype": run.train.dtype, "mean_length": sampled / config.rows,
        "peak_tflops": chip.flops / 1e12, "peak_gb_per_s": chip.bandwidth / 1e9, "peak_gib": peak_gib(run.mesh),
        "compiles": compiles.count, "phases": phases,
    }  # fmt: skip
    print(table(result, config), flush=True)
    return result | ({"autotune": {str(k): 1e3 * s for k, s in tuned.items()}} if tuned else {})


def describe(seconds: list[float], tokens: float, bounds: list[Bound]) -> dict[str, float]:
    """The figures of a phase; of its bounds, one a step, the mean."""
    middle = statistics.median(seconds)
    figures = {"ms": 1e3 * middle, "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds)}
    if tokens:
        figures["tokens_per_s"] = tokens / middle
    if bounds:
        flops, memory, network, bound = map(statistics.mean, zip(*map(dataclasses.astuple, bounds), strict=True))
        figures |= {"gflop": flops / 1e9, "memory_mb": memory / 1e6, "network_mb": network / 1e6}
        figures |= {"bound_ms": 1e3 * bound, "percent_of_bound": 100 * bound / middle}
    return figures


def table(result: dict[str, Any], config: BenchmarkConfig) -> str:
    Q, G, P, C = config.prompts_per_step, config.group_size, config.max_prompt_tokens, config.max_new_tokens
    lines = [
        f"{config.model}, {result['devices']} x {result['device']}, {result['dtype']}; measured {result['peak_tflops']:.2f} "
        f"TFLOP/s, {result['peak_gb_per_s']:.0f} GB/s a device",
        f"{Q} prompts x {G} completions, {P} + {C} tokens, {result['mean_length']:.0f} a completion on average; "
        f"median of {config.repeats}",
        f"{'phase':10}{'ms':>10}{'(min-max)':>20}{'tokens/s':>11}{'GFLOP':>10}{'MB':>9}{'bound ms':>10}{'% of it':>9}",
    ]
    for name, row in result["phases"].items():
        spread = f"({row['ms_min']:.1f}-{row['ms_max']:.1f})"
        line = f"{name:10}{row['ms']:10.1f}{spread:>20}"
        line += f"{row['tokens_per_s']:11.0f}" if "tokens_per_s" in row else " " * 11
        if "bound_ms" in row:
            line += f"{row['gflop']:10.1f}{row['memory_mb']:9.0f}{row['bound_ms']:10.2f}{row['percent_of_bound']:9.0f}"
        lines.append(line)
    lines.append(f"peak memory {result['peak_gib']:.2f} GiB, {result['compiles']} programs compiled")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
