"""Intervals by a bootstrap clustered by query. Pure functions of arrays and a random generator."""

from __future__ import annotations

import numpy as np

MIN_QUERIES = 20
"""Unlike queries below which a bootstrap is too narrow to be relied upon."""
_BLOCK = 2**22


def bootstrap_means(
    values: np.ndarray, rng: np.random.Generator, draws: int = 2000, clusters: np.ndarray | None = None
) -> np.ndarray:
    """Return the means of `draws` resamples of whole clusters; the columns are resampled together, so they stay paired.

    Args:
        values: Float (n, k): one row per query, one column per quantity.
        rng: Source of chance.
        draws: Number of resamples.
        clusters: Cluster of each row, int (n,), such as its group of near duplicates; each row its own when None.

    Returns:
        Float (draws, k).
    """
    if clusters is None:
        sums, sizes = values, np.ones(len(values))
    else:
        found, which = np.unique(clusters, return_inverse=True)
        sizes = np.bincount(which).astype(float)
        sums = np.zeros((len(found), values.shape[1]))
        np.add.at(sums, which, values)
    n = len(sums)
    out = np.empty((draws, values.shape[1]))
    step = max(1, _BLOCK // max(n, 1))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        picks = rng.integers(0, n, (size, n))
        picks += np.arange(size)[:, None] * n
        counts = np.bincount(picks.ravel(), minlength=size * n).reshape(size, n)
        out[start : start + size] = counts @ sums / (counts @ sizes)[:, None]
    return out


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of the central interval of bootstrap draws, each of shape (k,)."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high
