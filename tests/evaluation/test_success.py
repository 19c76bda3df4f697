"""Success of prompts: means over queries, intervals, and the degenerate case."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from oirl.evaluation.success import prompt_success
from oirl.logs.cells import Cells, make_cells
from oirl.statistics.intervals import success_interval


def cells_of(runs: list[list[int]], successes: list[list[int]]) -> Cells:
    n, k = np.array(runs), np.array(successes)
    q, p = np.nonzero(n)
    names = [[f"q{i}" for i in range(n.shape[0])], [f"p{j}" for j in range(n.shape[1])]]
    return Cells(names[0], names[0], names[1], names[1], q, p, n[q, p], k[q, p])


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 12), (12, 12), (300, 300)])
def test_where_all_queries_agree_the_interval_is_wilsons(right: int, n: int) -> None:
    rates = np.full(n, right / n)
    mean, low, high = success_interval(rates)
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert mean == right / n
    assert (low, high) == (pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6))
    assert high - low > 0


def test_where_they_do_not_it_has_the_width_of_the_standard_error() -> None:
    rates = np.r_[np.ones(60), np.zeros(40)]
    mean, low, high = success_interval(rates)
    half = 1.96 * np.sqrt(0.24 / 100)
    assert mean == pytest.approx(0.6)
    assert (low, high) == (pytest.approx(0.6 - half, abs=0.02), pytest.approx(0.6 + half, abs=0.02))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=20))
def test_the_interval_lies_in_the_unit_interval_around_the_mean(rates: list[float]) -> None:
    mean, low, high = success_interval(np.array(rates))
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1


def test_prompts_by_hand_best_first_queries_equal_whatever_their_runs() -> None:
    # p0: rates 1 and 0 over 1 and 3 runs: mean ½, not ¼. p1: one query, ⅔. p2: never run.
    found = prompt_success(cells_of([[1, 3, 0], [3, 0, 0]], [[1, 2, 0], [0, 0, 0]]))
    assert [(s.prompt_id, s.n, s.n_queries) for s in found] == [("p1", 3, 1), ("p0", 4, 2)]
    assert [s.success for s in found] == pytest.approx([2 / 3, 0.5])
    assert found[0].to_dict().keys() == {"prompt_id", "n", "n_queries", "success", "ci_low", "ci_high"}


def test_the_log_of_known_truth(log: pa.Table) -> None:
    found = {s.prompt_id: s for s in prompt_success(make_cells(log))}
    truth = {"a": 0.5, "b": 0.5, "c": 0.55}
    for name, p in truth.items():
        assert found[name].n == 600
        assert found[name].ci_low - 0.02 < p < found[name].ci_high + 0.02
    # Runs of one query of `a` agree more than those of `c`, so the same number of runs says less of it.
    width = {name: s.ci_high - s.ci_low for name, s in found.items()}
    assert width["a"] > 1.15 * width["c"]


@pytest.mark.parametrize("p", [0.02, 0.5, 0.95])
def test_small_samples_are_covered(p: float) -> None:
    """20 queries, one run each: the interval may not be so narrow that it is a false promise."""
    hits = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        _, low, high = success_interval(rng.binomial(1, p, 20).astype(float))
        hits += low <= p <= high
    assert hits / 400 > 0.9
