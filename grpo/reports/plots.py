"""Two dashboards as PNG, drawn from files alone: what a run did, and what an evaluation found.

Bands and bars are 95% intervals. Colours are Okabe and Ito's, which colour-blind readers can tell apart. Left out: the figures
themselves (analysis.py, consensus.py).
"""

import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from grpo.errors import RunError
from grpo.reports.analysis import (
    by_length,
    calibration,
    calibration_error,
    format_against_accuracy,
    gain_by_difficulty,
    retention,
    within_problem,
)
from grpo.reports.consensus import wilson
from grpo.reports.jsonl import records

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8A8A"
FEW = 5  # samples that a bin must have to be drawn, where bins are many
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK)
OF_MODEL = {"base": ORANGE, "trained": BLUE}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666",
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True, "xtick.color": "#444444",
    "ytick.color": "#444444", "axes.labelcolor": "#444444", "legend.frameon": False, "legend.fontsize": 8.2,
    "lines.linewidth": 1.6,
}  # fmt: skip


def read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The records of a file that have `keys`; others are counted in a warning."""
    notes: list[str] = []
    found = list(records(path, notes, *keys))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    return found


def attempt(draw: Callable[[Path, Path], None], source: Path, path: Path) -> bool:
    """Whether a picture could be drawn: a fault of drawing is a warning, and no fault of the run that it shows."""
    try:
        draw(source, path)
        return True
    except Exception as error:
        print(f"warning: {path} could not be drawn: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return False


def save(figure: Figure, headline: str, note: str, path: Path) -> None:
    """With a headline and a note, in 128 colours to be small, and as a whole or not at all."""
    figure.suptitle(headline, x=0.008, ha="left", fontsize=12)
    figure.text(0.992, 0.99, note, ha="right", va="top", color=GREY)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128).save(picture, "png", optimize=True)
    part = path.with_suffix(".part")
    part.write_bytes(picture.getvalue())
    part.replace(path)


def finish(ax: Axes, title: str, x: str, y: str, keys: int, rows: int) -> None:
    """Title, labels with units, and between title and data, where it hides nothing, the key: `keys` names a line, `rows` lines
    at most, for which all panels of a row leave room.
    """
    handles, names = ax.get_legend_handles_labels()
    height = 4 + 13 * rows  # points
    if names:
        figure = ax.figure
        ax.legend(
            handles, names, loc="upper left", ncols=keys, borderpad=0, borderaxespad=0, handlelength=1.1, handletextpad=0.4,
            columnspacing=0.9, labelspacing=0.25, bbox_to_anchor=(0, 1),
            bbox_transform=ax.transAxes + ScaledTranslation(0, height / 72, figure.dpi_scale_trans),
        )  # fmt: skip
    ax.set_title(title, pad=height + 4)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if not ax.lines and not ax.collections and not ax.patches:
        ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", va="center", color=GREY)


def percent(ax: Axes, low: float = -0.02, high: float = 1.02) -> None:
    ax.set_ylim(low, high)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


# --------------------------------------------------------------------------------------------------------------- training


def column(metrics: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A figure of every step; NaN where a step has none."""
    return np.array([math.nan if record.get(name) is None else record[name] for record in metrics], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the steps, of what is there."""
    reach = max(len(values) // 40, 0)
    there = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    counts = np.convolve(there, window, "same") if len(values) >= len(window) else there.astype(float)
    sums = np.convolve(np.where(there, values, 0), window, "same") if len(values) >= len(window) else np.where(there, values, 0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


class Steps:
    """Panels over the steps of a run: lines by name, and where its sessions meet."""

    def __init__(self, metrics: list[dict[str, Any]], sessions: list[dict[str, Any]]):
        self.metrics, self.steps = metrics, column(metrics, "step")
        self.last = int(self.steps[-1]) if metrics else 1
        names = [name.split("/")[1] for name in (metrics[-1] if metrics else {}) if name.startswith("rewards/")]
        self.rewards = list(dict.fromkeys(names))
        self.rows = max(2, -(-(1 + len(self.rewards)) // 3))  # of a key, at most
        self.ends = [session["last_step"] for session in sessions if session["last_step"] < self.last]

    def line(self, ax: Axes, name: str, label: str, colour: str) -> None:
        """The figure `name`, faint, and its running mean, in dots too if few; nothing where no step has it."""
        values = column(self.metrics, name)
        if np.isfinite(values).any():
            ax.plot(self.steps, values, color=colour, alpha=0.25, linewidth=1, marker="." if len(values) < 30 else None)
            ax.plot(self.steps, smooth(values), color=colour, label=label)

    def finish(self, ax: Axes, title: str, y: str, keys: int = 3) -> None:
        for end in self.ends:
            ax.axvline(end + 0.5, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
        ax.set_xlim(-0.03 * self.last, 1.03 * self.last)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        finish(ax, title, "step", y, keys, self.rows)


def draw_training(folder: Path, path: Path) -> None:
    """The run in `folder` in one look. Draws what there is: runs of one step, without evaluations, without a KL."""
    metrics, evaluations = (read_lines(folder / f"{name}.jsonl", "step") for name in ("metrics", "evaluations"))
    sessions = json.loads((folder / "sessions.json").read_text("utf-8"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 7.2), layout=ConstrainedLayoutEngine(h_pad=0.1))
        grid = figure.add_gridspec(2, 4, width_ratios=(1.45, 1, 1, 1))
        run = Steps(metrics, sessions)
        draw_accuracy(figure.add_subplot(grid[:, 0]), run, evaluations)

        ax = figure.add_subplot(grid[0, 1])
        run.line(ax, "reward", "total", BLACK)
        for name, colour in zip(run.rewards, COLOURS[:-1] * 9, strict=False):
            label = name.replace("_", " ")
            run.line(ax, f"rewards/{name}/mean", label if len(label) < 15 else label[:13] + "…", colour)
        run.finish(ax, "Reward and its parts", "mean, points")

        ax = figure.add_subplot(grid[0, 2])
        for name, label, colour in (
            ("reasoning", "reasoning", BLUE),
            ("answer", "answer", ORANGE),
            ("strict", "all of it", BLACK),
        ):
            run.line(ax, f"format/{name}", label, colour)
        percent(ax)
        run.finish(ax, "Format is right", "completions")

        ax = figure.add_subplot(grid[0, 3])
        run.line(ax, "completions/max_length", "longest", SKY)
        run.line(ax, "completions/mean_length", "mean", BLUE)
        run.line(ax, "completions/mean_words", "words", GREEN)
        ax.set_ylim(bottom=0)
        run.finish(ax, "Length", "tokens, words")

        ax = figure.add_subplot(grid[1, 1])
        run.line(ax, "entropy", "entropy", GREEN)
        run.line(ax, "kl/k3", "KL to the reference", RED)
        shown = np.concatenate([column(metrics, "entropy"), column(metrics, "kl/k3")])
        shown = shown[np.isfinite(shown) & (shown > 0)]
        if len(shown):
            ax.set_yscale("log")
            ax.set_ylim(max(shown.min() / 1.5, shown.max() / 1e4), shown.max() * 1.5)
        run.finish(ax, "Policy", "nats a token, log scale")

        ax = figure.add_subplot(grid[1, 2])
        for name, label, colour in (
            ("frac_reward_zero_std", "equal rewards", BLACK),
            ("frac_truncated", "cut off", ORANGE),
            ("frac_unscorable", "unscorable", PINK),
            ("clip/high", "clipped high", RED),
            ("clip/low", "clipped low", BLUE),
        ):
            if np.nanmax(column(metrics, name), initial=0) > 0:
                run.line(ax, name, label, colour)
        percent(ax)
        run.finish(ax, "Lost to learning", "of groups, completions, tokens")

        draw_seconds(figure.add_subplot(grid[1, 3]), run)
        measured = [record["accuracy"] for record in evaluations if "accuracy" in record]
        headline = (
            f"{Path(config['model_path']).name}, seed {config['seed']}   ·   {len(metrics)} steps of "
            f"{config['prompts_per_step']} x {config['group_size']} completions, β {config['beta']:g}, "
            f"learning rate {config['learning_rate']:g}"
        )
        if len(measured) > 1:
            first, last = measured[0], measured[-1]
            headline += f"   ·   greedy {first['greedy']:.1%} to {last['greedy']:.1%} (N={last['n']})"
        save(figure, headline, "bars and bands: 95% intervals", path)


def draw_accuracy(ax: Axes, run: Steps, evaluations: list[dict[str, Any]]) -> None:
    """Of the sampled batch, as a band; greedy on held-out problems and on each session's own, as points."""
    found = format_against_accuracy(run.metrics)
    low, high = (np.array([math.nan if x is None else x for x in found[name]], float) for name in ("low", "high"))
    if run.metrics:
        ax.plot(
            found["step"],
            found["accuracy"],
            color=SKY,
            label="training batch, sampled",
            marker="." if len(found["step"]) < 3 else None,
        )
        ax.fill_between(found["step"], low, high, color=SKY, alpha=0.3, linewidth=0)
    for i, row in enumerate(retention(evaluations)):
        steps = np.array(row["steps"]) + 0.008 * run.last * row["session"]  # beside each other
        points(ax, steps, row, ORANGE, "each session's problems, greedy" if i == 0 else "", "s", size=4)
    rows = [record for record in evaluations if "accuracy" in record]
    held_out = {"accuracy": [record["accuracy"]["greedy"] for record in rows]}
    held_out |= {name: [record["accuracy"][name] for record in rows] for name in ("low", "high")}
    if rows:
        steps = [record["step"] for record in rows]
        points(ax, np.array(steps, float), held_out, BLACK, "held-out problems, greedy", "o", size=6)
        halo = withStroke(linewidth=3, foreground="white")
        for step, value in zip(steps, held_out["accuracy"], strict=True):
            if len(rows) < 8:  # beside the point, where no other is
                ax.annotate(
                    f"{value:.1%}", (step, value), (-7, -4) if step else (8, -4), textcoords="offset points", va="top",
                    ha="right" if step else "left", fontweight="bold", path_effects=[halo],
                )  # fmt: skip
    percent(ax)
    run.finish(ax, "Accuracy", "right answers, tagged", 2)
    for first, last in zip([0, *run.ends], [*run.ends, run.last], strict=True):
        if run.ends and last - first > 0.08 * run.last:
            ax.text(
                (first + last) / 2,
                -0.005,
                f"session {run.ends.index(first) + 2 if first else 1}",
                ha="center",
                va="bottom",
                color=GREY,
                fontsize=8.5,
            )


def points(ax: Axes, x: np.ndarray, row: Mapping[str, Any], colour: str, label: str, mark: str, size: float) -> None:
    """Values with their intervals, joined by a thin line."""
    y, low, high = (np.array(row[name], float) for name in ("accuracy", "low", "high"))
    ax.errorbar(
        x, y, yerr=np.maximum([y - low, high - y], 0), color=colour, marker=mark, markersize=size, linewidth=1, elinewidth=1.4,
        capsize=2.5, label=label,
    )  # fmt: skip


def draw_seconds(ax: Axes, run: Steps) -> None:
    """Of every step by phase, stacked; steps that compile reach out of the picture."""
    phases = ("prefill", "decode", "reward", "reference", "update")
    parts = np.nan_to_num([column(run.metrics, f"time/{phase}") for phase in phases])
    whole = np.nan_to_num(column(run.metrics, "time/step"))
    if len(whole):
        rest = np.maximum(whole - parts.sum(axis=0), 0)
        edges = np.append(run.steps - 0.5, run.steps[-1] + 0.5)
        bottom = np.zeros(len(whole))
        colours = (PINK, BLUE, GREEN, ORANGE, RED, GREY)
        for phase, seconds, colour in zip([*phases, "other"], [*parts, rest], colours, strict=True):
            ax.stairs(bottom + seconds, edges, baseline=bottom, color=colour, label=phase, fill=True)
            bottom = bottom + seconds
        top = 1.25 * np.percentile(whole, 90) if len(whole) > 5 else 0
        ax.set_ylim(0, top or None)
    cut = bool((whole > ax.get_ylim()[1]).any())
    run.finish(ax, "Time", "seconds a step" + " (the longest are cut)" * cut)


# ------------------------------------------------------------------------------------------------------------- evaluation


def draw_evaluation(folder: Path, path: Path) -> None:
    """The evaluation in `folder` in one look. RunError when it has not ended."""
    if not (folder / "result.json").is_file():
        raise RunError(f"{folder} has no result.json: finish the evaluation first")
    result = json.loads((folder / "result.json").read_text("utf-8"))
    result["models"] = {name: figures for name, figures in result["models"].items() if figures}  # there may be no base
    problems = read_lines(folder / "problems.jsonl", "id")
    samples = read_lines(folder / "samples.jsonl", "model", "problem", "sample")
    of = {name: [sample for sample in samples if sample["model"] == name] for name in result["models"]}
    colours = dict(zip(of, COLOURS, strict=False)) | OF_MODEL
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 7.6), layout=ConstrainedLayoutEngine(h_pad=0.1))
        axes = figure.subplots(2, 3)
        draw_ways(axes[0, 0], result, colours)
        draw_changes(axes[0, 1], result)
        draw_curves(axes[0, 2], result, colours)
        draw_lengths(axes[1, 0], of, problems, colours)
        draw_calibration(axes[1, 1], of, colours)
        draw_gain(axes[1, 2], of, colours)
        headline = f"{result['n']} problems"
        for label, way in (("greedy", "greedy"), ("vote", "consensus")):
            told = [f"{name} {figures[way]['tagged']:.1%}" for name, figures in result["models"].items()]
            headline += f"   ·   {label}: {', '.join(told)}"
        save(figure, headline, "bars and bands: 95% intervals; larger dots: more samples", path)


def draw_ways(ax: Axes, result: dict[str, Any], colours: dict[str, str]) -> None:
    """Greedy, one sample and the vote, for each model."""
    n = result["n"]
    for x, (name, figures) in enumerate(result["models"].items()):
        alone = figures["maj_at_k"][0]
        low, high = wilson(alone * n, n)  # wide enough: a problem's share of right samples varies less than a coin
        ways = figures["greedy"], {"tagged": alone, "low": low, "high": high}, figures["consensus"]
        for shift, found, mark in zip((-0.24, 0, 0.24), ways, "ovD", strict=True):
            row = {"accuracy": [found["tagged"]], "low": [found["low"]], "high": [found["high"]]}
            points(ax, np.array([x + shift]), row, colours[name], "", mark, 7)
            ax.annotate(
                f"{found['tagged']:.1%}",
                (x + shift, found["high"]),
                (0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
            )
    for label, mark in (("greedy", "o"), ("one sample", "v"), ("vote", "D")):
        ax.plot([], [], mark, color=GREY, markersize=7, label=label)
    ax.set_xlim(-0.6, len(result["models"]) - 0.4)
    ax.set_xticks(range(len(result["models"])), list(result["models"]), fontsize=10)
    ax.grid(axis="x", visible=False)
    percent(ax, high=1.1)
    finish(ax, "Single pass and vote", "", f"right of {n}, tagged", 3, 2)


def draw_changes(ax: Axes, result: dict[str, Any]) -> None:
    """How many problems the second way fixes and breaks, with McNemar's p."""
    pairs = {f"{name}: vote\nagainst greedy": figures["paired"] for name, figures in result["models"].items()}
    against = result.get("trained_against_base") or {}
    for way, label in (("greedy", "greedy"), ("consensus", "vote")):
        if way in against:
            pairs[f"{label}: trained\nagainst base"] = against[way]
    most = max([pair[side] for pair in pairs.values() for side in ("fixed", "broke")], default=1) or 1
    for y, pair in enumerate(pairs.values()):
        ax.barh(y, -pair["broke"], color=RED, height=0.55, label="broke" if y == 0 else None)
        ax.barh(y, pair["fixed"], color=GREEN, height=0.55, label="fixed" if y == 0 else None)
        p = pair["mcnemar_p"]
        text = "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
        ax.text(-pair["broke"] - 0.02 * most, y, f"{pair['broke']}", ha="right", va="center")
        ax.text(pair["fixed"] + 0.02 * most, y, f"{pair['fixed']}   {text}", ha="left", va="center")
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.set_xlim(-1.25 * max([pair["broke"] for pair in pairs.values()] + [most / 4]) - 0.1 * most, 1.65 * most)
    ax.set_ylim(len(pairs) - 0.4, -0.6)
    ax.set_yticks(range(len(pairs)), list(pairs))
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{abs(x):.0f}"))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    finish(ax, "Fixed and broken", "problems (exact McNemar p)", "", 2, 2)


def draw_curves(ax: Axes, result: dict[str, Any], colours: dict[str, str]) -> None:
    """pass@k and maj@k. The bands are Wilson's over problems: wide enough, as a problem's share varies less than a coin."""
    n = result["n"]
    for name, figures in result["models"].items():
        for curve, label, dashes in (("pass_at_k", "some sample right", (0, (4, 2))), ("maj_at_k", "vote right", "solid")):
            values = figures[curve]
            k = np.arange(1, len(values) + 1)
            low, high = np.array([wilson(value * n, n) for value in values]).T
            ax.plot(
                k,
                values,
                color=colours[name],
                linestyle=dashes,
                label=f"{name}, {label}",
                marker="." if len(values) < 12 else None,
            )
            ax.fill_between(k, low, high, color=colours[name], alpha=0.13, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    percent(ax)
    finish(ax, "More samples: pass@k and maj@k", "k, samples a problem", "problems", 2, 2)


def dots(
    ax: Axes, x: np.ndarray, bins: Sequence[Mapping[str, Any]], names: tuple[str, str, str], colour: str, label: str
) -> None:
    """Bins as dots with intervals, joined; a dot's area grows with its n. `names`: of the figure, its low, its high."""
    y, low, high = (np.array([found[name] for found in bins], float) for name in names)
    most = max((found["n"] for found in bins), default=1)
    ax.errorbar(x, y, yerr=np.maximum([y - low, high - y], 0), color=colour, linewidth=0.8, elinewidth=1.3, capsize=2.5)
    ax.scatter(x, y, [8 + 70 * found["n"] / most for found in bins], color=colour, zorder=3)
    ax.plot([], [], "o", color=colour, markersize=6, label=label)


def draw_lengths(
    ax: Axes, of: Mapping[str, list[dict[str, Any]]], problems: list[dict[str, Any]], colours: dict[str, str]
) -> None:
    """Accuracy by words of reasoning, over the lengths of the problems' own solutions."""
    for i, (name, samples) in enumerate(of.items()):
        bins = by_length(samples, problems, "words")
        width = bins[0]["high"] - bins[0]["low"] if len(bins) > 1 else 1
        middles = np.array([found["low"] + width / 2 for found in bins])
        if i == 0 and any(found["gold"] for found in bins):
            ax.bar(middles, [found["gold"] for found in bins], width, color="#DDDDDD", label="written solutions", zorder=0.6)
        enough = np.array([found["n"] >= FEW for found in bins], bool)
        shown = [found for found in bins if found["n"] >= FEW]
        paired = within_problem(samples, "words")
        label = name
        if paired["low"] is not None:
            label += f"; right minus wrong on one problem {paired['difference']:+.1f}"
            label += f" ({paired['low']:+.1f} to {paired['high']:+.1f})"
        middles = middles + (i - (len(of) - 1) / 2) * width / 6
        dots(ax, middles[enough], shown, ("accuracy", "ci_low", "ci_high"), colours[name], label)
    ax.set_xlim(left=0)
    percent(ax)
    finish(ax, "Length of the reasoning", f"words (last bin open; none of fewer than {FEW} samples)", "samples right", 1, 3)


def draw_calibration(ax: Axes, of: Mapping[str, list[dict[str, Any]]], colours: dict[str, str]) -> None:
    """How often a vote is right, by how many samples agree."""
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for i, (name, samples) in enumerate(of.items()):
        bins = calibration(samples)
        error = calibration_error(bins)
        x = np.array([found["agreement"] for found in bins]) + 0.012 * (i - (len(of) - 1) / 2)
        label = name if error is None else f"{name}; expected calibration error {100 * error:.1f} points"
        dots(ax, x, bins, ("accuracy", "ci_low", "ci_high"), colours[name], label)
    ax.set_xlim(-0.03, 1.03)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    percent(ax)
    finish(ax, "Agreement as confidence", "samples that agree with the vote", "votes right", 1, 3)


def draw_gain(ax: Axes, of: Mapping[str, list[dict[str, Any]]], colours: dict[str, str]) -> None:
    """What a vote adds to one sample, by what other samples of the problem say of its difficulty."""
    for i, (name, samples) in enumerate(of.items()):
        bins = gain_by_difficulty(samples)
        x = np.array([(found["low"] + found["high"]) / 2 for found in bins]) + 0.02 * (i - (len(of) - 1) / 2)
        dots(ax, x, bins, ("gain", "gain_low", "gain_high"), colours[name], name)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set_xlim(-0.06, 1.06)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:+.0f}"))
    finish(ax, "What a vote adds, by difficulty", "other samples of the problem that are right", "points over one sample", 1, 3)
