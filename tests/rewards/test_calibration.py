"""Platt scaling: known truth, and what may not happen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from oirl.rewards.calibration import apply_platt, fit_platt


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, 0.3), (1.0, 0.0), (2.0, -1.0)])
def test_recovers_slope_and_intercept(slope: float, intercept: float) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=20_000)
    runs = rng.integers(1, 4, len(scores))
    successes = rng.binomial(runs, expit(slope * scores + intercept))
    assert fit_platt(scores, runs, successes) == pytest.approx((slope, intercept), abs=0.06)


def test_counts_weigh_like_rows() -> None:
    scores, runs, successes = np.array([-1.0, 0.2, 1.5]), np.array([4, 6, 5]), np.array([1, 4, 3])
    rows = np.repeat(scores, runs)
    outcomes = np.r_[[1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    by_rows = fit_platt(rows, np.ones(15, dtype=int), outcomes)
    assert fit_platt(scores, runs, successes) == pytest.approx(by_rows, abs=1e-4)


def test_is_the_maximum_of_the_documented_objective() -> None:
    rng = np.random.default_rng(1)
    scores, runs = rng.normal(size=80), np.full(80, 2)
    successes = rng.binomial(runs, expit(0.8 * scores))

    def objective(slope: float, intercept: float) -> float:
        p = apply_platt(scores, (slope, intercept))
        likelihood = (successes * np.log(p) + (runs - successes) * np.log(1 - p)).sum()
        return likelihood - 0.5 * ((slope - 1) ** 2 + intercept**2)

    slope, intercept = fit_platt(scores, runs, successes)
    top = objective(slope, intercept)
    for step in (-0.01, 0.01):
        assert objective(slope + step, intercept) < top
        assert objective(slope, intercept + step) < top


def test_misleading_scores_get_slope_zero_not_a_negative_one() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=2000)
    runs = np.ones(2000, dtype=int)
    slope, intercept = fit_platt(scores, runs, rng.binomial(1, expit(-2 * scores)))
    assert slope == 0
    assert np.isfinite(intercept)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 100), st.integers(0, 999), st.sampled_from(["separable", "right", "wrong"]))
def test_stays_finite_where_scores_separate(n: int, scale: float, seed: int, kind: str) -> None:
    scores = np.random.default_rng(seed).normal(size=n) * scale
    runs = np.full(n, 3)
    successes = {"separable": 3 * (scores > 0), "right": runs, "wrong": 0 * runs}[kind].astype(int)
    slope, intercept = fit_platt(scores, runs, successes)
    assert slope >= 0
    assert np.isfinite([slope, intercept]).all()
    probability = apply_platt(scores, (slope, intercept))
    assert ((probability >= 0) & (probability <= 1)).all()
