"""Hostile files: an error that names the file, or a refused row; never a traceback, never a half-written log."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oirl
from oirl.errors import DataError, OirlError
from oirl.logs.importing.pipeline import ImportReport

HEADER = "query,prompt,response\n"
GOOD = '{"query": "good", "prompt": "p"}\n'


def load(folder: Path, content: str | bytes, name: str = "rows.jsonl", **options: Any) -> ImportReport:
    source = folder / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return oirl.import_log(source, folder / "log.parquet", **options)


def kept(folder: Path, column: str = "query") -> list[Any]:
    return oirl.read_log(folder / "log.parquet")[column].to_pylist()


def refused(folder: Path) -> list[tuple[int, str]]:
    """Return row and reason of each refused row; the file must be JSON as the standard has it, without NaN."""

    def constant(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "log.rejected.jsonl").read_text()
    rows = [json.loads(line, parse_constant=constant) for line in text.splitlines()]
    return [(r["row"], r["reason"]) for r in rows]


def import_apart(source: Path, out: Path, format: str = "auto") -> tuple[int, str]:
    """Import in a process of its own, for what may crash it; return its exit code and rows read, kept, refused."""
    code = (
        "import sys, oirl\n"
        "try: r = oirl.import_log(*sys.argv[1:3], format=sys.argv[3])\n"
        "except oirl.OirlError: print('refused')\n"
        "else: print(r.rows_read, r.rows_kept, r.rows_refused)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out), format],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    return done.returncode, done.stdout.strip()


def table_file(folder: Path, name: str, values: pa.Array, kind: str) -> Path:
    n = len(values)
    columns: dict[str, Any] = {"query": [f"query {i}" for i in range(n)], "prompt": ["p"] * n}
    table = pa.table({**columns, name: values})
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.arrow", "rows.json", "rows.bin"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b" \n\n",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"PAR1",
        b"ARROW1",
        b"{",
        b"[",
        b'"',
        b"[]",
        b"null\n",
    ],
)
def test_files_with_next_to_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(OirlError, match=name.replace(".", r"\.")):
        load(tmp_path, content, name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_with_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(OirlError, match="holds no file"):
        oirl.import_log(tmp_path / "in", tmp_path / "log.parquet")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_every_row_refused_is_an_error_with_the_first_reason(tmp_path: Path, name: str) -> None:
    content = '{"query": "q", "prompt": "p", "score": "x"}\n' if name == "rows.jsonl" else "query,prompt,score\nq,p,x\n"
    with pytest.raises(DataError, match=r"no row could be kept; .*:1: score.*: a number is needed"):
        load(tmp_path, content, name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("end", ["   ", "\t", "\r\n  ", "x", "{"])
def test_a_last_line_without_a_row(tmp_path: Path, end: str) -> None:
    assert load(tmp_path, GOOD + end).rows_kept == 1


# Encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
@pytest.mark.parametrize("named", [True, False])
def test_other_unicode_is_an_error(tmp_path: Path, encoding: str, name: str, named: bool) -> None:
    content = (GOOD * 3 if name == "rows.jsonl" else HEADER + "a,p,r\n").encode(encoding)
    with pytest.raises(OirlError):
        load(tmp_path, content, name, **({"format": name[5:]} if named else {}))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_latin_1(tmp_path: Path) -> None:
    load(tmp_path, GOOD.encode() + '{"query": "café", "prompt": "p"}\n'.encode("latin-1"))
    assert refused(tmp_path) == [(2, "not UTF-8")]
    for content in (HEADER + "café,p,r\n", "query,prompt,réponse\na,p,r\n"):
        with pytest.raises(DataError, match="UTF-8"):
            load(tmp_path, content.encode("latin-1"), "rows.csv")
    bad = HEADER.encode() + b"a,p,r\nb,\xff\n"
    try:
        load(tmp_path, bad, "rows.csv")
    except OirlError:
        return
    assert refused(tmp_path)[0][0] == 2


def test_half_surrogate_pairs_are_refused(tmp_path: Path) -> None:
    rows = [
        '{"query": "\\ud800", "prompt": "p"}',
        '{"query": "a", "prompt": "p", "response": "\\udfff"}',
        '{"query": "b", "prompt": "p", "metadata": {"\\udfff": "\\ud800"}}',
        '{"query": "c", "prompt": "p", "response": "\\ud83d\\ude00"}',
    ]
    load(tmp_path, GOOD + "\n".join(rows))
    assert [row for row, _ in refused(tmp_path)] == [2, 3]
    assert kept(tmp_path, "response") == [None, None, "😀"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["query", "response"])
def test_text_of_other_tools_that_is_not_utf_8(tmp_path: Path, column: str, kind: str) -> None:
    """Arrow and Parquet readers take a text column on trust; a log that holds it breaks every later reader."""
    offsets = pa.py_buffer(np.array([0, 2, 4, 6], np.int32))
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"ab\xff\xfecd")])
    source = table_file(tmp_path, "other", bad, kind)
    mapping = {column: "other"}
    try:
        oirl.import_log(source, tmp_path / "log.parquet", mapping=mapping)
    except OirlError:
        return
    assert [row for row, _ in refused(tmp_path)] == [2]
    assert kept(tmp_path, column) == ["ab", "cd"]


# Truncated and damaged files


def test_truncated_json(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD + GOOD[:-9]).rows_refused == 1
    assert refused(tmp_path)[0][0] == 2
    with pytest.raises(DataError, match="not one"):
        load(tmp_path, json.dumps([json.loads(GOOD)] * 3)[:-5], "rows.json")


@pytest.mark.parametrize("cut", [1, 8, 200, 5000])
@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz"])
def test_truncated_gzip(tmp_path: Path, name: str, cut: int) -> None:
    rows = [os.urandom(30).hex() for _ in range(400)]
    text = (
        "".join(GOOD.replace("good", r) for r in rows)
        if "json" in name
        else HEADER + "".join(f"{r},p,r\n" for r in rows)
    )
    with pytest.raises(DataError, match=name):
        load(tmp_path, gzip.compress(text.encode())[:-cut], name)
    assert not (tmp_path / "log.parquet").exists()


def test_gzip_by_name_only_and_in_parts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz"):
        load(tmp_path, GOOD, "rows.jsonl.gz")
    parts = gzip.compress(GOOD.encode()) + gzip.compress(GOOD.replace("good", "more").encode())
    load(tmp_path, parts, "rows.jsonl.gz")
    assert kept(tmp_path) == ["good", "more"]


def test_a_csv_cut_off_inside_quotes(tmp_path: Path) -> None:
    """The last row is not whole; to keep it would take a piece of a response for the response."""
    with pytest.raises(DataError):
        load(tmp_path, HEADER + 'a,p,"r1"\nb,p,"the answer is 1', "rows.csv", strict=True)


def test_an_open_quote_does_not_swallow_rows_in_silence(tmp_path: Path) -> None:
    content = HEADER + 'a,p,"r1\n' + "".join(f"q{i},p,r\n" for i in range(50))
    try:
        report = load(tmp_path, content, "rows.csv")
    except DataError:
        return
    assert report.rows_refused > 0


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrows"])
def test_truncated_tables(tmp_path: Path, kind: str) -> None:
    n = 3000
    table = pa.table(
        {"query": [f"q {i}" for i in range(n)], "prompt": ["p"] * n, "response": [f"r{i}" for i in range(n)]}
    )
    path = tmp_path / f"whole.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "feather":
        feather.write_feather(table, path)
    else:
        with ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    whole = path.read_bytes()
    for size in range(1, len(whole) - 8, len(whole) // 11):
        with pytest.raises(OirlError, match=r"rows\."):
            load(tmp_path, whole[:size], f"rows.{kind}")
    assert not (tmp_path / "log.parquet").exists()


def test_a_damaged_arrow_file_does_not_crash_the_process(tmp_path: Path) -> None:
    """Offsets that point outside the buffer end a process by SIGSEGV or SIGBUS unless they are checked."""
    source = table_file(tmp_path, "response", pa.array([f"r{i}" for i in range(100)]), "arrow")
    content = bytearray(source.read_bytes())
    at = content.index(np.array([0, 7, 14, 21], np.int32).tobytes())
    content[at + 8 : at + 16] = np.array([2**31 - 1, 5], np.int32).tobytes()
    source.write_bytes(bytes(content))
    code, said = import_apart(source, tmp_path / "log.parquet")
    assert (code, said[:8]) in {(0, "refused"), (0, "100 99 1")}


# Long lines and large files


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_line_of_100_mb(tmp_path: Path, place: str) -> None:
    long = GOOD.replace("p", "x" * (100 << 20), 1)
    others = [GOOD, GOOD.replace("good", "x").replace('"p"', "5,,"), GOOD.replace("good", "more")]
    at = {"first": 0, "middle": 1, "last": 3}[place]
    report = load(tmp_path, "".join([*others[:at], long, *others[at:]]))
    assert (report.rows_read, report.rows_kept) == (4, 2)
    assert kept(tmp_path) == ["good", "more"]
    numbers = [1, 2, 3, 4]
    del numbers[at]
    assert [row for row, _ in refused(tmp_path)] == sorted([at + 1, numbers[1]])


def test_a_cell_of_100_mb(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than 16 MiB"):
        load(tmp_path, HEADER + "a,p,r\nb,p," + "x" * (100 << 20) + "\nc,p,r\n", "rows.csv")


def test_an_array_on_one_long_line(tmp_path: Path) -> None:
    """What `json.dump` writes is one line; it is no row of 40 MB."""
    rows = [{"query": f"q{i}", "prompt": "p", "response": "x" * 1000} for i in range(40_000)]
    assert load(tmp_path, json.dumps(rows), "rows.json").rows_kept == 40_000


def test_a_long_line_in_an_array_is_not_lost_in_silence(tmp_path: Path) -> None:
    rows = [
        json.dumps({"query": q, "prompt": "p", "response": "x" * n}) for q, n in (("a", 1), ("b", 45 << 20), ("c", 1))
    ]
    try:
        report = load(tmp_path, "[\n" + ",\n".join(rows) + "\n]\n", "rows.json")
    except DataError:
        return
    assert report.rows_read == 3


# Rows and their numbers


def test_csv_rows_that_do_not_fit_are_refused_under_their_number(tmp_path: Path) -> None:
    body = ['a,p,"l1\nl2\nl3"', "b,p", "c,p,r,extra", "d,p,ok", ",p,r", '"e ""x""",p,ok', "f,p", "g"]
    for newline in ("\n", "\r\n"):
        report = load(tmp_path, "\ufeff" + HEADER + newline.join(body), "rows.csv")
        assert (report.rows_read, report.rows_kept) == (8, 3)
        assert kept(tmp_path) == ["a", "d", 'e "x"']
        assert [row for row, _ in refused(tmp_path)] == [2, 3, 5, 7, 8]


def test_csv_row_numbers_hold_over_blocks(tmp_path: Path) -> None:
    """60 MB in blocks of 16: a short row of a later block must not shift the numbers of an earlier one."""
    short, bad = {5, 20_000, 40_000, 59_999}, {3, 20_001, 40_001, 59_998}
    text = "x" * 1000
    lines = [f"q{i},p" if i in short else f"q{i},p,{text},{'bad' if i in bad else 1}" for i in range(60_000)]
    report = load(tmp_path, "query,prompt,response,score\n" + "\n".join(lines), "rows.csv")
    assert report.rows_read == 60_000
    assert sorted(row - 1 for row, _ in refused(tmp_path)) == sorted(short | bad)


def test_json_rows_right_after_refused_ones(tmp_path: Path) -> None:
    rows = [
        GOOD,
        "nope\n",
        "\n",
        GOOD.replace("good", ""),
        "[1]\n",
        GOOD.replace("good", "more"),
        "5\n",
        "nul",
    ]
    report = load(tmp_path, "".join(rows))
    assert [row for row, _ in refused(tmp_path)] == [2, 4, 5, 7, 8]
    assert (report.rows_read, kept(tmp_path)) == (7, ["good", "more"])


@pytest.mark.parametrize(
    ("first", "second"), [(GOOD, "null"), (GOOD, "null\nnull\n"), (GOOD, GOOD + "null"), ("null\n", GOOD)]
)
def test_a_line_that_is_null(tmp_path: Path, first: str, second: str) -> None:
    """pyarrow.json ends the process by SIGSEGV on a block that begins with null, as a last line null does."""
    (tmp_path / "rows.jsonl").write_text(first + second)
    nulls = [n for n, line in enumerate((first + second).splitlines(), 1) if line == "null"]
    total = len((first + second).splitlines())
    code, said = import_apart(tmp_path / "rows.jsonl", tmp_path / "log.parquet", "jsonl")
    assert (code, said) == (0, f"{total} {total - len(nulls)} {len(nulls)}")
    assert [row for row, _ in refused(tmp_path)] == nulls


def test_an_array_with_other_things(tmp_path: Path) -> None:
    report = load(tmp_path, json.dumps([json.loads(GOOD), 5, None, "s", [], {"query": "", "prompt": "p"}]), "rows.json")
    assert (report.rows_read, [row for row, _ in refused(tmp_path)]) == (6, [2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    "content", [json.dumps(json.loads(GOOD), indent=2), GOOD.strip() + GOOD, "\r".join([GOOD.strip()] * 2)]
)
def test_objects_that_are_not_one_a_line(tmp_path: Path, content: str) -> None:
    try:
        report = load(tmp_path, content)
    except DataError:
        return
    assert report.rows_refused > 0 or report.rows_kept == 2


def test_header_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names 'query' twice"):
        load(tmp_path, "query,prompt,query\na,p,b\n", "rows.csv")
    with pytest.raises(DataError, match=r"no field 'query' \(did you mean ' query'\?\)"):
        load(tmp_path, "id, query,prompt\n1,a,p\n", "rows.csv")
    with pytest.raises(DataError, match="there are no rows"):
        load(tmp_path, HEADER, "rows.csv")


# Depth, numbers, types


@pytest.mark.parametrize("depth", [900, 985, 1000, 5000, 200_000])
@pytest.mark.parametrize("place", ["line", "first line", "first object", "metadata", "score"])
def test_deep_nesting(tmp_path: Path, depth: int, place: str) -> None:
    nest = "[" * depth + "]" * depth
    content = {
        "line": GOOD + nest,
        "first line": nest + "\n" + GOOD,
        "first object": '{"a":' * depth + "1" + "}" * depth + "\n" + GOOD,
        "metadata": GOOD + f'{{"query": "a", "prompt": "p", "metadata": {nest}}}',
        "score": GOOD + f'{{"query": "a", "prompt": "p", "score": {nest}}}',
    }[place]
    try:
        report = load(tmp_path, content)
    except OirlError:
        return
    assert report.rows_read == 2


@pytest.mark.parametrize("format", ["gsm8k", "svamp", "jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        "5",
        "null",
        "[]",
        "{}",
        "[[1]]",
        "[" * 5000,
        '[{"Body": "a", "Question": "q", "Answer": ' + "9" * 400 + "}]",
        '[{"Body": "a", "Question": "q", "Answer": NaN}]',
        '{"question": ["q"], "answer": "#### 1"}',
        '{"question": "\\ud800", "answer": "#### 1"}',
    ],
)
def test_problem_files_that_are_none(tmp_path: Path, format: str, content: str) -> None:
    with pytest.raises(OirlError):
        load(tmp_path, content, format=format)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_numbers_that_are_none(tmp_path: Path) -> None:
    scores = ["NaN", "1e999", "-Infinity", "9" * 400, "true", '"1,5"', "[1]", '""', "2"]
    rows = [f'{{"query": "q{i}", "prompt": "p", "score": {s}}}\n' for i, s in enumerate(scores)]
    load(tmp_path, "".join(rows) + '{"query": NaN, "prompt": "p"}')
    assert kept(tmp_path, "score") == [None, 2.0]
    assert [row for row, _ in refused(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 10]


def test_metadata_is_json_as_the_standard_has_it(tmp_path: Path) -> None:
    load(tmp_path, GOOD + '{"query": "a", "prompt": "p", "metadata": {"x": NaN}}')

    def constant(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    for text in kept(tmp_path, "metadata"):
        assert text is None or json.loads(text, parse_constant=constant)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize("value", ["2147483648", "-1e10", "0.5", "1e400", "12x"])
def test_whole_numbers_that_are_none(tmp_path: Path, name: str, value: str) -> None:
    content = f"query,prompt,tokens_in\na,p,1\nb,p,{value}\n"
    if name == "rows.jsonl":
        content = (
            '{"query": "a", "prompt": "p", "tokens_in": 1}\n'
            + f'{{"query": "b", "prompt": "p", "tokens_in": "{value}"}}\n'
        )
    load(tmp_path, content, name)
    assert kept(tmp_path, "tokens_in") == [1]
    assert refused(tmp_path)[0][0] == 2


def test_propensities(tmp_path: Path) -> None:
    values = [0.5, 1, 0, -0.1, 1.01, None, "0.25"]
    load(
        tmp_path,
        "".join(json.dumps({"query": f"q{i}", "prompt": "p", "propensity": v}) + "\n" for i, v in enumerate(values)),
    )
    assert kept(tmp_path, "propensity") == [0.5, 1.0, None, 0.25]
    assert [row for row, _ in refused(tmp_path)] == [3, 4, 5]


def test_decimals_are_numbers(tmp_path: Path) -> None:
    """Databases export money, scores and counts as decimals."""
    table = pa.table(
        {
            "query": ["a", "b"],
            "prompt": ["p", "p"],
            "score": pa.array([Decimal("0.5"), Decimal("1.25")]),
            "cost": pa.array([Decimal("0.01"), None]),
            "tokens_in": pa.array([Decimal(12), Decimal(7)]),
            "correct": pa.array([Decimal(1), Decimal(0)]),
            "answer": pa.array([Decimal("12"), Decimal("7")]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    oirl.import_log(tmp_path / "rows.parquet", tmp_path / "log.parquet")
    row = oirl.read_log(tmp_path / "log.parquet").to_pylist()[0]
    assert [row[c] for c in ("score", "cost", "tokens_in", "correct", "answer")] == [
        0.5,
        0.01,
        12,
        True,
        "12",
    ]


def test_times_in_nanoseconds_without_pandas(tmp_path: Path) -> None:
    times = pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns"))
    source = table_file(tmp_path, "created_at", times, "parquet")
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'pandas': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import oirl\n"
        "print(oirl.import_log(sys.argv[1], sys.argv[2]).rows_kept)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "log.parquet")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.strip() == "2", done.stderr[-300:]


ODD: dict[str, pa.Array] = {
    "string_view": pa.array(["a", "b"], pa.string_view()),
    "large_string": pa.array(["a", None], pa.large_string()),
    "binary": pa.array([b"a", b"\xff"]),
    "large_binary": pa.array([b"a", b"b"], pa.large_binary()),
    "float16": pa.array(np.array([0.5, np.nan], np.float16)),
    "float32": pa.array([0.5, 2], pa.float32()),
    "int8": pa.array([0, 1], pa.int8()),
    "uint64": pa.array([2**64 - 1, 1], pa.uint64()),
    "bool": pa.array([True, None]),
    "null": pa.nulls(2),
    "date32": pa.array([date(2024, 1, 1)] * 2),
    "date64": pa.array([date(2024, 1, 1)] * 2, pa.date64()),
    "time64": pa.array([time(1, 2)] * 2),
    "duration": pa.array([timedelta(1)] * 2),
    "timestamp_s": pa.array([0, 1], pa.timestamp("s", tz="America/New_York")),
    "timestamp_ns": pa.array([0, 1], pa.timestamp("ns")),
    "decimal256": pa.array([Decimal(1), Decimal(0)], pa.decimal256(50)),
    "list": pa.array([["a"], None]),
    "fixed_list": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
    "struct": pa.array([{"a": 1}, {"a": None}]),
    "map": pa.array([[("a", b"x")], []], pa.map_(pa.string(), pa.binary())),
    "dictionary": pa.array(["a", None]).dictionary_encode(),
    "dictionary_null": pa.DictionaryArray.from_arrays([0, 1], ["a", None]),
    "run_end": pa.RunEndEncodedArray.from_arrays([2], ["m"]),
    "uuid": pa.array([b"1" * 16, b"2" * 16], pa.uuid()),
    "json": pa.array(['{"a": 1}'] * 2, pa.json_()),
    "union": pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]),
    "interval": pa.array([pa.scalar((1, 2, 3), pa.month_day_nano_interval())] * 2),
}


@pytest.mark.parametrize("column", ["query", "response", "correct", "score", "tokens_in", "created_at", "metadata"])
@pytest.mark.parametrize("kind", list(ODD))
def test_columns_of_any_arrow_type(tmp_path: Path, kind: str, column: str) -> None:
    source = table_file(tmp_path, "odd", ODD[kind], "arrow")
    try:
        report = oirl.import_log(source, tmp_path / "log.parquet", mapping={column: "odd"})
    except OirlError:
        assert not (tmp_path / "log.parquet").exists()
        return
    assert report.rows_read == 2
    assert len(kept(tmp_path, column)) == report.rows_kept


@pytest.mark.parametrize("kind", ["string_view", "large_string", "dictionary", "json"])
def test_texts_of_other_arrow_types_are_texts(tmp_path: Path, kind: str) -> None:
    """Polars writes string views, pandas categories, others JSON as an extension type."""
    column = "metadata" if kind == "json" else "response"
    source = table_file(tmp_path, "odd", ODD[kind], "arrow")
    assert oirl.import_log(source, tmp_path / "log.parquet", mapping={column: "odd"}).rows_kept == 2


# Anything at all


HEADS = [
    b"",
    b"PAR1",
    b"ARROW1\0\0",
    b"\xff\xff\xff\xff",
    b"{",
    b"[",
    b"query,prompt\n",
    b'{"query":"a","prompt":"p"}\n',
]


@given(
    head=st.sampled_from(HEADS),
    body=st.binary(max_size=200),
    format=st.sampled_from(["auto", "jsonl", "csv", "tsv", "parquet", "arrow", "gsm8k", "svamp"]),
)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes(tmp_path: Path, head: bytes, body: bytes, format: str) -> None:
    try:
        report = load(tmp_path, head + body, "rows.csv", format=format)
    except OirlError as e:
        message = str(e)
    else:
        message = ""
        assert report.rows_read == report.rows_kept + report.rows_refused
        (tmp_path / "log.parquet").unlink()
    assert not message or "rows.csv" in message
    assert not (tmp_path / "log.parquet").exists()


@pytest.mark.parametrize("format", ["json:loads", "json:decoder", ".json:decoder", "json:nope", ":", "a:b:c"])
def test_formats_that_are_none(tmp_path: Path, format: str) -> None:
    with pytest.raises(OirlError):
        load(tmp_path, GOOD, format=format)


def test_a_folder_named_like_a_table(tmp_path: Path) -> None:
    """Spark writes the folder rows.csv with part files and an empty _SUCCESS in it."""
    (tmp_path / "rows.csv").mkdir()
    (tmp_path / "rows.csv" / "part-0.csv").write_text(HEADER + "a,p,r\n")
    assert oirl.import_log(tmp_path / "rows.csv", tmp_path / "log.parquet").rows_kept == 1


def test_lines_after_a_line_that_is_too_long_keep_their_numbers(tmp_path: Path) -> None:
    row = '{"query": "q%d", "prompt": "p"}\n'
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.write(row % 0)
        file.write("x" * (45 << 20) + "\n")
        file.writelines(row % i for i in range(120_000))
        file.write("BAD\n" + row % -1)
    oirl.import_log(tmp_path / "rows.jsonl", tmp_path / "log.parquet")
    lines = (tmp_path / "log.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [2, 120_003]
