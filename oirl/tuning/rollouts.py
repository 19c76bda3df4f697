"""Rollouts: responses to learn from, out of a log or drawn by the policy; what is drawn is a log again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from oirl.engines.base import Engine, Sampling
from oirl.engines.collecting import collect
from oirl.logs.store import read_log
from oirl.records import Query

_RESPONSES = 512


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response and what is known of it.

    Attributes:
        query_id: Name of the query.
        query: Its text.
        prompt: The template that was given, without an instruction of HIR's.
        response: The response.
        answer: The gold answer.
        correct: The verdict, None where it is not known.
        score: The log's graded outcome.
        finished: Whether the model ended it; False if it was cut off.
        token_ids: Its tokens as they were drawn, the end-of-text token among them; None of a log, whose tokens may be
            those of another model.
        prompt_ids: The tokens before it, of the same.
        logprobs: log π of each of `token_ids` by the policy that drew it, in nats.
        replicate: Which of the runs of its query it is.
    """

    query_id: str
    query: str
    prompt: str
    response: str
    answer: str | None = None
    correct: bool | None = None
    score: float | None = None
    finished: bool = True
    token_ids: tuple[int, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    replicate: int = 0


def rollouts_of_log(log: pa.Table) -> list[Rollout]:
    """Return the rows of a log that have a response, as rollouts without tokens."""
    return [_rollout(row, row["prompt"], own=False) for row in log.to_pylist() if row["response"] is not None]


def sample_rollouts(
    engine: Engine,
    queries: Sequence[Query],
    prompt: tuple[str, str],
    folder: Path,
    sampling: Sampling,
    *,
    samples: int,
    grade: str | None,
    share: tuple[int, int] = (0, 1),
    part: int = _RESPONSES,
) -> None:
    """Draw responses to queries and write them to a folder as logs, part by part.

    A part is written whole or not at all, and parts that are there are not drawn again: responses that are drawn
    together influence each other's rounding, so that only whole parts make a resumed run equal to one that was never
    stopped.

    Args:
        engine: Draws them.
        queries: What to ask.
        prompt: (prompt_id, template) under which it is asked.
        folder: For `part-000.parquet`, ….
        sampling: How responses are drawn.
        samples: Responses to each query.
        grade: Checker, None for no verdicts.
        share: (k, n) for the k-th of n processes that do this together.
        part: Responses of a part, about.

    Raises:
        EngineError: If the engine cannot go on.
    """
    size = max(part // samples, 1)
    for k, start in enumerate(range(0, len(queries), size)):
        path = folder / f"part-{k:03}.parquet"
        if k % share[1] != share[0] or path.is_file():
            continue
        Path(f"{path}.journal").unlink(missing_ok=True)
        collect(
            engine, queries[start : start + size], [prompt], path, sampling=sampling, replicates=samples, grade=grade
        )


def read_rollouts(folder: Path, base_prompt: str) -> tuple[list[Rollout], Counter[str]]:
    """Return what `sample_rollouts` has written, and why requests failed: reason -> count."""
    rows = read_log(folder).to_pylist()
    failed = Counter(f"failed: {_metadata(r['metadata']).get('error')}" for r in rows if r["response"] is None)
    return [_rollout(row, base_prompt, own=True) for row in rows if row["response"] is not None], failed


def _rollout(row: dict[str, Any], prompt: str, *, own: bool) -> Rollout:
    told = _metadata(row["metadata"])
    tokens = {name: tuple(told[name]) for name in ("token_ids", "prompt_ids", "logprobs") if own and told.get(name)}
    return Rollout(
        row["query_id"],
        row["query"],
        prompt,
        row["response"],
        row["answer"],
        row["correct"],
        row["score"],
        told.get("finish_reason") != "length",
        **tokens,
        replicate=row["replicate"],
    )


def _metadata(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
