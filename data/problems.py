"""Problems with a gold answer: loading them from a file or the Hub, and splitting off held-out questions.

A record in GSM8K form is {"question": "Natalia sold ...", "answer": "She sold 48/2 = ...\\n#### 72"}. It becomes one
Problem: the question, the worked solution, and the number after `####`. The answer may also be just a number, a choice ("B"), a
word or a short phrase. `Reading` says where other people's files have them. Other columns are kept as they are.

Every bad record is an error that names its line, because dropping a problem silently would change the denominator of
every reported accuracy. Generated problems are in arithmetic.py, grading in grpo/reward.py.
"""

import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from data import DataError
from data.numbers import MAX_ANSWER_CHARS, gold_number, number_text

HUB_ID = "openai/gsm8k"
MAX_LINE_BYTES = 1_000_000  # GSM8K's longest record has 1,700: a longer line means another kind of file
FAULTS_NAMED = 5
MARKS = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations for a calculator: "48/2 = <<48/2=24>>24"
NUMERAL_LIKE = re.compile(r"[-+−$€£\s]*\d[\d.,_\s]*(?:[eE][-+]?\d+)?[%€£$\s]*")  # meant as a number, whatever it is
PLACEHOLDERS = {"x", "?", "n/a", "nan", "null", "todo", "tbd"}  # what files have where there is no answer
FORMATS = (".jsonl", ".json", ".parquet")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)((?::[\w.+-]+){0,2})")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can encode half a character ("\ud83d"), which no tokenizer accepts

Parsed = tuple[str, str, str, dict[str, Any]]  # question, answer, solution, columns
Parse = Callable[[Any], Parsed]  # of a record; ValueError with the reason


@dataclass(frozen=True)
class Reading:
    """Where records have their question and answer, and whether some may have no answer.

    `answer_pattern` is a regular expression that finds the gold in the answer: its first group, or all of it. Without one, the
    gold is what stands behind `####`, or the whole answer.
    """

    question_key: str = "question"
    answer_key: str = "answer"
    answer_pattern: str = ""
    optional: bool = False


DEFAULT = Reading()


@dataclass(frozen=True)
class Problem:
    """A question and its gold answer as text, a number without commas ("1234"); empty: it has none. The solution may be empty.

    Of a line with `prompt` and `completion` these are question and solution, and the answer is empty. `columns` are the others
    of the record, for rewards.
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


def load_problems(source: str, demonstrated: bool = False, reading: Reading = DEFAULT) -> list[Problem]:
    """The problems of a local `.jsonl`, `.json` or `.parquet` file, or of a hub dataset, `OWNER/NAME[:CONFIG][:SPLIT]`.

    Ids are "file name:line", with lines, or records, counted from 1. The split is `train` by default. Raises DataError for a
    source that cannot be read, and for bad records: the first five are named by line and reason. `demonstrated`: each must have
    something to imitate, a solution, or it is a line with `prompt` and `completion`.
    """
    parse = partial(_parse_demonstration if demonstrated else _parse_record, reading=reading)
    try:
        re.compile(reading.answer_pattern)
    except re.error as error:
        raise DataError(f"answer_pattern {reading.answer_pattern!r} is no regular expression: {error}") from None
    path = Path(source)
    hub = HUB_NAME.fullmatch(source)
    if path.suffix not in FORMATS and hub and not path.parent.is_dir():
        return _load_hub(hub[1], hub[2].split(":")[1:], parse)
    if path.suffix not in FORMATS:
        hint = f"; did you mean {HUB_ID}?" if "gsm8k" in source.lower() else ""
        raise DataError(
            f'data "{source}" must be a .jsonl file, a .json file, a .parquet file, or a dataset of the hub, '
            f"OWNER/NAME[:CONFIG][:SPLIT], such as {HUB_ID}:test{hint}"
        )
    if not path.is_file():
        raise DataError(f'data file "{source}" does not exist')
    return {".jsonl": _load_jsonl, ".json": _load_json, ".parquet": _load_parquet}[path.suffix](path, parse)


def split_problems(problems: list[Problem], held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held out): `held_out` problems drawn by `seed`, and the problems that share no question with them.

    Both keep the order of `problems`. Further copies of a held-out question are in neither part. Raises DataError unless
    there are more than `held_out` different questions.
    """
    first_by_question = {question_key(p): i for i, p in reversed(list(enumerate(problems)))}
    if not 0 <= held_out < len(first_by_question):
        raise DataError(
            f"cannot hold out {held_out} of {len(first_by_question)} different questions: "
            "eval_problems must be at least 0 and leave one to train on"
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


def _load_json(path: Path, parse: Parse) -> list[Problem]:
    """A list of records, also as the only list in an object. Some files of that name have a record a line."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            return _load_jsonl(path, parse)
        raise DataError(f'"{path}" is not JSON at line {error.lineno}, column {error.colno}: {error.msg}') from None
    except UnicodeDecodeError as error:
        raise DataError(f'"{path}" is not UTF-8 text at byte {error.start}') from None
    except RecursionError:
        raise DataError(f'"{path}" is nested too deep') from None
    except OSError as error:
        raise DataError(f'data file "{path}" cannot be read: {error.strerror}') from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        raise DataError(f'"{path}" must hold a list of records')
    return _collect(str(path), enumerate(content, start=1), parse)


def _load_parquet(path: Path, parse: Parse) -> list[Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        for i, column in enumerate(table.schema):
            # A narrow float is meant as its shortest text: 0.1, which is stored as 0.10000000149.
            if column.type in (pyarrow.float16(), pyarrow.float32()):
                narrow = column.type.to_pandas_dtype()
                shortest = [None if value is None else float(str(narrow(value))) for value in table.column(i).to_pylist()]
                table = table.set_column(i, column.name, pyarrow.array(shortest, pyarrow.float64()))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f'"{path}" is not a readable parquet file: {_first_line(error)}') from error
    return _collect(str(path), enumerate(rows, start=1), parse)


def _load_hub(name: str, parts: list[str], parse: Parse) -> list[Problem]:
    """`parts`: a split, or a configuration and a split."""
    split, configs = parts[-1] if parts else "train", parts[:-1] or (["main"] if name == HUB_ID else [])
    if name == HUB_ID and split not in ("train", "test"):
        raise DataError(f'{HUB_ID} has no split "{split}": must be train or test')
    try:
        from datasets import load_dataset

        with cache_only_when_offline():
            rows = load_dataset(name, *configs, split=split)
    except Exception as error:  # many types: network, cache, proxy, disk, the Hub itself
        raise DataError(
            f"cannot get {name} from the hub ({_first_line(error)}): "
            "check the network, or give a local .jsonl or .parquet file with --data"
        ) from error
    return _collect(":".join([name, *parts[:-1], split]), enumerate(rows, start=1), parse)


SWITCH = "HF_HUB_OFFLINE"


@contextmanager
def cache_only_when_offline() -> Iterator[None]:
    """Without a network, the hub's packages look at their cache only: they would try for half a minute, and warn each time."""
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    modules = [sys.modules[name] for name in ("huggingface_hub.constants", "datasets.config") if name in sys.modules]
    former, offline = [getattr(module, SWITCH) for module in modules], False
    try:
        if not getproxies():
            socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=5.0).close()
    except OSError:
        offline = True
    try:
        for module, value in zip(modules, former, strict=True):
            setattr(module, SWITCH, value or offline)
        yield
    finally:
        for module, value in zip(modules, former, strict=True):
            setattr(module, SWITCH, value)


def _collect(name: str, rows: Iterable[tuple[int, Any]], parse: Parse) -> list[Problem]:
    problems, faults = [], []
    for number, row in rows:
        try:
            parsed = parse(row)
        except ValueError as error:
            faults.append(f"{name}:{number}: {error}")
        else:
            problems.append(Problem(f"{Path(name).name}:{number}", *parsed))
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


def _parse_record(record: object, reading: Reading) -> Parsed:
    """What a Problem has of a record. Raises ValueError with the reason."""
    question = _text(record, reading.question_key, "question_key").strip()
    if not question:
        raise ValueError(f"{reading.question_key} is empty")
    assert isinstance(record, dict)
    columns = _columns(record)
    key = reading.answer_key
    if reading.optional and (record.get(key) in (None, "") and (key in record or key == Reading.answer_key)):
        return question, "", "", columns
    answer = _text(record, key, "answer_key").strip()
    if reading.answer_pattern:
        found = list(re.finditer(reading.answer_pattern, answer))
        golds = {match[1 if match.re.groups else 0] or "" for match in found}
        if len(golds) != 1:
            what = f"{len(golds)} different texts" if golds else "nothing"
            raise ValueError(f"answer_pattern {reading.answer_pattern!r} finds {what} in {key} {answer[:40]!r}")
        return question, _gold(golds.pop(), key), answer[: found[0].start()].strip(), columns
    if answer.count("####") > 1:
        raise ValueError(f'answer has {answer.count("####")} "####", must have one')
    solution, _, gold = answer.rpartition("####")
    return question, _gold(gold, key), solution.strip(), columns


def _gold(text: str, key: str) -> str:
    """A gold answer as it is compared: a number without commas, or a short text."""
    gold = text.strip()
    number = gold_number(gold)
    if number is not None:
        return format(number, "f")
    if NUMERAL_LIKE.fullmatch(gold):
        raise ValueError(f"{key} {gold[:40]!r} is not a number")
    if not any(map(str.isalnum, gold)) or gold.casefold() in PLACEHOLDERS:
        raise ValueError(f"{key} {gold[:40]!r} is not an answer; a number, a choice, a word or a short phrase is needed")
    if "\n" in gold or len(gold) > MAX_ANSWER_CHARS:  # a reward reads no longer one
        raise ValueError(
            f'{key} {gold[:40]!r}... is no short text of one line, and has no "#### " before a final answer: '
            "--answer_pattern REGEX says where one is"
        )
    return gold


def _columns(record: dict[Any, Any]) -> dict[str, Any]:
    """All columns but question and answer, as JSON has them: what it has not, such as a date, as text."""
    columns = {str(key): value for key, value in record.items() if key not in (Reading.question_key, Reading.answer_key)}
    content = json.dumps(columns, ensure_ascii=False, default=str) if columns else "{}"
    if SURROGATE.search(content):
        raise ValueError("a column has half a character: all text must be UTF-8")
    return json.loads(content)


def _parse_demonstration(record: object, reading: Reading) -> Parsed:
    """(prompt, "", completion, columns), or what `_parse_record` gives. Raises ValueError with the reason."""
    if not isinstance(record, dict) or not {"prompt", "completion"} & set(record):
        parsed = _parse_record(record, reading)
        if not parsed[2]:
            raise ValueError("answer is all there is: there is no solution to imitate")
        return parsed
    prompt, completion = _text(record, "prompt").strip(), _text(record, "completion")
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not text.strip():
            raise ValueError(f"{name} is empty")
    return prompt, "", completion, {}


def _text(record: object, key: str, setting: str = "") -> str:
    if not isinstance(record, dict) or key not in record:
        there = f"; there are {', '.join(map(str, record))[:200]}" if isinstance(record, dict) and record else ""
        raise ValueError(f'no key "{key}"{there}' + (f"; give --{setting}" if there and setting else ""))
    value = record[key]
    if setting == "answer_key" and type(value) in (int, float, Decimal):
        if not math.isfinite(value):
            raise ValueError(f"{key} {value} is not a number")
        if gold_number(number_text(value)) is None:
            raise ValueError(f"{key} {str(value)[:40]} is not a number of at most 15 digits before and behind the point")
        return number_text(value)
    if not isinstance(value, str) or SURROGATE.search(value):
        raise ValueError(f"{key} must be UTF-8 text, not {str(value)[:40]!r}")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
