"""Intervals by a bootstrap clustered by query. Pure functions of arrays and a random generator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MIN_QUERIES = 20
"""Unlike queries below which a bootstrap is too narrow to be relied upon."""
_BLOCK = 2**22
_Z = 1.959964
_BINS, _FEWEST = 10, 5
_NO_SPREAD = 1e-9  # what rounding leaves of rates that are all alike


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


def bootstrap_counts(clusters: np.ndarray, rng: np.random.Generator, draws: int) -> Iterator[np.ndarray]:
    """Yield how often each row stands in a resample of whole clusters, int64 (n,), for figures that are not means.

    Args:
        clusters: Cluster of each row, int (n,).
        rng: Source of chance.
        draws: Number of resamples.
    """
    found, which = np.unique(clusters, return_inverse=True)
    for _ in range(draws):
        yield np.bincount(rng.integers(0, len(found), len(found)), minlength=len(found))[which]


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of the central interval of bootstrap draws, each of shape (k,)."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def success_interval(rates: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float, float]:
    """Return (mean, low, high) of success rates, one per query, float (n,) in [0, 1]: a 95% interval.

    Wilson's interval (1927) for as many tries as the clustered standard error stands for, p (1 − p) / se²: it stays in
    [0, 1], and rates that are all alike, which have no spread, count as one try per cluster.
    """
    mean = float(rates.mean())
    tries = float(len(rates) if clusters is None else len(np.unique(clusters)))
    error = float(standard_error(rates, clusters))
    if error > _NO_SPREAD and 0 < mean < 1:
        tries = mean * (1 - mean) / error**2
    centre = (mean + _Z * _Z / (2 * tries)) / (1 + _Z * _Z / tries)
    half = _Z / (1 + _Z * _Z / tries) * np.sqrt(mean * (1 - mean) / tries + _Z * _Z / (4 * tries * tries))
    # Rounding must not put an end on the other side of the mean.
    return mean, min(mean, max(0.0, float(centre - half))), max(mean, min(1.0, float(centre + half)))


def paired_interval(first_only: int, second_only: int, n: int) -> tuple[float, float, float]:
    """Return (gain, low, high) of the first of two treatments over the second on the same n cases: a 95% interval.

    Bonett and Price (2012): Wald's interval for a difference of paired shares after adding one case to each kind of
    disagreement; unlike Wald's own it keeps its level with few disagreements, or none.

    Args:
        first_only: Cases in which only the first was right.
        second_only: Cases in which only the second was right.
        n: All cases, 1 or more.
    """
    first, second = (first_only + 1) / (n + 2), (second_only + 1) / (n + 2)
    half = _Z * np.sqrt((first + second - (first - second) ** 2) / (n + 2))
    gain = (first_only - second_only) / n
    return gain, max(min(first - second - half, gain), -1.0), min(max(first - second + half, gain), 1.0)


def reliability_bins(
    predicted: np.ndarray, rate: np.ndarray, runs: np.ndarray, clusters: np.ndarray
) -> list[dict[str, float]]:
    """Return predicted and observed shares in ten bins of predicted probability; bins of fewer than five are left out.

    Args:
        predicted: Float (n,) in [0, 1].
        rate: Observed share of each row, float (n,).
        runs: Runs behind each row, int (n,).
        clusters: Cluster of each row, int (n,).

    Returns:
        For each bin `predicted` and `observed` (means over rows), `ci_low`, `ci_high` and `runs`.
    """
    which = np.minimum((predicted * _BINS).astype(int), _BINS - 1)
    found = []
    for b in range(_BINS):
        inside = which == b
        if inside.sum() < _FEWEST:
            continue
        mean, low, high = success_interval(rate[inside], clusters[inside])
        shares = {"predicted": float(predicted[inside].mean()), "observed": mean, "ci_low": low, "ci_high": high}
        found.append(shares | {"runs": int(runs[inside].sum())})
    return found


def standard_error(contributions: np.ndarray, clusters: np.ndarray | None = None) -> np.ndarray:
    """Return the standard error of the means of contributions, robust to clusters (Liang and Zeger 1986).

    Deviations are added up within each cluster; G / (G − 1) corrects for G clusters.

    Args:
        contributions: Float (Q,) or (Q, k).
        clusters: Cluster of each query, int (Q,), such as its group of near duplicates; each its own when None.

    Returns:
        Float () or (k,); NaN below two clusters.
    """
    deviations = contributions - contributions.mean(axis=0)
    if clusters is not None:
        _, which = np.unique(clusters, return_inverse=True)
        sums = np.zeros((int(which.max()) + 1 if len(which) else 0, *deviations.shape[1:]))
        np.add.at(sums, which, deviations)
        deviations = sums
    count = len(deviations)
    if count < 2:
        return np.full(contributions.shape[1:], np.nan)
    return np.asarray(np.sqrt((deviations**2).sum(axis=0) * count / (count - 1)) / len(contributions))


def normal_interval(contributions: np.ndarray, clusters: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the 95% interval of the means, mean ± 1.96 standard errors; shapes as `standard_error`."""
    mean, half = contributions.mean(axis=0), _Z * standard_error(contributions, clusters)
    return np.asarray(mean - half), np.asarray(mean + half)
