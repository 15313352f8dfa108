"""Word problems with a gold answer: loading them from a file or the Hub, and splitting off held-out questions.

A record in GSM8K form is {"question": "Natalia sold ...", "answer": "She sold 48/2 = ...\\n#### 72"}. It becomes one
Problem: the question, the worked solution, and the number after `####`. The answer may also be just a number.

Every bad record is an error that names its line, because dropping a problem silently would change the denominator of
every reported accuracy. Generated problems are in arithmetic.py, grading in grpo/reward.py.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import DataError

HUB_ID = "openai/gsm8k"
MAX_LINE_BYTES = 1_000_000  # GSM8K's longest record has 1,700: a longer line means another kind of file
FAULTS_NAMED = 5
# Bounded and ASCII only: "1,234" and "-3.5", but not "1_000", "1e9", "1,23" or digits of other alphabets.
NUMBER = re.compile(r"-?([0-9]{1,15}|[0-9]{1,3}(,[0-9]{3}){1,4})(\.[0-9]{1,15})?")
MARKS = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations for a calculator: "48/2 = <<48/2=24>>24"
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can encode half a character ("\ud83d"), which no tokenizer accepts

Parse = Callable[[Any], tuple[str, str, str]]  # record -> question, answer, solution; ValueError with the reason


@dataclass(frozen=True)
class Problem:
    """A question and its gold number as text, without commas ("1234"). The solution may be empty.

    Of a line with `prompt` and `completion` these are question and solution, and the answer is empty.
    """

    id: str
    question: str
    answer: str
    solution: str = ""
    columns: dict[str, Any] = field(default_factory=dict, hash=False)


def completion_of(problem: Problem) -> str:
    """The completion that a problem demonstrates: a given one as it is, or solution and answer in the recipe's tags.

    GSM8K's annotations for a calculator (`<<48/2=24>>`) are left out.
    """
    if not problem.answer:
        return problem.solution
    return f"<reasoning>{MARKS.sub('', problem.solution)}</reasoning><answer>{problem.answer}</answer>"


def load_problems(source: str, demonstrated: bool = False) -> list[Problem]:
    """The problems of a local `.jsonl` or `.parquet` file, or of `openai/gsm8k` (`:train` by default, or `:test`).

    Ids are "file name:line", with lines counted from 1. Raises DataError for a source that cannot be read, and for bad
    records: the first five are named by line and reason. `demonstrated`: each must have something to imitate, a solution, or it
    is a line with `prompt` and `completion`.
    """
    parse = _parse_demonstration if demonstrated else _parse_record
    if source == HUB_ID or source.startswith(HUB_ID + ":"):
        return _load_hub(source, parse)
    path = Path(source)
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f'data "{source}" must be a .jsonl file, a .parquet file or {HUB_ID}[:train|:test]')
    if not path.is_file():
        raise DataError(f'data file "{source}" does not exist')
    return _load_jsonl(path, parse) if path.suffix == ".jsonl" else _load_parquet(path, parse)


def split_problems(problems: list[Problem], held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held out): `held_out` problems drawn by `seed`, and the problems that share no question with them.

    Both keep the order of `problems`. Further copies of a held-out question are in neither part. Raises DataError unless
    there are more than `held_out` different questions.
    """
    first_by_question = {question_key(p): i for i, p in reversed(list(enumerate(problems)))}
    if not 0 <= held_out < len(first_by_question):
        raise DataError(
            f"cannot hold out {held_out} of {len(first_by_question)} different questions: "
            "must be at least 0 and leave one to train on"
        )
    import numpy as np  # here, because a process of reward functions needs the rest of this file only

    candidates = sorted(first_by_question.values())
    chosen = {candidates[i] for i in np.random.default_rng(seed).permutation(len(candidates))[:held_out]}
    held_questions = {question_key(problems[i]) for i in chosen}
    train = [p for p in problems if question_key(p) not in held_questions]
    return train, [p for i, p in enumerate(problems) if i in chosen]


def question_key(problem: Problem) -> str:
    """The question with its whitespace normalized; problems with equal keys count as the same question."""
    return " ".join(problem.question.split())


def _load_jsonl(path: Path, parse: Parse) -> list[Problem]:
    # Read as bytes and split at \n only: text mode would fail at the first bad byte without a line number.
    try:
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            return _collect(str(path), lines, lambda line: parse(_parse_line(line)))
    except OSError as error:
        raise DataError(f'data file "{path}" cannot be read: {error.strerror}') from error


def _load_parquet(path: Path, parse: Parse) -> list[Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f'"{path}" is not a readable parquet file: {_first_line(error)}') from error
    return _collect(str(path), enumerate(rows, start=1), parse)


def _load_hub(source: str, parse: Parse) -> list[Problem]:
    split = source.removeprefix(HUB_ID).removeprefix(":") or "train"
    if split not in ("train", "test"):
        raise DataError(f'{HUB_ID} has no split "{split}": must be train or test')
    try:
        from datasets import load_dataset

        rows = load_dataset(HUB_ID, "main", split=split)
    except Exception as error:  # many types: network, cache, proxy, disk, the Hub itself
        raise DataError(
            f"cannot get {HUB_ID} from the hub ({_first_line(error)}): "
            "check the network, or give a local .jsonl or .parquet file with --data"
        ) from error
    return _collect(f"{HUB_ID}:{split}", enumerate(rows, start=1), parse)


def _collect(name: str, rows: Iterable[tuple[int, Any]], parse: Parse) -> list[Problem]:
    problems, faults = [], []
    for number, row in rows:
        try:
            question, answer, solution = parse(row)
        except ValueError as error:
            faults.append(f"{name}:{number}: {error}")
        else:
            problems.append(Problem(f"{Path(name).name}:{number}", question, answer, solution))
    if faults:
        more = len(faults) - FAULTS_NAMED
        raise DataError("; ".join(faults[:FAULTS_NAMED]) + (f"; and {more} more bad records" if more > 0 else ""))
    if not problems:
        raise DataError(f'data "{name}" holds no problems')
    return problems


def _parse_line(line: bytes) -> object:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"line of {len(line)} bytes: at most {MAX_LINE_BYTES} are read")
    try:
        text = line.decode("utf-8-sig")  # -sig: editors on Windows start files with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {error.start}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("JSON is nested too deep") from error


def _parse_record(record: object) -> tuple[str, str, str]:
    """(question, gold number without commas, worked solution) of a GSM8K record. Raises ValueError with the reason."""
    question, answer = _text(record, "question").strip(), _text(record, "answer").strip()
    if not question:
        raise ValueError("question is empty")
    if "####" not in answer and not NUMBER.fullmatch(answer):
        raise ValueError('answer has no "#### number"')
    if answer.count("####") > 1:
        raise ValueError(f'answer has {answer.count("####")} "####", must have one')
    solution, _, gold = answer.rpartition("####")
    gold = gold.strip()
    if not NUMBER.fullmatch(gold):
        raise ValueError(f"answer {gold[:40]!r} is not a number")
    return question, gold.replace(",", ""), solution.strip()


def _parse_demonstration(record: object) -> tuple[str, str, str]:
    """(prompt, "", completion), or what `_parse_record` gives. Raises ValueError with the reason."""
    if not isinstance(record, dict) or not {"prompt", "completion"} & set(record):
        parsed = _parse_record(record)
        if not parsed[2]:
            raise ValueError("answer is only a number: there is no solution to imitate")
        return parsed
    prompt, completion = _text(record, "prompt").strip(), _text(record, "completion")
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not text.strip():
            raise ValueError(f"{name} is empty")
    return prompt, "", completion


def _text(record: object, key: str) -> str:
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f'no key "{key}"')
    value = record[key]
    if key == "answer" and type(value) in (int, float):
        return str(value)
    if not isinstance(value, str) or SURROGATE.search(value):
        raise ValueError(f"{key} must be UTF-8 text, not {str(value)[:40]!r}")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
