"""The report of a run: its files -> one JSON object -> one self-contained HTML file.

    read_page([run, another], evaluation, megabytes)      what the page shows, and notes on what it leaves out
    render(page)                                          page.html with the object inside, compressed, under a strict policy

A run may be unfinished, and any of its files may be missing. Malformed lines are skipped and counted in a note. Records become
columns, which compress well. page.html has the layout and the behaviour, plots.py the plots.
"""

import base64
import dataclasses
import gzip
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data import DataError
from data.arithmetic import training_problems
from data.problems import Problem, Reading, load_problems
from grpo.config import Config, current_names
from grpo.errors import ConfigError
from grpo.reports import analysis
from grpo.reports.consensus import gold_of, majority_vote
from grpo.reports.jsonl import SAMPLE_KEYS, parse_json, read_records

TEMPLATE = Path(__file__).with_name("page.html")
# Bit b of a completion's `flags`; the script in page.html has the same list.
FLAGS = ("tagged", "strict", "flexible", "reasoning_tags", "answer_tags", "violation", "truncated")
COMPLETION_KEYS = ("step", "problem", "text")
PROBLEM_KEYS = ("id", "question", "answer", "solution")
GROUP_KEYS = ("step", "problem", "question", "beta", "unbiased_kl", "epsilon_low", "epsilon_high", "tis_cap")
TOKEN_COLUMNS = ("ids", "logprobs", "sampler_logprobs", "old_logprobs", "ref_logprobs", "ratio", "kl", "clipped", "weight")


def read_page(run_dirs: list[Path], evaluation: Path | None, megabytes: float) -> dict[str, Any]:
    """Everything that the page shows. Completions, tokens and texts of an evaluation take at most about `megabytes` each.

    Raises ConfigError if a directory holds no run, or `evaluation` no evaluation.
    """
    for folder in run_dirs:
        if not (folder / "config.json").is_file() and not (folder / "metrics.jsonl").is_file():
            raise ConfigError(f"run_dir {str(folder)!r} holds no run: it has neither config.json nor metrics.jsonl")
    notes: list[str] = []
    limit = megabytes * 1e6
    runs = [read_run(folder, notes) for folder in run_dirs]
    tokens = read_tokens(run_dirs[0] / "tokens.jsonl", limit, notes)
    completions = read_completions(run_dirs[0], runs[0]["config"], {group["step"] for group in tokens}, limit, notes)
    gains = round_floats(analysis.gain_by_model(read_results(run_dirs, evaluation)))
    return {
        "runs": runs,
        "completions": completions,
        "tokens": tokens,
        "evaluation": read_evaluation(evaluation, limit, notes) if evaluation else None,
        "gain_by_model": gains,
        "settings": {field.name: field.metadata["help"] for field in dataclasses.fields(Config)},
        "notes": notes,
    }


def read_results(run_dirs: list[Path], evaluation: Path | None) -> dict[str, dict[str, Any]]:
    """Figures of all evaluated models, by run, step and name: `RUN, trained` or `RUN, step 60, trained`.

    The base model of a run is in all of the run's evaluations, and appears once. `evaluation` counts as one of the first run,
    wherever it lies.
    """
    results: dict[str, dict[str, Any]] = {}
    for run in run_dirs:
        folders = [evaluation] if evaluation and run == run_dirs[0] else []
        for folder in dict.fromkeys(path.resolve() for path in [*folders, *find_evaluations(run)]):
            step = folder.name.removeprefix("consensus-")
            for model, figures in read_object(folder / "result.json", {}, []).get("models", {}).items():
                words = [run.resolve().name, model]
                if step.isdecimal() and model != "base":
                    words.insert(1, f"step {step}")
                if figures:
                    results.setdefault(", ".join(words), figures)
    return results


def find_evaluations(run: Path) -> list[Path]:
    """The directories RUN/consensus and RUN/consensus-STEP that exist, the latest step first."""
    steps = [path for path in run.glob("consensus-*") if path.name.removeprefix("consensus-").isdecimal()]
    steps.sort(key=lambda path: int(path.name.removeprefix("consensus-")), reverse=True)
    return [path for path in (run / "consensus", *steps) if path.is_dir()]


def read_analyses(run_dir: Path, page: dict[str, Any], evaluation: Path | None) -> dict[str, Any]:
    """All analyses of the first run and of its evaluation, as `grpo.reports.analysis` documents them."""
    keys = {"metrics": (), "evaluations": (), "completions": (*COMPLETION_KEYS, "accuracy", "length")}
    lines = [list(read_records(run_dir / f"{name}.jsonl", [], "step", *needed)) for name, needed in keys.items()]
    analyses: dict[str, Any] = {"run": round_floats(analysis.analyse_run(*lines)), "gain_by_model": page["gain_by_model"]}
    if evaluation:
        samples = list(read_records(evaluation / "samples.jsonl", [], *SAMPLE_KEYS))
        problems = list(read_records(evaluation / "problems.jsonl", [], *PROBLEM_KEYS))
        analyses |= {"evaluation": page["evaluation"]["charts"], "hard_cases": analysis.hard_cases(samples, problems)}
    return analyses


def render(page: dict[str, Any]) -> str:
    """The HTML. Its policy allows only the script and the style that it contains, by their hashes, and no connection."""
    text = TEMPLATE.read_text("utf-8")
    data = json.dumps(page, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(data.encode(), 6, mtime=0)).decode()
    script, style = (policy_hash(re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]) for tag in ("script", "style"))  # type: ignore[index]
    policy = f"default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; form-action 'none'"
    return text.replace("{{policy}}", policy).replace("{{data}}", packed)


def policy_hash(source: str) -> str:
    """A script or style as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


# ---------------------------------------------------------------------------------------------------------------- a run


def read_run(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Settings, metrics as columns, alarms, evaluations, sessions and result of a run."""
    steps = list(read_records(folder / "metrics.jsonl", notes, "step"))
    names = dict.fromkeys(name for step in steps for name, value in step.items() if isinstance(value, (int, float)))
    sessions = [session for session in read_object(folder / "sessions.json", [], notes) if isinstance(session, dict)]
    return {
        "name": folder.resolve().name,
        "config": current_names(read_object(folder / "config.json", {}, notes)),
        "step": [step["step"] for step in steps],
        "metrics": {name: [round_floats(step.get(name)) for step in steps] for name in names if name != "step"},
        "alarms": [[step["step"], name] for step in steps for name in step.get("alarms") or []],
        "evaluations": round_floats(list(read_records(folder / "evaluations.jsonl", notes, "step"))),
        "sessions": [{key: len(x) if isinstance(x, list) else x for key, x in session.items()} for session in sessions],
        "result": round_floats(read_object(folder / "result.json", {}, notes)),
    }


def read_completions(folder: Path, config: dict[str, Any], wanted: set[int], limit: float, notes: list[str]) -> dict[str, Any]:
    """The completions as columns, in groups. Whole steps are left out beyond `limit` bytes; those in `wanted` come first."""
    path = folder / "completions.jsonl"
    steps, total = choose_steps(path, wanted, limit, notes)
    columns = CompletionColumns(config.get("group_size"))
    for record in read_records(path, [], *COMPLETION_KEYS):
        if record["step"] in steps:
            columns.add(record)
    problems = columns.problems | {"question": find_questions(columns.problems, config, notes)}
    return columns.columns | {
        "components": columns.components,
        "groups": columns.groups,
        "problems": problems,
        "total": total,
    }


def choose_steps(path: Path, wanted: set[int], limit: float, notes: list[str]) -> tuple[set[int], int]:
    """(steps, total): the steps whose completions fit into `limit` bytes, and the number of all completions."""
    sizes: Counter[int] = Counter()
    counts: Counter[int] = Counter()
    for record in read_records(path, notes, *COMPLETION_KEYS):
        sizes[record["step"]] += len(record["text"]) + 100
        counts[record["step"]] += 1
    first = {step: size for step, size in sizes.items() if step in wanted}
    others = {step: size for step, size in sizes.items() if step not in wanted}
    steps = {*spread(first, limit), *spread(others, limit - sum(first.values()))}
    if len(steps) < len(sizes):
        missing = sum(count for step, count in counts.items() if step not in steps)
        notes.append(
            f"{missing:,} of {counts.total():,} completions are not in this page: those of {len(sizes) - len(steps):,} of "
            f"{len(sizes):,} steps, evenly spread (--megabytes raises the limit)"
        )
    return steps, counts.total()


class CompletionColumns:
    """Records of completions as columns. A group is a run of at most `group_size` records of one step and one problem."""

    def __init__(self, group_size: int | None):
        self.group_size = group_size
        self.last: tuple[int, str] | None = None  # step and problem of the last record
        self.columns: dict[str, list] = {name: [] for name in ("text", "reward", "advantage", "length", "flags")}
        self.components: dict[str, list] = {}  # each as long as the other columns
        self.groups: dict[str, list] = {"step": [], "problem": [], "size": []}
        self.problems: dict[str, list] = {"id": [], "answer": []}
        self.index: dict[str, int] = {}  # of a problem by its id

    def add(self, record: dict[str, Any]) -> None:
        self.add_to_group(record)
        row = {
            "text": record["text"],
            "reward": round_floats(record.get("reward")),
            "advantage": round_floats(record.get("advantage"), 8),
            "length": record.get("length"),
            "flags": pack_flags(record),
        }
        components = record.get("components", {})
        for name in components:
            self.components.setdefault(name, [None] * len(self.columns["text"]))  # not recorded from the start
        for name, column in self.components.items():
            column.append(round_floats(components.get(name)))
        for name, value in row.items():
            self.columns[name].append(value)

    def add_to_group(self, record: dict[str, Any]) -> None:
        """Count the record in the last group, or in a new one."""
        problem = record["problem"]
        if problem not in self.index:
            self.index[problem] = len(self.index)
            self.problems["id"].append(problem)
            self.problems["answer"].append(record.get("answer"))
        if (record["step"], problem) != self.last or self.groups["size"][-1] == self.group_size:
            self.last = record["step"], problem
            for name, value in {"step": record["step"], "problem": self.index[problem], "size": 0}.items():
                self.groups[name].append(value)
        self.groups["size"][-1] += 1


def find_questions(problems: dict[str, list], config: dict[str, Any], notes: list[str]) -> list[str | None]:
    """The question of each problem; None if the run's data is gone, or has another answer now."""
    known = read_problems(config, notes) if problems["id"] else {}
    found = [known.get(id) for id in problems["id"]]
    pairs = zip(found, problems["answer"], strict=True)
    return [problem.question if problem and problem.answer == answer else None for problem, answer in pairs]


def read_problems(config: dict[str, Any], notes: list[str]) -> dict[str, Problem]:
    """The run's problems by id, if its data can still be read; the records have only their ids."""
    try:
        if config["data"] == "arithmetic":
            sessions = max(config["sessions"], config["session"])
            problems = training_problems(config["new_problems"], sessions, config["seed"])
        else:
            names = ("question_key", "answer_key", "answer_pattern")  # of an older run: as they are by default
            reading = Reading(**{name: config[name] for name in names if name in config}, optional=bool(config.get("reward")))
            problems = load_problems(config["data"], reading=reading)
    except (DataError, OSError) as error:
        notes.append(f"Questions are not shown, only the ids of problems: {error}")
    except (KeyError, TypeError):
        notes.append("Questions are not shown, only the ids of problems: config.json does not say what the run's data was")
    else:
        return {problem.id: problem for problem in problems}
    return {}


def read_tokens(path: Path, limit: float, notes: list[str]) -> list[dict[str, Any]]:
    """The groups whose tokens were saved. A column of equal values becomes that value."""
    keys = ("step", "problem", "completions")
    sizes = {n: len(json.dumps(group)) for n, group in enumerate(read_records(path, notes, *keys)) if all_columns(group)}
    kept = set(spread(sizes, limit))
    if len(kept) < len(sizes):
        notes.append(f"Tokens of {len(sizes) - len(kept):,} of {len(sizes):,} groups are not in this page (--megabytes)")
    groups = [group for number, group in enumerate(read_records(path, [], *keys)) if number in kept]
    return [token_columns(current_names(group)) for group in groups]


def all_columns(group: dict[str, Any]) -> bool:
    """Whether each completion of a line of tokens.jsonl is an object with its row and pieces, and lists as columns."""
    rows = group["completions"]
    if not all(isinstance(row, dict) and {"row", "pieces"} <= row.keys() for row in rows):
        return False
    return all(isinstance(row.get(name, []), list) for row in rows for name in ("pieces", *TOKEN_COLUMNS))


def token_columns(group: dict[str, Any]) -> dict[str, Any]:
    """One line of tokens.jsonl as the page has it."""
    rows = [
        {"row": row["row"], "pieces": row["pieces"]}
        | {name: fold_constant(round_floats(row[name])) for name in TOKEN_COLUMNS if name in row}
        for row in group["completions"]
    ]
    return {key: group.get(key) for key in GROUP_KEYS} | {"completions": rows}


def fold_constant(column: list) -> Any:
    """A column whose values are all the same as that value: weights, and ratios on-policy."""
    return column[0] if column and all(value == column[0] for value in column) else column


# ---------------------------------------------------------------------------------------------------------- an evaluation


def read_evaluation(folder: Path, limit: float, notes: list[str]) -> dict[str, Any]:
    """Figures, analyses, and for each problem the answers and texts of all samples and the vote. Sample 0 is greedy.

    Raises ConfigError if the directory holds no evaluation.
    """
    settings = read_object(folder / "config.json", {}, notes)
    problems = list(read_records(folder / "problems.jsonl", notes, *PROBLEM_KEYS))
    samples = list(read_records(folder / "samples.jsonl", notes, *SAMPLE_KEYS))
    if not problems or "temperatures" not in settings:
        raise ConfigError(
            f"evaluation {str(folder)!r} holds no evaluation: it needs config.json with temperatures and problems.jsonl"
        )
    temperatures, ids = settings["temperatures"], [problem["id"] for problem in problems]
    if not isinstance(temperatures, list) or not all(isinstance(t, (int, float)) for t in temperatures):
        raise ConfigError(f"evaluation {str(folder)!r}: temperatures {str(temperatures)[:40]} must be a list of numbers")
    by_model = {name: [sample for sample in samples if sample["model"] == name] for name in ("base", "trained")}
    by_model = {name: mine for name, mine in by_model.items() if mine}
    missing = len(by_model) * len(problems) * (1 + len(temperatures)) - len(samples)
    if missing:
        notes.append(
            f"Evaluation: {missing:,} samples are missing. The table and the list of votes count them as wrong; "
            "calibration, gain by difficulty and the hard cases of analyses.json leave out their problems; "
            "accuracy by length uses the samples that exist"
        )
    kept = choose_texts(samples, limit, notes)
    return {
        "settings": settings,
        "result": round_floats(read_object(folder / "result.json", {}, notes)),
        "problems": {key: [problem.get(key) for problem in problems] for key in ("id", "question", "solution")}
        | {"gold": [gold_of(problem) for problem in problems]},
        "models": {name: read_votes(mine, ids, temperatures, kept) for name, mine in by_model.items()},
        "charts": {name: round_floats(analysis.analyse_model(mine, problems)) for name, mine in by_model.items()},
    }


def choose_texts(samples: list[dict[str, Any]], limit: float, notes: list[str]) -> set[str]:
    """The problems whose texts fit into `limit` bytes."""
    sizes: Counter[str] = Counter()
    for sample in samples:
        sizes[sample["problem"]] += len(sample["text"])
    kept = set(spread(sizes, limit))
    if len(kept) < len(sizes):
        notes.append(f"Evaluation: texts of {len(sizes) - len(kept):,} of {len(sizes):,} problems are not in this page")
    return kept


def read_votes(samples: list[dict[str, Any]], ids: list[str], temperatures: list[float], kept: set[str]) -> dict[str, Any]:
    """One model's votes, and for each problem the answers of its 1 + voters samples, and their texts if it is in `kept`."""
    by_number = {(sample["problem"], sample["sample"]): sample for sample in samples}
    rows = [[by_number.get((id, number)) for number in range(1 + len(temperatures))] for id in ids]
    answers = [[sample["answer"] if sample else None for sample in row] for row in rows]
    texts = [[sample["text"] if sample else None for sample in row] for row in rows]
    return {
        "answers": answers,
        "winner": [majority_vote(row[1:], temperatures) for row in answers],
        "texts": [row if id in kept else None for id, row in zip(ids, texts, strict=True)],
    }


# ---------------------------------------------------------------------------------------------------------------- values


def read_object(path: Path, missing: Any, notes: list[str]) -> Any:
    """The value in a JSON file; `missing` if there is no such file, or what it holds is not JSON or of another type."""
    try:
        value = parse_json(path.read_text("utf-8")) if path.is_file() else missing
        if type(value) is not type(missing):
            raise ValueError(f"a {type(missing).__name__} is needed")
        return value
    except ValueError as error:
        notes.append(f"skipped {path.name}: {error}")
        return missing


def pack_flags(record: dict[str, Any]) -> int:
    """The FLAGS of a completion as bits."""
    values = record.get("accuracy", {}) | record.get("format", {}) | {"truncated": record.get("truncated")}
    return sum(bool(values.get(name)) << bit for bit, name in enumerate(FLAGS))


def round_floats(value: Any, digits: int = 6) -> Any:
    """A value with all its floats in few significant digits; NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {key: round_floats(x, digits) for key, x in value.items()}
    if isinstance(value, list):
        return [round_floats(x, digits) for x in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def spread(sizes: dict[Any, int], limit: float) -> Iterable[Any]:
    """Keys whose sizes sum to at most about `limit`, evenly spread over all keys; all of them if they fit."""
    keys, total = list(sizes), sum(sizes.values())
    count = len(keys) if total <= limit else int(len(keys) * max(limit, 0) / total)
    return [keys[i * len(keys) // count] for i in range(count)]
