"""Every number of a run, in one flat frozen dataclass; the presets; and the command line made from them.

A field is a flag: `prompts_per_step` is `--prompts_per_step` (or `--prompts-per-step`). Checked once, here, before anything is
loaded. Left out: the model's dimensions, which come from its `config.json`.
"""

import argparse
import dataclasses
import difflib
import math
import re
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

PROJECTIONS = "q,k,v,o,gate,up,down"
SYSTEM = (
    "You are given a problem. Think about the problem and provide your reasoning. "
    "Place it between <reasoning> and </reasoning>. "
    "Then, provide the final answer (i.e., just one numerical value) between <answer> and </answer>."
)
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # and the packages that they need
TINY_MODEL = str(Path(__file__).parents[1] / "models" / "tiny")


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line for the user."""


class RunError(RuntimeError):
    """A run that cannot go on, through no setting's fault; one line for the user, exit code 1."""


KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def flag(default, text: str, choices: tuple[str, ...] = ()):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """One training run. `preset` names where the values started from."""

    preset: str = flag("custom", "name of the preset these values started from")
    # what
    model_path: str = flag("", "a model folder in any form, RUN_DIR[/checkpoints/STEP] of a run, adapters, hf:OWNER/NAME")
    base_path: str = flag("", "the model that adapters at model_path lie on")
    adapter_alpha: float = flag(0.0, "alpha of adapters at model_path, where they do not say it")
    data: str = flag("openai/gsm8k", "arithmetic, a .jsonl or .parquet file in GSM8K form, or openai/gsm8k")
    eval_data: str = flag("", "problems to evaluate on; arithmetic:tune to choose settings; default: held out from --data")
    run_dir: str = flag("", "where everything is written; default runs/PRESET-seedSEED")
    system_prompt: str = flag(SYSTEM, "opens the user's turn; the reward expects its tags")
    seed: int = flag(0, "decides which problems, in what order, and every sample")
    # how long
    new_problems: int = flag(500, "problems that a session meets for the first time, drawn from --data; 0 takes all")
    epochs: int = flag(1, "times a session goes through its problems")
    max_steps: int = flag(0, "steps of a session at most; 0: as epochs say")
    max_hours: float = flag(0.0, "save and stop after so many hours; the same command goes on; 0: no limit")
    # sessions
    sessions: int = flag(1, "relay sessions: each meets new problems and reviews earlier ones")
    session: int = flag(0, "run this session only, from where the one before it ended; 0: all of them in a row")
    review_ratio: float = flag(1.0, "earlier problems that a session reviews, for each new one")
    relay_from: str = flag("", "another run's directory, only read: go on from its last checkpoint in a new run_dir")
    reference: str = flag(
        "initial", "the frozen policy of the KL: the base model, or what a session starts from", ("initial", "session_start")
    )
    schedule: str = flag(
        "session", "what the learning rate's warm-up and cosine span: each session, or the whole run", ("session", "run")
    )
    carry_optimizer: bool = flag(True, "Adam's moments go on from session to session")
    allow_change: str = flag("", "settings that a resumed run may change all the same, such as learning_rate,beta")
    # rollout
    prompts_per_step: int = flag(16, "Q: prompts a step")
    group_size: int = flag(8, "G: completions a prompt")
    max_prompt_tokens: int = flag(256, "P: longer prompts are dropped and counted, never cut")
    max_new_tokens: int = flag(512, "C: longest completion, the stop token included")
    temperature: float = flag(1.0, "of the samples, and of every log-probability")
    top_k: int = flag(0, "sample among the k likeliest tokens; 0: all")
    top_p: float = flag(1.0, "sample among the likeliest tokens of this total probability; 1: all")
    resample: int = flag(0, "times that groups whose rewards are all equal are sampled again")
    # reward
    reward_correct: float = flag(25.0, "the number in <answer> equals the gold answer")
    reward_reasoning_tags: float = flag(2.0, "exactly one <reasoning> block, not empty")
    reward_answer_tags: float = flag(2.0, "exactly one <answer> block, not empty")
    reward_operators: float = flag(1.0, "the reasoning calculates: digit, operator, digit")
    reward_violation: float = flag(-15.0, "a tag missing, repeated or out of order; text after </answer>; cut off by the limit")
    reward: str = flag("", "more rewards, FILE.py:FUNCTION[,...]; each is a function (completion, problem) -> float, added")
    reward_timeout: float = flag(10.0, "seconds that such a function has for a completion; then it is killed, and left out")
    strict_rewards: bool = flag(False, "stop at the first completion that such a function gives no finite number for")
    # loss
    beta: float = flag(0.04, "weight of the KL to the reference; 0 runs without a reference")
    epsilon_low: float = flag(0.2, "the ratio is clipped below 1 - epsilon_low")
    epsilon_high: float = flag(0.2, "the ratio is clipped above 1 + epsilon_high")
    advantage_scale: str = flag("group", "what advantages are divided by", ("group", "batch", "none"))
    aggregation: str = flag("grpo", "how tokens are averaged", ("grpo", "dapo", "dr_grpo"))
    tis_cap: float = flag(2.0, "cap of the importance weight trainer / sampler; 0: no correction")
    mask_truncated: bool = flag(False, "leave completions that hit the length limit out of the loss")
    # optimizer
    learning_rate: float = flag(1e-6, "peak, after warm-up; a cosine takes it to a tenth")
    warmup_steps: int = flag(10, "updates of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's")
    adam_b1: float = flag(0.9, "AdamW's first decay")
    adam_b2: float = flag(0.99, "AdamW's second decay")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this global norm")
    updates_per_rollout: int = flag(1, "mu: optimizer updates on each rollout")
    microbatches: int = flag(1, "gradient accumulation: the step's prompts are worked through in so many parts")
    lora_rank: int = flag(0, "train adapters of this rank on frozen weights (LoRA); 0: train the weights")
    lora_alpha: float = flag(64.0, "adapters count lora_alpha / lora_rank times")
    lora_targets: str = flag(PROJECTIONS, "the projections that have adapters")
    max_bad_updates: int = flag(5, "stop after so many non-finite updates in a row; each is skipped")
    max_zero_variance_steps: int = flag(20, "stop after so many steps in a row whose groups all had equal rewards; 0: never")
    # evaluation and files
    eval_problems: int = flag(200, "problems of each evaluation; 0: none")
    eval_every: int = flag(0, "evaluate every N steps too, not only before and after; 0: no")
    retention_problems: int = flag(200, "of each session's new problems, evaluated after it and after later ones; 0: none")
    inspect_groups: int = flag(
        100, "groups of the run whose every token is written to tokens.jsonl, spread over its steps; 0: none"
    )
    save_every: int = flag(50, "checkpoint every N steps, and at the end of a session")
    save_minutes: float = flag(10.0, "checkpoint after so many minutes too; 0: by steps only")
    keep_checkpoints: int = flag(2, "how many to keep, beside the last of each session")
    async_save: bool = flag(True, "train on while a checkpoint is written")
    track: str = flag("", f"show metrics there too: {' or '.join(TRACKERS)}, or several with commas between")
    # machine
    coordinator: str = flag("", "several processes: HOST:PORT of process 0; auto where the cluster tells, as on a TPU pod")
    processes: int = flag(1, "how many, with coordinator HOST:PORT: each runs this command")
    process_id: int = flag(0, "which of them this is")
    rollout_tp: int = flag(
        1, "devices that share one copy of the MLP and the vocabulary while sampling; 0: as many as can, up to 8"
    )
    dtype: str = flag("auto", "of activations; auto: float32 on a CPU, bfloat16 elsewhere", ("auto", "float32", "bfloat16"))
    halvings: int = flag(3, "times that the sampling batch may halve as completions end")
    remat: str = flag(
        "auto",
        "what the backward pass recomputes; auto: all but products where memory allows it",
        ("auto", "none", "dots", "full"),
    )
    unroll: bool = flag(False, "unroll the layers: faster on a CPU, slower to compile")
    packing: int = flag(
        4, "training packs a group's completions into shapes that differ by max_new_tokens / packing slots; 0: a row for each"
    )
    logprob_chunk: int = flag(2048, "tokens, of all rows, whose vocabulary logits exist at a time in the update")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            kind: Any = field.type
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or isinstance(value, bool) != (kind is bool):  # to Python, a bool is an int
                raise ConfigError(f"{field.name} {value!r} must be {KINDS[kind]}")
            if choices and value not in choices:
                raise ConfigError(f"{field.name} {value!r} must be one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name} {value} must be a finite number")
        positive = "prompts_per_step max_prompt_tokens max_new_tokens temperature epochs learning_rate max_grad_norm"
        positive += " updates_per_rollout microbatches logprob_chunk save_every keep_checkpoints max_bad_updates reward_timeout"
        positive += " sessions processes lora_alpha"
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0")
        zero = "new_problems max_steps seed top_k beta epsilon_low epsilon_high tis_cap warmup_steps weight_decay"
        zero += " rollout_tp packing halvings eval_problems eval_every adam_b1 adam_b2 max_hours session review_ratio"
        zero += " retention_problems save_minutes process_id resample max_zero_variance_steps inspect_groups lora_rank adapter_alpha"
        for name in zero.split():
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} must not be negative")
        counts = {field.name: 2**31 for field in dataclasses.fields(self) if field.type is int}
        for name, end in (counts | {"seed": 2**32, "adam_b1": 1, "adam_b2": 1}).items():
            if getattr(self, name) >= end:
                raise ConfigError(f"{name} {getattr(self, name)} must be below {end}")
        if "\0" in self.run_dir:
            raise ConfigError(f"run_dir {self.run_dir!r} must not hold a NUL character")
        if self.group_size < 2:
            raise ConfigError(f"group_size {self.group_size} must be at least 2: completions are compared with each other")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.prompts_per_step % self.microbatches:
            raise ConfigError(f"prompts_per_step {self.prompts_per_step} must divide into microbatches {self.microbatches}")
        if self.schedule == "run" and self.session > self.sessions:
            raise ConfigError(
                f"sessions {self.sessions} must be all there will be, with schedule run and session {self.session}"
            )
        for name in filter(None, self.track.split(",")):
            if name not in TRACKERS:
                raise ConfigError(f"track {name!r} must be one of {', '.join(TRACKERS)}")
        for name in self.lora_names:
            if name not in PROJECTIONS.split(",") or self.lora_names.count(name) > 1:
                raise ConfigError(f"lora_targets {name!r} must be one of {PROJECTIONS}, named once")
        for name, default in (("lora_alpha", Config.lora_alpha), ("lora_targets", PROJECTIONS)):
            if self.lora_rank == 0 and getattr(self, name) != default:
                raise ConfigError(f"{name} {getattr(self, name)} is of no use without lora_rank; give --lora_rank 64, say")
        fields = {field.name for field in dataclasses.fields(self)}
        for name in filter(None, self.allow_change.split(",")):
            if name not in fields:
                raise ConfigError(f"allow_change {name!r} is no setting; --help lists them")

    @property
    def rows(self) -> int:
        """B: completions a step."""
        return self.prompts_per_step * self.group_size

    @property
    def lora_names(self) -> list[str]:
        return self.lora_targets.split(",")

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    def limits(self, step: int, rows: int) -> list[int]:
        """Tokens at most of each row of a step; a benchmark gives completions natural lengths by it."""
        return [self.max_new_tokens] * rows

    @property
    def reward_weights(self) -> dict[str, float]:
        names = ("correct", "reasoning_tags", "answer_tags", "operators", "violation")
        return {name: getattr(self, f"reward_{name}") for name in names}


PRESETS: dict[str, Config] = {
    "tiny": Config(
        preset="tiny", model_path=TINY_MODEL, data="arithmetic", system_prompt="", new_problems=320, sessions=3,
        prompts_per_step=16, group_size=8, max_prompt_tokens=48, max_new_tokens=32, learning_rate=5e-4, warmup_steps=5,
        eval_problems=500, remat="none", packing=0, halvings=0, logprob_chunk=4096,
    ),
    "gemma3-270m": Config(preset="gemma3-270m", epochs=10, learning_rate=2e-6, prompts_per_step=16),
    "gemma3-1b": Config(preset="gemma3-1b", epochs=10, rollout_tp=0),
    "gemma-2b": Config(preset="gemma-2b", epochs=10, max_new_tokens=768, rollout_tp=0),
    "gemma2-2b": Config(preset="gemma2-2b", epochs=10, max_new_tokens=768, rollout_tp=0),
    "gemma2-2b-lora": Config(
        preset="gemma2-2b-lora", epochs=10, max_new_tokens=768, rollout_tp=0, lora_rank=64, lora_alpha=64.0, learning_rate=1e-5
    ),
}  # fmt: skip

C = TypeVar("C")


def fail(message: str, code: int = 2) -> NoReturn:
    """End the program with one line; exit code 2 is the user's mistake."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def parse(kind: type[C], argv: list[str], description: str, presets: dict[str, C] | None = None) -> C:
    """Command line -> a dataclass of `kind`: `[PRESET] --field value ...`; unknown flags name the nearest field."""
    names = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    words = [normalise(word) for word in argv]
    usage = f"%(prog)s {'[PRESET] ' * bool(presets)}[--flag value ...]"
    parser = Parser(
        usage=usage, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if presets:
        parser.add_argument("preset", nargs="?", default=next(iter(presets)), help=f"one of {', '.join(presets)} (the first)")
        words = [word.removeprefix("--preset=") for word in words if word != "--preset"]  # `--preset tiny` is `tiny`
    types = typing.get_type_hints(kind)
    for name, field in names.items():
        if presets and name == "preset":
            continue
        values = [repr(field.default)]
        for preset, other in (presets or {}).items():
            values += [f"{preset} {getattr(other, name)!r}"] * (getattr(other, name) != field.default)
        text = f"{field.metadata['help']} ({'; '.join(values)})".replace("%", "%%")
        options: dict = {"type": READERS.get(types[name]), "choices": field.metadata.get("choices") or None}
        if types[name] is bool:  # --raw, --raw true, --raw=false
            options = {"type": parse_bool, "nargs": "?", "const": True}
        parser.add_argument(f"--{name}", help=text, metavar=name.upper(), **options)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for name in flags:
        if flags.count(name) > 1:
            parser.error(f"{name} is given {flags.count(name)} times; give it once")
    known, unknown = parser.parse_known_args(words)
    for word in unknown:
        name = word.split("=")[0]
        near = difflib.get_close_matches(name.lstrip("-"), names, n=1, cutoff=0.5)
        parser.error(f"{name} is no flag" + (f"; did you mean --{near[0]}?" if near else "; --help lists them"))
    given = {name: value for name, value in vars(known).items() if value is not None}
    if presets:
        preset = given.pop("preset")
        if preset not in presets:
            near = difflib.get_close_matches(preset, presets, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"preset {preset!r} is unknown: one of {', '.join(presets)}{hint}")
        return dataclasses.replace(presets[preset], **given)  # type: ignore[type-var]
    return kind(**given)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument "))


def normalise(word: str) -> str:
    """`--max-new-tokens=5` -> `--max_new_tokens=5`; anything else as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} must be {KINDS[bool]}")
    return text.lower() in ("true", "1")


def parse_int(text: str) -> int:
    if not re.fullmatch("[-+]?[0-9]{1,20}", text):  # int() also reads 1_6 and other alphabets' digits
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be {KINDS[int]}")
    return int(text)


def parse_float(text: str) -> float:
    try:
        if "_" in text or not text.isascii():
            raise ValueError
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be {KINDS[float]}") from None


READERS = {int: parse_int, float: parse_float}
