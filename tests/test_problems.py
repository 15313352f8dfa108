"""Laws of data/problems.py: good records come through whole, bad ones are named by their line."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import DataError
from data.datasets import choose_problems
from data.problems import Problem, Reading, load_problems, split_problems
from grpo.config import Config

TRAIN = Path(__file__).parents[2] / "shared/data/gsm8k_train.jsonl"
GOOD = '{"question": "How many?", "answer": "48+24 = 72\\n#### 72"}'


def write(path: Path, *lines: str | bytes) -> str:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return str(path)


def record(answer: object, question: object = "How many?") -> str:
    return json.dumps({"question": question, "answer": answer})


def fault(tmp_path: Path, *lines: str | bytes) -> str:
    with pytest.raises(DataError, match=r"x\.jsonl") as error:
        load_problems(write(tmp_path / "x.jsonl", *lines))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_record_becomes_question_number_and_solution(tmp_path):
    assert load_problems(write(tmp_path / "x.jsonl", GOOD)) == [Problem("x.jsonl:1", "How many?", "72", "48+24 = 72")]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("#### 1,234,567", "1234567"),
        ("so\n#### -3", "-3"),
        ("####0", "0"),
        ("#### 2.50", "2.50"),
        ("72", "72"),
        ("1,000", "1000"),
        (72, "72"),
        (-0.5, "-0.5"),
    ],
)
def test_the_gold_number_loses_only_its_commas(tmp_path, answer, gold):
    (problem,) = load_problems(write(tmp_path / "x.jsonl", record(answer)))
    assert problem.answer == gold


@pytest.mark.parametrize("gold", ["B", "Paris", "New York", "World War 2", "18 dollars", "12:30", "2024-01-02", "C++", "да"])
def test_a_gold_may_be_a_choice_a_word_or_a_short_phrase(tmp_path, gold):
    for answer, solution in ((gold, ""), (f"because\n#### {gold}", "because")):
        (problem,) = load_problems(write(tmp_path / "x.jsonl", record(f" {answer} ")))
        assert (problem.answer, problem.solution) == (gold, solution)


def test_other_columns_stay_as_they_are(tmp_path):
    line = {"question": "Q?", "answer": "B", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "level": 3, "none": None}
    (problem,) = load_problems(write(tmp_path / "x.jsonl", json.dumps(line)))
    assert problem.columns == {name: line[name] for name in ("choices", "level", "none")}
    message = fault(tmp_path, '{"question": "Q?", "answer": "B", "note": "\\ud83d"}')
    assert "half a character" in message


def test_keys_and_a_pattern_read_other_files(tmp_path):
    lines = [{"problem": "Q?", "target": "We add. \\boxed{7}"}, {"problem": "P?", "target": "So \\boxed{New York}."}]
    path = write(tmp_path / "x.jsonl", *map(json.dumps, lines))
    reading = Reading("problem", "target", r"\\boxed\{([^{}]*)\}")
    found = load_problems(path, reading=reading)
    assert [(p.question, p.answer, p.solution) for p in found] == [("Q?", "7", "We add."), ("P?", "New York", "So")]
    assert found[0].columns == lines[0]
    for pattern, answer, reason in (
        ("[0-9]+", "none", "finds nothing in answer 'none'"),
        ("[0-9]", "1 or 2", "finds 2 different texts in answer '1 or 2'"),
    ):
        path = write(tmp_path / "x.jsonl", record(answer))
        with pytest.raises(DataError, match=re.escape(reason)):
            load_problems(path, reading=Reading(answer_pattern=pattern))
    assert (
        load_problems(write(tmp_path / "x.jsonl", record("1 is 1")), reading=Reading(answer_pattern="[0-9]"))[0].answer == "1"
    )
    with pytest.raises(DataError, match="is no regular expression: missing"):
        load_problems(path, reading=Reading(answer_pattern="("))


def test_answers_may_be_missing_where_the_reader_says_so(tmp_path):
    lines = ['{"question": "Q?"}', '{"question": "Q?", "answer": null}', '{"question": "Q?", "answer": " "}', GOOD]
    path = write(tmp_path / "x.jsonl", *lines[:2], record(""), GOOD)
    assert [p.answer for p in load_problems(path, reading=Reading(optional=True))] == ["", "", "", "72"]
    with pytest.raises(DataError, match=r'x\.jsonl:1: no key "target"; there are question; give --answer_key'):
        load_problems(path, reading=Reading(answer_key="target", optional=True))


@pytest.mark.parametrize(
    "text",
    [f"[{GOOD}, {GOOD}]", f'{{"version": 1, "data": [{GOOD}, {GOOD}]}}', f"{GOOD}\n{GOOD}\n", f"\ufeff[\n{GOOD},{GOOD}]"],
    ids=["list", "list in an object", "lines", "byte order mark"],
)
def test_a_json_file_is_a_list_of_records_or_has_one_a_line(tmp_path, text):
    found = load_problems(write(tmp_path / "x.json", text))
    assert [p.answer for p in found] == ["72", "72"] and found[1].id == "x.json:2"


@pytest.mark.parametrize(
    ("text", "reason"), [("[{]", "is not JSON at line 1, column 3"), ("3", "must hold a list of records"), ("[3]", "no key")]
)
def test_a_bad_json_file_is_one_line(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason) as error:
        load_problems(write(tmp_path / "x.json", text))
    assert "\n" not in str(error.value)


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(tmp_path):
    text = b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n\n" + GOOD.encode()
    first, second = load_problems(write(tmp_path / "x.jsonl", text))
    assert (first.question, first.answer, first.solution) == ("How many?", "72", "48+24 = 72")
    assert (second.id, second.question) == ("x.jsonl:4", "How many?")


def test_a_unicode_line_separator_inside_a_question_does_not_end_the_line(tmp_path):
    (problem,) = load_problems(write(tmp_path / "x.jsonl", '{"question": "a\u2028b", "answer": "#### 1"}'))
    assert problem.question == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deep"),
        (b'{"question": "\xff", "answer": "1"}', "not UTF-8"),
        ('{"question": "\\ud83d", "answer": "1"}', "must be UTF-8 text"),
        ('["How many?", "#### 1"]', 'no key "question"'),
        ('{"answer": "#### 1", "id": 3}', 'no key "question"; there are answer, id; give --question_key'),
        ('{"question": "How many?"}', 'no key "answer"; there are question; give --answer_key'),
        (record("#### 1", question="  "), "question is empty"),
        (record("#### 1", question=7), "must be UTF-8 text"),
        (record(None), "must be UTF-8 text"),
        (record(True), "must be UTF-8 text"),
        (record("so it is 18.\nIt is 18."), "no short text of one line"),
        (record("It is " + "very " * 50), "no short text of one line"),
        (record(""), "is not an answer"),
        (record("..."), "is not an answer"),
        (record("nan"), "is not an answer"),
        (record("#### x"), "is not an answer"),
        (record("$1,23"), "is not a number"),
        (record("0x10 = 16\n#### 1 000"), "is not a number"),
        (record("#### 1\n#### 1"), '2 "####"'),
        (record("#### "), "is not an answer"),
        (record("#### 1,23"), "is not a number"),
        (record("#### 1_000"), "is not a number"),
        (record("#### ٣"), "is not a number"),
        (record("#### 1e9"), "is not a number"),
        (record("#### " + "9" * 1000), "is not a number"),
        (record("#### 72\nor so"), "no short text of one line"),
        ('{"question": "How many?", "answer": NaN}', "is not a number"),
        (record("#### 1", question="x" * 10_000_000), "at most 1000000"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_record_is_named_by_file_line_and_reason(tmp_path, line, reason):
    message = fault(tmp_path, GOOD, line)
    assert "x.jsonl:2: " in message
    assert reason in message
    assert len(message) < 300


def test_five_bad_records_are_named_and_the_rest_counted(tmp_path):
    message = fault(tmp_path, "{", GOOD, *["{"] * 6)
    assert [f"x.jsonl:{n}:" in message for n in range(1, 9)] == [True, False, True, True, True, True, False, False]
    assert message.endswith("and 2 more bad records")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    assert "holds no problems" in fault(tmp_path, content)


def test_a_missing_file_and_another_suffix_are_errors(tmp_path):
    with pytest.raises(DataError, match=r'"nowhere\.jsonl" does not exist'):
        load_problems("nowhere.jsonl")
    with pytest.raises(DataError, match=r"must be a \.jsonl file"):
        load_problems(write(tmp_path / "x.csv", GOOD))


def test_parquet_equals_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = [GOOD, record("#### 1,234")]
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines]), path)
    from_jsonl = load_problems(write(tmp_path / "x.jsonl", *lines))
    from_parquet = load_problems(str(path))
    assert [(p.question, p.answer) for p in from_parquet] == [(p.question, p.answer) for p in from_jsonl]
    assert [p.id for p in from_parquet] == ["x.parquet:1", "x.parquet:2"]


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_problems(write(tmp_path / "x.parquet", GOOD))


def test_the_hub_id_asks_for_the_main_config_and_the_named_split(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [json.loads(GOOD)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (train,), (test,) = load_problems("openai/gsm8k"), load_problems("openai/gsm8k:test")
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert (train.id, test.id, test.answer) == ("gsm8k:train:1", "gsm8k:test:1", "72")
    with pytest.raises(DataError, match='no split "dev"'):
        load_problems("openai/gsm8k:dev")


def test_another_dataset_of_the_hub_has_a_configuration_and_a_split(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"question": "Q?", "answerKey": "B", "choices": ["x", "y"]}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    reading = Reading(answer_key="answerKey")
    (problem,) = load_problems("allenai/ai2_arc:ARC-Easy:validation", reading=reading)
    assert (problem.id, problem.answer) == ("ai2_arc:ARC-Easy:validation:1", "B")
    for source in ("owner/name:test", "owner/name"):
        load_problems(source, reading=reading)
    assert asked == [
        ("allenai/ai2_arc", "ARC-Easy", "validation"), ("owner/name", "test"), ("owner/name", "train"),
    ]  # fmt: skip


def test_without_the_hub_one_line_says_what_to_do(monkeypatch):
    def load_dataset(*names, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"no route.*give a local .*--data") as error:
        load_problems("openai/gsm8k")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not TRAIN.is_file(), reason="the GSM8K file is not here")
def test_all_of_gsm8k_loads_with_the_facts_known_of_it():
    problems = load_problems(str(TRAIN))
    golds = [int(p.answer) for p in problems]
    assert len(problems) == len({p.id for p in problems}) == 7473
    assert sum("," in json.loads(line)["answer"].split("####")[1] for line in TRAIN.open()) == 79
    assert (sum(g < 0 for g in golds), max(golds)) == (3, 192_000_000)
    assert all(p.solution and "####" not in p.solution for p in problems)


def many(count: int) -> list[Problem]:
    return [Problem(str(i), f"question {i}", "1") for i in range(count)]


def test_a_split_is_a_partition_fixed_by_the_seed():
    problems = many(50)
    train, held = split_problems(problems, 10, seed=3)
    assert (train, held) == split_problems(problems, 10, seed=3)
    assert held != split_problems(problems, 10, seed=4)[1]
    assert (len(train), len(held)) == (40, 10)
    assert sorted(train + held, key=problems.index) == problems
    assert train == sorted(train, key=problems.index)


def test_a_held_out_question_is_never_trained_on_in_another_copy():
    problems = many(8) + [Problem(f"copy {i}", f" question   {i} ", "1") for i in range(8)]
    for seed in range(20):
        train, held = split_problems(problems, 4, seed)
        questions = [" ".join(p.question.split()) for p in train]
        assert len(held) == 4
        assert len(questions) == 8
        assert not {p.question for p in held} & set(questions)


@pytest.mark.parametrize("held_out", [-1, 5, 6])
def test_a_split_that_leaves_nothing_to_train_on_is_an_error(held_out):
    with pytest.raises(DataError, match=f"cannot hold out {held_out} of 5"):
        split_problems(many(5), held_out, seed=0)


def test_data_that_is_all_held_out_leaves_nothing_to_train_on(tmp_path):
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(3)))
    with pytest.raises(DataError, match=r"all 3 problems of data '.*f\.jsonl' are in eval_data too: none is left to train on"):
        choose_problems(Config(data=str(file), eval_data=str(file)))
