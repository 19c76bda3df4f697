"""What a reward model of prompts keeps of its training log, and which of its prompts it learns from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.errors import ConfigError
from oirl.logs.cells import Cells
from oirl.logs.text import masked_hash, normalise, text_hash

COLUMNS = ("query_id", "query", "prompt_id", "prompt", "correct", "split", "model")
"""The columns of a log that reward models of prompts and their evaluation read."""

SPARSE_SHARE = 0.1
"""Share of the most-run prompt's queries below which a prompt is left out of the model."""


@dataclass(frozen=True)
class SeenQueries:
    """The queries that a model has learned from, as hashes.

    Attributes:
        texts: Sorted hashes of the normalised queries, uint64.
        wordings: Sorted hashes of the queries with numbers masked, uint64.
    """

    texts: np.ndarray
    wordings: np.ndarray

    @classmethod
    def of(cls, queries: Iterable[str]) -> SeenQueries:
        """Return what is remembered of some queries."""
        distinct = list(dict.fromkeys(queries))
        texts = np.array([text_hash(normalise(q)) for q in distinct], dtype=np.uint64)
        return cls(np.unique(texts), np.unique(np.array([masked_hash(q) for q in distinct], dtype=np.uint64)))

    def overlap(self, queries: Sequence[str]) -> tuple[int, int]:
        """Return how many queries stood in the training log, and how many more did with other numbers."""
        same = _among(np.array([text_hash(normalise(q)) for q in queries], dtype=np.uint64), self.texts)
        near = _among(np.array([masked_hash(q) for q in queries], dtype=np.uint64), self.wordings) & ~same
        return int(same.sum()), int(near.sum())

    def warning(self, queries: Sequence[str]) -> str | None:
        """Return a sentence if some of these queries stood in the training log."""
        exact, near = self.overlap(queries)
        if not exact + near:
            return None
        more = f" and {near:,} more did with other numbers" if near else ""
        return (
            f"of the {len(queries):,} queries {exact:,} stood in the training log{more}: the figures flatter the model"
        )


@dataclass(frozen=True)
class TrainingSummary:
    """What a model of prompts remembers of its training log.

    Attributes:
        rates: Success of each prompt: the mean over queries of the mean over runs, float (P,).
        best: Position of the best single prompt.
        n_rows: Graded runs.
        n_queries: Distinct queries.
        fingerprint: Of the rows learned from.
        seen: The queries.
    """

    rates: np.ndarray
    best: int
    n_rows: int
    n_queries: int
    fingerprint: str
    seen: SeenQueries


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Predictions for training queries by models whose weights have seen neither them nor a near duplicate.

    The vocabulary of `tfidf`, which learns nothing of outcomes, is that of all training queries.

    Attributes:
        cells: The training cells.
        probability: Predicted success, float (Q, P).
        fold: Fold of each query, int64 (Q,).
        groups: Group of near duplicates of each query, int64 (Q,); None where each query is its own.
    """

    cells: Cells
    probability: np.ndarray
    fold: np.ndarray
    groups: np.ndarray | None = None


def check_seed(seed: int) -> None:
    """Raise `ConfigError` unless `seed` is a whole number of 0 or more."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed={seed!r}; a whole number of 0 or more is needed")


def pooled_models_warning(log: pa.Table) -> str | None:
    """Return a sentence if the runs are of several language models, whose prompts cannot well be compared."""
    found = [name for name in pc.unique(log["model"]).to_pylist() if name is not None]
    pairs = log.group_by(["model", "prompt_id"]).aggregate([]).to_pylist()
    # In a router's table, and among pairs (`name_actions`), the model is part of what is chosen.
    chosen = all(p["prompt_id"] == p["model"] or p["prompt_id"].startswith(f"{p['model']} | ") for p in pairs)
    if len(found) < 2 or chosen:
        return None
    shown = ", ".join(sorted(found)[:4]) + (", …" if len(found) > 4 else "")
    return f"the log holds runs of {len(found)} language models ({shown}), pooled here; use the rows of one at a time"


def without_sparse_prompts(cells: Cells) -> tuple[Cells, str | None]:
    """Leave out prompts that were hardly run: one lucky run would make the best prompt, or leave no complete query."""
    queries = np.bincount(cells.prompt_index, minlength=len(cells.prompt_ids))
    kept = queries >= SPARSE_SHARE * queries.max()
    if kept.all():
        return cells, None
    left_out = ", ".join(f"{cells.prompt_ids[i]} ({queries[i]})" for i in np.flatnonzero(~kept))
    warning = (
        f"prompts run on less than {SPARSE_SHARE:.0%} of the queries of the most-run prompt ({queries.max():,}) were "
        f"left out: {left_out}"
    )
    return cells.of_prompts([name for name, keep in zip(cells.prompt_ids, kept, strict=True) if keep]), warning


def summarise(cells: Cells, fingerprint: str) -> TrainingSummary:
    """Return what is remembered of the training cells; the best single prompt is compared on shared queries."""
    runs, successes = cells.matrices()
    asked = runs > 0
    per_query = np.divide(successes, runs, out=np.zeros(runs.shape), where=asked)
    rates = per_query.sum(axis=0) / asked.sum(axis=0)
    # Prompts are compared on the same queries, where enough queries were run under all of them.
    full = np.all(asked, axis=1)
    compared = per_query[full].mean(axis=0) if full.sum() >= SPARSE_SHARE * len(full) else rates
    return TrainingSummary(
        rates=rates,
        best=int(compared.argmax()),
        n_rows=int(cells.runs.sum()),
        n_queries=len(cells.queries),
        fingerprint=fingerprint,
        seen=SeenQueries.of(cells.queries),
    )


def _among(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(hashes), dtype=bool)
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
