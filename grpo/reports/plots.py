"""Two dashboards as PNG, drawn from files alone: one of a run, one of an evaluation.

Bands and error bars are 95% intervals. The colours are Okabe and Ito's, which colour-blind readers can tell apart. The
statistics are those of analysis.py and consensus.py.
"""

import io
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
from grpo.reports.jsonl import parse_json, read_records, rewrite

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8A8A"
MIN_SAMPLES = 5  # a bin of lengths with fewer is not drawn
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK)
PHASES = ("prefill", "decode", "reward", "reference", "update")
PHASE_COLOURS = (PINK, BLUE, GREEN, ORANGE, RED, GREY)  # the last one: the rest of the step
HELD_OUT = {"accuracy": "greedy", "low": "low", "high": "high"}  # names of draw_points, names in evaluations.jsonl
COMPONENT_COLOURS = COLOURS[:-1]  # black is the total
MODEL_COLOURS = {"base": ORANGE, "trained": BLUE}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666",
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True, "xtick.color": "#444444",
    "ytick.color": "#444444", "axes.labelcolor": "#444444", "legend.frameon": False, "legend.fontsize": 8.2,
    "lines.linewidth": 1.6,
}  # fmt: skip


def read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The records of a JSONL file; malformed lines, or lines without `keys`, are counted in a warning."""
    notes: list[str] = []
    lines = list(read_records(path, notes, *keys))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    return lines


def draw_or_warn(draw: Callable[[Path, Path], None], source: Path, path: Path) -> bool:
    """Whether the plot was drawn. An error of drawing is a warning: the run that it shows is not at fault."""
    try:
        draw(source, path)
        return True
    except Exception as error:
        print(f"warning: {path} could not be drawn: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return False


def save_figure(figure: Figure, headline: str, note: str, path: Path) -> None:
    """Write the figure with a headline and a note as a small PNG of 128 colours. The file appears only when complete."""
    figure.suptitle(headline, x=0.008, ha="left", fontsize=12)
    figure.text(0.992, 0.99, note, ha="right", va="top", color=GREY)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128).save(picture, "png", optimize=True)
    rewrite(path, picture.getvalue())


def label_panel(ax: Axes, title: str, x: str, y: str, columns: int, rows: int) -> None:
    """Add the title, the axis labels, and the legend between title and data, where it covers nothing.

    The legend has `columns` columns and at most `rows` rows; all panels in a row of the figure leave the same room.
    """
    handles, names = ax.get_legend_handles_labels()
    height = 4 + 13 * rows  # points
    if names:
        figure = ax.figure
        ax.legend(
            handles, names, loc="upper left", ncols=columns, borderpad=0, borderaxespad=0, handlelength=1.1, handletextpad=0.4,
            columnspacing=0.9, labelspacing=0.25, bbox_to_anchor=(0, 1),
            bbox_transform=ax.transAxes + ScaledTranslation(0, height / 72, figure.dpi_scale_trans),
        )  # fmt: skip
    ax.set_title(title, pad=height + 4)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if not ax.lines and not ax.collections and not ax.patches:
        ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", va="center", color=GREY)


def percent_axis(ax: Axes, low: float = -0.02, high: float = 1.02) -> None:
    """Make y an axis of percentages, with some room below 0% and above 100%."""
    ax.set_ylim(low, high)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


# --------------------------------------------------------------------------------------------------------------- training


def metric_column(metrics: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A metric of every step; NaN where a step lacks it."""
    return np.array([math.nan if record.get(name) is None else record[name] for record in metrics], float)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the steps, which skips NaN."""
    reach = max(len(values) // 40, 0)
    present = np.isfinite(values)
    counts, sums = present.astype(float), np.where(present, values, 0)
    window = np.ones(2 * reach + 1)
    if len(values) >= len(window):
        counts, sums = np.convolve(counts, window, "same"), np.convolve(sums, window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


class StepPanels:
    """Draws panels over the steps of a run: metrics as lines, and the boundaries of its sessions."""

    def __init__(self, metrics: list[dict[str, Any]], sessions: list[dict[str, Any]]):
        self.metrics, self.steps = metrics, metric_column(metrics, "step")
        self.last = int(self.steps[-1]) if metrics else 1
        names = [name.split("/")[1] for name in (metrics[-1] if metrics else {}) if name.startswith("rewards/")]
        self.rewards = list(dict.fromkeys(names))
        self.legend_rows = max(2, -(-(1 + len(self.rewards)) // 3))  # of the longest legend
        self.ends = [session["last_step"] for session in sessions if session["last_step"] < self.last]

    def line(self, ax: Axes, name: str, label: str, colour: str) -> None:
        """The metric `name`, faint, and its running mean; few steps have dots too. Nothing if no step has the metric."""
        values = metric_column(self.metrics, name)
        if np.isfinite(values).any():
            ax.plot(self.steps, values, color=colour, alpha=0.25, linewidth=1, marker="." if len(values) < 30 else None)
            ax.plot(self.steps, running_mean(values), color=colour, label=label)

    def label(self, ax: Axes, title: str, y: str, columns: int = 3) -> None:
        """Boundaries of sessions, the axis of steps, title and legend. Call it when the data is drawn."""
        for end in self.ends:
            ax.axvline(end + 0.5, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
        ax.set_xlim(-0.03 * self.last, 1.03 * self.last)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        label_panel(ax, title, "step", y, columns, self.legend_rows)


def draw_training(folder: Path, path: Path) -> None:
    """Draw the dashboard of the run in `folder`. Panels show what there is: a run may have one step, no evaluation, no KL."""
    metrics, evaluations = (read_lines(folder / f"{name}.jsonl", "step") for name in ("metrics", "evaluations"))
    sessions = parse_json((folder / "sessions.json").read_text("utf-8"))
    config = parse_json((folder / "config.json").read_text("utf-8"))
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 7.2), layout=ConstrainedLayoutEngine(h_pad=0.1))
        grid = figure.add_gridspec(2, 4, width_ratios=(1.45, 1, 1, 1))
        run = StepPanels(metrics, sessions)
        draw_accuracy(figure.add_subplot(grid[:, 0]), run, evaluations)
        draw_rewards(figure.add_subplot(grid[0, 1]), run)
        draw_format(figure.add_subplot(grid[0, 2]), run)
        draw_length(figure.add_subplot(grid[0, 3]), run)
        draw_policy(figure.add_subplot(grid[1, 1]), run)
        draw_lost(figure.add_subplot(grid[1, 2]), run)
        draw_seconds(figure.add_subplot(grid[1, 3]), run)
        save_figure(figure, training_headline(config, len(metrics), evaluations), "bars and bands: 95% intervals", path)


def training_headline(config: dict[str, Any], steps: int, evaluations: list[dict[str, Any]]) -> str:
    """Model, settings, and the first and the last greedy accuracy."""
    headline = (
        f"{Path(config['model_path']).name}, seed {config['seed']}   ·   {steps} steps of "
        f"{config['prompts_per_step']} x {config['group_size']} completions, β {config['beta']:g}, "
        f"learning rate {config['learning_rate']:g}"
    )
    measured = [record["accuracy"] for record in evaluations if "accuracy" in record]
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        headline += f"   ·   greedy {first['greedy']:.1%} to {last['greedy']:.1%} (N={last['n']})"
    return headline


def draw_rewards(ax: Axes, run: StepPanels) -> None:
    """The mean reward and its components."""
    run.line(ax, "reward", "total", BLACK)
    for i, name in enumerate(run.rewards):
        label = name.replace("_", " ")
        short = label if len(label) < 15 else label[:13] + "…"
        run.line(ax, f"rewards/{name}/mean", short, COMPONENT_COLOURS[i % len(COMPONENT_COLOURS)])
    run.label(ax, "Reward and its components", "mean, points")


def draw_format(ax: Axes, run: StepPanels) -> None:
    """The share of completions whose format is right."""
    run.line(ax, "format/reasoning", "reasoning", BLUE)
    run.line(ax, "format/answer", "answer", ORANGE)
    run.line(ax, "format/strict", "all of it", BLACK)
    percent_axis(ax)
    run.label(ax, "Format is right", "completions")


def draw_length(ax: Axes, run: StepPanels) -> None:
    """The length of completions, in tokens, and of their reasoning, in words."""
    run.line(ax, "completions/max_length", "longest", SKY)
    run.line(ax, "completions/mean_length", "mean", BLUE)
    run.line(ax, "completions/mean_words", "words", GREEN)
    ax.set_ylim(bottom=0)
    run.label(ax, "Length", "tokens, words")


def draw_policy(ax: Axes, run: StepPanels) -> None:
    """Entropy and KL on a logarithmic axis of at most four decades."""
    run.line(ax, "entropy", "entropy", GREEN)
    run.line(ax, "kl/k3", "KL to the reference", RED)
    shown = np.concatenate([metric_column(run.metrics, "entropy"), metric_column(run.metrics, "kl/k3")])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if len(shown):
        ax.set_yscale("log")
        ax.set_ylim(max(shown.min() / 1.5, shown.max() / 1e4), shown.max() * 1.5)
    run.label(ax, "Policy", "nats a token, log scale")


def draw_lost(ax: Axes, run: StepPanels) -> None:
    """The shares of zero-variance groups, of truncated and unscored completions and of clipped tokens, where there are any."""
    for name, label, colour in (
        ("frac_reward_zero_std", "zero variance", BLACK),
        ("frac_truncated", "truncated", ORANGE),
        ("frac_unscorable", "no score", PINK),
        ("clip/high", "clipped high", RED),
        ("clip/low", "clipped low", BLUE),
    ):
        if np.nanmax(metric_column(run.metrics, name), initial=0) > 0:
            run.line(ax, name, label, colour)
    percent_axis(ax)
    run.label(ax, "Zero variance and clipping", "of groups, completions, tokens")


def draw_accuracy(ax: Axes, run: StepPanels, evaluations: list[dict[str, Any]]) -> None:
    """Accuracy of the training batches as a band; greedy on held-out problems and on each session's own, as points."""
    batches = format_against_accuracy(run.metrics)
    low, high = (np.array([math.nan if x is None else x for x in batches[name]], float) for name in ("low", "high"))
    if run.metrics:
        mark = "." if len(batches["step"]) < 3 else None
        ax.plot(batches["step"], batches["accuracy"], color=SKY, label="training batch, sampled", marker=mark)
        ax.fill_between(batches["step"], low, high, color=SKY, alpha=0.3, linewidth=0)
    for i, row in enumerate(retention(evaluations)):
        steps = np.array(row["steps"]) + 0.008 * run.last * row["session"]  # so that one does not hide another
        draw_points(ax, steps, row, ORANGE, "each session's problems, greedy" if i == 0 else "", "s", size=4)
    held_out = [(record["step"], record["accuracy"]) for record in evaluations if "accuracy" in record]
    if held_out:
        row = {name: [found[key] for _, found in held_out] for name, key in HELD_OUT.items()}
        steps = [step for step, _ in held_out]
        draw_points(ax, np.array(steps, float), row, BLACK, "held-out problems, greedy", "o", size=6)
        if len(steps) < 8:
            write_values(ax, steps, row["accuracy"])
    percent_axis(ax)
    run.label(ax, "Accuracy", "right answers, tagged", 2)
    write_sessions(ax, run)


def write_values(ax: Axes, steps: list[int], values: list[float]) -> None:
    """Write values next to their points, where there is room: to the right of step 0, to the left of others."""
    halo = withStroke(linewidth=3, foreground="white")
    for step, value in zip(steps, values, strict=True):
        offset, side = ((-7, -4), "right") if step else ((8, -4), "left")
        ax.annotate(
            f"{value:.1%}", (step, value), offset, textcoords="offset points", va="top", ha=side, fontweight="bold",
            path_effects=[halo],
        )  # fmt: skip


def write_sessions(ax: Axes, run: StepPanels) -> None:
    """Write the number of each session that is wide enough at the bottom of the panel."""
    starts = [0, *run.ends]
    for number, (first, last) in enumerate(zip(starts, [*run.ends, run.last], strict=True), start=1):
        if run.ends and last - first > 0.08 * run.last:
            text = f"session {number}"
            ax.text((first + last) / 2, -0.005, text, ha="center", va="bottom", color=GREY, fontsize=8.5)


def draw_points(ax: Axes, x: np.ndarray, row: Mapping[str, Any], colour: str, label: str, mark: str, size: float) -> None:
    """Values with their intervals, joined by a thin line."""
    y, low, high = (np.array(row[name], float) for name in ("accuracy", "low", "high"))
    ax.errorbar(
        x, y, yerr=np.maximum([y - low, high - y], 0), color=colour, marker=mark, markersize=size, linewidth=1, elinewidth=1.4,
        capsize=2.5, label=label,
    )  # fmt: skip


def draw_seconds(ax: Axes, run: StepPanels) -> None:
    """The seconds of every step by phase, stacked. The axis ends below the steps that compile."""
    parts = np.nan_to_num([metric_column(run.metrics, f"time/{phase}") for phase in PHASES])
    whole = np.nan_to_num(metric_column(run.metrics, "time/step"))
    if len(whole):
        other = np.maximum(whole - parts.sum(axis=0), 0)
        edges = np.append(run.steps - 0.5, run.steps[-1] + 0.5)
        bottom = np.zeros(len(whole))
        for phase, seconds, colour in zip([*PHASES, "other"], [*parts, other], PHASE_COLOURS, strict=True):
            ax.stairs(bottom + seconds, edges, baseline=bottom, color=colour, label=phase, fill=True)
            bottom = bottom + seconds
        top = 1.25 * np.percentile(whole, 90) if len(whole) > 5 else 0
        ax.set_ylim(0, top or None)
    cut = (whole > ax.get_ylim()[1]).any()
    run.label(ax, "Time", "seconds a step (the longest are cut)" if cut else "seconds a step")


# ------------------------------------------------------------------------------------------------------------- evaluation


def draw_evaluation(folder: Path, path: Path) -> None:
    """Draw the dashboard of the evaluation in `folder`. Raises RunError if it is not finished."""
    if not (folder / "result.json").is_file():
        raise RunError(f"{folder} has no result.json: finish the evaluation first")
    result = parse_json((folder / "result.json").read_text("utf-8"))
    result["models"] = {name: figures for name, figures in result["models"].items() if figures}  # base may be None
    problems = read_lines(folder / "problems.jsonl", "id")
    samples = read_lines(folder / "samples.jsonl", "model", "problem", "sample")
    by_model = {name: [sample for sample in samples if sample["model"] == name] for name in result["models"]}
    colours = dict(zip(by_model, COLOURS, strict=False)) | MODEL_COLOURS
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 7.6), layout=ConstrainedLayoutEngine(h_pad=0.1))
        axes = figure.subplots(2, 3)
        draw_ways(axes[0, 0], result, colours)
        draw_changes(axes[0, 1], result)
        draw_curves(axes[0, 2], result, colours)
        draw_by_length(axes[1, 0], by_model, problems, colours)
        draw_calibration(axes[1, 1], by_model, colours)
        draw_gain(axes[1, 2], by_model, colours)
        headline = f"{result['n']} problems"
        for label, way in (("greedy", "greedy"), ("vote", "consensus")):
            values = [f"{name} {figures[way]['tagged']:.1%}" for name, figures in result["models"].items()]
            headline += f"   ·   {label}: {', '.join(values)}"
        save_figure(figure, headline, "bars and bands: 95% intervals; larger dots: more samples", path)


def draw_ways(ax: Axes, result: dict[str, Any], colours: dict[str, str]) -> None:
    """Accuracy of the greedy answer, of one sample and of the vote, for each model."""
    n = result["n"]
    for x, (name, figures) in enumerate(result["models"].items()):
        single = figures["maj_at_k"][0]
        low, high = wilson(single * n, n)  # conservative: a problem's share of right samples varies less than one coin toss
        ways = figures["greedy"], {"tagged": single, "low": low, "high": high}, figures["consensus"]
        for shift, way, mark in zip((-0.24, 0, 0.24), ways, "ovD", strict=True):
            row = {"accuracy": [way["tagged"]], "low": [way["low"]], "high": [way["high"]]}
            draw_points(ax, np.array([x + shift]), row, colours[name], "", mark, 7)
            top = x + shift, way["high"]
            ax.annotate(f"{way['tagged']:.1%}", top, (0, 4), textcoords="offset points", ha="center", va="bottom")
    for label, mark in (("greedy", "o"), ("one sample", "v"), ("vote", "D")):
        ax.plot([], [], mark, color=GREY, markersize=7, label=label)
    ax.set_xlim(-0.6, len(result["models"]) - 0.4)
    ax.set_xticks(range(len(result["models"])), list(result["models"]), fontsize=10)
    ax.grid(axis="x", visible=False)
    percent_axis(ax, high=1.1)
    label_panel(ax, "Single pass and vote", "", f"right of {n}, tagged", 3, 2)


def draw_changes(ax: Axes, result: dict[str, Any]) -> None:
    """How many problems the second of two ways fixes and breaks, with McNemar's p."""
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
    label_panel(ax, "Fixed and broken", "problems (exact McNemar p)", "", 2, 2)


def draw_curves(ax: Axes, result: dict[str, Any], colours: dict[str, str]) -> None:
    """pass@k and maj@k with Wilson's bands over problems, which are conservative: a problem's share varies less than a coin."""
    n = result["n"]
    for name, figures in result["models"].items():
        for curve, label, dashes in (("pass_at_k", "some sample right", (0, (4, 2))), ("maj_at_k", "vote right", "solid")):
            values = figures[curve]
            k = np.arange(1, len(values) + 1)
            low, high = np.array([wilson(value * n, n) for value in values]).T
            style: dict[str, Any] = {"linestyle": dashes, "marker": "." if len(values) < 12 else None}
            ax.plot(k, values, color=colours[name], label=f"{name}, {label}", **style)
            ax.fill_between(k, low, high, color=colours[name], alpha=0.13, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    percent_axis(ax)
    label_panel(ax, "More samples: pass@k and maj@k", "k, samples a problem", "problems", 2, 2)


def draw_bins(
    ax: Axes, x: np.ndarray, bins: Sequence[Mapping[str, Any]], names: tuple[str, str, str], colour: str, label: str
) -> None:
    """Bins as joined dots with intervals; the area of a dot grows with n. `names`: those of the value, its low and its high."""
    y, low, high = (np.array([row[name] for row in bins], float) for name in names)
    most = max((row["n"] for row in bins), default=1)
    ax.errorbar(x, y, yerr=np.maximum([y - low, high - y], 0), color=colour, linewidth=0.8, elinewidth=1.3, capsize=2.5)
    ax.scatter(x, y, [8 + 70 * row["n"] / most for row in bins], color=colour, zorder=3)
    ax.plot([], [], "o", color=colour, markersize=6, label=label)


def draw_by_length(
    ax: Axes, by_model: Mapping[str, list[dict[str, Any]]], problems: list[dict[str, Any]], colours: dict[str, str]
) -> None:
    """Accuracy by words of reasoning, over the lengths of the problems' own solutions."""
    for i, (name, samples) in enumerate(by_model.items()):
        bins = by_length(samples, problems, "words")
        width = bins[0]["high"] - bins[0]["low"] if len(bins) > 1 else 1
        middles = np.array([row["low"] + width / 2 for row in bins])
        if i == 0 and any(row["gold"] for row in bins):
            ax.bar(middles, [row["gold"] for row in bins], width, color="#DDDDDD", label="written solutions", zorder=0.6)
        enough = np.array([row["n"] >= MIN_SAMPLES for row in bins], bool)
        shown = [row for row in bins if row["n"] >= MIN_SAMPLES]
        paired = within_problem(samples, "words")
        label = name
        if paired["low"] is not None:
            label += f"; right minus wrong on one problem {paired['difference']:+.1f}"
            label += f" ({paired['low']:+.1f} to {paired['high']:+.1f})"
        middles = middles + (i - (len(by_model) - 1) / 2) * width / 6
        draw_bins(ax, middles[enough], shown, ("accuracy", "ci_low", "ci_high"), colours[name], label)
    ax.set_xlim(left=0)
    percent_axis(ax)
    x = f"words (last bin open; bins of at least {MIN_SAMPLES} samples)"
    label_panel(ax, "Length of the reasoning", x, "samples right", 1, 3)


def draw_calibration(ax: Axes, by_model: Mapping[str, list[dict[str, Any]]], colours: dict[str, str]) -> None:
    """How often the vote is right, by how many samples agree with it."""
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for i, (name, samples) in enumerate(by_model.items()):
        bins = calibration(samples)
        error = calibration_error(bins)
        x = np.array([row["agreement"] for row in bins]) + 0.012 * (i - (len(by_model) - 1) / 2)
        label = name if error is None else f"{name}; expected calibration error {100 * error:.1f} points"
        draw_bins(ax, x, bins, ("accuracy", "ci_low", "ci_high"), colours[name], label)
    ax.set_xlim(-0.03, 1.03)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    percent_axis(ax)
    label_panel(ax, "Agreement as confidence", "samples that agree with the vote", "votes right", 1, 3)


def draw_gain(ax: Axes, by_model: Mapping[str, list[dict[str, Any]]], colours: dict[str, str]) -> None:
    """Accuracy of the vote minus that of one sample, by the difficulty that other samples of the problem measure."""
    for i, (name, samples) in enumerate(by_model.items()):
        bins = gain_by_difficulty(samples)
        x = np.array([(row["low"] + row["high"]) / 2 for row in bins]) + 0.02 * (i - (len(by_model) - 1) / 2)
        draw_bins(ax, x, bins, ("gain", "gain_low", "gain_high"), colours[name], name)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set_xlim(-0.06, 1.06)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:+.0f}"))
    label_panel(
        ax, "Gain of the vote, by difficulty", "other samples of the problem that are right", "points over one sample", 1, 3
    )
