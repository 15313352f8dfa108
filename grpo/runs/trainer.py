"""A training run: sessions of steps, with evaluations, checkpoints and records around them. A step itself is grpo/step.py."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax

from grpo.config import Config
from grpo.errors import RunError
from grpo.runs.alarms import alarms, diagnose, zero_variance_steps
from grpo.runs.checkpoint import Checkpoints, digest, load_digested
from grpo.runs.console import Progress, closing_table, describe_plan, sampling_bias
from grpo.runs.distributed import broadcast_from_main, is_main_process, join, print_main
from grpo.runs.evaluate import evaluate
from grpo.runs.interrupts import Interrupts, Stopped
from grpo.runs.metrics import CompileCounter, JsonLines, completion_records, step_metrics, write_json
from grpo.runs.model_source import copy_description
from grpo.runs.resume import Lineage, find_start, rate_change, restore_session_start
from grpo.runs.run_dir import open_run_dir
from grpo.runs.setup import Setup, identity_of, load_base, prepare, prepare_alike
from grpo.runs.token_trace import groups_due, token_records
from grpo.runs.trackers import Trackers
from grpo.session import Session
from grpo.step import StepResult, one_step
from grpo.timing import phase_seconds
from grpo.update import (
    TrainState,
    frozen,
    init_state,
    kept_by_rounding,
    policy,
    reference_of,
    sampling_params,
    starting_point,
)
from models.gemma import Params
from models.sharding import abstract_like


def train(config: Config, kind: "type[Trainer] | None" = None) -> dict[str, Any]:
    """The whole run: plan, evaluate, train, save, evaluate. The same call again continues where it stopped.

    `kind` is `Trainer`, or that of supervised fine-tuning. Returns what the script prints as JSON.

    Raises ConfigError, DataError or ModelError for mistakes of the user, RunError for a run that cannot continue, Stopped when
    a signal asked for it.
    """
    started, compiles = time.monotonic(), CompileCounter()
    join(config.coordinator, config.processes, config.process_id)
    kind = kind or Trainer
    run = prepare_alike(config, partial(kind.prepare, config), identity_of)
    with run.rewards, open_run_dir(config) as folder, jax.set_mesh(run.mesh), Interrupts(config.max_hours) as interrupts:
        print_main(kind.describe_plan(run))
        if is_main_process() and (caution := sampling_bias(config)):
            print(f"warning: {caution}", file=sys.stderr, flush=True)
        trainer = None
        try:
            with kind(run, folder, interrupts, compiles) as trainer:
                trainer.train()
        except Stopped as stopped:
            step = trainer.done if trainer else 0
            print_main(f"stopped     by {stopped} after step {step}; the same command continues from there")
            if stopped.code or trainer is None:  # code 0: the hours of this run are over
                raise
        result = trainer.result() | {"seconds": round(time.monotonic() - started, 1)}
        if is_main_process():
            write_json(folder / "result.json", result)
            kind.draw(folder)
    print_main(closing_table(result))
    return result


def draw_dashboard(folder: Path) -> None:
    """training.png of a run."""
    from grpo.reports.plots import draw_or_warn, draw_training  # matplotlib takes a while to import

    draw_or_warn(draw_training, folder, folder / "training.png")


class Trainer:
    """A run under way: the state after `done` steps, the reference, and the records that it writes.

    A context: leaving it waits for the last checkpoint and closes progress bar and trackers.
    """

    prepare: Callable[[Config], Setup] = staticmethod(prepare)
    describe_plan: Callable[[Setup], str] = staticmethod(describe_plan)
    draw: Callable[[Path], None] = staticmethod(draw_dashboard)
    progress_kind: type[Progress] = Progress

    def __init__(self, run: Setup, folder: Path, interrupts: Interrupts, compiles: CompileCounter):
        """Loads the weights, or what a checkpoint holds. Raises ConfigError when the run cannot continue from there."""
        config = run.config
        self.run, self.config, self.folder, self.interrupts, self.compiles = run, config, folder, interrupts, compiles
        self.recompilations, self.saved_at = 0, time.monotonic()
        self.progress = self.progress_kind(run.steps)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints, config.async_save)

        weights, fingerprint = load_digested(partial(load_base, run), run.model)
        files = {"model": fingerprint, "tokenizer": run.tokenizer.fingerprint, "reward": run.rewards.fingerprint}
        self.lineage = Lineage(run, folder, broadcast_from_main(files))
        trained, self.base = starting_point(weights, run.model, run.train.dtype, config.seed, run.update)
        del weights
        self.abstract_state = abstract_like(partial(init_state, config=run.update), trained, mesh=run.mesh)
        self.reference = reference_of(trained, self.base, run.train.dtype, run.update) if config.beta else None
        found = find_start(self.lineage, self.checkpoints, self.abstract_state, self.reference is not None)
        if found is None:
            self.done, self.state, self.provenance = 0, init_state(trained, run.update), []
            if (folder / "metrics.jsonl").exists():
                print_main("restarted   from the beginning: there was no checkpoint yet")
        else:
            self.done, self.state, self.provenance = found.step, found.state, found.meta["provenance"]
            print_main(f"resumed     after step {self.done}")
            if change := rate_change(run, found):
                print_main(f"rate        {change}")
        del trained

        if is_main_process():
            write_json(folder / "config.json", asdict(config))
            copy_description(run.base, folder / "model")
            write_json(folder / "sessions.json", [self.session_record(session) for session in run.sessions])
        kept = self.done if found else -1
        self.metrics, self.evaluations = (JsonLines(folder / f"{name}.jsonl", kept) for name in ("metrics", "evaluations"))
        self.completions, self.tokens = (
            JsonLines(folder / f"{name}.jsonl", kept, remember=False) for name in ("completions", "tokens")
        )
        if is_main_process() and found and (lost := self.lost_records()):
            print(f"warning: {lost}: curves and result.json lack them", file=sys.stderr, flush=True)
        self.trackers = Trackers(config.track if is_main_process() else "", folder, asdict(config), self.progress.warn)
        self.trackers.open(self.done)

    def lost_records(self) -> str:
        """Which records of the steps before a checkpoint are gone; "" for none."""
        steps = {record["step"] for record in self.metrics.records}
        lost = [f"metrics.jsonl has records of {len(steps)} of {self.done} steps"] if len(steps) < self.done else []
        if self.run.eval_problems and all(record["step"] for record in self.evaluations.records):
            lost.append("evaluations.jsonl has no evaluation before training")
        return "; ".join(lost)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        self.progress.close()
        try:
            alone = jax.process_count() == 1  # of several processes one may fail alone, and must not wait for the others
            if error is None or isinstance(error, Stopped) or alone:
                self.checkpoints.close()
        finally:
            self.trackers.close()

    def train(self) -> None:
        """All sessions that are asked for."""
        if self.done == 0:
            self.evaluate()
        for session in self.run.sessions[: self.config.session or None]:
            if self.done < session.end:
                self.train_session(session)
            if self.done == session.end:
                self.evaluate([earlier for earlier in self.run.sessions if earlier.number <= session.number])

    def train_session(self, session: Session) -> None:
        """The steps of a session that are not done yet."""
        self.begin_session(session)
        first = self.done + 1
        with self.interrupts.held():
            for step in range(first, session.end + 1):
                if self.config.eval_every and self.done > session.start and self.done % self.config.eval_every == 0:
                    self.evaluate()  # measured once: also when a resumed run passes here again
                compiled = self.step(step, session)
                self.recompilations += compiled if step > first else 0
                stopping = self.interrupts.due(step)
                self.save(wait=stopping or step == session.end)
                if stopping:
                    self.interrupts.check()
                self.stop_when_nothing_is_learned()

    def begin_session(self, session: Session) -> None:
        """What changes between sessions: the optimizer's moments, and the reference."""
        if session.number > 1 and self.done == session.start and not self.config.carry_optimizer:
            self.state = init_state(self.state.params, self.run.update)
        if session.number > 1 and self.config.beta and self.config.reference == "session_start":
            self.reference = self.session_start(session)

    def step(self, step: int, session: Session) -> int:
        """One step, timed and recorded: the number of programs that it compiled."""
        compiled, start = self.compiles.count, time.perf_counter()
        due = groups_due(step, self.run.sessions[-1].end, self.config)
        rounds = self.config.lora_rank and self.run.train.dtype != "float32"
        adapters = frozen(self.state.params, "float32") if due and rounds else None
        with phase_seconds() as seconds:
            self.state, result = self.advance(step, session)
        self.done, compiled = step, self.compiles.count - compiled
        tokens = self.trace_tokens(step, session, due, result)
        seconds["step"] = time.perf_counter() - start
        metrics, completions = self.measure(step, result, seconds)
        metrics["compiles"] = compiled
        if adapters is not None and result.terms:
            rest = result.batch, result.terms["old"], self.run.model, self.run.train, self.run.update
            metrics |= jax.tree.map(float, jax.device_get(kept_by_rounding(adapters, self.base, *rest)))
        self.record({"step": step, "session": session.number, **metrics}, completions, tokens)
        if metrics["bad_updates_in_a_row"] >= self.config.max_bad_updates:
            count = metrics["bad_updates_in_a_row"]
            raise RunError(f"step {step}: {count} non-finite updates in a row; try a lower learning_rate")
        return compiled

    def advance(self, step: int, session: Session) -> tuple[TrainState, StepResult]:
        """The state after a step, and what the step did."""
        return one_step(step, session, self.state, self.run, self.reference, self.base)

    def measure(self, step: int, result: StepResult, seconds: dict[str, float]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The step's record in metrics.jsonl, and those of its completions."""
        return step_metrics(result, seconds, int(self.state.bad_in_a_row), self.run), completion_records(step, result)

    def trace_tokens(self, step: int, session: Session, due: int, result: StepResult) -> list[dict[str, Any]]:
        """Every token of the `due` groups that are inspected in this step."""
        if not due or not result.terms:
            return []
        completions = result.completions
        records = token_records(
            completions.problems[:due], completions.samples, result.batch, result.terms, self.run.tokenizer, self.config
        )  # fmt: skip
        return [{"step": step, "session": session.number, **record} for record in records]

    def record(self, metrics: dict[str, Any], completions: list[dict[str, Any]], tokens: list[dict[str, Any]]) -> None:
        """Write a step's records, show it, and warn of the alarms that it raises."""
        history = self.metrics.records
        active = alarms([*history, metrics])
        before = history[-1]["alarms"] if history else []
        self.metrics.write(metrics | {"alarms": list(active)})
        self.completions.write_all(completions)
        self.tokens.write_all(tokens)
        self.trackers.write(metrics["step"], metrics)
        if is_main_process():
            self.progress.show(metrics["step"], metrics)
            for name, text in active.items():
                if name not in before:
                    self.progress.warn(f"{name}: {text}")

    def stop_when_nothing_is_learned(self) -> None:
        """RunError after `max_zero_variance_steps` steps in which all advantages were 0."""
        limit = self.config.max_zero_variance_steps
        if limit and zero_variance_steps(self.metrics.records) >= limit:
            raise RunError(diagnose(self.metrics.records))

    def session_start(self, session: Session) -> Params:
        """The policy that a session starts from, as its frozen reference."""
        state = self.state
        if self.done > session.start:
            state = restore_session_start(self.lineage, self.checkpoints, self.abstract_state, session)
        return policy(frozen(state.params, self.run.train.dtype), self.base, self.run.update)

    def save(self, wait: bool) -> None:
        """A checkpoint, if one is due. `wait` makes it due, and returns when it is written and verified."""
        config = self.config
        self.checkpoints.settle(wait=False)
        late = bool(config.save_minutes) and time.monotonic() > self.saved_at + 60 * config.save_minutes
        if broadcast_from_main(late) or wait or self.done % config.save_every == 0:
            self.checkpoints.save(self.done, self.state, self.lineage.meta(self.done, self.provenance), wait)
            self.saved_at = time.monotonic()

    def evaluate(self, sessions: Sequence[Session] = ()) -> dict[str, Any]:
        """Accuracy on held-out problems, and on the new problems of each of `sessions`. Measured once, then read back."""
        run, config = self.run, self.config
        known = next((record for record in self.evaluations.records if record["step"] == self.done), None)
        retained = bool(sessions) and config.retention_problems > 0 and config.eval_problems > 0
        if known is not None or not (run.eval_problems or retained):
            return known or {}
        began = time.perf_counter()
        params = sampling_params(policy(self.state.params, self.base, run.update), run.model, run.sample)
        measure = partial(evaluate, params, run=run, report=self.report_evaluation)
        record: dict[str, Any] = {"step": self.done}
        if run.eval_problems:
            record |= self.held_out(params)
        if retained:
            record["retention"] = {}
            for session in sessions:
                chosen = session.new[: config.retention_problems]
                figures = measure([run.problems[i] for i in chosen], [run.prompt_ids[i] for i in chosen], sampled=False)
                if "greedy" in figures:
                    record["retention"][str(session.number)] = figures
        self.evaluations.write(record | {"time/eval": time.perf_counter() - began})
        greedy = {f"session_{number}": figures["greedy"] for number, figures in record.get("retention", {}).items()}
        figures = (
            record.get("accuracy", record.get("held_out", {}))
            | {name: record[name] for name in ("loss",) if name in record}
            | greedy
        )
        self.trackers.write(self.done, {f"eval/{name}": figure for name, figure in figures.items()})
        return record

    def report_evaluation(self, done: int, wanted: int) -> None:
        if is_main_process():
            self.progress.evaluating(self.done, done, wanted)

    def held_out(self, params: Params) -> dict[str, Any]:
        """The part of an evaluation's record that is about held-out problems: `accuracy`, or `held_out` where none has a gold.

        `params` are sampling parameters.
        """
        figures = evaluate(params, self.run.eval_problems, self.run.eval_ids, self.run, report=self.report_evaluation)
        return {"accuracy" if "greedy" in figures else "held_out": figures}

    def session_record(self, session: Session) -> dict[str, Any]:
        """A line of sessions.json: which problems a session has, by their ids."""
        ids = {kind: [self.run.problems[i].id for i in getattr(session, kind)] for kind in ("new", "review")}
        return {"session": session.number, "first_step": session.start + 1, "last_step": session.end, **ids}

    def result(self) -> dict[str, Any]:
        """result.json, without the seconds of the run."""
        evaluations = {record["step"]: record for record in self.evaluations.records}
        ended = [session for session in self.run.sessions[: self.config.session or None] if session.end <= self.done]
        return {
            "run_dir": str(self.folder),
            "preset": self.config.preset,
            "seed": self.config.seed,
            "steps": self.done,
            "finished": self.done >= self.run.steps,
            "accuracy_before": evaluations.get(0, {}).get("accuracy"),
            "accuracy_after": evaluations.get(self.done, {}).get("accuracy"),
            "sessions": [
                {
                    "session": session.number,
                    "step": session.end,
                    "new": len(session.new),
                    "reviewed": len(session.review),
                    "accuracy": evaluations.get(session.end, {}).get("accuracy"),
                    "retention": evaluations.get(session.end, {}).get("retention", {}),
                }
                for session in ended
            ],
            "reward_first": self.metrics.records[0].get("reward") if self.metrics.records else None,
            "reward_last": self.metrics.records[-1].get("reward") if self.metrics.records else None,
            "recompilations": self.recompilations,
            "params_digest": digest(self.state.params),
        }
