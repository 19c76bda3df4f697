"""Grading a log: the verdicts, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

import oirl
from oirl.errors import ConfigError, DataError, OirlError, UnknownNameError
from oirl.logs.grading import Grader

ROWS: list[tuple[str | None, str | None, bool | None]] = [
    ("The answer is 5.", "5", True),  # stays
    ("The answer is 5.", "5", False),  # changed
    ("The answer is 6.", "5", None),  # filled
    (None, "5", True),  # no response: the logged verdict stays
    ("The answer is 5.", None, False),  # no answer: the logged verdict stays
    (None, None, None),
]


def columns(rows: list[tuple[str | None, str | None, bool | None]]) -> tuple[pa.Array, pa.Array, pa.Array]:
    response, answer, correct = zip(*rows, strict=True)
    return pa.array(response, pa.string()), pa.array(answer, pa.string()), pa.array(correct, pa.bool_())


def test_counts_by_hand() -> None:
    grader = Grader("numeric")
    assert grader.grade(*columns(ROWS)).to_pylist() == [True, True, False, True, False, None]
    expected = {"checker": "numeric", "graded": 3, "changed": 1, "to_right": 1, "filled": 1, "not_gradable": 3}
    assert grader.counts.to_dict() == expected


def test_counts_add_up_over_batches() -> None:
    whole, cut = Grader("numeric"), Grader("numeric")
    whole.grade(*columns(ROWS))
    for row in ROWS:
        cut.grade(*columns([row]))
    assert cut.counts == whole.counts


def test_no_rows() -> None:
    empty = Grader("exact").grade(pa.array([], pa.string()), pa.array([], pa.string()), pa.array([], pa.bool_()))
    assert (len(empty), empty.type) == (0, pa.bool_())


def test_an_import_grades_the_rows_that_it_keeps(tmp_path: Path) -> None:
    rows = [
        {"query": f"q{i}", "prompt": "p", "response": r, "answer": a, "correct": c} for i, (r, a, c) in enumerate(ROWS)
    ]
    rows.append({"query": "", "prompt": "p", "response": "5", "answer": "5", "correct": False})  # refused
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = oirl.import_log(source, tmp_path / "log.parquet", grade="numeric")
    assert report.grade == {
        "checker": "numeric",
        "graded": 3,
        "changed": 1,
        "to_right": 1,
        "filled": 1,
        "not_gradable": 3,
    }
    log = oirl.read_log(tmp_path / "log.parquet")
    assert log["correct"].to_pylist() == [True, True, False, True, False, None]


def test_a_checker_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_checker_a.py").write_text(
        "def ends(response, answer):\n    return response.endswith(answer)\nlist_ = [1]\n"
        "def three(response, answer):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Grader("own_checker_a:ends").grade(*columns(ROWS)).to_pylist()[:3] == [False, False, False]
    with pytest.raises(ConfigError, match="allowed: True, False"):
        Grader("own_checker_a:three").grade(*columns(ROWS))
    with pytest.raises(ConfigError, match="has no attribute 'nope'"):
        Grader("own_checker_a:nope")
    with pytest.raises(OirlError):
        Grader("own_checker_a:list_").grade(*columns(ROWS))


@pytest.mark.parametrize("name", ["numerik", "", "no.such.module:f"])
def test_an_unknown_checker_is_named(name: str) -> None:
    with pytest.raises((UnknownNameError, OirlError), match=r"known: numeric|cannot import"):
        Grader(name)


def test_a_grader_that_can_grade_nothing_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"query": "q", "prompt": "p"}) + "\n")
    with pytest.raises(DataError, match="no row could be graded"):
        oirl.import_log(source, tmp_path / "log.parquet", grade="numeric")
    assert not (tmp_path / "log.parquet").exists()


def test_a_log_without_verdicts_is_told_at_import(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"query": "q", "prompt": "p"}) + "\n")
    assert "no row has a verdict" in oirl.import_log(source, tmp_path / "log.parquet").warnings[0]
