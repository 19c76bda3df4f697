"""How much the best choice of a prompt per query could reach, luck left out. Pure functions of arrays.

θ(x, a) is the chance that prompt a is right on query x, the ceiling is E max_a θ(x, a). Two figures miss it: the best
run in hindsight (`one_draw_oracle`) counts luck as merit; choosing by some runs of a query and scoring on others counts
no luck, but chooses by few runs, so that it stays below. The estimate here is the latter, plus what a normal model of
θ, with covariances freed from the noise of the runs, expects many more runs to add.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from oirl.statistics.intervals import MIN_QUERIES, bootstrap_means, standard_error, success_interval

_FOLDS, _HELD_OUT_DRAWS, _BOOTSTRAP, _NORMALS = 5, 100, 200, 4000
_METHOD = (
    "chosen by all runs of a query but one, scored on the run left out ({held_out:.3f}), and extrapolated to many runs"
)
_BOUNDS = (
    "bounds only: too few queries were run at least twice under every prompt to tell luck from merit; it lies between "
    "the best single prompt and one run of every prompt in hindsight, each with its sampling error"
)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the best choice per query could reach.

    Attributes:
        value: The estimate; None where runs were not repeated, so that only bounds are known.
        ci_low: Lower end of its 95% interval, or the lower bound.
        ci_high: Upper end, or the upper bound.
        gain: The estimate less the success of the best single prompt.
        gain_ci_low: Lower end of its 95% interval, paired; 0 where there are bounds only.
        gain_ci_high: Upper end.
        best_prompt: Success of the best single prompt on the same queries.
        one_draw_oracle: How often one run of every prompt holds a right one: no ceiling, as luck is in it.
        held_out: Value of choosing by all runs but one, scored on the run left out; None without repeated runs.
        n_queries: Queries behind the figures.
        method: How the value came about, in words.
    """

    value: float | None
    ci_low: float | None
    ci_high: float | None
    gain: float | None
    gain_ci_low: float | None
    gain_ci_high: float | None
    best_prompt: float | None
    one_draw_oracle: float | None
    held_out: float | None
    n_queries: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary for JSON."""
        return asdict(self)


def one_draw_oracle(runs: np.ndarray, successes: np.ndarray) -> float:
    """Return the mean of 1 − Π_p (1 − k_p / n_p): how often one run of every prompt holds a right one.

    It is what "the best prompt in hindsight" reaches, luck included, so it is no ceiling of any policy.

    Args:
        runs: Int (Q, P), all at least 1.
        successes: Int (Q, P).
    """
    return float((1 - np.prod(1 - successes / runs, axis=1)).mean())


def best_choice_ceiling(
    runs: np.ndarray, successes: np.ndarray, rng: np.random.Generator, clusters: np.ndarray | None = None
) -> Ceiling:
    """Estimate the value of the best choice per query, with an interval.

    Uses the queries that were run at least twice under every prompt, if there are at least 20 unlike ones; else it
    gives bounds from those that were run under every prompt.

    Args:
        runs: Int (Q, P); 0 where a prompt was not run.
        successes: Int (Q, P).
        rng: For the runs that are left out and for the bootstrap.
        clusters: Group of near duplicates of each query, int (Q,); each query its own when None.
    """
    groups = np.arange(len(runs)) if clusters is None else clusters
    complete, repeated = (runs > 0).all(axis=1), (runs > 1).all(axis=1)
    if runs.shape[1] < 2 or len(np.unique(groups[repeated])) < MIN_QUERIES:
        return _bounds(runs[complete], successes[complete], groups[complete])
    n, k, own = runs[repeated], successes[repeated], groups[repeated]
    shrinkage = _shrinkage(n, k)
    held_out = _held_out_values(n, k, own, rng, shrinkage)
    oracle, best = one_draw_oracle(n, k), float((k / n).mean(axis=0).max())
    normals = rng.standard_normal((_NORMALS, n.shape[1]))
    columns = np.hstack([held_out[:, None], _moments(n, k)])
    seen = _harmonic_mean(n - 1)
    value = _extrapolate(columns.mean(axis=0), seen, normals, shrinkage)
    resampled = bootstrap_means(columns, rng, _BOOTSTRAP, own)
    draws = [_extrapolate(row, seen, normals, shrinkage) for row in resampled]
    # A maximum is convex: draws lie as far above the estimate as the estimate lies above the truth.
    estimate = min(max(2 * value - float(np.mean(draws)), best, float(held_out.mean())), max(oracle, best))
    at = int((k / n).mean(axis=0).argmax())
    extra = (estimate - float(held_out.mean())) / 2
    low, high = _interval(value, np.array(draws), resampled[:, 0], extra)
    # What one run of every prompt holds is more than any choice reaches, but it is itself known from a sample.
    most = success_interval(1 - np.prod(1 - k / n, axis=1), own)[2]
    over = resampled[:, 1 + at]
    gain = _interval(value - best, np.array(draws) - over, resampled[:, 0] - over, extra)
    return Ceiling(
        value=estimate,
        ci_low=max(0.0, min(low, estimate)),
        ci_high=max(estimate, min(high, most)),
        gain=estimate - best,
        gain_ci_low=min(max(0.0, gain[0]), estimate - best),
        gain_ci_high=max(estimate - best, min(gain[1], most)),
        best_prompt=best,
        one_draw_oracle=oracle,
        held_out=float(held_out.mean()),
        n_queries=len(n),
        method=_METHOD.format(held_out=held_out.mean()),
    )


def _interval(value: float, draws: np.ndarray, held_out: np.ndarray, extra: float) -> tuple[float, float]:
    """Return the ends of the interval of an estimate from its bootstrap draws.

    A maximum is convex: draws lie as far above the estimate as the estimate lies above the truth. What the
    extrapolation adds is a model's word: the interval reaches down to what was seen without it, and up by `extra`.
    """
    low, high = 2 * value - np.quantile(draws, [0.975, 0.025])
    return float(min(low, np.quantile(held_out, 0.025))), float(high + extra)


def _bounds(n: np.ndarray, k: np.ndarray, groups: np.ndarray) -> Ceiling:
    """Return bounds with the chance of the sample in them: no best prompt by luck below, no unlucky oracle above."""
    if len(np.unique(groups)) < MIN_QUERIES:
        method = f"not known: fewer than {MIN_QUERIES} unlike queries were run under every prompt"
        return Ceiling(None, None, None, None, None, None, None, None, None, len(n), method)
    rates = k / n
    oracle, best = one_draw_oracle(n, k), float(rates.mean(axis=0).max())
    # All prompts' lower limits hold together at 97.5% (Bonferroni), so the highest of them does.
    z = float(ndtri(1 - 0.025 / rates.shape[1]))
    low = float((rates.mean(axis=0) - z * standard_error(rates, groups)).max())
    high = success_interval(1 - np.prod(1 - rates, axis=1), groups)[2]
    room = max(0.0, high - low)
    return Ceiling(None, max(0.0, low), high, None, 0.0, room, best, oracle, None, len(n), _BOUNDS)


def _moments(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return per query the rates, their products, and the noise of a single run (unbiased), float (Q, P + P² + P)."""
    x = k / n
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    return np.hstack([x, products, x * (1 - x) * n / (n - 1)])


def _shrinkage(n: np.ndarray, k: np.ndarray) -> float:
    """Return how far the covariance is drawn to one with equal variances and equal correlations, from 0 to 1.

    The share of noise in how its entries differ from that (Ledoit and Wolf 2004): a log whose prompts differ alike
    keeps two numbers, one where two prompts oppose each other keeps them all.
    """
    x = k / n
    centred = x - x.mean(axis=0)
    products = centred[:, :, None] * centred[:, None, :]
    diagonal = np.arange(x.shape[1])
    products[:, diagonal, diagonal] -= x * (1 - x) / (n - 1)
    covariance = products.mean(axis=0)
    spread = ((covariance - _even(covariance)) ** 2).sum()
    noise = products.var(axis=0).sum() / len(x)
    return float(min(1.0, noise / spread)) if spread > 0 else 1.0


def _even(covariance: np.ndarray) -> np.ndarray:
    """Return the covariance with the same mean variance and the same mean covariance everywhere."""
    p = len(covariance)
    shared = (covariance.sum() - np.trace(covariance)) / (p * (p - 1))
    return np.asarray(shared + (np.trace(covariance) / p - shared) * np.eye(p))


def _model(means: np.ndarray, runs: np.ndarray, shrinkage: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the means (P,), covariance of θ (P, P) and noise of a single run (P,) from averaged moments.

    Args:
        means: Averages of `_moments`, float (P + P² + P,).
        runs: Runs per cell behind each rate, float (P,): their noise is taken off the variances.
    """
    p = len(runs)
    mu, noise = means[:p], means[p + p * p :]
    covariance = means[p : p + p * p].reshape(p, p) - np.outer(mu, mu) - np.diag(noise / runs)
    covariance += shrinkage * (_even(covariance) - covariance)
    values, vectors = np.linalg.eigh(covariance)
    return mu, (vectors * np.maximum(values, 0)) @ vectors.T, noise


def _gain_matrix(covariance: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return B with E[θ | x] = μ + (x − μ) B for normal θ and means x of variance `noise`, float (P, P)."""
    return np.asarray(np.linalg.solve(covariance + np.diag(noise + 1e-9), covariance))


def _held_out_values(
    n: np.ndarray, k: np.ndarray, groups: np.ndarray, rng: np.random.Generator, shrinkage: float
) -> np.ndarray:
    """Return per query the success of the prompt chosen by all runs but one, on the run left out, float (Q,).

    The rule of choice (the best linear one: prompts' means and a shrunk deviation of the query) is learned on the
    queries of other groups.
    """
    moments, seen = _moments(n, k), n - 1
    _, group = np.unique(groups, return_inverse=True)
    fold = rng.permutation(int(group.max()) + 1)[group] % _FOLDS
    out = np.zeros(len(n))
    rules = []
    for f in range(_FOLDS):
        mu, covariance, noise = _model(moments[fold != f].mean(axis=0), _harmonic_mean(n[fold != f]), shrinkage)
        rules.append((fold == f, mu, _gain_matrix(covariance, noise / _harmonic_mean(seen[fold != f]))))
    rows = np.arange(len(n))
    for _ in range(_HELD_OUT_DRAWS):
        left_out = rng.random(n.shape) < k / n
        x = (k - left_out) / seen
        posterior = np.empty(x.shape)
        for inside, mu, rule in rules:
            posterior[inside] = mu + (x[inside] - mu) @ rule
        out += left_out[rows, posterior.argmax(axis=1)]
    return np.asarray(out / _HELD_OUT_DRAWS)


def _extrapolate(means: np.ndarray, seen: np.ndarray, normals: np.ndarray, shrinkage: float) -> float:
    """Return the held-out value plus what the normal model expects of many runs over `seen` of them.

    Args:
        means: The held-out value, then averages of `_moments`.
        seen: Runs per cell that the choice saw, float (P,).
        normals: Standard normal draws, float (N, P), the same for all calls, so that their noise cancels.
    """
    mu, covariance, noise = _model(means[1:], seen + 1, shrinkage)
    rule = _gain_matrix(covariance, noise / seen)
    known = covariance @ rule
    return float(means[0] + _expected_maximum(mu, covariance, normals) - _expected_maximum(mu, known, normals))


def _expected_maximum(mu: np.ndarray, covariance: np.ndarray, normals: np.ndarray) -> float:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # The symmetric root keeps the draws of two covariances alike, so that their difference has little noise.
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return float((mu + normals @ root).max(axis=1).mean())


def _harmonic_mean(counts: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 / counts).mean(axis=0))
