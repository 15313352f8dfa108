"""What a person sees of a run: the plan before it, a progress bar and lines during it, a table after it.

Everything fits 80 columns on a terminal. Into a file or a pipe goes one line a step, and no line is wrapped.
"""

import shutil
import sys
import textwrap
import time
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from data.problems import Problem
from grpo.config import Config
from grpo.memory import count, resident_bytes
from grpo.runs.run_dir import run_dir
from grpo.runs.setup import Setup
from grpo.update import freezes_table
from models.gemma import shapes, split_table
from models.lora import count_adapters

LABEL = 12  # columns of what stands before each line of the plan
TREND = 20  # lines of a run that stay visible above the progress bar
COLUMNS = 4  # of the closing table


def describe_plan(run: Setup) -> str:
    """The plan, before anything is spent."""
    return "\n".join(wrap(label, text) for label, text in plan_lines(run))


def plan_lines(run: Setup) -> list[tuple[str, str]]:
    """Its lines: label and text."""
    config, mesh, mu = run.config, run.mesh, run.config.updates_per_rollout
    device = mesh.devices.flat[0]
    tokens = run.steps * config.rows * config.max_new_tokens
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines = [
        ("model", f"{run.base.line}, {run.train.dtype}"),
        ("mesh", f"{mesh.size} x {device.device_kind}  (fsdp {mesh.shape['fsdp']} x tp {mesh.shape['tp']}){processes}"),
        ("data", f"{len(run.problems)} problems from {config.data}, {len(run.eval_problems)} held out, "
         f"{len(run.dropped)} too long and dropped{first_ids(run.dropped)}"),
        ("a step", f"{config.prompts_per_step} prompts x {config.group_size} completions = {config.rows} rows, "
         f"at most {config.max_prompt_tokens} + {config.max_new_tokens} tokens"),
        ("plan", f"{run.steps} steps, {mu} update{'s' if mu > 1 else ''} each, at most {tokens / 1e6:.1f}M sampled tokens"),
        ("evaluation", evaluation_plan(run)),
    ]  # fmt: skip
    if config.pass_rates:
        _, never, always, unmeasured = run.chosen
        lines.append(("left out", f"{never} problems that were never solved, {always} always; {unmeasured} have no pass rate"))
    for session in run.sessions:
        reviewed = f", {len(session.review)} reviewed" if session.number > 1 else ""
        problems = f"{len(session.new)} new problems{reviewed}"
        lines.append((f"session {session.number}", f"steps {session.start + 1} to {session.end}: {problems}"))
    if len(run.sessions) > 1:
        lines.append(("carried", describe_sessions(run)))
    return [
        *lines,
        ("trained", describe_trained(run)),
        ("loss", f"{config.aggregation}, beta {config.beta}, advantages by {config.advantage_scale}; "
         f"learning rate {config.learning_rate}"),
        ("memory", f"{state_bytes(run) / 2**30:.2f} GiB a device at least: weights, moments, gradients, reference, "
         f"sampling weights, KV cache"),
        ("run", str(run_dir(config))),
    ]  # fmt: skip


def evaluation_plan(run: Setup) -> str:
    """What evaluations cost beside the steps."""
    config, problems = run.config, len(run.eval_problems)
    if not config.eval_problems:
        return "none"
    sessions = [session for session in run.sessions if config.session in (0, session.number)]
    every, between = config.eval_every, 0
    if every:  # inside sessions: their ends are evaluated anyway
        between = sum((session.end - 1) // every - session.start // every for session in sessions)
    times = len(sessions) + 1 + between
    retained = [min(config.retention_problems, len(session.new)) for session in run.sessions]
    earlier = sum(sum(retained[: session.number]) for session in sessions)
    tokens = (2 * problems * times + earlier) * config.max_new_tokens
    also = f", {earlier} answers to problems of sessions" if earlier else ""
    return (
        f"{times} times {problems} problems, each greedy and sampled{also}: at most {tokens / 1e6:.1f}M sampled tokens "
        f"(--eval_problems {config.eval_problems})"
    )


def describe_sessions(run: Setup) -> str:
    """What one session hands to the next."""
    config = run.config
    moments = ", Adam's moments" if config.carry_optimizer else ""
    spans = {"session": "each session", "run": "the whole run"}[config.schedule]
    reference = "the policy at each session's start" if config.reference == "session_start" else "the initial model"
    return f"weights{moments}; the learning rate's schedule spans {spans}; the reference is {reference}"


def sampling_bias(config: Config) -> str:
    """One line about settings of the sampler that bias the gradient; "" without them."""
    names = [name for name, off in (("top_k", 0), ("top_p", 1.0)) if getattr(config, name) != off]
    if not names:
        return ""
    given, off = (" and ".join(words) for words in ([f"{n} {getattr(config, n):g}" for n in names], [f"--{n}" for n in names]))
    return (
        f"{given} biases the gradient: tokens come from a cut distribution, log-probabilities are of the whole one, so every "
        f"update also sharpens the policy, whatever the reward; leave out {off}"
    )


def describe_trained(run: Setup) -> str:
    config = run.config
    if not config.lora_rank:
        return "all weights"
    count = count_adapters(run.model, run.update.lora_names, config.lora_rank)
    return (
        f"adapters of rank {config.lora_rank} on {config.lora_targets}, alpha {config.lora_alpha:g} "
        f"({count / 1e6:.1f}M parameters, {12 * count / 1e6:.0f} MB a checkpoint)"
    )


def first_ids(problems: list[Problem]) -> str:
    """` (gsm8k_train.jsonl:7, ...)`; nothing for no problems."""
    if not problems:
        return ""
    return f" ({', '.join(problem.id for problem in problems[:3])}{', ...' if len(problems) > 3 else ''})"


def wrap(label: str, text: str) -> str:
    """A labelled line, broken between words to the width of a terminal."""
    line = f"{label:{LABEL}}{text}"
    if not sys.stdout.isatty():
        return line
    width = max(shutil.get_terminal_size().columns, 40)
    return textwrap.fill(line, width, subsequent_indent=" " * LABEL, break_long_words=False, break_on_hyphens=False)


def state_bytes(run: Setup) -> float:
    """Bytes that a device must hold, activations aside: a lower bound."""
    config, model, n = run.config, run.model, run.mesh.size
    width = jnp.dtype(run.train.dtype).itemsize
    state = resident_bytes(model, run.train.dtype, run.update) / n
    copied = shapes(model)  # by `sampling_params`: all that is not frozen and in its place
    if freezes_table(model, run.update) and run.mesh.shape["fsdp"] == 1:
        copied = split_table(copied)[0]
    sampling_weights = 0 if config.lora_rank and n == 1 else count(copied) * width / run.mesh.shape["tp"]
    slots = config.prompts_per_step * config.max_prompt_tokens + config.rows * config.max_new_tokens
    cache = 2 * model.cache_width * slots * width / n
    return state + sampling_weights + cache


class Progress:
    """A line of figures a step. On a terminal: a bar, and about `TREND` lines of the run above it."""

    def __init__(self, steps: int):
        self.steps, self.first, self.start, self.bar = steps, 0, 0.0, None
        self.said = time.monotonic()

    def evaluating(self, step: int, done: int, wanted: int) -> None:
        """How far an evaluation is: on the bar, or as a line every half minute."""
        text = f"evaluation: {done} of {wanted} samples"
        if sys.stdout.isatty():
            if self.bar is None:
                self.bar = tqdm(total=self.steps, initial=step, unit="step", file=sys.stdout, ncols=80, leave=False)
            self.bar.set_postfix_str(text)
        elif time.monotonic() - self.said > 30 and done < wanted:
            self.said = time.monotonic()
            print(text, flush=True)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        if self.bar is None and sys.stdout.isatty():
            self.bar = tqdm(total=self.steps, initial=step - 1, unit="step", file=sys.stdout, ncols=80, leave=False)
        if self.bar is None:
            print(f"{self.line(step, metrics)}  {self.time_left(step)}", flush=True)
            return
        if step == 1 or step == self.steps or step % max(self.steps // TREND, 1) == 0:
            self.bar.write(self.line(step, metrics), file=sys.stdout)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(self.postfix(metrics))

    def postfix(self, metrics: dict[str, float]) -> str:
        return f"reward {metrics['reward']:.2f}" + (f" accuracy {metrics['accuracy']:.0%}" if "accuracy" in metrics else "")

    def line(self, step: int, metrics: dict[str, float]) -> str:
        accuracy = f"accuracy {metrics['accuracy']:5.1%}  " if "accuracy" in metrics else ""
        return (
            f"step {step}/{self.steps}  reward {metrics['reward']:6.2f}  {accuracy}"
            f"length {metrics['completions/mean_length']:5.1f}  kl {metrics.get('kl/k3', 0):.4f}  {metrics['time/step']:.2f} s"
        )

    def time_left(self, step: int) -> str:
        """Judged by the steps after the first one, which compiles."""
        now = time.monotonic()
        if not self.first:
            self.first, self.start = step, now
            return "compiled"
        pace = (now - self.start) / (step - self.first)
        return f"{clock((self.steps - step) * pace)} left"

    def warn(self, line: str) -> None:
        if self.bar is None:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        else:
            self.bar.write(f"warning: {line}", file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def clock(seconds: float) -> str:
    """`3:07` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def closing_table(result: dict[str, Any]) -> str:
    """Accuracies before and after the last sessions, the cost of the run, and where its files are."""
    sessions = result["sessions"][1 - COLUMNS :]
    columns = [result["accuracy_before"], *(session["accuracy"] for session in sessions)]
    lines, tuned = list[str](), "reward_first" not in result  # supervised fine-tuning
    if tuned and result["held_out_loss_after"] is not None:
        losses = [result["held_out_loss_before"], result["held_out_loss_after"]]
        lines = ["", table_row("", ["before", "after"]), table_row("held-out loss", [f"{loss:.4f}" for loss in losses])]
        lines += accuracy_rows(columns) if all(columns) else []
    elif len(columns) > 1 and all(columns):
        names = [f"session {session['session']}" for session in sessions]
        lines = ["", table_row("", ["before", *(names if len(result["sessions"]) > 1 else ["after"])])]
        lines += [*accuracy_rows(columns), *retention_rows(sessions)]
        if len(sessions) < len(result["sessions"]):
            lines.append(f"earlier sessions: {result['run_dir']}/result.json")
    seconds, compiles = clock(result["seconds"]), result["recompilations"]
    seed = result["seed"] + 1
    again = (
        f"python scripts/train.py --seed {seed}" if result["preset"] == "tiny" else f"the same with --seed {seed} --run_dir DIR"
    )
    files = "metrics, completions, tokens, evaluations, config, sessions, result, training.png, checkpoints/"
    if tuned:
        files = "metrics, evaluations, config, sessions, result, checkpoints/"
        again = f"python scripts/train.py PRESET --model_path {result['run_dir']} --data FILE --run_dir DIR"
    why = "GRPO from here" if tuned else "rerun with another seed to see the variance"
    return "\n".join([
        *lines,
        f"\n{result['steps']} steps, {compiles} recompilations, {seconds}",
        wrap("files", f"{result['run_dir']}: {files}"),
        wrap("next", f"{again}  ({why})"),
    ])  # fmt: skip


def accuracy_rows(columns: list[dict[str, Any]]) -> list[str]:
    rows = [
        table_row(f"accuracy, greedy (N={columns[0]['n']})", [f"{column['greedy']:.1%}" for column in columns]),
        table_row("  95% interval", [interval(column) for column in columns]),
    ]
    for name, key, form in (
        ("accuracy, sampled", "sampled", ".1%"),
        ("format right, sampled", "sampled_format", ".1%"),
        ("reward, sampled", "sampled_reward", ".2f"),
        ("length, sampled", "sampled_length", ".1f"),
    ):
        rows.append(table_row(name, ["-" if column[key] is None else format(column[key], form) for column in columns]))
    return rows


def retention_rows(sessions: list[dict[str, Any]]) -> list[str]:
    """How each of the sessions' own problems is answered after it and after later ones."""
    rows = []
    for earlier in sessions:
        kept = [session["retention"].get(str(earlier["session"])) for session in sessions]
        if any(kept):
            n = next(figures["n"] for figures in kept if figures)
            cells = [f"{figures['greedy']:.1%}" if figures else "" for figures in kept]
            rows.append(table_row(f"session {earlier['session']}'s problems (N={n})", ["", *cells]))
            rows.append(table_row("  95% interval", ["", *(interval(figures) if figures else "" for figures in kept)]))
    return rows


def table_row(name: str, cells: list[str]) -> str:
    return f"{name:32}" + "".join(f"{cell:>12}" for cell in cells)


def interval(figures: dict[str, Any]) -> str:
    return f"{100 * figures['low']:.0f}-{100 * figures['high']:.0f}%"
