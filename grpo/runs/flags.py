"""The command line of a dataclass whose fields are declared by `grpo.config.flag`: `[PRESET] --field value ...`, by argparse.

Hyphens and underscores are the same. Every mistake is one line on stderr and exit code 2. An unknown flag is answered with the
field of the same meaning when it is one of TRL's or Tunix's, or with the field that differs by a typo.
"""

import argparse
import dataclasses
import difflib
import re
import sys
import textwrap
import typing
from collections.abc import Collection
from itertools import groupby
from typing import Any, NoReturn, TypeVar

from grpo.config import GROUPS, KINDS

C = TypeVar("C")

TYPO = 0.84  # similarity (difflib) from which an unknown flag is taken for a typo and not for another idea

# Flags of TRL (GRPOConfig, TrainingArguments, ModelConfig), Tunix and verl -> the field of the same meaning.
PEERS = {
    "num_generations": "group_size", "n": "group_size", "num_iterations": "updates_per_rollout", "mu": "updates_per_rollout",
    "ppo_epochs": "updates_per_rollout", "per_device_train_batch_size": "prompts_per_step", "batch_size": "prompts_per_step",
    "train_batch_size": "prompts_per_step", "max_completion_length": "max_new_tokens", "max_response_length": "max_new_tokens",
    "max_tokens": "max_new_tokens", "max_tokens_to_generate": "max_new_tokens", "total_generation_steps": "max_new_tokens",
    "max_prompt_length": "max_prompt_tokens", "lr": "learning_rate",
    "lr_rate": "learning_rate", "gradient_accumulation_steps": "microbatches",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "total_epochs": "epochs", "epsilon": "epsilon_low",
    "clip_ratio": "epsilon_low", "clip_ratio_low": "epsilon_low", "clip_ratio_high": "epsilon_high", "kl_coef": "beta",
    "kl_loss_coef": "beta", "use_bias_correction_kl": "unbiased_kl",
    "scale_rewards": "advantage_scale", "loss_type": "aggregation", "loss_agg_mode": "aggregation",
    "loss_algo": "aggregation", "vllm_importance_sampling_cap": "tis_cap", "model_name_or_path": "model_path",
    "model": "model_path", "model_name": "model_path", "output_dir": "run_dir", "dataset_name": "data", "dataset": "data",
    "eval_steps": "eval_every", "save_steps": "save_every", "save_total_limit": "keep_checkpoints", "report_to": "track",
    "mask_truncated_completions": "mask_truncated", "adam_beta1": "adam_b1", "adam_beta2": "adam_b2", "b1": "adam_b1",
    "b2": "adam_b2", "lora_r": "lora_rank", "rank": "lora_rank", "alpha": "lora_alpha", "lora_target_modules": "lora_targets",
    "reward_funcs": "reward", "gradient_checkpointing": "remat", "resume_from_checkpoint": "run_dir",
    "warmup_ratio": "warmup_steps", "lr_scheduler_type": "schedule", "bf16": "dtype",
}  # fmt: skip


def parse(
    kind: type[C], argv: list[str], description: str, presets: dict[str, C] | None = None, without: Collection[str] = ()
) -> C:  # fmt: skip
    """Command line -> a dataclass of `kind`. The first preset is the default one. Ends the program at a mistake.

    The fields in `without` are no flags: they keep the preset's value.
    """
    names = {field.name: field for field in dataclasses.fields(kind) if field.name not in without}  # type: ignore[arg-type]
    words = [normalise(word) for word in argv]
    parser = make_parser(kind, description, presets, without)
    if presets:
        words = [word.removeprefix("--preset=") for word in words if word != "--preset"]  # `--preset tiny` is `tiny`
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for name in flags:
        if flags.count(name) > 1:
            parser.error(f"{name} is given {flags.count(name)} times; give it once")
    known, unknown = parser.parse_known_args(words)
    for word in unknown:
        parser.error(explain(word, names))
    given = {name: value for name, value in vars(known).items() if value is not None}
    if not presets:
        return kind(**given)
    preset = given.pop("preset")
    if preset not in presets:
        parser.error(f"preset {preset!r} is unknown: one of {', '.join(presets)}{did_you_mean(preset, presets, '')}")
    return dataclasses.replace(presets[preset], **given)  # type: ignore[type-var]


def make_parser(kind: type, description: str, presets: dict[str, Any] | None, without: Collection[str] = ()) -> "Parser":
    """The argparse parser: fields by group, each with choices and defaults. A value that is not given stays None."""
    preset = "[PRESET] " if presets else ""
    parser = Parser(
        usage=f"%(prog)s {preset}[--flag value ...]", description=description, allow_abbrev=False,
        formatter_class=Paragraphs,
    )  # fmt: skip
    if presets:
        parser.add_argument("preset", nargs="?", default=next(iter(presets)), help=f"one of {', '.join(presets)} (the first)")
    hidden = {*without, *(["preset"] if presets else [])}
    fields = [field for field in dataclasses.fields(kind) if field.name not in hidden]
    groups = {field.metadata.get("group") or "" for field in fields}
    titles = [group for group in ("", *GROUPS) if group in groups]
    sections = {title: parser.add_argument_group(title or "options of this script") for title in titles}
    types = typing.get_type_hints(kind)
    for field in fields:
        choices = field.metadata.get("choices")
        options: dict = {"type": READERS.get(types[field.name]), "metavar": METAVARS[types[field.name]]}
        if types[field.name] is bool:  # --raw, --raw true, --raw=false
            options |= {"nargs": "?", "const": True}
        if choices:
            options |= {"choices": choices, "metavar": "{" + ",".join(choices) + "}"}
        text = f"{field.metadata['help']} ({defaults(field, presets or {})})".replace("%", "%%")
        sections[field.metadata.get("group") or ""].add_argument(f"--{field.name}", help=text, **options)
    return parser


def defaults(field: dataclasses.Field, presets: dict[str, Any]) -> str:
    """`1e-06; tiny 0.0005`: the default value, and those presets that have another."""
    values = [shortened(field.default)]
    for preset, other in presets.items():
        if getattr(other, field.name) != field.default:
            values.append(f"{preset} {shortened(getattr(other, field.name))}")
    return "; ".join(values)


def shortened(value: Any) -> str:
    """A default value on a line of the help: long texts are cut."""
    if value == "":
        return "none"
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."


def explain(word: str, names: dict[str, dataclasses.Field]) -> str:
    """Why a word of the command line is wrong, and what was probably meant."""
    if not word.startswith("-"):
        return f"unexpected word {word!r}: settings are given as --flag value; --help lists them"
    name = word.split("=")[0]
    bare = name.lstrip("-").replace("-", "_")
    renamed = [field.name for field in names.values() if field.metadata.get("was") == bare]
    if renamed:
        return f"unknown flag {name}: it is called --{renamed[0]} now"
    if bare not in names and PEERS.get(bare) in names:
        help_text = names[PEERS[bare]].metadata["help"]
        return f"unknown flag {name}; its counterpart here is --{PEERS[bare]}: {help_text}"
    return f"unknown flag {name}{did_you_mean(bare, names, '--') or '; --help lists them'}"


def did_you_mean(word: str, known: Any, prefix: str) -> str:
    """`; did you mean --beta?` where one known name differs from the word by a typo; else nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=TYPO)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def fail(message: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr. Exit code 2 is a mistake of the user."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


class Paragraphs(argparse.HelpFormatter):
    """Fills the paragraphs of a description. Indented lines stay: a long command goes on after a backslash, its comment above
    it; a long definition goes on below its text.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for stays, group in groupby(text.splitlines(), lambda line: line[:1].isspace() or not line):
            block = list(group)
            lines += [part for line in block for part in fit(line, width)] if stays else textwrap.wrap(" ".join(block), width)
        return "\n".join(indent + line for line in lines)


def fit(line: str, width: int) -> list[str]:
    """An indented line of a description in lines of at most `width`."""
    if len(line) <= width:
        return [line]
    before, gap, comment = re.fullmatch(r"(\s*.*?)(?:(\s{3,})(\S.*))?", line).groups("")  # type: ignore[union-attr]
    column = len(before + gap)
    if gap and column <= width // 3:
        return textwrap.wrap(line, width, subsequent_indent=" " * column)
    words = re.sub(r" (?!--)", "\0", before.strip())  # a command breaks before a flag
    parts = [
        part.replace("\0", " ") for part in textwrap.wrap(words, width - 10, break_on_hyphens=False, break_long_words=False)
    ]
    return [*([f"    # {comment}"] if comment else []), "    " + " \\\n        ".join(parts)]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument "))


def normalise(word: str) -> str:
    """`--max-new-tokens=5` -> `--max_new_tokens=5`; anything else unchanged."""
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


READERS = {int: parse_int, float: parse_float, bool: parse_bool}
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
