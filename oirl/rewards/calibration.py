"""From scores to probabilities, learned on scores of queries that the scorer has not seen. Pure functions."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit


def fit_platt(scores: np.ndarray, runs: np.ndarray, successes: np.ndarray) -> tuple[float, float]:
    """Return (slope, intercept) of p = σ(slope · score + intercept) by maximum likelihood (Platt 1999).

    A unit normal prior on slope − 1 and on the intercept, worth one run, keeps the fit finite where scores separate
    the outcomes; on a log of any size it does not show.

    Args:
        scores: Log-odds, float (C,).
        runs: Int (C,).
        successes: Int (C,).
    """

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        z = theta[0] * scores + theta[1]
        value = (runs * np.logaddexp(0, z) - successes * z).sum()
        error = runs * expit(z) - successes
        centre = theta - (1.0, 0.0)
        gradient = np.array([(error * scores).sum(), error.sum()]) + centre
        return float(value + 0.5 * centre @ centre), gradient

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0.0, None), (None, None)])
    return float(found.x[0]), float(found.x[1])


def cross_fit_platt(
    scores: np.ndarray, runs: np.ndarray, successes: np.ndarray, fold: np.ndarray
) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """Return the (slope, intercept) of all scores, and for each fold that of the other folds' scores.

    Args:
        scores: Cross-fitted log-odds, float (C,).
        runs: Int (C,).
        successes: Int (C,).
        fold: Fold of each score, int (C,), from 0.
    """
    of_fold = [fit_platt(scores[o], runs[o], successes[o]) for o in (fold != f for f in range(int(fold.max()) + 1))]
    return fit_platt(scores, runs, successes), of_fold


def apply_platt(scores: np.ndarray, platt: tuple[float, float]) -> np.ndarray:
    """Return σ(slope · score + intercept)."""
    return np.asarray(expit(platt[0] * scores + platt[1]))
