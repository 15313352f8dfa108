"""Faults of problems and completions, by their numbers: data files, hostile text, numerals.

A mistake of the user's ends in one line on stderr and exit code 2, before anything is trained on what is left.
"""

import json
import random
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from faults import make_config, mistake
from training import devices

import grpo.runs.setup
import grpo.runs.trainer
import grpo.step
from data.problems import Problem, load_problems
from grpo.config import Config
from grpo.reward import accuracies, extract_answer, format_checks, score
from grpo.runs.console import describe_plan


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return make_config(tmp_path_factory.mktemp("faults"))


def test_fault_21_prompt_too_long(config, tmp_path, capsys):
    """Dropped whole, counted and named before the run starts; when none is left, that is an error."""
    text = Path(config.data).read_text()
    long = json.dumps({"question": "How many? " + "x" * 200, "answer": "#### 1"}) + "\n"
    path = tmp_path / "mixed.jsonl"
    path.write_text(text.replace("\n", "\n" + long, 1))
    with devices(1):
        prepared = grpo.runs.setup.prepare(replace(config, data=str(path)))
    assert [problem.id for problem in prepared.dropped] == ["mixed.jsonl:2"]
    assert "1 too long and dropped (mixed.jsonl:2)\n" in describe_plan(prepared)
    assert len(prepared.problems) == 8 and max(map(len, prepared.prompt_ids)) <= config.max_prompt_tokens
    path.write_text(long)
    assert "none of 1 prompts fits in 128 tokens" in mistake(capsys, config, data=path)


def record(answer: object, question: object = "How many?") -> bytes:
    return json.dumps({"question": question, "answer": answer}).encode()


BAD_LINES = {
    "bad JSON": (b'{"question": ', "not JSON"),
    "nested": (b"[" * 100_000, "nested too deep"),
    "not UTF-8": (b'{"question": "\xff", "answer": "1"}', "not UTF-8 text at byte"),
    "half a character": (b'{"question": "\\ud83d", "answer": "1"}', "must be UTF-8 text"),
    "missing key": (b'{"question": "How many?"}', 'no key "answer"'),
    "two lines": (record("it is 72\nor so"), "no short text of one line"),
    "two marks": (record("#### 1\n#### 1"), 'has 2 "####", must have one'),
    "no answer": (record("#### ?"), "'?' is not an answer"),
    "underscore": (record("#### 1_000"), "is not a number"),
    "other digits": (record("#### ٣"), "is not a number"),
    "infinite": (b'{"question": "How many?", "answer": Infinity}', "is not a number"),
    "5,000 digits": (b'{"question": "How many?", "answer": ' + b"9" * 5000 + b"}", "digits"),
    "10 MB": (record("#### 1", "x" * 10_000_000), "at most 1000000 are read"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_fault_22_bad_data_lines(config, tmp_path, capsys, line, reason):
    """A bad line is named by file and number, and nothing is trained on what is left."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([record("#### 1"), line, record("#### 2")]))
    error = mistake(capsys, config, data=path)
    assert error.startswith(f"{path}:2: ") and reason in error and len(error) < 400


def test_fault_22_many_bad_lines_and_none(config, tmp_path, capsys):
    """The first five are named and the others counted; an empty file is an error; what cannot be read is named."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{\n" * 8)
    error = mistake(capsys, config, data=path)
    assert error.count(f"{path}:") == 5 and error.endswith("and 3 more bad records")
    for content in (b"", b"\n\n", b"\r\n"):
        path.write_bytes(content)
        assert "holds no problems" in mistake(capsys, config, data=path)
    assert "does not exist" in mistake(capsys, config, data=tmp_path / "none.jsonl")
    assert "must be a .jsonl file" in mistake(capsys, config, data=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file whose reading fails")
def test_fault_22_data_that_cannot_be_read(config, tmp_path, capsys):
    """A disk that fails while the file is read."""
    path = tmp_path / "x.jsonl"
    path.symlink_to("/proc/self/mem")
    assert mistake(capsys, config, data=path) == f'data file "{path}" cannot be read: Input/output error'


def test_fault_22_byte_order_mark_and_crlf(tmp_path):
    """As editors on Windows write: not an error, and not a character of the question."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + record("#### 1") + b"\r\n" + record("#### 2") + b"\r\n")
    assert [(p.question, p.answer) for p in load_problems(str(path))] == [("How many?", "1"), ("How many?", "2")]


UNITS = [
    "<answer>", "</answer>", "<reasoning>", "</reasoning>", "<answer>18</answer>", "<answer></answer>", "<answer>1</answer",
    "<reasoning><answer>", "</answer></reasoning>", "<<answer>>", "</answer", "\n", " ", "9", "1,234", "-18.5e9 ", "1+ ",
    "1 + 1 = 2 ", "½²٣３१२", "😀−×÷", "\\boxed{", "**18**", "= ", "$1.0 %", "eighteen-and/half ",
]  # fmt: skip
PLACES = [
    "{}",
    "<reasoning>{}</reasoning><answer>18</answer>",
    "<reasoning>5 + 13 = 18</reasoning><answer>{}</answer>",
    "<answer>{}",
]


def adversarial(size: int) -> list[str]:
    """A hundred completions of about `size` characters: 25 units, repeated bare, in the reasoning, as the answer, unclosed."""
    return [place.format(unit * (size // len(unit))) for unit in UNITS for place in PLACES]


def judge_seconds(text: str, bound: float) -> float:
    """CPU time of all that reads a completion, the best of three, or of twenty above the bound: a busy machine adds to it."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 20 and min(times) >= bound):
        start = time.process_time()
        score(text, Problem("x", "How many?", "18"))
        accuracies(text, "18")
        format_checks(text)
        times.append(time.process_time() - start)
    return min(times)


def test_fault_23_adversarial_completions_take_linear_time():
    """A hundred of them: under 10 ms per 100 kB each, and ten times the text takes about ten times as long."""
    small, large = adversarial(100_000), adversarial(1_000_000)
    assert len(small) == len(large) == 100
    for text, longer in zip(small, large, strict=True):
        bound = 0.010 * max(len(text.encode()) / 100_000, 1)
        one = judge_seconds(text, bound)
        assert one < bound, text[:60]
        assert judge_seconds(longer, 15 * one + 0.001) < 15 * one + 0.001, text[:60]  # 100 times if a step were quadratic


@pytest.mark.parametrize("size", [3_000, 100_000])
def test_fault_23_random_tags_and_signs_are_judged_alike(size):
    """Random completions raise nothing, stay within the reward's bounds, and the readings agree with each other."""
    rng = random.Random(size)
    for _ in range(30):
        text = "".join(rng.choices(UNITS, k=size // 8))
        by_name, total = score(text, Problem("x", "How many?", "18"))
        assert -15 <= total == sum(by_name.values()) <= 30
        assert accuracies(text, "18")["tagged"] == (by_name["correct"] > 0)


@pytest.mark.parametrize(
    "text", ["1e999999", "9" * 1_000_000, "1." + "0" * 100_000, "9**9**9", "1/0", "nan", "inf", "-inf", "1e9"]
)
def test_fault_24_giant_numbers_are_no_answers(text):
    """Not a match, and in under a millisecond: nothing is evaluated, nothing long converted."""
    completion = f"<reasoning>1 + 1</reasoning><answer>{text}</answer>"
    times = []
    for _ in range(3):
        start = time.process_time()
        assert extract_answer(completion) is None
        times.append(time.process_time() - start)
    assert min(times) < 0.001 * max(len(text) / 100_000, 1)
    assert score(completion, Problem("x", "How many?", "18")).components["correct"] == 0


NUMBERS = {
    "72": "72", "72.": "72", "72.0": "72", "072": "72", "$72": "72", "72%": "72", "72 apples": "72", "1,234": "1234", 
    "+72": "72",
    "−72": "-72", "-72": "-72", "$1,234.50": "1234.50", "٣": None, "３": None, "१२": None, "²": None, "7²": None, "1_000": None,
    "1，234": None, "1,23": None, "12,34": None, ".5": None, "72.5.1": None, "18 or 72": None, "0x48": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "number"), NUMBERS.items(), ids=ascii)
def test_fault_25_which_numerals_count(text, number):
    """ASCII numerals with signs and units do; other alphabets' digits, underscores and broken thousands do not."""
    assert extract_answer(f"<answer>{text}</answer>") == (None if number is None else Decimal(number))
