"""Laws of grpo/reports/jsonl.py: what is read of a file that is torn, malformed, or still being written."""

import json

import pytest

from grpo.reports.jsonl import has_only, read_records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_records_come_in_order_and_a_missing_file_has_none(path):
    notes: list[str] = []
    assert list(read_records(path, notes)) == []
    records = [{"step": step, "text": "a\u2028b\nc"} for step in (2, 1, 3)]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    assert list(read_records(path, notes)) == records and notes == []


def test_malformed_lines_are_skipped_and_named_in_one_note(path):
    path.write_bytes(b'{"step": 1}\n\0\0\n{"step": \n[]\n{"stop": 3}\n\xff\n{"step": 4}\n')
    notes: list[str] = []
    assert list(read_records(path, notes, "step")) == [{"step": 1}, {"step": 4}]
    assert notes == ["skipped 5 malformed lines of metrics.jsonl (2, 3, 4, 5, 6)"]
    notes.clear()
    assert len(list(read_records(path, notes))) == 3 and notes == ["skipped 4 malformed lines of metrics.jsonl (2, 3, 4, 6)"]


def test_a_note_names_one_line_and_at_most_five(path):
    for count, note in (
        (1, "1 malformed line of metrics.jsonl (1)"),
        (9, "9 malformed lines of metrics.jsonl (1, 2, 3, 4, 5, ...)"),
    ):
        path.write_text("{\n" * count)
        notes: list[str] = []
        assert list(read_records(path, notes)) == [] and notes == [f"skipped {note}"]


def test_a_torn_last_line_is_left_out_silently_and_a_complete_one_is_read(path):
    for end, steps in (('{"step": 2', [1]), ('{"step": 2}', [1, 2])):
        path.write_text('{"step": 1}\n' + end)
        notes: list[str] = []
        assert [record["step"] for record in read_records(path, notes, "step")] == steps and notes == []


def test_records_of_later_steps_are_left_out(path):
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": "2"}\n{"note": 1}\n{"step": 2}\n')
    notes: list[str] = []
    assert [record["step"] for record in read_records(path, notes, step=2)] == [1, 2]
    assert notes == ["skipped 2 malformed lines of metrics.jsonl (3, 4)"]
    assert list(read_records(path, [], step=-1)) == []


@pytest.mark.parametrize(
    ("content", "count", "only"),
    [(b"", 0, True), (b"{}\n{}\n", 2, True), (b"{}\n{}\n", 1, False), (b"{}\n{}", 2, False), (b"{}\n{", 1, False)],
)
def test_a_file_has_only_its_records_if_every_line_was_read_and_is_whole(path, content, count, only):
    path.write_bytes(content)
    assert has_only(path, count) == only
