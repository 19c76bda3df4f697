"""What is said of a choice is said of that choice: the best of many, the other text, the right null, the whole log."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_queries
from scipy.special import expit

import oirl
from oirl.evaluation.preferences import annotator_agreement
from oirl.logs.text import plain_json, printable
from oirl.records import PREFERENCE_SCHEMA
from oirl.rewards.base import Estimates
from oirl.rewards.responses import fit_chosen
from oirl.rewards.training import SeenQueries


class Known:
    """A model whose rewards are given by text."""

    def __init__(self, kind: str, rewards: dict[str, float], **data: Any) -> None:
        self.kind, self.rewards = kind, rewards
        self.seen_ = SeenQueries.of(["nothing of the sort"])
        self.data_ = {"answers": "text", "success": 0.5, "best_prompt": "p", "prompts": {"p": 0.5}, **data}

    def estimate(self, queries: Any, responses: Any) -> Estimates:
        return Estimates(np.array([self.rewards[r] for r in responses]), np.zeros(len(responses)))


def log_of(rows: list[tuple[str, str, str | None, bool]]) -> pa.Table:
    """Return a log of (query, prompt, response, correct)."""
    return pa.Table.from_pylist(
        [
            {"query_id": q, "query": q, "prompt_id": p, "prompt": p, "response": r, "correct": c, "replicate": i}
            for i, (q, p, r, c) in enumerate(rows)
        ]
    )


def test_the_best_of_many_is_calibrated_as_such() -> None:
    """Rewards are right on average, but errors of theirs put a response on top."""
    rng = np.random.default_rng(0)
    queries, n = 4000, 8
    hard = rng.normal(0, 1.5, queries)  # shared by the replies to a query, and unknown to the model
    seen = rng.normal(0, 1, (queries, n))
    right = rng.random((queries, n)) < expit(seen + hard[:, None])
    slope = 0.75  # of the marginal P(right) in what the model sees, about
    rows: Any = SimpleNamespace(
        query=np.repeat(np.arange(queries), n),
        row=np.arange(queries * n),
        runs=np.ones(queries * n, dtype=int),
        successes=right.ravel().astype(int),
    )
    found = fit_chosen(rows, expit(slope * seen).ravel(), rng)
    assert found is not None
    model = oirl.ResponseRewardModel()
    model.chosen_ = found
    for size in (1, 2, 4, 8):
        best = seen[:, :size].argmax(axis=1)
        reward = slope * seen[np.arange(queries), best]
        assert model.chosen_probability(reward, size).mean() == pytest.approx(
            right[np.arange(queries), best].mean(), abs=0.025
        )


def test_the_number_of_candidates_counts_up_to_the_largest_seen() -> None:
    model = oirl.ResponseRewardModel()
    model.chosen_ = {"slope": 0.5, "per_log_n": -0.7, "intercept": 0.2, "most": 4.0}
    one = np.array([1.0])
    assert model.chosen_probability(one, 2)[0] == pytest.approx(expit(0.5 - 0.7 * np.log(2) + 0.2))
    assert model.chosen_probability(one, 50)[0] == model.chosen_probability(one, 4)[0]
    model.chosen_ = None
    assert model.chosen_probability(one, 4)[0] == pytest.approx(expit(1.0))


def test_the_same_text_again_is_no_runner_up() -> None:
    model = Known("preference-reward-model", {"a": 2.0, "a ": 2.0, "b": 0.5})
    found = oirl.rank(model, ["q"], [["a", "b", "a ", "a"]])[0]
    assert found.score == pytest.approx(expit(1.5))
    assert oirl.rank(model, ["q"], [["a", "a "]])[0].score == pytest.approx(expit(2.0))


def test_the_same_judgment_twice_is_one() -> None:
    rows = [("1", "yes", "no"), ("1", "yes", "no"), ("2", "no", "yes"), ("3", "yes", "no")]
    table = pa.Table.from_pylist([{"pair_id": i, "query": "q", "chosen": c, "rejected": r} for i, c, r in rows])
    pairs = table.cast(pa.schema([PREFERENCE_SCHEMA.field(name) for name in table.column_names]))
    assert annotator_agreement(pairs) == {
        "n_comparisons": 1,
        "n_judgments": 3,
        "agreement": pytest.approx(1 / 3),
        "ceiling": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(("share", "prefers", "auc"), [(0.2, "shorter", 1.0), (0.8, "longer", 0.0)])
def test_the_length_null_has_the_direction_of_the_training_log(share: float, prefers: str, auc: float) -> None:
    log = log_of([(q, "p", r, r == "ab") for q in make_queries(3) for r in ("ab", "abcd")])
    model = Known("response-reward-model", {"ab": 0.0, "abcd": 0.0}, longer_preferred=share)
    null = oirl.evaluate_responses(model, log, draws=20).null_models["length"]
    assert (null["prefers"], null["auc_within_query"]) == (prefers, auc)


def test_whether_the_longer_one_is_right_is_asked_within_queries() -> None:
    """Hard queries get long replies, yet of two replies to one query the longer one is right."""
    rows = []
    for i, query in enumerate(make_queries(30)):
        long = "x" * (50 * (i % 2))
        rows += [(query, "p", f"{long}{i} 1 + 1 = 2 and so", True), (query, "p", f"{long}{i} 1 = 2", False)]
        rows += [(query, "p", f"{long}{i} {k} = 1", False) for k in range(3 * (i % 2))]
    model = oirl.ResponseRewardModel(folds=2, params={"strength": 1.0}).fit(log_of(rows))
    assert model.data_["longer_preferred"] == 1.0


def test_runs_without_a_response_count_for_the_best_prompt() -> None:
    rows: list[tuple[str, str, str | None, bool]] = []
    for i, query in enumerate(make_queries(20)):
        rows += [(query, "spoken", f"{i} + 1 = {i + 1 + i % 2}", i % 2 == 0), (query, "silent", None, i % 4 > 0)]
    model = oirl.ResponseRewardModel(folds=2, params={"strength": 1.0}).fit(log_of(rows))
    assert model.data_["best_prompt"] == "silent"
    assert model.data_["prompts"] == {"spoken": pytest.approx(0.5), "silent": pytest.approx(0.75)}


def test_json_for_a_terminal_commands_nothing_and_loses_nothing() -> None:
    row = {"a": "\u200f\x85\x1b[2J \u05d0 \u00e9"}
    text = plain_json(json.dumps(row, ensure_ascii=False))
    assert text == printable(text)
    assert "\u05d0" in text
    assert json.loads(text) == row


def test_an_unknown_embedder_of_responses_is_told_of_checks() -> None:
    with pytest.raises(oirl.OirlError, match=r"unknown embedder 'cheks'.*checks"):
        oirl.ResponseRewardModel(embedder="cheks").fit(log_of([(q, "p", r, r == "a") for q in "xy" for r in "ab"]))
