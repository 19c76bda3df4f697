"""Ridge regressions of many targets and strengths at once, on sparse or dense features. Pure functions."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from oirl.rewards.embedders import Matrix


def ridge(
    features: Matrix,
    targets: np.ndarray,
    weights: np.ndarray,
    strengths: np.ndarray,
    *,
    tolerance: float = 1e-3,
    max_steps: int = 60,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise, for each column j, Σ_i w_ij (y_ij − c_j − x_i·v_j)² + α_j ‖v_j‖² by conjugate gradients.

    All columns share the products with the features, so that a grid of strengths costs little more than one; columns
    that have converged drop out. The intercept c_j is not shrunk.

    Args:
        features: X, (n, d), float32, CSR or dense.
        targets: y, (n, k).
        weights: w ≥ 0, (n, k); 0 where the target is not known.
        strengths: α > 0, (k,).
        tolerance: Residual norm, relative to that of the start, at which a column has converged.
        max_steps: Steps at most.

    Returns:
        (coefficients (d, k), intercepts (k,)), float32.
    """
    single = np.float32
    transposed = features.T.tocsr() if sp.issparse(features) else features.T
    y, w = np.asarray(targets, single), np.asarray(weights, single)
    alpha = np.asarray(strengths, single)
    total = w.sum(axis=0) + 1e-12
    # Centring the features in the products, not in the matrix, keeps a sparse matrix sparse.
    mean_x = np.asarray(transposed @ w) / total
    mean_y = (w * y).sum(axis=0) / total
    residual = w * (y - mean_y)
    residual = np.asarray(transposed @ residual) - mean_x * residual.sum(axis=0)
    solution = np.zeros_like(residual)
    direction = residual.copy()
    norm = _column_dots(residual, residual)
    stop = tolerance**2 * norm + 1e-30
    live = np.arange(residual.shape[1])
    mean_live, w_live, alpha_live = mean_x, w, alpha
    for _ in range(max_steps):
        product = w_live * (np.asarray(features @ direction) - _column_dots(mean_live, direction))
        curved = np.asarray(transposed @ product) - mean_live * product.sum(axis=0) + alpha_live * direction
        step = norm / np.maximum(_column_dots(direction, curved), 1e-30)
        solution[:, live] += step * direction
        residual -= step * curved
        new_norm = _column_dots(residual, residual)
        going = new_norm > stop[live]
        if not going.any():
            break
        direction = residual + direction * (new_norm / np.maximum(norm, 1e-30))
        norm = new_norm
        if not going.all():
            live, residual, direction, norm = live[going], residual[:, going], direction[:, going], norm[going]
            mean_live, w_live, alpha_live = mean_live[:, going], w_live[:, going], alpha_live[going]
    return solution, mean_y - _column_dots(mean_x, solution)


def _column_dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("dk,dk->k", a, b)
