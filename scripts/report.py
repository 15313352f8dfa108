"""A page and two pictures of a run, from the files that it left behind.

    python scripts/report.py RUN_DIR [ANOTHER_RUN_DIR ...] [--evaluation EVAL]

Writes RUN_DIR/report.html, one file that a browser opens without a server and without a network: curves of all runs, and the
first run's sessions, its groups of completions with the arithmetic of their advantages and losses, and its evaluation. What
the vote adds is shown for every evaluation of every run: RUN_DIR/consensus and, of checkpoints, RUN_DIR/consensus-STEP. The
pictures are RUN_DIR/training.png and, of an evaluation, evaluation.png; RUN_DIR/analyses.json has every analysis of
grpo/reports/analysis.py with its n and intervals. The last line of standard output is one line of JSON.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import flag
from grpo.errors import ConfigError, RunError
from grpo.reports.page import find_evaluations, read_analyses, read_page, render
from grpo.reports.plots import attempt, draw_evaluation, draw_training
from grpo.runs.cli import run_script
from grpo.runs.flags import parse


@dataclass(frozen=True)
class ReportConfig:
    evaluation: str = flag(
        "", "directory that evaluate_consensus.py wrote; default: RUN_DIR/consensus, else the latest consensus-STEP"
    )
    megabytes: float = flag(64.0, "completions, tokens and evaluation texts in the page, each at most, before compression")

    def __post_init__(self):
        if not 0 <= self.megabytes < float("inf"):
            raise ConfigError(f"megabytes {self.megabytes} must be at least 0, and finite")


def draw(folder: Path, evaluation: Path | None) -> list[str]:
    """The pictures of a run and of its evaluation, if they have come that far."""
    pictures = []
    if (folder / "sessions.json").is_file() and attempt(draw_training, folder, folder / "training.png"):
        pictures.append(str(folder / "training.png"))
    evaluated = evaluation if evaluation and (evaluation / "result.json").is_file() else None
    if evaluated and attempt(draw_evaluation, evaluated, folder / "evaluation.png"):
        pictures.append(str(folder / "evaluation.png"))
    return pictures


def main(argv: list[str]) -> dict[str, Any]:
    folders = [Path(word) for word in argv[: next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))]]
    config = parse(ReportConfig, argv[len(folders) :], __doc__ or "")
    if not folders:
        raise ConfigError("give the directory of a run: report.py RUN_DIR [ANOTHER_RUN_DIR ...] [--evaluation EVAL]")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the questions of a run come from the hub's cache, or not at all
    evaluation = Path(config.evaluation) if config.evaluation else next(iter(find_evaluations(folders[0])), None)
    if evaluation and not evaluation.is_dir():
        raise ConfigError(f"evaluation {config.evaluation!r} is no directory")
    page = read_page(folders, evaluation, config.megabytes)
    report, text = folders[0] / "report.html", render(page)
    analyses = folders[0] / "analyses.json"
    for path, content in (report, text), (analyses, json.dumps(read_analyses(folders[0], page, evaluation), indent=1) + "\n"):
        try:
            path.write_text(content, "utf-8")
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}") from None
    run = page["runs"][0]
    for note in page["notes"]:
        print(note)
    print(f"{report}  {len(text) / 1e6:.1f} MB: open it in a browser")
    return {
        "report": str(report),
        "analyses": str(analyses),
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
