"""Which checkpoint a run continues from, and whether it may: one of its own, or the last one of the run that it relays from.

A checkpoint's meta names what its state belongs to: fingerprints of model, tokenizer, reward and data, the session, the
settings, and the runs that it was relayed from.
"""

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from grpo.config import Config, current_names
from grpo.errors import ConfigError, RunError
from grpo.reports.jsonl import read_records, rewrite
from grpo.runs.checkpoint import Checkpoints, Restored, differing, digest
from grpo.runs.distributed import broadcast_from_main, is_main_process, print_main
from grpo.runs.run_dir import check_settings
from grpo.runs.setup import Setup, data_fingerprint
from grpo.session import Session, learning_rates, plan_sessions

Provenance = list[dict[str, Any]]  # the runs that a run was relayed from: run_dir, step, digest of the parameters


@dataclass(frozen=True)
class Lineage:
    """What the checkpoints of the run in `folder` must belong to."""

    run: Setup
    folder: Path
    fingerprints: dict[str, str]  # of model, tokenizer and reward

    def session(self, step: int) -> Session:
        """The session of a step."""
        return next(session for session in self.run.sessions if step <= session.end)

    def belongs_to(self, session: Session) -> dict[str, Any]:
        """What a checkpoint of a session must have been made from."""
        data = {"data": data_fingerprint(self.run, session), "review": session.review.tolist(), "start": session.start}
        return self.fingerprints | data

    def meta(self, step: int, provenance: Provenance) -> dict[str, Any]:
        """What a checkpoint says of its state. Everything else that a run needs to continue is a function of it."""
        session = self.session(max(step, 1))
        return {
            "step": step,
            "session": session.number,
            "final": step == session.end,
            "belongs_to": self.belongs_to(session),
            "config": asdict(self.run.config),
            "provenance": provenance,
        }

    def accept(self, folder: Path, meta: dict[str, Any]) -> None:
        """ConfigError unless a checkpoint of the run in `folder` belongs to this run."""
        if not {"config", "session", "belongs_to", "provenance"} <= set(meta):
            raise ConfigError(
                f"the checkpoint of step {meta['step']} in {folder} was written by another version of this program"
            )
        config, sessions = self.run.config, self.run.sessions
        check_settings(meta["config"], config, folder)
        number, step = meta["session"], meta["step"]
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
        allowed = config.allow_change.split(",")
        wrong = [name for name in differing(self.belongs_to(session), found) if name not in allowed]
        if wrong:
            raise ConfigError(
                f"the checkpoint of step {step} in {folder} belongs to another {', another '.join(wrong)}: "
                f"give those of its run, or another --run_dir"
            )

    def check_start(self, done: int, provenance: Provenance) -> None:
        """ConfigError unless the run can continue after step `done`, and comes from where it was told to."""
        config, source = self.run.config, str(Path(self.run.config.relay_from).absolute())
        if config.relay_from and source not in [origin["run_dir"] for origin in provenance]:
            raise ConfigError(f"{self.folder} holds a run that is not relayed from {config.relay_from}; give another --run_dir")
        if config.session and done < (start := self.run.sessions[config.session - 1].start):
            raise ConfigError(
                f"session {config.session} goes on after step {start}, the end of session {config.session - 1}; "
                f"{config.relay_from or self.folder} is at step {done}: finish that first, or give another --relay_from"
            )


def find_start(lineage: Lineage, checkpoints: Checkpoints, abstract_state: Any, reference_needed: bool) -> Restored | None:
    """The state to continue from: this run's newest good checkpoint, or the last one of `relay_from`; None: from the beginning.

    Raises ConfigError when it does not belong to this run.
    """
    checkpoints.clean()
    found = checkpoints.restore(abstract_state, partial(lineage.accept, lineage.folder))
    if found is not None:
        lineage.check_start(found.step, found.meta["provenance"])
        checkpoints.set_aside(found.damaged)
        return found
    check_never_saved(lineage)
    if lineage.run.config.relay_from:
        return relay(lineage, checkpoints, abstract_state, reference_needed)
    lineage.check_start(0, [])
    return None


def check_never_saved(lineage: Lineage) -> None:
    """ConfigError when there is no checkpoint, but records say that there was one: a run never begins anew over them.

    Records that are those of `relay_from` were copied by a relay that was killed at its start.
    """
    folder, first = lineage.folder, min(lineage.run.config.save_every, lineage.run.sessions[0].end)
    done = max((record["step"] for record in read_records(folder / "metrics.jsonl", [], step=10**12)), default=0)
    origin = Path(lineage.run.config.relay_from) / "metrics.jsonl"
    copied = done and origin.is_file() and origin.read_bytes() == (folder / "metrics.jsonl").read_bytes()
    saved = broadcast_from_main((done > first and not copied) or (folder / "result.json").exists())
    if saved:
        raise ConfigError(
            f"{folder} has records up to step {done} and no checkpoint: {folder / 'checkpoints'} was deleted, moved, or is not "
            f"mounted; put it back, or give another --run_dir"
        )


def relay(lineage: Lineage, checkpoints: Checkpoints, abstract_state: Any, reference_needed: bool) -> Restored:
    """The last state of another run, which is only read. Its records and checkpoint are copied to this run's directory."""
    source = Path(lineage.run.config.relay_from)
    theirs, accept = Checkpoints(source / "checkpoints"), partial(lineage.accept, source)
    found = theirs.restore(abstract_state, accept)
    if found is None:
        raise ConfigError(f"relay_from {source} has no checkpoint: give the run_dir of a run that has saved one")
    origin = {"run_dir": str(source.absolute()), "step": found.step, "params": digest(found.state.params)}
    found = replace(found, meta=found.meta | {"provenance": [*found.meta["provenance"], origin]})
    lineage.check_start(found.step, found.meta["provenance"])
    if is_main_process():
        for name in ("metrics.jsonl", "evaluations.jsonl"):  # before the checkpoint, whose presence completes the relay
            if (source / name).is_file():
                rewrite(lineage.folder / name, (source / name).read_bytes())
    start = lineage.session(max(found.step, 1)).start
    if reference_needed and lineage.run.config.reference == "session_start" and 0 < start < found.step:
        first = theirs.restore(abstract_state, accept, only=start)
        if first is None:
            raise ConfigError(f"relay_from {source} lacks the checkpoint of step {start}, the reference of its session")
        checkpoints.save(start, first.state, first.meta | {"provenance": found.meta["provenance"]}, wait=True)
    checkpoints.save(found.step, found.state, found.meta, wait=True)
    print_main(f"relayed     from {source}, step {found.step}")
    return found


def rate_change(run: Setup, found: Restored) -> str:
    """Where the schedule of the learning rate is not the planned one any more: the rates before and after; else "".

    Lengthening a session stretches its cosine, so that the rate rises.
    """
    done, known = found.step, {field.name for field in fields(Config)}
    if not 0 < done < run.steps:
        return ""
    before = Config(**{name: value for name, value in current_names(found.meta["config"]).items() if name in known})
    planned = plan_sessions(before, len(run.problems))

    def spans(sessions: list[Session], step: int, config: Config) -> tuple[Session, list[float]]:
        session = next(session for session in sessions if step <= session.end)
        return session, learning_rates(step, session, sessions[-1].end, config)

    (old, taken), (new, again), (_, coming) = (
        spans(planned, done, before), spans(run.sessions, done, run.config), spans(run.sessions, done + 1, run.config)
    )  # fmt: skip
    if taken == again:
        return ""
    steps, were = new.end - new.start, old.end - old.start
    why = "its schedule has changed" if steps == were else f"session {new.number} has {steps} steps instead of {were}"
    return f"learning rate {taken[-1]:.3g} in step {done}, {coming[0]:.3g} in step {done + 1}: {why}"


def restore_session_start(lineage: Lineage, checkpoints: Checkpoints, abstract_state: Any, session: Session) -> Any:
    """The state that a session started from. Raises RunError when its checkpoint is gone."""
    found = checkpoints.restore(abstract_state, partial(lineage.accept, lineage.folder), only=session.start)
    if found is None:
        raise RunError(f"session {session.number} needs the checkpoint of step {session.start} as its reference: it is gone")
    return found.state
