"""Laws of grpo/rollout.py: sampling options, rewards that misbehave, resampling."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from training import (
    STEPS,
    Bench,
    C,
    G,
    Q,
    completions,
    interrupted,
    lines,
    read_files,
    run,
)  # fmt: skip

import grpo.rollout
import grpo.runs.evaluate
import grpo.runs.model_source
import grpo.runs.setup
import grpo.runs.trainer
import grpo.session
import grpo.step
import grpo.update
from data.datasets import choose_problems
from data.tokenizer import load_tokenizer
from grpo.errors import RunError
from grpo.runs.checkpoint import Checkpoints
from grpo.runs.grading import make_grader
from grpo.runs.reward_worker import UserRewards

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_truncated_completions_count_unless_they_are_masked(bench, mask_truncated):
    batch, records = bench.rollout(mask_truncated=mask_truncated)
    truncated = np.array([record["truncated"] for record in records])
    lengths = np.array([record["length"] for record in records])
    assert truncated.any() and not truncated.all()
    expected = np.where(truncated & mask_truncated, 0, lengths)
    np.testing.assert_array_equal(np.asarray(batch.mask).sum(axis=1), expected)  # the stop token counts
    np.testing.assert_array_equal(batch.mask, np.arange(C) < expected[:, None])


def test_top_k_1_and_a_tiny_top_p_are_greedy(bench):
    """A group is then one completion four times; the log-probabilities are still those of the full softmax."""
    batch, records = bench.rollout(top_k=1)
    texts = np.array([record["text"] for record in records]).reshape(Q, G)
    assert (texts == texts[:, :1]).all()
    other, _ = bench.rollout(top_p=1e-6)
    np.testing.assert_array_equal(completions(batch), completions(other))
    assert (np.asarray(batch.advantages) == 0).all()
    assert (np.asarray(batch.sampler_logprobs)[:, 0] < -0.01).all()


@pytest.mark.parametrize("options", [{"top_k": 3}, pytest.param({"top_p": 0.5}, marks=pytest.mark.long)])
def test_top_k_and_top_p_leave_the_trainers_logprobs_alone(bench, options):
    batch, _ = bench.rollout(**options)
    exact = Bench(bench.config, batch).logprobs()
    counts = np.asarray(batch.mask) > 0
    np.testing.assert_allclose(exact[counts], np.asarray(batch.sampler_logprobs)[counts], rtol=0, atol=1e-4)
    first_tokens = completions(batch)[:, 0].reshape(Q, G)
    choices = [len(set(group)) for group in first_tokens.tolist()]
    assert 1 < max(choices) <= options.get("top_k", G)


def test_rows_without_a_score_are_left_out(bench, folder):
    """In a third of the rows; the others' rewards and advantages are as if these had never been there."""
    batch, records, metrics = bench.rollout_and_metrics(reward=f"{folder / 'rewards.py'}:sometimes")
    _, plain, _ = bench.rollout_and_metrics()
    missing = np.array([len(record["text"]) % 3 == 0 for record in records])
    assert 0.1 < missing.mean() < 0.6 and metrics["frac_unscorable"] == pytest.approx(missing.mean())
    rewards = np.array([record["reward"] for record in records])
    np.testing.assert_array_equal(rewards, np.where(missing, np.nan, [record["reward"] for record in plain]))
    np.testing.assert_array_equal(np.isnan([record["components"]["sometimes"] for record in records]), missing)
    np.testing.assert_array_equal(np.asarray(batch.mask).sum(axis=1) == 0, missing)
    advantages = np.asarray(batch.advantages)
    assert (advantages[missing] == 0).all()
    for group in range(Q):
        rows = [b for b in range(group * G, (group + 1) * G) if not missing[b]]
        if len(rows) > 1:
            of_group = rewards[rows]
            expected = (of_group - of_group.mean()) / (of_group.std(ddof=1) + 1e-4)
            np.testing.assert_allclose(advantages[rows], expected, atol=1e-5)
    assert metrics["reward"] == pytest.approx(rewards[~missing].mean())
    assert metrics["rewards/sometimes/mean"] == pytest.approx(rewards[~missing].mean() + 15)
    assert metrics["rewards/violation/mean"] == -15 and metrics["skipped_update"] == 0


@pytest.mark.usefixtures("free_run_dir")
def test_a_step_of_which_no_row_has_a_score_changes_nothing_and_counts(config, monkeypatch, finished):
    """Steps 2 and 3 of 4: parameters, moments and counters stay bit for bit, and the records are valid JSON."""
    states, real_step = [], grpo.runs.trainer.one_step

    def spy(step, *rest):
        with pytest.MonkeyPatch.context() as patch:
            if step in (2, 3):
                patch.setattr(UserRewards, "score", lambda self, texts, _: {"variety": [math.nan] * len(texts)})
            out = real_step(step, *rest)
        states.append(jax.device_get(out[0]))
        return out

    monkeypatch.setattr(grpo.runs.trainer, "one_step", spy)
    result = run(config)
    for after in states[1:3]:
        for leaf, before in zip(jax.tree.leaves(after), jax.tree.leaves(states[0]), strict=True):
            np.testing.assert_array_equal(leaf, before)
    assert not np.array_equal(states[3].params.embedding, states[2].params.embedding)
    files = read_files(config)
    metrics = files["metrics.jsonl"]
    assert [record["skipped_update"] for record in metrics] == [0, 1, 1, 0]
    assert [record["frac_unscorable"] for record in metrics] == [0, 1, 1, 0]
    assert [record["frac_reward_zero_std"] == 1 for record in metrics] == [False, True, True, False]
    assert [record["reward"] is None for record in metrics] == [False, True, True, False]
    assert [record["reward"] is None for record in files["completions.jsonl"][:: Q * G]] == [False, True, True, False]
    for record in files["completions.jsonl"][Q * G : 3 * Q * G]:
        assert record["components"]["variety"] is None and record["components"]["violation"] == -15
        assert record["advantage"] == 0
    assert {record["step"] for record in files["tokens.jsonl"]} == {1, 4}
    assert result["steps"] == STEPS and metrics[0]["reward"] == finished.files["metrics.jsonl"][0]["reward"]


def test_groups_of_equal_rewards_are_sampled_again(bench, folder, monkeypatch):
    """Of each group the first attempt with different rewards is kept, else the first of all; the keys are row + attempt * B."""
    attempts, numbered, B, tries = [], [], Q * G, 2
    real_sample, real_keys = grpo.rollout.sample_groups, grpo.rollout.row_keys

    def spy(params, problems, ids, step, run, limits=None, attempt=0):
        completions = real_sample(params, problems, ids, step, run, limits, attempt)
        whole = real_sample(params, problems, ids, step, run, None, attempt)
        attempts.append((numbered[-1], np.full(B, C) if limits is None else np.asarray(limits), whole.row_texts))
        return completions

    monkeypatch.setattr(grpo.rollout, "sample_groups", spy)
    monkeypatch.setattr(
        grpo.rollout, "row_keys", lambda seed, step, rows: numbered.append(np.asarray(rows)) or real_keys(seed, step, rows)
    )
    reward = f"{folder / 'rewards.py'}:rare"
    batch, records, metrics = bench.rollout_and_metrics(reward=reward, resample=tries)

    def alive(texts: list[str], group: int) -> bool:
        return len({sum(map(ord, text)) % 9 == 0 for text in texts[group * G : (group + 1) * G]}) == 2

    dead, kept = np.ones(Q, bool), np.zeros(Q, int)
    for number, (rows, limits, texts) in enumerate(attempts):
        np.testing.assert_array_equal(rows, number * B + np.arange(B))
        np.testing.assert_array_equal(limits, np.where(np.repeat(dead, G), C, 1))
        now = np.array([alive(texts, group) for group in range(Q)])
        kept[dead & now] = number
        dead &= ~now
    assert set(kept) == {0, 1, 2} and dead.any() and len(attempts) == 1 + tries
    texts = [attempts[kept[b // G]][2][b] for b in range(B)]
    assert [record["text"] for record in records] == texts
    tokenizer, tokens = load_tokenizer(bench.config.model_path), completions(batch)
    sampled = np.asarray(batch.mask).sum(axis=1).astype(int)
    assert [tokenizer.decode(ids[:length].tolist()) for ids, length in zip(tokens, sampled, strict=True)] == texts
    np.testing.assert_array_equal((np.asarray(batch.advantages).reshape(Q, G) != 0).any(axis=1), ~dead)
    assert metrics["frac_reward_zero_std"] == dead.mean()
    assert metrics["resampled_groups"] == Q - sum(alive(attempts[0][2], group) for group in range(Q))
    exact = Bench(bench.config, batch).logprobs()
    counts = np.asarray(batch.mask) > 0
    np.testing.assert_allclose(exact[counts], np.asarray(batch.sampler_logprobs)[counts], rtol=0, atol=1e-4)

    attempts.clear()
    _, records, metrics = bench.rollout_and_metrics(reward=reward)
    assert len(attempts) == 1 and metrics["resampled_groups"] == 0
    assert [record["text"] for record in records] == attempts[0][2]


def test_records_are_judged_in_one_place_and_are_json(config, folder):
    """What a rollout and an evaluation get for a completion, with the user's components beside ours."""
    texts = ["<reasoning>5 + 13 = 18</reasoning><answer>18</answer>", "no tags"]
    problem = replace(choose_problems(config)[0][0], answer="18")
    with UserRewards(f"{folder / 'rewards.py'}:variety,{folder / 'rewards.py'}:broken") as rewards:
        records = make_grader(config, rewards)(texts, [problem] * 2, [False, True])
    assert [record["components"]["variety"] for record in records] == [len(set(text)) / 2 for text in texts]
    assert [record["components"]["correct"] for record in records] == [25, 0]
    assert all(math.isnan(record["reward"]) and math.isnan(record["components"]["broken"]) for record in records)
    assert [record["accuracy"]["tagged"] for record in records] == [True, False]
    assert [record["truncated"] for record in records] == [False, True]
    assert json.loads(json.dumps(records))[0]["format"] == records[0]["format"]


def test_steps_in_a_row_that_teach_nothing_end_the_run(config, folder, tmp_path):
    """Without the user's reward, every completion of a random model gets -15. The last checkpoint is that of the last step."""
    dull = replace(config, run_dir=str(tmp_path / "run"), reward="", max_zero_variance_steps=3, eval_problems=0)
    with pytest.raises(RunError, match=r"^steps 1-3 had no group with two different rewards, .*: none has the format; "):
        run(dull)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 3
    assert run(replace(dull, max_zero_variance_steps=0))["steps"] == STEPS


@pytest.mark.usefixtures("free_run_dir")
def test_an_alarm_is_printed_when_it_begins_and_recorded_while_it_rings(config, monkeypatch, capsys):
    ringing = [set(), {"one"}, {"one", "two"}, {"two"}]
    monkeypatch.setattr(
        grpo.runs.trainer, "alarms", lambda history: {name: f"line of {name}" for name in ringing[len(history) - 1]}
    )
    with interrupted(4, "rollout"):
        run(config)
    run(config)  # a resumed run knows what rings
    assert [set(record["alarms"]) for record in lines(Path(config.run_dir) / "metrics.jsonl")] == ringing
    err = capsys.readouterr().err
    assert sorted(line for line in err.splitlines() if line) == ["warning: one: line of one", "warning: two: line of two"]
