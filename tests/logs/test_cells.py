"""A log as counts, by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log

from oirl.errors import DataError
from oirl.logs.cells import make_cells


def table(rows: list[tuple[str, str, bool | None]]) -> pa.Table:
    return pa.table(
        {
            "query_id": [r[0] for r in rows],
            "query": [f"text of {r[0]}" for r in rows],
            "prompt_id": [r[1] for r in rows],
            "prompt": [f"way {r[1]}" for r in rows],
            "correct": pa.array([r[2] for r in rows], pa.bool_()),
        }
    )


ROWS: list[tuple[str, str, bool | None]] = [
    ("q0", "a", None),
    ("q1", "b", True),
    ("q2", "a", False),
    ("q1", "b", False),
    ("q1", "a", True),
    ("q1", "b", True),
    ("q3", "c", None),
]


def test_counts_by_hand() -> None:
    cells = make_cells(table(ROWS))
    assert cells.query_ids == ["q1", "q2"]
    assert cells.queries == ["text of q1", "text of q2"]
    assert cells.prompt_ids == ["b", "a"]
    assert cells.prompts == ["way b", "way a"]
    runs, successes = cells.matrices()
    assert runs.tolist() == [[3, 1], [0, 1]]
    assert successes.tolist() == [[2, 1], [0, 0]]
    assert cells.rate == pytest.approx([2 / 3, 1, 0])


def test_counts_do_not_depend_on_chunks() -> None:
    whole, rows = make_cells(table(ROWS)), table(ROWS)
    cut = make_cells(pa.concat_tables([rows.slice(0, 2), rows.slice(2, 1), rows.slice(3)]))
    assert [m.tolist() for m in cut.matrices()] == [m.tolist() for m in whole.matrices()]


def test_counts_of_a_log_are_its_rows() -> None:
    log = make_log(20, replicates=3)
    cells = make_cells(log)
    assert cells.runs.sum() == len(log)
    assert cells.successes.sum() == sum(log["correct"].to_pylist())
    assert cells.runs.tolist() == [3] * 60


def test_some_queries_keep_all_prompts() -> None:
    cells = make_cells(table(ROWS)).of_queries(np.array([False, True]))
    assert cells.query_ids == ["q2"]
    assert cells.prompt_ids == ["b", "a"]
    assert [m.tolist() for m in cells.matrices()] == [[[0, 1]], [[0, 0]]]


def test_some_prompts_in_the_order_given() -> None:
    cells = make_cells(table(ROWS)).of_prompts(["nobody", "b"])
    assert cells.prompt_ids == ["nobody", "b"]
    assert cells.prompts == ["", "way b"]
    assert cells.query_ids == ["q1"]  # q2 was not run under either
    assert [m.tolist() for m in cells.matrices()] == [[[0, 3]], [[0, 2]]]


def test_columns_of_categories_count_like_texts() -> None:
    plain = table(ROWS)
    names = ("query_id", "query", "prompt_id", "prompt")
    encoded = plain
    for name in names:
        encoded = encoded.set_column(plain.column_names.index(name), name, plain[name].dictionary_encode())
    assert make_cells(encoded).query_ids == ["q1", "q2"]
    assert [m.tolist() for m in make_cells(encoded).matrices()] == [[[3, 1], [0, 1]], [[2, 1], [0, 0]]]


def test_no_verdict_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"none of the 2 rows .*--grade"):
        make_cells(table([("q", "a", None), ("q", "b", None)]))


def test_one_prompt_id_for_two_texts_is_refused() -> None:
    rows = table([("q1", "a", True), ("q2", "a", True)]).set_column(3, "prompt", pa.array(["x", "y"]))
    with pytest.raises(DataError, match="'a' stands for several texts"):
        make_cells(rows)


def test_one_query_in_another_spelling_is_one_query() -> None:
    rows = table([("q1", "a", True), ("q1", "b", True)]).set_column(1, "query", pa.array(["x", "X "]))
    assert make_cells(rows).queries == ["x"]
