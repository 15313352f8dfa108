"""Reads the JSONL files of a run: one JSON object a line, written while the run goes on.

A kill may tear the last line, and a run in progress may be writing it. Such a line has no newline and is no JSON object; it is
left out without a word. Any other malformed line is skipped and reported.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMED = 5  # line numbers in a note


def read_records(path: Path, notes: list[str], *keys: str, step: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSONL file in order; none if the file does not exist.

    A line is malformed if it is not a JSON object, lacks one of `keys`, or, with `step`, has no whole number as its step. Such
    lines are skipped; at the end of the file one note counts them and gives the numbers of the first five, from 1. With `step`,
    the records of later steps are left out as well.
    """
    if not path.is_file():
        return
    malformed: list[int] = []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:  # only "\n": a completion may contain U+2028
        for number, line in enumerate(file, start=1):
            record = parse_record(line)
            if record is None or not all(key in record for key in keys) or not (step is None or has_step(record)):
                if line.endswith("\n"):
                    malformed.append(number)
            elif step is None or record["step"] <= step:
                yield record
    if malformed:
        notes.append(describe_skipped(path.name, malformed))


def parse_record(line: str) -> dict[str, Any] | None:
    """The JSON object in a line; None if there is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def has_step(record: dict[str, Any]) -> bool:
    return isinstance(record.get("step"), int)


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
