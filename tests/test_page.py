"""Laws of grpo/reports/page.py and page.html.

The data of the page is that of the run's files, and notes say what it leaves out. In a headless Chromium, its numbers are those
of grpo/loss.py, its filters filter, and no text of a completion is ever markup.
"""

import inspect
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.config import TINY_MODEL
from grpo.errors import ConfigError
from grpo.loss import batch_std, group_advantages, group_std, grpo_loss, grpo_weights, no_scale
from grpo.reports.page import FLAGS, fold_constant, read_page, render, round_floats, spread
from grpo.runs.metrics import accuracy_metrics, rollout_metrics, step_metrics
from grpo.update import kept_by_rounding, token_stats

STEPS, Q, G, C = 40, 2, 4, 5
MARKUP = "<img src=x onerror=\"document.title='broken'\"></script><script>document.title='broken'</script><!-- \u2028 &amp;"
SAVED = 3, "p1"  # the group whose tokens are saved
PIECES = ["<reasoning>", "7", "\n", "</script>", "<end_of_turn>"]


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def completion(step: int, problem: str, row: int, reward: float | None, advantage: float) -> dict:
    right = bool(reward is not None and reward > 20)
    text = MARKUP if (step, problem, row) == (1, "p0", 0) else f"<reasoning>{step} + {row}</reasoning><answer>{row}</answer>"
    return {
        "step": step, "problem": problem, "answer": "7", "text": text, "reward": reward,
        "components": {"correct": 25.0 * right, "violation": 0.0, "brevity": None if reward is None else -0.25},
        "accuracy": {"tagged": right, "strict": right, "flexible": right},
        "format": {"reasoning_tags": True, "answer_tags": True, "violation": row > 1}, "truncated": row == 3,
        "advantage": advantage, "length": C,
    }  # fmt: skip


def rewards_of(scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of all completions, one of them without a score, and the advantages that training gives them.  [STEPS, Q, G]"""
    rewards = np.random.default_rng(0).choice([-15.0, 4.0, 5.0, 29.75, 30.0], (STEPS, Q, G))
    rewards[1, 0, 1] = math.nan
    rewards[4, 1] = 1 / 3  # equal ones
    scales = {"group": group_std, "batch": batch_std, "none": no_scale}
    return rewards, np.asarray(jax.jit(jax.vmap(partial(group_advantages, scale=scales[scale])))(rewards))


def make_run(folder: Path, scale: str = "group") -> Path:
    """A run of every file, as training leaves them."""
    folder.mkdir()
    rewards, advantages = rewards_of(scale)
    config = {"preset": "tiny", "seed": 0, "data": "gone.jsonl", "model_path": TINY_MODEL, "group_size": G, "tis_cap": 1.5}
    (folder / "config.json").write_text(json.dumps(config | {"advantage_scale": scale, "beta": 0.04}))
    steps = range(1, STEPS + 1)
    write(folder / "metrics.jsonl", [
        {"step": s, "session": 1 + s // 21, "reward": s / 3, "accuracy": s / 80, "loss": None if s == 5 else 0.125,
         "alarms": ["kl_explosion"] * (s == 7)} for s in steps
    ])  # fmt: skip
    write(folder / "completions.jsonl", [
        completion(step, f"p{q}", row, None if math.isnan(rewards[step - 1, q, row]) else rewards[step - 1, q, row],
                   float(advantages[step - 1, q, row]))
        for step in steps for q in range(Q) for row in range(G)
    ])  # fmt: skip
    figures = {"n": 500, "low": 0.45, "high": 0.5377, "greedy": 0.494, "sampled": 0.114, "sampled_format": 1.0,
               "sampled_reward": 6.5, "sampled_length": 8.5}  # fmt: skip
    after = figures | {"low": 0.9487, "high": 0.9802, "greedy": 0.968}
    write(folder / "evaluations.jsonl", [
        {"step": 0, "accuracy": figures}, {"step": 20, "accuracy": figures, "retention": {"1": after}},
        {"step": 40, "accuracy": after, "retention": {"1": figures, "2": after}},
    ])  # fmt: skip
    (folder / "sessions.json").write_text(json.dumps([
        {"session": 1, "first_step": 1, "last_step": 20, "new": ["p0"], "review": []},
        {"session": 2, "first_step": 21, "last_step": 40, "new": ["p1"], "review": ["p0"]},
    ]))  # fmt: skip
    (folder / "result.json").write_text(json.dumps({"finished": True, "seconds": 12.5}))
    tokens, _ = saved_tokens(advantages)
    write(folder / "tokens.jsonl", [tokens])
    return folder


def saved_tokens(advantages: np.ndarray) -> tuple[dict, np.ndarray]:
    """The record of one group, and what each of its completions adds to the loss, as grpo/loss.py has them."""
    random = np.random.default_rng(1)
    step, problem = SAVED
    logprobs = -random.exponential(1, (G, C))
    old, ref = logprobs + random.normal(0, 0.3, (G, C)), logprobs + random.normal(0, 0.3, (G, C))
    sampler = old + random.normal(0, 0.5, (G, C))  # ν reaches its cap of 1.5
    group = jnp.asarray(advantages[step - 1, int(problem[1])])
    weights = grpo_weights(jnp.ones((G, C))) / Q
    policy, before, reference, sampled = (jnp.asarray(x, jnp.float32) for x in (logprobs, old, ref, sampler))

    @jax.jit
    def loss_of(weights):
        return grpo_loss(policy, before, reference, group, weights, sampler_logprobs=sampled, tis_cap=1.5)

    terms = loss_of(weights)[1]
    losses = np.array([float(loss_of(weights * (jnp.arange(G) == row)[:, None])[0]) for row in range(G)])
    columns = {
        "logprobs": logprobs, "old_logprobs": old, "ref_logprobs": ref, "sampler_logprobs": sampler, "ratio": terms["ratio"],
        "kl": terms["kl"], "clipped": terms["clipped_low"] + terms["clipped_high"], "weight": weights,
    }  # fmt: skip
    rows = [
        {"row": row, "pieces": PIECES, "ids": [378, 55, 107, 9, 5]}
        | {name: [float(f"{x:.5g}") for x in np.asarray(column)[row].tolist()] for name, column in columns.items()}
        for row in range(G)
    ]
    settings = {"beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.2, "session": 1, "question": "How many are 3 and 4?"}
    return {"step": step, "problem": problem} | settings | {"completions": rows}, losses


def make_evaluation(folder: Path) -> Path:
    """Four problems, greedy and two voters: what training keeps right, fixes, breaks, and leaves wrong."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"models": ["base", "trained"], "temperatures": [0.5, 1.0]}))
    questions = [f"Question {i}? {MARKUP * (i == 3)}" for i in range(4)]
    problems = [{"id": f"e{i}", "question": questions[i], "answer": "7.0", "solution": "3 + 4"} for i in range(4)]
    write(folder / "problems.jsonl", problems)
    answers = {"base": ["777", "878", "778", "88-"], "trained": ["777", "778", "887", "8--"]}
    write(folder / "samples.jsonl", [
        {"model": model, "problem": f"e{i}", "sample": j, "temperature": [0, 0.5, 1.0][j], "text": f"<answer>{answer}</answer>",
         "length": 3, "truncated": False, "answer": None if answer == "-" else answer, "accuracy": {"tagged": answer == "7"}}
        for model, of_problems in answers.items() for i, of_problem in enumerate(of_problems)
        for j, answer in enumerate(of_problem)
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    return make_evaluation(tmp_path_factory.mktemp("page") / "evaluation")


# ----------------------------------------------------------------------------------------------------------- what it holds


def test_columns_are_the_records(run):
    page = read_page([run], None, 64)
    records = [json.loads(line) for line in (run / "completions.jsonl").read_text("utf-8").split("\n")[:-1]]
    found = page["completions"]
    assert found["text"] == [record["text"] for record in records]
    assert found["reward"] == [record["reward"] and pytest.approx(record["reward"], rel=1e-5) for record in records]
    assert found["advantage"] == pytest.approx([record["advantage"] for record in records], rel=1e-7)
    assert found["components"]["brevity"] == [record["components"]["brevity"] for record in records]
    assert found["groups"]["size"] == [G] * (STEPS * Q) and found["total"] == len(records)
    assert found["problems"]["id"] == ["p0", "p1"] and found["problems"]["answer"] == ["7", "7"]
    for row, record in enumerate(records):
        held = {name for bit, name in enumerate(FLAGS) if found["flags"][row] >> bit & 1}
        expected = record["accuracy"] | record["format"] | {"truncated": record["truncated"]}
        assert held == {name for name, value in expected.items() if value}
    (only,) = page["runs"]
    assert only["step"] == list(range(1, STEPS + 1)) and only["metrics"]["loss"][4] is None
    assert only["alarms"] == [[7, "kl_explosion"]] and [s["new"] for s in only["sessions"]] == [1, 1]


def test_the_same_problem_twice_in_a_step_is_two_groups(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    records = [completion(1, "p0", row, 5.0, 0.0) for row in range(G)]
    write(copy / "completions.jsonl", records + records)
    assert read_page([copy], None, 64)["completions"]["groups"] == {"step": [1, 1], "problem": [0, 0], "size": [G, G]}


def test_questions_come_from_the_data_where_it_is_and_agrees(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    lines = [{"question": f"Question {i}?", "answer": f"#### {6 + i}"} for i in range(3)]
    write(tmp_path / "data.jsonl", lines)
    config = json.loads((copy / "config.json").read_text()) | {"data": str(tmp_path / "data.jsonl"), "eval_problems": 0}
    (copy / "config.json").write_text(json.dumps(config))
    write(copy / "completions.jsonl", [completion(1, f"data.jsonl:{i}", 0, 5.0, 0.0) for i in (1, 2)])
    page = read_page([copy], None, 64)
    assert page["completions"]["problems"]["question"] == [None, "Question 1?"]  # the first one's answer is 6, not 7
    assert page["notes"] == []
    assert any("gone.jsonl" in note for note in read_page([run], None, 64)["notes"])


def test_a_note_says_what_is_left_out(run):
    """Whole steps are, evenly spread; those whose tokens are saved stay."""
    page = read_page([run], None, 0.01)
    steps = sorted(set(page["completions"]["groups"]["step"]))
    assert SAVED[0] in steps and 5 < len(steps) < STEPS and max(np.diff(steps)) <= 8
    kept = len(page["completions"]["text"])
    assert kept == len(steps) * Q * G
    assert f"{STEPS * Q * G - kept:,} of {STEPS * Q * G:,} completions are not in this page" in page["notes"][0]
    page = read_page([run], None, 0)
    assert page["completions"]["text"] == [] and page["tokens"] == [] and len(page["notes"]) == 2


def test_malformed_lines_are_counted_but_not_a_torn_last_one(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('broken\n[1]\n{"reward": 1.0}\n{"step": 41, "rew')
    page = read_page([copy], None, 64)
    assert f"skipped 3 malformed lines of metrics.jsonl ({STEPS + 1}, {STEPS + 2}, {STEPS + 3})" in page["notes"]
    assert len(page["runs"][0]["step"]) == STEPS


@pytest.mark.parametrize("in_tokens", [True, False])
def test_a_run_with_the_old_name_of_tis_cap_gives_the_same_page(run, tmp_path, in_tokens):
    """Once it was `sampler_cap`, in config.json and in each line of tokens.jsonl."""
    pages = []
    for name in ("tis_cap", "sampler_cap"):
        copy = Path(shutil.copytree(run, tmp_path / name / "run"))
        config, tokens = (json.loads((copy / file).read_text("utf-8")) for file in ("config.json", "tokens.jsonl"))
        (copy / "config.json").write_text(json.dumps({key: x for key, x in config.items() if key != "tis_cap"} | {name: 1.5}))
        if in_tokens:
            write(copy / "tokens.jsonl", [tokens | {name: 1.25}])
        pages.append(read_page([copy], None, 64))
    assert pages[0] == pages[1]
    assert pages[1]["runs"][0]["config"]["tis_cap"] == 1.5
    assert pages[1]["tokens"][0]["tis_cap"] == (1.25 if in_tokens else None)


def test_an_unfinished_run_needs_no_other_file(run, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(run / name, folder)
        page = read_page([folder], None, 64)
        assert page["completions"]["text"] == [] and page["tokens"] == []
    with pytest.raises(ConfigError, match="holds no run"):
        read_page([tmp_path], None, 64)


def test_answers_and_votes_of_an_evaluation(run, evaluation):
    found = read_page([run], evaluation, 64)["evaluation"]
    assert found["problems"]["gold"] == ["7"] * 4 and found["result"] == {}
    assert found["models"]["base"]["answers"] == [list("777"), list("878"), list("778"), ["8", "8", None]]
    assert found["models"]["trained"]["winner"] == ["7", "7", "8", None]
    assert found["models"]["base"]["texts"][0] == ["<answer>7</answer>"] * 3


def test_a_missing_sample_is_noted_and_abstains(run, evaluation, tmp_path):
    copy = Path(shutil.copytree(evaluation, tmp_path / "evaluation"))
    lines = (copy / "samples.jsonl").read_text().splitlines(keepends=True)
    (copy / "samples.jsonl").write_text("".join(lines[1:]))
    page = read_page([run], copy, 64)
    (note,) = (note for note in page["notes"] if note.startswith("Evaluation: 1 samples are missing. The table"))
    assert "leave out their problems" in note
    assert page["evaluation"]["models"]["base"]["answers"][0] == [None, "7", "7"]


def test_values_are_rounded_folded_and_evenly_spread():
    assert round_floats({"a": [1 / 3, 2.0, math.nan, math.inf, -1e-9]}) == {"a": [0.333333, 2, None, None, -1e-09]}
    assert fold_constant([1, 1, 1]) == 1 and fold_constant([1, 2]) == [1, 2] and fold_constant([]) == []
    assert list(spread(dict.fromkeys(range(10), 1), 5)) == [0, 2, 4, 6, 8]
    assert list(spread({"a": 5, "b": 5}, 10)) == ["a", "b"] and list(spread({"a": 5}, 4)) == []


# --------------------------------------------------------------------------------------------------------- what it shows


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that a test file shares; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """A page that a browser shows, and the questions that tests ask of it."""

    def __init__(self, browser, path: Path):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.wait = browser, WebDriverWait(browser, 30, 0.05)
        browser.get(path.as_uri())
        self.wait.until(lambda _: self.js("return document.body.dataset.ready"))

    def js(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector)

    def click(self, selector: str, place: int = 0) -> None:
        self.js("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, place)

    def press(self, section: str, text: str) -> None:
        """The button of a section that says `text`."""
        place = self.texts(f"{section} button").index(text)
        self.click(f"{section} button", place)

    def keys(self, selector: str, *keys: str) -> None:
        from selenium.webdriver.common.by import By

        self.browser.find_element(By.CSS_SELECTOR, selector).send_keys(*keys)

    def hover(self, selector: str, place: int = 0) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By

        node = self.browser.find_elements(By.CSS_SELECTOR, selector)[place]
        ActionChains(self.browser).scroll_to_element(node).move_to_element(node).perform()

    def go(self, step: int) -> None:
        """Have the inspector show a step, by its slider."""
        self.js(
            "const slider = document.getElementById('step'); slider.value = arguments[0]; "
            "slider.dispatchEvent(new Event('input'))", step - 1
        )  # fmt: skip

    def resize(self, width: int) -> None:
        """Show the page on a screen of `width` pixels; one of less than 700 is touched. `reset` ends it."""
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 700}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 700})
        self.browser.refresh()
        self.wait.until(lambda _: self.js("return document.body.dataset.ready && document.querySelector('#charts svg')"))
        self.browser.execute_async_script("setTimeout(arguments[0], 300)")  # until everything is drawn at that width

    def reset(self) -> None:
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})

    def tap(self, selector: str, place: int = 0) -> None:
        """Touch the middle of an element."""
        x, y = self.js(
            "const node = document.querySelectorAll(arguments[0])[arguments[1]]; node.scrollIntoView({ block: 'center' });"
            "const at = node.getBoundingClientRect(); return [at.left + at.width / 2, at.top + at.height / 2]", selector, place
        )  # fmt: skip
        for kind, points in {"touchStart": [{"x": x, "y": y}], "touchEnd": []}.items():
            self.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def explanation(self) -> str | None:
        """The text of the box that explains a name; None while there is none."""
        return self.js("const box = document.getElementById('help'); return box.hidden ? null : box.textContent")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


def value(text: str) -> float:
    """The number at the end of a text, as the page spells it."""
    return float(text.split()[-1].replace("−", "-").replace("+", "").replace(",", ""))


@pytest.fixture
def shown(browser, run, evaluation):
    """The page of a whole run; no test may leave an error on its console."""
    path = run / "report.html"
    if not path.exists():
        path.write_text(render(read_page([run], evaluation, 64)), "utf-8")
    page = Page(browser, path)
    yield page
    assert page.errors() == []


def test_the_story_is_the_evaluations(shown):
    assert shown.text("#headline") == "49.4%→96.8%"
    assert "45.0–53.8% and 94.9–98.0%" in shown.text("header")
    assert "Alarm kl_explosion: at 1 step, first at 7" in shown.text("#notes")
    cells = shown.texts("#sessions tbody tr:last-child td")
    assert cells[:4] == ["2", "21–40", "1", "1"] and cells[4].startswith("96.8%94.9–98.0%") and cells[6].startswith("49.4%")


def test_the_numbers_of_a_group_are_the_saved_ones(shown):
    rewards, advantages = rewards_of("group")
    for step in (1, 2, 3, 40):
        shown.go(step)
        problem = 1 if step == SAVED[0] else 0  # the group with tokens comes first
        assert shown.text("#where") == f"step {step}"
        assert [value(text) for text in shown.texts(".completion .advantage")] == pytest.approx(
            advantages[step - 1, problem], rel=1e-3, abs=1e-4
        )
        totals = [math.nan if text == "no score" else value(text) for text in shown.texts(".completion .head b")]
        np.testing.assert_allclose(totals, rewards[step - 1, problem], rtol=1e-3)
        assert shown.text("#agrees").endswith("the same.") and "not the same" not in shown.text("#agrees")
    shown.go(5)
    shown.click("#problems button", 1)
    assert shown.texts(".completion .advantage") == ["A 0"] * G and shown.text("#maths").endswith("=0")  # not 1e-13
    shown.go(2)
    shown.click(".completion", 1)
    assert "no score" in shown.text("#maths") and "the same" in shown.text("#agrees")


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_the_formula_follows_the_runs_scale(browser, tmp_path, scale):
    """And says so when the saved advantage is another one."""
    folder = make_run(tmp_path / "run", scale)
    records = [json.loads(line) for line in (folder / "completions.jsonl").read_text("utf-8").split("\n")[:-1]]
    records[0]["advantage"] += 0.01
    write(folder / "completions.jsonl", records)
    (tmp_path / "page.html").write_text(render(read_page([folder], None, 64)), "utf-8")
    page = Page(browser, tmp_path / "page.html")
    assert "not the same" in page.text("#agrees")
    page.click(".completion", 1)
    assert page.text("#agrees").endswith(": the same.")
    assert ("std" in page.text("#maths")) == (scale == "batch")
    assert page.errors() == []


def test_tokens_show_what_the_loss_had(shown):
    record, losses = saved_tokens(rewards_of("group")[1])
    shown.press("#inspector", "◆ ▶")
    assert shown.text("#where") == f"step {SAVED[0]}" and shown.text("#question") == record["question"]
    for row in range(G):
        shown.click(".completion", row)
        assert shown.texts(".token") == [piece.replace("\n", "⏎\n") for piece in PIECES]
        assert value(shown.text("#loss b")) == pytest.approx(losses[row], rel=2e-3, abs=1e-6)
    row = next(row for row in record["completions"] if 0 < sum(row["clipped"]) < C)
    shown.click(".completion", row["row"])
    total = 0.0
    for t in range(C):
        shown.hover(".token", t)
        numbers = dict(zip(shown.texts("#token dt"), shown.texts("#token dd"), strict=True))
        assert numbers["token"] == f"{t}  {json.dumps(PIECES[t])}" and numbers["id"] == str(row["ids"][t])
        assert numbers["clipped"] == ("yes" if row["clipped"][t] else "no")
        for name, key in {"log π": "logprobs", "log π old": "old_logprobs", "log π ref": "ref_logprobs", "ratio ρ": "ratio",
                          "log π sampler": "sampler_logprobs", "k3": "kl", "weight w": "weight"}.items():  # fmt: skip
            assert value(numbers[name]) == pytest.approx(row[key][t], rel=1e-3), name
        total += value(numbers["w (β k3 − ν S)"])
        filled = shown.texts("#formulas b")  # d, k3, ρ, ν, S and the term, each from the others
        named = [numbers["k3"], numbers["ratio ρ"], numbers["ν"], numbers["S = min(ρA, clip(ρ)A)"], numbers["w (β k3 − ν S)"]]
        assert filled[1:] == named and value(filled[0]) == pytest.approx(row["ref_logprobs"][t] - row["logprobs"][t], rel=1e-3)
    assert total == pytest.approx(losses[row["row"]], rel=2e-3, abs=1e-6)
    for colouring in ("ratio", "KL", "clipped", "sampler − trainer", "loss term"):
        shown.press(".tokens-card", colouring)
        shades = shown.js("return [...document.querySelectorAll('.token')].map((token) => token.style.backgroundColor)")
        assert all(shades) and len(set(shades)) > 1


def test_arrows_walk_over_completions_problems_and_steps(shown):
    def place() -> tuple[str, int, int]:
        selected = "return [...document.querySelectorAll('{}')].findIndex((n) => n.getAttribute('{}') === 'true')"
        return (
            shown.text("#where"),
            shown.js(selected.format("#problems button", "aria-pressed")),
            shown.js(selected.format(".completion", "aria-selected")),
        )

    shown.keys("#inspector", "\ue014")  # right
    assert place() == ("step 1", 0, 1)
    shown.keys("#inspector", "\ue015", "\ue012")  # down, left
    assert place() == ("step 1", 1, G - 1)
    shown.keys("#inspector", "\ue00f")  # page down
    assert place() == ("step 2", 0, 0)
    shown.keys("#inspector", "n")
    assert place() == (f"step {SAVED[0]}", 1, 0)


def test_filters_search_and_order_of_all_completions(shown):
    rewards, _ = rewards_of("group")
    n = rewards.size

    def counted() -> int:
        return int(shown.text("#counted").split(" of ")[0].replace(",", ""))

    assert counted() == n and len(shown.texts("#list .row")) < 40  # of 320, only those in sight
    right = int((rewards > 20).sum())
    expected = {"right": right, "wrong": n - right, "format violated": n // 2, "truncated": n // G, "no score": 1}
    for name, count in expected.items():
        shown.press("#all", name)
        assert counted() == count, name
    shown.press("#all", "all")
    shown.keys("#search", "17 + 2")
    shown.wait.until(lambda _: counted() == Q)
    shown.keys("#list", "\ue015", "\ue015", "\ue007")  # down, down, enter
    assert shown.text("#where") == "step 17" and shown.text(".completion[aria-selected=true] .head")[0] == "2"
    shown.keys("#search", "\ue003" * 6)  # backspaces
    shown.wait.until(lambda _: counted() == n)
    shown.press("#all", "reward")
    first = [value(text) for text in shown.texts("#list .row > :nth-child(3)")]
    assert first == sorted(first, reverse=True) and first[0] == 30
    shown.js("document.getElementById('list').scrollTop = 1e9")
    shown.wait.until(lambda _: shown.texts("#list .row")[-1].count("–") >= 1)  # the one without a score is last


def test_hovering_over_a_curve_shows_its_values(shown):
    shown.wait.until(lambda _: shown.texts("#charts figcaption b") == ["reward", "accuracy"])
    assert shown.text("#charts .values") == "13.33"  # the last one, of step 40
    shown.hover("#charts svg")
    step = int(shown.text("#charts figcaption .soft").removeprefix("step "))
    assert 15 < step < 27 and value(shown.text("#charts .values")) == pytest.approx(step / 3, rel=1e-3)
    assert shown.texts("#charts .values")[1] == f"{step / 80:.1%}"  # in every chart at once
    shown.press("#curves", "All")
    assert shown.texts("#charts figcaption b") == ["reward", "accuracy", "loss"]


def test_votes_of_each_problem(shown):
    def counted() -> int:
        return int(shown.text("#counted-problems").split(" of ")[0])

    for comparison, counts in {"base → trained, greedy": (1, 1, 1, 1, 1), "trained, greedy → vote": (0, 0, 2, 2, 1)}.items():
        shown.press("#evaluation", comparison)
        for name, count in zip(("fixed", "broken", "both right", "both wrong", "hard cases"), counts, strict=True):
            shown.press("#evaluation", name)
            assert counted() == count, (comparison, name)
    shown.press("#evaluation", "all")
    shown.click("#votes .row", 1)
    assert shown.texts("#answers-trained .answers button") == ["greedy✓ 7", "T 0.5✓ 7", "T 1✗ 8"]
    shown.click("#answers-trained .answers button", 2)
    assert shown.text("#answers-trained > .code") == "<answer>8</answer>"


def test_markup_in_a_completion_is_text(shown, run, evaluation):
    source = (run / "report.html").read_text("utf-8")
    assert source.count("</script>") == 2 and "onerror" not in source and "\u2028" not in source
    assert shown.text(".completion .code") == MARKUP and MARKUP in shown.texts("#list .code")[0]
    shown.click("#votes .row", 3)
    assert MARKUP in shown.text("#problem .question")
    assert shown.js("return document.images.length + document.scripts.length") == 2
    assert "broken" not in shown.browser.title


def test_the_policy_lets_nothing_else_run_or_connect(shown):
    shown.js(
        "const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        "document.body.append(script); window.asked = fetch('https://example.com').then(() => 'connected', () => 'refused')"
    )
    assert shown.js("return window.ran") is None
    assert shown.browser.execute_async_script("window.asked.then(arguments[0])") == "refused"
    assert any("Content Security Policy" in message for message in shown.errors())  # and the console is empty again


def test_runs_without_most_files_and_several_runs(browser, run, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(run / name, folder)
        (tmp_path / "page.html").write_text(render(read_page([folder], None, 64)), "utf-8")
        page = Page(browser, tmp_path / "page.html")
        assert page.text("#headline") == {"config.json": "no step yet", "metrics.jsonl": "1.3%→50.0%"}[name]
        assert page.errors() == []
    (tmp_path / "page.html").write_text(render(read_page([run, tmp_path / "metrics.jsonl"], None, 64)), "utf-8")
    page = Page(browser, tmp_path / "page.html")
    page.wait.until(lambda _: page.texts("#charts .values")[:1] == ["13.3313.33"])
    assert page.texts("#sessions .bar + .card tbody td:first-child") == ["run", "metrics.jsonl (not finished)"]
    assert page.errors() == []


# ---------------------------------------------------------------------------------------------- screens, keys and touch

WIDTHS = 390, 768, 1280
# What lies outside the screen or overflows its box, as CSS names it. An ellipsis says that there is more: previews in lists.
CUT = """
const cut = [document.documentElement].filter((root) => root.scrollWidth > innerWidth).map(() => "the page");
for (const node of document.querySelectorAll("body *")) {
  const at = node.getBoundingClientRect();
  const preview = node.closest(".row > *, .row .marks");
  if (!at.width || preview || node.closest("svg, math") || node.matches("script, option")) continue;
  const overflows = node.clientWidth && node.scrollWidth > node.clientWidth + 1;
  if (at.left < -0.5 || at.right > innerWidth + 0.5 || overflows) {
    cut.push(`${node.tagName}.${node.className}#${node.id}: ${node.textContent.slice(0, 40)}`);
  }
}
for (const text of document.querySelectorAll("svg text, math")) {
  const at = text.getBoundingClientRect();
  const card = text.closest(".card, figure").getBoundingClientRect();
  if (at.width && (at.left < card.left - 1 || at.right > card.right + 1)) cut.push(`${text.tagName}: ${text.textContent}`);
}
return cut;
"""


def hard_run(folder: Path) -> Path:
    """A run whose every text is long: its name, problems, settings, completions, and eight sessions with retention."""
    make_run(folder / ("run-" + "x" * 90))
    (run,) = folder.iterdir()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(
        json.dumps(config | {"run_dir": "/a" * 90, "group_size": 16, "beta": 0.040000000000000036})
    )
    text = "<reasoning>" + "9" * 300 + "</reasoning><answer>" + "8 " * 90 + "</answer>"
    write(run / "completions.jsonl", [
        completion(step, "gsm8k-train-of-a-long-name.jsonl:" + "1" * 30, row, -1234.5 - row, -1.2345e-9) | {"text": text}
        for step in range(1, STEPS + 1) for row in range(16)
    ])  # fmt: skip
    figures = {"n": 500, "low": 0.999, "high": 1.0, "greedy": 1.0, "sampled": 1.0, "sampled_format": 1.0,
               "sampled_reward": -1234.5, "sampled_length": 12345.0}  # fmt: skip
    retention = {str(i): figures for i in range(1, 9)}
    write(run / "evaluations.jsonl", [{"step": i * 5, "accuracy": figures, "retention": retention} for i in range(9)])
    sessions = [
        {"session": i, "first_step": 5 * i - 4, "last_step": 5 * i, "new": ["p"] * 12000, "review": ["p"]} for i in range(1, 9)
    ]
    (run / "sessions.json").write_text(json.dumps(sessions))
    write(run / "metrics.jsonl", [
        {"step": s, "session": (s + 4) // 5, "reward": -1e6 * s, "accuracy": 1.0, "reward/before_resampling": 1e-9 * s,
         "rewards/a_component_of_a_very_long_name_of_somebody/mean": 1.0, "alarms": ["format_without_accuracy"]}
        for s in range(1, STEPS + 1)
    ])  # fmt: skip
    return run


def with_result(evaluation: Path, folder: Path) -> Path:
    """The evaluation with the figures that its two tables show."""
    copy = Path(shutil.copytree(evaluation, folder / "evaluation"))
    single = {"tagged": 1.0, "strict": 1.0, "flexible": 1.0, "low": 0.999, "high": 1.0}
    paired = {"fixed": 1234, "broke": 1234, "both_right": 1234, "both_wrong": 1234, "mcnemar_p": 1.2e-68, "gain": 0.1,
              "low": 0.05, "high": 0.15}  # fmt: skip
    model = {"greedy": single, "consensus": single, "agreement": 1.0, "tokens": 12345678, "paired": paired,
             "pass_at_k": [0.5, 1.0], "maj_at_k": [0.5, 1.0]}  # fmt: skip
    result = {"n": 5000, "models": {"base": model, "trained": model},
              "trained_against_base": {"greedy": paired, "consensus": paired}}  # fmt: skip
    (copy / "result.json").write_text(json.dumps(result))
    return copy


@pytest.fixture(scope="module")
def pages(run, evaluation, tmp_path_factory) -> dict[str, Path]:
    """An ordinary page, one whose every text is long, and one of several runs."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "hard").mkdir()
    hard, evaluated = hard_run(folder / "hard"), with_result(evaluation, folder)
    found = {"plain": ([run], evaluation), "hard": ([hard], evaluated), "several": ([run, hard], evaluated)}
    for name, (runs, of) in found.items():
        (folder / f"{name}.html").write_text(render(read_page(runs, of, 64)), "utf-8")
    return {name: folder / f"{name}.html" for name in found}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["plain", "hard", "several"])
def test_nothing_is_cut(browser, pages, name, width):
    page = Page(browser, pages[name])
    page.resize(width)
    try:
        assert page.js("return innerWidth") == width
        assert page.js(CUT) == []
        for button in ("Reward", "All"):
            page.press("#curves", button)
            assert page.js(CUT) == []
        page.click("#next-saved")
        page.js("document.querySelector('details').open = true")
        assert page.js(CUT) == []
        if name == "plain" and width == 1280:
            assert len(page.texts("#sessions thead th")) == 8
        assert page.texts("#sessions .stack") or page.texts("#sessions table")
        named = "return [...document.querySelectorAll('#sessions .term')].map((node) => node.textContent)"
        assert {"held out before", "group_size"} <= set(page.js(named)) or name != "several"
        assert page.errors() == []
    finally:
        page.reset()


def test_the_table_of_four_sessions_fits_1280(browser, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    figures = {"n": 500, "low": 0.987, "high": 0.998, "greedy": 0.996, "sampled": 0.984}
    retention = {str(i): figures for i in range(1, 5)}
    write(copy / "evaluations.jsonl", [{"step": i * 10, "accuracy": figures, "retention": retention} for i in range(5)])
    sessions = [
        {"session": i, "first_step": 10 * i - 9, "last_step": 10 * i, "new": ["p"] * 7473, "review": []} for i in range(1, 5)
    ]
    (copy / "sessions.json").write_text(json.dumps(sessions))
    (tmp_path / "page.html").write_text(render(read_page([copy], None, 64)), "utf-8")
    page = Page(browser, tmp_path / "page.html")
    try:
        page.resize(1280)
        assert len(page.texts("#sessions th")) == 10 and len(page.texts("#sessions td")) == 50
        assert page.js(CUT) == []
    finally:
        page.reset()


def test_a_narrow_table_says_what_the_wide_one_says(shown):
    wide = [cell for cell in shown.texts("#sessions td") if cell]
    titles = shown.texts("#sessions th")
    try:
        shown.resize(390)
        assert shown.texts("#sessions td") == [] and shown.texts("#sessions dd") == wide
        assert shown.texts("#sessions .stack:last-of-type dt") == titles
    finally:
        shown.reset()


@pytest.mark.parametrize("width", WIDTHS)
def test_names_explain_themselves_under_pointer_touch_and_focus(shown, width):
    try:
        shown.resize(width)
        shown.click("#next-saved")
        for name, words in {
            "k3": "KL divergence",
            "ν": "importance sampling",
            "ratio ρ": "π old",
            "weight w": "weight",
        }.items():
            place = shown.texts("#token dt").index(name)
            assert shown.js("return document.querySelectorAll('#token dt')[arguments[0]].querySelector('.term')", place), name
            at = shown.texts("#token .term").index(name)
            if width < 700:
                shown.tap("#token .term", at)
            else:
                shown.hover("#token .term", at)
            shown.wait.until(lambda _, words=words: words in (shown.explanation() or ""))
            assert shown.js(CUT) == [], name
        if width < 700:
            shown.tap("#loss")
        else:  # of a name that the wheel brings under a pointer at rest, too
            shown.hover("#token .term", 0)
            first = shown.wait.until(lambda _: shown.explanation())
            lower = "const [a, b] = [...document.querySelectorAll('#token dt .term')].map((x) => x.getBoundingClientRect());"
            shown.js(lower + "scrollBy(0, b.top - a.top)")
            shown.wait.until(lambda _: shown.explanation() not in (first, None))
            shown.hover("#loss")
        shown.wait.until(lambda _: shown.explanation() is None)
        shown.keys("#charts .term", "\ue004")  # tab: from the first name to the next one
        shown.browser.execute_async_script("setTimeout(arguments[0], 300)")  # the page scrolled under a pointer at rest
        assert "greedy answers" in shown.explanation()
        assert shown.js("return document.activeElement.textContent") == "accuracy"
        shown.keys("#charts figure:nth-child(2) .term", "\ue00c")  # escape
        assert shown.explanation() is None
        shown.keys("#charts figure:nth-child(2) .term", "\ue007")  # enter
        assert "greedy answers" in shown.explanation()
    finally:
        shown.reset()


def test_every_metric_of_a_step_has_a_meaning(shown):
    functions = step_metrics, rollout_metrics, accuracy_metrics, token_stats, kept_by_rounding
    sources = "".join(inspect.getsource(getattr(function, "__wrapped__", function)) for function in functions)
    names = {*re.findall(r'"([a-z_]+(?:/[a-z0-9_]+)*)"(?:\]? =|:)', sources), "loss", "grad_norm", "bad_updates", "compiles"}
    assert {"reward", "kl/k3", "lora/kept/sampler", "hbm_peak", "accuracy/strict"} <= names
    names |= {f"time/{phase}" for phase in ("prefill", "decode", "reward", "reference", "update", "step")} | {"rewards/x/mean"}
    assert [name for name in sorted(names) if not shown.js("return meaning(arguments[0])", name)] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_keys_work_as_the_page_says(shown, width):
    """From the link in the head of the page, without a pointer."""
    try:
        shown.resize(width)
        assert shown.texts("#inspector kbd") == ["←", "→", "↑", "↓", "PgUp", "PgDn", "p", "n"]
        shown.keys("nav a[href='#inspector']", "\ue007")
        shown.wait.until(lambda _: shown.js("return document.activeElement.id") == "inspector")
        shown.keys("#inspector", "n")
        assert shown.text("#where") == f"step {SAVED[0]}"
        shown.keys("#inspector", "\ue014")  # right
        assert shown.text(".completion[aria-selected=true] .head")[0] == "1"
        shown.keys("#inspector", "\ue00e")  # page up
        assert shown.text("#where") == f"step {SAVED[0] - 1}"
        shown.keys("#step", "\ue014", "\ue014")  # the slider's own arrow
        assert shown.text("#where") == f"step {SAVED[0] + 1}"
        shown.keys("#step", "p")
        assert shown.text("#where") == f"step {SAVED[0]}"
        shown.keys("#tokens", "\ue014", "\ue014")
        assert shown.texts("#token dd")[0] == f"2  {json.dumps(PIECES[2])}"
        shown.keys("#list", "\ue015", "\ue00f", "\ue007")  # down, page down, enter
        assert shown.text(".completion[aria-selected=true] .head")[0] == str(12 % G)
        shown.keys("#votes", "\ue015", "\ue015", "\ue007")
        assert "problem e1" in shown.text("#problem")
    finally:
        shown.reset()
