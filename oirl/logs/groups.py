"""Which queries belong together: exact and near duplicates, found by MinHash and checked exactly. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from oirl.logs.text import mask_numbers, normalise, words

NEAR_DUPLICATE = 0.8
"""Jaccard similarity of 3-word shingles, numbers masked, from which two queries count as near duplicates."""

_BANDS, _ROWS = 16, 4  # 64 hashes; a pair of similarity .8 shares a band with probability .9998, one of .4 with .34
_SHINGLE = 3
_SMALL_BUCKET, _LEADERS = 256, 20
_LEAST_AGREEMENT, _BLOCK = 0.55, 1 << 16


class Grouping(NamedTuple):
    """Which queries belong together.

    Attributes:
        labels: Group of each query, int64 (n,), numbered from 0 by first appearance.
        templated: Queries that differ in numbers or few words only, but were not kept together, because they
            make up more than half of all queries: they follow a template, and a split must cut it.
        queries: How many queries there are, where labels are of something else (pairs); −1 where each has its label.
    """

    labels: np.ndarray
    templated: int
    queries: int = -1

    def warning(self) -> str | None:
        """Return a sentence for people, None if no template was cut."""
        if not self.templated:
            return None
        total = len(self.labels) if self.queries < 0 else self.queries
        return (
            f"{self.templated:,} of {total:,} queries follow one template and differ in few words or "
            "numbers; they were split all the same, so held-out figures speak of new fillings of that template only"
        )


def group_queries(queries: Sequence[str]) -> Grouping:
    """Group exact and near duplicates.

    Two queries are in one group if they are equal once normalised and with numbers masked, if the Jaccard
    similarity of their 3-word shingles is at least `NEAR_DUPLICATE`, or if a chain of such pairs joins them.
    Candidates come from MinHash with banding (Broder 1997); each is then checked exactly. A group of more than half
    of all distinct queries is a template: only exact duplicates (normalised) stay together in it.
    """
    masked = [mask_numbers(q) for q in queries]
    # Sorted, so that the groups do not depend on the order of the rows.
    wordings = {text: i for i, text in enumerate(sorted(set(masked)))}
    which = np.array([wordings[text] for text in masked], dtype=np.int64)
    shingles = [_shingles(text) for text in wordings]
    parent = np.arange(len(wordings))
    for a, b in _candidates(shingles):
        root_a, root_b = _root(parent, a), _root(parent, b)
        if root_a != root_b and _jaccard(shingles[a], shingles[b]) >= NEAR_DUPLICATE:
            parent[max(root_a, root_b)] = min(root_a, root_b)
    roots = np.array([_root(parent, i) for i in range(len(parent))], dtype=np.int64)
    labels = roots[which]
    exact = first_positions([normalise(q) for q in queries])
    distinct = exact == np.arange(len(exact))
    sizes = np.bincount(labels[distinct], minlength=1)
    cut = (sizes > max(distinct.sum() / 2, 1))[labels]
    labels = np.where(cut, len(wordings) + exact, labels)
    return Grouping(_by_appearance(labels), int(cut.sum()))


def join_groups(*labelings: np.ndarray) -> np.ndarray:
    """Return the finest grouping in which everything together in any of the given ones is together, int64 (n,)."""
    n = len(labelings[0])
    parent = np.arange(n)
    for labels in labelings:
        first = np.unique(labels, return_index=True)[1][np.unique(labels, return_inverse=True)[1]]
        for i in np.flatnonzero(first != np.arange(n)).tolist():
            a, b = _root(parent, int(first[i])), _root(parent, i)
            parent[max(a, b)] = min(a, b)
    return _by_appearance(np.array([_root(parent, i) for i in range(n)], dtype=np.int64))


def first_positions(texts: Sequence[str]) -> np.ndarray:
    """Return for each text the position of its first equal."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, i) for i, text in enumerate(texts)], dtype=np.int64)


def _by_appearance(labels: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _shingles(text: str) -> frozenset[int]:
    tokens = words(text)
    if len(tokens) <= _SHINGLE:
        return frozenset([crc32(" ".join(tokens).encode())])
    return frozenset(crc32(" ".join(tokens[i : i + _SHINGLE]).encode()) for i in range(len(tokens) - _SHINGLE + 1))


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def _candidates(shingles: list[frozenset[int]]) -> list[tuple[int, int]]:
    """Return pairs that share a band of their MinHash signatures and agree in enough of the whole signatures."""
    if not shingles:
        return []
    signatures = _signatures(shingles)
    n = len(shingles)
    by_text = np.ascontiguousarray(signatures.T)
    found: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        key = np.zeros(n, dtype=np.uint64)
        for row in range(band * _ROWS, (band + 1) * _ROWS):
            key = key * np.uint64(0x9E3779B97F4A7C15) + signatures[row]
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(key[order]) != 0])
        sizes = np.diff(np.r_[starts, n])
        pairs = [_pairs_of(order[at : at + size]) for at, size in zip(starts, sizes, strict=True) if size > 1]
        if pairs:
            first, second = np.concatenate(pairs, axis=1)
            found.update(_agreeing(first, second, by_text))
    return sorted(found)


def _signatures(shingles: list[frozenset[int]]) -> np.ndarray:
    """Return the least hash of each text's shingles under each hash function, uint64 (64, n)."""
    sizes = np.array([len(s) for s in shingles])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    values = np.fromiter((v for s in shingles for v in s), dtype=np.uint64, count=int(sizes.sum()))
    rng = np.random.default_rng(0x01F1)  # the hash functions, not a sample: fixed for ever
    a = rng.integers(1, 2**61, _BANDS * _ROWS, dtype=np.uint64) | np.uint64(1)
    b = rng.integers(0, 2**61, _BANDS * _ROWS, dtype=np.uint64)
    rows = [np.minimum.reduceat((values * a[r] + b[r]) >> np.uint64(32), starts) for r in range(_BANDS * _ROWS)]
    return np.stack(rows)


def _pairs_of(members: np.ndarray) -> np.ndarray:
    """Return the pairs (smaller, larger position) of a bucket, int64 (2, k)."""
    # All pairs of a large bucket would be quadratic; its first members stand for it.
    leaders = len(members) if len(members) <= _SMALL_BUCKET else _LEADERS
    first, second = np.triu_indices(len(members), 1) if leaders == len(members) else _leading(leaders, len(members))
    return np.sort(np.stack([members[first], members[second]]), axis=0)


def _leading(leaders: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat(np.arange(leaders), size)
    second = np.tile(np.arange(size), leaders)
    later = second > first
    return first[later], second[later]


def _agreeing(first: np.ndarray, second: np.ndarray, by_text: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs whose signatures agree as those of near duplicates do.

    The share of equal hashes estimates the similarity: at .8 its standard deviation is .05, so that one below .55
    happens once in a million.
    """
    for at in range(0, len(first), _BLOCK):
        a, b = first[at : at + _BLOCK], second[at : at + _BLOCK]
        close = (by_text[a] == by_text[b]).mean(axis=1) >= _LEAST_AGREEMENT
        yield from zip(a[close].tolist(), b[close].tolist(), strict=True)


def _root(parent: np.ndarray, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i
