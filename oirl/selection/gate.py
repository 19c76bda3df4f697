"""The gate: does choosing per query beat the best single prompt, by the training log alone?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oirl.evaluation.policies import replay, switch
from oirl.rewards.training import HeldOut
from oirl.statistics.intervals import MIN_QUERIES, bootstrap_means, percentile_interval

DEFAULT_MARGIN = 0.01
MARGINS = (DEFAULT_MARGIN, 0.0, 0.02, 0.05, 0.1)
"""Estimated gains from which a switch may pay. The first is taken unless another is clearly better on the log."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What the gate decided.

    Attributes:
        policy: "selector" or "best_prompt".
        reason: Why, in words with the figures.
        best_prompt: The best single prompt of the training log.
        margin: Smallest estimated gain for which the selector leaves `best_prompt`.
        gain: Cross-fitted gain of the selector over the best single prompt on the training log; None if not known.
        gain_ci_low: Lower end of its 95% interval, clustered by groups of near duplicates.
        gain_ci_high: Upper end.
        n_queries: Queries behind the gain: those that were run under every prompt.
    """

    policy: str
    reason: str
    best_prompt: str
    margin: float
    gain: float | None = None
    gain_ci_low: float | None = None
    gain_ci_high: float | None = None
    n_queries: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as a dictionary for JSON."""
        return asdict(self)


def decide(
    held_out: HeldOut,
    best: int,
    rng: np.random.Generator,
    margins: Sequence[float] = MARGINS,
    draws: int = 2000,
) -> Deployment:
    """Decide whether the selector is deployed, and with which margin.

    A query's scores come from models that have seen neither it nor a near duplicate, and the margin of each fold is
    chosen on the other folds. The best single prompt is that of the whole log: chosen on these very queries, its
    success is rather over- than understated, which makes the gate the stricter. The selector passes if the lower end
    of the 95% interval of its gain, clustered by groups of near duplicates, is above zero.

    Args:
        held_out: Cross-fitted predictions on the training log.
        best: Position of the best single prompt of the whole training log.
        rng: Source of chance for the bootstrap.
        margins: The margins to choose among.
        draws: Number of bootstrap resamples.
    """
    cells = held_out.cells
    name = cells.prompt_ids[best]
    runs, successes = cells.matrices()
    full = np.all(runs > 0, axis=1)
    fold = held_out.fold[full]
    clusters = np.arange(len(full)) if held_out.groups is None else held_out.groups
    if len(np.unique(clusters[full])) < MIN_QUERIES or len(np.unique(fold)) < 2:
        reason = (
            f"only {int(full.sum())} of {len(full)} queries were run under every prompt, and {MIN_QUERIES} unlike ones "
            "are needed to measure the gain of choosing"
        )
        return Deployment("best_prompt", reason, name, margins[0], n_queries=int(full.sum()))
    rates = successes[full] / runs[full]
    scores = held_out.probability[full]
    gains, switched = cross_fitted_gains(scores, rates, fold, best, margins)
    low, high = percentile_interval(bootstrap_means(gains[:, None], rng, draws, clusters[full]))
    margin = best_margin(scores, rates, best, margins)
    figures = (
        f"{100 * gains.mean():+.2f} points (95% interval {100 * low[0]:+.2f} to {100 * high[0]:+.2f}, "
        f"{len(gains):,} queries)"
    )
    passed = bool(low[0] > 0)
    if passed:
        reason = f"choosing per query beat the best single prompt {name} by {figures}, cross-fitted on the training log"
    elif not switched.any():
        reason = f"no query was predicted to gain enough from another prompt than {name}, the best single one"
    else:
        reason = (
            f"the cross-fitted gain of choosing per query over the best single prompt {name} is {figures}: "
            "not shown to be above zero"
        )
    return Deployment(
        "selector" if passed else "best_prompt",
        reason,
        name,
        margin,
        float(gains.mean()),
        float(low[0]),
        float(high[0]),
        len(gains),
    )


def cross_fitted_gains(
    scores: np.ndarray, rates: np.ndarray, fold: np.ndarray, best: int, margins: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return each query's gain over the prompt `best`, with the margin chosen on the other folds.

    Args:
        scores: Cross-fitted estimates of success, float (Q, P).
        rates: Mean success over runs, float (Q, P).
        fold: Fold of each query, int (Q,).
        best: Position of the best single prompt.
        margins: The margins to choose among.

    Returns:
        (gain, float (Q,); whether the query was switched, bool (Q,)).
    """
    choice = np.full(len(rates), best)
    for f in np.unique(fold):
        inside = fold == f
        choice[inside] = switch(scores[inside], best, best_margin(scores[~inside], rates[~inside], best, margins))
    return replay(rates, choice) - rates[:, best], choice != best


def best_margin(scores: np.ndarray, rates: np.ndarray, best: int, margins: Sequence[float]) -> float:
    """Return the first margin, unless another is better by more than two standard errors of the paired difference.

    Of margins that differ by less than chance the data cannot tell the best; picking the highest would be picking luck.

    Args:
        scores: Cross-fitted estimates of success, float (Q, P).
        rates: Mean success over runs, float (Q, P).
        best: Position of the best single prompt.
        margins: The margins, the default first.
    """
    chosen, value = margins[0], replay(rates, switch(scores, best, margins[0]))
    for margin in margins[1:]:
        other = replay(rates, switch(scores, best, margin))
        difference = other - value
        if difference.mean() > 2 * difference.std() / np.sqrt(len(difference)):
            chosen, value = margin, other
    return float(chosen)
