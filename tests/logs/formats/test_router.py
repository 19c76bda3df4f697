"""Wide tables of routers: a column of verdicts per model, replies and costs beside it, grades, named queries."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import column, read, refused

from oirl.errors import DataError

SMALL, LARGE = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"


def save(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_words_as_verdicts(tmp_path: Path) -> None:
    table = f'prompt,{LARGE},{SMALL}\n"Two hens,\n""and"" one?",True,False\nNine nuts?,False,True\nOnly one?,,True\n'
    report, rows = read(save(tmp_path, table), tmp_path)
    hens = 'Two hens,\n"and" one?'
    cells = [(hens, LARGE, True), (hens, SMALL, False), ("Nine nuts?", LARGE, False), ("Nine nuts?", SMALL, True)]
    cells.append(("Only one?", SMALL, True))
    assert column(rows, "query", "prompt_id", "prompt", "model", "correct", "replicate") == [
        (query, model, model, model, verdict, 0) for query, model, verdict in cells
    ]
    assert [f["format"] for f in report.files] == ["router"]
    assert (report.n_queries, report.n_prompts) == (3, 2)
    assert report.warnings == [f"table.csv: the columns taken as models are {LARGE}, {SMALL}"]


def test_replies_and_costs_beside_verdicts(tmp_path: Path) -> None:
    table = (
        "sample_id,prompt,eval_name,b,a,a|model_response,b|model_response,a|total_cost,b|total_cost,oracle_model\n"
        'maths.1,Two hens?,maths,0.0,1.0,"2, ""yes""",I see 4,0.002,0.0001,a\n'
        "maths.2,Five?,maths,1.0,0.0,,5,0.003,0.0002,b\n"
    )
    report, rows = read(save(tmp_path, table), tmp_path)
    assert column(rows, "query_id", "model", "correct", "response", "cost", "dataset") == [
        ("maths.1", "b", False, "I see 4", 0.0001, "maths"),
        ("maths.1", "a", True, '2, "yes"', 0.002, "maths"),
        ("maths.2", "b", True, "5", 0.0002, "maths"),
        ("maths.2", "a", False, None, 0.003, "maths"),
    ]
    assert (report.n_prompts, report.rows_refused) == (2, 0)


def test_grades_are_no_verdicts(tmp_path: Path) -> None:
    report, rows = read(save(tmp_path, "question,a,b\nTwo?,0.25,1\nFive?,1.0,0.5\n"), tmp_path)
    assert column(rows, "query", "model", "score", "correct") == [
        ("Two?", "a", 0.25, None),
        ("Two?", "b", 1.0, None),
        ("Five?", "a", 1.0, None),
        ("Five?", "b", 0.5, None),
    ]
    assert report.warnings == [
        "table.csv: the columns taken as models are a, b",
        "table.csv: scores of a, b are grades, not 0 and 1: they stand in the column `score`, without verdict",
        "no row has a verdict; `oirl fit` needs some: --map correct=FIELD, or --grade numeric",
    ]


def test_grades_that_come_late_keep_the_verdicts_before(tmp_path: Path) -> None:
    table = "question,a,b\n" + "".join(f"Number {i}?,1,0\n" for i in range(2500)) + "Last?,0.5,1\n"
    report, rows = read(save(tmp_path, table), tmp_path)
    assert column(rows[-2:], "correct", "score") == [(None, 0.5), (True, None)]
    assert column(rows, "correct").count(True) == 2501
    assert report.warnings == [
        "table.csv: the columns taken as models are a, b",
        "table.csv: 1 scores are neither 0 nor 1: they stand in the column `score`, without verdict",
    ]


def test_a_named_query(tmp_path: Path) -> None:
    path = save(tmp_path, ",ask,small,large\n0,Two hens?,1,0\n1,Nine nuts?,1,1\n")
    _report, rows = read(path, tmp_path, format="router", mapping={"query": "ask"})
    assert column(rows, "query", "model", "correct") == [
        ("Two hens?", "small", True),
        ("Two hens?", "large", False),
        ("Nine nuts?", "small", True),
        ("Nine nuts?", "large", True),
    ]
    with pytest.raises(DataError, match=r"a column of queries \(--map query=FIELD\).*columns there: , ask, small"):
        read(path, tmp_path, format="router")


def test_a_cell_that_is_no_verdict_is_refused_alone(tmp_path: Path) -> None:
    table = "question,a,b\n" + "".join(f"Number {i}?,1,0\n" for i in range(600)) + "Last?,maybe,1\nCut,1\n"
    report, rows = read(save(tmp_path, table), tmp_path)
    assert column(rows[-1:], "query", "model", "correct") == [("Last?", "b", True)]
    assert refused(tmp_path) == [
        (601, "the verdict of 'a' is 'maybe': true, false or a number from 0 to 1 is needed"),
        (602, "2 cells where the header has 3"),
    ]
    assert report.rows_kept == 1201


def test_a_log_is_no_router_table(tmp_path: Path) -> None:
    path = save(tmp_path, "query,prompt,correct,score\nTwo?,Say.,1,1\nFive?,Say.,0,0\n")
    report, _ = read(path, tmp_path)
    assert [f["format"] for f in report.files] == ["csv"]


def test_a_list_of_messages_as_text(tmp_path: Path) -> None:
    table = 'sample_id,prompt,a,b\n1,[\'Two hens and one?\'],1.0,0.0\n2,"[""Ann\'s hens?""]",1.0,0.0\n'
    _, rows = read(save(tmp_path, table), tmp_path)
    assert column(rows, "query") == ["Two hens and one?"] * 2 + ["Ann's hens?"] * 2


def test_columns_that_describe_a_query_are_no_models(tmp_path: Path) -> None:
    names = ["is_hard", "has_image", "label", "difficulty", "Level", "n_tokens"]
    header, cells = ",".join(names), ",".join("1" for _ in names)
    report, rows = read(save(tmp_path, f"question,{header},a,b\nTwo?,{cells},1,0\nFive?,{cells},0,1\n"), tmp_path)
    assert column(rows, "query", "model", "correct") == [
        ("Two?", "a", True),
        ("Two?", "b", False),
        ("Five?", "a", False),
        ("Five?", "b", True),
    ]
    assert report.warnings == ["table.csv: the columns taken as models are a, b"]


def test_verdicts_and_responses_by_the_ends_of_their_names(tmp_path: Path) -> None:
    table = "query,a_correct,b_correct,a_response,b_response\nTwo?,1,0,2,3\nFive?,0,1,6,5\n"
    report, rows = read(save(tmp_path, table), tmp_path)
    assert column(rows, "query", "model", "prompt_id", "prompt", "correct", "response") == [
        ("Two?", "a", "a", "a", True, "2"),
        ("Two?", "b", "b", "b", False, "3"),
        ("Five?", "a", "a", "a", False, "6"),
        ("Five?", "b", "b", "b", True, "5"),
    ]
    assert report.warnings == ["table.csv: the columns taken as models are a_correct, b_correct"]


def test_a_column_is_a_models_if_most_of_its_cells_are_verdicts(tmp_path: Path) -> None:
    """Of `c` 4 cells of 5 are verdicts, of `note` 3."""
    cells = [
        ("1", "0", "1", "1"),
        ("0", "1", "0", "0"),
        ("1", "1", "1", "1"),
        ("0", "0", "7", "x"),
        ("1", "1", "0", "y"),
    ]
    table = "question,a,b,c,note\n" + "".join(f"Number {i}?,{','.join(row)}\n" for i, row in enumerate(cells))
    report, rows = read(save(tmp_path, table), tmp_path)
    assert report.warnings == ["table.csv: the columns taken as models are a, b, c"]
    assert [row["query"] for row in rows if row["model"] == "c"] == [f"Number {i}?" for i in (0, 1, 2, 4)]
    reason = "the verdict of 'c' is '7': true, false or a number from 0 to 1 is needed"
    assert refused(tmp_path) == [(4, reason)]
    assert report.rows_kept == 14


def test_grades_of_one_model_take_no_verdicts_from_the_others(tmp_path: Path) -> None:
    report, rows = read(save(tmp_path, "question,a,b\nTwo?,0.25,1\nFive?,1.0,0\n"), tmp_path)
    assert column(rows, "query", "model", "correct", "score") == [
        ("Two?", "a", None, 0.25),
        ("Two?", "b", True, None),
        ("Five?", "a", None, 1.0),
        ("Five?", "b", False, None),
    ]
    assert report.warnings[1:] == [
        "table.csv: scores of a are grades, not 0 and 1: they stand in the column `score`, without verdict"
    ]
