"""The README, the pages and the notebooks of docs/ are true: examples run, command lines parse, and what they name exists.

A Python block that begins with `# NAME.py` is a file, and the page's examples run next to it. Words in capitals stand for
values of the reader.
"""

import argparse
import doctest
import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from make_notebooks import WORDS, execute, make

from grpo import loss
from grpo.errors import ConfigError
from grpo.runs import flags as command_line

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
PACKAGES = ("grpo", "models", "data")
SOURCES = [path for package in (*PACKAGES, "scripts") for path in sorted((ROOT / package).rglob("*.py"))]
SOURCE = "\n".join(path.read_text() for path in SOURCES)

FENCE = re.compile(r"^```(\w*)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
VALUES = {"MODEL": "gemma2-2b", "N": "2", "I": "1", "A": "64"}  # where a script reads more than text
SETTINGS = {  # the same for {NAME} in a notebook
    "PRESET": "gemma2-2b-lora", "MODEL": "DIR", "DATA": "FILE", "RUN": "DIR", "SESSION": "2", "HOURS": "6", "WORK": "DIR",
    "relay": "--relay_from DIR", "test": "--data FILE", "FLAGS": WORDS["gpu"]["flags"],
}  # fmt: skip


def text_of(page: Path) -> str:
    """A page, or a notebook with its code as blocks of the text."""
    if page.suffix == ".md":
        return page.read_text()
    cells = nbformat.read(page, as_version=4).cells
    text = "\n".join(f"```\n{cell.source}\n```" if cell.cell_type == "code" else cell.source for cell in cells)
    return re.sub(r"\{(\w+)\}", lambda name: SETTINGS.get(name[1], name[0]), text)


def files(text: str) -> dict[str, str]:
    """The files that a page shows whole, by name."""
    return {name[1]: block for _, block in BLOCK.findall(text) if (name := re.match(r"# (\w+\.py)\n", block))}


FILES = {path.name for path in [*SOURCES, *ROOT.glob("tests/*.py")]}.union(*(files(page.read_text()) for page in PAGES))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
texts = pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)


@pages
def test_every_block_is_closed(page):
    fences = [match[1] for match in FENCE.finditer(page.read_text("utf-8"))]
    assert len(fences) % 2 == 0 and not any(fences[1::2])


@pages
def test_examples_give_what_they_show(page, tmp_path, monkeypatch, quick_to_compile):
    text = page.read_text()
    for name, code in files(text).items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)  # as on a laptop
    result = doctest.testfile(str(page), module_relative=False, globs={"__name__": "example"})
    assert result.failed == 0
    assert result.attempted == text.count("\n>>> ")


def test_the_loss_of_the_readme_is_the_loss():
    block = next(block for kind, block in BLOCK.findall((ROOT / "README.md").read_text()) if block.startswith("def loss("))
    names: dict[str, Any] = {"jnp": jnp}
    exec(block, names)
    rng = np.random.default_rng(0)
    new, old, ref = (jnp.asarray(np.log(rng.uniform(0.3, 0.9, (6, 5))), jnp.float32) for _ in range(3))
    advantages = jnp.asarray(rng.normal(size=6), jnp.float32)
    for aggregation in (loss.grpo_weights, loss.dapo_weights, loss.dr_grpo_weights):
        weights = aggregation(jnp.asarray(rng.integers(0, 2, (6, 5)), jnp.float32))
        expected, terms = loss.grpo_loss(new, old, ref, advantages, weights)
        assert abs(float(names["loss"](new, old, ref, advantages, weights) - expected)) < 1e-6
        assert terms["clipped_high"].any() and terms["clipped_low"].any()


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1500 and text.count("\n") <= 150


# ------------------------------------------------------------------------------------------------------------ command lines


class Parsed(Exception):
    """A script has read its command line, and would begin."""


def parse_only(script: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main(argv)` of a script does up to the end of parsing. SystemExit or ConfigError when it would complain."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module(script)

    def stop_after(parse: Callable) -> Callable:
        def stop(*arguments: Any, **named: Any):
            parse(*arguments, **named)
            raise Parsed

        return stop

    with monkeypatch.context() as patch:
        if hasattr(module, "parse"):
            patch.setattr(module, "parse", stop_after(command_line.parse))
        else:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
            patch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(Parsed):
            module.main(argv)


def words(line: str) -> list[str]:
    """A shell line up to its comment; `&&` and the like are words of their own."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return [VALUES.get(word, word) for word in lexer]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(script, arguments) of every `python scripts/NAME.py ...`, in blocks, in the text and inside quotes."""
    blocks = [block for kind, block in BLOCK.findall(text) if kind != "python"]
    lines = re.sub(r" *\\\n *", " ", "\n".join(blocks)).splitlines() + CODE.findall(BLOCK.sub("", text))
    for line in lines:
        while quoted := re.search(r"""--command=(["'])(.*?python scripts/.*?)\1""", line):  # what runs on another machine
            yield from commands("```\n" + quoted[2] + "\n```")
            line = line.replace(quoted[0], "")
        if "python scripts/" not in line:
            continue
        rest = words(re.split(" {3,}", line.strip())[0].removeprefix("!"))
        while "python" in rest:
            script, *rest = rest[rest.index("python") + 1 :]
            end = next((i for i, word in enumerate(rest) if word and set(word) <= set("();<>|&")), len(rest))
            yield script, rest[:end]
            rest = rest[end:]


FOUND = [(page.name, *command) for page in [*PAGES, *NOTEBOOKS] for command in commands(text_of(page))]


@pytest.mark.parametrize("page,script,argv", FOUND, ids=lambda x: x if isinstance(x, str) else " ".join(x) or "-")
def test_a_command_line_is_one_that_the_script_takes(page, script, argv, monkeypatch):
    assert (ROOT / script).is_file()
    parse_only(Path(script).stem, argv, monkeypatch)


def test_command_lines_are_found():
    assert len(FOUND) > 40
    text = "`python scripts/a.py --x 1`\n\n```\npip install . && python scripts/b.py \\\n  --y # why\n"
    text += "gcloud ssh --command='cd x && python scripts/c.py 2>&1'\n!python scripts/d.py z\n```\n"
    found = [("scripts/b.py", ["--y"]), ("scripts/c.py", ["2"]), ("scripts/d.py", ["z"]), ("scripts/a.py", ["--x", "1"])]
    assert list(commands(text)) == found


@pytest.mark.parametrize("line", ["train.py --max_new_token 8", "train.py --remat half", "plan.py tiny --beta -1"])
def test_a_wrong_command_line_is_noticed(line, monkeypatch):
    script, *argv = line.split()
    with pytest.raises((SystemExit, ConfigError)):
        parse_only(Path(script).stem, argv, monkeypatch)


# ---------------------------------------------------------------------------------------------------------- what is named


@cache
def flags(script: str) -> set[str]:
    """The flags that a script names in its help."""
    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []

        def look(parser: argparse.ArgumentParser, *_) -> None:
            seen.append(parser.format_help())
            raise Parsed

        patch.setattr(argparse.ArgumentParser, "parse_known_args", look)
        parse_only(script, [], patch)
    return set(re.findall(r"^ +(?:-h, )?(--\w+)", seen[0], re.MULTILINE))


def known_flag(code: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether some script has the flags in `--remat full`, and takes their values."""
    given = words(code)
    names = {word for word in given if word.startswith("--")}
    for script in SCRIPTS:
        if names <= flags(script):
            try:
                if len(given) > 1:
                    parse_only(script, given, monkeypatch)
            except SystemExit:
                continue
            except ConfigError:  # it knows them, and misses others
                pass
            return True
    return False


def resolves(name: str) -> bool:
    """`grpo.loss.grpo_loss`, or a method of a class there."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def wrong(code: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is wrong with a piece of code in a text; empty when nothing is, or when it is none of ours."""
    if re.match(r"--\w", code):
        return "" if known_flag(code, monkeypatch) else "no script takes it"
    if re.fullmatch(r"(grpo|models|data|scripts|tests|docs)/[\w./-]*", code):
        return "" if (ROOT / code).exists() else "no such file"
    if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", code):
        return "" if resolves(code) else "no such name"
    if re.fullmatch(r"\w+\.py", code):
        return "" if code in FILES else "no such file"
    if re.fullmatch(r"(\w+/)*[a-z0-9]+(_\w+)+(/\w+)*|(kl|ratio|clip|time|format|accuracy|advantage|rewards|entropy)/\w+", code):
        name = re.escape(code.removesuffix("/mean").removesuffix("/std") if code.startswith("rewards/") else code)
        timed = f'@phase("{code.removeprefix("time/")}")' in SOURCE  # its seconds are a metric, `time/` and the phase's name
        return "" if timed or re.search(rf"(?<![\w/]){name}(?![\w/])", SOURCE) else "it occurs nowhere in the code"
    return ""


@texts
def test_what_is_named_exists(page, monkeypatch):
    faults = {code: fault for code in CODE.findall(BLOCK.sub("", text_of(page))) if (fault := wrong(code, monkeypatch))}
    assert faults == {}


@pytest.mark.parametrize(
    "code",
    ["--max_new_token", "--remat half", "grpo/losses.py", "grpo.loss.gspo_loss", "losses.py", "frac_reward_zero", "kl/k4"],
)
def test_what_does_not_exist_is_noticed(code, monkeypatch):
    assert wrong(code, monkeypatch)


@texts
def test_links_lead_somewhere(page):
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for path, anchor in LINK.findall(BLOCK.sub("", text_of(page))):
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


@texts
def test_extras_that_are_installed_exist(page):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for named in re.findall(r"\.\[([\w,]+)\]", text_of(page)):
        assert set(named.split(",")) <= set(setup["options.extras_require"]), named


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert {path for path, _ in LINK.findall(index)} >= {page.name for page in [*PAGES[1:], *NOTEBOOKS]} - {"README.md"}


# ---------------------------------------------------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("name", WORDS)
def test_a_notebook_is_what_its_text_makes(name):
    written, made = nbformat.read(ROOT / "docs" / f"{name}.ipynb", as_version=4), make(name)
    assert [(cell.cell_type, cell.id, cell.source) for cell in written.cells] == [
        (cell.cell_type, cell.id, cell.source) for cell in made.cells
    ]


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.output_type for output in outputs].count("display_data") == 3  # two pictures and the page
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_notebook_of_kaggle_shows_a_whole_run():
    path = ROOT / "docs" / "kaggle.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 1e6
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    text = printed(notebook)
    assert "step 20/20 " in text and "consensus of 5" in text and "SESSION = 2" in text
    assert not re.search(r"error|warning|(^|\s)/\w", text)  # nor a path of the machine


@pytest.mark.long
def test_notebooks_run_and_one_session_continues_the_other(tmp_path):
    previous, small = "", "--new_problems 16 --max_steps 2 --prompts_per_step 4 --group_size 2 --eval_problems 8"
    for session, name in ((1, "kaggle"), (2, "gpu")):
        notebook = make(name)
        settings = {
            "SESSION = 1 ": f"SESSION = {session} ",
            'PREVIOUS = ""': f'PREVIOUS = "{previous}"',
            'FLAGS = "': f'FLAGS = "{small} ',
        }
        for old, new in settings.items():
            assert notebook.cells[1].source.count(old) == 1
            notebook.cells[1].source = notebook.cells[1].source.replace(old, new)
        text = printed(execute(notebook, tmp_path / name))
        assert f"SESSION = {session + 1}" in text and not re.search("error|warning", text)
        previous = tmp_path / name / "runs" / f"session{session}"
        result = json.loads((previous / "result.json").read_text())
        assert (result["steps"], result["finished"], len(result["sessions"])) == (2 * session, True, session)
    steps = [json.loads(line)["step"] for line in (previous / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
