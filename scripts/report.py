"""Make the report of a run from its files: a page, two plots and all analyses.

    python scripts/report.py RUN_DIR [ANOTHER_RUN_DIR ...] [--evaluation EVAL]

RUN_DIR/report.html is one file that a browser opens without a server or a network. It shows the curves of all the runs. For the
first run it also shows the sessions, the groups of completions with the arithmetic of their advantages and losses, and the
evaluation. The gain of the vote is shown for all evaluations of all runs: RUN_DIR/consensus, and RUN_DIR/consensus-STEP of a
checkpoint. The plots are RUN_DIR/training.png and, with an evaluation, evaluation.png. RUN_DIR/analyses.json has all analyses
of grpo/reports/analysis.py with their n and intervals. The last line of standard output is one line of JSON.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import check_fields, flag
from grpo.errors import ConfigError, RunError
from grpo.reports.jsonl import rewrite
from grpo.reports.page import find_evaluations, read_analyses, read_page, render
from grpo.reports.plots import draw_evaluation, draw_or_warn, draw_training
from grpo.runs.flags import parse
from grpo.runs.outcome import run_main


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report."""

    evaluation: str = flag(
        "", "directory that evaluate_consensus.py wrote; default: RUN_DIR/consensus, else the latest consensus-STEP"
    )
    megabytes: float = flag(
        64.0, "most megabytes of completions in the page, and of tokens, and of evaluation texts, before compression", least=0
    )

    def __post_init__(self):
        check_fields(self)


def draw_plots(folder: Path, evaluation: Path | None) -> list[str]:
    """Draw the plots of a run and of its evaluation, as far as these have got, and return their paths."""
    plots = []
    if (folder / "sessions.json").is_file() and draw_or_warn(draw_training, folder, folder / "training.png"):
        plots.append(str(folder / "training.png"))
    evaluated = evaluation if evaluation and (evaluation / "result.json").is_file() else None
    if evaluated and draw_or_warn(draw_evaluation, evaluated, folder / "evaluation.png"):
        plots.append(str(folder / "evaluation.png"))
    return plots


def write_text(path: Path, text: str) -> None:
    try:
        rewrite(path, text)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def main(argv: list[str]) -> dict[str, Any]:
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders = [Path(word) for word in argv[:first_flag]]
    config = parse(ReportConfig, argv[first_flag:], __doc__ or "")
    if not folders:
        raise ConfigError("give the directory of a run: report.py RUN_DIR [ANOTHER_RUN_DIR ...] [--evaluation EVAL]")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # questions come from the hub's cache or not at all
    evaluation = Path(config.evaluation) if config.evaluation else next(iter(find_evaluations(folders[0])), None)
    if evaluation and not evaluation.is_dir():
        raise ConfigError(f"evaluation {config.evaluation!r} is not a directory")
    page = read_page(folders, evaluation, config.megabytes)
    report, analyses = folders[0] / "report.html", folders[0] / "analyses.json"
    write_text(report, render(page))
    write_text(analyses, json.dumps(read_analyses(folders[0], page, evaluation), indent=1) + "\n")
    for note in page["notes"]:
        print(note)
    size = report.stat().st_size
    print(f"{report}  {size / 1e6:.1f} MB: open it in a browser")
    completions = len(page["completions"]["text"])
    return {
        "report": str(report),
        "analyses": str(analyses),
        "pictures": draw_plots(folders[0], evaluation),
        "runs": len(folders),
        "steps": len(page["runs"][0]["step"]),
        "completions": completions,
        "completions_left_out": page["completions"]["total"] - completions,
        "groups_with_tokens": len(page["tokens"]),
        "bytes": size,
    }


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
