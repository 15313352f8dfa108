"""Laws of grpo/reports/plots.py: the dashboards show the figures of the files, whatever is missing, and nothing overlaps."""

import json
import math
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from test_analysis import answered

import grpo.reports.plots
from grpo.config import Config
from grpo.errors import RunError
from grpo.reports.consensus import model_figures, paired, wilson
from grpo.reports.plots import COLOURS, draw_evaluation, draw_training

PANELS = {"Accuracy", "Reward and its components", "Format is right", "Length", "Policy", "Zero variance and clipping", "Time"}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def accuracy(right: int, n: int) -> dict[str, Any]:
    low, high = wilson(right, n)
    return {"n": n, "greedy": right / n, "low": low, "high": high, "sampled": 0.5}


def metrics_of(step: int) -> dict[str, Any]:
    parts = ("correct", "reasoning_tags", "answer_tags", "operators", "violation", "brevity_of_the_whole_text")
    rng = random.Random(step)
    return {
        "step": step, "reward": step / 3 + rng.random(), "accuracy": rng.random(), "accuracy/strict": 0.1, "entropy": 1 / step,
        "kl/k3": step * 1e-4, "clip/high": 0.01, "clip/low": 0.02, "frac_reward_zero_std": rng.random(), "frac_truncated": 0.1,
        "frac_unscorable": 0.05, "completions/mean_length": 20.0, "completions/max_length": 40.0, "completions/mean_words": 9.0,
        "time/step": 1.2,
    } | {f"format/{name}": rng.random() for name in ("reasoning", "answer", "strict")} | {
        f"rewards/{name}/{figure}": 0.3 for name in parts for figure in ("mean", "std")
    } | {f"time/{phase}": 0.2 for phase in ("prefill", "decode", "reward", "reference", "update")}  # fmt: skip


def write_run(folder: Path, steps: int, **without: Any) -> Path:
    """A run of three sessions; `without` drops figures or files."""
    metrics = [metrics_of(step) for step in range(1, steps + 1)]
    for record in metrics:
        for name in without.get("figures", ()):
            del record[name]
        record |= dict.fromkeys(without.get("null", ()))
    write_lines(folder / "metrics.jsonl", metrics)
    ends = [steps // 5, 3 * steps // 5, steps]
    sessions = [{"session": i, "last_step": end} for i, end in enumerate(ends, start=1)]
    (folder / "sessions.json").write_text(json.dumps(sessions))
    (folder / "config.json").write_text(json.dumps({**vars(Config()), "model_path": "models/tiny"}))
    if without.get("evaluations", True):
        held_out = [{"step": end, "accuracy": accuracy(10 + end % 30, 50)} for end in [0, *ends]]
        for i in range(1, 4):
            held_out[i]["retention"] = {str(k): accuracy(20 + 5 * k, 40) for k in range(1, i + 1)}
        write_lines(folder / "evaluations.jsonl", held_out)
    return folder


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures behind the files."""
    found, real = [], grpo.reports.plots.save_figure
    monkeypatch.setattr(grpo.reports.plots, "save_figure", lambda figure, *rest: found.append(figure) or real(figure, *rest))
    return found


def by_title(figure: Figure) -> dict[str, Any]:
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def hidden(figure: Figure) -> list[str]:
    """What lies on something else: keys and titles on panels, texts on texts; what reaches out of the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer: Any = canvas.get_renderer()
    inside = {name: ax.get_window_extent(renderer) for name, ax in by_title(figure).items()}
    texts: dict[str, Bbox] = {text.get_text(): text.get_window_extent(renderer) for text in figure.texts}
    for name, ax in by_title(figure).items():
        texts[f"title {name}"] = ax._left_title.get_window_extent(renderer)
        texts |= {
            f"{label.get_text()} of {name}": label.get_window_extent(renderer) for label in (ax.xaxis.label, ax.yaxis.label)
        }
        if ax.get_legend() is not None:
            texts[f"key of {name}"] = ax.get_legend().get_window_extent(renderer)
    texts = {name: box for name, box in texts.items() if box.width > 0 and box.height > 0}
    found = [f"{a} / {b}" for (a, one), (b, two) in combinations(texts.items(), 2) if overlap(one, two)]
    found += [f"{a} on {b}" for a, text in texts.items() for b, panel in inside.items() if overlap(text, panel)]
    width, height = canvas.get_width_height()
    return found + [
        f"{name} is cut" for name, box in texts.items() if not (box.x0 >= 0 and box.x1 <= width and box.y1 <= height)
    ]


def overlap(a: Bbox, b: Bbox) -> bool:
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def check(path: Path) -> None:
    """The file is a small image that is not blank."""
    with Image.open(path) as picture:
        assert picture.width == 1500 and len(picture.convert("RGB").getcolors(2**20) or []) > 20
    assert path.stat().st_size < 150_000
    assert not list(path.parent.glob("*.part"))


# --------------------------------------------------------------------------------------------------------------- training


def test_the_training_dashboard_shows_what_the_files_say(tmp_path, drawn):
    folder = write_run(tmp_path, 60)
    draw_training(folder, tmp_path / "training.png")
    check(tmp_path / "training.png")
    (figure,) = drawn
    axes = by_title(figure)
    assert set(axes) == PANELS and hidden(figure) == []
    rewards = [metrics_of(step)["reward"] for step in range(1, 61)]
    assert rewards in [list(line.get_ydata()) for line in axes["Reward and its components"].lines]
    keys = {name: ax.get_legend_handles_labels()[1] for name, ax in axes.items()}
    assert "brevity of th…" in keys["Reward and its components"]
    assert keys["Zero variance and clipping"][-2:] == ["clipped high", "clipped low"]
    assert {line.get_xdata()[0] for line in axes["Policy"].lines if len(set(line.get_xdata())) == 1} == {12.5, 36.5}
    held_out = next(found for found in axes["Accuracy"].containers if found.get_label() == "held-out problems, greedy")
    assert list(held_out.lines[0].get_xdata()) == [0, 12, 36, 60]
    assert list(held_out.lines[0].get_ydata()) == pytest.approx([0.2, 0.44, 0.32, 0.2])
    ((start, end), *_) = held_out.lines[2][0].get_segments()
    assert (start[1], end[1]) == pytest.approx(wilson(10, 50))


@pytest.mark.parametrize(
    ("steps", "without"),
    [
        (0, {}),
        (1, {}),
        (2, {"evaluations": False}),
        (7, {"figures": ("kl/k3", "clip/high", "clip/low")}),
        (45, {"null": ("reward", "rewards/correct/mean", "entropy", "kl/k3")}),
        (3000, {}),
    ],
    ids=["no step", "one step", "no evaluation", "no KL", "NaN", "3,000 steps"],
)
def test_whatever_is_missing_the_rest_is_drawn(tmp_path, drawn, steps, without):
    folder = write_run(tmp_path, steps, **without)
    draw_training(folder, tmp_path / "training.png")
    check(tmp_path / "training.png")
    assert set(by_title(drawn[0])) == PANELS and hidden(drawn[0]) == []


def test_a_malformed_line_is_skipped_with_a_warning(tmp_path, drawn, capsys):
    """A torn last line is skipped without one."""
    folder = write_run(tmp_path, 9)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:4], lines[4][:20] + "\n", *lines[5:], lines[0][:20]]))
    draw_training(folder, tmp_path / "training.png")
    reward = by_title(drawn[0])["Reward and its components"].lines[0]
    assert list(reward.get_xdata()) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert capsys.readouterr().err == "warning: skipped 1 malformed line of metrics.jsonl (5)\n"


def test_steps_that_took_no_time_are_drawn(tmp_path, recwarn):
    folder = write_run(tmp_path, 9)
    metrics = [metrics_of(step) for step in range(1, 10)]
    write_lines(folder / "metrics.jsonl", [{k: 0.0 if k.startswith("time/") else v for k, v in m.items()} for m in metrics])
    draw_training(folder, tmp_path / "training.png")
    assert not [warning for warning in recwarn if "identical low and high" in str(warning.message)]


def test_figures_that_a_step_lacks_are_gaps(tmp_path):
    """Every other step was skipped: the mean is over those that are there."""
    values = grpo.reports.plots.metric_column([{"kl": 2.0}, {}, {"kl": None}, {"kl": 4.0}] * 30, "kl")
    assert [math.isnan(value) for value in values[:4]] == [False, True, True, False]
    smooth = grpo.reports.plots.running_mean(values)
    assert len(smooth) == 120 and 2 <= smooth.min() <= smooth.max() <= 4


# ------------------------------------------------------------------------------------------------------------- evaluation


def write_evaluation(folder: Path, models: tuple[str, ...], solutions: bool = True, n: int = 60) -> Path:
    rng = random.Random(0)
    problems = [{"id": str(i), "question": "?", "answer": "1", "solution": "w " * (5 + i % 30) * solutions} for i in range(n)]
    samples, of_models, right = [], {}, {}
    for model, skill in zip(models, (0.4, 0.8), strict=False):
        mine = []
        for problem in problems:
            answers = "".join("1" if rng.random() < skill else rng.choice("234-") for _ in range(6))
            for one in answered(problem["id"], answers, model=model, words=rng.randint(3, 40)):
                mine.append(one | {"flexible_answer": one["answer"], "seconds": 0.1, "format": {"violation": False}})
        of_models[model], right[model] = model_figures(problems, mine, [0.2, 0.4, 0.6, 0.8, 1.0])
        samples += mine
    rng.shuffle(samples)
    result = {"n": n, "models": {"base": None} | of_models}
    if len(models) == 2:
        base, trained = right.values()
        result["trained_against_base"] = {way: paired(base[way], trained[way]) for way in ("greedy", "consensus")}
    write_lines(folder / "problems.jsonl", problems)
    write_lines(folder / "samples.jsonl", samples)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize(
    ("models", "solutions", "n"),
    [(("base", "trained"), True, 60), (("trained",), False, 60), (("base", "trained"), True, 1)],
    ids=["both", "one model, no solutions", "one problem"],
)
def test_the_evaluation_dashboard(tmp_path, drawn, models, solutions, n):
    folder = write_evaluation(tmp_path, models, solutions, n)
    draw_evaluation(folder, tmp_path / "evaluation.png")
    check(tmp_path / "evaluation.png")
    (figure,) = drawn
    axes = by_title(figure)
    assert len(axes) == 6 and hidden(figure) == []
    result = json.loads((folder / "result.json").read_text())
    shown = {text.get_text() for text in axes["Single pass and vote"].texts}
    of_models = [of_model for of_model in result["models"].values() if of_model]
    for of_model in of_models:
        assert {f"{of_model[way]['tagged']:.1%}" for way in ("greedy", "consensus")} <= shown
    pairs = [of_model["paired"] for of_model in of_models] + list(result.get("trained_against_base", {}).values())
    widths = sorted(bar.get_width() for bar in axes["Fixed and broken"].patches)
    assert widths == sorted([-pair["broke"] for pair in pairs] + [pair["fixed"] for pair in pairs])
    assert ("written solutions" in axes["Length of the reasoning"].get_legend_handles_labels()[1]) == solutions


def test_an_evaluation_that_has_not_ended_is_named(tmp_path):
    with pytest.raises(RunError, match=r"has no result\.json: finish the evaluation first$"):
        draw_evaluation(tmp_path, tmp_path / "evaluation.png")


# ----------------------------------------------------------------------------------------------------------------- manners


def test_drawing_touches_no_global_state_and_needs_no_jax(tmp_path):
    """No pyplot, whose figures outlive their use; settings of matplotlib are as before."""
    write_run(tmp_path, 3)
    program = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from pathlib import Path; from grpo.reports.plots import draw_training\n"
        f"folder = Path({str(tmp_path)!r}); draw_training(folder, folder / 'training.png')\n"
        "assert not {'matplotlib.pyplot', 'jax'} & set(sys.modules)\n"
        "assert matplotlib.rcParams.copy() == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_colours_are_okabe_and_itos():
    assert set(COLOURS) < {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert len(set(COLOURS)) == len(COLOURS)
