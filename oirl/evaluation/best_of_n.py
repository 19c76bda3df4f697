"""Choosing among N responses: what each way of choosing is worth, from M logged responses. Pure functions of arrays.

Best-of-N from M ≥ N responses is an expectation over all subsets of N, by order statistics: sorted by reward, the k-th
best response is the best of a random subset with probability C(M − k, N − 1) / C(M, N). Votes have no such form: they
are averaged over random subsets, drawn afresh for each N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

_SAME = 1e-9  # votes that rounding alone tells apart are tied
_MOST_SIZES = 16


@dataclass(frozen=True, slots=True)
class Candidates:
    """The responses to some queries, M to each.

    Attributes:
        reward: Float (Q, M).
        gold: Whether each is right, or how good it is, float (Q, M).
        answer: The answer that each gives, numbered from 0 within its query; −1 = none, int (Q, M).
        weight: Weight of each one's vote, float (Q, M), at least 0.
    """

    reward: np.ndarray
    gold: np.ndarray
    answer: np.ndarray
    weight: np.ndarray


def sizes_up_to(most: int) -> list[int]:
    """Return the N of a curve: all up to 16, then about √2 apart, the last one `most`."""
    sizes = list(range(1, min(most, _MOST_SIZES) + 1))
    while sizes[-1] < most:
        sizes.append(min(most, round(sizes[-1] * 2**0.5)))
    return sizes


def best_of_n_kl(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return KL(best-of-N policy ‖ policy) ≤ log N − (N − 1)/N, in nats, exact without ties (Stiennon et al. 2020)."""
    n = np.asarray(sizes, dtype=np.float64)
    return np.log(n) - (n - 1) / n


def order_weights(count: int, sizes: Sequence[int]) -> np.ndarray:
    """Return P(the k-th best of `count` is the best of a random subset of N), float (len(sizes), count)."""
    n = np.asarray(sizes, dtype=np.float64)[:, None]
    below = count - np.arange(1, count + 1)[None, :]  # how many are worse than the k-th
    possible = below >= n - 1
    log = _log_comb(np.where(possible, below, n - 1), n - 1) - _log_comb(np.full_like(n, count), n)
    return np.where(possible, np.exp(log), 0.0)


def expected_of_best(reward: np.ndarray, value: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return the expected value of the response with the highest reward among N, ties broken at random.

    Args:
        reward: What is chosen by, float (Q, M).
        value: What is counted, float (Q, M).
        sizes: The N, each at most M.

    Returns:
        Float (Q, len(sizes)).
    """
    order = np.argsort(-reward, axis=1, kind="stable")
    ranked, shown = np.take_along_axis(reward, order, 1), np.take_along_axis(value, order, 1)
    return _mean_of_ties(ranked, shown) @ order_weights(reward.shape[1], sizes).T


def expected_of_vote(
    candidates: Candidates, weight: np.ndarray, size: int, rng: np.random.Generator, draws: int = 64
) -> np.ndarray:
    """Return the expected gold of a random response among those of N that give the answer with the most votes, (Q,).

    Ties are broken at random. Responses without an answer have no vote; where none has one, a random response is taken.

    Args:
        candidates: The responses.
        weight: Weight of each vote, float (Q, M): ones for the majority vote.
        size: N.
        rng: Draws the subsets.
        draws: Subsets per query; with N = M, or N = 1, there is nothing to draw.
    """
    c = candidates
    if size == 1:
        return c.gold.mean(axis=1)
    answers = np.arange(c.answer.max(initial=0) + 1)
    gives = (c.answer[:, :, None] == answers).astype(float)
    total, draws = np.zeros(len(c.gold)), 1 if size == c.gold.shape[1] else draws
    for _ in range(draws):
        taken = _subset(c.gold.shape, size, rng)
        first = _winners(weight * taken, gives)
        counts = np.einsum("qm,qma->qa", taken, gives)
        worth = np.einsum("qm,qma->qa", c.gold * taken, gives) / np.maximum(counts, 1)
        tied = first.sum(axis=1)
        by_chance = (c.gold * taken).sum(axis=1) / size
        total += np.where(tied > 0, (worth * first).sum(axis=1) / np.maximum(tied, 1), by_chance)
    return total / draws


def expected_of_weighted_vote(
    candidates: Candidates, size: int, rng: np.random.Generator, draws: int = 64
) -> np.ndarray:
    """Return the expected gold of the best by reward among those of N that give the weightiest answer, float (Q,).

    So does `oirl.rank` choose: each response votes with its weight, and tied answers go by reward, as all do where none
    of the responses gives an answer. Arguments as for `expected_of_vote`.
    """
    c = candidates
    gives = (c.answer[:, :, None] == np.arange(c.answer.max(initial=0) + 1)).astype(float)
    total, draws = np.zeros(len(c.gold)), 1 if size == c.gold.shape[1] else draws
    for _ in range(draws):
        taken = _subset(c.gold.shape, size, rng)
        first = _winners(c.weight * taken, gives)
        voted = np.einsum("qa,qma->qm", first, gives) > 0
        eligible = (taken > 0) & (voted | ~first.any(axis=1, keepdims=True))
        best = np.where(eligible, c.reward, -np.inf).argmax(axis=1)
        total += c.gold[np.arange(len(best)), best]
    return total / draws


def curves(candidates: Candidates, sizes: Sequence[int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return what each way of choosing among N responses is worth to each query.

    Returns:
        Name -> float (Q, len(sizes)): `proxy` (expected reward of the best by reward), `best_of_n` (its gold),
        `random`, `oracle` (gold of the best by gold), `majority`, `weighted_majority`.
    """
    c = candidates
    # Both votes see the same subsets, so that their difference is not noise.
    state = rng.integers(2**63)
    own = np.random.default_rng(state)
    majority = np.stack([expected_of_vote(c, np.ones_like(c.weight), n, own) for n in sizes], axis=1)
    own = np.random.default_rng(state)
    weighted = np.stack([expected_of_weighted_vote(c, n, own) for n in sizes], axis=1)
    return {
        "proxy": expected_of_best(c.reward, c.reward, sizes),
        "best_of_n": expected_of_best(c.reward, c.gold, sizes),
        "random": np.repeat(c.gold.mean(axis=1, keepdims=True), len(sizes), axis=1),
        "oracle": expected_of_best(c.gold, c.gold, sizes),
        "majority": majority,
        "weighted_majority": weighted,
    }


@dataclass(frozen=True, slots=True)
class OverOptimisation:
    """R(d) = d (α − β d), d = √KL: how gold follows the pressure on the proxy (Gao et al. 2022, eq. 1).

    Attributes:
        alpha: α, float.
        beta: β, float; above 0 gold bends down.
        peak_kl: KL at which gold is highest, (α / 2β)²; None where it does not bend down.
    """

    alpha: float
    beta: float
    peak_kl: float | None


def fit_over_optimisation(kl: np.ndarray, gain: np.ndarray) -> OverOptimisation | None:
    """Fit R(d) = d (α − β d) to gains in gold over N = 1 by least squares; None with fewer than three N above 1."""
    d = np.sqrt(kl[kl > 0])
    if len(d) < 3:
        return None
    alpha, minus_beta = np.linalg.lstsq(np.stack([d, d * d], axis=1), gain[kl > 0], rcond=None)[0]
    peak = float((alpha / (-2 * minus_beta)) ** 2) if minus_beta < 0 < alpha else None
    return OverOptimisation(float(alpha), float(-minus_beta), peak)


def turns_down(
    proxy: np.ndarray, gold: np.ndarray, lower_end: Callable[[np.ndarray], float]
) -> tuple[int, float] | None:
    """Return where more choosing by the proxy makes things surely worse: (position of the best N, loss at the last N).

    Args:
        proxy: Float (Q, len(sizes)).
        gold: Float (Q, len(sizes)).
        lower_end: The lower end of the interval of a mean over queries, of contributions (Q,).

    Returns:
        None where gold does not fall while the proxy rises, or where that may be chance.
    """
    best = int(gold.mean(axis=0).argmax())
    loss = gold[:, best] - gold[:, -1]
    rises = proxy[:, -1].mean() > proxy[:, best].mean()
    if best == gold.shape[1] - 1 or not rises or not lower_end(loss) > 0:
        return None
    return best, float(loss.mean())


def _winners(votes: np.ndarray, gives: np.ndarray) -> np.ndarray:
    """Return which answers have the most votes, bool (Q, A); none where nobody votes."""
    sums = np.einsum("qm,qma->qa", votes, gives)
    most = sums.max(axis=1, keepdims=True)
    return np.asarray((sums >= most * (1 - _SAME)) & (most > 0))


def _subset(shape: tuple[int, ...], size: int, rng: np.random.Generator) -> np.ndarray:
    if size == shape[1]:
        return np.ones(shape)
    picks = rng.random(shape).argpartition(size - 1, axis=1)[:, :size]
    taken = np.zeros(shape)
    np.put_along_axis(taken, picks, 1.0, axis=1)
    return taken


def _mean_of_ties(ranked: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return values of which those with equal reward are each their mean; rows are sorted by reward."""
    new = np.concatenate([np.ones((len(ranked), 1), dtype=bool), ranked[:, 1:] != ranked[:, :-1]], axis=1)
    tie = (np.cumsum(new, axis=1) - 1) + np.arange(len(ranked))[:, None] * ranked.shape[1]
    sums = np.bincount(tie.ravel(), value.ravel(), minlength=ranked.size)
    counts = np.bincount(tie.ravel(), minlength=ranked.size)
    return (sums / np.maximum(counts, 1))[tie]


def _log_comb(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))
