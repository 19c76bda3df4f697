"""Which sampled responses to learn from, and what became of their variety. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np

RULES = ("best_per_query", "top_fraction")


def best_per_query(rewards: np.ndarray, queries: Sequence[Hashable], *, least: float | None = None) -> np.ndarray:
    """Return the positions of the response with the highest reward of each query, ascending: RAFT (2304.06767).

    Args:
        rewards: Float (n,); NaN is never chosen. Of equals the first is.
        queries: The query of each response, length n.
        least: A lower reward is not chosen, even if it is its query's best.
    """
    best: dict[Hashable, int] = {}
    for i in np.flatnonzero(_allowed(rewards, least)).tolist():
        if queries[i] not in best or rewards[i] > rewards[best[queries[i]]]:
            best[queries[i]] = i
    return np.array(sorted(best.values()), dtype=np.int64)


def top_fraction(rewards: np.ndarray, fraction: float, *, least: float | None = None) -> np.ndarray:
    """Return the positions of the ⌈fraction · n⌉ highest rewards of all, ascending, whatever their queries.

    Easy queries then give more of what is learned; `best_per_query` gives each query one.

    Args:
        rewards: Float (n,); NaN is never chosen. Of equals the first are.
        fraction: In (0, 1]; of all n.
        least: A lower reward is not chosen.
    """
    allowed = np.flatnonzero(_allowed(rewards, least))
    count = math.ceil(fraction * len(rewards) - 1e-9)
    order = allowed[np.argsort(-rewards[allowed], kind="stable")]
    return np.sort(order[:count])


def first_of_equals(queries: Sequence[Hashable], responses: Sequence[str]) -> np.ndarray:
    """Return the positions of the first of each (query, response), ascending."""
    seen: dict[tuple[Hashable, str], int] = {}
    for i, key in enumerate(zip(queries, responses, strict=True)):
        seen.setdefault(key, i)
    return np.array(list(seen.values()), dtype=np.int64)


def variety(responses: Sequence[str]) -> dict[str, float]:
    """Return what shows a collapse of responses, of words as they stand between spaces.

    Returns:
        `distinct_1`, `distinct_2`: distinct words, pairs of words, over all (Li et al. 2016). `word_entropy`: of the
        words' frequencies, in nats. `words`: mean number of words of a response. `distinct_responses`: their share.
        NaN where there is nothing to count.
    """
    words = [response.split() for response in responses]
    ones = Counter(word for row in words for word in row)
    twos = Counter(pair for row in words for pair in pairwise(row))
    shares = np.array(list(ones.values()), dtype=np.float64) / max(ones.total(), 1)
    return {
        "distinct_1": _share(len(ones), ones.total()),
        "distinct_2": _share(len(twos), twos.total()),
        "word_entropy": float(-(shares * np.log(shares)).sum()) if len(shares) else math.nan,
        "words": _share(ones.total(), len(words)),
        "distinct_responses": _share(len(set(responses)), len(words)),
    }


def _allowed(rewards: np.ndarray, least: float | None) -> np.ndarray:
    known = ~np.isnan(rewards)
    return known if least is None else known & (np.nan_to_num(rewards, nan=-np.inf) >= least)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
