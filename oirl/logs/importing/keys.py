"""Which rows belong together: hashes of key columns, and counts of them over a whole import with flat memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

_MIX = np.uint64(0x9E3779B97F4A7C15)


def row_keys(columns: Sequence[pa.Array]) -> np.ndarray:
    """Return a 64-bit hash per row over the columns; equal rows have equal hashes within one process."""
    total = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        encoded = column.dictionary_encode()
        codes = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)
        hashes = [hash(v) & 0xFFFFFFFFFFFFFFFF for v in encoded.dictionary.to_pylist()]
        values = np.array([*hashes, 0x5BD1E995], dtype=np.uint64)[codes]
        total = (total ^ (values + _MIX)) * _MIX
        total ^= total >> np.uint64(29)
    return total


class KeyCounter:
    """How often each key has been seen, in two sorted arrays: 12 bytes a key."""

    def __init__(self) -> None:
        self._keys = np.zeros(0, dtype=np.uint64)
        self._counts = np.zeros(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._keys)

    def counts(self, keys: np.ndarray) -> np.ndarray:
        """Return for each row how often its key was seen, int32; nothing is counted."""
        if not len(self._keys):
            return np.zeros(len(keys), dtype=np.int32)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._counts[at], 0)

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Count the keys of a batch and return, for each row, how often its key was seen before it."""
        if len(keys) == 0:
            return np.zeros(0, dtype=np.int32)
        distinct, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(inverse, kind="stable")
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        within = np.empty(len(keys), dtype=np.int32)
        within[order] = np.arange(len(keys)) - np.repeat(starts, counts)

        at = np.searchsorted(self._keys, distinct)
        known = at < len(self._keys)
        known[known] = self._keys[at[known]] == distinct[known]
        before = np.zeros(len(distinct), dtype=np.int32)
        before[known] = self._counts[at[known]]
        self._counts[at[known]] += counts[known].astype(np.int32)
        self._keys = np.insert(self._keys, at[~known], distinct[~known])
        self._counts = np.insert(self._counts, at[~known], counts[~known].astype(np.int32))
        return before[inverse] + within
