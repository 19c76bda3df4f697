"""`oirl import` and `oirl split` as a user types them: exit codes, streams, one line for an error."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import make_log, run_oirl

import oirl


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_user_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, nothing on stdout, and one line `oirl: …` on stderr after the notes of progress."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("oirl: ")
    assert sum(line.startswith("oirl: ") for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in last


ROWS = [
    {"q": "How many?", "t": "{query}", "response": "The answer is 5.", "answer": "5", "correct": False},
    {"q": "How many?", "t": "{query}", "response": "The answer is 6.", "answer": "5"},
    {"q": "", "t": "{query}"},
]
IMPORT = ("--map", "query=q", "--map", "prompt=t", "--set", "model=llama-2-7b-chat")


def test_import_says_what_it_kept_and_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "log.parquet"
    done = run_oirl("import", source, "--out", out, *IMPORT, "--grade", "numeric")
    assert done.returncode == 0, done.stderr
    assert f"{out}: 2 rows kept of 3" in done.stdout
    assert "1 queries, 1 prompts" in done.stdout
    assert "rows.jsonl (jsonl): 2 kept, 1 refused" in done.stdout
    assert (
        "graded by numeric: 2 rows, 1 verdicts changed (1 of them from wrong to right), 1 new, 0 not gradable"
        in done.stdout
    )
    assert "rows.jsonl:3" in done.stderr
    assert str(tmp_path / "log.rejected.jsonl") in done.stderr
    log = oirl.read_log(out)
    assert log["correct"].to_pylist() == [True, False]
    assert log["model"].to_pylist() == ["llama-2-7b-chat"] * 2
    (refused,) = (tmp_path / "log.rejected.jsonl").read_text().splitlines()
    assert json.loads(refused)["row"] == 3


def test_import_json_is_one_document(tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "log.parquet"
    done = run_oirl("import", source, "--out", out, *IMPORT, "--json")
    report = json.loads(done.stdout)
    assert (report["rows_read"], report["rows_kept"], report["rows_refused"]) == (3, 2, 1)
    assert report["rejected_file"] == str(tmp_path / "log.rejected.jsonl")
    assert [f["format"] for f in report["files"]] == ["jsonl"]
    assert done.returncode == 0


def test_import_several_files_and_a_pattern(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [{"query": name, "prompt": "p"}])
    done = run_oirl("import", "a.jsonl", "[bc].jsonl", "--out", "new/log.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert oirl.read_log(tmp_path / "new")["query"].to_pylist() == ["a", "b", "c"]


def test_import_strict(tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "log.parquet"
    done = run_oirl("import", source, "--out", out, *IMPORT, "--strict")
    assert_user_error(done, "rows.jsonl:3", "empty", "--strict")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ("rows.jsonl", "--out", "o"),
            ("rows.jsonl", "no field 'query'", "fields there: q, t", "--map query=FIELD"),
        ),
        (("none.jsonl", "--out", "o"), ("none.jsonl", "no such file")),
        (("rows.jsonl", "--out", "o", "--map", "query"), ("--map query", "COLUMN=FIELD")),
        (
            ("rows.jsonl", "--out", "o", "--map", "query=a", "--map", "query=b"),
            ("--map query is given twice",),
        ),
        (
            ("rows.jsonl", "--out", "o", "--set", "modle=a"),
            ("did you mean 'model'", "columns of interactions"),
        ),
        (
            ("rows.jsonl", "--out", "o", *IMPORT, "--grade", "nope"),
            ("unknown checker 'nope'", "known: numeric"),
        ),
        (
            ("rows.jsonl", "--out", "o", "--format", "jsnl"),
            ("unknown format 'jsnl' (did you mean 'jsonl'?)",),
        ),
        (("rows.jsonl", "--out", "rows.jsonl", *IMPORT), ("also a source",)),
        (("rows.jsonl", "--out", ".", *IMPORT), ("is a folder",)),
        (("rows.jsonl", "--out", "rows.jsonl/x", *IMPORT), ("cannot make the folder",)),
        (("rows.jsonl", "--out", "b" * 250, *IMPORT), ("long",)),
        (("rows.jsonl",), ("--out", "import --help")),
        (("empty.csv", "--out", "o"), ("empty.csv is empty",)),
        (("deep.jsonl", "--out", "o"), ("deep.jsonl",)),
        (("bad.jsonl", "--out", "o"), ("bad.jsonl", "no row could be kept", "bad.jsonl:1")),
        (("latin.csv", "--out", "o"), ("latin.csv", "UTF-8")),
    ],
)
def test_import_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "bad.jsonl", [{"query": "", "prompt": "p"}])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "deep.jsonl").write_text("[" * 5000)
    (tmp_path / "latin.csv").write_bytes("query,prompt,réponse\na,p,r\n".encode("latin-1"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert_user_error(run_oirl("import", *arguments, cwd=tmp_path), *parts)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_split(tmp_path: Path) -> None:
    oirl.write_log(make_log(40, replicates=1), tmp_path / "log.parquet")
    done = run_oirl("split", "log.parquet", "--out", "a", "--test", "0.25", "--json", cwd=tmp_path)
    parts = {Path(p["file"]).name: p for p in json.loads(done.stdout)["parts"]}
    assert (parts["test.parquet"]["rows"], parts["test.parquet"]["queries"]) == (30, 10)
    assert (parts["train.parquet"]["rows"], parts["train.parquet"]["queries"]) == (90, 30)
    run_oirl("split", "log.parquet", "--out", "b", "--test", "0.25", cwd=tmp_path)
    run_oirl("split", "log.parquet", "--out", "c", "--test", "0.25", "--seed", "1", cwd=tmp_path)
    same, again, other = (oirl.read_log(tmp_path / d / "test.parquet") for d in "abc")
    assert same.equals(again)
    assert not same.equals(other)
    text = run_oirl("split", "log.parquet", "--out", "d", "--folds", "2", cwd=tmp_path)
    assert [line.split(":")[0] for line in text.stdout.splitlines()] == [
        str(Path("d") / f"fold-{f}" / f"{part}.parquet") for f in (0, 1) for part in ("train", "test")
    ]


def test_split_warns_of_a_template(tmp_path: Path) -> None:
    rows = [{"query": f"What is {a} plus 1?", "prompt": "p", "correct": True} for a in range(10)]
    run_oirl("import", write(tmp_path / "r.jsonl", rows), "--out", tmp_path / "log.parquet")
    done = run_oirl("split", tmp_path / "log.parquet", "--out", tmp_path / "s")
    assert done.returncode == 0
    assert "warning: 10 of 10 queries follow one template" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("log.parquet", "--out", "o", "--test", "1.5"), ("1.5", "between 0 and 1")),
        (("log.parquet", "--out", "o", "--test", "nan"), ("between 0 and 1",)),
        (("log.parquet", "--out", "o", "--by", "row"), ("'row'", "'query'")),
        (("log.parquet", "--out", "o", "--folds", "1"), ("at least 2",)),
        (("log.parquet", "--out", "o", "--folds", "500"), ("500 folds", "there are 5")),
        (("none.parquet", "--out", "o"), ("none.parquet", "no such file")),
        (("rows.jsonl", "--out", "o"), ("rows.jsonl is not a readable Parquet file", "oirl import")),
        (("log.parquet", "--out", "rows.jsonl"), ("rows.jsonl",)),
        (("log.parquet", "--out", "o", "--seed", "x"), ("--seed", "split --help")),
    ],
)
def test_split_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    oirl.write_log(make_log(5, replicates=1), tmp_path / "log.parquet")
    write(tmp_path / "rows.jsonl", ROWS)
    assert_user_error(run_oirl("split", *arguments, cwd=tmp_path), *parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.parquet", "rows.jsonl"]


def test_formats_are_listed() -> None:
    listed = json.loads(run_oirl("formats", "--json").stdout)
    assert {"parquet", "arrow", "gsm8k", "svamp", "jsonl", "csv", "tsv"} <= {f["name"] for f in listed}
    assert {f["record"] for f in listed} <= {"interactions", "queries", "preferences"}
