"""Evaluate a model by single pass and by majority vote, and compare it with the model that it was trained from.

    python scripts/evaluate_consensus.py --model_path runs/tiny-seed0
    python scripts/evaluate_consensus.py --model_path runs/tiny-seed0/checkpoints/60       one of the run's checkpoints
    python scripts/evaluate_consensus.py --model_path runs/first --data openai/gsm8k:test --out first-on-test
    python scripts/evaluate_consensus.py --model_path DIR --data gsm8k_test.jsonl          a Hugging Face folder, alone

The single pass is greedy. The vote is over --samples completions at each of --temperatures. All completions of a problem share
one prefill of its prompt. Answers are read in three ways:

    tagged      the number or text in the answer tags
    strict      the same, but only of well-formed completions: others are wrong and do not vote
    flexible    the last number of the text

A completion without an answer abstains. Ties go to the answer sampled at the lowest temperature. Every problem counts: one
without an answer is wrong, and so is one that --max_prompt_tokens leaves out. pass@k: at least one of k voters is right; maj@k:
the vote of k is right; both are means over all subsets of k voters.

The evaluation of a checkpoint is written to RUN_DIR/consensus-STEP; report.py shows the gain of the vote for all of them.
Samples are written as they end, and the same command resumes a stopped evaluation. evaluation.png shows the result. The last
line of standard output is one line of JSON, shortened on a terminal; result.json has all of it. Outside `models`, its `fixed`,
`broke`, `both_right`, `both_wrong`, `mcnemar_p` and `agreement` compare the trained model's vote with its single pass (tagged).
"""

import itertools
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from data.datasets import choose_problems
from data.problems import Problem, Reading, load_problems
from grpo.config import Config, check_fields, current_names, flag
from grpo.errors import ConfigError
from grpo.runs.cli import run_script
from grpo.runs.consensus_eval import open_evaluation
from grpo.runs.console import clock
from grpo.runs.distributed import is_main_process, join, print_main
from grpo.runs.evaluate import Completion
from grpo.runs.flags import parse, parse_float
from grpo.runs.interrupts import Interrupts, Stopped
from grpo.runs.model_source import Model, find_model
from grpo.runs.setup import files_fingerprint, fingerprint, prepare_alike
from models.sharding import activation_dtype, check_divides, make_mesh

SHORT = ("n", "fixed", "broke", "both_right", "both_wrong", "mcnemar_p", "agreement", "tokens_per_s")  # on a terminal
LINE_SECONDS = 10  # between two lines of progress, where there is no terminal


@dataclass(frozen=True)
class ConsensusConfig:
    """Settings of an evaluation. What they leave open comes from the run that made the model."""

    model_path: str = flag("", "RUN_DIR or RUN_DIR/checkpoints/STEP of a run, a model folder in any form, or adapters")
    base_path: str = flag(
        "", "the model to compare with, and the base model of adapters; default: the model that the run started from"
    )
    adapter_alpha: float = flag(0.0, "alpha of adapters that do not store it", least=0)
    data: str = flag(
        "",
        "a .jsonl, .json or .parquet file or OWNER/NAME[:CONFIG][:SPLIT]; default: those held out by the run, or GSM8K's test",
    )
    question_key: str = flag("", "the column of --data that has the question; default: as in the run")
    answer_key: str = flag("", "the column that has the gold answer; default: as in the run")
    answer_pattern: str = flag("", "regular expression that finds the gold in that column; default: as in the run")
    limit: int = flag(0, "evaluate the first N problems; 0: all", least=0)
    temperatures: str = flag("0.2,0.4,0.6,0.8,1.0", "temperatures of the completions that vote")
    samples: int = flag(1, "completions at each temperature", least=1)
    out: str = flag(
        "", "output directory; default: RUN_DIR/consensus, for a checkpoint RUN_DIR/consensus-STEP, else runs/NAME-consensus"
    )
    system_prompt: str = flag("auto", "the system's turn, or what opens the user's; auto: the run's, or that of training")
    thinking: str = flag("auto", "Gemma 4: let the model think first; auto: as in the run", choices=("auto", "true", "false"))
    max_new_tokens: int = flag(0, "longest completion, the stop token included; 0: as in the run, or 512", least=0)
    max_prompt_tokens: int = flag(0, "problems with longer prompts are listed and count as wrong; 0: no limit", least=0)
    top_k: int = flag(0, "sample from the k most likely tokens; 0: all", least=0)
    top_p: float = flag(1.0, "sample from the most likely tokens of this total probability; 1: all", above=0, most=1)
    seed: int = flag(0, "determines every sample", least=0, below=2**32)
    batch_size: int = flag(
        0, "problems sampled at a time, each with all its completions; 0: as many rows as a step of the run", least=0
    )
    dtype: str = flag(
        "auto", "auto: the run's, or float32 on a CPU, bfloat16 elsewhere", choices=("auto", "float32", "bfloat16")
    )
    rollout_tp: int = flag(
        1, "devices that share one copy of the MLP and the vocabulary; 0: as many as possible, up to 8", least=0
    )
    coordinator: str = flag("", "several processes, as in training: HOST:PORT of process 0, or auto")
    processes: int = flag(1, "number of processes with --coordinator HOST:PORT; each runs this command", above=0)
    process_id: int = flag(0, "index of this process", least=0)
    unroll: bool = flag(False, "unroll the layers, as a run may have: faster on a CPU, slower to compile")

    def __post_init__(self):
        check_fields(self)
        if not self.model_path:
            raise ConfigError("model_path is needed: give --model_path RUN_DIR or a Hugging Face folder")


def read_temperatures(config: ConsensusConfig) -> list[float]:
    """The temperature of each voter: `0.2,1.0` with two samples -> [0.2, 0.2, 1.0, 1.0]."""
    try:
        temperatures = [parse_float(word) for word in config.temperatures.split(",")]
        if not all(0 < t < float("inf") for t in temperatures):
            raise ValueError
    except Exception:
        raise ConfigError(f"temperatures {config.temperatures!r} must be numbers above 0, such as 0.2,0.6,1.0") from None
    return [t for t in temperatures for _ in range(config.samples)]


def find_models(config: ConsensusConfig) -> dict[str, Model]:
    """The model as `trained`, after the model to compare it with as `base`, if there is one."""
    model = find_model(config.model_path, config.base_path, config.adapter_alpha)
    if model.trained_from:
        return {"base": model.trained_from(), "trained": model}
    if config.base_path:
        return {"base": find_model(config.base_path), "trained": model}
    return {"trained": model}


def training_config(model: Model) -> Config:
    """The settings of the run that made the model; the defaults if no run made it."""
    known = {field.name for field in fields(Config)}
    saved = current_names(model.meta.get("config", {}))
    return Config(**{name: value for name, value in saved.items() if name in known})


def evaluation_problems(config: ConsensusConfig, run: Config, model: Model) -> list[Problem]:
    """The problems to evaluate on, in order. Raises DataError or ConfigError."""
    of_run = model.meta and not config.data
    names = ("question_key", "answer_key", "answer_pattern")
    reading = Reading(*(getattr(config, name) or getattr(run, name) for name in names))
    problems = choose_problems(run)[1] if of_run else load_problems(config.data or "openai/gsm8k:test", reading=reading)
    without = [problem.id for problem in problems if not problem.answer]
    if without:
        raise ConfigError(
            f"{len(without)} problems have no answer that votes are compared with, such as {without[0]}; give --data"
        )
    if not problems:
        raise ConfigError(f"the run {model.run_dir} holds out no problems; give --data")
    return problems[: config.limit or None]


def default_folder(asked: str, model: Model) -> Path:
    """The output directory: in the run's directory for a run or one of its checkpoints, else in runs/."""
    if not model.run_dir:
        return Path(f"runs/{model.path.resolve().name}-consensus")
    return model.run_dir / (f"consensus-{model.path.name}" if Path(asked) == model.path else "consensus")


class SampleProgress:
    """Samples so far, their rate and the time left: a bar on a terminal, else a line every ten seconds.

    The rate is that of the samples after the first ones, which wait for the compiler.
    """

    def __init__(self, done: int, total: int):
        self.done, self.total, self.first, self.tokens = done, total, 0, 0
        self.start, self.shown = 0.0, float("-inf")
        terminal = sys.stdout.isatty()
        self.bar = tqdm(total=total, initial=done, unit="sample", file=sys.stdout, ncols=80) if terminal else None

    def add(self, ended: list[Completion]) -> None:
        """Show that these samples have ended."""
        now = time.monotonic()
        self.done += len(ended)
        line, rate = f"{self.done}/{self.total} samples", ""
        if not self.first:
            self.first, self.start = self.done, now
        else:
            self.tokens += sum(len(completion.tokens) for completion in ended)
            seconds = now - self.start
            rate = f"{self.tokens / seconds:.0f} tokens/s"
            line += f"  {rate}  {clock((self.total - self.done) * seconds / (self.done - self.first))} left"
        if self.bar is not None:
            self.bar.set_postfix_str(rate, refresh=False)
            self.bar.update(len(ended))
        elif self.done == self.total or now - self.shown > LINE_SECONDS:
            self.shown = now
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def sampling_settings(config: ConsensusConfig, run: Config, voters: int, devices: int) -> Config:
    """The run's settings, replaced by those of the command line. A group is all completions of a problem."""
    group = 1 + voters
    return replace(
        run,
        system_prompt=run.system_prompt if config.system_prompt == "auto" else config.system_prompt,
        thinking=run.thinking if config.thinking == "auto" else config.thinking == "true",
        max_new_tokens=config.max_new_tokens or run.max_new_tokens,
        max_prompt_tokens=config.max_prompt_tokens or 2**31 - 1,
        prompts_per_step=config.batch_size or max(run.rows // group // devices, 1) * devices, group_size=group, microbatches=1,
        dtype=activation_dtype(run.dtype if config.dtype == "auto" else config.dtype),
        top_k=config.top_k, top_p=config.top_p, seed=config.seed, unroll=config.unroll or run.unroll,
    )  # fmt: skip


class Prepared(NamedTuple):
    """What an evaluation works with, but for the weights."""

    models: dict[str, Model]
    temperatures: list[float]
    mesh: Mesh
    run: Config
    problems: list[Problem]


def prepare(config: ConsensusConfig) -> Prepared:
    """Raises ConfigError, DataError or ModelError."""
    models, temperatures = find_models(config), read_temperatures(config)
    run, mesh = training_config(models["trained"]), make_mesh(config.rollout_tp)
    if config.batch_size:
        check_divides("batch_size", config.batch_size, mesh)
    problems = evaluation_problems(config, run, models["trained"])
    return Prepared(models, temperatures, mesh, sampling_settings(config, run, len(temperatures), mesh.size), problems)


def identity_of(prepared: Prepared) -> dict[str, str]:
    """What all processes must have alike."""
    found = {f"{name} model": files_fingerprint(model) for name, model in prepared.models.items()}
    return found | {"set of problems": fingerprint(prepared.problems)}


def main(argv: list[str]) -> dict[str, Any]:
    config = parse(ConsensusConfig, argv, __doc__ or "")
    join(config.coordinator, config.processes, config.process_id)
    models, temperatures, mesh, run, problems = prepare_alike(config, partial(prepare, config), identity_of)
    folder = Path(config.out) if config.out else default_folder(config.model_path, models["trained"])
    relevant = ("system_prompt", "thinking", "max_new_tokens", "max_prompt_tokens", "top_k", "top_p", "seed", "dtype")
    settings = {"models": list(models)} | {name: getattr(run, name) for name in relevant}
    with (
        open_evaluation(folder, problems, temperatures, settings) as evaluation, jax.set_mesh(mesh),
        Interrupts(0) as interrupts,
    ):  # fmt: skip
        for name, one in models.items():
            print_main(f"{name:12}{one.found}")
        print_main(f"{'problems':12}{len(problems)}, {run.group_size} completions each, {run.rows} rows at a time")
        print_main(f"{'evaluation':12}{folder}, has {len(evaluation.file.records)} samples")
        progress = SampleProgress(len(evaluation.file.records), len(models) * len(problems) * run.group_size)
        batches = itertools.count()

        def show(ended: list[Completion]) -> None:
            if is_main_process():
                progress.add(ended)
            if jax.process_count() > 1 and interrupts.due(next(batches)):
                interrupts.check()

        try:
            for name, one in models.items():
                evaluation.draw_samples(name, one, mesh, run, show)
        except Stopped as stopped:
            progress.close()
            print_main(f"stopped by {stopped}; the same command resumes from there")
            raise
        finally:
            progress.close()
        result = evaluation.result(list(models))
    if is_main_process():
        print(result_table(result, len(temperatures)))
        from grpo.reports.plots import draw_evaluation, draw_or_warn  # matplotlib takes a while to import

        draw_or_warn(draw_evaluation, folder, folder / "evaluation.png")
    return result


# ------------------------------------------------------------------------------------------------------------- the table


def result_table(result: dict[str, Any], voters: int) -> str:
    """The figures of result.json as text."""
    models = {name: figures for name, figures in result["models"].items() if figures}
    blocks = [
        accuracy_lines(result["n"], models, voters),
        change_lines(models, result["trained_against_base"] or {}, voters),
        curve_lines(models, voters),
        cost_lines(models, result["too_long"]),
    ]
    return "\n" + "\n\n".join("\n".join(lines) for lines in blocks)


def accuracy_lines(n: int, models: dict[str, Any], voters: int) -> list[str]:
    lines = [f"{f'accuracy (N={n})':28}{'tagged':>8}{'95% interval':>15}{'strict':>9}{'flexible':>10}"]
    for name, figures in models.items():
        for way, label in (("greedy", "single pass"), ("consensus", f"consensus of {voters}")):
            row = figures[way]
            interval = f"{100 * row['low']:.1f}-{100 * row['high']:.1f}%"
            lines.append(f"{name:10}{label:18}{row['tagged']:8.1%}{interval:>15}{row['strict']:9.1%}{row['flexible']:10.1%}")
    if len(models) == 1:
        lines.append("(no base model: this model was not made by a run, and no --base_path is given)")
    return lines


def change_lines(models: dict[str, Any], against: dict[str, Any], voters: int) -> list[str]:
    vote = f"consensus of {voters}"
    pairs = {f"{name:10}{vote} against single pass": figures["paired"] for name, figures in models.items()}
    for way, label in (("greedy", "single pass"), ("consensus", vote)):
        if way in against:
            pairs[f"trained   {label} against base's"] = against[way]
    lines = [f"{'tagged answers, paired':48}{'fixed':>7}{'broke':>7}{'both right':>12}{'both wrong':>12}{'McNemar p':>11}"]
    for label, pair in pairs.items():
        counts = f"{pair['fixed']:7}{pair['broke']:7}{pair['both_right']:12}{pair['both_wrong']:12}"
        lines.append(f"{label:48}{counts}{pair['mcnemar_p']:11.2g}")
    return lines


def curve_lines(models: dict[str, Any], voters: int) -> list[str]:
    shown = [k for k in range(1, voters + 1) if k <= 5 or k == voters or k & (k - 1) == 0]  # 6, 7, 9, ... are left out
    lines = [f"{'of k voters':28}" + "".join(f"{f'k={k}':>8}" for k in shown)]
    for name, figures in models.items():
        for curve, label in (("pass_at_k", "pass@k"), ("maj_at_k", "maj@k")):
            lines.append(f"{name:10}{label:18}" + "".join(f"{figures[curve][k - 1]:8.1%}" for k in shown))
    return lines


def cost_lines(models: dict[str, Any], too_long: dict[str, list[str]]) -> list[str]:
    lines = [f"{'':28}{'agreement':>9}{'tokens':>12}{'seconds':>10}{'tokens/s':>10}"]
    for name, figures in models.items():
        rate = figures["tokens"] / max(figures["seconds"], 1e-9)
        lines.append(f"{name:28}{figures['agreement']:9.1%}{figures['tokens']:12,}{figures['seconds']:10.1f}{rate:10,.0f}")
    lines.append("(seconds include compilation)")
    for name, ids in too_long.items():
        if ids:
            lines.append(f"{name}: {len(ids)} problems count as wrong because their prompts are too long: {', '.join(ids)}")
    return lines


if __name__ == "__main__":
    run_script(main, sys.argv[1:], SHORT)
