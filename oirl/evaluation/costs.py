"""Quality against cost: what is reached as a policy gets thriftier, and how that compares. Pure functions of arrays.

A weight λ trades success for cost: the prompt of a query is the one with the highest score − λ · cost. The best single
prompt by the same measure is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oirl.evaluation.policies import switch
from oirl.statistics.intervals import normal_interval

_STEPS = 24


@dataclass(frozen=True, slots=True)
class CostPoint:
    """One weight of cost, and what it gives.

    Attributes:
        weight: λ, success that a unit of cost is worth.
        single: Position of the best single prompt at this weight.
        deploy: Whether choosing per query is shown to beat it, by success − λ · cost: lower end of the 95% interval
            above zero, clustered.
        value: Success of what is deployed: the choice, or the single prompt.
        cost: Its mean cost per query.
        gain: Of choosing over the single prompt, by success − λ · cost.
        gain_ci_low: Lower end of its 95% interval.
        gain_ci_high: Upper end.
    """

    weight: float
    single: int
    deploy: bool
    value: float
    cost: float
    gain: float
    gain_ci_low: float
    gain_ci_high: float

    def to_dict(self) -> dict[str, Any]:
        """Return the point as a dictionary for JSON."""
        return asdict(self)


def weights_for(prices: np.ndarray) -> np.ndarray:
    """Return the weights that are tried: 0, and 24 from "cost hardly counts" to "only cost counts".

    Args:
        prices: Mean cost of each prompt, float (P,).
    """
    spread = float(prices.max() - prices.min())
    if spread <= 0:
        return np.zeros(1)
    return np.r_[0.0, np.geomspace(0.003, 3.0, _STEPS) / spread]


def choose_by_cost(scores: np.ndarray, prices: np.ndarray, weight: float, single: int, margin: float) -> np.ndarray:
    """Return the prompt with the highest score − λ · cost, `single` unless another is ahead by the margin, int (Q,)."""
    return switch(scores - weight * prices, single, margin)


def cost_points(
    scores: np.ndarray,
    rates: np.ndarray,
    costs: np.ndarray,
    prices: np.ndarray,
    margin: float,
    clusters: np.ndarray,
) -> list[CostPoint]:
    """Return what each weight gives on queries that were run under every prompt.

    Args:
        scores: Estimated success by models that have not seen these queries, float (Q, P).
        rates: Mean success over runs, float (Q, P).
        costs: What the runs cost, float (Q, P).
        prices: Cost that is expected of each prompt, known before a query is asked, float (P,).
        margin: As for the selector.
        clusters: Group of near duplicates of each query, int (Q,).
    """
    found = []
    rows = np.arange(len(rates))
    for weight in weights_for(prices):
        single = int((rates.mean(axis=0) - weight * prices).argmax())
        choice = choose_by_cost(scores, prices, float(weight), single, margin)
        utility = rates - weight * costs
        gain = utility[rows, choice] - utility[:, single]
        low, high = normal_interval(gain, clusters)
        deploy = bool(low > 0)
        taken = choice if deploy else np.full(len(rates), single)
        found.append(
            CostPoint(
                float(weight),
                single,
                deploy,
                float(rates[rows, taken].mean()),
                float(costs[rows, taken].mean()),
                float(gain.mean()),
                float(low),
                float(high),
            )
        )
    return found


def cost_quality(
    points: Sequence[tuple[float, float]], best: tuple[float, float], cheapest: tuple[float, float]
) -> dict[str, float | None]:
    """Return how well points of (cost, value) fill the gap between the cheapest prompt and the best one.

    The gap recovered by a point is (value − cheapest) / (best − cheapest), its cost share the same of costs; of two
    actions, the cost share is the share of calls to the dear one (RouteLLM, 2406.18665).

    Args:
        points: (cost, value) of policies, from thrifty to lavish or in any order.
        best: (cost, value) of the best single prompt.
        cheapest: The same of the cheapest prompt.

    Returns:
        area: Area under the gap recovered over cost shares from 0 to 1 (APGR): .5 is what mixing the two at random has.
        cost_for_50, cost_for_80: Smallest cost share that recovers half and 80% of the gap; None if none does.
        perf_gain: Highest value over that of the best single prompt, less 1 (LLMRouterBench, 2601.07206).
        cost_save: 1 less the smallest cost at the best single prompt's value or more, over its cost.
        All None where the cheapest prompt is as good as the best one.
    """
    names = ("area", "cost_for_50", "cost_for_80", "perf_gain", "cost_save")
    span_cost, span_value = best[0] - cheapest[0], best[1] - cheapest[1]
    if span_cost <= 0 or span_value <= 0:
        return dict.fromkeys(names)
    every = [cheapest, best, *points]
    share = np.array([(c - cheapest[0]) / span_cost for c, _ in every])
    recovered = np.array([(v - cheapest[1]) / span_value for _, v in every])
    order = np.lexsort((recovered, share))
    x, y = share[order], np.maximum.accumulate(recovered[order])
    grid = np.linspace(0, 1, 1001)
    # At a share between two points their mixture is reached.
    filled = np.interp(grid, x, y)
    enough = [c for c, v in every if v >= best[1]]
    return {
        "area": float((filled[1:] + filled[:-1]).sum() / 2 * (grid[1] - grid[0])),
        "cost_for_50": _smallest(grid, filled, 0.5),
        "cost_for_80": _smallest(grid, filled, 0.8),
        "perf_gain": float(max(v for _, v in every) / best[1] - 1) if best[1] > 0 else None,
        "cost_save": float(1 - min(enough) / best[0]) if best[0] > 0 else None,
    }


def _smallest(share: np.ndarray, recovered: np.ndarray, target: float) -> float | None:
    reached = share[recovered >= target]
    return float(reached[0]) if len(reached) else None
