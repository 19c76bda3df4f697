"""How good each prompt is on a log, with an interval clustered by query."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oirl.evaluation.intervals import bootstrap_means, percentile_interval
from oirl.logs.cells import Cells


@dataclass(frozen=True, slots=True)
class PromptSuccess:
    """Success of one prompt: the mean over queries of the mean over runs.

    Attributes:
        prompt_id: The prompt.
        n: Graded runs.
        n_queries: Queries among them.
        success: Share of right runs.
        ci_low: Lower end of the 95% interval.
        ci_high: Upper end.
    """

    prompt_id: str
    n: int
    n_queries: int
    success: float
    ci_low: float
    ci_high: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary for JSON."""
        return asdict(self)


def prompt_success(
    cells: Cells, rng: np.random.Generator, draws: int = 2000, clusters: np.ndarray | None = None
) -> list[PromptSuccess]:
    """Return the success of each prompt, best first.

    Args:
        cells: Graded runs; prompts need not have been run on all queries.
        rng: Source of chance for the bootstrap.
        draws: Number of bootstrap resamples.
        clusters: Cluster of each query, int (Q,); each query its own when None.
    """
    found = []
    for p, name in enumerate(cells.prompt_ids):
        mine = cells.prompt_index == p
        if not mine.any():
            continue
        rates = cells.rate[mine]
        own = None if clusters is None else clusters[cells.query_index[mine]]
        mean, low, high = success_interval(rates, rng, draws, own)
        found.append(PromptSuccess(name, int(cells.runs[mine].sum()), len(rates), mean, low, high))
    return sorted(found, key=lambda s: -s.success)


def success_interval(
    rates: np.ndarray, rng: np.random.Generator, draws: int = 2000, clusters: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Return (mean, low, high) of success rates, one per query, float (n,) in [0, 1]: a 95% interval.

    A bootstrap of rates that are all alike has no width and would claim certainty; there the interval is Wilson's
    (1927), with the clusters as tries.
    """
    mean = float(rates.mean())
    if np.ptp(rates) == 0:
        low, high = _wilson(mean, len(rates) if clusters is None else len(np.unique(clusters)))
        return mean, low, high
    ends = percentile_interval(bootstrap_means(rates[:, None], rng, draws, clusters))
    return mean, float(ends[0][0]), float(ends[1][0])


def _wilson(p: float, n: int) -> tuple[float, float]:
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
