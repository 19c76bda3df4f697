"""Which prompt is run on which query, and how likely that was. Pure functions; chance comes from a seed.

An adaptive design goes in rounds: which prompts the next one runs depends on the verdicts of those before. The
propensity of a cell is the probability with which its single run got this prompt, given all earlier rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from oirl.errors import ConfigError

DESIGNS = ("full", "random", "balanced", "adaptive")
FLOOR = 0.2
"""Share of an adaptive design's runs that is spread evenly over all prompts: so every prompt keeps a propensity."""
TOP_SHARE = 0.5
_POINTS = 4000  # of the posterior's integral


class Cell(NamedTuple):
    """One run to make: positions of query and prompt, number among their runs, propensity (None: not random)."""

    query: int
    prompt: int
    replicate: int
    propensity: float | None


def full(n_queries: int, n_prompts: int, replicates: int) -> Iterator[Cell]:
    """Yield every query under every prompt, all first runs before the second ones: a part of it is a smaller design."""
    for replicate in range(replicates):
        for query in range(n_queries):
            for prompt in range(n_prompts):
                yield Cell(query, prompt, replicate, None)


def random(keys: Sequence[Sequence[float]], n_prompts: int) -> Iterator[Cell]:
    """Yield one prompt a draw, each as likely as any other, whatever the other draws were.

    Args:
        keys: A number in [0, 1) for each draw (outer) and query (inner).
        n_prompts: How many prompts there are.
    """
    count: Counter[tuple[int, int]] = Counter()
    for draw in keys:
        for query, key in enumerate(draw):
            yield _next(count, query, int(key * n_prompts), 1 / n_prompts)


def balanced(n_queries: int, n_prompts: int, replicates: int, rng: np.random.Generator) -> Iterator[Cell]:
    """Yield `replicates` prompts a query, different ones as long as there are any, all prompts equally often.

    Queries in random order are cut into blocks of `n_prompts`; each block gets a random Latin square. So each draw of a
    query falls on each prompt with the same probability, and the counts of prompts differ by one block's remainder.
    """
    order = rng.permutation(n_queries)
    prompts = np.empty((n_queries, replicates), dtype=int)
    for first in range(0, replicates, n_prompts):
        for start in range(0, n_queries, n_prompts):
            rows, columns, names = (rng.permutation(n_prompts) for _ in range(3))
            square = names[(rows[:, None] + columns[None, :]) % n_prompts]
            block = order[start : start + n_prompts]
            prompts[block, first : first + n_prompts] = square[: len(block), : replicates - first]
    count: Counter[tuple[int, int]] = Counter()
    for draw in range(replicates):
        for query in order.tolist():  # block by block, so that a part of it is nearly balanced too
            yield _next(count, query, int(prompts[query, draw]), 1 / n_prompts)


def adaptive_round(
    queries: Sequence[int], keys: Sequence[float], chances: np.ndarray, count: Counter[tuple[int, int]]
) -> Iterator[Cell]:
    """Yield one prompt for each query of a round, drawn by the round's probabilities.

    Args:
        queries: Positions of the round's queries.
        keys: A number in [0, 1) for each of them.
        chances: Probability of each prompt, float (P,).
        count: Runs of (query, prompt) so far; raised by this round's.
    """
    edges = np.cumsum(chances)
    for query, key in zip(queries, keys, strict=True):
        prompt = min(int(np.searchsorted(edges, key * edges[-1], side="right")), len(chances) - 1)
        yield _next(count, query, prompt, float(chances[prompt]))


def top_two(successes: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Return how likely each prompt is run next, float (P,): top-two Thompson sampling with a floor.

    With α the posterior probability of each prompt to be the best (Beta(1, 1) priors), a prompt is taken with
    α_a (β + (1 − β) Σ_{b≠a} α_b / (1 − α_b)): the likely best with β = ½, else its strongest rival (top-two Thompson
    sampling, Russo 2016). A fifth of the runs is spread evenly over all prompts. Of two prompts each gets half of the
    runs, whatever they did: that tells them apart best.

    Args:
        successes: Right runs of each prompt, (P,).
        runs: Graded runs of each prompt, (P,).
    """
    from scipy.stats import beta  # slow to load, and needed by this design alone

    n = len(runs)
    if n == 1:
        return np.ones(1)
    points = (np.arange(_POINTS) + 0.5) / _POINTS
    posterior = beta((1 + successes)[:, None], (1 + runs - successes)[:, None])
    density, below = posterior.pdf(points), posterior.cdf(points)
    best = np.array([(density[a] * np.delete(below, a, axis=0).prod(axis=0)).sum() for a in range(n)])
    best /= best.sum()
    others = np.array([np.delete(best, a).sum() for a in range(n)])  # 1 − α, without its rounding near 1
    if others.min() <= 0:  # no doubt is left about the best: all others are rivals alike
        taken = np.where(others <= 0, TOP_SHARE, (1 - TOP_SHARE) / (n - 1))
    else:
        ratio = best / others
        taken = best * (TOP_SHARE + (1 - TOP_SHARE) * np.array([np.delete(ratio, a).sum() for a in range(n)]))
    return np.asarray((1 - FLOOR) * taken / taken.sum() + FLOOR / n)


def check_design(design: str, n_prompts: int) -> None:
    """Refuse a design that is not known, or needs more prompts.

    Raises:
        ConfigError: Naming the designs.
    """
    if design not in DESIGNS:
        raise ConfigError(f"design = {design!r}; allowed: {', '.join(DESIGNS)}")
    if design != "full" and n_prompts < 2:
        raise ConfigError(f"the design {design!r} chooses between prompts, and there is one; name more, or take full")


def _next(count: Counter[tuple[int, int]], query: int, prompt: int, propensity: float) -> Cell:
    replicate = count[query, prompt]
    count[query, prompt] += 1
    return Cell(query, prompt, replicate, propensity)
