"""The default reward model of prompts: how each prompt differs from its own mean, strongly shrunk.

logit r(q, p) = a · g(q) + b_p + c · δ_p(q)

g(q) is how easy the query is under all prompts, δ_p(q) how much better than that prompt p does on it, both ridge
regressions on the features of the query; b_p is the prompt's own level. Their strengths α come from cross-validation.
a, b and c are fitted to *cross-fitted* g and δ: on a log where contrasts between prompts cannot be predicted, c falls
to about zero by itself, and no query changes its prompt. Unlike Prompt-OIRL's classifier on concatenated embeddings,
which spends its strength on telling easy queries from hard ones, all of δ bears on the choice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import expit

from oirl.errors import ConfigError
from oirl.logs.cells import Cells
from oirl.rewards.embedders import Matrix
from oirl.rewards.ridge import ridge

_log = logging.getLogger(__name__)
EASE_STRENGTHS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
CONTRAST_STRENGTHS = (20.0, 40.0, 80.0, 160.0, 320.0)
CONTENDER_SCALE = 0.1
"""Success below the best prompt at which a prompt's contrasts count 1/e in the choice of α: only those of prompts that
could be chosen matter."""


class ContrastScorer:
    """Ease of a query, level of a prompt, and shrunk contrasts between prompts (module docstring).

    Args:
        ease_strengths: The α of g to choose among.
        contrast_strengths: The α of δ to choose among.
    """

    name = "contrast"

    def __init__(
        self,
        ease_strengths: tuple[float, ...] = EASE_STRENGTHS,
        contrast_strengths: tuple[float, ...] = CONTRAST_STRENGTHS,
    ) -> None:
        if not ease_strengths or not contrast_strengths or min((*ease_strengths, *contrast_strengths)) <= 0:
            raise ConfigError("the strengths of contrast must be numbers above 0, at least one of each")
        self.ease_strengths = tuple(ease_strengths)
        self.contrast_strengths = tuple(contrast_strengths)

    def fit(
        self, queries: Matrix, prompts: Matrix, cells: Cells, fold: np.ndarray, seed: int
    ) -> tuple[ContrastScorer, np.ndarray]:
        """Fit to all cells; return the scorer and cross-fitted log-odds (see `PromptScorer.fit`)."""
        runs, successes = cells.matrices()
        runs, successes = runs.astype(float), successes.astype(float)
        rates = np.divide(successes, runs, out=np.zeros_like(runs), where=runs > 0)
        folds = [fold == f for f in range(int(fold.max()) + 1)]
        means = np.stack([_means(runs[~inside], successes[~inside]) for inside in folds])
        held_means = means[fold]

        ease_grid = self._cross_fit_ease(queries, rates, runs, means, folds)
        ease_error = self._ease_errors(ease_grid, rates, runs, held_means)
        best_ease = int(ease_error.sum(axis=0).argmin())
        ease = ease_grid[:, best_ease]

        contrast_grid = self._cross_fit_contrasts(queries, rates - ease[:, None], runs, means, folds)
        error = _contrast_errors(contrast_grid, rates - held_means - ease[:, None], runs, held_means)
        best_contrast = int(error.sum(axis=0).argmin())

        held_out = np.empty_like(rates)
        for inside in folds:
            # Which α and which a, b, c serve a fold is decided on the other folds' outcomes. (The other folds' own
            # contrasts were fitted to this fold among others: no outcome is ever predicted by a fit to itself.)
            j = int(error[~inside].sum(axis=0).argmin())
            weights = fit_stack(ease[~inside], contrast_grid[~inside, j], runs[~inside], successes[~inside])
            held_out[inside] = apply_stack(ease[inside], contrast_grid[inside, j], weights)

        self._stack = fit_stack(ease, contrast_grid[:, best_contrast], runs, successes)
        level = _means(runs, successes)
        self._ease, self._contrasts = self._fit_final(
            queries,
            rates,
            runs,
            level,
            ease,
            (self.ease_strengths[best_ease], self.contrast_strengths[best_contrast]),
        )
        self._prompts = _dense(prompts)
        return self, held_out

    def scores(self, queries: Matrix) -> np.ndarray:
        """Return log-odds of success under the training prompts, float (Q, P)."""
        return apply_stack(self._predict_ease(queries), self._predict_contrasts(queries), self._stack)

    def scores_for(self, queries: Matrix, prompts: Matrix) -> np.ndarray:
        """Return log-odds under unseen prompts: level and contrasts by kernel ridge over the training prompts' texts.

        With few training prompts this says little: an unlike text gets the mean of all prompts.
        """
        known, new = self._prompts, _dense(prompts)
        weights = np.linalg.solve(known @ known.T + np.eye(len(known)), known @ new.T)
        contrasts = self._predict_contrasts(queries)
        levels = self._stack[:-2]
        stack = np.r_[levels.mean() + (levels - levels.mean()) @ weights, self._stack[-2:]]
        return apply_stack(self._predict_ease(queries), contrasts @ weights, stack)

    def describe(self) -> dict[str, Any]:
        """Return name and parameters for the manifest."""
        return {
            "name": self.name,
            "ease_strengths": list(self.ease_strengths),
            "contrast_strengths": list(self.contrast_strengths),
        }

    def state(self) -> dict[str, np.ndarray]:
        """Return the learned arrays."""
        return {
            "stack": self._stack,
            "ease": self._ease[0],
            "ease_intercept": self._ease[1],
            "contrasts": self._contrasts[0],
            "contrasts_intercept": self._contrasts[1],
            "prompts": self._prompts,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> ContrastScorer:
        """Take the arrays that `state` gave."""
        self._stack, self._prompts = state["stack"], state["prompts"]
        self._ease = (state["ease"], state["ease_intercept"])
        self._contrasts = (state["contrasts"], state["contrasts_intercept"])
        return self

    def _cross_fit_ease(
        self, x: Matrix, rates: np.ndarray, runs: np.ndarray, means: np.ndarray, folds: list[np.ndarray]
    ) -> np.ndarray:
        """Return each query's ease by models of the other folds, for each α: (Q, A)."""
        alphas = np.array(self.ease_strengths)
        out = np.empty((len(rates), len(alphas)))
        for f, inside in enumerate(folds):
            target, weight = _ease_target(rates[~inside], runs[~inside], means[f])
            coefficients, intercepts = ridge(
                x[np.flatnonzero(~inside)], _tile(target, len(alphas)), _tile(weight, len(alphas)), alphas
            )
            out[inside] = x[np.flatnonzero(inside)] @ coefficients + intercepts
        return out

    def _ease_errors(self, ease: np.ndarray, rates: np.ndarray, runs: np.ndarray, held_means: np.ndarray) -> np.ndarray:
        weight = runs.sum(axis=1)
        target = (runs * (rates - held_means)).sum(axis=1) / np.maximum(weight, 1e-12)
        return weight[:, None] * (ease - target[:, None]) ** 2

    def _cross_fit_contrasts(
        self, x: Matrix, rates: np.ndarray, runs: np.ndarray, means: np.ndarray, folds: list[np.ndarray]
    ) -> np.ndarray:
        """Return each query's contrasts by models of the other folds, for each α: (Q, A, P), mean 0 over prompts."""
        count, prompts = len(self.contrast_strengths), rates.shape[1]
        alphas = np.repeat(self.contrast_strengths, prompts)
        out = np.empty((len(rates), count, prompts))
        for f, inside in enumerate(folds):
            _log.info("contrast: fold %d of %d", f + 1, len(folds))
            target = np.tile(rates[~inside] - means[f], (1, count))
            coefficients, intercepts = ridge(
                x[np.flatnonzero(~inside)], target, np.tile(runs[~inside], (1, count)), alphas
            )
            predicted = x[np.flatnonzero(inside)] @ coefficients + intercepts
            out[inside] = predicted.reshape(-1, count, prompts)
        return out - out.mean(axis=2, keepdims=True)

    def _fit_final(
        self,
        x: Matrix,
        rates: np.ndarray,
        runs: np.ndarray,
        level: np.ndarray,
        ease: np.ndarray,
        strengths: tuple[float, float],
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        target, weight = _ease_target(rates, runs, level)
        final_ease = ridge(x, target[:, None], weight[:, None], np.array(strengths[:1]))
        alphas = np.full(rates.shape[1], strengths[1])
        return final_ease, ridge(x, rates - level - ease[:, None], runs, alphas)

    def _predict_ease(self, x: Matrix) -> np.ndarray:
        return np.asarray(x @ self._ease[0] + self._ease[1])[:, 0]

    def _predict_contrasts(self, x: Matrix) -> np.ndarray:
        contrasts = np.asarray(x @ self._contrasts[0] + self._contrasts[1])
        return contrasts - contrasts.mean(axis=1, keepdims=True)


def fit_stack(
    ease: np.ndarray, contrasts: np.ndarray, runs: np.ndarray, successes: np.ndarray, steps: int = 50
) -> np.ndarray:
    """Return (b_1, …, b_P, a, c) of logit r = b_p + a · g + c · δ_p by Newton's method.

    A normal prior of standard deviation 30 keeps the fit finite where outcomes can be separated.

    Args:
        ease: Cross-fitted g, float (Q,).
        contrasts: Cross-fitted δ, float (Q, P).
        runs: (Q, P), 0 where not run.
        successes: (Q, P).
        steps: Newton steps at most.
    """
    n_queries, n_prompts = contrasts.shape
    design = np.zeros((n_queries, n_prompts, n_prompts + 2))
    design[:, np.arange(n_prompts), np.arange(n_prompts)] = 1
    design[:, :, -2] = ease[:, None]
    design[:, :, -1] = contrasts
    x, n, s = design.reshape(-1, n_prompts + 2), runs.ravel(), successes.ravel()
    weights = np.zeros(n_prompts + 2)
    prior = 1e-3
    for _ in range(steps):
        p = expit(x @ weights)
        gradient = x.T @ (s - n * p) - prior * weights
        curvature = (x * (n * p * (1 - p))[:, None]).T @ x + prior * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        weights += np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-8:
            break
    # Contrasts that point the wrong way on held-out queries are noise: they must not be turned round.
    if weights[-1] < 0:
        return np.r_[fit_stack(ease, np.zeros_like(contrasts), runs, successes, steps)[:-1], 0.0]
    return weights


def apply_stack(ease: np.ndarray, contrasts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return b_p + a · g + c · δ_p, float (Q, P)."""
    return weights[:-2] + weights[-2] * ease[:, None] + weights[-1] * contrasts


def _contrast_errors(contrasts: np.ndarray, target: np.ndarray, runs: np.ndarray, held_means: np.ndarray) -> np.ndarray:
    """Return each query's squared error of contrasts between prompts that could be chosen, for each α: (Q, A)."""
    behind = held_means.max(axis=1, keepdims=True) - held_means
    weight = runs * np.exp(-behind / CONTENDER_SCALE)
    error = target[:, None, :] - contrasts
    # What all prompts of a query share is ease, not contrast.
    centre = (weight[:, None] * error).sum(axis=2) / np.maximum(weight.sum(axis=1), 1e-12)[:, None]
    error = error - np.where(((runs > 0).sum(axis=1) > 1)[:, None], centre, 0)[:, :, None]
    return (weight[:, None] * error**2).sum(axis=2)


def _ease_target(rates: np.ndarray, runs: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = runs.sum(axis=1)
    target = (runs * (rates - means)).sum(axis=1) / np.maximum(total, 1e-12)
    return target, total / runs.shape[1]


def _means(runs: np.ndarray, successes: np.ndarray) -> np.ndarray:
    return successes.sum(axis=0) / np.maximum(runs.sum(axis=0), 1)


def _tile(column: np.ndarray, times: int) -> np.ndarray:
    return np.repeat(column[:, None], times, axis=1)


def _dense(matrix: Matrix) -> np.ndarray:
    return matrix if isinstance(matrix, np.ndarray) else matrix.toarray()
