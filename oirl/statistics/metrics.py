"""Metrics of predicted probabilities against counted outcomes. Pure functions of arrays.

Outcomes are given as cells: `runs` tries of which `successes` were right, both int (C,). A cell with one run is a
single row of a log; a cell with more counts as that many rows.
"""

from __future__ import annotations

import numpy as np


def auc(score: np.ndarray, runs: np.ndarray, successes: np.ndarray) -> float:
    """Return the area under the ROC curve: P(score of a right run > of a wrong run) + ½ P(equal).

    Args:
        score: Float (C,), any scale.
        runs: Int (C,).
        successes: Int (C,).

    Returns:
        A value in [0, 1]; NaN if all runs are right or all are wrong.
    """
    distinct, inverse = np.unique(score, return_inverse=True)
    right = np.bincount(inverse, weights=successes, minlength=len(distinct))
    wrong = np.bincount(inverse, weights=runs - successes, minlength=len(distinct))
    pairs = right.sum() * wrong.sum()
    if pairs == 0:
        return float("nan")
    below = np.cumsum(wrong) - wrong
    return float((right * (below + 0.5 * wrong)).sum() / pairs)


def auc_within(score: np.ndarray, runs: np.ndarray, successes: np.ndarray, group: np.ndarray) -> float:
    """Return the share of (right, wrong) pairs of runs *of one group* that the score puts in order, ties ½.

    With the prompt as group it says whether the score tells queries apart, with the query as group whether it tells
    prompts apart: only the latter can help a choice per query.

    Args:
        score: Float (C,).
        runs: Int (C,).
        successes: Int (C,).
        group: Int (C,).

    Returns:
        A value in [0, 1] over the pairs of all groups together; NaN if no group has both outcomes.
    """
    ordered, pairs = pairs_within(score, runs, successes, group).sum(axis=0)
    return float(ordered / pairs) if pairs else float("nan")


def pairs_within(score: np.ndarray, runs: np.ndarray, successes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return for each group its (right, wrong) pairs in order, ties ½, and all its pairs, float (G, 2), groups sorted.

    Arguments as for `auc_within`, which is the ratio of the two sums.
    """
    order = np.lexsort((score, group))
    g, s = group[order], score[order]
    right = successes[order].astype(float)
    wrong = (runs - successes)[order].astype(float)
    new_group = np.r_[True, g[1:] != g[:-1]]
    tie = np.cumsum(np.r_[True, (g[1:] != g[:-1]) | (s[1:] != s[:-1])]) - 1
    wrong_of_tie = np.bincount(tie, weights=wrong)
    group_of_row = np.cumsum(new_group) - 1
    before_group = (np.cumsum(wrong) - wrong)[new_group][group_of_row]
    first_of_tie = np.r_[True, tie[1:] != tie[:-1]]
    below = (np.cumsum(wrong) - wrong)[first_of_tie][tie] - before_group
    ordered = np.bincount(group_of_row, weights=right * (below + 0.5 * wrong_of_tie[tie]))
    pairs = np.bincount(group_of_row, weights=right) * np.bincount(group_of_row, weights=wrong)
    return np.stack([ordered, pairs], axis=1)


def brier(probability: np.ndarray, runs: np.ndarray, successes: np.ndarray) -> float:
    """Return the mean squared difference of probability and outcome over runs (Brier 1950)."""
    wrong = runs - successes
    return float((successes * (1 - probability) ** 2 + wrong * probability**2).sum() / runs.sum())


def log_loss(probability: np.ndarray, runs: np.ndarray, successes: np.ndarray) -> float:
    """Return the mean negative log-likelihood over runs, in nats; probabilities are cut at 1e-7 from 0 and 1."""
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return float(-(successes * np.log(p) + (runs - successes) * np.log1p(-p)).sum() / runs.sum())


def ece(probability: np.ndarray, runs: np.ndarray, successes: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error: Σ_b (n_b / n) |mean outcome − mean probability| (Guo et al. 2017).

    Args:
        probability: Float (C,) in [0, 1].
        runs: Int (C,).
        successes: Int (C,).
        bins: Number of bins of equal width.
    """
    which = np.minimum((probability * bins).astype(int), bins - 1)
    n = np.bincount(which, weights=runs, minlength=bins)
    gap = np.bincount(which, weights=successes - probability * runs, minlength=bins)
    return float(np.abs(gap).sum() / n.sum())


def known(found: dict[str, float]) -> dict[str, float | None]:
    """Return metrics with None where one is not defined (NaN)."""
    return {name: None if np.isnan(value) else float(value) for name, value in found.items()}


def skill(loss: float, reference: float) -> float:
    """Return 1 − loss / reference: 0 = no better than the reference, 1 = perfect; NaN for a perfect reference."""
    return 1 - loss / reference if reference > 0 else float("nan")
