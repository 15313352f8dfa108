"""The loop: roll out, score, compare with the reference, update; as often as the plan says, session after session.

A step is one rollout and its `updates_per_rollout` updates (`one_step`); `Trainer` is a run under way, `train` the whole of it.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from grpo.runs.alarms import alarms, zero_variance_steps, diagnose
from grpo.runs.checkpoint import Checkpoints, Restored, differing, digest
from grpo.config import Config, ConfigError, RunError
from grpo.runs.distributed import broadcast_from_main, is_main_process, join, print_main
from grpo.runs.evaluate import evaluate
from grpo.runs.interrupts import Interrupts, Stopped
from grpo.runs.model_source import copy_description
from grpo.runs.metrics import CompileCounter, JsonLines, Progress, clock, rewrite
from grpo.rollout import rollout
from grpo.runs.setup import Run, check_settings, describe, fingerprint, open_run_dir, prepare
from grpo.session import Session
from grpo.runs.token_trace import groups_due, token_records
from grpo.runs.trackers import Trackers
from grpo.update import (
    TrainState,
    choose_remat,
    completion_logprobs,
    device_memory,
    frozen,
    init_state,
    learning_rate,
    policy,
    sampling_params,
    starting_point,
    train_step,
)
from models.gemma import Params
from models.sharding import STORE, abstract_like


def load_base(run: Run) -> Params:
    """The weights before the first step."""
    return run.base.load(run.mesh, STORE, "float32")


class Trainer:
    """A run under way: the state after `done` steps, the reference, and the records that it leaves."""

    def __init__(self, run: Run, folder: Path, interrupts: Interrupts, compiles: CompileCounter):
        self.run, self.config, self.folder, self.interrupts, self.compiles = run, run.config, folder, interrupts, compiles
        self.checkpoints = Checkpoints(folder / "checkpoints", run.config.keep_checkpoints, run.config.async_save)
        self.done, self.provenance = 0, []  # the runs that it goes on from
        self.progress, self.recompilations, self.saved_at = Progress(run.steps), 0, time.monotonic()
        names = run.config.track if is_main_process() else ""
        self.trackers = Trackers(names, folder, asdict(run.config), self.progress.warn)

    def open(self) -> None:
        """Load the weights, or what a checkpoint holds."""
        config, run = self.config, self.run
        weights = load_base(run)
        files = {"model": digest(weights), "tokenizer": run.tokenizer.fingerprint, "reward": run.rewards.fingerprint}
        self.fingerprints = broadcast_from_main(files)
        trained, self.base = starting_point(weights, run.model, run.train.dtype, config)
        del weights
        self.like = abstract_like(partial(init_state, config=config), trained, mesh=run.mesh)
        self.reference = (self.base or frozen(trained, run.train.dtype)) if config.beta else None
        self.checkpoints.clean()
        found = self.checkpoints.restore(self.like, partial(self.accept, self.folder))
        if found is None and config.relay_from:
            found = self.relay(Path(config.relay_from))
        elif found is not None:
            self.check_start(found.step, found.meta["provenance"])
            self.checkpoints.set_aside(found.damaged)
        else:
            self.check_start(0, [])
        self.done, self.state = (0, init_state(trained, config)) if found is None else (found.step, found.state)
        del trained
        if found is not None:
            self.provenance = found.meta["provenance"]
            print_main(f"resumed     after step {self.done}")
        elif (self.folder / "metrics.jsonl").exists():
            print_main("restarted   from the beginning: there was no checkpoint yet")
        if is_main_process():
            write(self.folder / "config.json", asdict(config))
            copy_description(run.base, self.folder / "model")
            write(self.folder / "sessions.json", [self.roll(session) for session in run.sessions])
        self.metrics, self.evaluations, self.completions, self.tokens = (
            JsonLines(self.folder / f"{name}.jsonl", self.done if found else -1, remember=name in ("metrics", "evaluations"))
            for name in ("metrics", "evaluations", "completions", "tokens")
        )
        self.trackers.open(self.done)

    def check_start(self, done: int, provenance: list[dict[str, Any]]) -> None:
        """ConfigError unless the run can go on after step `done`, and from where it was told to."""
        config, source = self.config, str(Path(self.config.relay_from).absolute())
        if config.relay_from and source not in [origin["run_dir"] for origin in provenance]:
            raise ConfigError(f"{self.folder} holds a run that is not relayed from {config.relay_from}; give another --run_dir")
        if config.session and done < (start := self.run.sessions[config.session - 1].start):
            raise ConfigError(
                f"session {config.session} goes on after step {start}, the end of session {config.session - 1}; "
                f"{config.relay_from or self.folder} is at step {done}: finish that first, or give another --relay_from"
            )

    def accept(self, folder: Path, meta: dict[str, Any]) -> None:
        """ConfigError unless a checkpoint of the run in `folder` belongs to this run."""
        if not {"config", "session", "belongs_to", "provenance"} <= set(meta):
            raise ConfigError(
                f"the checkpoint of step {meta['step']} in {folder} was written by another version of this program"
            )
        check_settings(meta["config"], self.config, folder)
        number, step, sessions = meta["session"], meta["step"], self.run.sessions
        if number > len(sessions) or step > sessions[number - 1].end:
            raise ConfigError(
                f"{folder} has {step} steps already, in session {number}; sessions, max_steps and epochs plan only "
                f"{self.run.steps}"
            )
        session, found = sessions[number - 1], meta["belongs_to"]
        if found["start"] != session.start:
            raise ConfigError(
                f"session {number} in {folder} began after step {found['start']}, not {session.start}: give the new_problems, "
                f"max_steps and epochs of the sessions before it"
            )
        allowed = self.config.allow_change.split(",")
        wrong = [name for name in differing(self.belongs_to(session), found) if name not in allowed]
        if wrong:
            raise ConfigError(
                f"the checkpoint of step {step} in {folder} belongs to another {', another '.join(wrong)}: "
                f"give those of its run, or another --run_dir"
            )

    def belongs_to(self, session: Session) -> dict[str, Any]:
        """What a checkpoint of a session must have been made from."""
        met = {"data": fingerprint(self.run, session), "review": session.review.tolist(), "start": session.start}
        return self.fingerprints | met

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of its state. All else that a run needs to go on is a function of it."""
        session = self.session(max(self.done, 1))
        return {
            "step": self.done,
            "session": session.number,
            "final": self.done == session.end,
            "belongs_to": self.belongs_to(session),
            "config": asdict(self.config),
            "provenance": self.provenance,
        }

    def relay(self, source: Path) -> Restored:
        """The last state of another run, which is only read; from here on it is this directory's own."""
        theirs, accept = Checkpoints(source / "checkpoints"), partial(self.accept, source)
        found = theirs.restore(self.like, accept)
        if found is None:
            raise ConfigError(f"relay_from {source} has no checkpoint: give the run_dir of a run that has saved one")
        origin = {"run_dir": str(source.absolute()), "step": found.step, "params": digest(found.state.params)}
        found = replace(found, meta=found.meta | {"provenance": [*found.meta["provenance"], origin]})
        self.check_start(found.step, found.meta["provenance"])
        for name in ("metrics.jsonl", "evaluations.jsonl") if is_main_process() else ():  # before the checkpoint, which completes it
            if (source / name).is_file():
                shutil.copyfile(source / name, self.folder / name)
        start = self.session(max(found.step, 1)).start
        if self.reference is not None and self.config.reference == "session_start" and 0 < start < found.step:
            first = theirs.restore(self.like, accept, only=start)
            if first is None:
                raise ConfigError(f"relay_from {source} lacks the checkpoint of step {start}, the reference of its session")
            self.checkpoints.save(start, first.state, first.meta | {"provenance": found.meta["provenance"]}, wait=True)
        self.checkpoints.save(found.step, found.state, found.meta, wait=True)
        print_main(f"relayed     from {source}, step {found.step}")
        return found

    def session(self, step: int) -> Session:
        """The session of a step."""
        return next(session for session in self.run.sessions if step <= session.end)

    def roll(self, session: Session) -> dict[str, Any]:
        """A session for the record: which problems it has, by their ids."""
        ids = {kind: [self.run.problems[i].id for i in getattr(session, kind)] for kind in ("new", "review")}
        return {"session": session.number, "first_step": session.start + 1, "last_step": session.end, **ids}

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
        config, first = self.config, self.done + 1
        if session.number > 1 and self.done == session.start and not config.carry_optimizer:
            self.state = init_state(self.state.params, config)
        if session.number > 1 and config.beta and config.reference == "session_start":
            self.reference = self.session_start(session)
        with self.interrupts.held():
            for step in range(first, session.end + 1):
                if config.eval_every and self.done > session.start and self.done % config.eval_every == 0:
                    self.evaluate()  # measured once: also when a resumed run comes by again
                compiled = self.compiles.count
                self.state, metrics, completions, tokens = one_step(
                    step, session, self.state, self.base, self.reference, self.run
                )
                self.done = step
                metrics["compiles"] = self.compiles.count - compiled
                self.recompilations += metrics["compiles"] if step > first else 0
                self.record({"step": step, "session": session.number, **metrics}, completions, tokens)
                if metrics["bad_updates_in_a_row"] >= config.max_bad_updates:
                    count = metrics["bad_updates_in_a_row"]
                    raise RunError(f"step {step}: {count} non-finite updates in a row; try a lower learning_rate")
                stopping = self.interrupts.due(step)
                self.save(wait=stopping or step == session.end)
                if stopping:
                    self.interrupts.check()
                if config.max_zero_variance_steps and zero_variance_steps(self.metrics.records) >= config.max_zero_variance_steps:
                    raise RunError(diagnose(self.metrics.records))

    def record(self, metrics: dict[str, Any], completions: list[dict[str, Any]], tokens: list[dict[str, Any]]) -> None:
        """Write a step down, show it, and sound the alarms that it sets off."""
        history = self.metrics.records
        active = alarms([*history, metrics])
        ringing = history[-1]["alarms"] if history else []
        self.metrics.write(metrics | {"alarms": list(active)})
        self.completions.write_all(completions)
        self.tokens.write_all(tokens)
        self.trackers.write(metrics["step"], metrics)
        if is_main_process():
            self.progress.show(metrics["step"], metrics)
            for name in [name for name in active if name not in ringing]:
                self.progress.warn(f"{name}: {active[name]}")

    def session_start(self, session: Session) -> Params:
        """What the session starts from, as its frozen reference."""
        state = self.state
        if self.done > session.start:
            found = self.checkpoints.restore(self.like, partial(self.accept, self.folder), only=session.start)
            if found is None:
                raise RunError(
                    f"session {session.number} needs the checkpoint of step {session.start} as its reference: it is gone"
                )
            state = found.state
        return policy(frozen(state.params, self.run.train.dtype), self.base, self.config)

    def save(self, wait: bool) -> None:
        """A checkpoint, if one is due; `wait` makes it due, and returns when it is written and verified."""
        config = self.config
        self.checkpoints.settle(wait=False)
        late = broadcast_from_main(bool(config.save_minutes) and time.monotonic() > self.saved_at + 60 * config.save_minutes)
        if wait or late or self.done % config.save_every == 0:
            self.checkpoints.save(self.done, self.state, self.meta(), wait)
            self.saved_at = time.monotonic()

    def evaluate(self, sessions: Sequence[Session] = ()) -> dict[str, Any]:
        """Held-out problems, and those that each of `sessions` met first: measured once, then read from the record."""
        run, config = self.run, self.config
        known = next((record for record in self.evaluations.records if record["step"] == self.done), None)
        if known is not None or not (run.eval_problems or (sessions and config.retention_problems)):
            return known or {}
        began = time.perf_counter()
        view = sampling_params(policy(self.state.params, self.base, config), run.model, run.sample)
        measure = partial(
            evaluate, view, tokenizer=run.tokenizer, model=run.model, execution=run.sample, config=config, rewards=run.rewards
        )
        record: dict[str, Any] = {"step": self.done}
        if run.eval_problems:
            record["accuracy"] = measure(run.eval_problems, run.eval_ids)
        if sessions and config.retention_problems:
            record["retention"] = {}
            for session in sessions:
                of = session.new[: config.retention_problems]
                figures = measure([run.problems[i] for i in of], [run.prompt_ids[i] for i in of], sampled=False)
                record["retention"][str(session.number)] = figures
        self.evaluations.write(record | {"time/eval": time.perf_counter() - began})
        retained = {f"session_{number}": figures["greedy"] for number, figures in record.get("retention", {}).items()}
        self.trackers.write(
            self.done, {f"eval/{name}": figure for name, figure in (record.get("accuracy", {}) | retained).items()}
        )
        return record

    def result(self) -> dict[str, Any]:
        """What `scripts/train.py` prints as JSON."""
        records = {record["step"]: record for record in self.evaluations.records}
        ended = [session for session in self.run.sessions[: self.config.session or None] if session.end <= self.done]
        return {
            "run_dir": str(self.folder),
            "preset": self.config.preset,
            "seed": self.config.seed,
            "steps": self.done,
            "finished": self.done >= self.run.steps,
            "accuracy_before": records.get(0, {}).get("accuracy"),
            "accuracy_after": records.get(self.done, {}).get("accuracy"),
            "sessions": [
                {
                    "session": session.number,
                    "step": session.end,
                    "new": len(session.new),
                    "reviewed": len(session.review),
                    "accuracy": records.get(session.end, {}).get("accuracy"),
                    "retention": records.get(session.end, {}).get("retention", {}),
                }
                for session in ended
            ],
            "reward_first": self.metrics.records[0]["reward"] if self.metrics.records else None,
            "reward_last": self.metrics.records[-1]["reward"] if self.metrics.records else None,
            "recompilations": self.recompilations,
            "params_digest": digest(self.state.params),
        }


def train(config: Config) -> dict[str, Any]:
    """The whole run: plan, evaluate, train, save, evaluate. The same call again goes on where it stopped.

    Returns what `scripts/train.py` prints as JSON. Raises ConfigError, DataError or ModelError for the user's mistakes,
    RunError for a run that cannot go on, Stopped when a signal asked for it.
    """
    started, compiles = time.monotonic(), CompileCounter()
    join(config)
    run = prepare(config)
    with run.rewards, open_run_dir(config) as folder, jax.set_mesh(run.mesh), Interrupts(config.max_hours) as interrupts:
        print_main(describe(run))
        trainer = Trainer(run, folder, interrupts, compiles)
        try:
            trainer.open()
            trainer.train()
            trainer.checkpoints.close()
        except Stopped as stopped:
            trainer.checkpoints.close()
            print_main(f"stopped     by {stopped} after step {trainer.done}; the same command goes on from there")
            if stopped.code:
                raise
        except BaseException:
            if jax.process_count() == 1:  # of several, one may fail alone, and must not wait for the others
                trainer.checkpoints.close()
            raise
        finally:
            trainer.trackers.close()
        result = trainer.result() | {"seconds": round(time.monotonic() - started, 1)}
        if is_main_process():
            write(folder / "result.json", result)
            picture(folder)
    print_main(closing_table(result))
    return result


def picture(folder: Path) -> None:
    """The run's dashboard."""
    from grpo.reports.plots import attempt, draw_training  # matplotlib takes a while, and is not needed before

    attempt(draw_training, folder, folder / "training.png")


def write(path: Path, value: Any) -> None:
    rewrite(path, json.dumps(value, indent=1) + "\n")


def one_step(
    step: int, session: Session, state: TrainState, base: Params | None, reference: Params | None, run: Run
) -> tuple[TrainState, dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rollout and updates: the state after them, the step's metrics, a record of each completion, and of each token of the
    groups that are to be inspected. `base` is below the adapters, None without LoRA.
    """
    config, model, start = run.config, run.model, time.perf_counter()
    chosen = session.problems_of(step)
    problems = [run.problems[i] for i in chosen]
    view = sampling_params(policy(state.params, base, config), model, run.sample)
    batch, records, metrics = rollout(
        view, problems, [run.prompt_ids[i] for i in chosen], step, run.tokenizer, model, run.sample, config, run.rewards,
    )  # fmt: skip
    del view  # its memory is the update's
    metrics["tokens_per_s/decode"] = sum(record["length"] for record in records) / metrics["time/decode"]

    began = time.perf_counter()
    if reference is not None:
        batch = replace(batch, ref_logprobs=completion_logprobs(reference, batch, model, run.train, config))
    if config.updates_per_rollout > 1:
        weights = policy(state.params, base, config)
        batch = replace(batch, old_logprobs=completion_logprobs(weights, batch, model, run.train, config))
    jax.block_until_ready(batch)
    metrics["time/reference"] = time.perf_counter() - began

    began = time.perf_counter()
    stats, terms = {}, {}
    execution = choose_remat(run.train, model, batch, config, run.mesh.size, device_memory(run.mesh))
    rates = learning_rates(step, session, run)
    for rate in [] if metrics["skipped_update"] else rates:
        state, stats, terms = train_step(state, batch, rate, model, execution, config, base)
    stats = {name: float(value) for name, value in jax.device_get(stats).items()}
    metrics["time/update"] = time.perf_counter() - began
    metrics["bad_updates_in_a_row"] = int(state.bad_in_a_row)
    memory = run.mesh.local_devices[0].memory_stats() or {}
    metrics["hbm_peak"] = memory.get("peak_bytes_in_use", 0)
    metrics["lr"] = rates[-1]
    tokens: list[dict[str, Any]] = []
    if terms and (due := groups_due(step, run.sessions[-1].end, config)):
        lengths = [record["length"] for record in records]
        inspected = token_records(problems[:due], lengths, batch, terms, run.tokenizer, config)
        tokens = [{"step": step, "session": session.number, **record} for record in inspected]
    metrics["time/step"] = time.perf_counter() - start
    metrics["tokens_per_s/total"] = sum(record["length"] for record in records) / metrics["time/step"]
    return state, metrics | stats, records, tokens


def learning_rates(step: int, session: Session, run: Run) -> list[float]:
    """Of each update of a step."""
    first, last = (session.start, session.end) if run.config.schedule == "session" else (0, run.sessions[-1].end)
    mu = run.config.updates_per_rollout
    return [learning_rate((step - first - 1) * mu + i, (last - first) * mu, run.config) for i in range(mu)]


def closing_table(result: dict[str, Any]) -> str:
    """What came of it, and where it lies."""
    sessions = result["sessions"]
    columns = [result["accuracy_before"], *(session["accuracy"] for session in sessions)]
    lines = []
    if columns[0] and len(columns) > 1 and all(columns):
        names = (
            ["before", "after"]
            if len(sessions) == 1
            else ["before", *(f"session {session['session']}" for session in sessions)]
        )

        def row(name: str, cells: list[str]) -> str:
            return f"{name:32}" + "".join(f"{cell:>12}" for cell in cells)

        def interval(figures: dict[str, Any]) -> str:
            return f"{100 * figures['low']:.0f}-{100 * figures['high']:.0f}%"

        lines += [
            "\n" + row("", names),
            row(f"accuracy, greedy (N={columns[0]['n']})", [f"{c['greedy']:.1%}" for c in columns]),
        ]
        lines += [row("  95% interval", [interval(c) for c in columns])]
        for name, key, form in (
            ("accuracy, sampled", "sampled", ".1%"),
            ("format right, sampled", "sampled_format", ".1%"),
            ("reward, sampled", "sampled_reward", ".2f"),
            ("length, sampled", "sampled_length", ".1f"),
        ):
            lines.append(row(name, ["-" if c[key] is None else format(c[key], form) for c in columns]))
        for earlier in sessions:
            kept = [session["retention"].get(str(earlier["session"])) for session in sessions]
            if any(kept):
                n = next(figures["n"] for figures in kept if figures)
                name = f"session {earlier['session']}'s problems (N={n})"
                lines.append(row(name, ["", *(f"{f['greedy']:.1%}" if f else "" for f in kept)]))
                lines.append(row("  95% interval", ["", *(interval(f) if f else "" for f in kept)]))
    seed = result["seed"] + 1
    tiny = f"python scripts/train.py --seed {seed}"
    files = "metrics, completions, tokens, evaluations, config, sessions, result, training.png, checkpoints/"
    example = tiny if result["preset"] == "tiny" else f"the same with --seed {seed} --run_dir ANOTHER"
    lines += [
        f"\n{result['steps']} steps, {result['recompilations']} recompilations, {clock(result['seconds'])}",
        f"files  {result['run_dir']}: {files}",
        f"next   {example}      another seed: how far does luck go?",
    ]
    return "\n".join(lines)
