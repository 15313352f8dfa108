"""Time of a training step and its phases against their bounds, with random weights of any model's size. Downloads nothing.

    python scripts/benchmark.py --model gemma3-270m --prompts_per_step 4 --max_new_tokens 64
    python scripts/benchmark.py --model gemma2-2b --mean_length 150 --autotune
    python scripts/benchmark.py --model gemma2-2b --mean_length 150 --lora_rank 64
    python scripts/benchmark.py --model gemma2-2b --transformers         (compares with its generate; needs torch)

Completions run to `--max_new_tokens`, or to natural lengths around `--mean_length`. The bound is that of
models/bounds/roofline.py for the same lengths, at the peaks that this device reaches in a large product and a large copy. It
counts no padding and no recomputation: the percentage is the MFU where arithmetic binds, the MBU where memory does. Prints
medians (min-max) over `--repeats` steps after a warm-up that compiles, then one line of JSON.
"""

import dataclasses
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data.problems import Problem
from grpo.config import flag
from grpo.errors import ConfigError
from grpo.rollout import sample_groups
from grpo.runs.cli import run_script
from grpo.runs.flags import parse
from grpo.runs.grading import make_grader
from grpo.runs.metrics import CompileCounter
from grpo.runs.reward_worker import UserRewards
from grpo.runs.workload import Workload, layouts, row_limits
from grpo.session import plan_sessions
from grpo.step import Run, one_step
from grpo.timing import phase_seconds
from grpo.update import init_state, reference_of, sampling_params, starting_point
from models.bounds import roofline
from models.bounds.roofline import Bound, Chip
from models.gemma import ExecutionConfig, Params, init_params
from models.lora import count_adapters
from models.presets import MODELS
from models.sharding import ROLLOUT, STORE, TRAIN, activation_dtype, check_divides, make_mesh

PHASES = ("sampling_params", "prefill", "decode", "reward", "reference", "update")


@dataclass(frozen=True)
class BenchmarkConfig(Workload):
    model: str = flag("gemma2-6m", f"one of {', '.join(MODELS)}", "data")
    repeats: int = flag(5, "timed steps", above=0)
    transformers: bool = flag(False, "time transformers' generate too, on the same device: same sizes, full length")
    autotune: bool = flag(False, "time sampling with every rollout_tp that divides the devices, and use the fastest")

    def __post_init__(self):
        super().__post_init__()
        if self.transformers and self.mean_length:
            raise ConfigError(f"--transformers runs all rows to the end: mean_length {self.mean_length} must be 0")


class NumberTokens:
    """In place of a tokenizer: text is token ids with blanks between. No id stops a completion."""

    pad_id: int = 0
    stop_ids: tuple[int, ...] = (-1,)

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
    """Random prompts, up to a quarter shorter than they may be. A coin rewards: from equal rewards nothing is learned."""
    config = dataclasses.replace(config, reward_coin=1.0)
    model, rng = MODELS[config.model], np.random.default_rng(config.seed)
    check_divides("prompts_per_step", config.prompts_per_step, mesh)
    dtype, Q, P = activation_dtype(config.dtype), config.prompts_per_step, config.max_prompt_tokens
    widths = P - rng.integers(0, max(P // 4, 1), Q)
    prompt_ids = [rng.integers(3, model.vocab_size, width).tolist() for width in widths]
    problems = [Problem(str(i), "", str(i)) for i in range(Q)]
    sessions = plan_sessions(dataclasses.replace(config, epochs=10 * config.repeats), Q)
    return Run(
        config=config, mesh=mesh, model=model, tokenizer=NumberTokens(), problems=problems, prompt_ids=prompt_ids,
        grade=make_grader(config, UserRewards()), sessions=sessions,
        train=ExecutionConfig(TRAIN, dtype, config.remat, config.unroll),
        sample=ExecutionConfig(ROLLOUT, dtype, unroll=config.unroll),
    )  # fmt: skip


def random_weights(run: Run) -> Params:
    return init_params(jax.random.key(0), run.model, STORE, run.train.dtype if run.config.lora_rank else "float32")


def measure(run: Run, config: BenchmarkConfig) -> dict[str, list[float]]:
    """Seconds of each phase of a step and of the whole step, `repeats` times, after as many steps as it takes to compile.

    The steps are those of training: `grpo.step.one_step`, its phases timed by `grpo.timing`.
    """
    figures: dict[str, list[float]] = defaultdict(list)
    with jax.set_mesh(run.mesh):
        trained, base = starting_point(random_weights(run), run.model, run.train.dtype, config.seed, run.update)
        reference = reference_of(trained, base, run.train.dtype, run.update) if config.beta else None
        state = init_state(trained, run.update)
        del trained
        shapes = config.repeats if config.mean_length else 1  # packing gives each set of lengths a shape of its own
        for i in [*range(shapes), *range(-config.repeats, 0)]:
            step = (i % config.repeats) + 1
            start = time.perf_counter()
            with phase_seconds() as seconds:
                state, _ = one_step(step, run.sessions[0], state, run, reference, base, row_limits(config, step))
                jax.block_until_ready(state)
            if i < 0:
                for name in PHASES:
                    figures[name].append(seconds.get(name, 0.0))
                figures["sample"].append(seconds["prefill"] + seconds["decode"])
                figures["step"].append(time.perf_counter() - start)
    return dict(figures)


def bounds(run: Run, config: BenchmarkConfig, chip: Chip, step: int) -> dict[str, Bound]:
    """The least that each phase of a step can take."""
    model, devices, tp = run.model, run.mesh.size, run.mesh.shape["tp"]
    width = jnp.dtype(run.train.dtype).itemsize
    prompts, lengths = [len(ids) for ids in run.prompt_ids], row_limits(config, step).tolist()
    tokens = sum(prompts) + sum(lengths), sum(lengths), roofline.group_products(model, prompts, lengths)
    adapters = count_adapters(model, run.update.lora_names, config.lora_rank)
    found = {
        "sampling_params": roofline.sampling_params_bound(model, chip, devices, tp, width=width, adapters=adapters),
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
    for k in layouts(len(jax.devices())):
        run = make_run(config, make_mesh(k))
        with jax.set_mesh(run.mesh):
            params = sampling_params(random_weights(run), run.model, run.sample)

            def roll_out(i: int, run: Run = run, params: Params = params):
                limits = row_limits(config, i)
                return sample_groups(params, run.problems, run.prompt_ids, i, run, limits).samples

            seconds[k] = statistics.median(timed(roll_out, 3))
        print(f"rollout_tp {k}: {seconds[k]:.3f} s a rollout", flush=True)
    return seconds


def time_transformers(run: Run, config: BenchmarkConfig) -> list[float]:
    """Seconds of transformers' `generate` for the step's rows: a model of the same dimensions, random too, every row full."""
    import torch
    import transformers

    model, count = run.model, config.max_new_tokens
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
    figures = measure(run, config)
    if config.transformers:
        figures["generate"] = time_transformers(run, config)
    steps = range(1, config.repeats + 1)
    found = [bounds(run, config, chip, step) for step in steps]
    sampled = statistics.mean(int(row_limits(config, step).sum()) for step in steps)
    tokens = dict.fromkeys(figures, sampled) | {"sampling_params": 0, "prefill": sum(map(len, run.prompt_ids))}
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
    """The phases in 80 columns."""
    Q, G, P, C = config.prompts_per_step, config.group_size, config.max_prompt_tokens, config.max_new_tokens
    lines = [
        f"{config.model}, {result['devices']} x {result['device']}, {result['dtype']}",
        f"measured peaks {result['peak_tflops']:.2f} TFLOP/s, {result['peak_gb_per_s']:.0f} GB/s a device",
        f"{Q} prompts x {G} completions, {P} + {C} tokens, {result['mean_length']:.0f} a completion",
        f"median of {config.repeats} steps",
        f"{'phase':15}{'ms':>9}{'(min-max)':>18}{'tokens/s':>9}{'GFLOP':>9}{'MB':>7}{'bound ms':>9}{'%':>4}",
    ]
    for name, row in result["phases"].items():
        spread = f"({row['ms_min']:.1f}-{row['ms_max']:.1f})"
        line = f"{name:15}{row['ms']:9.1f}{spread:>18}"
        line += f"{row['tokens_per_s']:9.0f}" if "tokens_per_s" in row else " " * 9
        if "bound_ms" in row:
            line += f"{row['gflop']:9.1f}{row['memory_mb']:7.0f}{row['bound_ms']:9.2f}{row['percent_of_bound']:4.0f}"
        lines.append(line)
    lines.append(f"peak memory {result['peak_gib']:.2f} GiB, {result['compiles']} programs compiled")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
