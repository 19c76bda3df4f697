"""`oirl pairs`, and `oirl split` of pairs, as a user types them: exit codes, streams, one line for an error."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import run_oirl

import oirl
from oirl.logs.pairs import make_pairs, read_pairs, splits_of, write_pairs
from oirl.records import INTERACTION_SCHEMA

QUERIES = "how are cows milked,why do ships float,name a river,what is rust,who wrote the iliad,where do bees sleep"


def assert_user_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, nothing on stdout, and one line `oirl: …` on stderr."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("oirl: ")
    for part in parts:
        assert part in line


def log_file(path: Path, **fixed: Any) -> Path:
    """Write a log of six queries with two right replies (of `a`, `b`) and two wrong ones (of `b`, `c`) each."""
    rows = []
    for q, query in enumerate(QUERIES.split(",")):
        for prompt, text, right in (("a", "r1", 1), ("b", "r2", 1), ("b", "w1", 0), ("c", "w2", 0)):
            cell = {"query_id": f"q{q}", "query": query, "prompt_id": prompt, "prompt": f"{prompt} {{query}}"}
            rows.append({**cell, "response": f"{text} to {q}", "correct": bool(right), "replicate": 0, **fixed})
    oirl.write_log(pa.Table.from_pylist(rows, INTERACTION_SCHEMA), path)
    return path


def test_pairs_says_what_it_made_and_left_out(tmp_path: Path) -> None:
    log = oirl.read_log(log_file(tmp_path / "log.parquet")).to_pylist()
    log[0]["correct"], log[1]["response"], log[2]["response"] = None, " ", None
    oirl.write_log(pa.Table.from_pylist(log, INTERACTION_SCHEMA), tmp_path / "log.parquet")
    done = run_oirl("pairs", "log.parquet", "--out", "new/pairs.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # q0 has one wrong reply left; the other five queries have 2 · 2 pairs each.
    assert done.stdout.splitlines() == [
        f"{Path('new') / 'pairs.parquet'}: 20 pairs of 5 queries",
        "  from 20 of 24 rows; margins: verdict",
    ]
    assert done.stderr.splitlines() == [
        "  left out 2 rows: no response, or an empty one",
        "  left out 1 rows: no verdict",
        "  left out 1 rows: all responses to the query are right, or all are wrong",
    ]
    for pair in read_pairs(tmp_path / "new" / "pairs.parquet").to_pylist():
        assert (pair["chosen"][0], pair["rejected"][0], pair["chosen"][-1]) == ("r", "w", pair["rejected"][-1])


def test_pairs_json_is_one_document(tmp_path: Path) -> None:
    log_file(tmp_path / "log.parquet")
    done = run_oirl("pairs", "log.parquet", "--out", "p.parquet", "--per-query", "1", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "out": "p.parquet",
        "rows_read": 24,
        "rows_used": 12,
        "n_pairs": 6,
        "n_queries": 6,
        "margin": "verdict",
        "left_out": {"not among the pairs chosen": 12},
    }


def test_pairs_seed(tmp_path: Path) -> None:
    log = log_file(tmp_path / "log.parquet", prompt_id="same")
    run_oirl("pairs", log, "--out", "p.parquet", "--per-query", "2", "--seed", "5", cwd=tmp_path)
    made = read_pairs(tmp_path / "p.parquet")
    assert made.equals(make_pairs(oirl.read_log(log), per_query=2, seed=5)[0])
    assert not made.equals(make_pairs(oirl.read_log(log), per_query=2, seed=6)[0])


def test_split_of_pairs(tmp_path: Path) -> None:
    log_file(tmp_path / "log.parquet")
    run_oirl("pairs", "log.parquet", "--out", "pairs.parquet", cwd=tmp_path)
    done = run_oirl("split", "pairs.parquet", "--out", "s", "--test", "0.34", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{Path('s') / 'train.parquet'}: 16 rows, 4 queries",
        f"{Path('s') / 'test.parquet'}: 8 rows, 2 queries",
    ]
    train, test = (read_pairs(tmp_path / "s" / f"{side}.parquet") for side in ("train", "test"))
    assert not set(train["query"].to_pylist()) & set(test["query"].to_pylist())
    assert splits_of(train) + splits_of(test) == ["train"] * 16 + ["test"] * 8


def test_split_of_pairs_into_folds(tmp_path: Path) -> None:
    write_pairs(log_file(tmp_path / "log.parquet"), tmp_path / "pairs.parquet")
    done = run_oirl("split", "pairs.parquet", "--out", "s", "--folds", "3", "--json", cwd=tmp_path)
    parts = json.loads(done.stdout)["parts"]
    assert [(p["rows"], p["queries"]) for p in parts] == [(16, 4), (8, 2)] * 3
    held_out = [set(read_pairs(tmp_path / p["file"])["query"].to_pylist()) for p in parts[1::2]]
    assert set.union(*held_out) == set(QUERIES.split(","))
    for train, test in zip(parts[::2], held_out, strict=True):
        assert not set(read_pairs(tmp_path / train["file"])["query"].to_pylist()) & test


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("silent.parquet", "--out", "o"), ("no pair", "24 rows: no response")),
        (("unknown.parquet", "--out", "o"), ("no pair", "24 rows: no verdict")),
        (("right.parquet", "--out", "o"), ("no pair", "24 rows: all responses to the query are right")),
        (("log.parquet", "--out", "o", "--per-query", "0"), ("0; at least 1 is needed", "leave it out for all")),
        (("log.parquet", "--out", "log.parquet"), ("log.parquet is also the log", "name another file")),
        (("rows.jsonl", "--out", "o"), ("rows.jsonl is not a readable Parquet file", "use `oirl import` first")),
        (("pairs.parquet", "--out", "o"), ("pairs.parquet holds preferences, not interactions", "name a log")),
    ],
)
def test_pairs_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    make_files(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert_user_error(run_oirl("pairs", *arguments, cwd=tmp_path), *parts)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("pairs.parquet", "log.parquet", "--out", "o"), ("pairs.parquet", "log.parquet", "name one kind")),
        (("pairs.parquet", "--out", "o", "--folds", "500"), ("500 folds", "there are 6")),
    ],
)
def test_split_of_pairs_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    make_files(tmp_path)
    assert_user_error(run_oirl("split", *arguments, cwd=tmp_path), *parts)
    assert not (tmp_path / "o").exists()


def make_files(folder: Path) -> None:
    log = log_file(folder / "log.parquet")
    log_file(folder / "silent.parquet", response=None)
    log_file(folder / "unknown.parquet", correct=None)
    log_file(folder / "right.parquet", correct=True)
    (folder / "rows.jsonl").write_text("{}\n")
    write_pairs(log, folder / "pairs.parquet")


def test_a_negative_seed_is_taken_or_refused_in_one_line(tmp_path: Path) -> None:
    log_file(tmp_path / "log.parquet")
    done = run_oirl("pairs", "log.parquet", "--out", "p.parquet", "--seed", "-1", cwd=tmp_path)
    if done.returncode != 0:
        assert_user_error(done, "seed")
    else:
        assert len(read_pairs(tmp_path / "p.parquet")) == 24


def test_a_log_without_pairs_is_named_with_what_to_do(tmp_path: Path) -> None:
    log_file(tmp_path / "unknown.parquet", correct=None)
    done = run_oirl("pairs", "unknown.parquet", "--out", "p.parquet", cwd=tmp_path)
    assert_user_error(done, "unknown.parquet", "no verdict", "--grade")
