"""Choosing with an eye to cost: the weights, calibrated on the training log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from oirl.errors import ConfigError
from oirl.evaluation.costs import CostPoint, cost_points
from oirl.evaluation.valuation import complete_queries
from oirl.logs.costs import cell_costs, run_costs
from oirl.rewards.training import HeldOut
from oirl.statistics.intervals import MIN_QUERIES


@dataclass(frozen=True, slots=True)
class CostPlan:
    """What prompts cost, and what each weight of cost gives on the training log, cross-fitted.

    Attributes:
        unit: "money" or "tokens".
        prices: Mean cost of a run of each prompt, float (P,).
        values: Success of each prompt on the queries behind the points, float (P,).
        points: From weight 0 on; empty where too few queries were run under every prompt.
    """

    unit: str
    prices: np.ndarray
    values: np.ndarray
    points: list[CostPoint]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary for JSON."""
        points = [p.to_dict() for p in self.points]
        return {"unit": self.unit, "prices": self.prices.tolist(), "values": self.values.tolist(), "points": points}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], prompts: int) -> CostPlan:
        """Return the plan that `to_dict` gave.

        Raises:
            ValueError: If it is not sound.
        """
        prices, values = (np.array(found[name], dtype=float) for name in ("prices", "values"))
        points = [CostPoint(**p) for p in found["points"]]
        sound = all(a.shape == (prompts,) and np.isfinite(a).all() for a in (prices, values))
        if not sound or found["unit"] not in ("money", "tokens"):
            raise ValueError("the costs do not match the prompts")
        if any(not 0 <= p.single < prompts or not np.isfinite(p.weight) or p.weight < 0 for p in points):
            raise ValueError("a weight of cost is out of range")
        return cls(str(found["unit"]), prices, values, points)

    def at_weight(self, weight: float) -> CostPoint:
        """Return the calibrated point whose weight is nearest to `weight`.

        Raises:
            ConfigError: If the weight is negative, or nothing was calibrated.
        """
        if not np.isfinite(weight) or weight < 0:
            raise ConfigError(f"cost weight {weight}: a number of 0 or more is needed")
        self._check()
        return min(self.points, key=lambda p: abs(p.weight - weight))

    def within(self, most: float) -> CostPoint:
        """Return the point of the smallest weight whose mean cost per query on the training log is at most `most`.

        Raises:
            ConfigError: If even the thriftiest costs more, or nothing was calibrated.
        """
        self._check()
        found = next((p for p in self.points if p.cost <= most), None)
        if found is None:
            least = min(p.cost for p in self.points)
            raise ConfigError(
                f"a mean cost of {most:g} ({self.unit}) cannot be kept; the least on the log is {least:g}"
            )
        return found

    def _check(self) -> None:
        if not self.points:
            raise ConfigError(
                f"costs were not calibrated: fewer than {MIN_QUERIES} queries of the training log were run under every "
                "prompt with a known cost"
            )


def learn_costs(
    log: pa.Table, held_out: HeldOut, margin: float, prices: Mapping[str, tuple[float, float]] | None
) -> CostPlan | None:
    """Return what prompts cost and what each weight gives, None where a prompt's cost is not known.

    Args:
        log: The rows that were learned from.
        held_out: Cross-fitted predictions on them.
        margin: The selector's.
        prices: See `oirl.logs.costs.read_prices`.
    """
    found = run_costs(log, prices)
    if found is None:
        return None
    cells = held_out.cells
    costs = cell_costs(log, found.values, cells)
    known = np.isfinite(costs)
    if not known.any(axis=0).all():
        return None
    mean = np.where(known, costs, 0).sum(axis=0) / known.sum(axis=0)
    runs, successes = cells.matrices()
    complete = complete_queries(runs) & known.all(axis=1)
    clusters = np.arange(len(runs)) if held_out.groups is None else held_out.groups
    points: list[CostPoint] = []
    values = np.where(runs > 0, successes / np.maximum(runs, 1), 0).sum(axis=0) / np.maximum((runs > 0).sum(axis=0), 1)
    if len(np.unique(clusters[complete])) >= MIN_QUERIES:
        rates = successes[complete] / runs[complete]
        values = rates.mean(axis=0)
        points = cost_points(held_out.probability[complete], rates, costs[complete], mean, margin, clusters[complete])
    return CostPlan(found.unit, mean, values, points)
