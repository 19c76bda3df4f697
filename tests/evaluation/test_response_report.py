"""The page of an evaluation of responses or preferences: it says what the document says, and nothing runs on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_queries

import oirl
from oirl.evaluation.response_report import render_response_report, write_response_report
from oirl.records import PREFERENCE_SCHEMA

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def on_responses() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = []
    for i, query in enumerate(make_queries(40)):
        for k in range(4):
            right = bool(rng.random() < 0.5)
            said = f"{k} + 3 = {k + 3 if right or rng.random() < 0.2 else k + 5}"
            rows.append({"query_id": f"q{i}", "query": query, "prompt_id": f"p{k}", "prompt": f"{k}", "response": said})
            rows[-1] |= {"correct": right, "answer": "7"}
    log = pa.Table.from_pylist(rows)
    model = oirl.ResponseRewardModel(folds=2, params={"strength": 3.0}).fit(log)
    return oirl.evaluate_responses(model, log, draws=50).to_dict()


@pytest.fixture(scope="module")
def on_pairs() -> dict[str, Any]:
    rows = [
        {"pair_id": str(i), "query": q, "chosen": f"yes {i}", "rejected": f"no, and {i} more", "margin": float(i % 5)}
        | {"source": HOSTILE if i % 2 else "plain"}
        for i, q in enumerate(make_queries(40))
    ]
    pairs = pa.Table.from_pylist(rows, PREFERENCE_SCHEMA)
    model = oirl.BradleyTerryRewardModel(embedder="checks", folds=2, params={"strength": 3.0}).fit(pairs)
    return oirl.evaluate_preferences(model, pairs).to_dict()


def test_a_page_of_responses_shows_the_choices_and_their_intervals(on_responses: dict[str, Any]) -> None:
    page = render_response_report(on_responses)
    vote = on_responses["best_of_n"]["policies"]["weighted_majority"]
    assert f"{100 * vote['value']:.1f}%" in page
    assert f"[{100 * vote['over_majority_ci_low']:+.1f}, {100 * vote['over_majority_ci_high']:+.1f}]" in page
    assert "N = 4" in page  # on the axis, beside KL
    assert page.count("<svg") == 2
    for warning in on_responses["warnings"]:
        assert warning in page


def test_a_page_of_pairs_says_whether_more_than_length_is_known(on_pairs: dict[str, Any]) -> None:
    document = copy.deepcopy(on_pairs)
    null = document["null_models"]["length"]
    sentences = {(-0.2, -0.1): "less than length alone", (-0.1, 0.1): "do not show", (0.1, 0.2): None}
    for (low, high), sentence in sentences.items():
        null |= {"gain_ci_low": low, "gain_ci_high": high}
        page = render_response_report(document)
        for other in filter(None, sentences.values()):
            assert (other in page) == (other == sentence)


def test_nothing_of_a_file_runs_on_the_page(on_pairs: dict[str, Any]) -> None:
    page = render_response_report(on_pairs)
    assert HOSTILE not in page
    assert "&lt;img src=x" in page
    assert "<script" not in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_a_page_is_written_whole_or_not_at_all(on_pairs: dict[str, Any], tmp_path: Path) -> None:
    write_response_report(on_pairs, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_response_report(on_pairs)
    broken = {k: v for k, v in on_pairs.items() if k != "null_models"}
    with pytest.raises(KeyError):
        write_response_report(broken, tmp_path / "other.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
