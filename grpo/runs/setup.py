"""What a run works with, loaded and checked before anything is spent: everything but the weights."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax import Array
from jax.sharding import Mesh

from data import DataError
from data.curriculum import Chosen, choose_by_rate, read_pass_rates
from data.datasets import choose_problems
from data.problems import Problem
from data.prompts import drop_long
from data.tokenizer import Tokenizer, load_tokenizer
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.runs.distributed import check_same, is_main_process
from grpo.runs.grading import make_grader
from grpo.runs.model_source import DESCRIPTION, TABLE, Model, find_model
from grpo.runs.reward_worker import UserRewards, find_functions, reward_fingerprint
from grpo.runs.trackers import check_installed
from grpo.session import Session, plan_sessions
from grpo.step import Run
from grpo.update import UpdateConfig, freezes_table, narrow
from models import ModelError
from models.formats.convert import Keep, as_it_is
from models.gemma import ExecutionConfig, GemmaConfig, Params
from models.lora import adapter_shapes
from models.sharding import ROLLOUT, STORE, TRAIN, activation_dtype, check_divides, make_mesh

P = TypeVar("P")


@dataclass(frozen=True)
class Setup(Run):
    """A `Run` with what a whole training run needs besides."""

    tokenizer: Tokenizer
    base: Model  # the model before the first step
    eval_problems: list[Problem]
    eval_ids: list[list[int]]
    dropped: list[Problem]  # their prompts are too long
    rewards: UserRewards
    chosen: Chosen  # how many problems `pass_rates` leaves out
    completion_ids: list[list[int]] = field(default_factory=list)  # of every problem, in supervised fine-tuning
    eval_completion_ids: list[list[int]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps of all sessions up to the last one that is asked for."""
        return self.sessions[(self.config.session or len(self.sessions)) - 1].end


def prepare(config: Config, demonstrated: bool = False) -> Setup:
    """Load and check everything but the weights. `demonstrated`: as in `data.problems.load_problems`.

    Raises ConfigError, DataError or ModelError.
    """
    if not config.model_path:
        raise ConfigError(f"model_path is needed: preset {config.preset} brings no weights; give a model folder")
    check_installed(config.track)
    mesh = make_mesh(config.rollout_tp)
    base = find_model(config.model_path, config.base_path, config.adapter_alpha)
    check_shapes(config, base.config, mesh)
    tokenizer = load_tokenizer(base.folder, config.thinking)
    check_tokenizer(tokenizer, base.config)
    problems, eval_problems = choose_problems(config, demonstrated)
    chosen = Chosen(problems, 0, 0, 0)
    if config.pass_rates:
        chosen = choose_by_rate(problems, read_pass_rates(config.pass_rates), config.pass_rates_keep, config.seed)
    rewards = UserRewards(
        config.reward if is_main_process() else "", config.reward_timeout, config.strict_rewards, config.reward_workers
    )
    rewards.check(problems)
    problems, prompt_ids, dropped = drop_long(chosen.problems, tokenizer, config.system_prompt, config.max_prompt_tokens)
    eval_ids: list[list[int]] = []
    if eval_problems:
        eval_problems, eval_ids, more = drop_long(eval_problems, tokenizer, config.system_prompt, config.max_prompt_tokens)
        dropped += more
    dtype = activation_dtype(config.dtype)
    return Setup(
        config=config, mesh=mesh, model=base.config, tokenizer=tokenizer, problems=problems, prompt_ids=prompt_ids,
        grade=make_grader(config, rewards), sessions=plan_sessions(config, len(problems)),
        train=ExecutionConfig(TRAIN, dtype, config.remat, config.unroll),
        sample=ExecutionConfig(ROLLOUT, dtype, unroll=config.unroll),
        base=base, eval_problems=eval_problems, eval_ids=eval_ids, dropped=dropped, rewards=rewards,
        chosen=chosen,
    )  # fmt: skip


def load_base(run: Setup, keep: Keep = as_it_is) -> Params:
    """The weights before the first step; `keep` gets each leaf in float32.

    What is not trained is narrowed to the dtype of activations as soon as it is read: a base that just fits beside its adapters
    would not fit in float32.
    """

    def narrow_frozen(leaf: str, array: Array) -> Array:
        frozen = run.config.lora_rank or (leaf == TABLE and freezes_table(run.model, run.update))
        array = keep(leaf, array)
        return narrow(array, run.train.dtype) if frozen else array

    return run.base.load(run.mesh, STORE, "float32", narrow_frozen)


def prepare_alike(config: Any, prepare: Callable[[], P], identity: Callable[[P], dict[str, str]]) -> P:
    """`prepare()`. Of several processes, all raise ConfigError if one cannot, or if two work with something different.

    `identity` names what was prepared, beyond code and settings, by fingerprints.
    """
    if jax.process_count() == 1:
        return prepare()
    prepared, fault, mine = None, "", {"code": code_fingerprint()} | settings_of(config)
    try:
        prepared = prepare()
        mine |= identity(prepared)
    except (ConfigError, DataError, ModelError, OSError) as error:
        fault = str(error)
    check_same(mine, fault)
    assert prepared is not None
    return prepared


def identity_of(run: Setup) -> dict[str, str]:
    """Of what a training run works with on this machine."""
    problems = run.problems, run.eval_problems, run.prompt_ids, run.eval_ids, run.completion_ids
    reward = reward_fingerprint(find_functions(run.config.reward))
    return {
        "model": files_fingerprint(run.base), "tokenizer": run.tokenizer.fingerprint, "reward file": reward,
        "set of problems": fingerprint(problems),
    }  # fmt: skip


def settings_of(config: Any) -> dict[str, str]:
    """What processes must agree on: each setting but the number of the process; long ones by a hash."""
    texts = {name: repr(value) for name, value in asdict(config).items() if name != "process_id"}
    return {name: text if len(text) < 100 else f"{text[:60]}... ({fingerprint(text)})" for name, text in texts.items()}


def fingerprint(value: Any) -> str:
    """16 hex digits of SHA-256 of what `repr` says of a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def code_fingerprint() -> str:
    """Of this program and of jax."""
    root = Path(__file__).parents[2]
    files = sorted(path for package in ("data", "grpo", "models", "scripts") for path in (root / package).rglob("*.py"))
    return fingerprint((jax.__version__, [(str(path.relative_to(root)), path.read_bytes()) for path in files]))


def files_fingerprint(model: Model) -> str:
    """Of the files that a model is read from on this machine, and of those of the model below it. Reads them all."""
    place = model.path if model.path.exists() else model.folder  # a hub's model has its folder only
    found = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    if (place / "config.json").is_file():  # a folder of Hugging Face may have other files too
        found = [file for file in found if file.parent == place and (file.suffix == ".safetensors" or file.name in DESCRIPTION)]
    contents = []
    for file in found:
        with file.open("rb") as opened:
            contents.append((file.name, hashlib.file_digest(opened, "sha256").hexdigest()))
    return fingerprint((contents, files_fingerprint(model.under) if model.under else ""))


def check_shapes(config: Config, model: GemmaConfig, mesh: Mesh) -> None:
    """ConfigError or ModelError unless everything that is sharded divides over the devices, and adapters are thin enough."""
    parts = config.prompts_per_step // config.microbatches
    check_divides(f"prompts_per_step {config.prompts_per_step} / microbatches {config.microbatches} =", parts, mesh)
    sizes = {"hidden_size": model.embed_dim, "intermediate_size": model.mlp_dim, "vocab_size": model.vocab_size}
    for name, size in sizes.items():
        check_divides(name, size, mesh)
    if config.train_per_layer and (config.lora_rank or not model.per_layer_dim):
        why = "LoRA trains adapters only" if config.lora_rank else "this model has no table of per-layer embeddings"
        raise ConfigError(f"train_per_layer true: {why}; leave it out")
    if not config.lora_rank:
        return
    for name, adapter in adapter_shapes(model, UpdateConfig.of(config).lora_names, config.lora_rank).items():
        rows, columns = adapter.a.shape[1], adapter.b.shape[2]
        if config.lora_rank > min(rows, columns):
            raise ConfigError(f"lora_rank {config.lora_rank} is above that of {name}, {rows} x {columns}; give a smaller one")


def check_tokenizer(tokenizer: Tokenizer, model: GemmaConfig) -> None:
    """A tokenizer of another family gives ids that mean something else to the model."""
    pieces, rows = tokenizer.vocab_size, model.vocab_size
    if not 0.99 * rows < pieces <= rows:
        raise ModelError(
            f"tokenizer in {tokenizer.folder} has {pieces} pieces, the model {rows} rows: not this model's tokenizer"
        )


def data_fingerprint(run: Setup, session: Session) -> str:
    """The fingerprint of the problems that the run has seen up to the end of a session, in their order."""
    seen: list[tuple] = [(problem.question, problem.answer) for problem in run.problems[: int(session.new[-1]) + 1]]
    if run.completion_ids:
        seen = [(*pair, tuple(ids)) for pair, ids in zip(seen, run.completion_ids, strict=False)]
    return fingerprint(seen)
