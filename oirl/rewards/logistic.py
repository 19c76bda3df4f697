"""Penalised logistic regression of rows, and of differences of rows (Bradley-Terry). Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize
from scipy.special import expit

from oirl.rewards.embedders import Matrix

_PULL = 1e-3
_PRECISION = 1e-4  # of the gradient, relative to that at the start


def fit_logistic(rows: Matrix, share: np.ndarray, weight: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Return (w, b) that minimise Σ_i n_i [log(1 + e^z_i) − y_i z_i] + α/2 ‖w‖², with z = x·w + b.

    Args:
        rows: X, (n, d).
        share: y, float (n,) in [0, 1].
        weight: n_i, float (n,).
        strength: α.
    """
    across = _Products(rows)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = theta[:-1], theta[-1]
        z = across.forward(w) + b
        error = weight * (expit(z) - share)
        # A faint pull on the intercept keeps it finite where all rows are right or all are wrong.
        value = (weight * (np.logaddexp(0, z) - share * z)).sum() + 0.5 * (strength * w @ w + _PULL * b * b)
        return float(value), np.r_[across.back(error) + strength * w, error.sum() + _PULL * b]

    def curvature(theta: np.ndarray, step: np.ndarray) -> np.ndarray:
        p = expit(across.forward(theta[:-1]) + theta[-1])
        along = weight * p * (1 - p) * (across.forward(step[:-1]) + step[-1])
        return np.r_[across.back(along) + strength * step[:-1], along.sum() + _PULL * step[-1]]

    found = _minimise(loss, curvature, rows.shape[1] + 1)
    return found[:-1].astype(np.float32), float(found[-1])


def fit_differences(differences: Matrix, margin: np.ndarray | None, strength: float) -> np.ndarray:
    """Return w that minimises Σ_i −log σ(x_i·w − m_i) + α/2 ‖w‖²: Bradley-Terry on rows x = x₊ − x₋, float32 (d,)."""
    across = _Products(differences)
    ahead = 0.0 if margin is None else margin

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = across.forward(w) - ahead
        value = np.logaddexp(0, -z).sum() + 0.5 * strength * w @ w
        return float(value), across.back(-expit(-z)) + strength * w

    def curvature(w: np.ndarray, step: np.ndarray) -> np.ndarray:
        p = expit(across.forward(w) - ahead)
        return across.back(p * (1 - p) * across.forward(step)) + strength * step

    return _minimise(loss, curvature, differences.shape[1]).astype(np.float32)


class _Products:
    """Products with a matrix and with its transpose, which is laid out once."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._transposed = matrix.T.tocsr() if sp.issparse(matrix) else matrix.T

    def forward(self, w: np.ndarray) -> np.ndarray:
        return np.asarray(self._matrix @ w.astype(np.float32), dtype=np.float64).ravel()

    def back(self, error: np.ndarray) -> np.ndarray:
        return np.asarray(self._transposed @ error.astype(np.float32), dtype=np.float64).ravel()


def _minimise(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]],
    curvature: Callable[[np.ndarray, np.ndarray], np.ndarray],
    size: int,
) -> np.ndarray:
    """Minimise a smooth convex function by Newton's method with conjugate gradients in a trust region."""
    start = np.zeros(size)
    tolerance = _PRECISION * float(np.linalg.norm(loss(start)[1]))
    options = {"gtol": max(tolerance, 1e-9), "maxiter": 200}
    return np.asarray(minimize(loss, start, jac=True, hessp=curvature, method="trust-ncg", options=options).x)
