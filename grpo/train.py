"""The loop: roll out, score, compare with the reference, update; as often as the plan says.

`train_step` is one optimizer update on a rollout, `train` the run around it. A step is one rollout and its
`updates_per_rollout` updates. Left out: relay sessions and their reviews.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh

from data.arithmetic import make_problems
from data.batches import step_indices
from data.problems import Problem, load_problems, question_key, split_problems
from data.prompts import drop_long
from data.tokenizer import Tokenizer, load_tokenizer
from grpo.alarms import alarms, dead_steps, diagnose
from grpo.checkpoint import Checkpoints, digest
from grpo.config import Config, ConfigError, RunError
from grpo.evaluate import evaluate
from grpo.loss import dapo_weights, dr_grpo_weights, grpo_loss, grpo_weights
from grpo.metrics import CompileCounter, JsonLines, Progress, clock
from grpo.rollout import Batch, rollout
from grpo.workers import UserRewards
from models import ModelError
from models.convert import load_params, read_config
from models.gemma import Compute, GemmaConfig, Params, axes, forward_group, shapes, token_logprobs
from models.sharding import ROLLOUT, STORE, TRAIN, activation_dtype, check_divides, make_mesh

AGGREGATIONS = {"grpo": grpo_weights, "dapo": dapo_weights, "dr_grpo": dr_grpo_weights}

# What a resumed run may change: how long it goes on, what it looks at, and how it uses the machine.
FREE_TO_CHANGE = {
    "run_dir", "model_path", "data", "max_steps", "epochs", "eval_every", "save_every", "keep_checkpoints", "rollout_tp",
    "remat", "attention", "unroll", "packing", "halvings", "logprob_chunk", "microbatches",
    "reward_timeout", "strict_rewards", "max_dead_steps",
}  # fmt: skip


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds."""

    params: Params  # float32 master weights
    opt_state: Any
    bad_updates: Array  # non-finite updates skipped so far
    bad_in_a_row: Array


def learning_rate(config: Config, updates: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to a tenth of it."""
    warmup = min(config.warmup_steps, updates - 1)
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, max(updates, warmup + 1), peak / 10)


def make_optimizer(config: Config, updates: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(learning_rate(config, updates), config.adam_b1, config.adam_b2, weight_decay=config.weight_decay),
    )


@partial(jax.jit, static_argnames=("config", "updates"))
def init_state(params: Any, config: Config, updates: int) -> TrainState:
    return TrainState(params, make_optimizer(config, updates).init(params), jnp.int32(0), jnp.int32(0))


@partial(jax.jit, static_argnames=("model", "compute"))
def rollout_view(params: Params, model: GemmaConfig, compute: Compute) -> Params:
    """The weights as sampling wants them: cast once a step, laid out so that none moves while decoding."""
    return compute.use(params, axes(model))


def logprobs_of(params: Params, part: Batch, model: GemmaConfig, compute: Compute, config: Config) -> Array:  # -> BC
    """log π of every completion token, computed on packed rows."""
    packed, at = part.packed, compute.at
    hidden = forward_group(params, part.prompts, part.lengths, packed.tokens, model, compute, packed.positions, packed.segments)
    chunk = max(config.logprob_chunk // len(packed.tokens), 1)
    logprobs = token_logprobs(params, hidden, packed.tokens, config.temperature, model, compute, chunk)
    (B, C), Q = packed.slots.shape, len(part.prompts)
    logprobs = lax.reshape(logprobs, (Q, logprobs.size // Q), out_sharding=at("Q."))
    slots = lax.reshape(packed.slots, (Q, B // Q * C), out_sharding=at("Q."))
    return lax.reshape(jnp.take_along_axis(logprobs, slots, axis=1), (B, C), out_sharding=at("BC"))


def split(tree: Any, Q: int, parts: int, at) -> Any:
    """Every leaf [Q*g, ...] -> [parts, Q/parts*g, ...]: whole groups, each part spread over all devices."""

    def cut(x: Array) -> Array:
        rest = "." * (x.ndim - 1)
        x = lax.reshape(x, (Q // parts, parts, x.shape[0] // Q, *x.shape[1:]), out_sharding=at("Q.." + rest))
        x = jnp.moveaxis(x, 1, 0)
        return lax.reshape(x, (parts, x.shape[1] * x.shape[2], *x.shape[3:]), out_sharding=at(".B" + rest))

    return jax.tree.map(cut, tree)


@partial(jax.jit, static_argnames=("model", "compute", "config"))
def completion_logprobs(params: Params, batch: Batch, model: GemmaConfig, compute: Compute, config: Config) -> Array:
    """log π of every completion token under `params`, at the sampling temperature: the reference's, or the old policy's.  BC"""
    compute = replace(compute, remat="none")  # there is no backward pass
    if config.microbatches == 1:
        return logprobs_of(params, batch, model, compute, config)
    at, (B, C) = compute.at, batch.mask.shape
    Q, n = batch.prompts.shape[0], config.microbatches
    _, picked = lax.scan(
        lambda _, part: (None, logprobs_of(params, part, model, compute, config)), None, split(batch, Q, n, at)
    )
    picked = lax.reshape(picked, (n, Q // n, B // Q, C), out_sharding=at(".Q.."))  # undo split
    return lax.reshape(jnp.moveaxis(picked, 0, 1), (B, C), out_sharding=at("BC"))


@partial(jax.jit, static_argnames=("model", "compute", "config", "updates"), donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, model: GemmaConfig, compute: Compute, config: Config, updates: int
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer update. A non-finite loss or gradient leaves the state as it was, and is counted."""
    weights = AGGREGATIONS[config.aggregation](batch.mask)  # over the whole batch: parts only sum

    def part_loss(params: Params, part: Batch, weights: Array):
        logprobs = logprobs_of(params, part, model, compute, config)
        old = lax.stop_gradient(logprobs) if part.old_logprobs is None else part.old_logprobs
        loss, terms = grpo_loss(
            logprobs, old, part.ref_logprobs, part.advantages, weights, beta=config.beta, epsilon_low=config.epsilon_low,
            epsilon_high=config.epsilon_high, sampler_logprobs=part.sampler_logprobs if config.sampler_cap else None,
            sampler_cap=config.sampler_cap,
        )  # fmt: skip
        return loss, terms | {"logprobs": lax.stop_gradient(logprobs), "old": old}

    def accumulate(total, part):
        (loss, terms), grads = jax.value_and_grad(part_loss, has_aux=True)(state.params, *part)
        return jax.tree.map(jnp.add, total, (loss, grads)), terms

    if config.microbatches == 1:
        (loss, terms), grads = jax.value_and_grad(part_loss, has_aux=True)(state.params, batch, weights)
    else:
        batch, weights = split((batch, weights), len(batch.prompts), config.microbatches, compute.at)
        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
        (loss, grads), terms = lax.scan(accumulate, zero, (batch, weights))

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params: Any = state.params
    changes, opt_state = make_optimizer(config, updates).update(grads, state.opt_state, params)
    params = optax.apply_updates(params, changes)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    new = TrainState(params, opt_state, state.bad_updates + ~finite, jnp.where(finite, 0, state.bad_in_a_row + 1))
    stats = summarise(terms, batch) | {"loss": loss, "grad_norm": grad_norm, "bad_updates": new.bad_updates}
    return new, stats


def summarise(terms: dict[str, Array], batch: Batch) -> dict[str, Array]:
    """Means and extremes of the loss's terms over completion tokens."""
    mask = batch.mask

    def mean(x: Array) -> Array:
        return jnp.where(mask > 0, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)

    def highest(x: Array) -> Array:
        return jnp.where(mask > 0, x, -jnp.inf).max()

    gap = jnp.abs(terms["old"] - batch.sampler_logprobs)
    stats = {
        "ratio/mean": mean(terms["ratio"]),
        "ratio/max": highest(terms["ratio"]),
        "ratio/min": -highest(-terms["ratio"]),
        "clip/low": mean(terms["clipped_low"]),
        "clip/high": mean(terms["clipped_high"]),
        "logp_diff_sampler_trainer/mean": mean(gap),
        "logp_diff_sampler_trainer/max": highest(gap),
    }
    if batch.ref_logprobs is not None:
        stats["kl/k3"] = mean(terms["kl"])
        stats["kl/k3_max"] = highest(terms["kl"])
        stats["kl/k1"] = mean(terms["logprobs"] - batch.ref_logprobs)
    return stats


@dataclass
class Run:
    """What a run works with, loaded and checked."""

    config: Config
    mesh: Mesh
    model: GemmaConfig
    tokenizer: Tokenizer
    problems: list[Problem]
    prompt_ids: list[list[int]]
    eval_problems: list[Problem]
    eval_ids: list[list[int]]
    dropped: int
    rewards: UserRewards
    train: Compute  # how the update and the reference run
    sample: Compute  # how the rollout runs

    @property
    def steps(self) -> int:
        planned = -(-len(self.problems) * self.config.epochs // self.config.prompts_per_step)
        return min(planned, self.config.max_steps) if self.config.max_steps else planned

    @property
    def updates(self) -> int:
        return self.steps * self.config.updates_per_rollout


def choose_remat(compute: Compute, model: GemmaConfig, batch: Batch, microbatches: int, devices: int, memory: float) -> Compute:
    """`auto` becomes `dots`, which keeps the results of products, where `memory`, bytes a device, has room; else `full`.

    Counted: 18 bytes a weight (float32 weights, moments and gradient, the reference), what `dots` keeps for each slot of the
    packed rows, and a fifth of the memory for the rest. Compiled for v5e, Gemma 2 2B at 4,352 slots a chip needs 7.4 GiB by
    `full` and 12.9 by `dots`; this counts 14.3 for the latter.
    """
    if compute.remat != "auto":
        return compute
    weights = sum(leaf.size for leaf in jax.tree.leaves(shapes(model)))
    slots = (batch.prompts.size + batch.packed.tokens.size) / microbatches
    products = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + 2 * model.embed_dim + 2 * model.mlp_dim
    kept = slots * model.num_layers * products * jnp.dtype(compute.dtype).itemsize
    return replace(compute, remat="dots" if (18 * weights + kept) / devices < 0.8 * memory else "full")


def device_memory(mesh: Mesh) -> float:
    """Bytes a device can hold; 0 where it does not say, as a CPU."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 0)


def prepare(config: Config) -> Run:
    """Load and check everything but the weights. Raises ConfigError, DataError or ModelError."""
    if not config.model_path:
        raise ConfigError(f"model_path is needed: preset {config.preset} brings no weights; give a Hugging Face folder")
    mesh = make_mesh(config.rollout_tp)
    model = read_config(config.model_path)
    tokenizer = load_tokenizer(config.model_path)
    check_tokenizer(tokenizer, model)
    check_divides(f"prompts_per_step {config.prompts_per_step} / microbatches {config.microbatches} =",
                  config.prompts_per_step // config.microbatches, mesh)  # fmt: skip
    for name, size in (
        ("hidden_size", model.embed_dim),
        ("intermediate_size", model.mlp_dim),
        ("vocab_size", model.vocab_size),
    ):
        check_divides(name, size, mesh)
    rewards = UserRewards(config.reward, config.reward_timeout, config.strict_rewards)
    problems, eval_problems = choose_problems(config)
    problems, prompt_ids, dropped = drop_long(problems, tokenizer, config.system_prompt, config.max_prompt_tokens)
    eval_ids: list[list[int]] = []
    if eval_problems:
        eval_problems, eval_ids, more = drop_long(eval_problems, tokenizer, config.system_prompt, config.max_prompt_tokens)
        dropped += more
    if len(problems) < config.prompts_per_step:
        raise ConfigError(f"prompts_per_step {config.prompts_per_step} must be at most {len(problems)}, the problems there are")
    dtype = activation_dtype(config.dtype)
    train = Compute(TRAIN, dtype, config.remat, config.unroll, config.attention)
    sample = Compute(ROLLOUT, dtype, unroll=config.unroll)
    return Run(config, mesh, model, tokenizer, problems, prompt_ids, eval_problems, eval_ids, dropped, rewards, train, sample)


def choose_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and to evaluate on; never one in both."""
    if config.data == "arithmetic":
        problems = make_problems(config.new_problems or 4000, config.seed, "train")
        split = config.eval_data.removeprefix("arithmetic:") or "test"
        if split not in ("tune", "test"):
            raise ConfigError(
                f"eval_data {config.eval_data!r} must be arithmetic:tune or arithmetic:test with --data arithmetic"
            )
        return problems, make_problems(config.eval_problems, 0, split)
    problems = load_problems(config.data)
    if config.eval_data:
        held_out = load_problems(config.eval_data)[: config.eval_problems]
        asked = {question_key(problem) for problem in held_out}
        problems = [problem for problem in problems if question_key(problem) not in asked]
    else:
        problems, held_out = split_problems(problems, config.eval_problems, seed=0)
    order = step_indices(0, len(problems), len(problems), config.seed)
    return [problems[i] for i in order[: config.new_problems or None]], held_out


def check_tokenizer(tokenizer: Tokenizer, model: GemmaConfig) -> None:
    """A tokenizer of another family gives ids that mean something else to the model."""
    pieces, rows = tokenizer.vocab_size, model.vocab_size
    if not 0.99 * rows < pieces <= rows:
        raise ModelError(
            f"tokenizer in {tokenizer.folder} has {pieces} pieces, the model {rows} rows: not this model's tokenizer"
        )


def describe(run: Run) -> str:
    """The plan, before anything is spent."""
    config, mesh = run.config, run.mesh
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(run.model)))
    device = mesh.devices.flat[0]
    memory = state_bytes(run, count) / 2**30
    tokens = run.steps * config.rows * config.max_new_tokens
    mu = config.updates_per_rollout
    return "\n".join([
        f"model       {config.model_path}  ({count / 1e6:.1f}M parameters, {run.model.num_layers} layers, {run.train.dtype})",
        f"mesh        {mesh.size} x {device.device_kind}  (fsdp {mesh.shape['fsdp']} x tp {mesh.shape['tp']})",
        f"data        {len(run.problems)} problems from {config.data}, {len(run.eval_problems)} held out, "
        f"{run.dropped} too long and dropped",
        f"a step      {config.prompts_per_step} prompts x {config.group_size} completions = {config.rows} rows, "
        f"at most {config.max_prompt_tokens} + {config.max_new_tokens} tokens",
        f"plan        {run.steps} steps, {mu} update{'s' * (mu > 1)} each, at most {tokens / 1e6:.1f}M sampled tokens",
        f"loss        {config.aggregation}, beta {config.beta}, advantages by {config.advantage_scale}; "
        f"learning rate {config.learning_rate}",
        f"memory      {memory:.2f} GiB a device at least: weights, moments, gradients, reference, sampling weights, KV cache",
        f"run         {run_dir(config)}",
    ])  # fmt: skip


def state_bytes(run: Run, parameters: int) -> float:
    """What a device must hold, activations aside: a lower bound."""
    config, model, n = run.config, run.model, run.mesh.size
    width = jnp.dtype(run.train.dtype).itemsize
    state = parameters * (4 * 4 + (width if config.beta else 0)) / n
    view = parameters * width / run.mesh.shape["tp"]
    slots = config.prompts_per_step * config.max_prompt_tokens + config.rows * config.max_new_tokens
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * slots * width / n
    return state + view + cache


def run_dir(config: Config) -> Path:
    return Path(config.run_dir or f"runs/{config.preset}-seed{config.seed}")


def open_run_dir(config: Config) -> Path:
    """The run's directory, made if need be. A run that it holds may change only what does not touch the result."""
    folder, now = run_dir(config), asdict(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else now
    except OSError as error:
        raise ConfigError(f"run_dir {folder} cannot be used: {error.strerror}; give another --run_dir") from None
    differing = [name for name in now if name not in FREE_TO_CHANGE and saved.get(name) != now[name]]
    if differing:
        changes = ", ".join(f"{name} {saved.get(name)!r} -> {now[name]!r}" for name in differing)
        raise ConfigError(f"{folder} holds a run with other settings ({changes}); use another --run_dir or the same settings")
    return folder


def load_state(run: Run) -> tuple[TrainState, Params | None]:
    """The state before the first step, and the reference: the same weights, frozen, in the dtype of activations."""
    folder, model = run.config.model_path, run.model
    state = init_state(load_params(folder, model, run.mesh, STORE), run.config, run.updates)
    reference = load_params(folder, model, run.mesh, STORE, run.train.dtype) if run.config.beta else None
    return state, reference


def resume(state: TrainState, checkpoints: Checkpoints, run: Run) -> tuple[int, TrainState]:
    """The last checkpoint's step and state; 0 and the given state when there is none."""
    if checkpoints.latest() is None:
        return 0, state
    done, state = checkpoints.restore(state)
    if done > run.steps:
        raise ConfigError(f"{run_dir(run.config)} has {done} steps already; max_steps and epochs plan only {run.steps}")
    print(f"resumed     after step {done}", flush=True)
    return done, state


def train(config: Config) -> dict[str, Any]:
    """The whole run: plan, evaluate, train, save, evaluate. The same call again goes on where it stopped.

    Returns what `scripts/train.py` prints as JSON. Raises ConfigError, DataError or ModelError for the user's mistakes.
    """
    start, compiles = time.monotonic(), CompileCounter()
    run = prepare(config)
    folder = open_run_dir(config)
    print(describe(run), flush=True)
    with jax.set_mesh(run.mesh), run.rewards:
        state, reference = load_state(run)
        checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        done, state = resume(state, checkpoints, run)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        metrics_log, completions, evaluations = (
            JsonLines(folder / f"{name}.jsonl", done) for name in ("metrics", "completions", "evaluations")
        )
        before = recorded(0, evaluations) if done else accuracy(0, state, evaluations, run)
        progress, recompilations = Progress(run.steps), 0
        for step in range(done + 1, run.steps + 1):
            compiled = compiles.count
            state, metrics, records = one_step(step, state, reference, run)
            metrics["compiles"] = compiles.count - compiled
            recompilations += metrics["compiles"] if step > done + 1 else 0
            history = [*metrics_log.records, {"step": step, **metrics}]
            active, before_it = alarms(history), history[-2]["alarms"] if step > 1 else []
            metrics_log.write({**history[-1], "alarms": list(active)})
            completions.write_all(records)
            progress.show(step, metrics)
            for name, line in active.items():
                if name not in before_it:
                    progress.warn(f"{name}: {line}")
            if metrics["bad_updates_in_a_row"] >= config.max_bad_updates:
                count = metrics["bad_updates_in_a_row"]
                raise FloatingPointError(f"step {step}: {count} non-finite updates in a row; try a lower learning_rate")
            if step % config.save_every == 0 or step == run.steps:
                checkpoints.save(step, state, {"step": step})
            if config.max_dead_steps and dead_steps(metrics_log.records) >= config.max_dead_steps:
                raise RunError(diagnose(metrics_log.records))
            if config.eval_every and step % config.eval_every == 0:
                accuracy(step, state, evaluations, run)
        checkpoints.close()
        after = accuracy(run.steps, state, evaluations, run)
        result = {
            "run_dir": str(folder),
            "preset": config.preset,
            "seed": config.seed,
            "steps": run.steps,
            "seconds": round(time.monotonic() - start, 1),
            "accuracy_before": before,
            "accuracy_after": after,
            "reward_first": metrics_log.records[0]["reward"],
            "reward_last": metrics_log.records[-1]["reward"],
            "recompilations": recompilations,
            "params_digest": digest(state.params),
        }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(closing_table(result), flush=True)
    return result


def recorded(step: int, evaluations: JsonLines) -> dict[str, Any] | None:
    return next((record["accuracy"] for record in evaluations.records if record["step"] == step), None)


def accuracy(step: int, state: TrainState, evaluations: JsonLines, run: Run) -> dict[str, Any] | None:
    """The evaluation after `step`: measured once, then read from the record. None without held-out problems."""
    known = recorded(step, evaluations)
    if known or not run.eval_problems:
        return known
    start = time.perf_counter()
    view = rollout_view(state.params, run.model, run.sample)
    figures = evaluate(view, run.eval_problems, run.eval_ids, run.tokenizer, run.model, run.sample, run.config, run.rewards)
    evaluations.write({"step": step, "time/eval": time.perf_counter() - start, "accuracy": figures})
    return figures


def one_step(
    step: int, state: TrainState, reference: Params | None, run: Run
) -> tuple[TrainState, dict[str, Any], list[dict[str, Any]]]:
    """Rollout and updates: the state after them, the step's metrics, a record of each completion."""
    config, model, start = run.config, run.model, time.perf_counter()
    chosen = step_indices(step - 1, config.prompts_per_step, len(run.problems), config.seed)
    view = rollout_view(state.params, model, run.sample)
    batch, records, metrics = rollout(
        view, [run.problems[i] for i in chosen], [run.prompt_ids[i] for i in chosen], step, run.tokenizer, model, run.sample,
        config, run.rewards,
    )  # fmt: skip
    del view  # its memory is the update's
    metrics["tokens_per_s/decode"] = sum(record["length"] for record in records) / metrics["time/decode"]

    began = time.perf_counter()
    if reference is not None:
        batch = replace(batch, ref_logprobs=completion_logprobs(reference, batch, model, run.train, config))
    if config.updates_per_rollout > 1:
        batch = replace(batch, old_logprobs=completion_logprobs(state.params, batch, model, run.train, config))
    jax.block_until_ready(batch)
    metrics["time/reference"] = time.perf_counter() - began

    began = time.perf_counter()
    stats: dict[str, Any] = {}
    compute = choose_remat(run.train, model, batch, config.microbatches, run.mesh.size, device_memory(run.mesh))
    for _ in range(0 if metrics["skipped_update"] else config.updates_per_rollout):
        state, stats = train_step(state, batch, model, compute, config, run.updates)
    stats = {name: float(value) for name, value in jax.device_get(stats).items()}
    metrics["time/update"] = time.perf_counter() - began
    metrics["bad_updates_in_a_row"] = int(state.bad_in_a_row)
    memory = run.mesh.devices.flat[0].memory_stats() or {}
    metrics["hbm_peak"] = memory.get("peak_bytes_in_use", 0)
    metrics["lr"] = float(np.asarray(learning_rate(config, run.updates)(step * config.updates_per_rollout - 1)))
    metrics["time/step"] = time.perf_counter() - start
    metrics["tokens_per_s/total"] = sum(record["length"] for record in records) / metrics["time/step"]
    return state, metrics | stats, records


def closing_table(result: dict[str, Any]) -> str:
    """What came of it, and where it lies."""
    lines = []
    before, after = result["accuracy_before"], result["accuracy_after"]
    if before and after:

        def row(name: str, key: str, form: str) -> str:
            shown = ["-" if figures[key] is None else format(figures[key], form) for figures in (before, after)]
            return f"{name:24}{shown[0]:>10}{shown[1]:>10}"

        interval = [f"{100 * figures['low']:.0f}-{100 * figures['high']:.0f}%" for figures in (before, after)]
        lines += [
            f"\n{'':24}{'before':>10}{'after':>10}",
            row(f"accuracy, greedy (N={after['n']})", "greedy", ".1%"),
            f"{'  95% interval':24}{interval[0]:>10}{interval[1]:>10}",
            row("accuracy, sampled", "sampled", ".1%"),
            row("format right, sampled", "sampled_format", ".1%"),
            row("reward, sampled", "sampled_reward", ".2f"),
            row("length, sampled", "sampled_length", ".1f"),
        ]
    seed = result["seed"] + 1
    tiny = f"python scripts/train.py --seed {seed}"
    example = tiny if result["preset"] == "tiny" else f"the same with --seed {seed} --run_dir ANOTHER"
    lines += [
        f"\n{result['steps']} steps in {clock(result['seconds'])}, {result['recompilations']} recompilations",
        f"files  {result['run_dir']}: metrics, completions and evaluations.jsonl, config and result.json, checkpoints/",
        f"next   {example}      another seed: how far does luck go?",
    ]
    return "\n".join(lines)
