"""Incomplete logs: how prompts came to be run, which estimator is allowed, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log

from oirl import PromptSelector, evaluate
from oirl.errors import ConfigError, DataError
from oirl.evaluation.logged import LoggedRuns, logged_runs
from oirl.evaluation.valuation import ESTIMATORS
from oirl.logs.cells import make_cells

PROMPTS = ["a", "b", "c"]


def logger(query: str, kind: str) -> np.ndarray:
    """Return π0 of a query: uniform, or leaning to a on alpha queries and to b on the others, or decided by that."""
    lean = {"uniform": 1 / 3, "leaning": 0.7, "decided": 1.0}[kind]
    rest = (1 - lean) / 2
    return np.array([lean, rest, rest] if "alpha" in query else [rest, lean, rest])


def thinned(table: pa.Table, kind: str, seed: int = 0, *, propensity: bool = True, runs: int = 1) -> pa.Table:
    """Return one run (or more) of each query, under prompts drawn by the logger."""
    rng = np.random.default_rng(seed)
    rows = table.to_pylist()
    of_query: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_query.setdefault(row["query_id"], []).append(row)
    kept = []
    for group in of_query.values():
        p = logger(group[0]["query"], kind)
        for replicate in range(runs):
            prompt = PROMPTS[rng.choice(3, p=p)]
            of_prompt = [r for r in group if r["prompt_id"] == prompt]
            chosen = dict(of_prompt[rng.integers(len(of_prompt))], replicate=replicate)
            kept.append(chosen | {"propensity": float(p[PROMPTS.index(prompt)]) if propensity else None})
    schema = table.schema.append(pa.field("propensity", pa.float64()))
    return pa.Table.from_pylist(kept, schema=schema)


@pytest.fixture(scope="module")
def selector(log: pa.Table) -> PromptSelector:
    return PromptSelector().fit(log)


@pytest.fixture(scope="module")
def full() -> pa.Table:
    return make_log(600, seed=501, replicates=1)


def truth(name: str) -> float:
    return {"best_prompt": 0.55, "random": (0.5 + 0.5 + 0.55) / 3, "selector": 0.9}[name]


@pytest.mark.parametrize("kind", ["uniform", "leaning"])
def test_logged_propensities_give_the_value_of_any_policy(selector: PromptSelector, full: pa.Table, kind: str) -> None:
    result = evaluate(selector, thinned(full, kind), draws=300)
    assert result.off_policy["propensity"] == "logged"
    for name in ("best_prompt", "random", "selector"):
        policy = result.policies[name]
        assert policy["estimator"] == "doubly_robust"
        assert policy["ci_low"] - 0.01 <= truth(name) <= policy["ci_high"] + 0.01
        assert policy["gain"] == pytest.approx(policy["value"] - result.policies["best_prompt"]["value"])
    assert result.policies["selector"]["gain_ci_low"] > 0.2
    assert set(result.off_policy["estimates"]["selector"]) == set(ESTIMATORS) - {"replay"}
    assert 0 < result.off_policy["support"]["selector"]["effective_sample_size"] <= 600
    assert result.warnings == []
    assert result.ceiling["value"] is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_propensities_are_estimated_where_the_log_has_none(selector: PromptSelector, full: pa.Table) -> None:
    result = evaluate(selector, thinned(full, "leaning", propensity=False), draws=300)
    assert result.off_policy["propensity"] == "estimated"
    assert "classifier" in result.off_policy["reason"]
    assert result.policies["random"]["estimator"] == "doubly_robust (propensities estimated)"
    assert any("propensity" in w for w in result.warnings)
    for name in ("best_prompt", "random", "selector"):
        policy = result.policies[name]
        assert policy["ci_low"] - 0.02 <= truth(name) <= policy["ci_high"] + 0.02


def test_the_shares_are_the_estimate_where_the_query_does_not_tell_the_prompt(full: pa.Table) -> None:
    cells = make_cells(thinned(full, "uniform", propensity=False))
    found = logged_runs(cells, np.arange(600))
    assert found.propensity == "estimated"
    assert "share" in found.reason
    share = found.shares.mean(axis=0)
    assert 1 / found.inverse_propensity.max(axis=0) == pytest.approx(share)


@pytest.mark.parametrize("known", [True, False])
def test_a_logger_that_left_nothing_to_chance_allows_the_direct_method_only(
    selector: PromptSelector, full: pa.Table, known: bool
) -> None:
    table = thinned(full, "decided", propensity=known)
    result = evaluate(selector, table, draws=100)
    assert result.off_policy["propensity"] == "deterministic"
    assert result.policies["random"]["estimator"] == "direct (model-based)"
    assert any("model" in w for w in result.warnings)
    with pytest.raises(ConfigError, match="allowed: direct"):
        evaluate(selector, table, estimator="ips", draws=50)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"replay"}))
def test_an_estimator_can_be_asked_for(selector: PromptSelector, full: pa.Table, name: str) -> None:
    result = evaluate(selector, thinned(full, "uniform"), estimator=name, draws=50)
    assert result.policies["random"]["estimator"].startswith(name)
    assert result.policies["random"]["value"] == pytest.approx(
        result.off_policy["estimates"]["random"][name], abs=1e-12
    )


def test_replay_is_refused_where_no_query_is_complete(selector: PromptSelector, full: pa.Table) -> None:
    with pytest.raises(ConfigError, match="no query was run under every prompt"):
        evaluate(selector, thinned(full, "uniform"), estimator="replay")
    with pytest.raises(ConfigError, match="unknown estimator 'magic'"):
        evaluate(selector, full, estimator="magic")


def test_a_full_log_is_replayed_and_weighting_it_says_the_same(selector: PromptSelector, full: pa.Table) -> None:
    replayed = evaluate(selector, full, draws=50)
    assert replayed.off_policy is None
    weighted = evaluate(selector, full, estimator="ips", draws=50)
    for name in ("best_prompt", "selector", "random", "knn"):
        assert weighted.policies[name]["value"] == pytest.approx(replayed.policies[name]["value"])


def test_values_from_half_of_the_runs_are_those_of_all_within_their_interval(selector: PromptSelector) -> None:
    """Coverage on logs whose full matrix is known, propensities estimated."""
    hits = []
    for seed in range(12):
        whole = make_log(250, seed=700 + seed, replicates=1)
        known = evaluate(selector, whole, draws=50).policies["random"]["value"]
        found = evaluate(selector, thinned(whole, "leaning", seed, propensity=False), draws=200).policies["random"]
        hits.append(found["ci_low"] <= known <= found["ci_high"])
    assert sum(hits) >= 9


def test_several_runs_of_a_query_count_as_one_query(full: pa.Table) -> None:
    cells = make_cells(thinned(full, "uniform", runs=3))
    found = logged_runs(cells, np.arange(600))
    assert found.shares.sum(axis=1) == pytest.approx(np.ones(600))
    # 1 / propensity of each run is 3, whatever was drawn.
    assert (found.shares * found.inverse_propensity).sum(axis=1) == pytest.approx(np.full(600, 3.0))
    assert found.warning is None


def test_propensities_that_cannot_be_are_told(selector: PromptSelector, full: pa.Table) -> None:
    """Of two prompts drawn per query, each is among them with ⅔, but a run's own propensity is ⅓."""
    table = thinned(full, "uniform", runs=2)
    wrong = table.set_column(table.schema.get_field_index("propensity"), "propensity", pa.array([2 / 3] * len(table)))
    assert any("1 / propensity is 1.50" in w for w in evaluate(selector, wrong, draws=50).warnings)


def test_runs_under_prompts_that_the_model_does_not_know_keep_their_share(
    selector: PromptSelector, full: pa.Table
) -> None:
    """A fourth prompt took half of the runs; leaving its queries out would double every weight."""
    table = thinned(full, "uniform")
    rows = table.to_pylist()
    for i, row in enumerate(rows):
        if i % 2:
            row |= {"prompt_id": "new", "prompt": "New. {query}", "propensity": 0.5}
        else:
            row["propensity"] /= 2
    result = evaluate(selector, pa.Table.from_pylist(rows, schema=table.schema), estimator="ips", draws=200)
    policy = result.policies["random"]
    assert policy["ci_low"] <= truth("random") <= policy["ci_high"]
    assert result.n_queries == 300


def test_prompts_of_the_model_are_found_by_name() -> None:
    runs = LoggedRuns(
        np.array([[0.25, 0.75]]),
        np.array([[1.0, 0.5]]),
        np.array([[4.0, 4 / 3]]),
        "logged",
        np.array([[True, True]]),
        "every run has its own",
    )
    of = runs.of_prompts(np.array([1, -1]))
    assert of.shares.tolist() == [[0.75, 0.0]]
    assert of.rates.tolist() == [[0.5, 0.0]]
    assert of.possible.tolist() == [[True, False]]


def test_what_the_log_has_hardly_run_is_not_valued(selector: PromptSelector) -> None:
    """The right prompt of each query was drawn one time in a hundred: nothing is known of the selector's choices."""
    table, rng, rows = make_log(200, seed=31, replicates=1), np.random.default_rng(0), []
    of_query: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        of_query.setdefault(row["query_id"], []).append(row)
    for group in of_query.values():
        p = [0.01, 0.495, 0.495] if "alpha" in group[0]["query"] else [0.495, 0.01, 0.495]
        drawn = int(rng.choice(3, p=p))
        rows.append(group[drawn] | {"propensity": p[drawn]})
    schema = table.schema.append(pa.field("propensity", pa.float64()))
    result = evaluate(selector, pa.Table.from_pylist(rows, schema=schema), draws=100)
    assert result.policies["selector"]["value"] is None
    assert result.policies["best_prompt"]["value"] is not None
    assert any("few runs" in w and "selector" in w and "cannot be valued" in w for w in result.warnings)


def test_queries_on_which_the_logger_had_no_choice_are_no_evidence_of_others(
    selector: PromptSelector, full: pa.Table
) -> None:
    """A quarter of the alpha queries was always run under b: what a would have done there, nobody knows."""
    table = thinned(full, "uniform")
    number, rows = {r["query_id"]: i for i, r in enumerate(full.to_pylist())}, table.to_pylist()
    whole = {(r["query_id"], r["prompt_id"]): r for r in full.to_pylist()}
    for i, row in enumerate(rows):
        if "alpha" in row["query"] and number[row["query_id"]] % 4 == 0:
            rows[i] = whole[(row["query_id"], "b")] | {"propensity": 1.0}
    result = evaluate(selector, pa.Table.from_pylist(rows, schema=table.schema), draws=100)
    assert result.off_policy["support"]["selector"]["unsupported_share"] > 0.05
    assert result.policies["selector"]["value"] is None


def test_a_few_runs_without_propensity_do_not_spoil_the_others(selector: PromptSelector, full: pa.Table) -> None:
    table = thinned(full, "leaning")
    values = [None if i % 50 == 0 else p for i, p in enumerate(table["propensity"].to_pylist())]
    some = table.set_column(table.schema.get_field_index("propensity"), "propensity", pa.array(values, pa.float64()))
    result = evaluate(selector, some, draws=200)
    assert result.off_policy["propensity"] == "logged"
    assert any("12 runs without a propensity" in w for w in result.warnings)
    for name in ("best_prompt", "random", "selector"):
        policy = result.policies[name]
        assert policy["ci_low"] - 0.01 <= truth(name) <= policy["ci_high"] + 0.01
    half = [None if i % 2 else p for i, p in enumerate(table["propensity"].to_pylist())]
    some = table.set_column(table.schema.get_field_index("propensity"), "propensity", pa.array(half, pa.float64()))
    assert evaluate(selector, some, draws=50).off_policy["propensity"] == "estimated"


def test_a_prompt_with_nearly_all_runs_is_no_sign_of_a_rule(full: pa.Table) -> None:
    table = thinned(full, "uniform", propensity=False)
    rng, whole, rows = np.random.default_rng(3), {(r["query_id"], r["prompt_id"]): r for r in full.to_pylist()}, []
    for row in table.to_pylist():
        rows.append(whole[(row["query_id"], str(rng.choice(PROMPTS, p=[0.01, 0.01, 0.98])))] | {"propensity": None})
    cells = make_cells(pa.Table.from_pylist(rows, schema=table.schema))
    assert logged_runs(cells, np.arange(600)).propensity == "estimated"


@pytest.mark.parametrize("value", [0.0, -0.5, 2.0, 50.0, float("nan"), float("inf"), 1e-12])
def test_propensities_that_are_no_probabilities_are_refused(
    selector: PromptSelector, full: pa.Table, value: float
) -> None:
    table = thinned(full, "uniform")
    values = table["propensity"].to_pylist()
    values[7] = value
    wrong = table.set_column(table.schema.get_field_index("propensity"), "propensity", pa.array(values, pa.float64()))
    with pytest.raises(DataError, match="propensity"):
        evaluate(selector, wrong)
