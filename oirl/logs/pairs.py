"""Preference pairs from verdicts: of two replies to one query, the right one is preferred."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pyarrow as pa


def right_over_wrong(batches: Iterable[pa.RecordBatch]) -> tuple[list[dict[str, Any]], int]:
    """Pair right with wrong replies of one query, each reply at most once.

    Args:
        batches: Rows of a log with `query_id`, `query`, `prompt_id`, `response` and `correct`.

    Returns:
        The pairs (`query`, `chosen`, `rejected`), in the order of the queries, and the number of rows that are in one.
        The k-th right reply of a query is paired with its k-th wrong one; equal texts are no pair.
    """
    texts: dict[str, str] = {}
    replies: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for batch in batches:
        for row in batch.select(["query_id", "query", "response", "correct"]).to_pylist():
            if row["correct"] is None or row["response"] is None or not row["response"].strip():
                continue
            texts.setdefault(row["query_id"], row["query"])
            replies[row["query_id"]][0 if row["correct"] else 1].append(row["response"])
    pairs = [
        {"query": texts[query], "chosen": chosen, "rejected": rejected}
        for query, (right, wrong) in replies.items()
        for chosen, rejected in zip(right, wrong, strict=False)
        if chosen.strip() != rejected.strip()
    ]
    return pairs, 2 * len(pairs)
