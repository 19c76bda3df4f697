"""Engines, checkers and prompts that are not what they should be: nothing of it may spoil a log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_oirl
from scripted_engine import PROMPTS, Scripted, notes, questions, reply, rows

from oirl import collect
from oirl.engines.base import Completion, EngineError, Request, Sampling
from oirl.engines.collecting import CollectReport
from oirl.engines.spending import Budget
from oirl.errors import ConfigError, DataError
from oirl.records import Query
from oirl_data import small_lm_path

QUERIES = questions(8)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "log.parquet"


def run(out: Path, engine: Any = None, **settings: Any) -> CollectReport:
    known: dict[str, Any] = {"queries": QUERIES, "prompts": PROMPTS, "grade": "numeric"} | settings
    return collect(engine or Scripted(), known.pop("queries"), known.pop("prompts"), out, **known)


class Mixed(Scripted):
    """Changes what a right engine yields."""

    def __init__(self, change: Callable[[int, list[Completion]], Iterable[tuple[Any, Any]]]) -> None:
        super().__init__()
        self._change = change

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for position, completions in super().stream(requests, sampling):
            yield from self._change(position, completions)


@pytest.mark.parametrize(
    "change",
    [
        lambda i, made: [(i, made), (i, made)],
        lambda i, made: [(-1 - i, made)],
        lambda i, made: [(i + 1, made)],
        lambda i, made: [(str(i), made)],
        lambda i, made: [(i, [])],
        lambda i, made: [(i, made * 2)],
        lambda i, made: [(i, made[0])],
        lambda i, made: [(i, None)],
        lambda i, made: [(i, ["text"])],
    ],
    ids=["twice", "from the end", "another's", "text", "none", "two", "bare", "null", "strings"],
)
def test_an_engine_that_mixes_requests_up_is_stopped(out: Path, change: Any) -> None:
    with pytest.raises(EngineError, match="'scripted' breaks its contract"):
        run(out, Mixed(change))
    assert not out.exists()
    assert run(out).progress.done == 24
    whole = out.with_name("whole.parquet")
    run(whole)
    assert rows(out) == rows(whole)


def test_requests_that_an_engine_leaves_out_are_made_again_then_recorded(out: Path) -> None:
    report = run(out, Mixed(lambda i, made: [] if i == 2 else [(i, made)]))
    assert (report.progress.done, len(rows(out))) == (24, 24)
    assert sum(row["response"] is None for row in rows(out)) == report.progress.failed < 3
    silent = Mixed(lambda i, made: [(i, [Completion(None)])] if i == 0 else [(i, made)])
    assert run(out.with_name("other.parquet"), silent).progress.done == 24


@pytest.mark.parametrize("count", [-5, 10**30, 2.5, float("nan"), "7", True])
def test_counts_that_are_none_are_not_told(out: Path, count: Any) -> None:
    engine = Scripted(lambda text, seed: replace(reply(text, seed), tokens_in=count, tokens_out=count))
    made = run(out, engine).progress
    assert (made.tokens_in, made.tokens_out) == (0, 0)
    assert {row["tokens_in"] for row in rows(out)} == {None}


def test_halves_of_surrogate_pairs_do_not_lose_the_run(out: Path) -> None:
    odd = {"text": "It is \ud800 7", "finish_reason": "stop\ud800", "model_fingerprint": "\udfff"}
    run(out, Scripted(lambda text, seed: replace(reply(text, seed), **odd)))
    assert {row["response"] for row in rows(out)} == {"It is ? 7"}
    assert run(out, replicates=2).progress.done == 48


def test_a_checker_that_fails_costs_no_response(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_checker.py").write_text(
        "def check(response, answer):\n    return 1 / 0 if answer == '4' else answer in response\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    report = run(out, grade="my_checker:check")
    assert report.progress.done == 24
    broken = [row for row in rows(out) if row["answer"] == "4"]
    assert all(row["correct"] is None and row["response"] for row in broken)
    assert {notes(row)["grade_error"] for row in broken} == {"ZeroDivisionError: division by zero"}
    assert any("the checker failed on 3 responses" in warning for warning in report.warnings)


def test_another_answer_to_a_query_is_refused(out: Path) -> None:
    run(out)
    before = out.read_bytes()
    with pytest.raises(DataError, match="query_id 'q0' stood for another answer before: '0'"):
        run(out, queries=[replace(QUERIES[0], answer="1"), *QUERIES[1:]])
    assert out.read_bytes() == before


@pytest.mark.parametrize("prompt", ["{question}", "Do it: {query!r}", "{input} step by step"])
def test_a_misspelt_place_is_refused(out: Path, prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"but no \{query\}"):
        run(out, prompts=[("p", prompt)])


def test_another_place_beside_the_query_is_told(out: Path) -> None:
    report = run(out, prompts=[("low", "{query} In way low, {style}.")])
    assert any("{style} as it stands" in warning for warning in report.warnings)
    assert not run(out.with_name("b.parquet"), prompts=[("low", '{"a": 1} {query} In way low.')]).warnings


def test_grading_without_answers_is_told(out: Path) -> None:
    report = run(out, queries=[Query(q.query_id, q.query) for q in QUERIES])
    assert any("no query has an `answer`" in warning for warning in report.warnings)


def test_equal_prompts_are_called_equal(out: Path) -> None:
    with pytest.raises(ConfigError, match="two prompts are equal"):
        run(out, prompts=[("a", "{query}"), ("a", "{query}")])


def test_the_order_of_the_file_does_not_decide_what_a_budget_leaves_out(out: Path) -> None:
    settings = {"prompts": PROMPTS[:1], "budget": Budget(3000, "tokens"), "sampling": Sampling(max_tokens=9)}
    run(out, queries=questions(400), **settings)
    made = [int(row["query_id"][1:]) for row in rows(out)]
    assert 40 < len(made) < 390
    assert 150 < sum(made) / len(made) < 250


def test_the_command_line_says_what_is_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"query": "What is 1 plus 1?", "answer": "2"}')
    (tmp_path / "p.jsonl").write_text('{"prompt": "{query}"}')
    (tmp_path / "prices.yaml").write_text("other-model: {input: 1, output: 2}")
    base = ["generate", "--engine", "transformers", "--model", str(small_lm_path()), "--queries", "q.jsonl"]
    base += ["--prompts", "p.jsonl"]
    for options, said in (
        (["--out", "log.jsonl"], ".parquet file"),
        (["--out", "log.parquet", "--prices", "prices.yaml"], "it has: other-model"),
    ):
        done = run_oirl(*base, *options, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr
    done = run_oirl(*base, "--out", "log.parquet", "--grade", "numeric", "--max-tokens", "9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "q.jsonl").read_text()
    target = ["--engine", "transformers", "--model", str(small_lm_path())]
    done = run_oirl("propose", "log.parquet", *target, "--out", "q.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no proposed prompts" in done.stderr
    assert (tmp_path / "q.jsonl").read_text() == asked
    assert json.loads(asked)["answer"] == "2"
