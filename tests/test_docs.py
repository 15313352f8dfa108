"""The README and the pages of docs/ are true: examples run, command lines parse, and what they name exists.

A Python block that begins with `# NAME.py` is a file, and the page's examples run next to it. Words in capitals stand for
values of the reader.
"""

import argparse
import doctest
import importlib
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
import numpy as np
import pytest

from grpo import loss
from grpo.errors import ConfigError
from grpo.runs import flags as command_line

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
PACKAGES = ("grpo", "models", "data")
SOURCES = [path for package in (*PACKAGES, "scripts") for path in sorted((ROOT / package).rglob("*.py"))]
SOURCE = "\n".join(path.read_text() for path in SOURCES)

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
VALUES = {"MODEL": "gemma2-2b", "N": "2", "I": "1", "A": "64"}  # where a script reads more than text


def files(text: str) -> dict[str, str]:
    """The files that a page shows whole, by name."""
    return {name[1]: block for _, block in BLOCK.findall(text) if (name := re.match(r"# (\w+\.py)\n", block))}


FILES = {path.name for path in [*SOURCES, *ROOT.glob("tests/*.py")]}.union(*(files(page.read_text()) for page in PAGES))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


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
        rest = words(re.split(" {3,}", line)[0].removeprefix("!"))
        while "python" in rest:
            script, *rest = rest[rest.index("python") + 1 :]
            end = next((i for i, word in enumerate(rest) if word and set(word) <= set("();<>|&")), len(rest))
            yield script, rest[:end]
            rest = rest[end:]


FOUND = [(page.name, *command) for page in PAGES for command in commands(page.read_text())]


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


@pages
def test_what_is_named_exists(page, monkeypatch):
    faults = {code: fault for code in CODE.findall(BLOCK.sub("", page.read_text())) if (fault := wrong(code, monkeypatch))}
    assert faults == {}


@pytest.mark.parametrize(
    "code",
    ["--max_new_token", "--remat half", "grpo/losses.py", "grpo.loss.gspo_loss", "losses.py", "frac_reward_zero", "kl/k4"],
)
def test_what_does_not_exist_is_noticed(code, monkeypatch):
    assert wrong(code, monkeypatch)


@pages
def test_links_lead_somewhere(page):
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for path, anchor in LINK.findall(BLOCK.sub("", page.read_text())):
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


@pages
def test_extras_that_are_installed_exist(page):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for named in re.findall(r"\.\[([\w,]+)\]", page.read_text()):
        assert set(named.split(",")) <= set(setup["options.extras_require"]), named


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert {path for path, _ in LINK.findall(index)} >= {page.name for page in PAGES[1:] if page.name != "README.md"}
