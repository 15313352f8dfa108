"""An evaluation by majority vote: each model answers every problem greedily and at several temperatures. A directory holds it.

    config.json      settings, and digests of the problems and models that the samples belong to
    problems.jsonl   all problems, in order
    samples.jsonl    one line a sample, written when it ends; sample 0 is greedy, sample j has the j-th temperature
    result.json      the figures

An evaluation that was stopped, in whatever way, continues with the missing samples. The random key of a sample depends only on
its number, so a sample is the same whenever it is drawn and whatever shares its batch, up to rounding. Votes and figures are
those of grpo/reports/consensus.py.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from data.problems import Problem
from data.prompts import drop_long
from data.tokenizer import load_tokenizer
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.reports.consensus import WAYS, canonical, model_figures, paired
from grpo.reports.jsonl import SAMPLE_KEYS, parse_json, rewrite
from grpo.reward import canonical_text, flexible_answer, numeric_gold, parse_gold, stated_answer
from grpo.runs.checkpoint import digest
from grpo.runs.distributed import broadcast_from_main, is_main_process
from grpo.runs.evaluate import Completion, complete
from grpo.runs.grading import grade_completions
from grpo.runs.metrics import JsonLines, write_json
from grpo.runs.model_source import Model
from grpo.runs.reward_worker import UserRewards
from grpo.runs.run_dir import take_lock
from grpo.runs.setup import check_tokenizer, fingerprint
from models.gemma import ExecutionConfig
from models.lora import attached
from models.sharding import ROLLOUT, activation_dtype


class Evaluation:
    """An evaluation in its directory. `temperatures` are those of the samples that vote."""

    def __init__(
        self, folder: Path, problems: list[Problem], temperatures: list[float], settings: dict[str, Any], found: dict[str, Any]
    ):
        """`found`: what the samples in the directory belong to, as far as there are some."""
        self.folder, self.problems, self.temperatures, self.config = folder, problems, temperatures, found
        content = [(problem.id, problem.question, problem.answer) for problem in problems]
        self.claim(settings | {"temperatures": temperatures, "problems": fingerprint(content)})
        self.too_long: dict[str, list[str]] = {}  # by model: problems that count as wrong because their prompts are too long
        records = [asdict(problem) | {"gold": canonical_gold(problem.answer)} for problem in problems]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        if is_main_process():
            rewrite(folder / "problems.jsonl", "".join(lines))
        self.file = JsonLines(folder / "samples.jsonl", None, *SAMPLE_KEYS, "flexible_answer", "format", "seconds")
        known = {problem.id for problem in problems}
        if stray := [r for r in self.file.records if r["problem"] not in known or not 0 <= r["sample"] <= len(temperatures)]:
            raise ConfigError(f"{folder}: samples.jsonl has {len(stray)} samples of other problems; give another --out")

    def claim(self, part: dict[str, Any]) -> None:
        """Record what the samples belong to. Raises ConfigError if they belong to something else."""
        changes = [
            f"{name} {str(self.config[name])[:60]} -> {str(value)[:60]}"
            for name, value in part.items()
            if self.config.get(name, value) != value
        ]
        if changes:
            raise ConfigError(f"{self.folder} holds another evaluation ({', '.join(changes)}); give another --out")
        self.config |= part
        if is_main_process():
            write_json(self.folder / "config.json", self.config)

    def samples_of(self, name: str) -> list[dict[str, Any]]:
        """The samples of a model that exist so far."""
        return [sample for sample in self.file.records if sample["model"] == name]

    def draw_samples(
        self, name: str, model: Model, mesh: Mesh, config: Config, show: Callable[[list[Completion]], None]
    ) -> None:
        """Draw the missing samples of a model. `show` is called with the samples that have ended."""
        tokenizer = load_tokenizer(model.folder, config.thinking)
        check_tokenizer(tokenizer, model.config)
        params = model.load_policy(mesh, activation_dtype(config.dtype))
        adapted = list(attached(params).values())
        scale = f" x {adapted[0].scale:g}" if adapted else ""  # it is no array, so the digest does not see it
        self.claim({f"{name}_weights": digest(params) + scale, f"{name}_tokenizer": tokenizer.fingerprint})
        asked, prompt_ids, too_long = drop_long(self.problems, tokenizer, config.system_prompt, config.max_prompt_tokens)
        self.too_long[name] = [problem.id for problem in too_long]
        config = replace(config, max_prompt_tokens=max(map(len, prompt_ids)))
        temperatures = [0.0, *self.temperatures]
        present = {(sample["problem"], sample["sample"]) for sample in self.samples_of(name)}
        numbered = [(problem, j) for problem in asked for j in range(len(temperatures))]  # by the index of a Completion
        wanted = np.array([i for i, (problem, j) in enumerate(numbered) if (problem.id, j) not in present], int)
        execution = ExecutionConfig(ROLLOUT, activation_dtype(config.dtype), unroll=config.unroll)
        rewards = UserRewards()  # none: only accuracies and formats are needed
        start = time.perf_counter()
        for ended in complete(params, prompt_ids, temperatures, tokenizer, model.config, execution, config, wanted):
            pairs = [numbered[completion.index] for completion in ended]
            texts, truncated = [completion.text for completion in ended], [completion.truncated for completion in ended]
            grades = grade_completions(texts, [problem for problem, _ in pairs], truncated, config.reward_weights, rewards)
            seconds = (time.perf_counter() - start) / len(ended)
            lines = [
                sample_record(name, problem, j, temperatures[j], completion, grade, seconds)
                for (problem, j), completion, grade in zip(pairs, ended, grades, strict=True)
            ]
            self.file.write_all(lines)
            self.file.records += lines
            start = time.perf_counter()
            show(ended)

    def result(self, names: list[str]) -> dict[str, Any]:
        """The figures of all models, also written to result.json.

        Outside `models`, paired counts and agreement are those of the trained model, its vote against its greedy answers;
        `trained_against_base` compares the two models.
        """
        models: dict[str, Any] = {"base": None, "trained": None}
        solved = {}
        problems = [{"id": problem.id, "gold": canonical_gold(problem.answer)} for problem in self.problems]
        for name in names:
            models[name], solved[name] = model_figures(problems, self.samples_of(name), self.temperatures)
        trained, against = models["trained"], None
        if models["base"]:
            against = {way: paired(solved["base"][way], solved["trained"][way]) for way in WAYS}
        tokens, seconds = (sum(models[name][key] for name in names) for key in ("tokens", "seconds"))
        result = {
            "n": len(problems),
            "models": models,
            **trained["paired"],
            "agreement": trained["agreement"],
            "tokens_per_s": tokens / seconds if seconds else None,
            "trained_against_base": against,
            "too_long": self.too_long,
        }
        if is_main_process():
            write_json(self.folder / "result.json", result)
        return result


def sample_record(
    model: str, problem: Problem, number: int, temperature: float, completion: Completion, grade: Any, seconds: float
) -> dict[str, Any]:
    """A line of samples.jsonl. `seconds` is the sample's share of the time of those that ended together."""
    stated = stated_answer(completion.text, problem.answer)
    answer = stated if isinstance(stated, str) else canonical(stated)
    return {
        "model": model,
        "problem": problem.id,
        "sample": number,
        "temperature": temperature,
        "text": completion.text,
        "length": len(completion.tokens),
        "truncated": completion.truncated,
        "answer": answer,
        "flexible_answer": canonical(flexible_answer(completion.text)) if numeric_gold(problem.answer) else answer,
        "accuracy": grade["accuracy"],
        "format": grade["format"],
        "seconds": seconds,
    }


def canonical_gold(answer: str) -> str:
    """A gold answer in the form in which samples have theirs."""
    return str(canonical(parse_gold(answer))) if numeric_gold(answer) else canonical_text(answer, answer)


def read_settings(path: Path) -> dict[str, Any]:
    """What the samples of an evaluation belong to; empty if there is no file yet. ConfigError if it is not an evaluation's."""
    if not path.exists():
        return {}
    try:
        settings = parse_json(path.read_text("utf-8"))
    except ValueError:
        settings = {}
    if not isinstance(settings, dict) or "temperatures" not in settings:  # for example a run's directory
        raise ConfigError(f"{path} does not belong to an evaluation; give another --out")
    return settings


@contextmanager
def open_evaluation(
    folder: Path, problems: list[Problem], temperatures: list[float], settings: dict[str, Any]
) -> Iterator[Evaluation]:
    """The evaluation in `folder`, created if needed and locked for this process. With several, process 0 has the lock."""
    lock, fault, found = None, "", {}
    if is_main_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder)
            found = read_settings(folder / "config.json")
        except ConfigError as error:
            fault = str(error)
        except OSError as error:
            fault = f"out {folder} cannot be used: {error.strerror}; give another --out"
    fault, found = broadcast_from_main([fault, found])
    try:
        if fault:
            raise ConfigError(fault)
        yield Evaluation(folder, problems, temperatures, settings, found)
    finally:
        if lock is not None:
            os.close(lock)
