"""Log files: what is written is what is read, from any source, in any cut, or an error that names the file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oirl
from oirl import __version__
from oirl.errors import ConfigError, DataError, NotFoundError, OirlError
from oirl.logs.fingerprint import Fingerprint
from oirl.logs.store import (
    LogWriter,
    find_files,
    log_metadata,
    read_log,
    scan_log,
    table_fingerprint,
    write_log,
)
from oirl.records import INTERACTION_SCHEMA

LEAST = {"query_id": ["1", "2"], "query": ["a", "b"], "prompt_id": ["p", "p"], "prompt": ["P", "P"]}


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**LEAST, **columns}), path)
    return path


def test_written_is_read(tmp_path: Path) -> None:
    fingerprint = write_log(make_log(20), tmp_path / "new" / "log.parquet")
    log = read_log(tmp_path / "new" / "log.parquet")
    assert log.schema.equals(INTERACTION_SCHEMA)
    assert log.select(make_log(20).column_names).to_pylist() == make_log(20).to_pylist()
    assert log["response"].null_count == len(log)
    metadata = log_metadata(tmp_path / "new" / "log.parquet")
    assert metadata == {
        "record": "interactions",
        "schema_version": "1",
        "version": __version__,
        "fingerprint": fingerprint,
    }
    assert table_fingerprint(log) == fingerprint


def test_any_parquet_reader_reads_a_log(tmp_path: Path) -> None:
    write_log(make_log(5), tmp_path / "log.parquet")
    plain = pq.read_table(tmp_path / "log.parquet")
    assert plain["query"].type == pa.string()
    assert plain["correct"].type == pa.bool_()


def test_sources(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.parquet"), write(tmp_path / "sub" / "b.parquet", model=["m", "m"])
    write(tmp_path / ".hidden.parquet")
    write(tmp_path / ".trash" / "c.parquet")
    (tmp_path / "notes.txt").write_text("no log")
    for source in (
        tmp_path,
        [a, b],
        [tmp_path, a, b],
        str(tmp_path / "**" / "*.parquet"),
        [str(a), tmp_path / "sub"],
    ):
        log = read_log(source)
        assert log["model"].to_pylist() == [None, None, "m", "m"], source
    assert find_files(tmp_path) == [a, tmp_path / "notes.txt", b]
    odd = write(tmp_path / "run[1]*.parquet")
    assert read_log(odd).num_rows == 2  # a file of that name, not a pattern


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "no.parquet", tmp_path / "*.parquet", "", "a\0b"):
        with pytest.raises(NotFoundError):
            read_log(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"holds no \.parquet file"):
        read_log(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no file named"):
        read_log([])
    with pytest.raises(OirlError):
        read_log("a" * 300)


def test_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    assert read_log(path, ["correct", "query"]).column_names == ["correct", "query"]
    absent = read_log(path, ["response"])
    assert (absent.num_rows, absent["response"].null_count) == (2, 2)
    assert read_log(path, ["replicate"])["replicate"].to_pylist() == [0, 0]
    with pytest.raises(ConfigError, match=r"no column 'querry' \(did you mean 'query'\?\); columns: query_id"):
        read_log(path, ["querry"])


def test_columns_of_other_types_are_cast(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        query=pa.array(["a", "b"], pa.large_string()),
        model=pa.array(["m", "m"]).dictionary_encode(),
        score=pa.array([1, 2]),
        replicate=pa.array([1, 0], pa.int64()),
        correct=pa.array([1, 0], pa.int8()),
        extra=["x", "y"],
    )
    log = read_log(path)
    assert log.schema.equals(INTERACTION_SCHEMA)
    assert [log[c].to_pylist() for c in ("query", "model", "score", "replicate", "correct")] == [
        ["a", "b"],
        ["m", "m"],
        [1.0, 2.0],
        [1, 0],
        [True, False],
    ]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("score", ["good", "bad"]),
        ("replicate", [2**40, 0]),
        ("replicate", [0.5, 0]),
        ("tokens_in", [1.5, 2.0]),
        # Graded between wrong and right: to call it right would be a guess, and a quiet one.
        ("correct", [0.3, 0.0]),
        ("correct", [7, 0]),
        ("query", [[1], [2]]),
    ],
)
def test_a_column_that_cannot_be_cast_without_loss_is_named(tmp_path: Path, column: str, values: list[Any]) -> None:
    with pytest.raises(DataError, match=f"{column!r} is .* must be"):
        read_log(write(tmp_path / "a.parquet", **{column: values}))


def test_required_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({**{k: v for k, v in LEAST.items() if k != "query"}, "querry": ["a", "b"]}), path)
    with pytest.raises(DataError, match=r"no column 'query' \(did you mean 'querry'\?\); columns there: "):
        read_log(path)
    with pytest.raises(DataError, match="'query_id' is empty in row 2"):
        read_log(write(path, query_id=["1", None]))
    for table in (pa.table({"query": ["a"]}), pa.table({"query": pa.array([], pa.string())})):
        with pytest.raises(DataError, match="no column 'query_id'"):
            write_log(table, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_other_files_are_not_logs(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for content in (b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b'{"query": "a"}\n'):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a readable Parquet file"):
            read_log(path)
    with LogWriter(path, "queries"):
        pass
    with pytest.raises(DataError, match="holds queries, not interactions"):
        read_log(path)
    later = pa.table(LEAST).replace_schema_metadata({"oirl.schema_version": "2"})
    with pq.ParquetWriter(path, later.schema) as writer:
        writer.write_table(later)
        writer.add_key_value_metadata({"oirl.schema_version": "2"})
    with pytest.raises(DataError, match="schema version 2, this oirl reads up to 1"):
        read_log(path)


def test_a_truncated_or_damaged_log_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    write_log(make_log(300), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 23):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_log(path)
    refused = 0
    for at in range(4, len(whole), len(whole) // 41):
        path.write_bytes(whole[:at] + b"\xff" * 16 + whole[at + 16 :])
        try:
            read_log(path)
        except DataError:
            refused += 1
    assert refused > 20  # any other exception fails the test


def test_scan_streams_in_batches(tmp_path: Path) -> None:
    write_log(make_log(100), tmp_path / "log.parquet")
    batches = list(scan_log(tmp_path / "log.parquet", ["query", "correct"], batch_rows=64))
    assert max(b.num_rows for b in batches) <= 64
    assert pa.Table.from_batches(batches).equals(read_log(tmp_path / "log.parquet", ["query", "correct"]))


def test_a_writer_left_by_an_exception_leaves_the_old_log(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    write_log(make_log(5), path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), LogWriter(path) as writer:  # noqa: PT012
        writer.write(read_log(path).to_batches()[0])
        raise RuntimeError
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["log.parquet"]


TEXT = st.none() | st.text(st.characters(exclude_categories=("Cs",)), max_size=5)
ROW = st.tuples(TEXT, st.none() | st.booleans(), st.none() | st.floats(allow_nan=False), st.none() | st.integers(0, 9))


def as_table(rows: list[tuple[Any, ...]]) -> pa.Table:
    text, correct, score, tokens = zip(*rows, strict=True) if rows else ([], [], [], [])
    columns = {
        "query_id": [str(i) for i in range(len(rows))],
        "response": pa.array(text, pa.string()),
        "correct": pa.array(correct, pa.bool_()),
        "score": pa.array(score, pa.float64()),
        "tokens_in": pa.array(tokens, pa.int32()),
    }
    return pa.table({k: pa.array(v, pa.string()) if isinstance(v, list) else v for k, v in columns.items()})


@given(st.lists(ROW, max_size=12), st.lists(st.integers(0, 12), max_size=4))
@settings(deadline=None)
def test_fingerprint_does_not_depend_on_the_cuts(rows: list[tuple[Any, ...]], cuts: list[int]) -> None:
    table = as_table(rows)
    at = sorted({0, len(rows), *(c for c in cuts if c < len(rows))})
    pieces = [table.slice(a, b - a) for a, b in itertools.pairwise(at)]
    assert table_fingerprint(pa.concat_tables([*pieces, table.slice(0, 0)])) == table_fingerprint(table)
    copied = pa.Table.from_pylist(table.to_pylist(), table.schema)
    assert table_fingerprint(copied) == table_fingerprint(table)


@given(st.lists(ROW, min_size=1, max_size=6), st.lists(ROW, min_size=1, max_size=6))
@settings(deadline=None)
def test_fingerprint_tells_contents_apart(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> None:
    same = repr(as_table(a).to_pylist()) == repr(as_table(b).to_pylist())
    assert (table_fingerprint(as_table(a)) == table_fingerprint(as_table(b))) == same


def test_fingerprint_by_hand() -> None:
    def of(**columns: Any) -> str:
        return table_fingerprint(pa.table(columns))

    assert of(a=["x", "yz"]) != of(a=["xy", "z"])
    assert of(a=["", None]) != of(a=[None, ""])
    assert of(a=["x"]) != of(b=["x"])
    assert of(a=pa.array([0, None])) != of(a=pa.array([None, 0]))
    assert of(a=["x"], b=pa.nulls(1, pa.string())) == of(a=["x"])  # an empty column changes nothing
    assert of(a=["x"], b=["y"]) == of(b=["y"], a=["x"])
    assert len(of(a=["x"])) == 32


def test_fingerprint_of_text_below_nulls() -> None:
    """Arrow allows any bytes where a value is null; they are no content."""
    offsets = pa.py_buffer(np.array([0, 2, 4, 6], np.int32))
    odd = pa.Array.from_buffers(pa.string(), 3, [pa.py_buffer(b"\x05"), offsets, pa.py_buffer(b"aabbcc")])
    plain = pa.array(["aa", None, "cc"])
    assert odd.to_pylist() == plain.to_pylist()
    prints = []
    for column in (odd, plain):
        batch = pa.RecordBatch.from_arrays([column], names=["a"])
        fingerprint = Fingerprint(batch.schema)
        fingerprint.update(batch)
        prints.append(fingerprint.hexdigest())
    assert prints[0] == prints[1]


@given(rows=st.lists(ROW, max_size=10))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_survives(tmp_path: Path, rows: list[tuple[Any, ...]]) -> None:
    table = as_table(rows)
    for name in ("query", "prompt_id", "prompt"):
        table = table.append_column(name, pa.array(["x"] * len(rows), pa.string()))
    fingerprint = oirl.write_log(table, tmp_path / "log.parquet")
    read = oirl.read_log(tmp_path / "log.parquet")
    assert read.select(table.column_names).equals(table.cast(read.select(table.column_names).schema))
    assert table_fingerprint(read) == fingerprint
