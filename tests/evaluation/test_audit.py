"""The audit: its contract, and that it finds what was planted and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, run_oirl

import oirl
from oirl.errors import DataError, OirlError
from oirl.evaluation.audit import Audit, audit
from oirl.evaluation.replies import check_cut_off, check_labels
from oirl.logs.store import conform_table


def column(table: pa.Table, name: str, values: Any) -> pa.Table:
    if name not in table.column_names:
        return table.append_column(name, pa.array(values))
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type))


@pytest.fixture(scope="module")
def clean() -> Audit:
    return audit(make_log(200, seed=8))


def test_the_document_keeps_the_contract(clean: Audit) -> None:
    d = clean.to_dict()
    assert json.loads(json.dumps(d, allow_nan=False)) == d
    assert {"n_rows", "n_queries", "n_prompts", "duplicates", "leaks", "replicates", "labels", "prompts"} <= d.keys()
    assert {"exact", "near"} <= d["leaks"].keys()
    assert {"cells", "agreement"} <= d["replicates"].keys()
    assert {"regraded", "changed"} <= d["labels"].keys()
    assert {"prompt_id", "n", "success", "ci_low", "ci_high"} <= d["prompts"][0].keys()
    assert {"value", "ci_low", "ci_high", "best_prompt", "one_draw_oracle", "method"} <= d["ceiling"].keys()
    assert {"n_queries", "smallest_detectable_gain"} <= d["power"].keys()
    assert isinstance(d["warnings"], list)


def test_a_clean_log_is_described_and_not_warned_of(clean: Audit) -> None:
    assert (clean.n_rows, clean.n_queries, clean.n_prompts) == (1200, 200, 3)
    assert clean.warnings == []
    assert clean.duplicates == {"exact": 0, "near": 0, "groups": 200, "repeated_replies": 0}
    assert clean.coverage == {
        "rows_without_verdict": 0,
        "cells": 600,
        "missing": 0,
        "complete_queries": 200,
        "one_prompt_queries": 0,
    }
    # Choosing by kind reaches .9 by construction; the best single prompt .55.
    assert clean.ceiling["ci_low"] <= 0.9 <= clean.ceiling["ci_high"]
    assert clean.prompts[0]["prompt_id"] in {"a", "b", "c"}
    assert "Best prompt" in clean.verdict[0]


def test_agreement_by_hand() -> None:
    table = make_log(2, replicates=2)
    # Cells in order: a, b, c of q0, then of q1, two runs each.
    verdicts = [True, True, True, False, False, False, True, True, False, True, True, False]
    found = audit(column(table, "correct", verdicts))
    assert found.replicates == {"cells": 6, "agreement": pytest.approx(0.5)}


def test_duplicates_and_leaks_that_were_planted_are_counted() -> None:
    table = make_log(100, seed=3)
    rows = table.to_pylist()
    first = next(r["query"] for r in rows if r["query_id"] == "q0")
    for row in rows:
        number = int(row["query_id"][1:])
        row["split"] = "test" if number < 20 else "train"
        if number == 50:
            row["query"] = f"  {first.upper()} "  # the same text under another id, on the other side
    found = audit(pa.Table.from_pylist(rows, schema=table.schema))
    assert found.duplicates["exact"] == 2
    assert found.duplicates["groups"] == 99
    assert found.leaks["exact"] == 2
    assert any("leaks" in w for w in found.warnings)


def replies(n: int = 60) -> pa.Table:
    rows = [
        {
            "query_id": f"q{i}",
            "query": f"What is {i} and {i}?",
            "prompt_id": p,
            "prompt": p,
            "response": f"We add {i} and {i}. The answer is {2 * i}."
            if p == "good"
            else f"It is {2 * i}, no, {i + 1}.",
            "answer": str(2 * i),
            "correct": p == "good",
        }
        for i in range(2, n + 2)
        for p in ("good", "bad")
    ]
    return pa.Table.from_pylist(rows)


def test_verdicts_that_a_careful_reading_changes_are_shown_with_examples() -> None:
    table = replies()
    wrong = [c and i not in (0, 6) for i, c in enumerate(table["correct"].to_pylist())]
    labels = audit(column(table, "correct", wrong)).labels
    assert (labels["checker"], labels["regraded"], labels["changed"], labels["to_right"]) == ("numeric", 120, 2, 2)
    assert [e["row"] for e in labels["examples"]] == [1, 7]
    assert labels["examples"][0]["logged"] is False
    assert labels["examples"][0]["careful"] is True
    # "It is 8, no, 5.": the gold number is there, but not as the answer.
    assert labels["answer_not_last"] == 60
    sound = audit(table)
    assert sound.labels["changed"] == 0
    assert not any("careful" in w for w in sound.warnings)


def test_letters_are_judged_as_choices_and_free_text_is_not_judged() -> None:
    table = replies()
    letters = column(column(table, "answer", ["B"] * 120), "response", ["The answer is (B)."] * 120)
    assert audit(letters).labels["checker"] == "choice"
    prose = audit(column(table, "answer", ["a long and free answer"] * 120)).labels
    assert (prose["checker"], prose["regraded"]) == (None, 0)


def conformed(**columns: list[Any]) -> pa.Table:
    n = len(next(iter(columns.values())))
    table = pa.table(
        {"query_id": ["q"] * n, "query": ["q"] * n, "prompt_id": ["p"] * n, "prompt": ["p"] * n, **columns}
    )
    return conform_table(table, ("response", "correct", "tokens_out", "sampling", "metadata"))


LONG = "This reply is long enough to be looked at. " * 6


def test_replies_cut_off_are_known_by_reason_by_limit_or_by_length() -> None:
    texts, verdicts = [LONG + "And then the"] * 3 + [LONG] * 9, [False] * 4 + [True] * 8
    by_reason = check_cut_off(
        conformed(
            response=texts,
            correct=verdicts,
            metadata=[json.dumps({"stop_reason": r}) for r in ["max_tokens"] * 2 + ["stop"] * 10],
        )
    )
    assert (by_reason.cut_off, by_reason.source, by_reason.wrong_if_cut) == (2, "finish reason", 1.0)
    tokens = [64] * 4 + [20] * 8
    # A short reply is no cut-off one, nor is one of a smooth spread of lengths.
    assert check_cut_off(conformed(response=["B"] * 40, correct=[True] * 40, tokens_out=[1] * 40)).cut_off is None
    spread = [40 + i % 20 for i in range(400)]
    assert check_cut_off(conformed(response=["B"] * 400, correct=[True] * 400, tokens_out=spread)).cut_off is None
    assert check_cut_off(conformed(response=[LONG + "The answer is B"], correct=[True])).end_midway == 0
    by_limit = check_cut_off(
        conformed(response=texts, correct=verdicts, tokens_out=tokens, sampling=[json.dumps({"max_tokens": 64})] * 12)
    )
    assert (by_limit.cut_off, by_limit.source) == (4, "max_tokens")
    pile = check_cut_off(conformed(response=texts * 5, correct=verdicts * 5, tokens_out=tokens * 5))
    assert (pile.cut_off, pile.source) == (20, "many replies of the largest length")
    by_text = check_cut_off(conformed(response=texts, correct=verdicts))
    assert (by_text.cut_off, by_text.end_midway, by_text.wrong_if_cut) == (None, 3, 1.0)


def test_a_large_log_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oirl.evaluation.replies.MOST_GRADED", 30)
    table = conform_table(replies(), ("query_id", "prompt_id", "response", "answer", "correct"))
    labels = check_labels(table, np.random.default_rng(0))
    assert (labels.regraded, labels.sampled) == (30, True)


def test_one_seed_one_audit() -> None:
    table = make_log(60, seed=3)
    assert audit(table, seed=4) == audit(table, seed=4)


def test_one_prompt_and_no_verdicts_are_said_plainly() -> None:
    table = make_log(30)
    one = audit(table.filter(pa.array([p == "a" for p in table["prompt_id"].to_pylist()])))
    assert any("one prompt only" in s for s in one.verdict)
    assert one.ceiling["value"] is None
    none = audit(column(table, "correct", [None] * len(table)))
    assert (none.prompts, none.ceiling, none.power) == ([], {}, {})
    assert "No row has a verdict" in none.verdict[0]
    json.dumps(none.to_dict(), allow_nan=False)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_tiny_logs_are_audited(n: int) -> None:
    found = audit(make_log(n))
    json.dumps(found.to_dict(), allow_nan=False)
    assert any("too few" in s for s in found.verdict)


def test_an_empty_log_and_a_bad_seed_are_user_errors() -> None:
    with pytest.raises(DataError, match="no rows"):
        audit(make_log(1).slice(0, 0))
    with pytest.raises(OirlError, match="seed"):
        audit(make_log(1), seed=-1)


def test_prompts_that_were_run_on_other_queries_are_not_called_better() -> None:
    """`a` has the easy queries to itself; on those that both had, `b` is far better."""
    table, rng, rows = make_log(400, replicates=1), np.random.default_rng(0), []
    for row in table.to_pylist():
        hard = int(row["query_id"][1:]) >= 200
        chance = {"a": 0.3 if hard else 0.95, "b": 0.55}.get(row["prompt_id"])
        if chance is not None and (hard or row["prompt_id"] == "a"):
            rows.append(row | {"correct": bool(rng.random() < chance)})
    said = " ".join(audit(pa.Table.from_pylist(rows, schema=table.schema)).verdict)
    assert "But b did better than it on the queries that they share" in said
    assert "shown to be better" not in said
    alone = [r for i, r in enumerate(table.to_pylist()) if "abc"[(i // 3) % 3] == r["prompt_id"]]
    said = " ".join(audit(pa.Table.from_pylist(alone, schema=table.schema)).verdict)
    assert "cannot be compared" in said


def test_runs_that_were_repeated_until_right_are_told() -> None:
    table, rng, rows = make_log(200, replicates=1), np.random.default_rng(0), []
    for row in table.to_pylist()[::3]:
        for replicate in range(6):
            rows.append(row | {"replicate": replicate, "correct": bool(rng.random() < 0.5)})
            if rows[-1]["correct"]:
                break
    found = audit(pa.Table.from_pylist(rows, schema=table.schema))
    assert any("repeated until" in w for w in found.warnings)
    assert not any("repeated until" in w for w in audit(make_log(200)).warnings)


def test_a_router_table_and_incomplete_logs_are_audited() -> None:
    table = make_log(60)
    router = table.append_column("model", table["prompt_id"])
    assert audit(router).warnings == []
    partial = table.filter(
        pa.array([hash(r["query_id"]) % 3 != "abc".index(r["prompt_id"]) for r in table.to_pylist()])
    )
    found = audit(partial)
    assert found.coverage["complete_queries"] == 0
    assert found.ceiling["value"] is None
    assert any("not known" in s for s in found.verdict)


def test_the_command_prints_one_document_or_a_page(tmp_path: Path) -> None:
    oirl.write_log(make_log(60, seed=1), tmp_path / "log.parquet")
    done = run_oirl("audit", tmp_path / "log.parquet", "--json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["n_queries"] == 60
    page = run_oirl("audit", tmp_path / "log.parquet")
    assert page.returncode == 0
    assert "\n\nBest prompt: " in page.stdout
    assert "95% interval" in page.stdout
    missing = run_oirl("audit", tmp_path / "none.parquet")
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
