"""Candidate responses from users' files and stdin, and the answers that responses state."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oirl import write_log
from oirl.errors import DataError, NotFoundError, OirlError
from oirl.logs.checkers import answer_kind, choice, exact, numeric, response_kind, stated_answer
from oirl.logs.queries import parse_candidate_lines, read_candidates
from oirl.logs.text import text_id

ROWS: list[dict[str, Any]] = [
    {"query_id": "a", "query": "One\nline", "response": "x"},
    {"query_id": "b", "query": "Two, three?", "response": "u"},
    {"query_id": "a", "query": "One\nline", "response": None},
    {"query_id": "a", "query": "One\nline", "response": 'y, "z"'},
]
EXPECTED = (["a", "b"], ["One\nline", "Two, three?"], [["x", 'y, "z"'], ["u"]], 1)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parse(*rows: dict[str, Any]) -> tuple[list[str], list[str], list[list[str]], int]:
    return parse_candidate_lines(jsonl(list(rows)).splitlines(), "stdin")


def test_candidates_of_every_format(tmp_path: Path) -> None:
    cells = [["query_id", "query", "response"], *([r["query_id"], r["query"], r["response"] or ""] for r in ROWS)]
    quoted = [["" if not c else '"' + c.replace('"', '""') + '"' for c in row] for row in cells]
    table = pa.Table.from_pylist(ROWS)
    files = [
        write(tmp_path / "a.jsonl", jsonl(ROWS) + "\n"),
        write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(ROWS).encode())),
        write(tmp_path / "a.json", json.dumps(ROWS)),
        write(tmp_path / "a.csv", "".join(",".join(row) + "\r\n" for row in quoted)),
        write(tmp_path / "a.tsv", "".join("\t".join(row) + "\n" for row in quoted)),
        tmp_path / "a.parquet",
        tmp_path / "a.arrow",
    ]
    pq.write_table(table, tmp_path / "a.parquet")
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for file in files:
        assert read_candidates(file) == EXPECTED, file.name


def test_a_log_is_a_file_of_candidates(tmp_path: Path) -> None:
    rows = [r | {"prompt_id": "p", "prompt": "{query}"} for r in ROWS]
    write_log(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    assert read_candidates(tmp_path / "log.parquet") == EXPECTED


def test_rows_with_lists_of_responses(tmp_path: Path) -> None:
    rows = [{"query": "Q?", "responses": ["x", None, "y"]}, {"query": "q?", "responses": ["z"]}]
    expected = ([text_id("Q?")], ["Q?"], [["x", "y", "z"]], 1)  # the same query but for its case
    assert parse(*rows) == expected
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_candidates(tmp_path / "a.parquet") == expected


def test_equal_responses_are_candidates_each() -> None:
    assert parse({"query": "q", "responses": ["x", "x"]})[2] == [["x", "x"]]


def test_a_query_without_a_response_is_counted_and_left_out() -> None:
    found = parse({"query": "q"}, {"query": "r", "response": "x"}, {"query": "s", "responses": []})
    assert (found[1], found[2]) == (["r"], [["x"]])
    assert found[3] >= 1


def test_numbers_are_names() -> None:
    assert parse({"query_id": 7, "query": "q", "response": "x"})[0] == ["7"]


def test_empty_lines_do_not_count() -> None:
    assert parse_candidate_lines(["", '{"query": "q", "response": "x"}', "  "], "stdin")[2] == [["x"]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "stdin: no response to rank"),
        (["plain words"], "stdin:1: not a JSON object"),
        (["", "[1]"], "stdin:2: a list, not an object"),
        (['{"response": "x"}'], "stdin:1: no text under `query`; fields there: response"),
        (['{"query": " ", "response": "x"}'], "stdin:1: no text under `query`"),
        (['{"query": 3, "response": "x"}'], "stdin:1: no text under `query`"),
        (["{}"], "fields there: none"),
        (['{"query": "q", "response": 3}'], "stdin:1: a response is a int"),
        (['{"query": "q", "responses": ["x", 3]}'], "stdin:1: a response is a int"),
        (['{"query": "q", "responses": 3}'], "stdin:1: a response is a int"),
        (['{"query": "q", "response": {"text": "x"}}'], "stdin:1: a response is a"),
        (['{"query": "q", "response": null}'], "no response to rank"),
        (['{"query": "q", "response": "\\ud800"}'], "stdin:1: not valid Unicode"),
        (['{"query": "\\ud800", "response": "x"}'], "stdin:1: not valid Unicode"),
        (
            ['{"query_id": 1, "query": "q", "response": "x"}', '{"query_id": 1, "query": "r", "response": "x"}'],
            "stdin:2: query_id '1' stood for another query",
        ),
    ],
)
def test_bad_lines_are_named(lines: list[str], message: str) -> None:
    with pytest.raises(DataError) as e:
        parse_candidate_lines(lines, "stdin")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.csv", "query,response\n", "no response to rank"),
        ("a.csv", "text,response\nq,x\n", "a.csv:1: no text under `query`; fields there: text, response"),
        ("a.csv", "query,response\nq,x\nq\n", "a.csv:2: 1 cells"),
        ("a.jsonl", '{"query": "q", "response": "x"}\nxx\n', "a.jsonl:2:"),
        ("a.json", '[{"query": "q", "response": "x"}, 3]', "a.json:2:"),
        ("a.csv", b"query,response\nq,\xff\n", "not UTF-8"),
        ("a.parquet", "PAR1 and nothing more", "a.parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as e:
        read_candidates(write(tmp_path / name, content))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_missing_file_and_a_folder_of_several(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_candidates(tmp_path / "nothing.jsonl")
    write(tmp_path / "a.jsonl", '{"query": "q", "response": "x"}\n')
    write(tmp_path / "b.jsonl", '{"query": "r", "response": "x"}\n')
    try:
        found = read_candidates(tmp_path)
    except OirlError:
        return
    assert found[1] == ["q", "r"]  # what is not refused is read to the end


# The answers of responses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["3", "$4.50", "1,200", "#### 7"], "numeric"),
        (["A", "(b)", "c."], "choice"),
        (["Paris", "Rome", "3"], None),
        (["3"] * 9 + ["Paris"], "numeric"),  # nine tenths are enough
        (["3"] * 8 + ["Paris"] * 2, None),
        (["3", "A"], None),
        ([], None),
        (["K", "M"], None),  # no letter of a choice
    ],
)
def test_the_kind_of_gold_answers(answers: list[str], kind: str | None) -> None:
    assert answer_kind(answers) == kind


def test_long_lists_of_gold_answers_are_sampled_throughout() -> None:
    assert answer_kind(["3"] * 300 + ["Paris"] * 300) is None
    assert answer_kind(["Paris"] * 20 + ["3"] * 1000) == "numeric"


@pytest.mark.parametrize(
    ("responses", "kind"),
    [
        (["The answer is 3.", "So 4 + 5 = 9"], "numeric"),
        (["The answer is (B).", "C"], "choice"),
        (["The answer is B: 3 apples.", "Answer: C, 4 apples"], "choice"),  # a letter says more than a number
        (["yes", "no"], "text"),
        (["3"] * 9 + ["none", " ", ""], "numeric"),  # empty ones do not count
        (["3"] * 8 + ["none"] * 2, "text"),
        ([], "text"),
        (["", "  "], "text"),
    ],
)
def test_the_kind_of_responses(responses: list[str], kind: str) -> None:
    assert response_kind(responses) == kind


@pytest.mark.parametrize(
    ("response", "kind", "answer"),
    [
        ("We add 3 and 4. The answer is 7.", "numeric", "7"),
        ("#### 7.0", "numeric", "7"),
        ("= $1,200.50", "numeric", "2401/2"),
        ("It is 2 million.", "numeric", "2000000"),
        ("I do not know.", "numeric", None),
        ("", "numeric", None),
        ("The answer is (b).", "choice", "B"),
        ("No idea at all", "choice", None),
        (" “Paris”. ", "text", "paris"),
        ("ＰＡＲＩＳ", "text", "paris"),
        ("?!", "text", None),
        ("", "text", None),
    ],
)
def test_stated_answers(response: str, kind: str, answer: str | None) -> None:
    assert stated_answer(response, kind) == answer


def test_equal_numbers_are_equal_answers() -> None:
    same = ["The answer is 0.5.", "#### 1/2", "so we get .50", "It is ½."]
    assert len({stated_answer(text, "numeric") for text in same}) == 1


@given(st.text(max_size=40), st.sampled_from(["numeric", "choice", "text"]))
def test_no_text_raises_and_the_answer_agrees_with_the_checker(text: str, kind: str) -> None:
    said = stated_answer(text, kind)
    checker = {"numeric": numeric, "choice": choice, "text": exact}[kind]
    assert (said is None) == (checker(text, "1").extracted is None)
    if said is not None:
        assert checker(text, said).correct is True
