"""The page of a run: its files -> one JSON object -> one HTML file that needs nothing else.

    read_page([run, another], evaluation, megabytes)      what the page shows, and notes on what it leaves out
    render(page)                                          page.html with the object inside, compressed, and a policy of its own

A run may be unfinished or lack any of its files; what is no record is counted, and said on the page. Records are turned into
columns, which compress well. Left out: how it looks and what it does (page.html), pictures (pictures.py).
"""

import base64
import gzip
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from data import DataError
from data.datasets import choose_problems
from data.problems import Problem
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.reports import analysis
from grpo.reports.consensus import majority_vote, plain
from grpo.reports.jsonl import records

TEMPLATE = Path(__file__).with_name("page.html")
# Bit b of a completion's `flags`; the page's script has the same list.
FLAGS = ("tagged", "strict", "flexible", "reasoning_tags", "answer_tags", "violation", "truncated")
GROUP_KEYS = ("step", "problem", "question", "beta", "epsilon_low", "epsilon_high", "tis_cap")
TOKEN_COLUMNS = ("ids", "logprobs", "sampler_logprobs", "old_logprobs", "ref_logprobs", "ratio", "kl", "clipped", "weight")


def read_page(run_dirs: list[Path], evaluation: Path | None, megabytes: float) -> dict[str, Any]:
    """Everything that the page shows. Completions, tokens and an evaluation's texts take about `megabytes` each at most."""
    for folder in run_dirs:
        if not (folder / "config.json").is_file() and not (folder / "metrics.jsonl").is_file():
            raise ConfigError(f"run_dir {str(folder)!r} holds no run: neither config.json nor metrics.jsonl is there")
    notes: list[str] = []
    limit = megabytes * 1e6
    runs = [read_run(folder, notes) for folder in run_dirs]
    tokens = read_tokens(run_dirs[0] / "tokens.jsonl", limit, notes)
    completions = read_completions(run_dirs[0], runs[0]["config"], {group["step"] for group in tokens}, limit, notes)
    found = read_evaluation(evaluation, limit, notes) if evaluation else None
    gains = rounded(analysis.gain_by_model(read_results(run_dirs, evaluation)))
    return {
        "runs": runs, "completions": completions, "tokens": tokens, "evaluation": found, "gain_by_model": gains, "notes": notes,
    }  # fmt: skip


def read_results(run_dirs: list[Path], evaluation: Path | None) -> dict[str, dict[str, Any]]:
    """Figures of all models that were evaluated, by run, step and name: `RUN, trained`, `RUN, step 60, trained`. A run's base
    is in each of its evaluations, and told once. `evaluation` is the first run's too, wherever it lies.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in run_dirs:
        folders = [evaluation] if evaluation and run == run_dirs[0] else []
        for folder in dict.fromkeys(path.resolve() for path in [*folders, *find_evaluations(run)]):
            step = folder.name.removeprefix("consensus-")
            for name, figures in read_object(folder / "result.json", {}, []).get("models", {}).items():
                words = [run.resolve().name, *([f"step {step}"] if step.isdecimal() and name != "base" else []), name]
                if figures:
                    found.setdefault(", ".join(words), figures)
    return found


def find_evaluations(run: Path) -> list[Path]:
    """RUN/consensus and every RUN/consensus-STEP that are there, the latest step first."""
    steps = [path for path in run.glob("consensus-*") if path.name.removeprefix("consensus-").isdecimal()]
    steps.sort(key=lambda path: int(path.name.removeprefix("consensus-")), reverse=True)
    return [path for path in (run / "consensus", *steps) if path.is_dir()]


def read_analyses(run_dir: Path, page: dict[str, Any], evaluation: Path | None) -> dict[str, Any]:
    """Every analysis of the first run and of its evaluation, with n and interval, as `grpo.reports.analysis` documents them."""
    lines = [list(records(run_dir / f"{name}.jsonl", [], "step")) for name in ("metrics", "evaluations", "completions")]
    found: dict[str, Any] = {"run": rounded(analysis.of_run(*lines)), "gain_by_model": page["gain_by_model"]}
    if evaluation:
        samples, problems = (list(records(evaluation / f"{name}.jsonl", [])) for name in ("samples", "problems"))
        found |= {"evaluation": page["evaluation"]["charts"], "hard_cases": analysis.hard_cases(samples, problems)}
    return found


def render(page: dict[str, Any]) -> str:
    """The page. Its policy allows the script and the style that are in it, by their digests, and no connection anywhere."""
    text = TEMPLATE.read_text("utf-8")
    data = json.dumps(page, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(data.encode(), 6, mtime=0)).decode()
    script, style = (digest(re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]) for tag in ("script", "style"))  # type: ignore[index]
    policy = f"default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; form-action 'none'"
    return text.replace("{{policy}}", policy).replace("{{data}}", packed)


def digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


# ---------------------------------------------------------------------------------------------------------------- a run


def read_run(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Settings, metrics as columns, alarms, evaluations, sessions and result of a run."""
    steps = list(records(folder / "metrics.jsonl", notes, "step"))
    names = dict.fromkeys(name for step in steps for name, value in step.items() if isinstance(value, (int, float)))
    sessions = read_object(folder / "sessions.json", [], notes)
    return {
        "name": folder.resolve().name,
        "config": read_object(folder / "config.json", {}, notes),
        "step": [step["step"] for step in steps],
        "metrics": {name: [rounded(step.get(name)) for step in steps] for name in names if name != "step"},
        "alarms": [[step["step"], name] for step in steps for name in step.get("alarms") or []],
        "evaluations": rounded(list(records(folder / "evaluations.jsonl", notes, "step"))),
        "sessions": [{key: len(x) if isinstance(x, list) else x for key, x in session.items()} for session in sessions],
        "result": rounded(read_object(folder / "result.json", {}, notes)),
    }


def read_completions(folder: Path, config: dict[str, Any], wanted: set[int], limit: float, notes: list[str]) -> dict[str, Any]:
    """Completions as columns, in groups. Of more than `limit` bytes, whole steps are left out; those `wanted` come first."""
    sizes: Counter[int] = Counter()
    counts: Counter[int] = Counter()
    path = folder / "completions.jsonl"
    keys = "step", "problem", "text"
    for record in records(path, notes, *keys):
        sizes[record["step"]] += len(record["text"]) + 100
        counts[record["step"]] += 1
    first = {step: size for step, size in sizes.items() if step in wanted}
    others = {step: size for step, size in sizes.items() if step not in wanted}
    kept = {*spread(first, limit), *spread(others, limit - sum(first.values()))}
    if len(kept) < len(sizes):
        left = sum(counts[step] for step in sizes if step not in kept)
        notes.append(
            f"{left:,} of {counts.total():,} completions are not in this page: those of {len(sizes) - len(kept):,} of "
            f"{len(sizes):,} steps, evenly spread (--megabytes raises the limit)"
        )

    groups: dict[str, list] = {"step": [], "problem": [], "size": []}
    problems: dict[str, dict[str, Any]] = {}
    columns: dict[str, list] = {name: [] for name in ("text", "reward", "advantage", "length", "flags")}
    components: dict[str, list] = {}
    before, group_size = None, config.get("group_size")
    for record in records(path, [], *keys):
        if record["step"] not in kept:
            continue
        if (record["step"], record["problem"]) != before or groups["size"][-1] == group_size:
            before = record["step"], record["problem"]
            problem = problems.setdefault(record["problem"], {"place": len(problems), "answer": record.get("answer")})
            for name, value in {"step": record["step"], "problem": problem["place"], "size": 0}.items():
                groups[name].append(value)
        groups["size"][-1] += 1
        row = len(columns["text"])
        columns["text"].append(record["text"])
        columns["reward"].append(rounded(record.get("reward")))
        columns["advantage"].append(rounded(record.get("advantage"), 8))
        columns["length"].append(record.get("length"))
        columns["flags"].append(flags(record))
        for name, value in record.get("components", {}).items():
            column = components.setdefault(name, [])
            column += [None] * (row - len(column)) + [rounded(value)]  # a reward that was added on the way
    for column in components.values():
        column += [None] * (len(columns["text"]) - len(column))

    answers = [problem["answer"] for problem in problems.values()]
    known = read_questions(config, notes) if problems else {}
    found = [known.get(id) for id in problems]
    questions = [p.question if p and p.answer == answer else None for p, answer in zip(found, answers, strict=True)]
    return columns | {
        "components": components,
        "groups": groups,
        "problems": {"id": list(problems), "answer": answers, "question": questions},
        "total": counts.total(),
    }


def read_questions(config: dict[str, Any], notes: list[str]) -> dict[str, Problem]:
    """The run's problems by id, where its data is still there. (Records hold ids, and a page is no reason to download.)"""
    names = {field.name for field in fields(Config)}
    try:
        problems, _ = choose_problems(Config(**{name: value for name, value in config.items() if name in names}))
    except (ConfigError, DataError, OSError) as error:
        notes.append(f"Questions are not shown, problems are known by their ids: {error}")
        return {}
    return {problem.id: problem for problem in problems}


def read_tokens(path: Path, limit: float, notes: list[str]) -> list[dict[str, Any]]:
    """The groups whose tokens were saved, as they are, a column of equal values as one value."""
    sizes = {
        number: len(json.dumps(group)) for number, group in enumerate(records(path, notes, "step", "problem", "completions"))
    }
    kept = set(spread(sizes, limit))
    if len(kept) < len(sizes):
        notes.append(f"Tokens of {len(sizes) - len(kept):,} of {len(sizes):,} groups are not in this page (--megabytes)")
    groups = []
    for number, group in enumerate(records(path, [], "step", "problem", "completions")):
        if number in kept:
            rows = [
                {"row": row["row"], "pieces": row["pieces"]}
                | {name: constant(rounded(row[name])) for name in TOKEN_COLUMNS if name in row}
                for row in group["completions"]
            ]
            groups.append({key: group.get(key) for key in GROUP_KEYS} | {"completions": rows})
    return groups


def constant(column: list) -> Any:
    """A column whose values are all one and the same as that value: ratios on-policy, weights."""
    return column[0] if column and all(value == column[0] for value in column) else column


# ---------------------------------------------------------------------------------------------------------- an evaluation


def read_evaluation(folder: Path, limit: float, notes: list[str]) -> dict[str, Any]:
    """Figures, and of each problem what every sample answered, the vote, and the texts: sample 0 is greedy, the others vote."""
    settings = read_object(folder / "config.json", {}, notes)
    problems = {problem["id"]: problem for problem in records(folder / "problems.jsonl", notes, "id", "question", "answer")}
    samples = list(records(folder / "samples.jsonl", notes, "model", "problem", "sample", "text", "answer"))
    if not problems or "temperatures" not in settings:
        raise ConfigError(f"evaluation {str(folder)!r} holds none: no config.json with temperatures, or no problems.jsonl")
    temperatures = settings["temperatures"]
    names = [name for name in ("base", "trained") if any(sample["model"] == name for sample in samples)]
    of_model = {name: [sample for sample in samples if sample["model"] == name] for name in names}
    missing = len(names) * len(problems) * (1 + len(temperatures)) - len(samples)
    if missing:
        notes.append(
            f"Evaluation: {missing:,} samples are missing. In the table and the list of votes they count as wrong; "
            "calibration, gain by difficulty and the hard cases of analyses.json leave out their problems; "
            "accuracy by length is of those that are there"
        )
    sizes: Counter[str] = Counter()
    for sample in samples:
        sizes[sample["problem"]] += len(sample["text"])
    kept = set(spread(sizes, limit))
    if len(kept) < len(sizes):
        notes.append(f"Evaluation: texts of {len(sizes) - len(kept):,} of {len(sizes):,} problems are not in this page")
    return {
        "settings": settings,
        "result": rounded(read_object(folder / "result.json", {}, notes)),
        "problems": {key: [problem.get(key) for problem in problems.values()] for key in ("id", "question", "solution")}
        | {"gold": [plain(problem["answer"]) for problem in problems.values()]},
        "models": {name: read_votes(of_model[name], list(problems), temperatures, kept) for name in names},
        "charts": {name: rounded(analysis.of_model(of_model[name], list(problems.values()))) for name in names},
    }


def read_votes(samples: list[dict[str, Any]], ids: list[str], temperatures: list[float], kept: set[str]) -> dict[str, Any]:
    """One model's answers [P, 1 + voters], the vote of each problem [P], and texts [P, 1 + voters] of those in `kept`."""
    at = {(sample["problem"], sample["sample"]): sample for sample in samples}
    rows = [[at.get((id, number)) for number in range(1 + len(temperatures))] for id in ids]
    answers = [[sample["answer"] if sample else None for sample in row] for row in rows]
    return {
        "answers": answers,
        "winner": [majority_vote(row[1:], temperatures) for row in answers],
        "texts": [[s["text"] if s else None for s in row] if id in kept else None for id, row in zip(ids, rows, strict=True)],
    }


# ---------------------------------------------------------------------------------------------------------------- files


def read_object(path: Path, missing: Any, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else missing
    except ValueError as error:
        notes.append(f"{path.name} is not JSON ({error}), and is left out")
        return missing


def flags(record: dict[str, Any]) -> int:
    held = record.get("accuracy", {}) | record.get("format", {}) | {"truncated": record.get("truncated")}
    return sum(bool(held.get(name)) << bit for bit, name in enumerate(FLAGS))


def rounded(value: Any, digits: int = 6) -> Any:
    """Floats, wherever they are, in few digits; those that JSON cannot spell become null."""
    if isinstance(value, dict):
        return {key: rounded(x, digits) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x, digits) for x in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def spread(sizes: dict[Any, int], limit: float) -> Iterable[Any]:
    """Keys spread evenly over all of them, whose sizes sum to about `limit` at most; all of them where they fit."""
    keys, total = list(sizes), sum(sizes.values())
    count = len(keys) if total <= limit else int(len(keys) * max(limit, 0) / total)
    return [keys[i * len(keys) // count] for i in range(count)]
