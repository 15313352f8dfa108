"""What a run works with: loaded, checked and described before anything is spent; its directory, and whom it belongs to.

Left out: weights and the loop (train.py).
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data.arithmetic import make_problems
from data.batches import epoch_order
from data.problems import Problem, load_problems, question_key, split_problems
from data.prompts import drop_long
from data.tokenizer import Tokenizer, load_tokenizer
from grpo.config import Config, ConfigError
from grpo.runs.distributed import broadcast_from_main, is_main_process
from grpo.runs.model_source import Model, find_model
from grpo.session import Session, plan_sessions
from grpo.runs.trackers import check_installed
from grpo.update import resting_bytes
from grpo.runs.reward_worker import UserRewards
from models import ModelError
from models.gemma import ExecutionConfig, GemmaConfig, shapes
from models.lora import adapter_shapes, count_adapters
from models.sharding import ROLLOUT, TRAIN, activation_dtype, check_divides, make_mesh

# What a resumed run may change: how long it goes on, what it looks at, and how it uses the machine. A path may change, not what
# it leads to: that has a fingerprint.
FREE_TO_CHANGE = {
    "run_dir", "relay_from", "model_path", "base_path", "data", "session", "max_steps", "epochs", "max_hours", "eval_every",
    "retention_problems", "save_every", "save_minutes", "keep_checkpoints", "async_save", "allow_change", "coordinator",
    "processes", "process_id", "rollout_tp", "remat", "unroll", "packing", "halvings", "logprob_chunk",
    "microbatches", "track", "reward_timeout", "strict_rewards", "max_zero_variance_steps", "inspect_groups",
}  # fmt: skip


@dataclass
class Run:
    """What a run works with, loaded and checked."""

    config: Config
    mesh: Mesh
    base: Model  # what the first step starts from
    model: GemmaConfig
    tokenizer: Tokenizer
    problems: list[Problem]
    prompt_ids: list[list[int]]
    eval_problems: list[Problem]
    eval_ids: list[list[int]]
    dropped: list[Problem]  # their prompts are too long
    rewards: UserRewards
    sessions: list[Session]
    train: ExecutionConfig  # how the update and the reference run
    sample: ExecutionConfig  # how the rollout runs

    @property
    def steps(self) -> int:
        """Of all sessions up to the last one that is asked for."""
        return self.sessions[(self.config.session or len(self.sessions)) - 1].end


def prepare(config: Config) -> Run:
    """Load and check everything but the weights. Raises ConfigError, DataError or ModelError."""
    if not config.model_path:
        raise ConfigError(f"model_path is needed: preset {config.preset} brings no weights; give a model folder")
    check_installed(config.track)
    mesh = make_mesh(config.rollout_tp)
    base = find_model(config.model_path, config.base_path, config.adapter_alpha)
    model = base.config
    check_shapes(config, model, mesh)
    tokenizer = load_tokenizer(base.folder)
    check_tokenizer(tokenizer, model)
    rewards = UserRewards(config.reward if is_main_process() else "", config.reward_timeout, config.strict_rewards)
    problems, eval_problems = choose_problems(config)
    problems, prompt_ids, dropped = drop_long(problems, tokenizer, config.system_prompt, config.max_prompt_tokens)
    eval_ids: list[list[int]] = []
    if eval_problems:
        eval_problems, eval_ids, more = drop_long(eval_problems, tokenizer, config.system_prompt, config.max_prompt_tokens)
        dropped += more
    sessions = plan_sessions(config, len(problems))
    dtype = activation_dtype(config.dtype)
    train = ExecutionConfig(TRAIN, dtype, config.remat, config.unroll)
    sample = ExecutionConfig(ROLLOUT, dtype, unroll=config.unroll)
    return Run(
        config, mesh, base, model, tokenizer, problems, prompt_ids, eval_problems, eval_ids, dropped, rewards, sessions, train,
        sample,
    )  # fmt: skip


def check_shapes(config: Config, model: GemmaConfig, mesh: Mesh) -> None:
    """What is cut over devices must divide over them; an adapter is thinner than its projection."""
    parts = config.prompts_per_step // config.microbatches
    check_divides(f"prompts_per_step {config.prompts_per_step} / microbatches {config.microbatches} =", parts, mesh)
    sizes = {"hidden_size": model.embed_dim, "intermediate_size": model.mlp_dim, "vocab_size": model.vocab_size}
    for name, size in sizes.items():
        check_divides(name, size, mesh)
    for name, adapter in adapter_shapes(model, config.lora_names, config.lora_rank).items() if config.lora_rank else ():
        rows, columns = adapter.a.shape[1], adapter.b.shape[2]
        if config.lora_rank > min(rows, columns):
            raise ConfigError(f"lora_rank {config.lora_rank} is above that of {name}, {rows} x {columns}; give a smaller one")


def choose_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on, in the order in which sessions take them, and to evaluate on; never one in both."""
    if config.data == "arithmetic":
        problems = make_problems((config.new_problems or 4000) * max(config.sessions, config.session), config.seed, "train")
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
    return [problems[i] for i in epoch_order(len(problems), config.seed, 0, 0)], held_out


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
    device = mesh.devices.flat[0]
    memory = state_bytes(run) / 2**30
    tokens = run.steps * config.rows * config.max_new_tokens
    mu = config.updates_per_rollout
    lines = [
        f"model       {run.base.line}, {run.train.dtype}",
        f"mesh        {mesh.size} x {device.device_kind}  (fsdp {mesh.shape['fsdp']} x tp {mesh.shape['tp']})"
        + (f", {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        f"data        {len(run.problems)} problems from {config.data}, {len(run.eval_problems)} held out, "
        f"{len(run.dropped)} too long and dropped" + named(run.dropped),
        f"a step      {config.prompts_per_step} prompts x {config.group_size} completions = {config.rows} rows, "
        f"at most {config.max_prompt_tokens} + {config.max_new_tokens} tokens",
        f"plan        {run.steps} steps, {mu} update{'s' * (mu > 1)} each, at most {tokens / 1e6:.1f}M sampled tokens",
    ]
    lines += [
        f"session {session.number:<4}steps {session.start + 1} to {session.end}: {len(session.new)} new problems"
        f"{f', {len(session.review)} reviewed' * (session.number > 1)}"
        for session in run.sessions
    ]
    carried = "weights" + ", Adam's moments" * config.carry_optimizer
    over = {"session": "each session", "run": "the whole run"}[config.schedule]
    lines += [f"carried     {carried}; the learning rate's schedule spans {over}; the reference is "
              f"{'what a session starts from' if config.reference == 'session_start' else 'the base model'}"] * (
                  len(run.sessions) > 1)  # fmt: skip
    lines += [
        f"trained     {trained(run)}",
        f"loss        {config.aggregation}, beta {config.beta}, advantages by {config.advantage_scale}; "
        f"learning rate {config.learning_rate}",
        f"memory      {memory:.2f} GiB a device at least: weights, moments, gradients, reference, sampling weights, KV cache",
        f"run         {run_dir(config)}",
    ]
    return "\n".join(lines)


def named(problems: list[Problem]) -> str:
    """` (gsm8k_train.jsonl:7, ...)`: the first of them; nothing where there are none."""
    return f" ({', '.join(problem.id for problem in problems[:3])}{', ...' * (len(problems) > 3)})" * bool(problems)


def trained(run: Run) -> str:
    config = run.config
    if not config.lora_rank:
        return "all weights"
    count = count_adapters(run.model, config.lora_names, config.lora_rank)
    return (
        f"adapters of rank {config.lora_rank} on {config.lora_targets}, alpha {config.lora_alpha:g} "
        f"({count / 1e6:.1f}M parameters, {12 * count / 1e6:.0f} MB a checkpoint)"
    )


def state_bytes(run: Run) -> float:
    """What a device must hold, activations aside: a lower bound."""
    config, model, n = run.config, run.model, run.mesh.size
    width = jnp.dtype(run.train.dtype).itemsize
    state = resting_bytes(model, run.train.dtype, config) / n
    view = sum(leaf.size for leaf in jax.tree.leaves(shapes(model))) * width / run.mesh.shape["tp"]
    slots = config.prompts_per_step * config.max_prompt_tokens + config.rows * config.max_new_tokens
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * slots * width / n
    return state + view + cache


def fingerprint(run: Run, session: Session) -> str:
    """Of the problems that the run has met up to the end of a session, in their order: 16 hex digits."""
    met = [(problem.question, problem.answer) for problem in run.problems[: int(session.new[-1]) + 1]]
    return hashlib.sha256(repr(met).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- directory


def run_dir(config: Config) -> Path:
    return Path(config.run_dir or f"runs/{config.preset}-seed{config.seed}")


@contextmanager
def open_run_dir(config: Config) -> Iterator[Path]:
    """The run's directory, made if need be, for this process alone.

    A run that it holds may change only what does not touch the result.
    """
    folder, fault, lock = run_dir(config), "", None
    if is_main_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder)
            if (folder / "config.json").exists():
                check_settings(dict(json.loads((folder / "config.json").read_text("utf-8"))), config, folder)
        except ConfigError as error:
            fault = str(error)
        except (OSError, ValueError, TypeError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            fault = f"run_dir {folder} cannot be used: {reason}; give another --run_dir"
    fault = broadcast_from_main(fault)
    try:
        if fault:
            raise ConfigError(fault)
        yield folder
    finally:
        if lock is not None:
            os.close(lock)


def take_lock(folder: Path) -> int:
    """An open file that is this process's until it ends, however it ends. Raises ConfigError when another has it."""
    import fcntl  # not on Windows

    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 200).decode(errors="replace")
        os.close(lock)
        raise ConfigError(f"{folder} is in use by {owner or 'another process'}; wait, or give another") from None
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def check_settings(saved: dict[str, Any], config: Config, where: Path) -> None:
    """ConfigError, naming them, when settings that touch the result are not those of the run in `where`."""
    now, allowed = asdict(config), FREE_TO_CHANGE | {*config.allow_change.split(",")}
    if config.schedule == "run":
        allowed -= {"max_steps", "epochs"}  # they, and the number of sessions, say how long the cosine is
    else:
        allowed |= {"sessions"}
    defaults = {field.name: field.default for field in fields(Config)}
    differing = [name for name in now if name not in allowed and saved.get(name, defaults[name]) != now[name]]
    if differing:
        changes = ", ".join(f"{name} {saved.get(name, defaults[name])!r} -> {now[name]!r}" for name in differing)
        raise ConfigError(
            f"{where} holds a run with other settings ({changes}); use another --run_dir, the same settings, or --allow_change"
        )
