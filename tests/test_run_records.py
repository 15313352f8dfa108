"""Laws of what a run writes: metrics, completions, tokens, evaluations, and files of JSON lines."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from test_trackers import read_events
from training import (
    STEPS,
    C,
    Finished,
    G,
    Q,
    devices,
    final_state,
    lines,
    read_files,
    run,
    without_times,
)  # fmt: skip

import grpo.rollout
import grpo.runs.evaluate
import grpo.runs.model_source
import grpo.runs.setup
import grpo.runs.trainer
import grpo.session
import grpo.step
import grpo.update
from data import DataError
from data.arithmetic import make_problems
from data.datasets import choose_problems
from data.tokenizer import load_tokenizer
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.runs.metrics import JsonLines
from grpo.runs.token_trace import groups_due

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_a_run_leaves_its_records(config, finished):
    files = finished.files
    assert set(files) == {
        "config.json",
        "sessions.json",
        "result.json",
        "metrics.jsonl",
        "completions.jsonl",
        "tokens.jsonl",
        "evaluations.jsonl",
    }
    assert Config(**files["config.json"]) == config
    assert files["result.json"] == json.loads(json.dumps(finished.result))
    assert [record["step"] for record in files["metrics.jsonl"]] == [1, 2, 3, 4]
    assert [record["step"] for record in files["evaluations.jsonl"]] == [0, STEPS]
    assert [record["step"] for record in files["completions.jsonl"]] == [step for step in (1, 2, 3, 4) for _ in range(Q * G)]
    assert [record["step"] for record in files["tokens.jsonl"]] == [step for step in (1, 2, 3, 4) for _ in range(Q)]


def test_the_result_says_what_the_records_say(config, finished):
    result, metrics = finished.result, finished.files["metrics.jsonl"]
    evaluations = [record["accuracy"] for record in finished.files["evaluations.jsonl"]]
    assert set(result) == {
        "run_dir", "preset", "seed", "steps", "finished", "seconds", "accuracy_before", "accuracy_after", "sessions",
        "reward_first", "reward_last", "recompilations", "params_digest",
    }  # fmt: skip
    assert (result["run_dir"], result["preset"], result["seed"], result["steps"]) == (config.run_dir, "custom", 0, STEPS)
    assert [result["accuracy_before"], result["accuracy_after"]] == evaluations
    assert (result["reward_first"], result["reward_last"]) == (metrics[0]["reward"], metrics[-1]["reward"])


def test_every_suggested_metric_is_there_and_finite(finished):
    components = ("correct", "reasoning_tags", "answer_tags", "operators", "violation", "variety")
    names = {f"rewards/{name}/{figure}" for name in components for figure in ("mean", "std")}
    names |= {f"ratio/{figure}" for figure in ("mean", "max", "min")} | {
        f"format/{part}" for part in ("strict", "reasoning", "answer")
    }
    names |= {f"time/{phase}" for phase in ("prefill", "decode", "reward", "reference", "update", "step")}
    names |= {
        "step", "reward", "reward_std", "accuracy", "accuracy/strict", "accuracy/flexible", "frac_reward_zero_std",
        "frac_truncated", "kl/k3", "kl/k1", "entropy", "clip/low", "clip/high", "logp_diff_sampler_trainer/mean",
        "logp_diff_sampler_trainer/max", "advantage/abs_mean", "advantage/max", "loss", "grad_norm", "bad_updates", "lr",
        "completions/mean_length", "completions/max_length", "completions/mean_terminated_length", "completions/mean_words",
        "tokens_per_s/decode", "tokens_per_s/total", "hbm_peak", "compiles", "frac_unscorable", "skipped_update",
        "resampled_groups",
    }  # fmt: skip
    for record in finished.files["metrics.jsonl"]:
        assert names <= set(record)
        assert record["alarms"] == []
        assert all(math.isfinite(value) for name, value in record.items() if name != "alarms")
        assert record["time/step"] >= record["time/prefill"] + record["time/decode"] + record["time/update"]


def test_every_completion_is_recorded_with_its_reward_and_advantage(finished):
    for record in finished.files["completions.jsonl"]:
        assert record["reward"] == pytest.approx(sum(record["components"].values()), abs=1e-6)
        assert record["components"]["variety"] == len(set(record["text"])) / 2
        assert record["components"]["violation"] == -15  # a random model writes no tags
        assert 1 <= record["length"] <= C
        assert record["length"] == C or not record["truncated"]
    groups = np.array([record["advantage"] for record in finished.files["completions.jsonl"]]).reshape(-1, G)
    rewards = np.array([record["reward"] for record in finished.files["completions.jsonl"]]).reshape(-1, G)
    np.testing.assert_allclose(groups.sum(axis=1), 0, atol=1e-5)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(groups, centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4), atol=1e-5)
    assert (groups != 0).any()
    problems = np.array([record["problem"] for record in finished.files["completions.jsonl"]]).reshape(-1, G)
    assert (problems == problems[:, :1]).all() and len(set(problems[:, 0])) == STEPS * Q


def test_metrics_are_means_over_the_recorded_completions(finished):
    for metrics in finished.files["metrics.jsonl"]:
        records = [record for record in finished.files["completions.jsonl"] if record["step"] == metrics["step"]]
        lengths = np.array([record["length"] for record in records])
        ended = np.array([not record["truncated"] for record in records])
        rewards = np.array([record["reward"] for record in records]).reshape(Q, G)
        variety = np.array([record["components"]["variety"] for record in records])
        expected = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(axis=1, ddof=1).mean(),
            "frac_reward_zero_std": (np.ptp(rewards, axis=1) == 0).mean(),
            "frac_unscorable": 0.0,
            "frac_truncated": 1 - ended.mean(),
            "completions/mean_length": lengths.mean(),
            "completions/max_length": lengths.max(),
            "completions/mean_terminated_length": lengths[ended].mean(),
            "rewards/variety/mean": variety.mean(),
            "rewards/variety/std": variety.std(),
            "format/strict": 0.0,
            "advantage/max": max(abs(record["advantage"]) for record in records),
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert any(0 < metrics["frac_truncated"] < 1 for metrics in finished.files["metrics.jsonl"])  # both kinds are met


def test_on_policy_the_ratio_is_one_and_the_sampler_agrees_with_the_trainer(finished):
    for metrics in finished.files["metrics.jsonl"]:
        assert (metrics["ratio/min"], metrics["ratio/mean"], metrics["ratio/max"]) == (1, 1, 1)
        assert metrics["clip/low"] == metrics["clip/high"] == 0
        assert metrics["logp_diff_sampler_trainer/max"] < 1e-4  # nats, float32 on both sides
    first, *later = finished.files["metrics.jsonl"]
    assert abs(first["kl/k1"]) < 1e-6 and first["kl/k3"] < 1e-9  # the policy still is the reference
    assert all(metrics["kl/k3"] > 1e-6 for metrics in later)


def test_nothing_is_compiled_after_the_first_step(finished):
    first, *later = finished.files["metrics.jsonl"]
    assert first["compiles"] > 0
    assert [metrics["compiles"] for metrics in later] == [0] * (STEPS - 1)
    assert finished.result["recompilations"] == 0


def test_the_learning_rate_warms_up_and_then_follows_a_cosine_to_a_tenth(config, finished):
    """Two updates of warm-up are half of four: one is made, then the peak, half way down the cosine, and a tenth."""
    peak = config.learning_rate
    assert config.warmup_steps == 2
    expected = [peak / 2, peak, (peak + peak / 10) / 2, peak / 10]
    assert [metrics["lr"] for metrics in finished.files["metrics.jsonl"]] == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_counts_what_it_says(finished):
    for record in finished.files["evaluations.jsonl"]:
        figures = record["accuracy"]
        assert figures["n"] == Q
        assert 0 <= figures["low"] <= figures["greedy"] <= figures["high"] <= 1
        assert figures["greedy_reward"] != figures["sampled_reward"]  # variety differs, though nothing is right


def test_an_evaluation_does_not_depend_on_the_batch_it_is_computed_in(config, finished):
    """Three prompts at a time with room for fifteen samples, or all with room for more than there are."""
    for prompts, group in ((3, 5), (Q, 4)):
        with devices(1):
            run = grpo.runs.setup.prepare(replace(config, prompts_per_step=prompts, group_size=group))
        with jax.set_mesh(run.mesh):
            params = grpo.update.sampling_params(grpo.runs.trainer.load_base(run), run.model, run.sample)
            figures = grpo.runs.trainer.evaluate(params, run.eval_problems, run.eval_ids, run)
        assert figures == finished.files["evaluations.jsonl"][0]["accuracy"]


@pytest.mark.parametrize(
    ("sampled", "lengths"), [(True, {"greedy_length": 4, "sampled_length": 5}), (False, {"greedy_length": 2.5})]
)
def test_an_evaluation_takes_the_mean_over_all_its_problems(config, monkeypatch, sampled, lengths):
    """Of completions that have 1, 2, 3, ... tokens, in another order."""
    problems, count = make_problems(4, 0, "test"), 8 if sampled else 4
    completions = [grpo.runs.evaluate.Completion(i, [0] * (i + 1), "", False) for i in range(count)]
    monkeypatch.setattr(grpo.runs.evaluate, "complete", lambda *_: iter([completions[3:], completions[:3]]))
    with devices(1):
        prepared = grpo.runs.setup.prepare(replace(config, reward=""))
    figures = grpo.runs.evaluate.evaluate(None, problems, [], prepared, sampled)  # type: ignore[arg-type]
    assert {name: value for name, value in figures.items() if name.endswith("length")} == lengths


@pytest.fixture(scope="module")
def awkward(config, folder) -> Finished:
    """Two updates a rollout, parts, clipping, rows without a score, cut ones left out, other weights."""
    config = replace(
        config, run_dir=str(folder / "awkward"), updates_per_rollout=2, microbatches=2, epsilon_low=1e-3, epsilon_high=2e-3,
        reward=f"{folder / 'rewards.py'}:sometimes", mask_truncated=True, aggregation="dapo", max_steps=2, warmup_steps=0,
        eval_problems=0,
    )  # fmt: skip
    return Finished(run(config), read_files(config), final_state(config), {}, {})


@pytest.mark.parametrize(("groups", "steps"), [(0, 9), (1, 9), (2, 9), (5, 9), (100, 100), (100, 333), (20, 9)])
def test_groups_to_inspect_are_spread_evenly_from_the_first_step_to_the_last(config, groups, steps):
    due = [groups_due(step, steps, replace(config, inspect_groups=groups)) for step in range(1, steps + 1)]
    assert sum(due) == groups
    assert (due[0] > 0) == (groups > 0) and (due[-1] > 0) == (groups > 1)
    for step in range(1, steps + 1):
        assert abs(sum(due[:step]) - groups * step / steps) <= 1
    assert groups_due(1, 1, replace(config, inspect_groups=100)) == Q


@pytest.mark.parametrize("name", ["finished", pytest.param("awkward", marks=pytest.mark.long)])
def test_every_token_that_is_recorded_is_as_the_loss_had_it(request, name):
    """Every group of every step. Recomputed in float64 from the log-probabilities; together they give the logged loss. What is
    said of a group is what completions.jsonl says of it.
    """
    files = request.getfixturevalue(name).files
    config = Config(**files["config.json"])
    tokenizer, low, high = load_tokenizer(config.model_path), 1 - config.epsilon_low, 1 + config.epsilon_high
    questions = {problem.id: problem.question for problem in choose_problems(config)[0]}
    assert len(files["tokens.jsonl"]) == Q * len(files["metrics.jsonl"])
    met = set()
    for metrics in files["metrics.jsonl"]:
        step, loss, size, counted = metrics["step"], 0.0, 0.0, 0
        groups = [record for record in files["tokens.jsonl"] if record["step"] == step]
        completions = [record for record in files["completions.jsonl"] if record["step"] == step]
        for group in groups:
            assert (group["session"], group["question"]) == (metrics["session"], questions[group["problem"]])
            assert {name: group[name] for name in ("beta", "epsilon_low", "epsilon_high", "tis_cap")} == {
                name: getattr(config, name) for name in ("beta", "epsilon_low", "epsilon_high", "tis_cap")
            }
            records = [record for record in completions if record["problem"] == group["problem"]]
            for row, (tokens, record) in enumerate(zip(group["completions"], records, strict=True)):
                length, stopped = record["length"], not record["truncated"]
                assert tokens["row"] == row and tokenizer.decode(tokens["ids"]) == record["text"]
                assert tokens["pieces"] == tokenizer.pieces(tokens["ids"])
                assert tokens["pieces"][-1].startswith("<e") or not stopped
                assert {len(values) for name, values in tokens.items() if name != "row"} == {length}
                counts = record["reward"] is not None and (stopped or not config.mask_truncated)
                policy, old, sampler, ref = (
                    np.array(tokens[name]) for name in ("logprobs", "old_logprobs", "sampler_logprobs", "ref_logprobs")
                )
                ratio, kl, advantage = np.exp(policy - old), np.exp(ref - policy) - 1 - (ref - policy), record["advantage"]
                clipped = (ratio < low if advantage < 0 else ratio > high) & (advantage != 0)
                np.testing.assert_allclose(tokens["ratio"], ratio if counts else 1, rtol=2e-3 if counts else 0)
                np.testing.assert_allclose(tokens["kl"], kl if counts else 0, rtol=2e-3, atol=1e-5)
                met |= {("counts", counts)}
                if not counts:
                    assert not any(tokens["weight"]) and not any(tokens["clipped"])
                    continue
                edge = np.minimum(abs(ratio - low), abs(ratio - high)) > 2e-4  # rounding decides nearer to a bound
                np.testing.assert_array_equal(np.array(tokens["clipped"])[edge], clipped[edge])
                met |= {("clipped", bool(x)) for x in clipped[edge]}
                correction = np.minimum(np.exp(old - sampler), config.tis_cap)
                surrogate = np.minimum(ratio * advantage, np.clip(ratio, low, high) * advantage) * correction
                parts = np.array(tokens["weight"]) * (config.beta * kl - surrogate)
                loss, size, counted = loss + parts.sum(), size + abs(parts).sum(), counted + length
                if config.aggregation == "grpo":
                    np.testing.assert_allclose(tokens["weight"], 1 / length / (Q * G), rtol=1e-4)
        if config.aggregation == "dapo":
            weights = {weight for group in groups for tokens in group["completions"] for weight in tokens["weight"]}
            assert sorted(weights) == [0, pytest.approx(1 / counted, rel=1e-4)]
        assert loss == pytest.approx(metrics["loss"], abs=1e-4 * size) and size > 0.1
    assert met == ({("counts", True), ("clipped", False)} if name == "finished" else
                   {(what, value) for what in ("counts", "clipped") for value in (True, False)})  # fmt: skip


def test_inspecting_changes_nothing_and_costs_nothing_where_it_is_not_due(config, folder, finished, monkeypatch):
    """Two groups, of the first step and of the last."""
    calls, real = [], grpo.runs.trainer.token_records
    monkeypatch.setattr(grpo.runs.trainer, "token_records", lambda *args: calls.append(len(args[0])) or real(*args))
    few = replace(config, run_dir=str(folder / "few"), inspect_groups=2)
    assert run(few)["params_digest"] == finished.result["params_digest"]
    files, all_groups = read_files(few), finished.files["tokens.jsonl"]
    assert calls == [1, 1] and files["tokens.jsonl"] == [all_groups[0], all_groups[(STEPS - 1) * Q]]
    assert without_times(files["metrics.jsonl"]) == without_times(finished.files["metrics.jsonl"])


@pytest.mark.long
def test_without_a_kl_no_reference_is_loaded_and_the_reward_rises(bare, monkeypatch):
    """The mean of the last ten steps lies more than four standard errors above that of the first, untrained one."""
    loads, real_load = [], grpo.runs.model_source.load_params
    monkeypatch.setattr(grpo.runs.model_source, "load_params", lambda *args: loads.append(args) or real_load(*args))
    result = run(bare)
    assert len(loads) == 1
    files = read_files(bare)
    metrics, untrained = files["metrics.jsonl"], [record["reward"] for record in files["completions.jsonl"][: Q * G]]
    assert not any(name.startswith("kl/") for record in metrics for name in record)
    assert len(files["tokens.jsonl"]) == 100
    for record in files["tokens.jsonl"]:
        assert not any("ref_logprobs" in completion or any(completion["kl"]) for completion in record["completions"])
    events = [(step, figure) for step, name, figure in read_events(Path(bare.run_dir) / "tensorboard") if name == "reward"]
    assert events == [(record["step"], pytest.approx(record["reward"])) for record in metrics]
    assert result["accuracy_before"] is None and result["accuracy_after"] is None
    trained = np.mean([record["reward"] for record in metrics[-10:]])
    assert trained > np.mean(untrained) + 4 * np.std(untrained, ddof=1) / math.sqrt(Q * G)


def test_records_survive_reopening_up_to_a_step(tmp_path):
    """Also text with line separators that are no line ends to JSON, and a last line that a crash has torn."""
    records = [{"step": step, "text": text} for step, text in enumerate(("a\u2028b", "a\x85b\x0c", 'say "\n"', "ends {}"))]
    path = tmp_path / "records.jsonl"
    log = JsonLines(path, 0)
    for record in records:
        log.write(record)
    assert log.records == records == JsonLines(path, 3).records
    torn = path.read_text("utf-8") + '{"step": 2, "accuracy": {"n": 1}'
    path.write_text(torn, "utf-8")
    assert JsonLines(path, 2).records == records[:3] == lines(path)
    assert JsonLines(path, 0).records == records[:1] == lines(path)


def test_a_line_that_is_no_record_is_left_out_by_name_and_the_rest_stays(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text('{"step": 1}\n{"step": \n[]\n{"stop": 3}\n{"step": 4}\n')
    assert JsonLines(path, 9).records == [{"step": 1}, {"step": 4}] == lines(path)
    assert capsys.readouterr().err == "warning: skipped 3 malformed lines of records.jsonl (2, 3, 4)\n"


def test_a_config_is_its_record(config):
    assert Config(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("name", ["correct", "variety"])
def test_a_reward_needs_a_name_of_its_own(config, tmp_path, name):
    (tmp_path / "mine.py").write_text(f"def {name}(completion, problem):\n    return 1.0\n")
    path = f"{tmp_path / 'mine.py'}:{name}"
    with pytest.raises(ConfigError, match=f"the name '{name}' is taken"):
        run(replace(config, reward=path if name == "correct" else f"{path},{path}"))


def test_training_problems_are_refused_for_evaluation(config):
    with pytest.raises(DataError, match="must be arithmetic:tune or arithmetic:test"):
        run(replace(config, eval_data="arithmetic:train"))


def test_a_run_dir_that_cannot_be_used_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir .*file/run cannot be used: Not a directory"):
        run(replace(config, run_dir=str(tmp_path / "file" / "run")))


def test_a_run_without_gold_answers_has_rewards_and_no_accuracy(config, tmp_path, capsys):
    data = [{"prompt": f"Say {i}.", "topic": i} for i in range(24)]
    (tmp_path / "free.json").write_text(json.dumps({"data": data}))
    free = replace(config, run_dir=str(tmp_path / "run"), data=str(tmp_path / "free.json"), question_key="prompt", max_steps=1)
    with pytest.raises(DataError, match=r'free\.json:1: no key "answer"; there are prompt, topic'):
        run(replace(free, reward=""))
    result = run(free)
    (metrics,), evaluations = lines(tmp_path / "run/metrics.jsonl"), lines(tmp_path / "run/evaluations.jsonl")
    assert "accuracy" not in metrics and metrics["reward"] is not None and "rewards/variety/mean" in metrics
    assert result["accuracy_before"] is None and [set(record) for record in evaluations] == [{"step", "held_out", "time/eval"},
        {"step", "held_out", "retention", "time/eval"}]  # fmt: skip
    assert evaluations[0]["held_out"]["n"] == Q and "greedy_reward" in evaluations[0]["held_out"]
    assert "accuracy" not in capsys.readouterr().out.replace("accuracy_", "")
    assert all(record["accuracy"] == {} for record in lines(tmp_path / "run/completions.jsonl"))
