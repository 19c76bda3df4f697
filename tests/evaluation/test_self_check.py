"""The self-check: thinning a full log by a known policy shows how far off each estimator is."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log

from oirl import PromptSelector
from oirl.errors import DataError
from oirl.evaluation.self_check import SelfCheck, self_check
from oirl.evaluation.valuation import ESTIMATORS


@pytest.fixture(scope="module")
def selector(log: pa.Table) -> PromptSelector:
    return PromptSelector().fit(log)


@pytest.fixture(scope="module")
def check(selector: PromptSelector) -> SelfCheck:
    return self_check(selector, make_log(300, seed=42), repeats=12)


def test_the_truth_is_the_value_of_all_runs(check: SelfCheck) -> None:
    table = make_log(300, seed=42)
    of_c = [r["correct"] for r in table.to_pylist() if r["prompt_id"] == "c"]
    assert check.truth["best_prompt"] == pytest.approx(np.mean(of_c))
    assert check.truth["random"] == pytest.approx(np.mean(table["correct"].to_pylist()))
    assert check.n_queries == 300


def test_weighting_by_known_propensities_is_right_up_to_chance(check: SelfCheck) -> None:
    for error in check.errors:
        if error.estimator in ("ips", "snips", "doubly_robust"):
            assert abs(error.mean_error) < 4 * error.rmse / np.sqrt(12) + 1e-9
            assert error.covered >= 0.7
        assert abs(error.mean_error) <= error.rmse + 1e-12


def test_every_estimator_and_the_estimated_propensities_are_shown(check: SelfCheck) -> None:
    names = {e.estimator for e in check.errors}
    assert names == set(ESTIMATORS) - {"replay"} | {"doubly_robust (propensities estimated)"}
    assert {e.policy for e in check.errors} == {"best_prompt", "selector", "random"}
    json.dumps(check.to_dict(), allow_nan=False)


def test_one_seed_one_check(selector: PromptSelector) -> None:
    table = make_log(60, seed=42)
    assert self_check(selector, table, repeats=2, seed=1) == self_check(selector, table, repeats=2, seed=1)


def test_without_complete_queries_there_is_no_truth(selector: PromptSelector) -> None:
    table = make_log(60, seed=42)
    partial = table.filter(pa.array([p != "b" for p in table["prompt_id"].to_pylist()]))
    with pytest.raises(DataError, match="run under every prompt"):
        self_check(selector, partial)
