"""Collecting a log: its rows, going on after any interruption, failures, budgets, and designs end to end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_log, run_oirl
from scipy.stats import chi2_contingency, chisquare
from scripted_engine import PROMPTS, RATES, Scripted, notes, questions, reply, rows, text_of
from typer.testing import CliRunner

from oirl import PromptSelector, Sampling, audit, collect, evaluate, import_log, open_engine, read_log, write_log
from oirl.engines.base import Completion, Engine, EngineError, failed, refused
from oirl.engines.collecting import CollectReport, Progress
from oirl.engines.designs import top_two
from oirl.engines.spending import Budget
from oirl.errors import ConfigError, DataError, MissingPackageError, require
from oirl.language_models import Rendered
from oirl.records import INTERACTION_SCHEMA, Query
from oirl_cli.main import app
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems
from oirl_data.prompts import PROMPTS as DEMO_PROMPTS

QUERIES = questions(6)
ALL = [(q.query_id, name) for q in QUERIES for name, _ in PROMPTS]
DESIGNS = ("full", "random", "balanced", "adaptive")


def keys(log: Path | list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    found = rows(log) if isinstance(log, Path) else log
    return [(row["query_id"], row["prompt_id"], row["replicate"]) for row in found]


def journal(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def grow(n: int) -> dict[str, Any]:
    return {"queries": questions(n), "prompts": PROMPTS, "grade": "numeric"}


def run(out: Path, engine: Engine | None = None, **settings: Any) -> CollectReport:
    """Collect with the usual settings, but for those that are given."""
    known: dict[str, Any] = {"queries": QUERIES, "prompts": PROMPTS, "grade": "numeric"} | settings
    return collect(engine or Scripted(), known.pop("queries"), known.pop("prompts"), out, **known)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "log.parquet"


# Rows -------------------------------------------------------------------------------------------------------


def test_rows_stand_in_order_whatever_finishes_first(tmp_path: Path) -> None:
    found = []
    for in_flight in (1, 3, 1000):
        out = tmp_path / f"{in_flight}.parquet"
        report = run(out, Scripted(in_flight=in_flight), replicates=2)
        assert (report.progress.done, report.progress.total, report.stopped) == (36, 36, None)
        assert keys(out) == [(*cell, replicate) for cell in ALL for replicate in (0, 1)]
        assert not journal(out).exists()
        found.append(rows(out))
    assert found[0] == found[1] == found[2]
    assert sorted(os.listdir(tmp_path)) == ["1.parquet", "1000.parquet", "3.parquet"]


def test_first_runs_are_made_before_second_ones(out: Path) -> None:
    engine = Scripted()
    run(out, engine, replicates=2)
    half = len(ALL)
    assert [r.rendered for r in engine.requests[:half]] == [r.rendered for r in engine.requests[half:]]
    assert len({r.seed for r in engine.requests}) == 2 * half  # each run has a seed of its own
    run(out.with_name("other"), other := Scripted(), replicates=2, sampling=Sampling(seed=1))
    assert not {r.seed for r in engine.requests} & {r.seed for r in other.requests}


def test_every_column_of_a_row(out: Path) -> None:
    query = Query("q", "What is 2 plus 3?", "5", dataset="sums", split="test", metadata='{"source": "me", "n": [1]}')
    before = datetime.now(timezone.utc)
    sampling = Sampling(max_tokens=99, temperature=0.5, top_p=0.9, top_k=7, stop=("\n\n",), n=4, seed=3, logprobs=True)
    report = run(out, queries=[query], prompts=[("high", "Way high.")], sampling=sampling, price=(1.0, 10.0))
    after = datetime.now(timezone.utc)
    table = read_log(out)
    assert table.schema.equals(INTERACTION_SCHEMA)
    (row,) = table.to_pylist()
    made = row.pop("created_at")
    assert before <= made <= after
    assert made.utcoffset() == timedelta(0)
    assert json.loads(row.pop("sampling")) == {
        **{"max_tokens": 99, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop": ["\n\n"], "seed": 3},
        **{"engine": "scripted", "engine_version": "7.1", "model": "toy", "model_fingerprint": "abc", "chat": False},
    }
    assert json.loads(row.pop("metadata")) == {"source": "me", "n": [1], "finish_reason": "stop"}
    (response,) = [row.pop("response")]
    assert response.startswith("By ")
    assert row == {
        **{"query_id": "q", "query": "What is 2 plus 3?", "answer": "5", "dataset": "sums", "split": "test"},
        **{"prompt_id": "high", "prompt": "Way high.", "model": "toy", "run_id": report.run_id, "replicate": 0},
        **{"correct": response.endswith(" 5."), "score": None, "propensity": None, "latency_s": 0.25},
        **{"tokens_in": 7, "tokens_out": 6, "cost": pytest.approx((7 * 1 + 6 * 10) / 1e6)},
    }


def test_what_a_server_says_of_its_model_is_kept(out: Path) -> None:
    run(out, Scripted(lambda text, seed: replace(reply(text, seed), model_fingerprint="fp_1")))
    assert {notes(row)["model_fingerprint"] for row in rows(out)} == {"fp_1"}


def test_the_sampling_of_a_design_has_one_run_id(out: Path) -> None:
    first = run(out).run_id
    assert {row["run_id"] for row in rows(out)} == {first}
    assert run(out.with_name("again")).run_id == first
    assert run(out.with_name("other"), sampling=Sampling(temperature=0.9)).run_id != first


def test_what_is_not_known_stays_empty(out: Path) -> None:
    engine = Scripted(lambda text, seed: Completion("The answer is 1."))
    report = run(out, engine, queries=[Query("a", "One?"), Query("b", "Two?", "1")], price=(1.0, 1.0))
    without, graded = rows(out)[0], rows(out)[3]
    for name in ("answer", "correct", "cost", "tokens_in", "tokens_out", "latency_s", "dataset", "split"):
        assert without[name] is None
    assert notes(without) == {}
    assert graded["correct"] is True
    assert (report.progress.graded, report.progress.right, report.progress.tokens_in) == (3, 3, 0)


@pytest.mark.parametrize("metadata", ["easy", "[1, 2]", '"text"', "7", "{broken"])
def test_metadata_that_are_no_object_do_not_end_the_run(out: Path, metadata: str) -> None:
    """A CSV file of queries may hold any text under `metadata`."""
    assert run(out, queries=[replace(QUERIES[0], metadata=metadata)]).progress.done == 3
    assert {notes(row)["finish_reason"] for row in rows(out)} == {"stop"}


@pytest.mark.parametrize("metadata", ['{"error": "a typo"}', '{"error": {"kind": 1}}', '{"error": null}'])
def test_what_a_querys_metadata_call_an_error_is_no_failure(out: Path, metadata: str) -> None:
    report = run(out, queries=[replace(QUERIES[0], metadata=metadata)])
    assert report.errors == {}
    assert report.warnings == []


def test_a_response_that_is_no_unicode_is_kept(tmp_path: Path) -> None:
    """Servers send halves of surrogate pairs as JSON escapes."""
    engine = Scripted(lambda text, seed: Completion("The answer is 1. \ud83d", "stop"))
    with pytest.raises(EngineError):
        run(tmp_path / "b", Scripted(engine._answer, dies_after=len(ALL) - 1))
    resumed = run(tmp_path / "b", engine)
    whole = run(tmp_path / "a", engine)
    assert whole.progress.done == resumed.progress.done == len(ALL)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_chat_engines_get_messages_and_others_text(out: Path) -> None:
    run(out, plain := Scripted())
    run(out.with_name("chat"), chat := Scripted(chat=True))
    query = QUERIES[0].query
    assert [r.rendered for r in plain.requests if query in str(r.rendered)] == [
        f"{query} In way low.",
        f"In way mid: {query}",
        f"Way high.\n\n{query}",
    ]
    system = {"role": "system", "content": "Way high."}
    assert [r.rendered for r in chat.requests if query in str(r.rendered)] == [
        [{"role": "user", "content": f"{query} In way low."}],
        [{"role": "user", "content": f"In way mid: {query}"}],
        [system, {"role": "user", "content": query}],
    ]
    assert [r.seed for r in chat.requests] == [r.seed for r in plain.requests]


def test_verdicts_are_those_of_import(tmp_path: Path, out: Path) -> None:
    odd = [Query("half", "What is 3 plus 4?", "one half"), Query("none", "What is 5 plus 1?")]
    run(out, queries=[*questions(30), *odd], replicates=2)
    made = rows(out)
    names = ("query_id", "query", "prompt_id", "prompt", "response", "answer", "replicate")
    lines = [json.dumps({name: row[name] for name in names}) for row in made]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    import_log(tmp_path / "runs.jsonl", tmp_path / "imported.parquet", grade="numeric")
    assert [row["correct"] for row in rows(tmp_path / "imported.parquet")] == [row["correct"] for row in made]
    assert Counter(row["correct"] for row in made).keys() == {True, False, None}
    for way, rate in RATES.items():
        verdicts = [row["correct"] for row in made if row["prompt_id"] == way and row["correct"] is not None]
        assert np.mean(verdicts) == pytest.approx(rate, abs=0.2)


def test_nothing_is_graded_unasked(out: Path) -> None:
    report = run(out, grade=None)
    assert {row["correct"] for row in rows(out)} == {None}
    assert report.warnings == ["the queries have answers, but nothing was graded: name a checker (--grade)"]
    assert run(out.with_name("b"), grade=None, queries=[replace(q, answer=None) for q in QUERIES]).warnings == []


def test_replies_that_were_cut_off_are_told(out: Path) -> None:
    cut = Scripted(lambda text, seed: replace(reply(text, seed), finish_reason="length" if "low" in text else "stop"))
    (warning,) = run(out, cut).warnings
    assert warning == "33% of the responses were cut off at the limit of tokens"


def test_progress_is_told_after_each_run(out: Path) -> None:
    told: list[tuple[int, int, int, int]] = []

    def tell(made: Progress) -> None:
        told.append((made.done, made.new, made.total, made.tokens_out))

    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=5), progress=tell)
    assert told == [(i, i, 18, 6 * i) for i in range(1, 6)]
    told.clear()
    report = run(out, progress=tell)
    assert told == [(i, i - 5, 18, 6 * i) for i in range(6, 19)]
    made = report.progress
    found = rows(out)
    assert (made.graded, made.right) == (18, sum(row["correct"] for row in found))
    assert (made.tokens_in, made.tokens_out) == (sum(r["tokens_in"] for r in found), 18 * 6)
    assert (made.new_tokens_out, made.failed, made.money) == (13 * 6, 0, None)
    assert json.loads(json.dumps(report.to_dict()))["progress"]["done"] == 18


# What is refused --------------------------------------------------------------------------------------------


def test_equal_queries_are_asked_once(out: Path) -> None:
    engine = Scripted()
    report = run(out, engine, queries=[QUERIES[0], QUERIES[1], QUERIES[0]])
    assert len(engine.requests) == report.progress.total == 6
    assert keys(out) == [(q, p, 0) for q in ("q0", "q1") for p in ("low", "mid", "high")]


@pytest.mark.parametrize("other", [{"query": "What is 8 plus 8?"}, {"answer": "99"}, {"answer": None}])
def test_unlike_queries_of_one_id_are_refused(out: Path, other: dict[str, Any]) -> None:
    engine = Scripted()
    with pytest.raises(DataError, match="query_id 'q0' stands for two queries or answers"):
        run(out, engine, queries=[*QUERIES, replace(QUERIES[0], **other)])
    assert engine.requests == []
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": []}, "there is no query"),
        ({"prompts": [*PROMPTS, ("low", "{query} again")]}, "two prompts have the id 'low'"),
        ({"prompts": [("a", "{query} {{other}}")]}, "prompt 'a' cannot be filled with a query alone"),
        ({"prompts": [("a", "{% if x %}{query}")]}, "prompt 'a' cannot be filled with a query alone"),
        ({"design": "greedy"}, "design = 'greedy'; allowed: full, random, balanced, adaptive"),
        ({"design": "random", "prompts": PROMPTS[:1]}, "chooses between prompts, and there is one"),
        ({"replicates": 0}, "replicates = 0; allowed: 1 or more"),
        ({"design": "adaptive", "grade": None}, "the adaptive design needs verdicts"),
        ({"design": "adaptive", "queries": [replace(q, answer=None) for q in QUERIES]}, "needs verdicts"),
        ({"grade": "nummeric"}, "unknown checker 'nummeric' (did you mean 'numeric'?)"),
        ({"grade": "oirl:__version__"}, "checker"),
        ({"budget": Budget(1, "money")}, "a budget in money needs the model's prices"),
        ({"prompts": []}, "prompt"),
    ],
)
def test_settings_that_cannot_be(out: Path, settings: dict[str, Any], message: str) -> None:
    engine = Scripted()
    with pytest.raises((ConfigError, DataError, LookupError)) as error:
        run(out, engine, **settings)
    assert message in str(error.value)
    assert "budget" not in str(error.value) or "budget" in settings
    assert engine.requests == []
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("design", DESIGNS)
def test_any_seed_works_or_is_refused(out: Path, design: str) -> None:
    try:
        report = run(out, design=design, sampling=Sampling(seed=-1))
    except ConfigError:
        assert list(out.parent.iterdir()) == []
    else:
        assert report.progress.done == report.progress.total


def test_a_log_of_others_is_refused_and_untouched(out: Path) -> None:
    write_log(pa.Table.from_pylist([{"query_id": "a", "query": "A", "prompt_id": "p", "prompt": "{query}"}]), out)
    before = out.read_bytes()
    engine = Scripted()
    with pytest.raises(ConfigError, match="was not collected by oirl; name another --out"):
        run(out, engine)
    assert (out.read_bytes(), engine.requests) == (before, [])
    pq.write_table(pa.table({"x": [1, 2]}), out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="was not collected by oirl"):
        run(out, engine)
    assert out.read_bytes() == before
    out.write_text("my notes")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        run(out, engine)
    assert (out.read_text(), engine.requests) == ("my notes", [])
    assert list(out.parent.iterdir()) == [out], "a journal that holds nothing is left behind"


# Going on ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of an uninterrupted run of each design."""
    folder = tmp_path_factory.mktemp("whole")
    for design in DESIGNS:
        run(folder / design, design=design, replicates=3, **grow(60))
    return {design: rows(folder / design) for design in DESIGNS}


@pytest.mark.parametrize("design", DESIGNS)
def test_a_run_in_pieces_is_the_uninterrupted_one(
    out: Path, design: str, whole: dict[str, list[dict[str, Any]]]
) -> None:
    made = 0
    for dies_after in (0, 1, 7, 49, 1, 13, 40):
        engine = Scripted(in_flight=4, dies_after=dies_after)
        with pytest.raises(EngineError, match=r"^the server is gone$"):
            run(out, engine, design=design, replicates=3, **grow(60))
        assert set(os.listdir(out.parent)) <= {journal(out).name}
        made += engine.finished
        assert engine.finished == dies_after
        assert len(engine.requests) <= dies_after + 4
    engine = Scripted(in_flight=4)
    report = run(out, engine, design=design, replicates=3, **grow(60))
    assert made + len(engine.requests) == report.progress.done == len(whole[design])  # no reply was asked for again
    assert rows(out) == whole[design]
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize("design", DESIGNS)
def test_the_seed_decides(out: Path, design: str, whole: dict[str, list[dict[str, Any]]]) -> None:
    run(out, Scripted(in_flight=7), design=design, replicates=3, **grow(60))
    assert rows(out) == whole[design]
    other = out.with_name("other")
    run(other, design=design, replicates=3, sampling=Sampling(seed=1), **grow(60))
    assert rows(other) != whole[design]
    if design in ("random", "adaptive"):
        assert keys(other) != keys(out)


@pytest.mark.parametrize("design", ["full", "adaptive"])
def test_a_journal_cut_anywhere_is_gone_on_with(out: Path, design: str) -> None:
    settings = {"design": design, "replicates": 2, "sampling": Sampling(seed=5)}
    run(out, **settings)
    expected = rows(out)
    out.unlink()
    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=len(expected) - 1), **settings)
    full = journal(out).read_bytes()
    lines = full.split(b"\n")
    for cut in random.Random(0).sample(range(1, len(full)), 40):
        out.unlink(missing_ok=True)
        journal(out).write_bytes(full[:cut])
        kept = max(full[:cut].count(b"\n") - 1, 0)
        engine = Scripted()
        run(out, engine, **settings)
        assert rows(out) == expected
        assert len(engine.requests) == len(expected) - kept, (cut, lines[kept])


def test_killed_between_writing_the_log_and_removing_the_journal(out: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=17))
    copy = tmp_path / "copy"
    shutil.copy(journal(out), copy)
    run(out)
    expected = rows(out, without=())
    shutil.copy(copy, journal(out))
    engine = Scripted()
    report = run(out, engine)
    assert engine.requests == []
    assert rows(out, without=()) == expected
    assert report.progress.done == 18
    assert report.progress.tokens_out == 18 * 6  # what was spent once counts once
    assert not journal(out).exists()


def test_a_finished_run_is_left_as_it_is(out: Path) -> None:
    run(out)
    before = rows(out, without=())
    engine = Scripted()
    report = run(out, engine)
    assert engine.requests == []
    assert rows(out, without=()) == before
    assert (report.progress.done, report.progress.new, report.stopped) == (18, 0, None)


CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"sampling": Sampling(temperature=0.5)}, {}, "temperature was 1.0, is 0.5"),
    ({"sampling": Sampling(max_tokens=9)}, {}, "max_tokens was 512, is 9"),
    ({"sampling": Sampling(seed=9)}, {}, "seed was 0, is 9"),
    ({"sampling": Sampling(stop=("x",))}, {}, 'stop was [], is ["x"]'),
    ({"sampling": Sampling(top_k=3)}, {}, "top_k was null, is 3"),
    ({"sampling": Sampling(top_p=0.5)}, {}, "top_p was 1.0, is 0.5"),
    ({"grade": "exact"}, {}, 'grade was "numeric", is "exact"'),
    ({"design": "random"}, {}, 'design was "full", is "random"'),
    ({}, {"told": {"model": "other"}}, 'model was "toy", is "other"'),
    ({}, {"told": {"model_fingerprint": "new"}}, 'model_fingerprint was "abc", is "new"'),
    ({}, {"told": {"dtype": "float16"}}, 'dtype was null, is "float16"'),
    ({}, {"chat": True}, "chat was false, is true"),
    ({}, {"told": {"options": {"quantization": "fp8"}}}, 'options.quantization was null, is "fp8"'),
    ({}, {"told": {"options": {"dtype": "x"}}}, 'options.dtype was null, is "x"'),
    ({}, {"told": {"base_url": "http://b/v1"}}, 'base_url was "http://a/v1", is "http://b/v1"'),
]
TOLD = {"options": {}, "base_url": "http://a/v1"}


@pytest.mark.parametrize(("change", "engine", "message"), CHANGES)
@pytest.mark.parametrize("finished", [False, True])
def test_another_setting_is_refused_by_its_name(
    out: Path, change: dict[str, Any], engine: dict[str, Any], message: str, finished: bool
) -> None:
    if finished:
        run(out, Scripted(told=TOLD))
    else:
        with pytest.raises(EngineError):
            run(out, Scripted(dies_after=17, told=TOLD))
    there = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    other = Scripted(**engine | {"told": TOLD | engine.get("told", {})})
    with pytest.raises(ConfigError) as error:
        run(out, other, **change)
    assert message in str(error.value)
    assert "name another --out" in str(error.value)
    assert str(error.value).count(" was ") == (2 if change.get("design") else 1)
    assert other.requests == []
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == there
    assert run(out, Scripted(told=TOLD)).progress.done == 18  # the settings of before go on


def test_logprobs_of_another_kind_are_not_mixed(out: Path) -> None:
    raw, processed = (Scripted(told={"logprobs_mode": mode}) for mode in ("raw", "processed"))
    with_logprobs = Sampling(logprobs=True)
    run(out, raw, sampling=with_logprobs)
    with pytest.raises(ConfigError, match='logprobs_mode was "raw", is "processed"'):
        run(out, processed, sampling=with_logprobs)
    other = out.with_name("without")
    run(other, raw)
    assert run(other, processed, replicates=2).progress.done == 36  # there are none: nothing depends on it


HASH = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("first", "second", "fingerprint", "same"),
    [
        ("m/tiny", "m/tiny/", HASH, True),
        ("m/tiny", "/copy/of/tiny", HASH, True),
        ("m/tiny+ad", "n/tiny+moved", f"{HASH}+{HASH}", True),
        ("m/tiny", "m/other", "7", False),  # who knows what it is a hash of
        ("m/tiny", "m/tiny+hub/adapter", HASH, False),  # of the base alone
        ("m/tiny+hub/one", "m/tiny+hub/two", HASH, False),
        ("m/tiny+ad", "m/tiny+other", f"None+{HASH}", False),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_model_of_equal_bytes_may_lie_elsewhere(
    out: Path, first: str, second: str, fingerprint: str, same: bool, finished: bool
) -> None:
    told = [{"model": name, "model_fingerprint": fingerprint} for name in (first, second)]
    if finished:
        run(out, Scripted(told=told[0]), queries=QUERIES[:3])
    else:
        with pytest.raises(EngineError):
            run(out, Scripted(told=told[0], dies_after=5))
    if not same:
        with pytest.raises(ConfigError, match="model was"):
            run(out, Scripted(told=told[1]))
        return
    assert run(out, Scripted(told=told[1])).progress.done == 18
    assert {(row["model"], row["run_id"]) for row in rows(out)} == {(first, rows(out)[0]["run_id"])}


def test_a_model_may_be_moved(tmp_path: Path) -> None:
    out, folder = tmp_path / "log.parquet", tmp_path / "moved"
    settings: dict[str, Any] = {"queries": QUERIES[:1], "sampling": Sampling(max_tokens=2)}
    with open_engine("transformers", str(small_lm_path())) as engine:
        run(out, engine, **settings)
    shutil.copytree(small_lm_path(), folder)
    with open_engine("transformers", f"{folder}/") as engine:
        assert run(out, engine, **settings, replicates=2).progress.new == 3


def test_runs_of_before_more_was_told_go_on(out: Path) -> None:
    run(out.with_name("whole"))
    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=9))
    told = {"options": {"quantization": "fp8"}, "base_url": "http://a/v1"}
    assert run(out, Scripted(told=told)).progress.new == 9
    assert run(out, Scripted(told=told)).progress.new == 0
    assert [row["run_id"] for row in rows(out)] == [row["run_id"] for row in rows(out.with_name("whole"))]


@pytest.mark.parametrize("n", [30, 2])
def test_settings_under_which_nothing_was_answered_do_not_bind(out: Path, n: int) -> None:
    """`--set chat=true` on a model without a chat template: what the refusal advises must not be refused."""
    no_template = Scripted(lambda text, seed: refused("no chat template; use --set chat=false")[0], chat=True)
    queries = questions(n)
    with contextlib.suppress(EngineError):  # few queries come to an end, and stand in a log
        run(out, no_template, queries=queries)
    with contextlib.suppress(EngineError):
        run(out, no_template, queries=queries)
    report = run(out, queries=queries)
    assert (report.progress.done, report.progress.failed) == (3 * n, 0)
    run(out.with_name("whole"), queries=queries)
    assert rows(out) == rows(out.with_name("whole"))
    with pytest.raises(ConfigError, match="chat was false, is true"):
        run(out, no_template, queries=queries)


@pytest.mark.parametrize(
    ("design", "change", "message"),
    [
        ("random", {"prompts": [*PROMPTS, ("more", "{query}")]}, "prompts was"),
        ("random", {"prompts": [("low", "{query} in other words in way low"), *PROMPTS[1:]]}, "prompts was"),
        ("balanced", {"queries": questions(7)}, "queries was"),
        ("balanced", {"replicates": 3}, "replicates was 2, is 3"),
        ("adaptive", {"queries": questions(5)}, "queries was"),
        ("adaptive", {"replicates": 3}, "replicates was 2, is 3"),
    ],
)
def test_what_a_drawn_design_is_of_cannot_change(out: Path, design: str, change: dict[str, Any], message: str) -> None:
    run(out, design=design, replicates=2)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=message):
        run(out, **({"design": design, "replicates": 2} | change))
    assert out.read_bytes() == before


def test_more_replicates_keep_the_earlier_rows(out: Path) -> None:
    run(out)
    before = rows(out, without=())
    engine = Scripted(in_flight=3)
    report = run(out, engine, replicates=3)
    after = rows(out, without=())
    assert len(engine.requests) == 36
    assert (report.progress.new, report.progress.done, report.progress.total) == (36, 54, 54)
    assert [row for row in after if row["replicate"] == 0] == before
    run(out.with_name("at once"), replicates=3)
    assert rows(out) == rows(out.with_name("at once"))


def test_more_prompts_and_queries_keep_the_earlier_rows(out: Path) -> None:
    run(out, queries=QUERIES[:4], prompts=PROMPTS[1:])
    before = rows(out, without=())
    engine = Scripted()
    run(out, engine)
    assert len(engine.requests) == 18 - 8
    known = set(keys(before))
    assert [row for row in rows(out, without=()) if keys([row])[0] in known] == before
    run(out.with_name("at once"))
    assert rows(out) == rows(out.with_name("at once"))


def test_more_draws_and_queries_of_a_random_design_keep_the_earlier_ones(out: Path) -> None:
    run(out, design="random", replicates=2, queries=questions(40))
    before = {key: row for key, row in zip(keys(out), rows(out, without=()), strict=True)}
    engine = Scripted()
    run(out, engine, design="random", replicates=4, queries=questions(50)[::-1])
    assert len(engine.requests) == 200 - 80
    after = {key: row for key, row in zip(keys(out), rows(out, without=()), strict=True)}
    assert {key: after[key] for key in before} == before
    assert len(after) == 200


def test_rows_outside_of_the_design_stay(out: Path) -> None:
    run(out)
    before = rows(out, without=())
    report = run(out, queries=QUERIES[:2], prompts=PROMPTS[:1])
    inside = [("q0", "low", 0), ("q1", "low", 0)]
    assert [key for key in keys(out) if key in inside] == inside
    assert sorted(keys(out)) == sorted(keys(before))
    assert keys(out)[-1][0] not in ("q0", "q1")  # those of no query of the design come last
    assert (report.progress.done, report.progress.total) == (2, 2)


def test_draws_outside_of_the_design_are_not_counted(out: Path) -> None:
    run(out, design="random", replicates=6, queries=questions(20))
    found = keys(out)
    report = run(out, design="random", replicates=2, queries=questions(20))
    assert keys(out) == found
    assert (report.progress.done, report.progress.total) == (40, 40)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("what", ["query", "prompt"])
def test_an_id_with_another_text_is_refused(out: Path, what: str, finished: bool) -> None:
    if finished:
        run(out)
    else:
        with pytest.raises(EngineError):
            run(out, Scripted(dies_after=17))
    there = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    changed: dict[str, Any] = {
        "query": {"queries": [replace(QUERIES[0], query="What is 8 plus 8?"), *QUERIES[1:]]},
        "prompt": {"prompts": [("low", "{query} Otherwise in way low."), *PROMPTS[1:]]},
    }[what]
    engine = Scripted()
    name = {"query": "query_id 'q0'", "prompt": "prompt_id 'low'"}[what]
    with pytest.raises(DataError, match=f"{name} stood for another {what} before: .*give it another id"):
        run(out, engine, **changed)
    assert engine.requests == []
    assert {path.name: path.read_bytes() for path in out.parent.iterdir() if path == out} == {
        name: content for name, content in there.items() if name == out.name
    }
    assert run(out).progress.done == 18


def test_a_log_and_a_journal_are_put_together(out: Path) -> None:
    run(out)
    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=7), replicates=2)
    engine = Scripted()
    run(out, engine, replicates=2)
    assert len(engine.requests) == 18 - 7
    run(out.with_name("at once"), replicates=2)
    assert rows(out) == rows(out.with_name("at once"))


@pytest.mark.parametrize("design", ["full", "random"])
def test_queries_are_asked_in_an_order_of_chance(out: Path, design: str) -> None:
    """A budget may end the run: what it has made then must not be the head of a sorted file."""
    asked = []
    for queries in (questions(200), questions(150, start=50)[::-1]):
        engine = Scripted(dies_after=90)
        with pytest.raises(EngineError):
            run(out.with_name(str(len(queries))), engine, design=design, queries=queries)
        texts = [text_of(request.rendered) for request in engine.requests[:90]]
        asked.append([int(re.findall(r"(\d+) plus", text)[0]) for text in texts])
    half_width = 4 * 200 / np.sqrt(12 * len(set(asked[0])))
    assert abs(np.mean(asked[0]) - 99.5) < half_width
    known = [i for i in asked[0] if i >= 50]
    assert asked[1][: len(known)] == known  # more queries do not change the order of those that are there


@pytest.mark.parametrize(
    ("column", "value"), [("replicate", "x"), ("query_id", None), ("created_at", "yesterday"), ("created_at", 5)]
)
def test_a_damaged_row_of_the_journal_is_told(out: Path, column: str, value: Any) -> None:
    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=4))
    lines = journal(out).read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {column: value})
    journal(out).write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"log\.parquet\.journal.*{column}"):
        run(out)


def test_a_setting_refused_does_not_stand_in_the_way_of_the_right_one(out: Path) -> None:
    run(out)
    with pytest.raises(ConfigError, match="temperature was"):
        run(out, sampling=Sampling(temperature=0.5))
    assert run(out, replicates=2).progress.done == 36


def test_settings_under_which_nothing_was_made_do_not_bind(out: Path) -> None:
    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=0))
    assert run(out, sampling=Sampling(temperature=0.5)).progress.done == 18


def test_killed_before_the_first_reply_binds_to_nothing(out: Path) -> None:
    """Too large a model or batch is killed for its memory, and then tried with other settings."""
    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=1))
    journal(out).write_bytes(journal(out).read_bytes().split(b"\n")[0] + b"\n")
    assert run(out, sampling=Sampling(max_tokens=9)).progress.done == 18


SLOW = """
import signal, time
from scripted_engine import Scripted, reply

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it

class Slow(Scripted):
    # Four requests at a time, each written down before it is answered; after some replies it waits to be killed.

    def __init__(self, model, file, waits_after=None):
        super().__init__(self.slowly, in_flight=4)
        self.file, self.waits_after = file, waits_after

    def slowly(self, rendered, seed):
        time.sleep(600 if self.finished == self.waits_after else 0.002)
        return reply(rendered, seed)

    def stream(self, requests, sampling):
        def written():
            for request in requests:
                with open(self.file, "a") as file:
                    file.write(f"{request.seed}\\n")
                yield request
        return super().stream(written(), sampling)
"""


def command(folder: Path, out: Path, requests: Path) -> list[str]:
    lines = [json.dumps({"query_id": q.query_id, "query": q.query, "answer": q.answer}) for q in questions(40)]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    prompts = [json.dumps({"prompt_id": name, "prompt": text}) for name, text in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    (folder / "slow_engine.py").write_text(SLOW)
    return [
        *(sys.executable, "-m", "oirl_cli", "generate", "--engine", "slow_engine:Slow", "--model", "toy"),
        *("--queries", str(folder / "queries.jsonl"), "--prompts", str(folder / "prompts.jsonl"), "--out", str(out)),
        *("--grade", "numeric", "--set", f"file={requests}"),
    ]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    paths = [str(ROOT / p) for p in (".", "cli", "data", "tests/engines")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(folder)])}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=environment)


def asked_for(requests: Path) -> list[str]:
    return requests.read_text().split() if requests.exists() else []


def wait_for(requests: Path, lines: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many requests were made."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if len(asked_for(requests)) >= lines:
            return
        time.sleep(0.001)
    raise AssertionError(f"the command makes no requests: {process.communicate(timeout=1)}")


@pytest.mark.parametrize("design", ["full", "adaptive"])
def test_killed_at_any_moment(tmp_path: Path, design: str) -> None:
    out, requests = tmp_path / "log.parquet", tmp_path / "requests"
    arguments = [*command(tmp_path, out, requests), "--design", design, *(("--replicates", "3") * (design != "full"))]
    rng, kills = random.Random(design), 4
    for _ in range(kills):
        made, more = len(asked_for(requests)), rng.randrange(1, 26)
        process = start([*arguments, "--set", f"waits_after={more + 3}"], tmp_path)
        wait_for(requests, made + more, process)
        time.sleep(rng.random() * 0.006)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
    process = start(arguments, tmp_path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.startswith(f"{out}: 120 of 120 runs\n")
    assert not journal(out).exists()
    replicates = 1 if design == "full" else 3
    run(tmp_path / "whole.parquet", design=design, replicates=replicates, **grow(40))
    expected = rows(tmp_path / "whole.parquet")
    found = rows(out)
    assert len(found) == 120
    assert found == expected
    asked = Counter(asked_for(requests))
    assert len(asked) == 120
    assert asked.total() <= 120 + 4 * kills


def test_control_c_keeps_what_is_done(tmp_path: Path) -> None:
    out, requests = tmp_path / "log.parquet", tmp_path / "requests"
    arguments = command(tmp_path, out, requests)
    process = start([*arguments, "--set", "waits_after=10"], tmp_path)
    wait_for(requests, 13, process)  # nine are answered, four in flight
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line]
    assert lines[0] == f"what is done is kept in {out}.journal; the same command goes on from there"
    assert len(lines) == 2
    kept = len(journal(out).read_text().splitlines()) - 1
    assert kept == 9
    assert not out.exists()
    process = start([*arguments, "--json"], tmp_path)
    output, _ = process.communicate(timeout=60)
    assert json.loads(output)["progress"]["new"] == 120 - kept


def test_a_second_command_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    out, requests = tmp_path / "log.parquet", tmp_path / "requests"
    arguments = command(tmp_path, out, requests)
    first = start([*arguments, "--set", "waits_after=7"], tmp_path)
    wait_for(requests, 10, first)
    second = start(arguments, tmp_path)
    _, errors = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert errors == f"oirl: {out}.journal is being written by another process; wait for it, or stop it\n"
    assert len(asked_for(requests)) == 10
    assert len(journal(out).read_text().splitlines()) == 1 + 6


# Failures ---------------------------------------------------------------------------------------------------


class Flaky:
    """Fail on some texts, each so many times, and keep count."""

    def __init__(self, mark: str, times: int, how: Any = failed) -> None:
        self.mark, self.times, self.how = mark, times, how
        self.asked: list[str] = []

    def __call__(self, rendered: Rendered, seed: int) -> Completion:
        text = text_of(rendered)
        self.asked.append(text)
        if self.mark in text and self.asked.count(text) <= self.times:
            completion: Completion = self.how("busy\n now")[0]
            return completion
        return reply(rendered, seed)


def test_what_fails_once_is_tried_again_at_the_end(tmp_path: Path) -> None:
    flaky = Flaky("way mid", 1)
    report = run(tmp_path / "a", Scripted(flaky))
    assert len(flaky.asked) == 18 + 6
    assert all("way mid" in text for text in flaky.asked[-6:])
    assert (report.errors, report.warnings, report.progress.failed) == ({}, [], 0)
    run(tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.parametrize("how", [failed, refused])
def test_what_fails_twice_or_is_refused_is_written_down(out: Path, how: Any) -> None:
    flaky = Flaky("way mid", 99, how)
    report = run(out, Scripted(flaky, in_flight=3), price=(1.0, 1.0))
    assert len(flaky.asked) == (24 if how is failed else 18)
    assert max(Counter(flaky.asked).values()) == (2 if how is failed else 1)
    assert keys(out) == [(*cell, 0) for cell in ALL]
    for row in rows(out):
        if row["prompt_id"] == "mid":
            for name in ("response", "correct", "cost", "tokens_in", "tokens_out", "latency_s"):
                assert row[name] is None
            assert notes(row) == {"error": "busy now"}
        else:
            assert "error" not in notes(row)
            assert row["response"]
    assert report.errors == {"busy now": 6}
    (warning,) = report.warnings
    assert warning.startswith("6 runs failed and stand in the log without a response; the same command tries them")
    assert (report.progress.done, report.progress.failed, report.progress.graded) == (18, 6, 12)
    # The same command tries them again, and only them.
    again = Scripted()
    before = {key: row for key, row in zip(keys(out), rows(out, without=()), strict=True)}
    report = run(out, again, price=(1.0, 1.0))
    assert len(again.requests) == 6
    assert (report.errors, report.warnings, report.progress.failed) == ({}, [], 0)
    after = {key: row for key, row in zip(keys(out), rows(out, without=()), strict=True)}
    assert {k: r for k, r in after.items() if k[1] != "mid"} == {k: r for k, r in before.items() if k[1] != "mid"}
    run(out.with_name("whole"), price=(1.0, 1.0))
    assert rows(out) == rows(out.with_name("whole"))


def test_failures_in_a_journal_are_tried_again(out: Path) -> None:
    with pytest.raises(EngineError):
        run(out, Scripted(Flaky("way mid", 99, refused), dies_after=12))
    again = Scripted()
    assert run(out, again).progress.failed == 0
    assert len(again.requests) == 6 + 4
    run(out.with_name("whole"))
    assert rows(out) == rows(out.with_name("whole"))


def test_failures_stay_in_the_log_where_nothing_is_left_to_try_them_again(out: Path) -> None:
    run(out, Scripted(Flaky("way mid", 99)))
    before = rows(out)
    report = run(out, budget=Budget(1, "tokens"))
    assert report.stopped == "the budget is spent"
    assert rows(out) == before
    assert report.errors == {"busy now": 6}


def test_an_adaptive_run_does_not_promise_what_it_does_not_do(out: Path) -> None:
    """What came of a failure has decided what was run next: it cannot be run again."""
    report = run(out, Scripted(Flaky("way mid", 99)), design="adaptive", replicates=2)
    assert report.progress.failed > 0
    before = rows(out)
    again = Scripted()
    run(out, again, design="adaptive", replicates=2)
    promised = any("tries them again" in warning for warning in report.warnings)
    assert promised == bool(again.requests)
    if not again.requests:
        assert rows(out) == before


def test_a_dead_server_ends_the_run(out: Path) -> None:
    calls = 0

    def dies(rendered: Rendered, seed: int) -> Completion:
        nonlocal calls
        calls += 1
        return reply(rendered, seed) if calls <= 7 else failed("no\nroute")[0]

    engine = Scripted(dies)
    with pytest.raises(EngineError) as error:
        run(out, engine, queries=questions(30))
    assert calls == 7 + 20
    assert str(error.value) == (
        f"20 requests in a row failed, the last with: no route; 7 runs are kept in {out}.journal, and the same command "
        "goes on from there"
    )
    assert len(journal(out).read_text().splitlines()) == 1 + 7
    again = Scripted()
    run(out, again, queries=questions(30))
    assert len(again.requests) == 90 - 7


@pytest.mark.parametrize("how", [failed, refused])
def test_many_failures_here_and_there_do_not_end_the_run(out: Path, how: Any) -> None:
    """The server is well: thirty texts are too much for it, and stay so when they are tried again."""
    flaky = Flaky("way mid", 99, how)
    for _ in range(3):
        with contextlib.suppress(EngineError):
            run(out, Scripted(flaky), queries=questions(30))
            break
    assert out.exists(), "the same command does not go on from there: no log ever comes of it"
    assert len(rows(out)) == 90
    assert sum(row["response"] is None for row in rows(out)) == 30
    assert max(Counter(flaky.asked).values()) <= 2


@pytest.mark.parametrize("how", [failed, refused])
def test_many_failures_do_not_stand_in_the_way_of_more_replicates(out: Path, how: Any) -> None:
    for n in (15, 30):  # fifteen are few enough to come into a log
        with contextlib.suppress(EngineError):
            run(out, Scripted(Flaky("way mid", 99, how)), queries=questions(n))
    report = run(out, Scripted(Flaky("way mid", 99, how)), queries=questions(30), replicates=2)
    assert (report.progress.done, report.progress.failed) == (180, 60)


def test_refusals_end_a_run_only_where_nothing_was_ever_answered(out: Path) -> None:
    with pytest.raises(EngineError, match="20 requests in a row failed, the last with: bad key; 20 runs are kept"):
        run(out, Scripted(lambda text, seed: refused("bad key")[0]), queries=questions(30))
    calls = 0

    def but_the_first(rendered: Rendered, seed: int) -> Completion:
        nonlocal calls
        calls += 1
        return reply(rendered, seed) if calls == 1 else refused("too long")[0]

    other = out.with_name("other")
    report = run(other, Scripted(but_the_first), queries=questions(30))
    assert (report.progress.failed, report.errors) == (89, {"too long": 89})


def odd(text: str, answer: str) -> bool:
    raise ValueError("too\nodd")


def needs_a_package(text: str, answer: str) -> bool:
    require("no_such_package", "math", "the checker")
    return True


def test_what_a_checker_raises_is_told_in_one_line(out: Path) -> None:
    report = run(out, grade=f"{__name__}:odd")
    assert report.warnings == ["the checker failed on 18 responses, 18 times with ValueError: too odd"]


def test_a_checker_that_cannot_work_at_all_ends_the_run(out: Path) -> None:
    """Else everything is paid for, and nothing graded: `--grade math` without its package."""
    engine = Scripted()
    with pytest.raises(MissingPackageError, match="no_such_package"):
        run(out, engine, grade=f"{__name__}:needs_a_package")
    assert len(engine.requests) <= 1


def test_a_completion_without_text_or_reason_has_failed(out: Path) -> None:
    report = run(out, Scripted(lambda text, seed: Completion(None)), queries=QUERIES[:2])
    assert report.errors == {"the engine gave neither a response nor a reason": 6}


def test_a_paused_engine_collects_nothing(out: Path) -> None:
    engine = Scripted()
    engine.pause()
    with pytest.raises(EngineError, match=r"^the engine 'scripted' is paused; resume it first$"):
        run(out, engine)
    assert (engine.requests, list(out.parent.iterdir())) == ([], [])
    engine.resume()
    assert run(out, engine).progress.done == 18


def test_an_engine_that_is_paused_in_the_middle_keeps_what_is_done(out: Path) -> None:
    engine = Scripted(lambda text, seed: (engine.pause(), reply(text, seed))[1])  # type: ignore[func-returns-value]
    with pytest.raises(EngineError, match="paused"):
        run(out, engine)
    assert len(journal(out).read_text().splitlines()) == 1 + 1
    assert run(out).progress.new == 17


# Budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("in_flight", [1, 5])
def test_a_budget_stops_and_a_larger_one_goes_on(tmp_path: Path, design: str, in_flight: int) -> None:
    settings = {"design": design, "replicates": 2, "sampling": Sampling(max_tokens=6), **grow(25)}
    run(tmp_path / "whole", **settings)
    out = tmp_path / "log.parquet"
    done = 0
    for amount in (130, 131, 260, 500):
        report = run(out, Scripted(in_flight=in_flight), budget=Budget(amount, "tokens"), **settings)
        spent = report.progress.tokens_in + report.progress.tokens_out
        found = rows(out)
        assert report.stopped == "the budget is spent"
        assert spent == sum(row["tokens_in"] + row["tokens_out"] for row in found) <= amount
        assert spent > amount - 60  # not much is left: less than the worst that a request may take
        assert done <= len(found) == report.progress.done < report.progress.total
        assert not journal(out).exists()
        done = len(found)
    engine = Scripted()
    report = run(out, engine, budget=Budget(1e6, "tokens"), **settings)
    assert report.stopped is None
    assert len(engine.requests) == report.progress.total - done
    assert rows(out) == rows(tmp_path / "whole")


def test_a_budget_of_money(out: Path) -> None:
    settings = {"sampling": Sampling(max_tokens=6), "price": (1.0, 3.0), **grow(20)}
    report = run(out, budget=Budget(400e-6, "money"), **settings)
    money = sum(row["cost"] for row in rows(out))
    assert report.progress.money == pytest.approx(money)
    assert 300e-6 < money <= 400e-6
    first = rows(out)[0]
    assert first["cost"] == pytest.approx((first["tokens_in"] + 3 * first["tokens_out"]) / 1e6)
    assert run(out, budget=Budget(1.0, "money"), **settings).stopped is None


def test_what_other_sessions_spent_counts(out: Path) -> None:
    settings: dict[str, Any] = {"sampling": Sampling(max_tokens=6), "budget": Budget(120, "tokens")}
    with pytest.raises(EngineError):
        run(out, Scripted(dies_after=5), **settings)
    report = run(out, **settings)
    assert report.stopped
    assert sum(row["tokens_in"] + row["tokens_out"] for row in rows(out)) <= 120
    engine = Scripted()
    run(out, engine, **settings)
    assert engine.requests == []


def test_a_log_cut_by_a_budget_is_a_log(out: Path) -> None:
    run(out, budget=Budget(150, "tokens"), sampling=Sampling(max_tokens=6))
    found = audit(read_log(out))
    assert found.n_rows == len(rows(out)) < 18


def test_a_budget_too_small_for_anything(out: Path) -> None:
    engine = Scripted()
    with pytest.raises(ConfigError, match="the budget does not allow for a single request; raise it, or lower max_tok"):
        run(out, engine, budget=Budget(100, "tokens"))
    assert engine.requests == []
    assert not out.exists()
    # What the message advises works.
    assert run(out, budget=Budget(100, "tokens"), sampling=Sampling(max_tokens=6)).progress.done > 0


def test_a_cheap_beginning_does_not_break_the_budget(out: Path) -> None:
    """Spaces are few tokens, digits are many: what a byte took so far says nothing of the next."""
    texts = [f"{i} plus {i}?" + (" " if i < 2 else "7") * 200 for i in range(12)]

    def count(rendered: Rendered, seed: int) -> Completion:
        text = text_of(rendered)
        tokens = 20 if text.count(" ") > 100 else len(text.encode())
        return Completion("1", "stop", tokens_in=tokens, tokens_out=1)

    queries = [Query(f"q{i}", text) for i, text in enumerate(texts)]
    settings: dict[str, Any] = {"queries": queries, "prompts": [("p", "{query}")], "sampling": Sampling(max_tokens=1)}
    report = run(out, Scripted(count, in_flight=8), budget=Budget(600, "tokens"), **settings)
    assert report.progress.tokens_in + report.progress.tokens_out <= 600


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_around_a_text_are_reckoned_with(out: Path, chat: bool) -> None:
    """Tokens that begin and end a text or a message are no bytes of it."""

    def count(rendered: Rendered, seed: int) -> Completion:
        around = 8 if isinstance(rendered, str) else 64 * len(rendered)
        text = rendered if isinstance(rendered, str) else "".join(turn["content"] for turn in rendered)
        return Completion("1", "stop", tokens_in=len(text.encode()) + around, tokens_out=1)

    settings: dict[str, Any] = {"sampling": Sampling(max_tokens=1), "budget": Budget(500, "tokens")}
    report = run(out, Scripted(count, chat=chat, in_flight=20), **settings)
    assert report.stopped
    assert 300 < report.progress.tokens_in + report.progress.tokens_out <= 500


@pytest.mark.parametrize("design", DESIGNS)
def test_what_was_never_told_is_spent_in_the_next_session_too(out: Path, design: str) -> None:
    """Else each session of the same command would spend the budget anew."""
    engine = Scripted(lambda text, seed: replace(reply(text, seed), tokens_in=None, tokens_out=None))
    settings: dict[str, Any] = {"sampling": Sampling(max_tokens=20), "budget": Budget(300, "tokens"), "design": design}
    first = run(out, engine, **settings)
    assert first.stopped
    asked = len(engine.requests)
    for _ in range(2):
        assert run(out, engine, **settings).progress.done == first.progress.done
    assert len(engine.requests) == asked
    other = out.with_name("killed")
    with pytest.raises(EngineError):
        run(other, Scripted(engine._answer, dies_after=2), **settings)
    assert run(other, engine, **settings).progress.done == first.progress.done


@pytest.mark.parametrize("unit", ["tokens", "money"])
def test_an_engine_that_counts_no_tokens_does_not_spend_without_end(out: Path, unit: str) -> None:
    """Not every server says what it used: a budget is then kept by the most it can be, or is said to be void."""
    engine = Scripted(lambda text, seed: replace(reply(text, seed), tokens_in=None, tokens_out=None))
    budget = Budget(1500 if unit == "tokens" else 1500e-6, unit)
    report = run(out, engine, budget=budget, price=(1.0, 1.0))
    assert report.stopped or any("budget" in warning for warning in report.warnings)


# Designs end to end -----------------------------------------------------------------------------------------


def test_random_prompts_are_uniform_and_independent(out: Path) -> None:
    run(out, design="random", replicates=2, queries=questions(1500), grade=None)
    engine = Scripted()
    run(out, engine, design="random", replicates=2, queries=questions(1500), grade=None)
    assert engine.requests == []
    found = read_log(out, ["query_id", "prompt_id", "propensity"])
    assert found["propensity"].unique().to_pylist() == [1 / 3]
    names = {name: i for i, (name, _) in enumerate(PROMPTS)}
    of_query: dict[str, list[int]] = {}
    for query, prompt in zip(found["query_id"].to_pylist(), found["prompt_id"].to_pylist(), strict=True):
        of_query.setdefault(query, []).append(names[prompt])
    assert {len(drawn) for drawn in of_query.values()} == {2}
    total = np.bincount([p for drawn in of_query.values() for p in drawn], minlength=3)
    assert chisquare(total).pvalue > 1e-3
    pairs = Counter(tuple(sorted(drawn)) for drawn in of_query.values())
    expected = {(a, b): 1500 / 9 * (1 if a == b else 2) for a, b in product(range(3), repeat=2) if a <= b}
    assert chisquare([pairs[k] for k in expected], list(expected.values())).pvalue > 1e-3


def test_the_prompt_drawn_says_nothing_of_the_response(out: Path) -> None:
    """The seed that draws the prompt must not be the one that draws the response."""
    run(out, design="random", queries=questions(1500), grade=None, prompts=[("low", "Way low. A"), ("b", "Way low. B")])
    seeds = [int(row["response"].split()[1][:-1]) for row in rows(out)]
    table = np.zeros((2, 2))
    for seed, row in zip(seeds, rows(out), strict=True):
        table[int(row["prompt_id"] == "b"), int(seed >= 2**30)] += 1
    assert chi2_contingency(table).pvalue > 1e-3


def test_balanced_runs_every_prompt_equally_often(out: Path) -> None:
    run(out, design="balanced", replicates=2, queries=questions(60))
    found = rows(out)
    assert Counter(row["prompt_id"] for row in found) == {"low": 40, "mid": 40, "high": 40}
    assert {row["propensity"] for row in found} == {1 / 3}
    assert {row["replicate"] for row in found} == {0}  # two different prompts a query
    assert len({(row["query_id"], row["prompt_id"]) for row in found}) == 120
    other = out.with_name("other")
    run(other, design="balanced", replicates=2, queries=questions(60), sampling=Sampling(seed=1))
    assert keys(other) != keys(out)


def test_adaptive_weights_are_unbiased_and_the_best_is_run_more(tmp_path: Path) -> None:
    n, repeats = 100, 40
    ways = list(RATES)
    estimates, runs = np.zeros((repeats, 3)), np.zeros(3)
    for seed in range(repeats):
        out = tmp_path / f"{seed}.parquet"
        run(out, design="adaptive", replicates=2, sampling=Sampling(seed=seed), **grow(n))
        for row in rows(out):
            way = ways.index(row["prompt_id"])
            runs[way] += 1
            estimates[seed, way] += row["correct"] / row["propensity"] / (2 * n)
    error = estimates.std(axis=0, ddof=1) / np.sqrt(repeats)
    assert error.max() < 0.03
    assert (np.abs(estimates.mean(axis=0) - list(RATES.values())) < 3.5 * error).all()
    assert runs[2] > runs[1] > runs[0]
    assert runs[2] > 1.5 * runs[0]


def test_each_round_of_an_adaptive_run_follows_the_verdicts_before_it(out: Path) -> None:
    queries = [replace(q, answer=None) if i % 4 == 0 else q for i, q in enumerate(questions(50))]
    close = {"low": 0.45, "mid": 0.5, "high": 0.55}  # so that no round leaves the best without doubt
    engine = Scripted(lambda text, seed: reply(text, seed, close))
    run(out, engine, design="adaptive", replicates=4, queries=queries)
    of_seed = {int(row["response"].split()[1][:-1]): row for row in rows(out)}
    made = [of_seed[request.seed] for request in engine.requests]
    right, tried = np.zeros(3), np.zeros(3)
    for start in range(0, 200, 50):
        part = made[start : start + 50]
        chances = [{row["propensity"] for row in part if row["prompt_id"] == way} for way in RATES]
        assert [len(values) for values in chances] == [1, 1, 1]  # one probability a prompt and round
        found = [values.pop() for values in chances]
        assert sum(found) == pytest.approx(1)
        assert found == pytest.approx(top_two(right, tried))
        for row in part:
            right[list(RATES).index(row["prompt_id"])] += row["correct"] is True
            tried[list(RATES).index(row["prompt_id"])] += row["correct"] is not None
    assert tried.sum() == 4 * 37


# What the rest of oirl makes of it --------------------------------------------------------------------------


def test_audit_reads_the_log(out: Path) -> None:
    run(out, replicates=2, price=(1.0, 2.0), queries=questions(40))
    found = audit(read_log(out))
    assert (found.n_rows, found.n_queries, found.n_prompts) == (240, 40, 3)
    assert found.coverage["rows_without_verdict"] == 0
    rates = {
        row["prompt_id"]: np.mean([r["correct"] for r in rows(out) if r["prompt_id"] == row["prompt_id"]])
        for row in rows(out)
    }
    assert {p["prompt_id"] for p in found.prompts} == set(rates)
    for prompt in found.prompts:
        assert prompt["success"] == pytest.approx(rates[prompt["prompt_id"]])


@pytest.fixture(scope="module")
def selector() -> PromptSelector:
    return PromptSelector().fit(make_log(120))


@pytest.mark.parametrize("design", ["random", "balanced", "adaptive"])
def test_evaluate_finds_the_propensities_as_logged(out: Path, design: str, selector: PromptSelector) -> None:
    prompts = [(way, f"Use way {way}. {{query}}") for way in "abc"]
    texts = sorted(set(make_log(150, seed=9)["query"].to_pylist()))
    truth = {"a": {"alpha": 0.9, "beta": 0.1}, "b": {"alpha": 0.1, "beta": 0.9}, "c": {"alpha": 0.55, "beta": 0.55}}

    def answer(rendered: Rendered, seed: int) -> Completion:
        text = text_of(rendered)
        way = text.removeprefix("Use way ")[0]
        right = seed / 2**31 < truth[way]["alpha" if "alpha" in text else "beta"]
        return Completion("The answer is 1." if right else "The answer is 2.", "stop")

    queries = [Query(f"t{i}", text, "1", split="test") for i, text in enumerate(texts)]
    run(out, Scripted(answer), queries=queries, prompts=prompts, design=design)
    found = evaluate(selector, read_log(out), draws=100).to_dict()
    assert found["off_policy"]["propensity"] == "logged"
    assert found["off_policy"]["reason"] == "every run has its propensity"
    selected = found["policies"]["selector"]
    assert selected["value"] == pytest.approx(0.9, abs=0.12)
    assert found["policies"]["random"]["value"] == pytest.approx(0.52, abs=0.12)
    assert not any("propensit" in warning for warning in found["warnings"])


# The small language model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_lm() -> Any:
    with open_engine("transformers", str(small_lm_path()), {"batch_size": 16}) as engine:
        yield engine


def test_the_small_model_solves_problems(out: Path, small_lm: Engine) -> None:
    problems = generate_problems(40, random.Random(5), held_out=True)
    queries = [Query(f"p{i}", p.query, str(p.answer)) for i, p in enumerate(problems)]
    prompts = [(name, DEMO_PROMPTS[name]) for name in ("steps", "answer")]
    settings: dict[str, Any] = {
        "queries": queries,
        "prompts": prompts,
        "sampling": Sampling(max_tokens=60, temperature=0.7),
    }
    report = run(out, small_lm, **settings)
    found = rows(out)
    assert keys(out) == [(q.query_id, name, 0) for q in queries for name, _ in prompts]
    right = {name: np.mean([row["correct"] for row in found if row["prompt_id"] == name]) for name, _ in prompts}
    assert right["steps"] > right["answer"]
    told = json.loads(found[0]["sampling"])
    assert told["engine"] == "transformers"
    assert len(told["model_fingerprint"]) == 32
    assert found[0]["model"] == str(small_lm_path())
    assert all(row["tokens_out"] <= 60 for row in found)
    assert report.progress.tokens_out == sum(row["tokens_out"] for row in found)
    # In two sessions, cut by a budget, the same responses come of it.
    half = out.with_name("half.parquet")
    assert run(half, small_lm, budget=Budget(2000, "tokens"), **settings).stopped
    assert 0 < len(rows(half)) < 80
    assert run(half, small_lm, **settings).stopped is None
    times = ("created_at", "latency_s")
    assert rows(half, times) == rows(out, times)


def test_generate_with_the_small_model(tmp_path: Path) -> None:
    problems = generate_problems(6, random.Random(6), held_out=True)
    lines = [json.dumps({"query": p.query, "answer": str(p.answer)}) for p in problems]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    (tmp_path / "prompts.yaml").write_text("steps: '{query} Work step by step.'\nanswer: '{query} Answer only.'\n")
    out = tmp_path / "log.parquet"
    arguments: list[str | Path] = [
        *("generate", "--engine", "transformers", "--model", small_lm_path(), "--queries", tmp_path / "queries.jsonl"),
        *("--prompts", tmp_path / "prompts.yaml", "--out", out, "--grade", "numeric", "--max-tokens", "60", "--json"),
    ]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])  # torch is loaded in this process
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["progress"]["done"] == document["progress"]["graded"] == 12
    assert len(rows(out)) == 12
    assert run_oirl("audit", out).returncode == 0
