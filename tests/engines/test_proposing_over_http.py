"""`oirl propose` with a proposer on a server, as a user types it: what is asked over HTTP, and what comes of it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import make_queries, run_oirl

from oirl import read_log, write_log
from oirl.logs.text import template_id
from oirl.records import INTERACTION_SCHEMA

pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parent))  # as pytest does it, but not for mypy and not with importlib
from faulty_server import RESET, WRONG_JSON, Asked, Fault, FaultyServer, changed_choice, error

GOOD, PLAIN, POOR = "Carefully: {query}", "{query} Quickly.", "{query} Guess."


def says(text: str) -> Fault:
    return changed_choice(message={"role": "assistant", "content": text})


def target(asked: Asked) -> Fault | None:
    """Add up rightly where it is told to be careful, else in half of the cases; now and then it is unwell."""
    if asked.nth == 0 and len(asked.text) % 7 == 0:
        return error(503)
    a, b = map(int, re.findall(r"(\d+) \+ (\d+)", asked.text)[-1])
    wrong = "Carefully" not in asked.text and (a + b) % 2
    return says(f"The answer is {a + b + wrong}.")


def write_task(path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(make_queries(90)):
        query = f"{text} What is {i} + {2 * i}?"
        for prompt_id, prompt, right in (("plain", PLAIN, i % 2 == 0), ("poor", POOR, i % 5 == 0)):
            rows.append(
                {
                    **{"query_id": f"q{i}", "query": query, "prompt_id": prompt_id, "prompt": prompt, "replicate": 0},
                    **{"response": f"It is {3 * i}." if right else "Many.", "correct": right, "answer": str(3 * i)},
                }
            )
    write_log(pa.Table.from_pylist(rows, schema=INTERACTION_SCHEMA), path)


def test_a_proposer_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-nobody")
    write_task(tmp_path / "log.parquet")
    replies = [
        error(429, "slow down", retry_after="0"), says(f"Better so:\n<prompt>{GOOD}</prompt>"), WRONG_JSON, RESET,
        says("I cannot."), says(f"<prompt>{PLAIN}</prompt>"), says("<prompt>{query} Hastily.</prompt>"),
    ]  # fmt: skip
    with FaultyServer(replies, models=["large"]) as large, FaultyServer(target, models=["small"]) as small:
        done = run_oirl(
            *("propose", "log.parquet", "--engine", "openai", "--model", "small", "--set", f"base_url={small.url}"),
            *("--proposer-engine", "openai", "--proposer-model", "large", "--proposer-set", f"base_url={large.url}"),
            *("--proposer-set", "concurrency=1", "--n", "2", "--race", "30", "--confirm", "50", "--max-tokens", "40"),
            *("--out", "new.jsonl", "--json"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
        assert len(large.asked) == len(replies)
    report = json.loads(done.stdout)
    assert [c["prompt"] for c in report["candidates"]] == [GOOD, "{query} Hastily."]
    assert report["left_out"] == {"it is known already": 1}
    race = report["race"]
    assert (race["winner"], race["incumbent"], race["n_confirm"]) == (template_id(GOOD), "plain", 50)
    assert 0 < race["ci_low"] < race["gain"]
    first = json.loads((tmp_path / "new.jsonl").read_text().splitlines()[0])
    assert (first["prompt"], first["confirmed"]["n"]) == (GOOD, 50)
    # The proposer is asked in chat for one prompt at a time and shown the log; the model is asked for the prompts.
    for asked in large.asked:
        assert (asked.path, asked.body["model"], asked.body["n"]) == ("/v1/chat/completions", "large", 1)
        assert f"50% of 90 runs: {PLAIN}" in asked.text
        assert "<prompt>" in asked.text
    assert GOOD in large.asked[-1].text  # it is told what is there already
    assert not any("improve the instructions" in asked.text for asked in small.asked)
    assert {asked.body["model"] for asked in small.asked} == {"small"}
    runs = read_log(tmp_path / race["log"])
    assert runs["response"].null_count == 0
    assert {json.loads(text)["base_url"] for text in runs["sampling"].to_pylist()} == {small.url}


def test_a_proposer_without_access_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_task(tmp_path / "log.parquet")
    with FaultyServer(lambda asked: error(401, "no such key"), models=["large"]) as large, FaultyServer() as small:
        done = run_oirl(
            *("propose", "log.parquet", "--engine", "openai", "--model", "tiny", "--set", f"base_url={small.url}"),
            *("--proposer-engine", "openai", "--proposer-model", "large", "--proposer-set", f"base_url={large.url}"),
            *("--out", "new.jsonl"),
            cwd=tmp_path,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"oirl: {large.url}: status 401: no such key\n"
        assert small.asked == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet"]
