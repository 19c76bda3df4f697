"""What a log can tell apart: comparisons of prompts, and the gain that it could detect. Pure functions of arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr

from oirl.statistics.intervals import standard_error

_Z_BOTH = 1.959964 + 0.841621  # two-sided 5%, power 80%
_ONE_POINT = 0.01
_MOST_PROMPTS = 30
_NO_SPREAD = 1e-9  # what rounding leaves of differences that are all alike
_FEW = 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two prompts on the queries that were run under both.

    Attributes:
        first: The better prompt of the two on these queries.
        second: The other.
        difference: Success of the first less that of the second, paired by query.
        standard_error: Of the difference, clustered.
        n_queries: Queries that both were run on.
        p_value: Two-sided, of Student's t over the clusters, for no difference.
        told_apart: Whether the difference is shown at 5%, all comparisons taken together (Holm 1979).
    """

    first: str
    second: str
    difference: float
    standard_error: float
    n_queries: int
    p_value: float
    told_apart: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as a dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Power:
    """How small a gain a log of this size can show.

    Attributes:
        n_queries: Queries that were run under both of the two best prompts.
        smallest_detectable_gain: Gain of one policy over another that would be found with 80% power at 5%, two-sided,
            if they differed on every query as the two best prompts do; None if not known.
        queries_for_one_point: Queries needed to find a gain of one point.
        more_queries: How many more than there are, at least 0.
    """

    n_queries: int
    smallest_detectable_gain: float | None
    queries_for_one_point: int | None
    more_queries: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary for JSON."""
        return asdict(self)


def compare_prompts(
    names: list[str], runs: np.ndarray, rates: np.ndarray, clusters: np.ndarray, best: int
) -> list[Comparison]:
    """Compare prompts pairwise, or of more than 30 each with the best one.

    Args:
        names: Of the prompts, length P.
        runs: Int (Q, P); 0 where a prompt was not run.
        rates: Mean success over runs, float (Q, P), anything where there are none.
        clusters: Group of near duplicates of each query, int (Q,).
        best: Position of the best prompt.

    Returns:
        The comparisons with at least two shared clusters, the least sure first.
    """
    prompts = range(len(names))
    pairs = [(i, j) for i in prompts for j in prompts if i < j and (len(names) <= _MOST_PROMPTS or best in (i, j))]
    found = []
    for i, j in pairs:
        shared = (runs[:, i] > 0) & (runs[:, j] > 0)
        difference = rates[shared, i] - rates[shared, j]
        error = float(standard_error(difference, clusters[shared])) if shared.sum() > 1 else float("nan")
        if not np.isfinite(error):
            continue
        mean = float(difference.mean())
        p = _p_value(mean, error, len(np.unique(clusters[shared])))
        first, second = (i, j) if mean >= 0 else (j, i)
        found.append((p, names[first], names[second], abs(mean), error, int(shared.sum())))
    found.sort()
    told: list[Comparison] = []
    rejecting = True
    for place, (p, first_name, second_name, mean, error, n) in enumerate(found):
        rejecting = rejecting and p <= 0.05 / (len(found) - place)
        told.append(Comparison(first_name, second_name, mean, error, n, p, rejecting))
    return told[::-1]


def _p_value(mean: float, error: float, groups: int) -> float:
    """Return the two-sided p-value of Student's t for a mean of `groups` clusters.

    It is never below 2 / 2^groups, that of clusters which all differ the same way: rates without spread are no proof.
    """
    if abs(mean) <= _NO_SPREAD:
        return 1.0
    found = 2 * float(stdtr(groups - 1, -abs(mean) / error)) if error > _NO_SPREAD else 0.0
    return max(found, 2.0 ** (1 - min(groups, 1000)))


def power_of(runs: np.ndarray, rates: np.ndarray, clusters: np.ndarray, best: int) -> Power:
    """Return how small a gain could be found, by the paired difference of the best prompt and the runner-up.

    A policy that switches on some queries only differs less from the best prompt, so that smaller gains of it can be
    found; the figure is on the safe side.

    Args:
        runs: Int (Q, P).
        rates: Float (Q, P).
        clusters: Int (Q,).
        best: Position of the best prompt.
    """
    means = np.where(runs > 0, rates, 0).sum(axis=0) / np.maximum((runs > 0).sum(axis=0), 1)
    means[best] = -1
    shared_with = ((runs > 0) & (runs[:, [best]] > 0)).sum(axis=0)
    means[shared_with < _FEW] = -1
    second = int(means.argmax())
    shared = (runs[:, best] > 0) & (runs[:, second] > 0)
    n = int(shared.sum())
    if means[second] < 0 or n < _FEW:
        return Power(n, None, None, None)
    error = float(standard_error(rates[shared, best] - rates[shared, second], clusters[shared]))
    if not np.isfinite(error) or error <= _NO_SPREAD:
        return Power(n, None, None, None)
    smallest = _Z_BOTH * error
    needed = int(np.ceil(n * (smallest / _ONE_POINT) ** 2))
    return Power(n, smallest, needed, max(0, needed - n))
