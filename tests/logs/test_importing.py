"""Importing: every format to the same log, rows conserved, ids, replicates, constants, mapping, problem files."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.feather as feather
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_oirl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oirl
from oirl.errors import ConfigError, DataError, OirlError
from oirl.logs.importing.pipeline import ImportReport
from oirl.logs.store import log_metadata, table_fingerprint
from oirl.logs.text import text_id

FIXTURES = ROOT / "tests" / "fixtures"

ROWS: list[dict[str, Any]] = [
    {
        "query": "Two, three?",
        "prompt": "Think.\n{query}",
        "response": 'He said "5".',
        "correct": True,
        "score": 0.5,
    },
    {
        "query": "Two, three?",
        "prompt": "Think.\n{query}",
        "response": "line\nline",
        "correct": False,
        "score": 1.0,
    },
    {"query": "Zürich 🎉", "prompt": "{query}", "response": None, "correct": None, "score": None},
    {"query": "2024-01-01", "prompt": "{query}", "response": "007", "correct": True, "score": -2.25},
]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(folder: Path, content: str | bytes, name: str = "rows.jsonl", **options: Any) -> tuple[ImportReport, pa.Table]:
    source = folder / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = oirl.import_log(source, folder / "log.parquet", **options)
    return report, oirl.read_log(folder / "log.parquet")


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.rejected.jsonl").read_text().splitlines()]


def write_as(name: str, table: pa.Table, path: Path) -> None:
    if name == "rows.parquet":
        pq.write_table(table, path)
    elif name == "rows.feather":
        feather.write_feather(table, path, compression="lz4")
    elif name == "rows.arrow":
        with ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, 2)
    elif name == "rows.arrows":
        with ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, 3)
    elif name in {"rows.csv", "rows.tsv"}:
        pcsv.write_csv(table, path, pcsv.WriteOptions(delimiter="," if name == "rows.csv" else "\t"))
    elif name == "rows.csv.gz":
        with gzip.open(path, "wb") as file:
            pcsv.write_csv(table, file)
    elif name == "rows.json":
        path.write_text(json.dumps(table.to_pylist(), indent=1, ensure_ascii=False))
    elif name == "rows.jsonl.gz":
        path.write_bytes(gzip.compress(lines(table.to_pylist()).encode()))
    else:
        text = lines(table.to_pylist())
        path.write_text("\ufeff" + text.replace("\n", "\r\n\r\n") if name == "blank.jsonl" else text, newline="")


FORMATS = {
    "rows.jsonl": "jsonl",
    "blank.jsonl": "jsonl",
    "rows.jsonl.gz": "jsonl",
    "rows.json": "jsonl",
    "rows.csv": "csv",
    "rows.csv.gz": "csv",
    "rows.tsv": "tsv",
    "rows.parquet": "parquet",
    "rows.feather": "arrow",
    "rows.arrow": "arrow",
    "rows.arrows": "arrow",
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_makes_the_same_log(tmp_path: Path, name: str) -> None:
    write_as(name, pa.Table.from_pylist(ROWS), tmp_path / name)
    report = oirl.import_log(tmp_path / name, tmp_path / "log.parquet")
    log = oirl.read_log(tmp_path / "log.parquet")
    assert log.select(list(ROWS[0])).to_pylist() == ROWS
    assert log["replicate"].to_pylist() == [0, 1, 0, 0]
    assert log["query_id"].to_pylist() == [text_id(row["query"]) for row in ROWS]
    prompt_ids = log["prompt_id"].to_pylist()
    assert prompt_ids[0] == prompt_ids[1] != prompt_ids[2] == prompt_ids[3]
    assert (report.rows_read, report.rows_kept, report.rows_refused) == (4, 4, 0)
    assert (report.n_queries, report.n_prompts, report.record) == (3, 2, "interactions")
    assert [f["format"] for f in report.files] == [FORMATS[name]]
    assert report.fingerprint == table_fingerprint(log) == log_metadata(tmp_path / "log.parquet")["fingerprint"]


def test_all_formats_have_one_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for name in FORMATS:
        write_as(name, pa.Table.from_pylist(ROWS), tmp_path / name)
        prints.add(oirl.import_log(tmp_path / name, tmp_path / "out" / "log.parquet").fingerprint)
    assert len(prints) == 1


def test_a_log_imports_as_itself(tmp_path: Path) -> None:
    report, log = load(tmp_path, lines(ROWS))
    again = oirl.import_log(tmp_path / "log.parquet", tmp_path / "again.parquet")
    assert oirl.read_log(tmp_path / "again.parquet").equals(log)
    assert again.fingerprint == report.fingerprint


def test_an_empty_prompt_is_a_prompt_in_every_format(tmp_path: Path) -> None:
    rows = [{"query": "a", "prompt": "", "response": "r"}, {"query": "b", "prompt": "P", "response": "r"}]
    for name in FORMATS:
        write_as(name, pa.Table.from_pylist(rows), tmp_path / name)
        report = oirl.import_log(tmp_path / name, tmp_path / "out" / "log.parquet")
        assert (name, report.rows_kept) == (name, 2)


def test_queries_in_another_spelling_are_one_query(tmp_path: Path) -> None:
    rows = [{"query": q, "prompt": "p"} for q in ("How many?", "how  many?", "HOW MANY? ")]
    report, log = load(tmp_path, lines(rows))
    assert (report.rows_kept, report.n_queries) == (3, 1)
    assert len(set(log["query_id"].to_pylist())) == 1
    assert log["replicate"].to_pylist() == [0, 1, 2]


def test_prompts_that_differ_in_spacing_are_all_kept(tmp_path: Path) -> None:
    rows = [{"query": "q", "prompt": p} for p in ("Think.\n{query}", "Think. {query}", "think. {query}")]
    report, log = load(tmp_path, lines(rows))
    assert report.rows_kept == 3
    texts = dict(zip(log["prompt_id"].to_pylist(), log["prompt"].to_pylist(), strict=True))
    assert all(texts[i] == p for i, p in zip(log["prompt_id"].to_pylist(), log["prompt"].to_pylist(), strict=True))


def test_an_id_of_two_texts_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = [
        {"query_id": "1", "query": "a", "prompt": "p"},
        {"query_id": "1", "query": "b", "prompt": "p"},
        {"query_id": "2", "query": "b", "prompt": "p"},
    ]
    report, _ = load(tmp_path, lines(rows))
    assert report.rows_kept == 2
    assert [(r["row"], r["reason"]) for r in rejected(tmp_path)] == [
        (2, "query_id is '1': it stood for another query in an earlier row")
    ]


def test_a_refused_row_decides_nothing_about_ids(tmp_path: Path) -> None:
    rows = [
        {"query_id": "1", "query": "wrong", "prompt_id": "w", "prompt": "w", "score": "bad"},
        {"query_id": "1", "query": "right", "prompt_id": "p", "prompt": "p"},
        {"query_id": "2", "query": None, "prompt_id": "p", "prompt": "p"},
        {"query_id": "2", "query": "two", "prompt_id": "p", "prompt": "p"},
    ]
    report, log = load(tmp_path, lines(rows))
    assert log["query"].to_pylist() == ["right", "two"]
    assert [r["row"] for r in rejected(tmp_path)] == [1, 3]
    assert (report.n_queries, report.n_prompts) == (2, 1)


def test_replicates(tmp_path: Path) -> None:
    base = {"query": "q", "prompt": "p"}
    rows = [base, {**base, "model": "m"}, base, {**base, "run_id": "r"}, {**base, "model": "m"}, base]
    _, log = load(tmp_path, lines(rows))
    assert log["replicate"].to_pylist() == [0, 0, 1, 0, 1, 2]


def test_replicates_over_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"query": "q", "prompt": "p", "response": name}]))
    oirl.import_log([tmp_path / "b.jsonl", str(tmp_path / "[ac].jsonl")], tmp_path / "log.parquet")
    log = oirl.read_log(tmp_path / "log.parquet")
    assert log["response"].to_pylist() == ["b", "a", "c"]
    assert log["replicate"].to_pylist() == [0, 1, 2]


def test_given_replicates_and_counted_ones_never_meet(tmp_path: Path) -> None:
    base = {"query": "q", "prompt": "p"}
    (tmp_path / "a.jsonl").write_text(lines([base]))
    (tmp_path / "b.jsonl").write_text(lines([{**base, "replicate": 0}, {**base, "replicate": 7}]))
    oirl.import_log([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "log.parquet")
    numbers = oirl.read_log(tmp_path / "log.parquet")["replicate"].to_pylist()
    assert len(numbers) == len(set(numbers))


def test_a_repeated_replicate_is_refused(tmp_path: Path) -> None:
    base = {"query": "q", "prompt": "p"}
    report, log = load(tmp_path, lines([{**base, "replicate": n} for n in (3, 0, 3, -1)]))
    assert log["replicate"].to_pylist() == [3, 0]
    assert [(r["row"], r["reason"].split(":")[0]) for r in rejected(tmp_path)] == [
        (3, "the same query, prompt, model, run and replicate as an earlier row"),
        (4, "replicate is negative"),
    ]
    assert report.rows_read == 4


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines(ROWS))
    sources = [tmp_path / "in", tmp_path / "in" / "a.jsonl", str(tmp_path / "in" / "*.jsonl")]
    assert oirl.import_log(sources, tmp_path / "log.parquet").rows_kept == 4


def test_mapping_and_constants(tmp_path: Path) -> None:
    rows = [{"doc": {"q": "hi", "n": [1, {"g": 5}]}, "ok": "yes", "out": "r", "query": "not this"}] * 2
    mapping = {"query": "doc.q", "answer": "doc.n.1.g", "correct": "ok", "response": "out"}
    constants = {
        "prompt": "{query}",
        "model": "llama-2-7b-chat",
        "score": "0.5",
        "created_at": "2024-05-31T12:00:00Z",
    }
    for name, content in (("a.jsonl", lines(rows)), ("a.json", json.dumps(rows))):
        _, log = load(tmp_path, content, name, mapping=mapping, constants=constants)
        row = log.to_pylist()[1]
        assert (row["query"], row["answer"], row["correct"], row["response"]) == ("hi", "5", True, "r"), name
        assert (row["prompt"], row["model"], row["score"]) == ("{query}", "llama-2-7b-chat", 0.5)
        assert row["created_at"] == datetime(2024, 5, 31, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.feather"])
def test_a_missing_column_names_the_columns_there(tmp_path: Path, name: str) -> None:
    write_as(name, pa.table({"querry": ["a"], "prompt": ["p"]}), tmp_path / name)
    message = r"no field 'query' \(did you mean 'querry'\?\) .*fields there: querry, prompt; use --map query=FIELD"
    with pytest.raises(DataError, match=message):
        oirl.import_log(tmp_path / name, tmp_path / "log.parquet")
    with pytest.raises(DataError, match="no field 'modell' for the column 'model'"):
        oirl.import_log(tmp_path / name, tmp_path / "log.parquet", mapping={"query": "querry", "model": "modell"})
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mapping": {"querry": "q"}},
            r"--map querry=q: no column 'querry' \(did you mean 'query'\?\); columns of",
        ),
        ({"constants": {"modle": "m"}}, r"--set modle=m: no column 'modle' \(did you mean 'model'\?\)"),
        ({"constants": {"correct": "maybe"}}, "--set correct=maybe: correct is 'maybe': allowed are"),
        ({"constants": {"model": "m"}, "mapping": {"model": "m"}}, "'model' stands in both"),
        ({"format": "jsnl"}, r"unknown format 'jsnl' \(did you mean 'jsonl'\?\); known: gsm8k"),
        ({"grade": "numerik"}, r"unknown checker 'numerik' \(did you mean 'numeric'\?\)"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OirlError, match=message):
        load(tmp_path, lines(ROWS), **options)
    assert not (tmp_path / "log.parquet").exists()


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(lines(ROWS))
    with pytest.raises(ConfigError, match="also a source"):
        oirl.import_log(source, source)
    with pytest.raises(ConfigError, match="is a folder"):
        oirl.import_log(source, tmp_path)
    with pytest.raises(OirlError):
        oirl.import_log([], tmp_path / "log.parquet")
    assert source.read_text() == lines(ROWS)


def test_a_source_is_never_deleted(tmp_path: Path) -> None:
    """Refused rows, mended by hand, imported again under the name of the log."""
    source = tmp_path / "log.rejected.jsonl"
    source.write_text(lines(ROWS))
    with contextlib.suppress(ConfigError):
        oirl.import_log(source, tmp_path / "log.parquet")
    assert source.read_text() == lines(ROWS)


def test_strict_refuses_everything(tmp_path: Path) -> None:
    load(tmp_path, lines(ROWS))
    before = (tmp_path / "log.parquet").read_bytes()
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*--strict"):
        load(tmp_path, lines([ROWS[0], {"query": "", "prompt": "p"}, *ROWS]), strict=True)
    assert (tmp_path / "log.parquet").read_bytes() == before
    assert not (tmp_path / "log.rejected.jsonl").exists()
    report, _ = load(tmp_path, lines(ROWS), strict=True)
    assert report.rows_kept == 4


def test_refused_rows_of_an_earlier_import_do_not_stay(tmp_path: Path) -> None:
    load(tmp_path, lines([*ROWS, {"query": ""}]))
    assert len(rejected(tmp_path)) == 1
    report, _ = load(tmp_path, lines(ROWS))
    assert report.rejected_file is None
    assert not (tmp_path / "log.rejected.jsonl").exists()


def test_an_import_that_fails_leaves_the_refusals_of_the_last(tmp_path: Path) -> None:
    load(tmp_path, lines([*ROWS, {"query": ""}]))
    with pytest.raises(DataError, match="no row could be kept"):
        load(tmp_path, lines([{"query": "", "prompt": "p"}]))
    assert len(rejected(tmp_path)) == 1
    assert oirl.read_log(tmp_path / "log.parquet").num_rows == 4


def test_reasons_are_counted_and_say_what_is_wrong(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        {"query": "", "prompt": "p"},
        {"prompt": "p"},
        *[{"query": "q", "prompt": "p", "score": f"bad {i}"} for i in range(3)],
        *[{"query": "q", "prompt": "p", "created_at": f"05/{i}/2024"} for i in range(4)],
    ]
    report, _ = load(tmp_path, lines(rows))
    counts = {reason["reason"]: (reason["count"], reason["first"].rsplit(":", 1)[1]) for reason in report.reasons}
    # One reason for one fault, whatever the value was; the most frequent first.
    assert list(counts.values()) == [(4, "10"), (3, "7"), (2, "5")]
    assert [reason.split()[0].rstrip(":") for reason in counts] == ["created_at", "score", "query"]
    assert "empty" in list(counts)[2]


ANY = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers(), max_size=1)
)
OBJECT = st.fixed_dictionaries(
    {"query": st.sampled_from(["a", "b", "c?", " "]) | ANY, "prompt": st.sampled_from(["p", "", "r"]) | ANY},
    optional={
        "correct": st.sampled_from([True, 1, "no", "maybe", None]),
        "score": ANY,
        "replicate": st.integers(-1, 2),
        "response": ANY,
        "metadata": ANY,
        "created_at": ANY,
        "query_id": st.sampled_from(["1", "2", 3, None]),
        "propensity": st.floats(-0.5, 1.5),
        "tokens_in": ANY,
    },
)
GARBAGE = st.sampled_from(["", "  ", "{", "nul", "[1, 2]", "5", '"text"', '{"query": }', "\ufffd", '{"a": 1}{"b": 2}'])
LINE = OBJECT.map(json.dumps) | GARBAGE


@given(body=st.lists(LINE, max_size=12), blank=st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_are_conserved(tmp_path: Path, body: list[str], blank: bool) -> None:
    """Read = kept + refused; each refused row is named once, in order; a bad file leaves the old log."""
    body = ['{"query": "first", "prompt": "p"}', *body]
    content = ("\n\n" if blank else "\n").join(body)
    out = tmp_path / "log.parquet"
    before = out.read_bytes() if out.exists() else b""
    try:
        report, log = load(tmp_path, content)
    except OirlError:
        assert (out.read_bytes() if out.exists() else b"") == before
        return
    numbers = [n for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    assert report.rows_read == len(numbers) == report.rows_kept + report.rows_refused
    assert len(log) == report.rows_kept
    refused = rejected(tmp_path) if report.rejected_file else []
    assert len(refused) == report.rows_refused == sum(r["count"] for r in report.reasons)
    rows = [r["row"] for r in refused]
    assert rows == sorted(set(rows))
    assert set(rows) <= set(numbers)
    kept = [json.loads(content.split("\n")[n - 1]) for n in numbers if n not in rows]
    # What was kept is what stood in those lines, in their order.
    assert [r.get("correct") in (True, 1) for r in kept] == [c is True for c in log["correct"].to_pylist()]
    assert len(set(zip(*(log[c].to_pylist() for c in ("query_id", "prompt_id", "replicate")), strict=True))) == len(log)


@given(rows=st.lists(OBJECT, max_size=10))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_fast_way_and_the_slow_way_agree(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """A blank line makes oirl read a block of JSON Lines by Python instead of Arrow."""
    rows = [{"query": "first", "prompt": "p", "replicate": 0}, *rows]
    outcomes = []
    for content in (lines(rows), lines(rows) + "\n"):
        try:
            report, _log = load(tmp_path, content)
            outcomes.append((report.fingerprint, [r["row"] for r in rejected(tmp_path)] if report.rows_refused else []))
        except OirlError as e:
            outcomes.append((str(e), []))
    assert outcomes[0] == outcomes[1]


def test_numbers_of_one_column_after_the_first_rows(tmp_path: Path) -> None:
    """Types come from the first 200 rows; what comes later keeps its digits."""
    rows: list[dict[str, Any]] = [{"query": f"q{i}", "prompt": "p", "answer": i + 0.5} for i in range(250)]
    rows += [{"query": "big", "prompt": "p", "answer": 12345678901234567890}]
    _, log = load(tmp_path, lines(rows))
    assert log["answer"].to_pylist()[-1] == "12345678901234567890"


def test_values_by_hand(tmp_path: Path) -> None:
    fields = ("query", "answer", "correct", "score", "tokens_in", "metadata", "created_at")
    cases: list[tuple[Any, ...]] = [
        (10**30, 5, "TRUE", "1e-3", "12", {"b": [1], "a": None}, "2024-05-31T12:00:00Z"),
        (2.0, 1.5, 0, 3, 7.0, "text", 1717156800),
        (True, "007", " wrong ", None, "", [1, "x"], "2024-05-31 14:00:00+02:00"),
    ]
    rows = [{"prompt": "p", **dict(zip(fields, case, strict=True))} for case in cases]
    _, log = load(tmp_path, lines(rows))
    noon = datetime(2024, 5, 31, 12, tzinfo=timezone.utc)
    assert [tuple(row[f] for f in fields) for row in log.to_pylist()] == [
        ("1" + "0" * 30, "5", True, 0.001, 12, '{"a": null, "b": [1]}', noon),
        ("2", "1.5", False, 3.0, 7, "text", noon),
        ("true", "007", False, None, None, '[1, "x"]', noon),
    ]


def test_texts_of_csv_stay_texts(tmp_path: Path) -> None:
    _, log = load(tmp_path, "query,prompt,response,answer\n2024-01-01,007,NA,1e5\n12:30,null,NaN,\n", "rows.csv")
    assert [tuple(r[c] for c in ("query", "prompt", "response", "answer")) for r in log.to_pylist()] == [
        ("2024-01-01", "007", "NA", "1e5"),
        ("12:30", "null", "NaN", None),
    ]


def test_gsm8k_by_hand(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"question": "How much?", "answer": "It is <<1+1=2>>2.\n#### 1,002"},
        {"question": "Half?", "answer": "no mark"},
        {"question": "How  MUCH?", "answer": "again #### 3"},
        [1],
    ]
    source = tmp_path / "test.jsonl"
    source.write_text(lines(rows))
    report = oirl.import_log(source, tmp_path / "q.parquet")
    assert (report.record, report.rows_read, report.rows_kept, report.files[0]["format"]) == (
        "queries",
        4,
        1,
        "gsm8k",
    )
    (row,) = pq.read_table(tmp_path / "q.parquet").to_pylist()
    assert (row["query"], row["answer"], row["dataset"], row["split"]) == (
        "How much?",
        "1002",
        "gsm8k",
        "test",
    )
    assert json.loads(row["metadata"]) == {"solution": "It is <<1+1=2>>2."}
    assert row["query_id"] == text_id("how much?")
    refused = [json.loads(x) for x in (tmp_path / "q.rejected.jsonl").read_text().splitlines()]
    assert [r["row"] for r in refused] == [2, 3, 4]


def test_svamp_by_hand(tmp_path: Path) -> None:
    problem = {
        "ID": "c-1",
        "Body": "Ann had 3 hens",
        "Question": "How many?",
        "Answer": 3.0,
        "Type": "T",
        "Equation": "3",
    }
    rows = [problem, {**problem, "Body": "Bob had 4.", "Answer": 2.5}, {**problem, "Body": None}]
    for name, content in (
        ("s.json", json.dumps(rows).encode()),
        ("s.json.gz", gzip.compress(json.dumps(rows).encode())),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(rows).encode()),
    ):
        (tmp_path / name).write_bytes(content)
        report = oirl.import_log(tmp_path / name, tmp_path / "q.parquet")
        assert (report.record, report.rows_kept, report.rows_refused) == ("queries", 2, 1), name
        read = pq.read_table(tmp_path / "q.parquet").to_pylist()
        assert [(r["query"], r["answer"]) for r in read] == [
            ("Ann had 3 hens. How many?", "3"),
            ("Bob had 4. How many?", "2.5"),
        ]
        assert json.loads(read[0]["metadata"]) == {"id": "c-1", "type": "T", "equation": "3"}


@pytest.mark.real_data
def test_real_problem_files(real_data: Path, tmp_path: Path) -> None:
    report = oirl.import_log(real_data / "gsm8k", tmp_path / "q.parquet")
    assert (report.rows_read, report.rows_kept, report.rows_refused) == (8792, 8792, 0)
    table = pq.read_table(tmp_path / "q.parquet")
    counts = {c["values"]: c["counts"] for c in table["split"].value_counts().to_pylist()}
    assert counts == {"train": 7473, "test": 1319}
    assert table["answer"][0].as_py() == "18"
    assert oirl.import_log(real_data / "svamp", tmp_path / "s.parquet").rows_kept == 1000
    with pytest.raises(ConfigError, match="--grade needs interactions"):
        oirl.import_log(real_data / "svamp", tmp_path / "s.parquet", grade="numeric")


@pytest.mark.real_data
def test_the_published_gsm8k_log(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "prompt_oirl_llama2" / "gsm8k.parquet"
    report = oirl.import_log(source, tmp_path / "log.parquet", constants={"run_id": "published"})
    assert report.rows_read == report.rows_kept + report.rows_refused == 60_838
    assert report.rows_refused == 0
    assert report.n_prompts == 16


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Ten times the rows, in one record batch, take about the same memory beyond what queries and ids need."""
    n = 300_000
    text = "the same words again and again " * 12
    table = pa.table(
        {
            "query": pa.array([f"query {i % 1000}" for i in range(n)]),
            "prompt": pa.array(["p"] * n),
            "response": pa.array([f"{i} {text}" for i in range(n)]),
        }
    )
    sizes = {}
    for rows in (40_000, n):
        with ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
            writer.write_table(table.slice(0, rows).combine_chunks())
        sizes[rows] = peak_mb(tmp_path / "rows.arrow", tmp_path / "log.parquet")
    assert sizes[n] - sizes[40_000] < 250


def peak_mb(source: Path, out: Path) -> float:
    import os
    import subprocess
    import sys

    from conftest import ROOT

    # Pages of a mapped file count as resident, but the system takes them back at will: RssAnon is what is held.
    code = (
        "import sys, threading, time, oirl\n"
        "peak, done = [0], []\n"
        "def watch():\n"
        "    while not done:\n"
        "        text = open('/proc/self/status').read()\n"
        "        peak[0] = max(peak[0], int(text.split('RssAnon:')[1].split()[0]))\n"
        "        time.sleep(0.005)\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "oirl.import_log(sys.argv[1], sys.argv[2]); done.append(1); thread.join(); print(peak[0] / 1024)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(source), str(out)]
    return float(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


def test_the_command_says_what_the_function_says(tmp_path: Path) -> None:
    report, _ = load(tmp_path, lines([*ROWS, {"query": ""}]))
    done = run_oirl("import", tmp_path / "rows.jsonl", "--out", tmp_path / "log.parquet", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == report.to_dict()


def tools_folder(folder: Path) -> Path:
    """Copy a run of each of several tools into one folder, some of them deeper."""
    for source, place in (
        ("lm_eval/runs/hidden", "models/a"),
        ("inspect/epochs.eval", "epochs.eval"),
        ("promptfoo/grid.jsonl", "deeper/grid.jsonl"),
        ("openai_evals/match.jsonl", "match.jsonl"),
        ("helm/runs", "helm"),
    ):
        found = FIXTURES / source
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if found.is_dir() else shutil.copy)(found, folder / place)
    (folder / "notes.json").write_text('{"note": 1}')
    return folder


KEPT = {"lm-eval": 6, "inspect": 8, "promptfoo": 24, "openai-evals": 3, "helm": 28}


def test_a_folder_of_runs_of_several_tools_is_read_whole(tmp_path: Path) -> None:
    report = oirl.import_log(tools_folder(tmp_path / "runs"), tmp_path / "log.parquet")
    kept = Counter[str]()
    for file in report.files:
        kept[file["format"]] += file["rows_kept"]
    assert kept == KEPT
    assert report.rows_refused == 0
    one = oirl.import_log(tmp_path / "runs", tmp_path / "log.parquet", format="inspect")
    assert [(f["format"], f["rows_kept"]) for f in one.files] == [("inspect", 8)]


def test_a_pattern_that_matches_folders_and_files(tmp_path: Path) -> None:
    runs = tools_folder(tmp_path / "runs")
    (runs / "notes.json").unlink()
    report = oirl.import_log(str(runs / "*"), tmp_path / "log.parquet")
    assert {f["format"] for f in report.files} == set(KEPT)
    assert report.rows_kept == sum(KEPT.values())
    (tmp_path / "logs" / "a").mkdir(parents=True)
    (tmp_path / "logs" / "a" / "one.jsonl").write_text(lines(ROWS[:1]))
    (tmp_path / "logs" / "two.jsonl").write_text(lines(ROWS[2:]))
    report = oirl.import_log(str(tmp_path / "logs" / "*"), tmp_path / "log.parquet")
    assert [(Path(f["file"]).name, f["rows_kept"]) for f in report.files] == [("one.jsonl", 1), ("two.jsonl", 2)]


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_a_path_leads_into_the_structs_of_a_table(tmp_path: Path, suffix: str) -> None:
    meta = [{"a": 3, "deep": {"b": "m"}}, {"a": None, "deep": None}, None]
    table = pa.table({"query": ["1?", "2?", "3?"], "prompt": ["p"] * 3, "meta": meta, "x.y": ["u", "v", "w"]})
    path = tmp_path / f"rows.{suffix}"
    (pq.write_table if suffix == "parquet" else feather.write_feather)(table, path)
    mapping = {"tokens_in": "meta.a", "model": "meta.deep.b", "answer": "x.y"}
    report = oirl.import_log(path, tmp_path / "log.parquet", mapping=mapping)
    rows = oirl.read_log(tmp_path / "log.parquet").to_pylist()
    assert [(r["tokens_in"], r["model"], r["answer"]) for r in rows] == [
        (3, "m", "u"),
        (None, None, "v"),
        (None, None, "w"),
    ]
    assert report.rows_refused == 0
    with pytest.raises(DataError, match=r"no field 'meta\.c' .*for the column 'tokens_in'"):
        oirl.import_log(path, tmp_path / "log.parquet", mapping={"tokens_in": "meta.c"})


@pytest.mark.parametrize(("prompts", "warned"), [(30, True), (20, False), (2, False)])
def test_a_prompt_per_row_looks_like_a_rendered_text(tmp_path: Path, prompts: int, warned: bool) -> None:
    rows = [{"query": f"{i} hens?", "prompt": f"Say. {i % prompts} hens?", "correct": True} for i in range(30)]
    report, _ = load(tmp_path, lines(rows))
    told = (
        "30 prompts in 30 rows: the prompts look like rendered texts, with the queries in them; map the column "
        "`prompt` to the template, or name it with --set prompt=TEXT"
    )
    assert report.warnings == ([told] if warned else [])
