"""How often a model is right, in a single pass and by vote, beside the model that it was trained from.

    python scripts/evaluate_consensus.py --model_path runs/tiny-seed0
    python scripts/evaluate_consensus.py --model_path runs/tiny-seed0/checkpoints/60       one of the run's checkpoints
    python scripts/evaluate_consensus.py --model_path runs/first --data openai/gsm8k:test --out first-on-test
    python scripts/evaluate_consensus.py --model_path DIR --data gsm8k_test.jsonl          a Hugging Face folder, alone

Single pass is greedy; the vote is over --samples completions at each of --temperatures. All are rows of one batch over one
prefill of each prompt. Three readings:

    tagged      the number in the answer's tags, and the vote over those
    strict      the same of well-formed completions alone: others are wrong, and do not vote
    flexible    the last number of the text, and the vote over those

What has no answer abstains; a tie goes to the answer with the coldest supporter. Every problem counts: one without an answer
is wrong, and so is one that --max_prompt_tokens leaves out. pass@k: one of k voters at least is right; maj@k: the vote of k is;
both are means over all subsets of k.

A checkpoint's evaluation lies in RUN_DIR/consensus-STEP, and the page of report.py shows what the vote adds to all of them.
Samples are written as they end: the same command goes on where it stopped; evaluation.png shows the result in one look. The
last line of standard output is one line of JSON; outside `models`, its `fixed`, `broke`, `both_right`, `both_wrong`,
`mcnemar_p` and `agreement` are the trained model's, of its vote against its single pass (tagged).
"""

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from data.datasets import choose_problems
from data.problems import Problem, load_problems
from grpo.config import Config, flag
from grpo.errors import ConfigError
from grpo.runs.cli import run_script
from grpo.runs.consensus_eval import open_evaluation
from grpo.runs.console import clock
from grpo.runs.evaluate import Completion
from grpo.runs.flags import parse, parse_float
from grpo.runs.interrupts import Interrupts, Stopped
from grpo.runs.model_source import Model, find_model
from models.sharding import activation_dtype, check_divides, make_mesh


@dataclass(frozen=True)
class ConsensusConfig:
    model_path: str = flag("", "RUN_DIR or RUN_DIR/checkpoints/STEP of a run, a model folder in any form, or adapters")
    base_path: str = flag("", "the model to compare with, on which adapters lie; default: what a run began with")
    adapter_alpha: float = flag(0.0, "alpha of adapters that do not say it")
    data: str = flag(
        "", "a .jsonl or .parquet file or openai/gsm8k[:test]; default: the run's held-out problems, else openai/gsm8k:test"
    )
    limit: int = flag(0, "the first so many problems; 0: all")
    temperatures: str = flag("0.2,0.4,0.6,0.8,1.0", "of the completions that vote")
    samples: int = flag(1, "completions at each temperature")
    out: str = flag(
        "", "directory; default RUN_DIR/consensus, of a checkpoint RUN_DIR/consensus-STEP, else runs/NAME-consensus"
    )
    system_prompt: str = flag("auto", "opens the user's turn; auto: the run's, or the default of training")
    max_new_tokens: int = flag(0, "longest completion, the stop token included; 0: as in the run, or 512")
    max_prompt_tokens: int = flag(0, "problems with longer prompts are named, and count as wrong; 0: no limit")
    top_k: int = flag(0, "sample among the k likeliest tokens; 0: all")
    top_p: float = flag(1.0, "sample among the likeliest tokens of this total probability; 1: all")
    seed: int = flag(0, "of the samples")
    batch_size: int = flag(
        0, "problems under way at a time, each with all its completions; 0: as many rows as a step of the run"
    )
    dtype: str = flag(
        "auto", "auto: the run's, or float32 on a CPU, bfloat16 elsewhere", choices=("auto", "float32", "bfloat16")
    )
    rollout_tp: int = flag(1, "devices that share one copy of the MLP and the vocabulary; 0: as many as can, up to 8")
    unroll: bool = flag(False, "unroll the layers, as a run may have: faster on a CPU, slower to compile")

    def __post_init__(self):
        if not self.model_path:
            raise ConfigError("model_path is needed: give --model_path RUN_DIR or a Hugging Face folder")
        if self.samples < 1:
            raise ConfigError(f"samples {self.samples} must be at least 1")
        for name in ("limit", "batch_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} must not be negative")


def read_temperatures(config: ConsensusConfig) -> list[float]:
    """`0.2,1.0` with two samples -> [0.2, 0.2, 1.0, 1.0]."""
    try:
        temperatures = [parse_float(word) for word in config.temperatures.split(",")]
        if not all(0 < t < float("inf") for t in temperatures):
            raise ValueError
    except Exception:
        raise ConfigError(f"temperatures {config.temperatures!r} must be numbers above 0, such as 0.2,0.6,1.0") from None
    return [t for t in temperatures for _ in range(config.samples)]


def choose_models(config: ConsensusConfig) -> dict[str, Model]:
    """The model, after the one that it is compared with, if there is one."""
    model = find_model(config.model_path, config.base_path, config.adapter_alpha)
    if model.trained_from:
        return {"base": model.trained_from(), "trained": model}
    return ({"base": find_model(config.base_path)} if config.base_path else {}) | {"trained": model}


def training_config(model: Model) -> Config:
    """The settings of the run that made the model; the defaults when it comes from none."""
    known = {field.name for field in fields(Config)}
    return Config(**{name: value for name, value in model.meta.get("config", {}).items() if name in known})


def choose(config: ConsensusConfig, trained: Config, model: Model) -> list[Problem]:
    """The problems, in order. Raises DataError."""
    if config.data or not model.meta:
        problems = load_problems(config.data or "openai/gsm8k:test")
    else:
        problems = choose_problems(trained)[1]
    if not problems:
        raise ConfigError(f"the run {model.run_dir} holds out no problems; give --data")
    return problems[: config.limit or None]


def default_folder(asked: str, model: Model) -> Path:
    """Where the evaluation lies: that of a run in it, that of one of its checkpoints beside it."""
    if not model.run_dir:
        return Path(f"runs/{model.path.resolve().name}-consensus")
    return model.run_dir / (f"consensus-{model.path.name}" if Path(asked) == model.path else "consensus")


class Progress:
    """A line after a while: how many samples there are, how fast they come, how long it takes yet."""

    def __init__(self, done: int, total: int):
        self.done, self.total, self.first, self.tokens = done, total, 0, 0
        self.start, self.shown, self.terminal = 0.0, 0.0, sys.stdout.isatty()

    def add(self, ended: list[Completion]) -> None:
        now = time.monotonic()
        self.done += len(ended)
        line = f"{self.done}/{self.total} samples"
        if not self.first:  # the first ones waited for the compiler: the time left is judged by the others
            self.first, self.start = self.done, now
        else:
            self.tokens += sum(len(completion.tokens) for completion in ended)
            seconds = now - self.start
            left = clock((self.total - self.done) * seconds / (self.done - self.first))
            line += f"  {self.tokens / seconds:.0f} tokens/s  {left} left"
        last = self.done == self.total
        if last or now - self.shown > (0.2 if self.terminal else 10):
            self.shown = now
            print("\r\x1b[K" + line if self.terminal else line, end="" if self.terminal and not last else "\n", flush=True)


def sampling_config(config: ConsensusConfig, run: Config, voters: int, devices: int) -> Config:
    """The run's settings with those of the command line in their place. A group is a problem's completions."""
    group = 1 + voters
    return replace(
        run,
        system_prompt=run.system_prompt if config.system_prompt == "auto" else config.system_prompt,
        max_new_tokens=config.max_new_tokens or run.max_new_tokens,
        max_prompt_tokens=config.max_prompt_tokens or 2**31 - 1,
        prompts_per_step=config.batch_size or max(run.rows // group // devices, 1) * devices, group_size=group, microbatches=1,
        dtype=activation_dtype(run.dtype if config.dtype == "auto" else config.dtype),
        top_k=config.top_k, top_p=config.top_p, seed=config.seed, unroll=config.unroll or run.unroll,
    )  # fmt: skip


def main(argv: list[str]) -> dict[str, Any]:
    config = parse(ConsensusConfig, argv, __doc__ or "")
    models, temperatures = choose_models(config), read_temperatures(config)
    model = models["trained"]
    run, mesh = training_config(model), make_mesh(config.rollout_tp)
    if config.batch_size:
        check_divides("batch_size", config.batch_size, mesh)
    problems, run = choose(config, run, model), sampling_config(config, run, len(temperatures), mesh.size)
    folder = Path(config.out) if config.out else default_folder(config.model_path, model)
    touching = ("system_prompt", "max_new_tokens", "max_prompt_tokens", "top_k", "top_p", "seed", "dtype")
    settings = {"models": list(models)} | {name: getattr(run, name) for name in touching}
    with open_evaluation(folder, problems, temperatures, settings) as evaluation, jax.set_mesh(mesh), Interrupts(0):
        for name, one in models.items():
            print(f"{name:12}{one.found}")
        print(f"{'problems':12}{len(problems)}, {run.group_size} completions each, {run.rows} rows at a time")
        print(f"{'evaluation':12}{folder}, {len(evaluation.file.records)} samples are there", flush=True)
        progress = Progress(len(evaluation.file.records), len(models) * len(problems) * run.group_size)
        try:
            for name, one in models.items():
                evaluation.answer(name, one, mesh, run, progress.add)
        except Stopped as stopped:
            print(f"stopped by {stopped}; the same command goes on from there")
            raise
        result = evaluation.result(list(models))
    print(table(result, len(temperatures)))
    from grpo.reports.plots import attempt, draw_evaluation  # matplotlib takes a while, and is not needed before

    attempt(draw_evaluation, folder, folder / "evaluation.png")
    return result


def table(result: dict[str, Any], voters: int) -> str:
    """What came of it."""
    models = {name: found for name, found in result["models"].items() if found}
    vote = f"consensus of {voters}"
    ways, n = {"greedy": "single pass", "consensus": vote}, result["n"]
    lines = ["", f"{f'accuracy (N={n})':28}{'tagged':>8}{'95% interval':>15}{'strict':>9}{'flexible':>10}"]
    for name, found in models.items():
        for way, label in ways.items():
            row = found[way]
            interval = f"{100 * row['low']:.1f}-{100 * row['high']:.1f}%"
            lines.append(f"{name:10}{label:18}{row['tagged']:8.1%}{interval:>15}{row['strict']:9.1%}{row['flexible']:10.1%}")
    if len(models) == 1:
        lines.append("(no base model: this one was not made by a run, and no --base_path is given)")
    lines += ["", f"{'tagged answers, paired':48}{'fixed':>7}{'broke':>7}{'both right':>12}{'both wrong':>12}{'McNemar p':>11}"]
    pairs = {f"{name:10}{vote} against single pass": found["paired"] for name, found in models.items()}
    for way, counts in (result["trained_against_base"] or {}).items():
        pairs[f"trained   {ways[way]} against base's"] = counts
    for label, c in pairs.items():
        counts = f"{c['fixed']:7}{c['broke']:7}{c['both_right']:12}{c['both_wrong']:12}"
        lines.append(f"{label:48}{counts}{c['mcnemar_p']:11.2g}")
    shown = [k for k in range(1, voters + 1) if k <= 5 or k == voters or k & (k - 1) == 0]  # 6, 7, 9, ... are left out
    lines += ["", f"{'of k voters':28}" + "".join(f"{f'k={k}':>8}" for k in shown)]
    for name, found in models.items():
        for curve, label in (("pass_at_k", "pass@k"), ("maj_at_k", "maj@k")):
            lines.append(f"{name:10}{label:18}" + "".join(f"{found[curve][k - 1]:8.1%}" for k in shown))
    lines += ["", f"{'':28}{'agreement':>9}{'tokens':>12}{'seconds':>10}{'tokens/s':>10}"]
    for name, found in models.items():
        rate = found["tokens"] / max(found["seconds"], 1e-9)
        lines.append(f"{name:28}{found['agreement']:9.1%}{found['tokens']:12,}{found['seconds']:10.1f}{rate:10,.0f}")
    lines.append("(seconds with compiling)")
    for name, ids in result["too_long"].items():
        if ids:
            lines.append(f"{name}: {len(ids)} problems count as wrong, as their prompts are too long: {', '.join(ids)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
