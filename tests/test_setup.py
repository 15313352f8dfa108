"""Laws of grpo/runs/setup.py: which problems a run has, and what is refused before anything is loaded."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from training import (
    devices,
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
from data.prompts import encode_prompt, render_prompt
from data.tokenizer import load_tokenizer
from grpo.config import Config
from grpo.errors import ConfigError, RunError
from grpo.runs.console import Progress, describe_plan, sampling_bias
from models import ModelError

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_no_arithmetic_problem_is_trained_on_and_evaluated(config):
    for eval_data in ("", "arithmetic:tune"):
        train, held_out = choose_problems(replace(config, new_problems=2000, eval_problems=500, eval_data=eval_data))
        assert (len(train), len(held_out)) == (2000, 500)
        assert not {problem.id for problem in train} & {problem.id for problem in held_out}


def test_no_problem_of_a_file_is_trained_on_and_evaluated(config, tmp_path):
    """Ten questions, each twice with other blanks: whatever is held out is in neither form among the others."""
    records = [{"question": f"What  is{' ' * copy} {n} + 1?", "answer": f"#### {n + 1}"} for n in range(10) for copy in (1, 2)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def asked(problems):
        return {" ".join(problem.question.split()) for problem in problems}

    held_sets = []
    for seed in (0, 1):
        drawn = replace(config, data=str(path), eval_problems=4, new_problems=0, seed=seed)
        train, held_out = choose_problems(drawn)
        assert len(held_out) == 4 and len(train) == 2 * 6
        assert not asked(train) & asked(held_out)
        held_sets.append([problem.id for problem in held_out])
    assert held_sets[0] == held_sets[1]  # runs of different seeds are measured on the same problems


def test_prompts_too_long_are_dropped_and_counted(config):
    tokenizer = load_tokenizer(config.model_path)
    problems, held_out = choose_problems(config)
    lengths = [len(encode_prompt(tokenizer, render_prompt(problem.question, ""))) for problem in problems]
    held_lengths = [len(encode_prompt(tokenizer, render_prompt(problem.question, ""))) for problem in held_out]
    width = sorted(lengths)[len(lengths) // 2]
    with devices(1):
        prepared = grpo.runs.setup.prepare(replace(config, max_prompt_tokens=width))
    assert prepared.problems == [problem for problem, length in zip(problems, lengths, strict=True) if length <= width]
    assert len(prepared.dropped) == sum(length > width for length in lengths + held_lengths) > 0
    assert [len(ids) for ids in prepared.prompt_ids] == [length for length in lengths if length <= width]
    assert f"{len(prepared.dropped)} too long and dropped ({prepared.dropped[0].id}" in describe_plan(prepared)


def test_the_plan_counts_what_evaluations_cost(config):
    """Held-out problems greedy and sampled around each session; problems of sessions after them and after later ones."""
    asked = replace(
        config, sessions=3, new_problems=16, eval_problems=4, retention_problems=6, eval_every=2, max_new_tokens=1000
    )
    with devices(1):
        prepared = grpo.runs.setup.prepare(asked)
        assert [session.end for session in prepared.sessions] == [2, 6, 10]
        count = len({0, 2, 6, 10} | {2, 4, 6, 8, 10})  # an end is evaluated once
        tokens = (2 * 4 * count + 6 + 12 + 18) / 1000
        line = f"{count} times 4 problems, each greedy and sampled, 36 answers to problems of sessions: at most {tokens:.1f}M "
        assert line in describe_plan(prepared)
        none = grpo.runs.setup.prepare(replace(asked, eval_problems=0))
    assert "evaluation  none\n" in describe_plan(none)


def test_a_long_evaluation_says_how_far_it_is(capsys, monkeypatch):
    """A line every half minute; on a terminal the bar."""
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = Progress(5)
    for done in range(1, 9):
        progress.evaluating(0, done, 8)
    assert capsys.readouterr().out == "evaluation: 4 of 8 samples\n"


def test_a_tokenizer_of_another_size_is_refused(config, tmp_path):
    model = Path(shutil.copytree(config.model_path, tmp_path / "model"))
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "vocab_size": 2 * values["vocab_size"]}))
    with devices(1), pytest.raises(ModelError, match="has 360 pieces, the model 720 rows: not this model's tokenizer"):
        grpo.runs.setup.prepare(replace(config, model_path=str(model)))


def test_a_step_needs_as_many_problems_as_prompts(config):
    with devices(1), pytest.raises(ConfigError, match=r"^prompts_per_step 8 must be at most 5"):
        grpo.runs.setup.prepare(replace(config, new_problems=5))


def test_a_run_warns_of_them_after_its_plan_and_before_its_weights(config, tmp_path, monkeypatch, capsys):
    def no_weights(*arguments):
        raise RunError("far enough")

    monkeypatch.setattr(grpo.runs.trainer.Trainer, "__init__", no_weights)
    for changes, lines in (({"top_k": 5}, 1), ({}, 0)):
        with devices(1), pytest.raises(RunError, match="far enough"):
            grpo.runs.trainer.train(replace(config, run_dir=str(tmp_path / "run"), **changes))
        printed = capsys.readouterr()
        assert "a step  " in printed.out and printed.err.count("warning: top_k 5 biases the gradient") == lines


def test_settings_that_bias_the_gradient_are_named_in_one_line():
    assert sampling_bias(Config()) == sampling_bias(Config(temperature=0.5, resample=2)) == ""
    line = sampling_bias(Config(top_k=50))
    assert line.startswith("top_k 50 biases the gradient: ") and line.endswith("; leave out --top_k") and "\n" not in line
    both = sampling_bias(Config(top_k=50, top_p=0.9))
    assert both.startswith("top_k 50 and top_p 0.9 biases") and both.endswith("; leave out --top_k and --top_p")
