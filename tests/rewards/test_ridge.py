"""Conjugate gradients against scikit-learn's exact ridge."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from oirl.rewards.ridge import ridge

ALPHAS = np.array([0.5, 3.0, 20.0, 200.0])


def problem(n: int, d: int, seed: int, density: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, d)) * (rng.random((n, d)) < density)).astype(np.float32)
    y = x @ rng.normal(size=(d, len(ALPHAS))) + rng.normal(size=(n, len(ALPHAS))) + 0.7
    weights = rng.integers(0, 4, (n, len(ALPHAS))).astype(float)
    return x, y, weights


def exact(x: np.ndarray, y: np.ndarray, w: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    model = Ridge(alpha=alpha, solver="cholesky").fit(x.astype(float), y, sample_weight=w)
    return model.coef_, model.intercept_


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shape", [(60, 8), (25, 70)])
def test_equals_scikit_learn(sparse: bool, shape: tuple[int, int]) -> None:
    x, y, w = problem(*shape, seed=1)
    matrix = sp.csr_matrix(x) if sparse else x
    coefficients, intercepts = ridge(matrix, y, w, ALPHAS, tolerance=1e-6, max_steps=500)
    for j, alpha in enumerate(ALPHAS):
        coef, intercept = exact(x, y[:, j], w[:, j], alpha)
        assert coefficients[:, j] == pytest.approx(coef, rel=2e-3, abs=2e-4)
        assert intercepts[j] == pytest.approx(intercept, rel=2e-3, abs=2e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_default_tolerance_predicts_nearly_the_same(seed: int) -> None:
    x, y, w = problem(50, 30, seed)
    coefficients, intercepts = ridge(x, y, w, ALPHAS)
    for j, alpha in enumerate(ALPHAS):
        coef, intercept = exact(x, y[:, j], w[:, j], alpha)
        difference = x @ (coefficients[:, j] - coef) + intercepts[j] - intercept
        assert np.abs(difference).max() < 0.02 * np.ptp(y[:, j])


def test_rows_of_weight_zero_do_not_count() -> None:
    x, y, w = problem(40, 6, seed=2)
    w[:10] = 0
    y[:10] = 1e6
    with_rows = ridge(x, y, w, ALPHAS, tolerance=1e-6, max_steps=300)
    without = ridge(x[10:], y[10:], w[10:], ALPHAS, tolerance=1e-6, max_steps=300)
    for a, b in zip(with_rows, without, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_a_weight_of_two_is_a_row_twice() -> None:
    x, y, _ = problem(30, 5, seed=3)
    weights = np.ones_like(y)
    weights[:12] = 2
    again = np.r_[np.arange(30), np.arange(12)]
    a = ridge(x, y, weights, ALPHAS, tolerance=1e-6)
    b = ridge(x[again], y[again], np.ones((42, len(ALPHAS))), ALPHAS, tolerance=1e-6)
    assert a[0] == pytest.approx(b[0], rel=1e-3, abs=1e-4)


def test_a_column_that_is_not_known_gives_zeros_and_leaves_the_others_alone() -> None:
    x, y, w = problem(40, 6, seed=4)
    alone = ridge(x, y[:, 1:], w[:, 1:], ALPHAS[1:], tolerance=1e-6, max_steps=300)
    w[:, 0] = 0
    coefficients, intercepts = ridge(x, y, w, ALPHAS, tolerance=1e-6, max_steps=300)
    assert np.abs(coefficients[:, 0]).max() == 0
    assert intercepts[0] == 0
    assert coefficients[:, 1:] == pytest.approx(alone[0], rel=1e-3, abs=1e-4)


def test_a_constant_target_is_the_intercept() -> None:
    x, y, w = problem(40, 6, seed=5)
    coefficients, intercepts = ridge(x, np.full_like(y, 0.25), w, ALPHAS)
    assert np.abs(coefficients).max() < 1e-5
    assert intercepts == pytest.approx(0.25, abs=1e-5)


def test_a_stronger_penalty_shrinks_more() -> None:
    x, y, _ = problem(60, 10, seed=6)
    same = np.repeat(y[:, :1], len(ALPHAS), axis=1)
    coefficients, _ = ridge(x, same, np.ones_like(same), ALPHAS)
    norms = np.linalg.norm(coefficients, axis=0)
    assert (np.diff(norms) < 0).all()
    assert norms[-1] > 0
