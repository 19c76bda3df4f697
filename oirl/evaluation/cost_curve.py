"""What a selector costs on a log, and what it reaches for less: the cost-quality curve of its calibrated weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from oirl.evaluation.costs import CostPoint, choose_by_cost, cost_quality
from oirl.evaluation.valuation import complete_queries
from oirl.logs.cells import Cells
from oirl.logs.costs import cell_costs, run_costs
from oirl.statistics.intervals import MIN_QUERIES, normal_interval

_TARGETS = (0.5, 0.8)


def cost_document(
    plan: Any,
    log: pa.Table,
    cells: Cells,
    scores: np.ndarray,
    policies: Mapping[str, np.ndarray],
    groups: np.ndarray,
    prices: Mapping[str, tuple[float, float]] | None,
    *,
    best: int,
    margin: float,
) -> dict[str, Any] | None:
    """Return the section `cost` of an evaluation, None where the model or the log knows no costs of the same unit.

    Everything is replayed on the queries that were run under every prompt with a known cost; nothing is chosen on them:
    weights, single prompts and what is deployed come from the training log.

    Args:
        plan: The selector's calibrated weights (`oirl.selection.costs.CostPlan`) or None.
        log: The evaluated rows.
        cells: Their graded runs under the model's prompts.
        scores: The model's estimates, float (Q, P).
        policies: Name -> π, float (Q, P).
        groups: Group of near duplicates of each query, int (Q,).
        prices: See `oirl.logs.costs.read_prices`.
        best: Position of the best single prompt of the training log.
        margin: The selector's.
    """
    found = run_costs(log, prices)
    if plan is None or found is None or found.unit != plan.unit or not plan.points:
        return None
    costs = cell_costs(log, found.values, cells)
    runs, successes = cells.matrices()
    usable = complete_queries(runs) & np.isfinite(costs).all(axis=1)
    if len(np.unique(groups[usable])) < MIN_QUERIES:
        return None
    rates, costs, scores, groups = successes[usable] / runs[usable], costs[usable], scores[usable], groups[usable]
    means = costs.mean(axis=0)
    cheapest = int(plan.prices.argmin())
    ends = {name: (float(means[p]), float(rates[:, p].mean())) for name, p in (("best", best), ("cheapest", cheapest))}
    curve = [_point(p, scores, rates, costs, plan.prices, margin, groups) for p in plan.points]
    return {
        "unit": found.unit,
        "n_queries": int(usable.sum()),
        "prompts": [{"prompt_id": n, "cost": float(c)} for n, c in zip(cells.prompt_ids, means, strict=True)],
        "policies": {name: float((p[usable] * costs).sum(axis=1).mean()) for name, p in policies.items()},
        "cheapest_prompt": cells.prompt_ids[cheapest],
        "curve": curve,
        **cost_quality([(c["cost"], c["value"]) for c in curve], ends["best"], ends["cheapest"]),
        "calibrated": _calibrated(plan, curve, ends, best, cheapest),
    }


def _point(
    point: CostPoint,
    scores: np.ndarray,
    rates: np.ndarray,
    costs: np.ndarray,
    prices: np.ndarray,
    margin: float,
    groups: np.ndarray,
) -> dict[str, Any]:
    rows = np.arange(len(rates))
    choice = choose_by_cost(scores, prices, point.weight, point.single, margin)
    taken = choice if point.deploy else np.full(len(rates), point.single)
    values = rates[rows, taken]
    low, high = normal_interval(values, groups)
    return {
        "weight": point.weight,
        "deploy": "selector" if point.deploy else "single prompt",
        "value": float(values.mean()),
        "ci_low": float(low),
        "ci_high": float(high),
        "cost": float(costs[rows, taken].mean()),
    }


def _calibrated(
    plan: Any, curve: Sequence[dict[str, Any]], ends: Mapping[str, tuple[float, float]], best: int, cheapest: int
) -> list[dict[str, Any]]:
    """Return, for half and 80% of the gap, the thriftiest weight that reaches it on the training log, and its test."""
    (best_cost, best_value), (_, least_value) = ends["best"], ends["cheapest"]
    train_best, train_least = plan.values[best], plan.values[cheapest]
    if train_best <= train_least or best_value <= least_value or best_cost <= 0:
        return []
    found = []
    for target in _TARGETS:
        wanted = train_least + target * (train_best - train_least)
        reached = [i for i, p in enumerate(plan.points) if p.value >= wanted]
        if not reached:
            continue
        i = min(reached, key=lambda i: plan.points[i].cost)
        found.append(
            {
                "target": target,
                "weight": plan.points[i].weight,
                "training_cost": plan.points[i].cost,
                "cost": curve[i]["cost"],
                "cost_ratio": curve[i]["cost"] / best_cost,
                "value": curve[i]["value"],
                "gap_recovered": (curve[i]["value"] - least_value) / (best_value - least_value),
            }
        )
    return found
