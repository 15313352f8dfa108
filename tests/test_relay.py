"""Laws of relay sessions in grpo/runs/trainer.py: what carries over, what does not, what is measured at each end."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from training import devices, final_state, interrupted, lines, read_files, run, without_times

import grpo.runs.setup
import grpo.runs.trainer
from data.datasets import choose_problems
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.interrupts import Interrupts, Stopped
from grpo.session import plan_sessions

pytestmark = pytest.mark.usefixtures("quick_to_compile")

Q = 8


@pytest.fixture(scope="module")
def config(folder) -> Config:
    """Two steps, then four: 16 new problems, then 16 new and 16 reviewed."""
    return Config(
        model_path=str(folder / "model"), data="arithmetic", run_dir=str(folder / "relay"), system_prompt="", new_problems=16,
        sessions=2, prompts_per_step=Q, group_size=4, max_prompt_tokens=192, max_new_tokens=16, learning_rate=3e-4,
        warmup_steps=1, reward=f"{folder / 'rewards.py'}:variety", eval_problems=4, retention_problems=4, save_every=1,
        remat="none", logprob_chunk=96, packing=0, halvings=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def in_a_row(config) -> tuple[dict[str, Any], dict[str, Any]]:
    return run(config), read_files(config)


def test_sessions_one_by_one_are_sessions_in_a_row(config, in_a_row, tmp_path):
    """Also in two directories. Only how often programs were compiled, and where, may differ."""
    first = replace(config, run_dir=str(tmp_path / "first"))
    one = run(replace(first, session=1))
    assert (one["steps"], one["finished"], len(one["sessions"])) == (2, True, 1)
    for target in (first, replace(config, run_dir=str(tmp_path / "second"), relay_from=first.run_dir)):
        two = run(replace(target, session=2))
        files = read_files(target)
        assert two["params_digest"] == in_a_row[0]["params_digest"] and two["sessions"] == in_a_row[0]["sessions"]
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            assert without_times(files[name]) == without_times(in_a_row[1][name])
        assert files["sessions.json"] == in_a_row[1]["sessions.json"]
    for name in ("completions.jsonl", "tokens.jsonl"):
        assert read_files(first)[name] == in_a_row[1][name]


def test_a_run_ends_with_its_picture_and_a_fault_of_drawing_is_a_warning(config, in_a_row, tmp_path, capsys):
    assert (Path(config.run_dir) / "training.png").read_bytes().startswith(b"\x89PNG")
    grpo.runs.trainer.draw_dashboard(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'training.png'} could not be drawn: ")


def test_the_problems_of_every_step_are_those_of_the_plan_and_are_recorded(config, in_a_row):
    problems = choose_problems(config)[0]
    sessions = plan_sessions(config, len(problems))
    completions = in_a_row[1]["completions.jsonl"]
    for session, roll in zip(sessions, in_a_row[1]["sessions.json"], strict=True):
        assert [roll["first_step"], roll["last_step"]] == [session.start + 1, session.end]
        for kind in ("new", "review"):
            assert roll[kind] == [problems[i].id for i in getattr(session, kind)]
        for step in range(session.start + 1, session.end + 1):
            asked = [record["problem"] for record in completions if record["step"] == step][::4]
            assert asked == [problems[i].id for i in session.problems_of(step)]
    assert len(set(in_a_row[1]["sessions.json"][1]["review"])) == 16


def test_each_end_measures_held_out_problems_and_those_of_every_session_so_far(config, in_a_row):
    """The figures are those of `evaluate` on just these problems."""
    result, files = in_a_row
    evaluations = files["evaluations.jsonl"]
    assert [record["step"] for record in evaluations] == [0, 2, 6]
    assert [list(record.get("retention", {})) for record in evaluations] == [[], ["1"], ["1", "2"]]
    assert [session["retention"] for session in result["sessions"]] == [record["retention"] for record in evaluations[1:]]
    with devices(1):
        prepared = grpo.runs.setup.prepare(config)
    state = final_state(config)
    with jax.set_mesh(prepared.mesh), prepared.rewards:
        params = grpo.runs.trainer.sampling_params(
            jax.tree.map(jax.numpy.asarray, state.params), prepared.model, prepared.sample
        )
        for number, session in zip("12", prepared.sessions, strict=True):
            chosen = session.new[:4]
            problems, ids = [prepared.problems[i] for i in chosen], [prepared.prompt_ids[i] for i in chosen]
            figures = grpo.runs.trainer.evaluate(params, problems, ids, prepared, sampled=False)
            assert figures == evaluations[2]["retention"][number]
            assert figures["n"] == 4 and "sampled" not in figures


def test_the_learning_rate_spans_each_session_or_the_whole_run(config, in_a_row, tmp_path):
    peak = config.learning_rate

    def cosine(part: float) -> float:
        return peak * (0.55 + 0.45 * np.cos(np.pi * part))

    each = [peak, peak / 10, peak / 2, peak, cosine(1 / 3), cosine(2 / 3)]
    assert [record["lr"] for record in in_a_row[1]["metrics.jsonl"]] == pytest.approx(each)
    whole = replace(config, run_dir=str(tmp_path / "whole"), schedule="run", eval_problems=0, retention_problems=0)
    run(whole)
    expected = [peak / 2, *(cosine(i / 5) for i in range(5))]
    assert [record["lr"] for record in lines(tmp_path / "whole" / "metrics.jsonl")] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="sessions 2 -> 3"):  # the schedule would be another
        run(replace(whole, sessions=3))


@pytest.mark.parametrize("carried", [True, pytest.param(False, marks=pytest.mark.long)])
def test_adams_moments_go_on_or_begin_anew(config, in_a_row, tmp_path, carried):
    ours = config if carried else replace(config, run_dir=str(tmp_path / "anew"), carry_optimizer=False)
    if not carried:
        assert run(ours)["params_digest"] != in_a_row[0]["params_digest"]
    assert int(final_state(ours).opt_state[1].count) == (6 if carried else 4)


def test_the_reference_is_the_base_or_what_the_session_starts_from(config, in_a_row, tmp_path):
    """Measured by the KL of the first step of session 2, before its first update."""
    initial = in_a_row[1]["metrics.jsonl"]
    assert initial[0]["kl/k3"] < 1e-9 < 1e-7 < initial[2]["kl/k3"]
    start = replace(config, run_dir=str(tmp_path / "start"), reference="session_start")
    run(start)
    metrics = read_files(start)["metrics.jsonl"]
    assert metrics[2]["kl/k3"] < 1e-9 < 1e-7 < metrics[4]["kl/k3"]


@pytest.mark.long
def test_the_start_of_a_session_is_its_reference_also_after_a_break(config, tmp_path):
    start = replace(config, run_dir=str(tmp_path / "start"), reference="session_start")
    run(start)
    metrics = read_files(start)["metrics.jsonl"]
    broken = replace(start, run_dir=str(tmp_path / "broken"))
    with interrupted(5, "rollout"):
        run(broken)
    relayed = replace(start, run_dir=str(tmp_path / "relayed"), relay_from=broken.run_dir)
    for again in (relayed, broken):  # the first one needs the start of session 2 from the other directory
        run(again)
        assert without_times(read_files(again)["metrics.jsonl"]) == without_times(metrics)


@pytest.mark.long
def test_a_session_run_alone_measures_its_problems_for_those_that_follow(config, in_a_row, tmp_path):
    """Nothing was known of a second session when the first one ended."""
    alone = replace(config, run_dir=str(tmp_path / "alone"), sessions=1)
    run(alone)
    assert run(replace(alone, session=2))["sessions"] == in_a_row[0]["sessions"]


@pytest.mark.long
def test_evaluations_on_the_way_are_not_lost_when_a_run_stops_there(config, tmp_path, monkeypatch):
    """Every two steps; stopped after step 4, saved but not measured yet."""
    often = replace(config, run_dir=str(tmp_path / "often"), eval_every=2, retention_problems=0)
    run(often)
    stopped = replace(often, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "due", lambda self, step: step == 4)
        patch.setattr(Interrupts, "check", lambda self: self.handle(signal.SIGTERM, None) or self.stop())
        with pytest.raises(Stopped) as ended:
            run(stopped)
    assert ended.value.code == 143
    assert [record["step"] for record in read_files(stopped)["evaluations.jsonl"]] == [0, 2]
    run(stopped)
    evaluations = [without_times(read_files(c)["evaluations.jsonl"]) for c in (often, stopped)]
    assert evaluations[0] == evaluations[1] and [record["step"] for record in evaluations[0]] == [0, 2, 4, 6]


def test_a_signal_while_a_checkpoint_is_read_is_no_damage(config, in_a_row, monkeypatch):
    real, asked = Checkpoints.read_state, []

    def interrupted_read(self, *args):
        asked.append(signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None))  # type: ignore[misc, operator]
        return real(self, *args)

    monkeypatch.setattr(Checkpoints, "read_state", interrupted_read)
    with pytest.raises(Stopped) as ended:
        run(config)
    assert ended.value.code == 143 and asked == []
    assert not list(Path(config.run_dir).rglob("*.damaged"))


@pytest.mark.parametrize(
    "change", [{"relay_from": "elsewhere"}, {"max_steps": 1}, {"schedule": "run", "sessions": 1, "session": 2}]
)
def test_what_would_make_another_run_of_it_is_refused(config, in_a_row, change):
    reasons = {"relay_from": "is not relayed from elsewhere", "max_steps": "has 6 steps already, in session 2",
               "schedule": "sessions 1 must be the number of all sessions"}  # fmt: skip
    with pytest.raises(ConfigError, match=reasons[next(iter(change))]):
        run(replace(config, **change))
    assert read_files(config) == in_a_row[1]


def test_a_session_that_began_elsewhere_is_refused(config, in_a_row):
    """With other epochs session 1 would have ended at another step."""
    with pytest.raises(
        ConfigError, match=r"^session 2 in .* began after step 2, not 6: give the new_problems, max_steps and epochs"
    ):
        run(replace(config, epochs=3))


def test_a_session_needs_the_one_before_it(config, tmp_path):
    late = replace(config, run_dir=str(tmp_path / "late"), session=2)
    with pytest.raises(
        ConfigError, match=r"^session 2 goes on after step 2, the end of session 1; .*late is at step 0: finish that"
    ):
        run(late)
    with pytest.raises(
        ConfigError, match=r"^relay_from .*none has no checkpoint: give the run_dir of a run that has saved one"
    ):
        run(replace(late, relay_from=str(tmp_path / "none")))
    assert not (Path(late.run_dir) / "metrics.jsonl").exists()
