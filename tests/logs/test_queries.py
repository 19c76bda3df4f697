"""Queries and prompts from users' files, and rows to files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from oirl.errors import ConfigError, DataError, NotFoundError, OirlError
from oirl.logs.queries import parse_query_lines, read_prompts, read_queries, write_rows
from oirl.logs.text import text_id


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_queries_of_every_format(tmp_path: Path) -> None:
    expected = (["7", text_id("Two, three?")], ["One\nline", "Two, three?"])
    lines = '{"query": "One\\nline", "query_id": 7}\n\n{"query": "Two, three?", "query_id": null}\n'
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "a.csv", 'query,query_id\n"One\nline",7\n"Two, three?",\n'),
        write(tmp_path / "a.tsv", 'query_id\tquery\r\n7\t"One\nline"\r\n\tTwo, three?\r\n'),
        write(tmp_path / "a.json", json.dumps([json.loads(x) for x in lines.split("\n") if x])),
    ]
    pq.write_table(pa.table({"query": expected[1], "query_id": ["7", None]}), tmp_path / "a.parquet")
    for file in [*files, tmp_path / "a.parquet"]:
        assert read_queries(file) == expected, file.name


def test_queries_of_problem_files(real_data: Path) -> None:
    ids, queries = read_queries(real_data / "svamp" / "SVAMP.json")
    assert len(ids) == len(queries) == 1000
    assert queries[0].endswith("on each pack. How much do you have to pay to buy each pack?")
    assert len(read_queries(real_data / "gsm8k" / "test.jsonl")[0]) == 1319


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "query,x\nq,1\n,2\n", r"a\.csv:2: query is empty"),
        ("a.csv", "query,x\nq,1\nq\n", r"a\.csv:2: 1 cells where the header has 2"),
        ("a.csv", "text\nq\n", "no field 'query'.*fields there: text"),
        ("a.csv", "query\n", "holds no query"),
        ("a.csv", "", "is empty"),
        ("a.jsonl", '{"query": "a"}\n\n{"query": " "}\n', r"a\.jsonl:3: query is empty"),
        ("a.jsonl", '{"query": "a"}\nxx\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"query": "\\ud800"}\n', r"a\.jsonl:1: query is .*surrogate"),
        ("a.log", "hello\nworld\n", "format not recognised"),
    ],
)
def test_bad_query_files_are_named_with_the_row(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_queries(write(tmp_path / name, content))


def test_a_folder_of_query_files_is_an_error_of_the_user(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.csv", "query\nx\n")
    write(tmp_path / "in" / "b.csv", "query\nx\n")
    for source in (tmp_path / "in", tmp_path / "in" / "*.csv"):
        with pytest.raises(OirlError):
            read_queries(source)
    with pytest.raises(NotFoundError):
        read_queries(tmp_path / "nothing.csv")


def test_lines_of_stdin() -> None:
    ids, queries = parse_query_lines(["a\r\n", "\n", '{"query": "b", "query_id": 5}\n', "2024-01-01"], "stdin")
    assert queries == ["a", "b", "2024-01-01"]
    assert ids == [text_id("a"), "5", text_id("2024-01-01")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "stdin: no query"),
        (["", "  "], "stdin: no query"),
        (["ok", "{nope"], "stdin:2: begins like a JSON object"),
        (["ok", '{"text": "x"}'], "stdin:2: no text under `query`; keys there: text"),
        (['{"query": 5}'], "stdin:1: no text"),
        (['{"query": "\\ud800"}'], "stdin:1"),
        (['{"query": ' + "[" * 5000], "stdin:1"),
    ],
)
def test_bad_lines_are_named(lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_query_lines(lines, "stdin")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "\ufeffOne {query}\n\n  Two \r\n", [(None, "One {query}"), (None, "Two")]),
        (
            "p.jsonl",
            '{"prompt_id": 1, "prompt": "a"}\n\n"b"\n{"prompt_id": "c"}\n',
            [("1", "a"), (None, "b"), ("c", None)],
        ),
        ("p.json", '[{"prompt": "a\\nb"},\n "c"]', [(None, "a\nb"), (None, "c")]),
        ("p.yaml", "a: |\n  l1\n  l2\n2: 'x {query}'\n", [("a", "l1\nl2\n"), ("2", "x {query}")]),
        ("p.yml", "- prompt: x\n  prompt_id: 1\n- y\n", [("1", "x"), (None, "y")]),
        # JSON keeps these as they are; only a line feed ends a line of JSON Lines.
        ("p.jsonl", '{"prompt": "a\u2028b\u0085c"}\n', [(None, "a\u2028b\u0085c")]),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, content: str, expected: list[tuple[str | None, str | None]]) -> None:
    assert read_prompts(write(tmp_path / name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", ""),
        ("p.txt", "abc".encode("utf-16")),
        ("p.jsonl", "[1]\n"),
        ("p.jsonl", '{"prompt": 5}\n'),
        ("p.jsonl", '{"prompt_id": null}\n'),
        ("p.jsonl", "{nope\n"),
        ("p.jsonl", "[" * 5000),
        ("p.jsonl", '{"prompt": "\\ud800"}\n'),
        ("p.yaml", "a: [1"),
        ("p.yaml", "just a text"),
    ],
)
def test_bad_prompt_files_name_the_file(tmp_path: Path, name: str, content: str | bytes) -> None:
    with pytest.raises(DataError, match=r"p\.(txt|jsonl|yaml)"):
        read_prompts(write(tmp_path / name, content))


def test_missing_prompt_file(tmp_path: Path) -> None:
    for path in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(NotFoundError, match="no such file"):
            read_prompts(path)


ROWS = [
    {"query": "a, b", "score": 0.5, "scores": {"p": 0.5}},
    {"query": 'say "x"\n', "score": None, "changed": True},
]


def test_rows_to_every_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are written to"):
        write_rows(ROWS, tmp_path / "r.xlsx")
    for ending in ("jsonl", "csv", "parquet"):
        write_rows(ROWS, tmp_path / f"r.{ending}")
    assert [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()] == ROWS
    flat = [
        {"query": "a, b", "score": 0.5, "scores": '{"p": 0.5}', "changed": None},
        {"query": 'say "x"\n', "score": None, "scores": None, "changed": True},
    ]
    assert pq.read_table(tmp_path / "r.parquet").to_pylist() == flat
    options = pcsv.ParseOptions(newlines_in_values=True)
    convert = pcsv.ConvertOptions(strings_can_be_null=True)
    assert pcsv.read_csv(tmp_path / "r.csv", parse_options=options, convert_options=convert).to_pylist() == flat


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_no_rows_and_failed_writes(tmp_path: Path, ending: str) -> None:
    write_rows([], tmp_path / f"r.{ending}")
    assert (tmp_path / f"r.{ending}").is_file()
    before = (tmp_path / f"r.{ending}").read_bytes()
    with pytest.raises(Exception):  # noqa: B017
        write_rows([{"a": object()}], tmp_path / f"r.{ending}")
    assert (tmp_path / f"r.{ending}").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [f"r.{ending}"]
