"""fit, evaluate and select as a user types them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_log, make_queries, run_oirl

from oirl import split, write_log
from oirl.logs.text import text_id

QUERIES = ["the cat in the barn, of kind alpha alpha alpha", "the dog in the lake, of kind beta beta beta"]
ROW = {"query_id", "query", "prompt_id", "prompt", "score", "baseline_score", "changed"}


def strict(text: str) -> Any:
    """Parse JSON that may hold no NaN and no Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [strict(line) for line in done.stdout.splitlines()]


def error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a user's error; progress notes may stand before it."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("oirl: ")]
    assert done.stderr.splitlines()[-1] == line
    return line


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    train, test = split(make_log(150), test=0.4)
    write_log(pa.concat_tables([train, test]), folder / "log.parquet")
    write_log(make_log(60, effect=0.0), folder / "null.parquet")
    write_log(make_log(12).slice(0, 6), folder / "one_query.parquet")
    return folder


@pytest.fixture(scope="module")
def fitted(work: Path) -> dict[str, Any]:
    done = run_oirl("fit", work / "log.parquet", "--out", work / "model", "--json")
    assert done.returncode == 0, done.stderr
    return strict(done.stdout)


@pytest.fixture(scope="module")
def model(work: Path, fitted: dict[str, Any]) -> Path:
    return work / "model"


def test_fit_prints_the_manifest(fitted: dict[str, Any], model: Path) -> None:
    assert fitted == strict((model / "manifest.json").read_text(encoding="utf-8"))
    assert fitted["kind"] == "prompt-selector"
    assert fitted["deploy"]["policy"] == "selector"
    assert fitted["data"]["n_queries"] == 90
    assert fitted["metrics"]["auc_within_query"] > 0.8


def test_fit_for_people_says_what_is_deployed_and_why(work: Path) -> None:
    done = run_oirl("fit", work / "null.parquet", "--out", work / "null", "--model", "logistic", "--folds", "3")
    assert done.returncode == 0, done.stderr
    assert "deployed: the best single prompt" in done.stdout
    assert "because" in done.stdout
    assert "AUC" in done.stdout
    rows = lines(run_oirl("select", work / "null", *QUERIES))
    assert len({r["prompt_id"] for r in rows}) == 1
    assert not any(r["changed"] for r in rows)


def test_evaluate_prints_one_strict_document(work: Path, model: Path) -> None:
    done = run_oirl("evaluate", model, work / "log.parquet", "--json")
    document = strict(done.stdout)
    assert document["n_queries"] == 60  # those marked test
    assert document["policies"]["selector"]["gain_ci_low"] > 0.1
    assert document["deploy"]["policy"] == "selector"
    assert document.get("warnings", []) == []
    again = strict(run_oirl("evaluate", model, work / "log.parquet", "--json", "--seed", "3").stdout)
    assert again["policies"]["selector"]["value"] == document["policies"]["selector"]["value"]
    assert again["policies"] != document["policies"]


def test_evaluate_for_people(work: Path, model: Path) -> None:
    done = run_oirl("evaluate", model, work / "null.parquet")
    assert done.returncode == 0, done.stderr
    for word in ("best_prompt", "selector", "random", "ceiling", "deployed", "95% interval"):
        assert word in done.stdout
    assert "Traceback" not in done.stderr


def test_select_arguments_into_a_pipe(model: Path) -> None:
    rows = lines(run_oirl("select", model, *QUERIES))
    assert [r["prompt_id"] for r in rows] == ["a", "b"]
    assert all(r.keys() == ROW for r in rows)
    assert [r["query_id"] for r in rows] == [text_id(q) for q in QUERIES]


def test_select_lines_and_objects_from_stdin(model: Path) -> None:
    stdin = f"{QUERIES[0]}\n\n" + json.dumps({"query_id": 7, "query": QUERIES[1]}) + "\n"
    rows = lines(run_oirl("select", model, stdin=stdin))
    assert [(r["query_id"], r["prompt_id"]) for r in rows] == [(text_id(QUERIES[0]), "a"), ("7", "b")]
    assert lines(run_oirl("select", model, "--in", "-", stdin=stdin)) == rows


def test_select_json_explain_top(model: Path) -> None:
    done = run_oirl("select", model, *QUERIES, "--json", "--explain", "--top", "2")
    rows = strict(done.stdout)
    assert len(rows) == 4
    assert [r.get("rank") for r in rows] == [None, 2, None, 2]
    assert all(r["scores"].keys() == {"a", "b", "c"} for r in rows)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_select_reads_and_writes_files(model: Path, tmp_path: Path, suffix: str) -> None:
    source, out = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    table = pa.table({"query_id": ["x", "y"], "query": QUERIES})
    if suffix == "jsonl":
        source.write_text("".join(json.dumps(r) + "\n" for r in table.to_pylist()))
    elif suffix == "csv":
        with source.open("w", newline="") as file:
            csv.writer(file).writerows([["query_id", "query"], ["x", QUERIES[0]], ["y", QUERIES[1]]])
    else:
        pq.write_table(table, source)
    done = run_oirl("select", model, "--in", source, "--out", out, "--explain")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    if suffix == "jsonl":
        rows = [strict(line) for line in out.read_text().splitlines()]
    elif suffix == "csv":
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = pq.read_table(out).to_pylist()
    assert [(r["query_id"], r["prompt_id"]) for r in rows] == [("x", "a"), ("y", "b")]
    scores = rows[0]["scores"]
    assert (strict(scores) if isinstance(scores, str) else scores).keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "Use way c. {query}\nNew one. {query}\n"),
        ("p.jsonl", '{"prompt_id": "c"}\n{"prompt_id": "n", "prompt": "New one. {query}"}\n'),
        ("p.yaml", "- prompt_id: c\n- New one. {query}\n"),
    ],
)
def test_select_among_candidates(model: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    rows = lines(run_oirl("select", model, QUERIES[0], "--prompts", tmp_path / name, "--top", "5"))
    assert rows[0]["prompt_id"] == "c"
    assert [r.get("extrapolation") for r in rows] == [None, True]


def test_an_embedder_of_ones_own(work: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def embed(texts):\n    return [[t.count('alpha'), t.count('beta'), len(t) / 100] for t in texts]\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *(str(ROOT / p) for p in (".", "cli", "data"))])
    }

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "oirl_cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    done = run("fit", work / "log.parquet", "--out", tmp_path / "m", "--embedder", "mine:embed", "--json")
    assert strict(done.stdout)["embedder"]["name"] == "mine:embed"
    assert "--embedder" in error(run("select", tmp_path / "m", QUERIES[0]))
    rows = lines(run("select", tmp_path / "m", *QUERIES, "--embedder", "mine:embed"))
    assert [r["prompt_id"] for r in rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "none.parquet", "--out", "m"], ["none.parquet", "no such file"]),
        (["fit", "log.parquet", "--out", "m", "--target", "x"], ["--target x", "prompt"]),
        (["fit", "log.parquet", "--out", "m", "--model", "contrst"], ["did you mean 'contrast'"]),
        (["fit", "log.parquet", "--out", "m", "--embedder", "tfdif"], ["did you mean 'tfidf'"]),
        (["fit", "log.parquet", "--out", "m", "--embedder", "tfidf:3"], ["tfidf"]),
        (["fit", "log.parquet", "--out", "m", "--embedder", "math:pi"], ["math:pi"]),
        (["fit", "log.parquet", "--out", "m", "--folds", "1"], ["folds"]),
        (["fit", "log.parquet", "--out", "m", "--seed", "-1"], ["seed"]),
        (["fit", "log.parquet"], ["--out"]),
        (["fit", "one_query.parquet", "--out", "m"], ["two unlike queries"]),
        (["fit", "log.parquet", "--out", "log.parquet"], ["is a file"]),
        (["evaluate", "nowhere", "log.parquet"], ["nowhere", "oirl fit"]),
        (["evaluate", "model", "log.parquet", "--seed", "-1"], ["seed"]),
        (["select", "model", "q", "--top", "0"], ["top"]),
        (["select", "model", "q", "--in", "x.jsonl"], ["use one of the two"]),
        (["select", "model", "--in", "x.jsonl"], ["x.jsonl"]),
        (["select", "model", "q", "--prompts", "no.txt"], ["no.txt"]),
        (["select", "model", "--in", "log.parquet", "--out", "."], [".jsonl"]),
        (["select", "model", "q", "--bogus"], ["--bogus"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) and len(value) > 2 else None,
)
def test_mistakes_cost_one_line(work: Path, model: Path, arguments: list[str], words: list[str]) -> None:
    line = error(run_oirl(*arguments, cwd=work))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("stdin", "word"), [("", "no query"), ('{"query": 3}\n', "stdin:1"), ("ok\n{broken\n", "stdin:2")]
)
def test_mistakes_on_stdin(model: Path, stdin: str, word: str) -> None:
    assert word in error(run_oirl("select", model, stdin=stdin))


@pytest.mark.parametrize("out", [[], ["--json"], ["--out", "out.jsonl"], ["--out", "out.csv"]], ids=" ".join)
def test_bytes_that_are_no_text_are_no_bug(model: Path, tmp_path: Path, out: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    command = [sys.executable, "-m", "oirl_cli", "select", str(model), *out]
    done = subprocess.run(
        command, input=b"caf\xe9 au lait\n", env=environment, capture_output=True, check=False, cwd=tmp_path
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 2)
    done.stdout.decode("utf-8")  # what is printed is text, whatever came in


def test_reading_only_the_head_is_no_bug(model: Path, tmp_path: Path) -> None:
    queries = tmp_path / "q.jsonl"
    queries.write_text("".join(json.dumps({"query": q}) + "\n" for q in make_queries(800) * 3))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    done = subprocess.run(
        f"{sys.executable} -m oirl_cli select {model} --in {queries} | head -1",
        shell=True,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert strict(done.stdout).keys() == ROW
