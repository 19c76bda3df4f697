"""A response to a query as a row of features: texts through an embedder, and what can be checked of the response."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from oirl.errors import UnknownNameError
from oirl.rewards.embedders import Matrix, TfidfEmbedder, make_embedder, restore_embedder
from oirl.rewards.response_checks import CHECKS, check_response
from oirl.rewards.saving import named

CHECKS_ONLY = "checks"
"""Name of the features that need no embedder of responses."""
_CLIP = 5.0


@dataclass(frozen=True, slots=True)
class Responses:
    """Texts that were read once.

    Attributes:
        queries: The distinct queries, prepared; None where query and response are read as one.
        query: Position of each response's query among them, int64 (n,).
        responses: The responses, prepared; None where only checks are used.
        checks: What can be checked of each, float64 (n, c).
    """

    queries: Any
    query: np.ndarray
    responses: Any
    checks: np.ndarray


class ResponseFeatures:
    """Rows of features of (query, response).

    | embedder | a row |
    | --- | --- |
    | `checks` | standardised checks (`oirl.rewards.response_checks`), counts of the query |
    | `tfidf` | the checks, n-grams and counts of the response, n-grams and counts of the query |
    | hidden states | the vector of query and response, read as one text |
    | any other | e(y), e(x) ∘ e(y), e(x) |

    Args:
        embedder: "checks", or as for `make_embedder`.
    """

    def __init__(self, embedder: Any) -> None:
        try:
            self.embedder: Any = None if embedder == CHECKS_ONLY else make_embedder(embedder)
        except UnknownNameError as e:
            raise UnknownNameError(f"{e}; or {CHECKS_ONLY}, for responses") from e
        self._asked = _query_embedder(self.embedder)
        self._scale: dict[str, np.ndarray] = {}

    @property
    def checked(self) -> bool:
        """Whether rows hold the checks."""
        return self.embedder is None or isinstance(self.embedder, TfidfEmbedder)

    def prepare(self, queries: Sequence[str], responses: Sequence[str]) -> Responses:
        """Read the texts once."""
        position = {text: i for i, text in enumerate(dict.fromkeys(queries))}
        which = np.array([position[q] for q in queries], dtype=np.int64)
        if hasattr(self.embedder, "prepare_responses"):
            return Responses(None, which, self.embedder.prepare_responses(queries, responses), np.zeros(0))
        rows = [check_response(q, r) for q, r in zip(queries, responses, strict=True)] if self.checked else []
        checks = np.array(rows, dtype=np.float64).reshape(len(rows), len(CHECKS))
        read = None if self.embedder is None else self.embedder.prepare(list(responses))
        return Responses(self._asked.prepare(list(position)), which, read, checks)

    def fit(self, prepared: Responses) -> ResponseFeatures:
        """Learn vocabularies and scales, never from outcomes."""
        if self.embedder is not None:
            self.embedder.fit(prepared.responses)
        if self.checked:
            self._asked.fit(prepared.queries)
            spread = prepared.checks.std(axis=0)
            self._scale["checks_mean"] = prepared.checks.mean(axis=0)
            self._scale["checks_scale"] = np.where(spread > 1e-9, spread, 1.0)
        return self

    def embed(self, prepared: Responses) -> Matrix:
        """Return one row per response, float32 (n, d), dense or CSR."""
        own: Any = None if self.embedder is None else self.embedder.embed(prepared.responses)
        if prepared.queries is None:
            return own
        asked = self._asked.embed(prepared.queries)[prepared.query]
        if not self.checked:
            return np.hstack([own, own * asked, asked]).astype(np.float32, copy=False)
        z = (prepared.checks - self._scale["checks_mean"]) / self._scale["checks_scale"]
        checks = np.clip(z, -_CLIP, _CLIP).astype(np.float32)
        if own is None:
            return np.hstack([checks, asked.toarray()])
        return sp.hstack([sp.csr_matrix(checks), own, asked], format="csr", dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of the embedder."""
        return {"name": CHECKS_ONLY} if self.embedder is None else self.embedder.describe()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the learned state."""
        arrays = dict(self._scale)
        if self.embedder is not None:
            arrays |= {f"responses.{k}": v for k, v in self.embedder.arrays().items()}
        if self.checked:
            arrays |= {f"queries.{k}": v for k, v in self._asked.arrays().items()}
        return arrays

    @classmethod
    def restore(cls, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray], given: Any) -> ResponseFeatures:
        """Return the features that a manifest describes; see `restore_embedder`."""
        if description["name"] == CHECKS_ONLY:
            found = cls(CHECKS_ONLY)
        else:
            found = cls(restore_embedder(description, named(arrays, "responses."), given))
        if found.checked:
            found._asked.restore(named(arrays, "queries."))
            found._scale = {name: arrays[name] for name in ("checks_mean", "checks_scale")}
            if any(array.shape != (len(CHECKS),) for array in found._scale.values()):
                raise ValueError("it was fitted with another list of checks")
        return found


def _query_embedder(embedder: Any) -> Any:
    if embedder is None:
        return TfidfEmbedder(blocks=())
    # What is learned of the queries must not be overwritten by what is learned of the responses.
    return copy.deepcopy(embedder) if isinstance(embedder, TfidfEmbedder) else embedder
