"""Memory, traffic and bounds of a training run before it is started. Compiles what training compiles; needs no accelerator.

    python scripts/plan.py gemma2-2b --topology v5e:2x4 --mean_length 150
    python scripts/plan.py --model gemma3-1b --prompts_per_step 16 --rollout_tp 8 --topology v6e:2x4 --search
    python scripts/plan.py gemma2-2b --topology v5e:2x4 --mean_length 150 --autotune
    python scripts/plan.py gemma2-2b-lora --topology v5e:1x1 --prompts_per_step 4 --mean_length 150
    python scripts/plan.py gemma2-2b-lora --topology gpu:l4 --prompts_per_step 4 --mean_length 150
    python scripts/plan.py tiny --topology local

Takes the command line of train.py and reads no weights, data or tokenizer. Compiling for a TPU slice needs libtpu, which any
machine can install: pip install -e ".[tpu]"; compiling for a GPU needs ".[cuda]", but neither GPU nor driver. `local` means the
devices of this machine. Compiling takes minutes. Prints a line for each program, then one line of JSON. Memory, collectives and
copies are the compiler's figures. `bound` is that of models/bounds/roofline.py, with full prompts and completions of full or
natural (`--mean_length`) length, packed as in training: no run is faster. Evaluation is not planned.

For a TPU slice an estimate follows. `cycles` are those that the compiler expects of each instruction, times the trips of loops;
`dma` are asynchronous copies at the bandwidth of HBM; `ici` is what is received, at the rate of the links. `from` takes all
three as overlapped, `to` none. Decoding has a step for each size of its batch and cache; each counts as often as completions of
these lengths take it. An estimate is the compiler's opinion: nothing ran on a TPU. It leaves out custom calls, most gathers,
loops inside a decode step after their first trip (top-k, top-p), latency between chips, the launch of programs and the host.
"""

import importlib.util
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from grpo.batch import Batch, make_batch
from grpo.config import PRESETS, flag
from grpo.errors import ConfigError
from grpo.memory import choose_remat, device_memory, unroll_decoding
from grpo.runs.cli import run_script
from grpo.runs.flags import parse
from grpo.runs.setup import check_shapes
from grpo.runs.workload import Workload, layouts, row_limits
from grpo.update import (
    UpdateConfig,
    completion_logprobs,
    freezes_table,
    init_state,
    moved_params,
    policy,
    sampling_params,
    train_step,
)
from models.bounds import hlo, roofline
from models.bounds.gpu import GPUS, described_gpus
from models.bounds.roofline import GIB, Chip, find_chip
from models.formats.convert import read_config
from models.gemma import FAR, ExecutionConfig, GemmaConfig, Params, axes, shapes, split_table
from models.kv_cache import read_widths
from models.lora import adapter_axes, adapter_shapes, count_adapters
from models.presets import MODELS
from models.sampler import Sampling, decode, prefill, row_keys
from models.sharding import ROLLOUT, STORE, TRAIN, Rules, abstract_like, activation_dtype, make_mesh, spec

STOP_IDS = (1, 107)
LARGE = 2**20  # bytes; smaller copies do not matter
ROLLOUT_PROGRAMS = ("sampling_params", "prefill", "decode")

# What libtpu would ask a TPU's host for.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
}  # fmt: skip


@dataclass(frozen=True)
class PlanConfig(Workload):
    topology: str = flag(
        "local", "local, a TPU slice (v5e:2x4, v6e:2x4; one chip: v5e:1x1), or GPUs (gpu:h100, gpu:t4x2)", "machine"
    )
    costliest: int = flag(0, "of a TPU slice: list this many instructions with the most estimated cycles", "machine", least=0)
    search: bool = flag(False, "find the largest prompts_per_step and the largest max_new_tokens that fit: minutes", "machine")
    autotune: bool = flag(False, "of a TPU slice: estimate a rollout with each rollout_tp, name the best: minutes", "machine")


# Each preset of train.py; without one, --model and the defaults of Config.
STARTS = {"custom": PlanConfig()} | {name: PlanConfig(**asdict(preset)) for name, preset in PRESETS.items()}


def choose_model(config: PlanConfig) -> GemmaConfig:
    name = config.model or config.preset
    if (known := name.removesuffix("-lora")) in MODELS:
        return MODELS[known]
    if not config.model_path:
        raise ConfigError(f"which model? give a preset, --model (one of {', '.join(MODELS)}) or --model_path")
    return read_config(config.model_path)


def find_devices(topology: str) -> list[Any]:
    """The devices of this machine, or of a described TPU slice or GPU that need not exist."""
    if topology == "local":
        return jax.devices()
    if gpus := re.fullmatch(rf"gpu:({'|'.join(GPUS)})(?:x([1-9]\d?))?", topology):
        try:
            return described_gpus(gpus[1], int(gpus[2] or 1))
        except RuntimeError as error:
            hint = 'it needs the compiler for GPUs: pip install -e ".[cuda]"'
            raise ConfigError(f"topology {topology} cannot be compiled for: {str(error).splitlines()[0]}; {hint}") from None
    if not re.fullmatch(r"v[56]e:\d+x\d+", topology):
        known = f"local or a TPU slice such as v5e:2x4 or v6e:2x4, or gpu: and one of {', '.join(GPUS)}"
        raise ConfigError(f"topology {topology!r} is unknown; use {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f'topology {topology} needs the TPU compiler: pip install -e ".[tpu]"')
    from jax.experimental import topologies

    os.environ.update({name: os.environ.get(name, value) for name, value in NO_TPU.items()})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot load what no device here can run
    try:
        bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}  # a host has four by default
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"topology {topology} cannot be compiled for: {str(error).splitlines()[0]}") from None


def usable_memory(device: Any) -> float:
    """Bytes a device can hold.

    Of a CPU, this machine's memory shared among its devices; of a described GPU what jax takes of it with
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.
    """
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    if device in jax.devices():
        return (device.memory_stats() or {})["bytes_limit"]
    chip = find_chip(device.device_kind)
    assert chip
    return chip.memory if device.platform == "tpu" else 0.92 * chip.memory


@dataclass(frozen=True)
class Plan:
    """A planned run and its devices."""

    config: PlanConfig
    model: GemmaConfig
    mesh: Mesh
    chip: Chip | None  # None: a CPU, which has no nominal peaks
    memory: float  # bytes a device
    dtype: str

    @property
    def update(self) -> UpdateConfig:
        return UpdateConfig.of(self.config)

    @property
    def sample(self) -> ExecutionConfig:
        """How prompts are prefilled, before `decoding` decides on unrolled layers."""
        return ExecutionConfig(ROLLOUT, self.dtype, unroll=self.config.unroll)

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.dtype).itemsize


def make_plan(config: PlanConfig) -> Plan:
    """Checks everything that train.py checks before it loads weights."""
    model, devices = choose_model(config), find_devices(config.topology)
    mesh = make_mesh(config.rollout_tp, devices)
    check_shapes(config, model, mesh)
    described = config.topology != "local"
    dtype = "bfloat16" if described and config.dtype == "auto" else activation_dtype(config.dtype)
    return Plan(config, model, mesh, find_chip(devices[0].device_kind), usable_memory(devices[0]), dtype)


def abstract(shape: Sequence[int], dtype: Any, letters: str, rules: Rules, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(letters, rules)))


def lora_axes(plan: Plan) -> Any:
    """The letters of the adapters; None without LoRA."""
    return adapter_axes(plan.model, plan.update.lora_names) if plan.config.lora_rank else None


def lora_shapes(plan: Plan) -> Any:
    """The shapes of the adapters; None without LoRA."""
    rank = plan.config.lora_rank
    return adapter_shapes(plan.model, plan.update.lora_names, rank) if rank else None


def stored_weights(plan: Plan, dtype: str) -> Params:
    """The weights as they are stored."""
    return abstract_tree(plan, axes(plan.model), shapes(plan.model), dtype)


def abstract_tree(plan: Plan, letters: Any, shapes: Any, dtype: str) -> Any:
    """Weights or adapters as they are stored, by their letters and shapes."""
    return jax.tree.map(lambda a, leaf: abstract(leaf.shape, dtype, a, STORE, plan.mesh), letters, shapes)


def starting_weights(plan: Plan) -> tuple[Any, Params | None]:
    """What is trained, in float32, and the frozen base below it, as `grpo.update.starting_point` gives them."""
    if plan.config.lora_rank:
        return abstract_tree(plan, lora_axes(plan), lora_shapes(plan), "float32"), stored_weights(plan, plan.dtype)
    if freezes_table(plan.model, plan.update):
        return split_table(stored_weights(plan, "float32"))[0], split_table(stored_weights(plan, plan.dtype))[1]
    return stored_weights(plan, "float32"), None


@dataclass(frozen=True)
class Program:
    """One program of a step: jitted function, abstract arguments, what else is in memory, letters of its adapters."""

    function: Any
    arguments: tuple
    beside: list[Any]
    adapters: Any = None

    def lower(self) -> Any:
        return self.function.lower(*self.arguments)


def abstract_batch(plan: Plan) -> Batch:
    """A batch as grpo.rollout leaves it on the devices."""
    config = plan.config
    Q, B, P, C = config.prompts_per_step, config.rows, config.max_prompt_tokens, config.max_new_tokens
    zeros, parts = np.zeros((B, C), np.float32), plan.mesh.size * config.microbatches
    return make_batch(
        np.zeros((Q, P), np.int32), np.full(Q, P, np.int32), zeros.astype(np.int32), row_limits(config, 0), zeros, zeros,
        zeros[:, 0], config.packing, parts, lambda x, letters: abstract(x.shape, x.dtype, letters, TRAIN, plan.mesh),
    )  # fmt: skip


def training(plan: Plan) -> ExecutionConfig:
    """How the update runs, `--remat auto` decided as train.py decides it."""
    config = plan.config
    memory = device_memory(plan.mesh) if config.topology == "local" else plan.memory
    execution = ExecutionConfig(TRAIN, plan.dtype, config.remat, config.unroll)
    return choose_remat(execution, plan.model, abstract_batch(plan), plan.update, plan.mesh, memory)


def decoding(plan: Plan) -> ExecutionConfig:
    """How the rollout decodes, with its layers in a loop or unrolled as train.py decides it."""
    return unroll_decoding(plan.sample, plan.model, plan.config, plan.mesh, plan.memory)


def programs(plan: Plan) -> dict[str, Program]:
    """The programs of one training step, in the order in which they run, with the arguments that `grpo.step` gives them."""
    config, model, on, update = plan.config, plan.model, partial(abstract_like, mesh=plan.mesh), plan.update
    sample = plan.sample
    sampling = Sampling(config.max_new_tokens, STOP_IDS, config.top_k, config.top_p, config.halvings)

    batch, train = abstract_batch(plan), training(plan)
    ungraded = replace(batch, mask=None, advantages=None)  # reference and old policy run while the rewards are computed
    adapters = lora_axes(plan)
    trained, base = starting_weights(plan)
    state = on(partial(init_state, config=update), trained)
    reference = stored_weights(plan, plan.dtype) if config.beta else None
    weights, apart = policy(state.params, base, update), reference  # what the reference has of its own: with LoRA nothing
    if base is not None and reference is not None:
        apart = None if config.lora_rank else split_table(reference)[0]
    params = on(partial(sampling_params, model=model, execution=sample), weights)
    prompts = abstract([config.prompts_per_step, config.max_prompt_tokens], "int32", "QP", TRAIN, plan.mesh)
    prefilled = on(partial(prefill, config=model, execution=sample), params, prompts, batch.lengths)
    temperatures, limits = (abstract([config.rows], dtype, "B", TRAIN, plan.mesh) for dtype in ("float32", "int32"))
    keys = on(lambda rows: row_keys(config.seed, 0, rows), limits)
    logprobs = on(partial(completion_logprobs, model=model, execution=train, config=update), weights, ungraded)
    old = logprobs if config.updates_per_rollout > 1 else None
    full_batch = replace(batch, ref_logprobs=logprobs if config.beta else None, old_logprobs=old)
    rate, rows = config.learning_rate, (keys, temperatures, limits)
    in_place = plan.mesh.size == 1 or (not config.lora_rank and plan.mesh.shape["fsdp"] == 1)
    unmoved = base if in_place else None  # `sampling_params` does not copy it: sampling reads the base itself
    beside = [state, apart if unmoved else reference or base]
    found = {
        "sampling_params": Program(moved_params, (weights, model, sample), [state.opt_state, apart, unmoved], adapters),
        "prefill": Program(prefill, (params, prompts, batch.lengths, model, sample), beside),
        "decode": Program(decode, (params, prefilled, *rows, model, decoding(plan), sampling), beside),
    }
    if reference is not None:
        found["reference"] = Program(completion_logprobs, (reference, ungraded, model, train, update), [state])
    if old is not None:
        arguments = weights, ungraded, model, train, update
        found["old"] = Program(completion_logprobs, arguments, [state.opt_state, apart], adapters)
    found["update"] = Program(train_step, (state, full_batch, rate, model, train, update, base), [apart], adapters)
    return found


def bounds(plan: Plan) -> dict[str, roofline.Bound]:
    """The bound of each program, with every prompt at full length; none on a CPU."""
    config, model, chip = plan.config, plan.model, plan.chip
    if chip is None:
        return {}
    devices, tp, width = plan.mesh.size, plan.mesh.shape["tp"], plan.width
    prompts, lengths = [config.max_prompt_tokens] * config.prompts_per_step, row_limits(config, 0).tolist()
    tokens = sum(prompts) + sum(lengths), sum(lengths), roofline.group_products(model, prompts, lengths)
    forward = roofline.logprobs_bound(model, chip, devices, *tokens, width=width)
    adapters = count_adapters(model, plan.update.lora_names, config.lora_rank)
    return {
        "sampling_params": roofline.sampling_params_bound(model, chip, devices, tp, width=width, adapters=adapters),
        "prefill": roofline.prefill_bound(model, chip, devices, tp, prompts, width=width),
        "decode": roofline.decode_bound(model, chip, devices, tp, prompts, lengths, width=width),
        "reference": forward,
        "old": forward,
        "update": roofline.update_bound(model, chip, devices, *tokens, width=width, adapters=adapters),
    }


def weight_shapes(plan: Plan, adapters: Any) -> set[tuple[int, ...]]:
    """Each matrix as it may travel: whole or a device's part, one layer or all; sizes sorted, as gradients come transposed."""
    found = set()
    letters, sizes = (axes(plan.model), adapters), (shapes(plan.model), lora_shapes(plan) if adapters else None)
    for leaf, size in zip(jax.tree.leaves(letters), jax.tree.leaves(sizes), strict=True):
        shape = size.shape
        for rules in (Rules(), STORE, ROLLOUT):
            part = NamedSharding(plan.mesh, spec(leaf, rules)).shard_shape(shape)
            found |= {part, part[1:]} if leaf.startswith("L") else {part}
    return {tuple(sorted(shape)) for shape in found if len(shape) > 1}


def examine(program: Program, plan: Plan) -> dict[str, Any]:
    """Compile a program: its memory a device, and what it receives and copies; of loops until rows stop, in one trip, the most.

    `peak_gib` is the most that lives at a time, arguments included, and None when the compiler finds no way to make it fit.
    """
    beside = sum(device_bytes(tree) for tree in program.beside)
    start = time.monotonic()
    try:
        built = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"peak_gib": None, "beside_gib": beside / GIB, "error": str(error).splitlines()[0]}
    module = replace(hlo.parse(built.as_text()), branch=FAR)  # attention reads the whole cache
    open_loops = hlo.open_loops(module)
    trips = [(loop.condition, loop.body) for loop in open_loops] or [(module.entry,)]
    weights = weight_shapes(plan, program.adapters)
    moved = [traffic(module, parts, weights, plan) for parts in trips]
    heaviest = max(moved, key=lambda figures: figures["collective_bytes_per_step"])
    return {
        "peak_gib": built.memory_analysis().peak_memory_in_bytes / GIB,
        "beside_gib": beside / GIB,
        **{name: max(figures[name] for figures in moved) for name in heaviest if name != "collectives"},
        "aliased_inputs": len(module.aliases),
        "compile_seconds": time.monotonic() - start,
        **estimate(module, hlo.outermost(module, open_loops), plan),
        "collectives": heaviest["collectives"],
    }


@dataclass(frozen=True)
class Estimate:
    """What the compiler of a TPU expects: milliseconds of instructions, asynchronous copies, and traffic between chips."""

    cycles_ms: float = 0.0
    dma_ms: float = 0.0
    ici_ms: float = 0.0
    from_ms: float = 0.0  # all of them overlapped
    to_ms: float = 0.0  # one after the other

    @classmethod
    def of(cls, module: hlo.Module, chip: Chip, *computations: str) -> "Estimate":
        cycles = sum(cost.cycles * cost.times for cost in hlo.costs(module, *computations))
        network = sum(chip.network(collective.bytes, collective.group) for collective in hlo.collectives(module, *computations))
        assert chip.clock
        parts = cycles / chip.clock, hlo.moved_bytes(module, *computations) / chip.bandwidth, network
        cycles_ms, dma_ms, ici_ms = (1e3 * seconds for seconds in parts)
        return cls(cycles_ms, dma_ms, ici_ms, max(cycles_ms, dma_ms, ici_ms), cycles_ms + dma_ms + ici_ms)

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Estimate":
        return Estimate(*(times * value for value in astuple(self)))


def estimate(module: hlo.Module, loops: list[hlo.Loop], plan: Plan) -> dict[str, Any]:
    """The compiler's estimate of a program; with open loops that of a mean step, of each loop and of what is outside them.

    Empty where the compiler estimates no cycles (CPU, GPU), and where the loops are not those of the sampler. `estimate_ms` is
    that of the whole program, from all overlapped to nothing overlapped.
    """
    chip, config = plan.chip, plan.config
    if chip is None or chip.clock is None or not hlo.costs(module):
        return {}
    rows = row_limits(config, 0), plan.mesh.size, config.max_new_tokens, config.halvings
    sizes = decode_loops(*rows, decoding(plan).unroll) if loops else []
    if len(sizes) != len(loops):
        return {}
    rest = replace(module, trips={loop.body: 0 for loop in loops})
    whole, counted = Estimate.of(rest, chip), [(hlo.costs(rest), 1)]
    figures: dict[str, Any] = asdict(whole)
    if loops:
        figures["loops"], inside = [], Estimate()
        for loop, stages in zip(loops, sizes, strict=True):
            for branch, stage in enumerate(stages):
                chosen, steps = replace(module, branch=branch), stage["steps"]
                each = Estimate.of(chosen, chip, loop.condition, loop.body)
                figures["loops"].append(stage | asdict(each))
                counted.append((hlo.costs(chosen, loop.condition, loop.body), steps))
                inside += each * steps
        total = sum(steps for _, steps in counted[1:])
        figures |= asdict(inside * (1 / total)) | {"outside_loops": asdict(whole)}
        whole += inside
    if config.costliest:
        figures["costliest"] = costliest(counted, chip, config.costliest)
    return figures | {"estimate_ms": [whole.from_ms, whole.to_ms]}


def decode_loops(lengths: np.ndarray, devices: int, width: int, halvings: int, unroll: bool) -> list[list[dict[str, int]]]:
    """Each loop of models.sampler.decode, of rows that end at `lengths` B, as stages that read more and more of the cache.

    A stage has rows a device, the slots that attention reads, and steps; its place is that of the branch that runs.
    """
    rows, count, slots, found = len(lengths) // devices, 0, -(-width // 2) if unroll else width, []
    longest = -np.sort(-lengths.reshape(devices, rows))  # the rows of each device, the longest first
    while rows:
        keep = rows // 2 if halvings and rows % 2 == 0 else 0
        end = max(int(longest[:, keep].max()), count)  # no device has more than `keep` rows alive
        if unroll and not found:
            count = min(end, slots)
            found.append([{"rows": rows, "slots": slots, "steps": count}])
        starts = [0, *read_widths(width, None if unroll else width)]
        stages = zip(starts[1:], starts[:-1], [*starts[1:-1], FAR], strict=True)
        found.append(
            [{"rows": rows, "slots": read, "steps": max(min(end, stop) - max(count, start), 0)} for read, start, stop in stages]
        )
        rows, halvings, count = keep, halvings - 1, end
    return found


def shape_text(shapes: tuple[hlo.Shape, ...]) -> str:
    """`f32[2,4] u32[]`"""
    return " ".join(f"{shape.dtype}{list(shape.dims)}".replace(" ", "") for shape in shapes)


def costliest(parts: list[tuple[list[hlo.Cost], int]], chip: Chip, count: int) -> list[dict[str, Any]]:
    """The instructions with the most estimated cycles in a whole program: its parts, and how often each runs.

    Those of one source and shape are taken together.
    """
    cycles, times = Counter(), Counter()
    for cost, runs in ((cost, runs) for costs, runs in parts for cost in costs):
        key = cost.label, shape_text(cost.operation.shapes)
        cycles[key] += cost.cycles * cost.times * runs
        times[key] += cost.times * runs
    assert chip.clock
    total = max(cycles.total(), 1)
    return [
        {"name": key[0], "shape": key[1], "times": times[key], "ms": 1e3 * value / chip.clock, "share": value / total}
        for key, value in cycles.most_common(count)
    ]


def traffic(module: hlo.Module, parts: tuple[str, ...], weights: set[tuple[int, ...]], plan: Plan) -> dict[str, Any]:
    """What a device receives and copies while `parts` of a program run once."""
    moved = hlo.collectives(module, *parts)
    gathered, reduced = weight_traffic(moved, weights, plan)
    return {
        "collective_bytes_per_step": sum(collective.bytes for collective in moved),
        "weight_bytes_gathered_per_step": gathered,
        "gradient_bytes_reduced_per_step": reduced,
        "copied_bytes_per_step": hlo.copied_bytes(hlo.copies(module, parts[-1], LARGE)),
        "collectives": grouped(moved),
    }


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def weight_traffic(moved: list[hlo.Collective], weights: set[tuple[int, ...]], plan: Plan) -> tuple[float, float]:
    """Bytes received of weights on their way to where they are used, and of their gradients on the way back.

    Told by their shapes; [rows, D] is taken for activations even where some matrix has that shape too. A permutation is
    counted with the gradients: the TPU compiler sums them in rings, a product a hop.
    """
    counts = plan.config.prompts_per_step, plan.config.rows
    rows = {count // parts for count in counts for parts in (1, plan.mesh.shape["fsdp"], plan.mesh.shape["tp"], plan.mesh.size)}

    def is_weight(collective: hlo.Collective) -> bool:
        dims = [tuple(size for size in shape.dims if size > 1) for shape in collective.shapes]
        return any(tuple(sorted(d)) in weights and not (d[0] in rows and d[-1] == plan.model.embed_dim) for d in dims)

    of_weights = [collective for collective in moved if is_weight(collective)]
    gathered = sum(collective.bytes for collective in of_weights if collective.kind == "all-gather")
    return gathered, sum(collective.bytes for collective in of_weights) - gathered


def grouped(moved: list[hlo.Collective]) -> list[dict[str, Any]]:
    """Collectives of one kind and shape taken together, the heaviest first."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for collective in moved:
        shape = shape_text(collective.shapes)
        group = groups.setdefault((collective.kind, shape), {"kind": collective.kind, "shape": shape, "times": 0, "bytes": 0.0})
        group["times"] += collective.times
        group["bytes"] += collective.bytes
    return sorted(groups.values(), key=lambda group: -group["bytes"])


def total_gib(figures: dict[str, Any]) -> float:
    """What a device holds while a program runs; infinite for one that cannot be compiled to fit."""
    return math.inf if figures["peak_gib"] is None else figures["peak_gib"] + figures["beside_gib"]


def find_largest(needs: Callable[[int], float], unit: int, size: int, need: float, fixed: float, limit: float) -> int:
    """The largest multiple of `unit` whose need is at most `limit`; 0 if there is none.

    `size` is known to need `need`. Needs grow with the size, about linearly from `fixed`: the line says where to look next.
    """
    fits, fails = 0, math.inf
    while True:
        if need <= limit:
            fits = max(fits, size)
        else:
            fails = min(fails, size)
        if fails - fits <= unit:
            return fits // unit * unit
        guess = (fits + fails) / 2 if math.isinf(need) else size * min((limit - fixed) / (need - fixed), 8)
        size = int(min(max(guess // unit, fits // unit + 1) * unit, fails - unit))
        need = needs(size)


def search(plan: Plan, figures: dict[str, Any]) -> dict[str, int]:
    """The largest prompts_per_step, and apart from it the largest max_new_tokens, with which decode and update fit."""
    config, limit = plan.config, plan.memory / GIB
    binding = ("decode", "update")
    trained, base = starting_weights(plan)
    state, base = 3 * device_bytes(trained), device_bytes(base)
    fixed = figures["update"]["beside_gib"] + (state + base) / GIB
    need = max(total_gib(figures[name]) for name in binding)
    found = {}
    for field, unit in (("prompts_per_step", plan.mesh.size * config.microbatches), ("max_new_tokens", 64)):

        def needs(size: int, field: str = field) -> float:
            print(f"search      {field} {size}", file=sys.stderr, flush=True)
            other = replace(plan, config=replace(config, **{field: size}))
            parts = programs(other)
            return max(total_gib(examine(parts[name], other)) for name in binding)

        found[field] = find_largest(needs, unit, getattr(config, field), need, fixed, limit)
    return found


def autotune(plan: Plan, figures: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """For every rollout_tp the estimate of a rollout, and what a device holds in it; both None where a program cannot be
    compiled to fit. `figures` are those of the plan itself."""
    found = {}
    for tp in layouts(plan.mesh.size):
        if tp == plan.mesh.shape["tp"]:
            rows = [figures[name] for name in ROLLOUT_PROGRAMS]
        else:
            print(f"autotune    rollout_tp {tp}", file=sys.stderr, flush=True)
            other = make_plan(replace(plan.config, rollout_tp=tp))
            with jax.set_mesh(other.mesh):
                parts = programs(other)
                rows = [examine(parts[name], other) for name in ROLLOUT_PROGRAMS]
        found[tp] = dict.fromkeys(("estimate_ms", "needed_gib_per_chip"))
        if math.isfinite(needed := max(map(total_gib, rows))):
            ends = zip(*(row["estimate_ms"] for row in rows), strict=True)
            found[tp] = {"estimate_ms": [sum(end) for end in ends], "needed_gib_per_chip": needed}
    return found


def best_layout(tuned: dict[int, dict[str, Any]], memory: float) -> int | None:
    """The rollout_tp with the least estimate, halfway between its ends, of those that fit `memory` GiB; None if none does."""
    fitting = [tp for tp, row in tuned.items() if row["estimate_ms"] and row["needed_gib_per_chip"] <= memory]
    return min(fitting, key=lambda tp: sum(tuned[tp]["estimate_ms"]), default=None)


def layout_lines(tuned: dict[int, dict[str, Any]], best: int | None) -> str:
    """A line for every rollout_tp."""
    lines = ["the compiler's estimate of a rollout:"]
    for tp, row in tuned.items():
        told = "does not fit"
        if row["estimate_ms"]:
            start, end = (ms / 1e3 for ms in row["estimate_ms"])
            told = f"from {start:.2f} to {end:.2f} s, {row['needed_gib_per_chip']:.2f} GiB a device"
        lines.append(f"  rollout_tp {tp:2}  {told}")
    return "\n".join([*lines, f"best      rollout_tp {best}" if best else "none fits"])


def table(plan: Plan, figures: dict[str, Any]) -> str:
    """One line a program, then what the chips send each other in one step of decoding."""
    config, mesh = plan.config, plan.mesh
    lines = [
        f"{config.model or config.preset} on {mesh.size} x {mesh.devices.flat[0].device_kind} of {plan.memory / GIB:.2f} GiB, "
        f"fsdp {mesh.shape['fsdp']} x tp {mesh.shape['tp']}, {plan.dtype}",
        f"{config.prompts_per_step} prompts x {config.group_size} completions, {config.max_prompt_tokens} + "
        f"{config.max_new_tokens} tokens, remat {training(plan).remat}, microbatches {config.microbatches}",
        f"{'':15}{'GiB a device':^20}{'MB a device, of decode in a step':>33}",
        f"{'program':15}{'own':>6}{'beside':>7}{'total':>7}{'received':>10}{'weights':>8}{'copied':>8}"
        f"{'bound ms':>10}{'comp. s':>8}",
    ]
    for name, row in figures.items():
        if row["peak_gib"] is None:
            lines.append(f"{name:15}does not fit: {row['error']}")
            continue
        parts = ("collective_bytes_per_step", "weight_bytes_gathered_per_step", "copied_bytes_per_step")
        received, weights, copied = (row[part] / 1e6 for part in parts)
        bound = f"{row['bound_ms']:10.2f}" if "bound_ms" in row else f"{'-':>10}"
        lines.append(
            f"{name:15}{row['peak_gib']:6.2f}{row['beside_gib']:7.2f}{total_gib(row):7.2f}{received:10.1f}{weights:8.1f}"
            f"{copied:8.1f}{bound}{row['compile_seconds']:8.1f}"
        )
    lines += estimates(figures)
    moved = figures["decode"].get("collectives", [])
    if moved:
        lines.append("one step of decoding receives:")
    lines += [f"{c['bytes'] / 1e6:9.3f} MB  {c['kind']} x {c['times']} of {c['shape']}" for c in moved[:8]]
    return "\n".join(lines)


def estimates(figures: dict[str, Any]) -> list[str]:
    """Lines of the compiler's estimates, in milliseconds beside the bound; none where it gives none."""
    known = {name: row for name, row in figures.items() if "cycles_ms" in row}

    def line(name: str, row: dict[str, Any], bound: float | None = None) -> str:
        parts = (row[f"{part}_ms"] for part in ("cycles", "dma", "ici", "from", "to"))
        return f"{name:31}{'-' if bound is None else f'{bound:.2f}':>8}" + "".join(f"{part:8.2f}" for part in parts)

    lines = []
    if known:
        lines.append("the compiler's estimate in ms, of decode a mean step; nothing ran on a TPU")
        lines.append(f"{'program':31}{'bound':>8}{'cycles':>8}{'dma':>8}{'ici':>8}{'from':>8}{'to':>8}")
    for name, row in known.items():
        lines.append(line(name, row, row.get("bound_ms_per_step", row["bound_ms"])))
        for loop in (loop for loop in row.get("loops", []) if loop["steps"]):
            lines.append(line(f"  {loop['rows']} rows, {loop['slots']} slots, {loop['steps']} steps", loop))
        if "outside_loops" in row:
            lines.append(line("  once, outside the loops", row["outside_loops"]))
    for name, row in known.items():
        if "costliest" in row:
            lines.append(f"costliest of {name}, the whole program: ms, share, times, shape, source")
        for part in row.get("costliest", []):
            share = f"{100 * part['share']:.1f}%"
            lines.append(f"{part['ms']:9.2f}{share:>7}{part['times']:>7}  {part['shape'][:24]:24} {part['name'][-30:]}")
    return lines


def main(argv: list[str]) -> dict[str, Any]:
    plan = make_plan(parse(PlanConfig, argv, __doc__ or "", STARTS))
    figures: dict[str, Any] = {}
    if plan.config.autotune and (plan.chip is None or plan.chip.clock is None):
        hint = "on the devices of this machine scripts/benchmark.py --autotune measures"
        raise ConfigError(f"autotune needs a TPU's compiler, and topology is {plan.config.topology}: use v5e:2x4; {hint}")
    with jax.set_mesh(plan.mesh):
        for name, program in programs(plan).items():
            print(f"compiling   {name}", file=sys.stderr, flush=True)
            figures[name] = examine(program, plan)
        for name, bound in bounds(plan).items():
            if name in figures:
                figures[name]["bound_ms"] = 1e3 * bound.seconds
        if "bound_ms" in figures["decode"]:
            figures["decode"]["bound_ms_per_step"] = figures["decode"]["bound_ms"] / int(row_limits(plan.config, 0).max())
        print(table(plan, figures), flush=True)
        summary = summarise(plan, figures)
        print(verdict(plan, summary), flush=True)
        if plan.config.search:
            summary["largest"] = search(plan, figures)
            print("largest   " + ", or ".join(f"{name} {size}" for name, size in summary["largest"].items()), flush=True)
    if plan.config.autotune:
        tuned = autotune(plan, figures)
        best = best_layout(tuned, plan.memory / GIB)
        print(layout_lines(tuned, best), flush=True)
        summary |= {"autotune": tuned, "best_rollout_tp": best}
    return summary | {"programs": figures}


def summarise(plan: Plan, figures: dict[str, Any]) -> dict[str, Any]:
    """What holds of the step as a whole."""
    config, needed = plan.config, max(total_gib(row) for row in figures.values())
    repeats = {"update": config.updates_per_rollout}
    times = [row["bound_ms"] * repeats.get(name, 1) for name, row in figures.items() if "bound_ms" in row]
    ends = [(row["estimate_ms"], repeats.get(name, 1)) for name, row in figures.items() if "estimate_ms" in row]
    estimated = [sum(end[i] * runs for end, runs in ends) for i in (0, 1)] if len(ends) == len(figures) else None
    return {
        "topology": config.topology,
        "devices": plan.mesh.size,
        "model": config.model or config.preset,
        "fits": needed <= plan.memory / GIB,
        "hbm_gib_per_chip": plan.memory / GIB,
        "needed_gib_per_chip": needed if math.isfinite(needed) else None,
        "bound_ms": sum(times) if times else None,
    } | ({"estimate_ms": estimated} if estimated else {})  # fmt: skip


def verdict(plan: Plan, summary: dict[str, Any]) -> str:
    fits, needed, bound = summary["fits"], summary["needed_gib_per_chip"], summary["bound_ms"]
    size = f"{needed:.2f} of " if needed else "more than "
    line = f"{'fits' if fits else 'does not fit'}: {size}{plan.memory / GIB:.2f} GiB a device"
    line += f"; a step takes {bound / 1e3:.2f} s at least" if bound else ""
    if "estimate_ms" in summary:
        start, end = (ms / 1e3 for ms in summary["estimate_ms"])
        line += f"\nthe compiler's estimate of a step's programs: from {start:.2f} to {end:.2f} s"
    return line


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
