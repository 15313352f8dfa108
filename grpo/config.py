"""All settings of a run in one flat frozen dataclass, and the presets.

Each field declares, next to its default: help text, group in `--help`, bounds, choices, and whether a resumed run may change
it. A field is a flag: `prompts_per_step` is `--prompts_per_step` (grpo/runs/flags.py makes the command line). The dimensions of
the model come from its own `config.json`.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError

SYSTEM = (
    "You are given a problem. Think about the problem and provide your reasoning. "
    "Place it between <reasoning> and </reasoning>. "
    "Then, provide the final answer (i.e., just one numerical value) between <answer> and </answer>."
)
PROJECTIONS = "q,k,v,o,gate,up,down"
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # and the packages that they need
SFT = "sft"  # the preset of supervised fine-tuning, whose completions are given
HUBS = ("hf:", "kaggle:")  # prefixes of models that are downloaded first
TINY_MODEL = str(Path(__file__).parents[1] / "models" / "tiny")
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
GROUPS = ("data", "rollout", "reward", "loss", "optimizer", "LoRA", "evaluation", "files", "machine")


def flag(
    default: Any, text: str, group: str = "", *, choices: tuple[str, ...] = (), above: float | None = None,
    least: float | None = None, below: float | None = None, most: float | None = None, free: bool = False, was: str = "",
) -> Any:  # fmt: skip
    """A setting: its default, help text and group.

    Bounds: value > `above`, >= `least`, < `below`, <= `most`. `free`: a resumed run may change it, because it does not change
    what is computed, or only how far. `was`: the name that older runs have it under.
    """
    bounds = {"above": above, "least": least, "below": below, "most": most}
    metadata = {"help": text, "group": group, "choices": choices, "free": free, "was": was, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """One training run. `preset` names where the values started from."""

    preset: str = flag("custom", "name of the preset these values started from", "data")
    # data: the model, the problems, and how they are divided into sessions
    model_path: str = flag(
        "", "a model folder in any form, RUN_DIR[/checkpoints/STEP] of a run, adapters, hf:OWNER/NAME", "data", free=True
    )
    base_path: str = flag("", "the model that the adapters at model_path belong to", "data", free=True)
    adapter_alpha: float = flag(0.0, "alpha of the adapters at model_path, if they do not store it", "data", least=0)
    data: str = flag(
        "openai/gsm8k", "arithmetic, a .jsonl, .json or .parquet file, or a hub dataset OWNER/NAME[:CONFIG][:SPLIT]", "data",
        free=True,
    )  # fmt: skip
    question_key: str = flag("question", "the column of --data and --eval_data that has the question", "data", free=True)
    answer_key: str = flag(
        "answer", "the column that has the gold answer: a number, or a choice, word or phrase", "data", free=True
    )
    answer_pattern: str = flag(
        "",
        "regular expression whose first group, or all of it, is the gold in that column; default: what follows ####, else all",
        "data", free=True,
    )  # fmt: skip
    pass_rates: str = flag(
        "", "directory of an evaluation of --data by evaluate_consensus.py: leave out what it never or always solved", "data",
        free=True,
    )  # fmt: skip
    pass_rates_keep: float = flag(0.0, "share of such problems that stays; 1: all", "data", least=0, most=1)
    system_prompt: str = flag(SYSTEM, "the system's turn, or what opens the user's; the reward expects its tags", "data")
    thinking: bool = flag(False, "Gemma 4: let the model think first; rewards do not see what it thinks", "data")
    seed: int = flag(0, "determines which problems, in what order, and every sample", "data", least=0, below=2**32)
    new_problems: int = flag(500, "problems that a session sees for the first time, drawn from --data; 0: all", "data", least=0)
    epochs: int = flag(1, "passes of a session over its problems", "data", above=0, free=True)
    max_steps: int = flag(0, "most steps of each session; 0: as many as epochs give", "data", least=0, free=True)
    sessions: int = flag(1, "relay sessions: each trains on new problems and reviews earlier ones", "data", above=0)
    session: int = flag(
        0, "run only this session, from where the one before it ended; 0: all of them in a row", "data", least=0, free=True
    )
    review_ratio: float = flag(1.0, "earlier problems that a session reviews, for each new one", "data", least=0)
    relay_from: str = flag(
        "", "another run's directory (read only): continue from its last checkpoint in a new run_dir", "data", free=True
    )
    # rollout
    prompts_per_step: int = flag(16, "Q: prompts a step", "rollout", above=0)
    group_size: int = flag(8, "G: completions a prompt", "rollout")
    max_prompt_tokens: int = flag(256, "P: longer prompts are dropped and counted, never cut", "rollout", above=0)
    max_new_tokens: int = flag(512, "C: longest completion, the stop token included", "rollout", above=0)
    temperature: float = flag(1.0, "temperature of the samples and of every log-probability", "rollout", above=0)
    top_k: int = flag(0, "sample from the k most likely tokens; 0: all", "rollout", least=0)
    top_p: float = flag(1.0, "sample from the most likely tokens of this total probability; 1: all", "rollout", above=0, most=1)
    resample: int = flag(0, "times that zero-variance groups (all rewards equal) are sampled again", "rollout", least=0)
    halvings: int = flag(
        3, "times that the sampling batch may be compacted to half its size as completions end", "rollout", least=0, free=True
    )
    # reward
    reward_correct: float = flag(25.0, "the number or text in <answer> equals the gold answer", "reward")
    reward_reasoning_tags: float = flag(2.0, "exactly one <reasoning> block, not empty", "reward")
    reward_answer_tags: float = flag(2.0, "exactly one <answer> block, not empty", "reward")
    reward_operators: float = flag(1.0, "the reasoning calculates: digit, operator, digit", "reward")
    reward_violation: float = flag(
        -15.0, "a tag missing, repeated or out of order; text after </answer>; cut off by the limit", "reward"
    )
    reward_coin: float = flag(
        0.0, "a fair coin for each completion, whatever it says: a control, from which there is nothing to learn", "reward"
    )
    reward: str = flag(
        "",
        "more rewards, FILE.py:FUNCTION[,...]: (completion, problem) -> float, or (completions, problems) -> list; added up",
        "reward",
    )
    reward_timeout: float = flag(
        10.0, "seconds for one completion in such a function; then it is killed and the row has no reward", "reward",
        above=0, free=True,
    )  # fmt: skip
    reward_workers: int = flag(1, "processes that run such functions, for functions that wait", "reward", above=0, free=True)
    strict_rewards: bool = flag(
        False, "stop at the first completion for which such a function gives no finite number", "reward", free=True
    )
    # loss
    beta: float = flag(0.04, "weight of the KL to the reference; 0 runs without a reference", "loss", least=0)
    unbiased_kl: bool = flag(
        False, "multiply k3 by the ratio: its gradient is then that of KL(policy || reference), else KL(reference || policy)",
        "loss",
    )  # fmt: skip
    reference: str = flag(
        "initial", "the frozen policy of the KL: the initial model, or the policy at the start of each session", "loss",
        choices=("initial", "session_start"),
    )  # fmt: skip
    epsilon_low: float = flag(0.2, "the ratio is clipped below 1 - epsilon_low", "loss", least=0)
    epsilon_high: float = flag(0.2, "the ratio is clipped above 1 + epsilon_high", "loss", least=0)
    advantage_scale: str = flag(
        "group",
        "what advantages are divided by: std of the group; batch: std of all rewards around their groups' means (TRL's batch: "
        "around the mean of all); nothing",
        "loss",
        choices=("group", "batch", "none"),
    )  # fmt: skip
    aggregation: str = flag("grpo", "how tokens are averaged", "loss", choices=("grpo", "dapo", "dr_grpo"))
    tis_cap: float = flag(
        2.0, "cap of truncated importance sampling (trainer / sampler probability); 0: no correction", "loss", least=0,
        was="sampler_cap",
    )  # fmt: skip
    mask_truncated: bool = flag(False, "leave completions that hit the length limit out of the loss", "loss")
    logprob_chunk: int = flag(
        1536, "tokens, of all rows, whose vocabulary logits exist at a time in the update", "loss", above=0, free=True
    )
    # optimizer
    learning_rate: float = flag(1e-6, "peak, after warm-up; a cosine takes it to a tenth", "optimizer", above=0)
    warmup_steps: int = flag(10, "updates of linear warm-up", "optimizer", least=0)
    schedule: str = flag(
        "session", "what warm-up and cosine of the learning rate span", "optimizer", choices=("session", "run")
    )
    carry_optimizer: bool = flag(True, "keep Adam's moments from session to session", "optimizer")
    weight_decay: float = flag(0.0, "weight decay of AdamW", "optimizer", least=0)
    adam_b1: float = flag(0.9, "decay of AdamW's first moment", "optimizer", least=0, below=1)
    adam_b2: float = flag(0.99, "decay of AdamW's second moment", "optimizer", least=0, below=1)
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this global norm", "optimizer", above=0)
    train_per_layer: bool = flag(False, "Gemma 4: train the table of per-layer embeddings too", "optimizer")
    updates_per_rollout: int = flag(1, "mu: optimizer updates on each rollout", "optimizer", above=0)
    microbatches: int = flag(
        1, "gradient accumulation: parts that the prompts of a step are split into", "optimizer", above=0, free=True
    )
    max_bad_updates: int = flag(5, "stop after N non-finite updates in a row; each is skipped", "optimizer", above=0)
    max_zero_variance_steps: int = flag(
        20, "stop after N steps in a row in which every group had equal rewards; 0: never", "optimizer", least=0, free=True,
        was="max_dead_steps",
    )  # fmt: skip
    # LoRA
    lora_rank: int = flag(0, "train adapters of this rank on frozen weights; 0: train the weights", "LoRA", least=0)
    lora_alpha: float = flag(64.0, "adapters are scaled by lora_alpha / lora_rank", "LoRA", above=0)
    lora_targets: str = flag(PROJECTIONS, "projections that get adapters", "LoRA")
    # evaluation
    eval_data: str = flag(
        "", "problems to evaluate on; arithmetic:tune to choose settings; default: held out from --data", "evaluation"
    )
    eval_problems: int = flag(200, "problems of each evaluation; 0: no evaluation at all", "evaluation", least=0)
    eval_every: int = flag(0, "also evaluate every N steps, not only before and after; 0: no", "evaluation", least=0, free=True)
    retention_problems: int = flag(
        200,
        "of each session's new problems, evaluated after it and after later ones; 0: none",
        "evaluation",
        least=0,
        free=True,
    )
    inspect_groups: int = flag(
        100, "groups, spread over the run's steps, whose every token is written to tokens.jsonl; 0: none", "evaluation",
        least=0, free=True,
    )  # fmt: skip
    # files
    run_dir: str = flag("", "where everything is written; default runs/PRESET-seedSEED", "files", free=True)
    max_hours: float = flag(
        0.0, "save and stop after N hours; the same command continues; 0: no limit", "files", least=0, free=True
    )
    save_every: int = flag(50, "checkpoint every N steps, and at the end of a session", "files", above=0, free=True)
    save_minutes: float = flag(10.0, "also checkpoint every N minutes; 0: by steps only", "files", least=0, free=True)
    keep_checkpoints: int = flag(2, "checkpoints to keep, in addition to the last of each session", "files", above=0, free=True)
    async_save: bool = flag(True, "continue training while a checkpoint is written", "files", free=True)
    allow_change: str = flag(
        "", "settings that a resumed run may change all the same, such as learning_rate,beta", "files", free=True
    )
    track: str = flag("", f"also log metrics to {' or '.join(TRACKERS)}; several with commas between", "files", free=True)
    # machine
    coordinator: str = flag(
        "", "several processes: HOST:PORT of process 0; auto where the cluster provides it, as on a TPU pod", "machine",
        free=True,
    )  # fmt: skip
    processes: int = flag(
        1, "number of processes with --coordinator HOST:PORT; each runs this command", "machine", above=0, free=True
    )
    process_id: int = flag(0, "index of this process", "machine", least=0, free=True)
    rollout_tp: int = flag(
        1, "devices that share one copy of the MLP and the vocabulary while sampling; 0: as many as possible, up to 8",
        "machine", least=0, free=True,
    )  # fmt: skip
    dtype: str = flag(
        "auto", "of activations; auto: float32 on a CPU, bfloat16 elsewhere", "machine", choices=("auto", "float32", "bfloat16")
    )
    remat: str = flag(
        "auto", "what the backward pass recomputes; auto: everything but products, where memory allows it", "machine",
        choices=("auto", "none", "dots", "full"), free=True,
    )  # fmt: skip
    unroll: bool = flag(False, "unroll the layers of all programs: faster on a CPU, slower to compile", "machine", free=True)
    packing: int = flag(
        4, "training packs completions into rows of a few sizes, multiples of max_new_tokens / packing, each about a fifth "
        "larger than the one before; 0: a row for each", "machine", least=0, free=True,
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)
        if "\0" in self.run_dir:
            raise ConfigError(f"run_dir {self.run_dir!r} must not hold a NUL character")
        if self.group_size < 2 and self.preset != SFT:
            raise ConfigError(f"group_size {self.group_size} must be at least 2: completions are compared with each other")
        if self.prompts_per_step % self.microbatches:
            raise ConfigError(f"prompts_per_step {self.prompts_per_step} must divide into microbatches {self.microbatches}")
        if self.schedule == "run" and self.session > self.sessions:
            raise ConfigError(
                f"sessions {self.sessions} must be the number of all sessions, with schedule run and session {self.session}"
            )
        if self.pass_rates_keep and not self.pass_rates:
            raise ConfigError(f"pass_rates_keep {self.pass_rates_keep} only applies with --pass_rates")
        check_names("track", self.track, TRACKERS)
        check_names("allow_change", self.allow_change, {field.name for field in dataclasses.fields(self)})
        targets = self.lora_targets.split(",")
        for name in targets:
            if name not in PROJECTIONS.split(",") or targets.count(name) > 1:
                raise ConfigError(f"lora_targets {name!r} must be one of {PROJECTIONS}, named once")
        for name, default in (("lora_alpha", Config.lora_alpha), ("lora_targets", PROJECTIONS)):
            if self.lora_rank == 0 and getattr(self, name) != default:
                raise ConfigError(f"{name} only applies with LoRA: set --lora_rank, e.g. 64")

    @property
    def rows(self) -> int:
        """B: completions a step."""
        return self.prompts_per_step * self.group_size

    @property
    def reward_weights(self) -> dict[str, float]:
        names = ("correct", "reasoning_tags", "answer_tags", "operators", "violation")
        return {name: getattr(self, f"reward_{name}") for name in names}


def check_fields(config: Any) -> None:
    """ConfigError unless every field of a dataclass has the type, choices and bounds that it declares by `flag`."""
    for field in dataclasses.fields(config):
        value, kind, rules = getattr(config, field.name), field.type, field.metadata
        fits = isinstance(value, (int, float) if kind is float else kind)  # type: ignore[arg-type]
        if not fits or isinstance(value, bool) != (kind is bool):  # to Python, a bool is an int
            raise ConfigError(f"{field.name} {value!r} must be {KINDS[kind]}")  # type: ignore[index]
        if rules.get("choices") and value not in rules["choices"]:
            raise ConfigError(f"{field.name} {value!r} must be one of {', '.join(rules['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name} {value} must be a finite number")
        if isinstance(value, str) or kind is bool:
            continue
        check_bounds(field.name, value, rules, 2**31 if kind is int else None)


def check_bounds(name: str, value: float, rules: Any, below: int | None) -> None:
    """ConfigError unless a number is within its bounds. `below` is the bound where the field declares none."""
    above, least, most = rules.get("above"), rules.get("least"), rules.get("most")
    below = below if rules.get("below") is None else rules["below"]
    if above is not None and most is not None and not above < value <= most:
        raise ConfigError(f"{name} {value} must be above {above} and at most {most}")
    if above is not None and value <= above:
        raise ConfigError(f"{name} {value} must be above {above}")
    if least is not None and value < least:
        raise ConfigError(f"{name} {value} must " + ("not be negative" if least == 0 else f"be at least {least}"))
    if most is not None and value > most:
        raise ConfigError(f"{name} {value} must be at most {most}")
    if below is not None and value >= below:
        raise ConfigError(f"{name} {value} must be below {below}")


def check_names(setting: str, names: str, known: Any) -> None:
    """ConfigError unless every name of a comma-separated list is known."""
    for name in filter(None, names.split(",")):
        if name not in known:
            choice = f"must be one of {', '.join(known)}" if len(known) < 10 else "is not a setting; --help lists them"
            raise ConfigError(f"{setting} {name!r} {choice}")


def current_names(saved: dict[str, Any]) -> dict[str, Any]:
    """The settings of an older run under the names that they have now."""
    renamed = {field.metadata["was"]: field.name for field in dataclasses.fields(Config) if field.metadata["was"]}
    return {renamed.get(name, name): value for name, value in saved.items()}


# What supervised fine-tuning (scripts/sft.py) starts from: an update with beta 0, advantage 1 and ratio 1 is that of the mean
# negative log-likelihood. The fields in GRPO_ONLY have no meaning there.
SFT_PRESET = Config(
    preset=SFT, group_size=1, new_problems=0, beta=0.0, tis_cap=0.0, aggregation="dapo", learning_rate=1e-5,
    max_zero_variance_steps=0, retention_problems=0, inspect_groups=0,
)  # fmt: skip
GRPO_ONLY = {
    "pass_rates", "pass_rates_keep",
    "sessions", "session", "review_ratio", "relay_from", "group_size", "temperature", "top_k", "top_p", "resample", "halvings",
    "beta", "reference", "epsilon_low", "epsilon_high", "advantage_scale", "aggregation", "tis_cap", "mask_truncated",
    "schedule", "carry_optimizer", "updates_per_rollout", "max_zero_variance_steps", "retention_problems", "inspect_groups",
} | {field.name for field in dataclasses.fields(Config) if field.metadata["group"] == "reward"}  # fmt: skip

LORA: dict[str, Any] = dict(epochs=10, rollout_tp=0, lora_rank=64, lora_alpha=64.0, learning_rate=1e-5)
PRESETS: dict[str, Config] = {
    "tiny": Config(
        preset="tiny", model_path=TINY_MODEL, data="arithmetic", system_prompt="", new_problems=320, sessions=3,
        prompts_per_step=16, group_size=8, max_prompt_tokens=48, max_new_tokens=32, learning_rate=5e-4, warmup_steps=5,
        eval_problems=500, remat="dots", packing=0, halvings=0, logprob_chunk=4096,
    ),
    "gemma3-270m": Config(preset="gemma3-270m", epochs=10, learning_rate=2e-6, prompts_per_step=16),
    "gemma3-1b": Config(preset="gemma3-1b", epochs=10, rollout_tp=0),
    "gemma-2b": Config(preset="gemma-2b", epochs=10, max_new_tokens=768, rollout_tp=0),
    "gemma2-2b": Config(preset="gemma2-2b", epochs=10, max_new_tokens=768, rollout_tp=0),
    "gemma2-2b-lora": Config(preset="gemma2-2b-lora", max_new_tokens=768, **LORA),
    "gemma3-1b-lora": Config(preset="gemma3-1b-lora", **LORA),
    "gemma3-4b-lora": Config(preset="gemma3-4b-lora", **LORA),
    "gemma4-e2b": Config(preset="gemma4-e2b", epochs=10, rollout_tp=0),
    "gemma4-e2b-lora": Config(preset="gemma4-e2b-lora", **LORA),
    "gemma4-e4b-lora": Config(preset="gemma4-e4b-lora", **LORA),
}  # fmt: skip
