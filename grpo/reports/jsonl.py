"""The records of a run as others read them: files of one JSON object a line, which may be torn, or still be written.

Left out: writing them, and going on with them (metrics.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path, notes: list[str], *keys: str) -> Iterator[dict[str, Any]]:
    """The records of a file of one JSON object a line; none without a file. What is none, or lacks one of `keys`, is noted."""
    broken = 0
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:  # a completion may hold U+2028
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if isinstance(record, dict) and all(key in record for key in keys):
                    yield record
                else:
                    broken += line.endswith("\n")  # a run that goes on may be writing its last line
    if broken:
        notes.append(f"{broken} lines of {path.name} are no records, and are left out")
