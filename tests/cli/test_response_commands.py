"""fit, evaluate and rank for models of responses and of preferences, as a user types them."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_log, make_queries, run_oirl

from oirl import load, read_log, split, write_log
from oirl.evaluation.preferences import evaluate_preferences
from oirl.evaluation.responses import evaluate_responses
from oirl.logs.pairs import make_pairs, read_pairs, save_pairs
from oirl.logs.text import text_id
from oirl.selection.ranking import rank
from oirl_data import small_lm_path

RANKING = {"query_id", "query", "chosen", "score", "abstained", "method", "ranked"}
RANKED = {"response", "position", "reward", "spread", "probability", "answer"}
QUERY = "Anna has 20 apples and gets 11 more. How many apples has Anna?"
TRUE, FALSE = "Step 1: 20 + 11 = 31. The answer is 31.", "Step 1: 20 + 11 = 35. The answer is 35."
OTHER = "Step 2: 20 + 11 = 35. The answer is 35."


def strict(text: str) -> Any:
    """Parse JSON that may hold no NaN and no Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def done(*arguments: str | Path, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that is to succeed."""
    found = run_oirl(*arguments, stdin=stdin, cwd=cwd)
    assert found.returncode == 0, found.stderr
    return found


def document(*arguments: str | Path, stdin: str = "", cwd: Path | None = None) -> Any:
    return strict(done(*arguments, "--json", stdin=stdin, cwd=cwd).stdout)


def lines(found: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [strict(line) for line in found.stdout.splitlines()]


def error(found: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a user's error; progress notes may stand before it."""
    assert found.returncode == 2, found.stderr
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("oirl: ")]
    assert found.stderr.splitlines()[-1] == line
    return line


def sums(n: int = 70, seed: int = 0) -> pa.Table:
    """Return a log of four replies to each query that add up two numbers, one of them truly."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, query in enumerate(make_queries(n, seed)):
        a, b = (int(x) for x in rng.integers(10, 40, 2))
        for k, off in enumerate([0, 1, 1, 4]):
            text = f"Step {k}: {a} + {b} = {a + b + off}. The answer is {a + b + off}."
            row = {"query_id": f"q{i}", "query": query, "prompt_id": f"p{k % 2}", "prompt": "{query}", "response": text}
            rows.append(row | {"correct": off == 0, "answer": str(a + b), "replicate": k // 2})
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    train, test = split(sums(), test=0.4)
    write_log(pa.concat_tables([train, test]), folder / "log.parquet")
    prompts = make_log(40)
    write_log(prompts, folder / "prompts.parquet")  # verdicts, and no responses
    (folder / "empty.jsonl").write_text("")
    (folder / "other.jsonl").write_text('{"question": "q", "response": "r"}\n')
    (folder / "in.jsonl").write_text(json.dumps({"query": QUERY, "responses": [FALSE, TRUE, OTHER]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def fitted(work: Path) -> dict[str, Any]:
    options = ["--target", "response", "--set", "strength=3.0", "--folds", "4", "--seed", "7"]
    return document("fit", "log.parquet", "--out", "right", *options, cwd=work)


@pytest.fixture(scope="module")
def preferring(work: Path) -> dict[str, Any]:
    """Fit to pairs that are made of the log on the fly."""
    options = ["--target", "preference", "--embedder", "tfidf", "--learning-curve", "--margin", "pairs"]
    return document("fit", "log.parquet", "--out", "preferred", *options, cwd=work)


@pytest.fixture(scope="module")
def models(work: Path, fitted: dict[str, Any], preferring: dict[str, Any]) -> Path:
    done("fit", "prompts.parquet", "--out", "selector", cwd=work)
    return work


def test_fit_of_responses_prints_the_manifest(fitted: dict[str, Any], work: Path) -> None:
    assert fitted == strict((work / "right" / "manifest.json").read_text(encoding="utf-8"))
    assert fitted["kind"] == "response-reward-model"
    assert fitted["model"]["name"] == "linear"
    assert fitted["model"]["params"] == {"strength": 3.0}
    assert (fitted["data"]["folds"], fitted["data"]["seed"]) == (4, 7)
    assert (fitted["data"]["n_queries"], fitted["data"]["n_rows"]) == (42, 168)  # those marked train
    assert fitted["metrics"]["auc_within_query"] > 0.9


def test_fit_of_preferences_takes_a_log_for_its_pairs(preferring: dict[str, Any], work: Path) -> None:
    assert preferring["kind"] == "preference-reward-model"
    assert preferring["data"]["n_pairs"] == 42 * 3
    assert preferring["data"]["margin"] == "pairs"
    curve = preferring["learning_curve"]
    assert [c["n_pairs"] for c in curve] == sorted(c["n_pairs"] for c in curve)
    assert curve[-1]["n_pairs"] == pytest.approx(0.8 * 42 * 3)
    assert load(work / "preferred").learning_curve_ == curve


def test_fit_for_people(work: Path) -> None:
    found = done("fit", "log.parquet", "--out", "people", "--target", "response", cwd=work)
    assert "people: linear on checks, 168 responses to 42 queries" in found.stdout
    assert "AUC" in found.stdout
    options = ["--target", "preference", "--learning-curve"]
    found = done("fit", "log.parquet", "--out", "people", *options, cwd=work)
    assert "people: linear on tfidf, 126 pairs of 42 queries" in found.stdout
    assert "pair accuracy" in found.stdout
    assert "pairs learned from" in found.stdout


def test_evaluate_on_verdicts_is_what_python_says(models: Path) -> None:
    found = document("evaluate", "right", "log.parquet", "--seed", "3", cwd=models)
    expected = evaluate_responses(load(models / "right"), read_log(models / "log.parquet"), seed=3).to_dict()
    assert found == expected
    assert found["n_queries"] == 28
    assert found["model"].keys() >= {"auc", "auc_within_query", "brier", "ece"}
    assert found["best_of_n"]["policies"]["best_of_n"]["over_majority_ci_low"] > 0.5


@pytest.mark.parametrize("name", ["preferred", "right"])
def test_evaluate_on_pairs_is_what_python_says(models: Path, name: str) -> None:
    done("pairs", "log.parquet", "--out", "pairs.parquet", cwd=models)
    found = document("evaluate", name, "pairs.parquet", cwd=models)
    assert found == evaluate_preferences(load(models / name), read_pairs(models / "pairs.parquet")).to_dict()
    assert found["model"].keys() >= {"pair_accuracy", "ci_low", "ci_high", "brier", "ece", "n_pairs"}
    assert found["n_pairs"] == 28 * 3  # those marked test
    if name == "preferred":
        assert document("evaluate", name, "log.parquet", cwd=models) == found


def test_evaluate_for_people(models: Path) -> None:
    found = done("evaluate", "right", "log.parquet", cwd=models)
    for word in ("112 responses to 28 queries", "majority", "oracle", "KL (nats)"):
        assert word in found.stdout
    found = done("evaluate", "preferred", "log.parquet", cwd=models)
    for word in ("84 pairs of 28 queries", "preferring the", "rank correlation of reward and length"):
        assert word in found.stdout


@pytest.mark.parametrize("name", ["preferred", "right"])
def test_a_report_is_a_page(models: Path, name: str) -> None:
    found = document("evaluate", name, "log.parquet", "--report", f"{name}.html", cwd=models)
    page = (models / f"{name}.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    figure = (
        found["best_of_n"]["policies"]["best_of_n"]["value"] if name == "right" else found["model"]["pair_accuracy"]
    )
    assert f"{100 * figure:.1f}%" in page
    assert "<script src" not in page


def test_split_fit_and_evaluate_pairs(work: Path) -> None:
    save_pairs(make_pairs(sums(60, seed=5))[0], work / "whole.parquet")
    done("split", "whole.parquet", "--out", "parts", "--test", "0.3", cwd=work)
    parts = sorted(p.name for p in (work / "parts").glob("*.parquet"))
    assert parts == ["test.parquet", "train.parquet"]
    fitted = document("fit", "parts/train.parquet", "--out", "of_pairs", "--target", "preference", cwd=work)
    found = document("evaluate", "of_pairs", "parts/test.parquet", cwd=work)
    assert fitted["data"]["n_pairs"] + found["n_pairs"] == 180
    assert not any("stood in the training log" in w for w in found["warnings"])
    both = document("evaluate", "of_pairs", "parts", cwd=work)
    assert both["model"] == found["model"]  # of both files those marked test


# rank -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["right", "preferred"])
@pytest.mark.parametrize("method", ["reward", "majority", "weighted_majority"])
def test_rank_is_what_python_says(models: Path, name: str, method: str) -> None:
    found = document("rank", name, "--in", "in.jsonl", "--method", method, cwd=models)
    expected = rank(load(models / name), [QUERY], [[FALSE, TRUE, OTHER]], method=method)
    assert found == [strict(json.dumps(r.to_dict())) for r in expected]
    assert found[0].keys() == RANKING
    assert all(r.keys() == RANKED for r in found[0]["ranked"])
    if name == "right":
        assert found[0]["ranked"][0]["response"] == TRUE
        assert (found[0]["chosen"] == TRUE) is (method != "majority")  # two of three say 35


def test_rank_writes_json_lines_into_a_pipe(models: Path) -> None:
    rows = [{"query_id": 5, "query": "Add 20 and 11.", "response": r} for r in (FALSE, TRUE)] + [{"query": QUERY}]
    stdin = "\n".join(map(json.dumps, rows)) + "\n\n" + json.dumps({"query": QUERY, "response": FALSE})
    found = done("rank", "right", "--in", "-", stdin=stdin, cwd=models)
    first, second = lines(found)
    assert (first["query_id"], first["chosen"], len(first["ranked"])) == ("5", TRUE, 2)
    assert (second["query_id"], second["chosen"]) == (text_id(QUERY), FALSE)
    assert "1 rows without a response were left out" in found.stderr


def test_rank_abstains(models: Path) -> None:
    rows = document("rank", "right", "--in", "in.jsonl", cwd=models)
    for threshold, abstained in ((rows[0]["score"], False), (1.0, True)):
        (row,) = lines(done("rank", "right", "--in", "in.jsonl", "--threshold", repr(threshold), cwd=models))
        assert row["abstained"] is abstained
        assert row["chosen"] == (None if abstained else TRUE)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rank_reads_and_writes_files(models: Path, tmp_path: Path, suffix: str) -> None:
    source, out = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    rows = [("x", QUERY, FALSE), ("x", QUERY, TRUE), ("y", "Add 1 and 2.", "1 + 2 = 3. The answer is 3.")]
    if suffix == "csv":
        with source.open("w", newline="") as file:
            csv.writer(file).writerows([["query_id", "query", "response"], *rows])
    elif suffix == "jsonl":
        names = ("query_id", "query", "response")
        source.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows))
    else:
        columns = [list(c) for c in zip(*rows, strict=True)]
        pq.write_table(pa.table(dict(zip(("query_id", "query", "response"), columns, strict=True))), source)
    found = done("rank", "right", "--in", source, "--out", out, cwd=models)
    assert found.stdout == ""
    assert "2 rows" in found.stderr
    if suffix == "jsonl":
        written = [strict(line) for line in out.read_text().splitlines()]
    elif suffix == "csv":
        with out.open(newline="") as file:
            written = list(csv.DictReader(file))
    else:
        written = pq.read_table(out).to_pylist()
    assert [(r["query_id"], r["chosen"]) for r in written] == [("x", TRUE), ("y", rows[2][2])]
    ranked = written[0]["ranked"]
    assert [r["response"] for r in (strict(ranked) if isinstance(ranked, str) else ranked)] == [TRUE, FALSE]


def test_a_log_is_a_file_of_candidates(models: Path) -> None:
    rows = document("rank", "right", "--in", "log.parquet", cwd=models)
    assert len(rows) == 70
    assert {len(r["ranked"]) for r in rows} == {4}
    right = {(r["query_id"], r["response"]) for r in sums().to_pylist() if r["correct"]}
    assert np.mean([(r["query_id"], r["chosen"]) in right for r in rows]) > 0.9


@pytest.mark.parametrize("text", ["זה 31\u200f.", "31\u2028or\x85so", "\x1b[31m31", "line\nbreak\ttab"])
def test_json_lines_hold_the_response_as_it_was(models: Path, text: str) -> None:
    stdin = json.dumps({"query": QUERY, "response": text})
    found = run_oirl("rank", "right", "--in", "-", stdin=stdin, cwd=models)
    assert "\x1b" not in found.stdout
    (line,) = [line for line in found.stdout.split("\n") if line]
    assert strict(line)["chosen"] == text


def test_bytes_that_are_no_text_are_no_bug(models: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    command = [sys.executable, "-m", "oirl_cli", "rank", "right", "--in", "-"]
    content = b'{"query": "caf\xe9", "response": "au lait"}\n'
    found = subprocess.run(command, input=content, env=environment, capture_output=True, check=False, cwd=models)
    assert b"Traceback" not in found.stderr
    assert found.returncode in (0, 2)
    found.stdout.decode("utf-8")


# Mistakes -------------------------------------------------------------------------------------------------

FIT = ["fit", "log.parquet", "--out", "m", "--target"]
MISTAKES: list[tuple[list[str], list[str]]] = [
    ([*FIT, "response", "--actions", "pair"], ["--actions", "--target prompt"]),
    ([*FIT, "preference", "--actions", "prompt"], ["--actions", "--target prompt"]),
    ([*FIT, "response", "--prices", "p.yaml"], ["--prices", "--target prompt"]),
    ([*FIT, "response", "--margin", "pairs"], ["--margin", "--target preference"]),
    ([*FIT, "prompt", "--learning-curve"], ["--learning-curve", "--target preference"]),
    ([*FIT, "preference", "--margin", "wide"], ["margin", "none, pairs"]),
    ([*FIT, "responses"], ["--target responses", "response"]),
    ([*FIT, "response", "--model", "liner"], ["did you mean 'linear'"]),
    ([*FIT, "preference", "--model", "liner"], ["did you mean 'linear'"]),
    ([*FIT, "response", "--model", "language-model:x"], ["language-model:x"]),
    ([*FIT, "response", "--set", "strenth=1"], ["strenth", "strength"]),
    ([*FIT, "preference", "--set", "strenth=1"], ["strenth", "strength"]),
    ([*FIT, "response", "--set", "strength"], ["--set strength", "NAME=VALUE"]),
    ([*FIT, "response", "--set", "strength=1", "--set", "strength=2"], ["strength", "twice"]),
    ([*FIT, "response", "--set", "strength=big"], ["strength"]),
    ([*FIT, "response", "--folds", "1"], ["folds"]),
    ([*FIT, "preference", "--seed", "-1"], ["seed"]),
    ([*FIT, "preference", "--embedder", "hidden-states"], ["hidden-states:MODEL"]),
    ([*FIT, "preference", "--embedder", "hidden-states:no/such/folder"], ["no/such/folder"]),
    ([*FIT, "preference", "--model", "language-model"], ["language-model:FOLDER"]),
    ([*FIT, "preference", "--model", "language-model:no/such/folder"], ["no/such/folder"]),
    ([*FIT, "preference", "--model", "language-model:x", "--embedder", "tfidf"], ["--embedder"]),
    ([*FIT, "preference", "--model", "language-model:x", "--learning-curve"], ["--learning-curve"]),
    ([*FIT, "preference", "--model", "language-model:x", "--set", "epoch=1"], ["epoch", "epochs"]),
    (["fit", "prompts.parquet", "--out", "m", "--target", "response"], ["no row with a response"]),
    (["fit", "prompts.parquet", "--out", "m", "--target", "preference"], ["no pair"]),
    (["evaluate", "nowhere", "log.parquet"], ["nowhere", "oirl fit"]),
    (["evaluate", "right", "nothing.parquet"], ["nothing.parquet"]),
    (["evaluate", "right", "log.parquet", "--estimator", "ips"], ["--estimator", "models of prompts"]),
    (["evaluate", "preferred", "log.parquet", "--self-check"], ["--self-check", "models of prompts"]),
    (["evaluate", "right", "log.parquet", "--prices", "p.yaml"], ["--prices", "models of prompts"]),
    (["evaluate", "right", "log.parquet", "--report", "page.txt"], ["--report page.txt"]),
    (["evaluate", "right", "prompts.parquet"], ["no row with a response"]),
    (["evaluate", "right", "log.parquet", "--seed", "-1"], ["seed"]),
    (["evaluate", "preferred", "log.parquet", "--seed", "-1"], ["seed"]),
    (["rank", "selector", "--in", "in.jsonl"], ["selector", "--target response"]),
    (["rank", "nowhere", "--in", "in.jsonl"], ["nowhere"]),
    (["rank", "right", "--in", "nothing.jsonl"], ["nothing.jsonl"]),
    (["rank", "right", "--in", "empty.jsonl"], ["empty.jsonl", "is empty"]),
    (["rank", "right", "--in", "other.jsonl"], ["other.jsonl:1", "query", "question"]),
    (["rank", "right", "--in", "-"], ["stdin", "no response"]),
    (["rank", "right", "--in", "in.jsonl", "--threshold", "2"], ["threshold", "0 to 1"]),
    (["rank", "right", "--in", "in.jsonl", "--threshold", "nan"], ["threshold"]),
    (["rank", "right", "--in", "in.jsonl", "--method", "foo"], ["foo", "weighted_majority"]),
    (["rank", "right", "--in", "in.jsonl", "--out", "out.txt"], ["out.txt", ".jsonl"]),
    (["rank", "right"], ["--in"]),
    (["select", "right", "q"], ["right"]),
]


FORK = """
import json, os, sys
from oirl_cli.main import run
import oirl.evaluation.responses, oirl.evaluation.preferences, oirl.logs.pairs, oirl.selection.ranking

for i, arguments in enumerate(json.load(open("mistakes.json"))):
    child = os.fork()
    if not child:
        for number, name in ((0, os.devnull), (1, f"{i}.stdout"), (2, f"{i}.stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
        sys.argv = ["oirl", *arguments]
        run()
    with open(f"{i}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.fixture(scope="module")
def mistaken(models: Path) -> Path:
    """Run all mistakes, each in a process of its own that is forked after the imports, which take the most time."""
    (models / "mistakes.json").write_text(json.dumps([arguments for arguments, _ in MISTAKES]))
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FORK], cwd=models, env=environment, check=True, timeout=300)
    return models


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes_cost_one_line(mistaken: Path, number: int) -> None:
    stdout, stderr, code = ((mistaken / f"{number}.{name}").read_text() for name in ("stdout", "stderr", "code"))
    line = error(subprocess.CompletedProcess(MISTAKES[number][0], int(code), stdout, stderr))
    for word in MISTAKES[number][1]:
        assert word in line
    assert not (mistaken / "m").exists()


# A language model -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_a_language_model_is_fitted_evaluated_and_ranks(work: Path) -> None:
    fit = [
        "fit",
        "log.parquet",
        "--out",
        "lm",
        "--target",
        "preference",
        "--model",
        f"language-model:{small_lm_path()}",
    ]
    options = ["batch=8", "learning_rate=0.001", "heads=2", "micro_batch=4"]
    fitted = document(*fit, *(x for o in options for x in ("--set", o)), cwd=work)
    assert fitted["kind"] == "language-model-reward-model"
    assert (fitted["model"]["heads"], fitted["model"]["micro_batch"]) == (2, 4)
    assert fitted["data"]["n_pairs"] == 126
    assert not (work / "lm.checkpoints").exists()
    found = document("evaluate", "lm", "log.parquet", cwd=work)
    assert found["model"]["n_pairs"] == 84
    (row,) = lines(done("rank", "lm", "--in", "in.jsonl", cwd=work))
    rewards = [r["reward"] for r in row["ranked"]]
    assert row["score"] == pytest.approx(1 / (1 + np.exp(rewards[1] - rewards[0])))
    assert row["score"] >= 0.5
