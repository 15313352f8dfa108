"""An evaluation by vote: every problem is answered greedily and at several temperatures, by each model; a directory keeps it.

    config.json      settings, and digests of the problems and models that the samples belong to
    problems.jsonl   every problem, in order
    samples.jsonl    a line a sample, written as it ends; sample 0 of a problem is greedy, the others are in temperature's order
    result.json      the figures

Stopped in whatever way, it goes on with the samples that are missing. A sample is drawn from a key of its own number, so that
it is the same whenever it is drawn and beside whatever others, to rounding. Left out: votes and figures (consensus.py).
"""

import hashlib
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
from grpo.reports.consensus import figures, paired, plain
from grpo.reward import extract_answer, flexible_answer
from grpo.runs.checkpoint import digest
from grpo.runs.evaluate import Completion, complete
from grpo.runs.grading import grade_completions
from grpo.runs.metrics import JsonLines, rewrite
from grpo.runs.model_source import Model
from grpo.runs.reward_worker import UserRewards
from grpo.runs.run_dir import take_lock
from grpo.runs.setup import check_tokenizer
from models.gemma import ExecutionConfig
from models.sharding import ROLLOUT, activation_dtype


class Evaluation:
    """The directory of an evaluation. `temperatures` are those of the samples that vote."""

    def __init__(self, folder: Path, problems: list[Problem], temperatures: list[float], settings: dict[str, Any]):
        self.folder, self.problems, self.temperatures = folder, problems, temperatures
        self.config: dict[str, Any] = read_settings(folder / "config.json")
        self.too_long: dict[str, list[str]] = {}  # by model: problems that count as wrong, as their prompts are too long
        content = [(problem.id, problem.question, problem.answer) for problem in problems]
        self.claim(
            settings | {"temperatures": temperatures, "problems": hashlib.sha256(repr(content).encode()).hexdigest()[:16]}
        )
        lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems]
        rewrite(folder / "problems.jsonl", "".join(lines))
        self.file = JsonLines(folder / "samples.jsonl", step=None)

    def claim(self, part: dict[str, Any]) -> None:
        """Note what the samples belong to. ConfigError when they belong to something else."""
        changes = [f"{name} {str(self.config[name])[:60]} -> {str(value)[:60]}" for name, value in part.items()
                   if self.config.get(name, value) != value]  # fmt: skip
        if changes:
            raise ConfigError(f"{self.folder} holds another evaluation ({', '.join(changes)}); give another --out")
        self.config |= part
        rewrite(self.folder / "config.json", json.dumps(self.config, indent=1) + "\n")

    def of(self, name: str) -> list[dict[str, Any]]:
        """The samples of a model, so far."""
        return [sample for sample in self.file.records if sample["model"] == name]

    def answer(self, name: str, model: Model, mesh: Mesh, config: Config, show: Callable[[list[Completion]], None]) -> None:
        """Draw the samples of a model that are missing; `show` sees them as they end."""
        tokenizer = load_tokenizer(model.folder)
        check_tokenizer(tokenizer, model.config)
        view = model.load(mesh, ROLLOUT, activation_dtype(config.dtype))
        self.claim({f"{name}_weights": digest(view), f"{name}_tokenizer": tokenizer.fingerprint})
        asked, prompt_ids, too_long = drop_long(self.problems, tokenizer, config.system_prompt, config.max_prompt_tokens)
        self.too_long[name] = [problem.id for problem in too_long]
        config = replace(config, max_prompt_tokens=max(map(len, prompt_ids)))
        temperatures = [0.0, *self.temperatures]
        there = {(sample["problem"], sample["sample"]) for sample in self.of(name)}
        numbers = [(problem, j) for problem in asked for j in range(len(temperatures))]
        wanted = np.array([i for i, (problem, j) in enumerate(numbers) if (problem.id, j) not in there], int)
        execution = ExecutionConfig(ROLLOUT, activation_dtype(config.dtype), unroll=config.unroll)
        rewards = UserRewards()  # none: accuracies and formats are all that is asked
        start = time.perf_counter()
        for ended in complete(view, prompt_ids, temperatures, tokenizer, model.config, execution, config, wanted):
            pairs = [numbers[completion.index] for completion in ended]
            texts, cut = [completion.text for completion in ended], [completion.truncated for completion in ended]
            graded = grade_completions(texts, [problem for problem, _ in pairs], cut, config.reward_weights, rewards)
            seconds = (time.perf_counter() - start) / len(ended)
            lines = [
                record(name, problem.id, j, temperatures[j], completion, graded_completion, seconds)
                for (problem, j), completion, graded_completion in zip(pairs, ended, graded, strict=True)
            ]
            self.file.write_all(lines)
            self.file.records += lines
            start = time.perf_counter()
            show(ended)

    def result(self, names: list[str]) -> dict[str, Any]:
        """The figures of all models, kept in result.json. Those outside `models` are of the trained one, its vote against its
        greedy answers, except for `trained_against_base`.
        """
        models: dict[str, Any] = {"base": None, "trained": None}
        solved = {}
        problems = [asdict(problem) for problem in self.problems]
        for name in names:
            models[name], solved[name] = figures(problems, self.of(name), self.temperatures)
        trained, against = models["trained"], None
        if models["base"]:
            against = {way: paired(solved["base"][way], solved["trained"][way]) for way in ("greedy", "consensus")}
        tokens, seconds = (sum(models[name][what] for name in names) for what in ("tokens", "seconds"))
        result = {
            "n": len(problems),
            "models": models,
            **trained["paired"],
            "agreement": trained["agreement"],
            "tokens_per_s": tokens / seconds if seconds else None,
            "trained_against_base": against,
            "too_long": self.too_long,
        }
        rewrite(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        return result


def record(
    model: str, problem: str, number: int, temperature: float, completion: Completion, graded: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """A line of samples.jsonl. `seconds` is the sample's share of what those that ended together took."""
    return {
        "model": model,
        "problem": problem,
        "sample": number,
        "temperature": temperature,
        "text": completion.text,
        "length": len(completion.tokens),
        "truncated": completion.truncated,
        "answer": plain(extract_answer(completion.text)),
        "flexible_answer": plain(flexible_answer(completion.text)),
        "accuracy": graded["accuracy"],
        "format": graded["format"],
        "seconds": seconds,
    }


def read_settings(path: Path) -> dict[str, Any]:
    """What an evaluation belongs to; nothing when there is none yet."""
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError:
        settings = {}
    if "temperatures" not in settings:  # a run's directory, say
        raise ConfigError(f"{path} is not that of an evaluation; give another --out")
    return settings


@contextmanager
def open_evaluation(
    folder: Path, problems: list[Problem], temperatures: list[float], settings: dict[str, Any]
) -> Iterator[Evaluation]:
    """The evaluation in `folder`, made if need be, for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
    except OSError as error:
        raise ConfigError(f"out {folder} cannot be used: {error.strerror}; give another --out") from None
    try:
        yield Evaluation(folder, problems, temperatures, settings)
    finally:
        os.close(lock)
