"""The files of a run: one JSON object a line, written while the run goes on; others, which are replaced as a whole.

A kill may tear the last line, and a run in progress may be writing it. Such a line has no newline and is no JSON object; it is
left out without a word. Any other malformed line is skipped and reported.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMED = 5  # line numbers in a note
DEEPEST = 40  # lists and objects inside each other, in a file that is read
NUMBER, TEXT = (int, float, type(None)), (str, type(None))
TYPES: dict[str, Any] = {  # of values that records may have, whatever their file; a bool is no number
    "step": int, "session": int, "alarms": list, "problem": str, "text": str, "length": int, "reward": NUMBER,
    "advantage": NUMBER, "components": dict, "format": dict, "accuracy": dict, "retention": dict,
    "completions": list, "model": str, "sample": int, "temperature": NUMBER, "seconds": NUMBER, "id": str, "question": TEXT,
    "answer": TEXT, "flexible_answer": TEXT, "gold": TEXT, "solution": TEXT,
}  # fmt: skip
JUDGED = {"accuracy": "tagged", "format": "violation"}  # objects of a text that have flags: this one, if they are not empty
SAMPLE_KEYS = ("model", "problem", "sample", "text", "answer", "length", "accuracy")


def read_records(path: Path, notes: list[str], *keys: str, step: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSONL file in order; none if the file does not exist.

    A line is malformed if it is not a JSON object, lacks one of `keys`, has a value of another type than `TYPES` says, or, with
    `step`, has no step. Such lines are skipped; at the end of the file one note counts them and gives the numbers of the first
    five, from 1. With `step`, the records of later steps are left out as well.
    """
    if not path.is_file():
        return
    types = TYPES | {"accuracy": NUMBER} if path.name == "metrics.jsonl" else TYPES
    keys = (*keys, "step") if step is not None else keys
    malformed: list[int] = []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:  # only "\n": a completion may contain U+2028
        for number, line in enumerate(file, start=1):
            record = parse_record(line)
            if record is None or not all(key in record for key in keys) or not has_types(record, types):
                if line.endswith("\n"):
                    malformed.append(number)
            elif step is None or record["step"] <= step:
                yield record
    if malformed:
        notes.append(describe_skipped(path.name, malformed))


def parse_record(line: str) -> dict[str, Any] | None:
    """The JSON object in a line; None if there is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def parse_json(text: str) -> Any:
    """The value of a JSON text. ValueError if it is none, or is nested so deep that it can only be meant to do harm."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if text.count("[") + text.count("{") > DEEPEST and not is_shallow(value, DEEPEST):
        raise ValueError("it is nested too deep")
    return value


def is_shallow(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return levels > 0 and all(is_shallow(x, levels - 1) for x in inside if isinstance(x, (dict, list)))


def has_types(record: dict[str, Any], types: dict[str, Any]) -> bool:
    """Whether each value has the type that `types` has for its key, no whole number is absurd, and `JUDGED` have flags."""
    for value, kind in [(value, types[key]) for key, value in record.items() if key in types]:
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**53):
            return False
    flags = [(record[name], needed) for name, needed in JUDGED.items() if "text" in record and record.get(name)]
    return all(needed in found and all(isinstance(flag, bool) for flag in found.values()) for found, needed in flags)


def rewrite(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: at any time there is either the old file or the new one. A link is replaced, not followed."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:  # EXCL: nor is a link at `part`
        file.write(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def describe_skipped(name: str, numbers: list[int]) -> str:
    """`skipped 2 malformed lines of metrics.jsonl (3, 8)`"""
    lines = "1 malformed line" if len(numbers) == 1 else f"{len(numbers)} malformed lines"
    named = ", ".join(map(str, numbers[:NAMED])) + (", ..." if len(numbers) > NAMED else "")
    return f"skipped {lines} of {name} ({named})"


def has_only(path: Path, count: int) -> bool:
    """Whether a file consists of exactly `count` lines, the last one with its newline: nothing was skipped, nothing is torn."""
    with path.open("rb") as file:
        whole = [line.endswith(b"\n") for line in file]
    return len(whole) == count and all(whole)
