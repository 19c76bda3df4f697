"""How good each prompt is on a log, with an interval clustered by query."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oirl.logs.cells import Cells
from oirl.statistics.intervals import success_interval


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


def prompt_success(cells: Cells, clusters: np.ndarray | None = None) -> list[PromptSuccess]:
    """Return the success of each prompt, best first.

    Args:
        cells: Graded runs; prompts need not have been run on all queries.
        clusters: Cluster of each query, int (Q,); each query its own when None.
    """
    found = []
    for p, name in enumerate(cells.prompt_ids):
        mine = cells.prompt_index == p
        if not mine.any():
            continue
        rates = cells.rate[mine]
        own = None if clusters is None else clusters[cells.query_index[mine]]
        mean, low, high = success_interval(rates, own)
        found.append(PromptSuccess(name, int(cells.runs[mine].sum()), len(rates), mean, low, high))
    return sorted(found, key=lambda s: -s.success)
