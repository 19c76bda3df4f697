"""The nearest-neighbour null: what the most similar training queries say of each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from oirl.logs.cells import Cells
from oirl.rewards.embedders import TfidfEmbedder

_MAX_QUERIES = 5000


class NearestNeighbours:
    """Mean success of each prompt over the k most similar training queries (cosine of word n-grams).

    It is no model that anybody should deploy: it stands in the evaluation so that a learned model has to beat it.

    Args:
        k: How many neighbours.
    """

    def __init__(self, k: int = 50) -> None:
        self.k = k

    def fit(self, cells: Cells, seed: int = 0) -> NearestNeighbours:
        """Remember the training queries, or a sample of 5,000 of them."""
        chosen = np.arange(len(cells.queries))
        if len(chosen) > _MAX_QUERIES:
            chosen = np.sort(np.random.default_rng(seed).choice(chosen, _MAX_QUERIES, replace=False))
        self._embedder = TfidfEmbedder(blocks=("words",))
        prepared = self._embedder.prepare([cells.queries[i] for i in chosen])
        self._vectors = self._embedder.fit(prepared).embed_block(prepared, "words")
        runs, successes = cells.matrices()
        self._runs, self._successes = runs[chosen], successes[chosen]
        return self

    def predict(self, queries: Sequence[str]) -> np.ndarray:
        """Return estimated success, float (Q, P); a prompt that no neighbour was run under gets its overall mean."""
        vectors = self._embedder.embed_block(self._embedder.prepare(queries), "words")
        overall = (self._successes.sum(axis=0) + 1) / (self._runs.sum(axis=0) + 2)
        out = np.empty((len(queries), self._runs.shape[1]))
        k = min(self.k, len(self._runs))
        for start in range(0, len(queries), 512):
            near = (vectors[start : start + 512] @ self._vectors.T).toarray()
            top = np.argpartition(-near, k - 1, axis=1)[:, :k]
            # One pseudo-run at the overall mean breaks ties the same way for every query.
            runs = self._runs[top].sum(axis=1) + 1
            out[start : start + 512] = (self._successes[top].sum(axis=1) + overall) / runs
        return out

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays to save."""
        return {
            **self._embedder.arrays(),
            "data": self._vectors.data,
            "indices": self._vectors.indices,
            "indptr": self._vectors.indptr,
            "runs": self._runs,
            "successes": self._successes,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> NearestNeighbours:
        """Take the arrays that `state` gave."""
        self._embedder = TfidfEmbedder(blocks=("words",)).restore(state)
        shape = (len(state["indptr"]) - 1, len(state["words_hashes"]))
        self._vectors = sp.csr_matrix((state["data"], state["indices"], state["indptr"]), shape=shape)
        self._vectors.check_format(full_check=True)
        self._runs, self._successes = state["runs"], state["successes"]
        if self._runs.shape != self._successes.shape or len(self._runs) != shape[0]:
            raise ValueError("the neighbours' runs do not match their vectors")
        return self
