"""A page and two pictures of a run, from the files that it left behind.

    python scripts/report.py RUN_DIR [ANOTHER_RUN_DIR ...] [--evaluation EVAL]

Writes RUN_DIR/report.html, one file that a browser opens without a server and without a network: curves of all runs, and the
first run's sessions, its groups of completions with the arithmetic of their advantages and losses, and its evaluation. The
pictures are RUN_DIR/training.png and, of an evaluation, evaluation.png. The last line of standard output is one line of JSON.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.cli import run_script
from grpo.config import ConfigError, RunError, flag, parse
from grpo.page import read_page, render
from grpo.pictures import draw_evaluation, draw_training


@dataclass(frozen=True)
class ReportConfig:
    evaluation: str = flag("", "directory that evaluate_consensus.py wrote; default: RUN_DIR/consensus, if there is one")
    megabytes: float = flag(64.0, "completions, tokens and evaluation texts in the page, each at most, before compression")

    def __post_init__(self):
        if not 0 <= self.megabytes < float("inf"):
            raise ConfigError(f"megabytes {self.megabytes} must be at least 0, and finite")


def draw(folder: Path, evaluation: Path | None) -> list[str]:
    """The pictures of a run and of its evaluation, if they have come that far. A fault of drawing is none of the page."""
    pictures = []
    for name, source, needed, picture in (
        ("training.png", folder, "sessions.json", draw_training),
        ("evaluation.png", evaluation, "result.json", draw_evaluation),
    ):
        if source and (source / needed).is_file():
            try:
                picture(source, folder / name)
                pictures.append(str(folder / name))
            except Exception as error:
                print(f"warning: {folder / name} could not be drawn: {' '.join(str(error).split())}", file=sys.stderr)
    return pictures


def main(argv: list[str]) -> dict[str, Any]:
    folders = [Path(word) for word in argv[: next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))]]
    config = parse(ReportConfig, argv[len(folders) :], __doc__ or "")
    if not folders:
        raise ConfigError("give the directory of a run: report.py RUN_DIR [ANOTHER_RUN_DIR ...] [--evaluation EVAL]")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the questions of a run come from the hub's cache, or not at all
    evaluation = Path(config.evaluation) if config.evaluation else folders[0] / "consensus"
    if not evaluation.is_dir():
        if config.evaluation:
            raise ConfigError(f"evaluation {config.evaluation!r} is no directory")
        evaluation = None
    page = read_page(folders, evaluation, config.megabytes)
    report = folders[0] / "report.html"
    text = render(page)
    try:
        report.write_text(text, "utf-8")
    except OSError as error:
        raise RunError(f"{report} cannot be written: {error.strerror}") from None
    run = page["runs"][0]
    for note in page["notes"]:
        print(note)
    print(f"{report}  {len(text) / 1e6:.1f} MB: open it in a browser")
    return {
        "report": str(report),
        "pictures": draw(folders[0], evaluation),
        "runs": len(folders),
        "steps": len(run["step"]),
        "completions": len(page["completions"]["text"]),
        "completions_left_out": page["completions"]["total"] - len(page["completions"]["text"]),
        "groups_with_tokens": len(page["tokens"]),
        "bytes": report.stat().st_size,
    }


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
