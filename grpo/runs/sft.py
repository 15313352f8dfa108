"""Supervised fine-tuning: a run of grpo/runs/trainer.py whose completions are given instead of sampled.

    loss = -mean of log π over the completion tokens of a step, the stop token included

With advantage 1, beta 0 and the policy as its own old policy the GRPO loss has this gradient, so packing, log-probabilities,
optimizer and schedule are those of a GRPO step: one group of one completion for each prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from data import DataError
from data.batches import pad_prompts
from data.problems import Problem, completion_of
from data.tokenizer import Tokenizer
from grpo.batch import Batch
from grpo.config import Config
from grpo.rollout import Completions, build_batch
from grpo.runs.console import Progress, plan_lines, wrap
from grpo.runs.evaluate import evaluate
from grpo.runs.setup import Setup, prepare
from grpo.runs.trainer import Trainer
from grpo.session import Session, learning_rates, plan_sessions
from grpo.step import StepResult, update
from grpo.update import TrainState, completion_logprobs, policy
from models.gemma import Params
from models.sampler import Samples
from models.sharding import to_host

Encoded = tuple[list[Problem], list[list[int]], list[list[int]], list[Problem]]


def prepare_sft(config: Config) -> Setup:
    """`grpo.runs.setup.prepare` with the completions of all problems. Raises ConfigError, DataError or ModelError."""
    run = prepare(config, demonstrated=True)
    width = config.max_new_tokens
    problems, prompts, completions, dropped = encode(run.problems, run.prompt_ids, run.tokenizer, width)
    held_out, held_out_prompts, held_out_completions, more = encode(run.eval_problems, run.eval_ids, run.tokenizer, width)
    return replace(
        run, problems=problems, prompt_ids=prompts, completion_ids=completions, eval_problems=held_out,
        eval_ids=held_out_prompts, eval_completion_ids=held_out_completions, dropped=[*run.dropped, *dropped, *more],
        sessions=plan_sessions(config, len(problems)),
    )  # fmt: skip


def encode(problems: list[Problem], prompts: list[list[int]], tokenizer: Tokenizer, width: int) -> Encoded:
    """(problems whose completion has at most `width` tokens, their prompts, their completions, the other problems).

    Completions end in the token that ends a turn. Raises DataError when all of them are too long.
    """
    completions = [[*tokenizer.encode(completion_of(problem)), tokenizer.end_of_turn_id] for problem in problems]
    fits = [len(ids) <= width for ids in completions]
    if problems and not any(fits):
        shortest = min(map(len, completions))
        raise DataError(f"none of {len(problems)} completions fits in {width} tokens: the shortest has {shortest}")

    def fitting(values: list[Any]) -> list[Any]:
        return [value for value, fit in zip(values, fits, strict=True) if fit]

    dropped = [problem for problem, fit in zip(problems, fits, strict=True) if not fit]
    return fitting(problems), fitting(prompts), fitting(completions), dropped


def make_given(
    problems: Sequence[Any], prompts: Sequence[list[int]], completions: Sequence[list[int]], run: Setup
) -> tuple[Completions, np.ndarray, Batch]:  # fmt: skip
    """(given completions as if they were sampled, one for each prompt; the tokens that count, BC; the batch)."""
    pad, config = run.tokenizer.pad_id, run.config
    padded, prompt_lengths = pad_prompts(prompts, config.max_prompt_tokens, pad)
    tokens, lengths = pad_prompts(completions, config.max_new_tokens, pad)
    samples: Any = Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, np.zeros(len(lengths), bool))  # type: ignore
    given = Completions(list(problems), padded, prompt_lengths, samples, [""] * len(lengths))
    mask, batch = build_batch(given, np.zeros((len(lengths), 1)), np.ones((len(lengths), 1), np.float32), run)
    return given, mask, batch


def sft_step(
    step: int, session: Session, state: TrainState, run: Setup, base: Params | None = None
) -> tuple[TrainState, StepResult]:
    """One update on the given completions of the step's problems. `state` is donated: do not use it again."""
    chosen = session.problems_of(step)
    given, mask, batch = make_given(
        pick(run.problems, chosen), pick(run.prompt_ids, chosen), pick(run.completion_ids, chosen), run
    )
    rates = learning_rates(step, session, run.sessions[-1].end, run.config)
    state, stats, terms = update(state, batch, rates, run, base)
    return state, StepResult(given, [], np.ones((len(chosen), 1)), mask, batch, rates, stats, terms, 0)


def pick(values: Sequence[Any], indices: Iterable[int]) -> list[Any]:
    return [values[i] for i in indices]


def mean_nll(logprobs: np.ndarray, mask: np.ndarray) -> float:
    """The mean of -log π over the tokens that count, in nats.  BC, BC -> scalar"""
    return float(-np.where(mask, logprobs, 0.0).sum(dtype=float) / mask.sum())


def held_out_loss(params: Params, run: Setup) -> float:
    """The mean of -log π over all completion tokens of the held-out problems, in nats."""
    total = tokens = 0.0
    for mask, batch in held_out_batches(run):
        logprobs = to_host(completion_logprobs(params, batch, run.model, run.train, run.update))
        total += mean_nll(batch.restore(logprobs), mask) * mask.sum()
        tokens += mask.sum()
    return float(total / tokens)


def held_out_batches(run: Setup) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches of as many held-out problems as a step has; the last one is filled with problems that do not count."""
    count, Q = len(run.eval_problems), run.config.prompts_per_step
    for start in range(0, count, Q):
        chosen = [i % count for i in range(start, start + Q)]
        rows = pick(run.eval_problems, chosen), pick(run.eval_ids, chosen), pick(run.eval_completion_ids, chosen)
        _, mask, batch = make_given(*rows, run)
        yield mask & (np.arange(start, start + Q) < count)[:, None], batch


def describe_sft(run: Setup) -> str:
    """The plan, before anything is spent."""
    config, tokens = run.config, sum(map(len, run.completion_ids))
    sizes = f"at most {config.max_prompt_tokens} + {config.max_new_tokens} tokens"
    replaced = {
        "a step": f"{config.prompts_per_step} prompts with their completions, {sizes}",
        "plan": f"{run.steps} steps; the completions have {tokens} tokens, {tokens / len(run.problems):.0f} each",
        "loss": f"mean of -log p over the completions' tokens; learning rate {config.learning_rate}",
    }
    return "\n".join(wrap(label, replaced.get(label, text)) for label, text in plan_lines(run))


class LossProgress(Progress):
    """A line of figures a step."""

    def postfix(self, metrics: dict[str, float]) -> str:
        return f"loss {metrics['loss']:.4f}"

    def line(self, step: int, metrics: dict[str, float]) -> str:
        return (
            f"step {step}/{self.steps}  loss {metrics['loss']:.4f}  length {metrics['completions/mean_length']:5.1f}  "
            f"{metrics['tokens_per_s/total']:.0f} tokens/s  {metrics['time/step']:.2f} s"
        )


class SFTTrainer(Trainer):
    """A run of supervised fine-tuning under way. Held-out problems have a loss, and an accuracy if they have an answer."""

    prepare = staticmethod(prepare_sft)
    describe_plan = staticmethod(describe_sft)
    draw = staticmethod(lambda folder: None)
    progress_kind = LossProgress

    def advance(self, step: int, session: Session) -> tuple[TrainState, StepResult]:
        return sft_step(step, session, self.state, self.run, self.base)

    def measure(self, step: int, result: StepResult, seconds: dict[str, float]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        lengths, memory = result.completions.samples.lengths, self.run.mesh.local_devices[0].memory_stats() or {}
        stats = {name: float(value) for name, value in jax.device_get(result.stats).items()}
        return {
            "loss": mean_nll(*to_host((result.terms["logprobs"], result.batch.mask))),
            "grad_norm": stats["grad_norm"],
            "lr": result.rates[-1],
            "bad_updates": stats["bad_updates"],
            "bad_updates_in_a_row": int(self.state.bad_in_a_row),
            "completions/mean_length": float(lengths.mean()),
            "completions/max_length": float(lengths.max()),
            "hbm_peak": memory.get("peak_bytes_in_use", 0),
            "time/update": seconds["update"],
            "time/step": seconds["step"],
            "tokens_per_s/total": int(lengths.sum()) / seconds["step"],
        }, []

    def held_out(self, params: Params) -> dict[str, Any]:
        loss = held_out_loss(policy(self.state.params, self.base, self.run.update), self.run)
        if not all(problem.answer for problem in self.run.eval_problems):
            return {"loss": loss}
        wide = replace(self.run, config=replace(self.config, group_size=Config.group_size))  # sampling wants many rows
        return {"loss": loss, "accuracy": evaluate(params, wide.eval_problems, wide.eval_ids, wide)}

    def result(self) -> dict[str, Any]:
        result, records = super().result(), self.metrics.records
        losses = {record["step"]: record["loss"] for record in self.evaluations.records}
        del result["reward_first"], result["reward_last"]
        return result | {
            "loss_first": records[0]["loss"] if records else None,
            "loss_last": records[-1]["loss"] if records else None,
            "held_out_loss_before": losses.get(0),
            "held_out_loss_after": losses.get(self.done),
        }
