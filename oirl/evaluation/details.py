"""What a report shows beyond the figures of an evaluation: calibration, where switching pays, replies side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.evaluation.evaluate import Selector
from oirl.evaluation.valuation import complete_queries
from oirl.logs.cells import Cells, make_cells
from oirl.logs.groups import group_queries
from oirl.logs.splits import test_rows
from oirl.logs.store import conform_table
from oirl.logs.text import mask_numbers, words
from oirl.statistics.intervals import MIN_QUERIES, bootstrap_means, percentile_interval, reliability_bins

DETAILED = ("query_id", "query", "prompt_id", "prompt", "response", "correct", "answer", "split", "model")
"""The columns of a log that details read."""

_STEPS, _DRAWS = 20, 500
_MOST_QUERIES, _MOST_PROMPTS, _CHARACTERS, _BUDGET = 200, 20, 600, 1_200_000
_FEWEST, _WORDS = 5, 5


@dataclass(slots=True)
class Details:
    """What a report shows beyond the document of an evaluation or an audit.

    Attributes:
        reliability: Bins of predicted success: predicted, observed, ci_low, ci_high, runs.
        gain_curve: If the queries with the largest predicted gain are switched: share, gain, ci_low, ci_high.
        switches: Per prompt switched to: prompt_id, queries, gain, ci_low, ci_high, and words that stand out.
        prompts: Prompts of the table, best first.
        rows: Queries of the table: query_id, query, answer, position of the chosen prompt, and for each prompt of
            `prompts` [runs, successes, a response], or None where it was not run.
        n_queries: Queries that the rows were drawn from.
        n_prompts: Prompts that those of the table were taken from.
    """

    reliability: list[dict[str, Any]] = field(default_factory=list)
    gain_curve: list[dict[str, Any]] = field(default_factory=list)
    switches: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    n_queries: int = 0
    n_prompts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the details as a dictionary for JSON."""
        return asdict(self)


def evaluation_details(selector: Selector, log: pa.Table, *, seed: int = 0) -> Details:
    """Return calibration, gain curve, switches and replies of a selector on a log, as `evaluate` uses it.

    Args:
        selector: A fitted selector.
        log: Interactions with verdicts.
        seed: For the bootstrap and the sample of queries.
    """
    rng = np.random.default_rng(seed)
    model = selector.model_
    table = test_rows(conform_table(log, DETAILED))
    cells = make_cells(table).of_prompts(model.prompt_ids_)
    groups = group_queries(cells.queries).labels
    scores = model.predict_proba(cells.queries)
    choice = selector.choose(scores)
    found = replies_of(
        table, cells, rng, {q: model.prompt_ids_[c] for q, c in zip(cells.query_ids, choice, strict=True)}
    )
    predicted = scores[cells.query_index, cells.prompt_index]
    found.reliability = reliability_bins(predicted, cells.rate, cells.runs, groups[cells.query_index])
    runs, successes = cells.matrices()
    complete = complete_queries(runs)
    if complete.sum() >= MIN_QUERIES:
        rates = successes[complete] / runs[complete]
        gains = rates - rates[:, [model.train_.best]]
        texts = [q for q, keep in zip(cells.queries, complete, strict=True) if keep]
        found.gain_curve = _gain_curve(scores[complete], gains, model.train_.best, groups[complete], rng)
        found.switches = _switches(choice[complete], gains, model.train_.best, texts, model.prompt_ids_, rng)
    return found


def audit_details(log: pa.Table, *, seed: int = 0) -> Details:
    """Return replies side by side of a log, for the page of an audit; nothing where no row has a verdict.

    Args:
        log: Interactions.
        seed: For the sample of queries.
    """
    table = conform_table(log, DETAILED)
    if table["correct"].null_count == len(table):
        return Details()
    return replies_of(table, make_cells(table), np.random.default_rng(seed))


def replies_of(
    table: pa.Table, cells: Cells, rng: np.random.Generator, chosen: dict[str, str] | None = None
) -> Details:
    """Return a sample of queries with a reply under each prompt, at most 200 queries and 20 prompts.

    Args:
        table: Interactions, with the columns `DETAILED`.
        cells: Their graded runs.
        rng: Draws the sample.
        chosen: query_id -> prompt that a selector takes.
    """
    rates = [(cells.rate[cells.prompt_index == p].mean(), p) for p in np.unique(cells.prompt_index)]
    prompts = [int(p) for _, p in sorted(rates, reverse=True)[:_MOST_PROMPTS]]
    n = len(cells.query_ids)
    picked = np.sort(rng.choice(n, min(n, _MOST_QUERIES), replace=False))
    names = [cells.query_ids[i] for i in picked]
    length = min(_CHARACTERS, max(80, _BUDGET // max(1, len(picked) * len(prompts))))
    part = table.filter(pc.and_(pc.is_in(table["query_id"], pa.array(names)), pc.is_valid(table["correct"])))
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in part.select(["query_id", "prompt_id", "response", "answer"]).to_pylist():
        first.setdefault((row["query_id"], row["prompt_id"]), row)
    runs, successes = cells.matrices()
    position = {cells.prompt_ids[p]: at for at, p in enumerate(prompts)}
    rows = []
    for i, name in zip(picked.tolist(), names, strict=True):
        replies: list[list[Any] | None] = []
        for p in prompts:
            text = (first.get((name, cells.prompt_ids[p])) or {}).get("response") or ""
            found = [int(runs[i, p]), int(successes[i, p]), _cut(text, length)]
            replies.append(found if runs[i, p] else None)
        answer = next((r["answer"] for key, r in first.items() if key[0] == name and r["answer"]), None)
        rows.append(
            {
                "query_id": name,
                "query": _cut(cells.queries[i], 2000),
                "answer": _cut(answer, 200) if answer else None,
                "chosen": position.get((chosen or {}).get(name, "")),
                "replies": replies,
            }
        )
    shown = [cells.prompt_ids[p] for p in prompts]
    return Details(prompts=shown, rows=rows, n_queries=n, n_prompts=len(rates))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "…"


def _gain_curve(
    scores: np.ndarray, gains: np.ndarray, best: int, groups: np.ndarray, rng: np.random.Generator
) -> list[dict[str, Any]]:
    top = scores.argmax(axis=1)
    ahead = scores[np.arange(len(scores)), top] - scores[:, best]
    rank = np.empty(len(ahead), dtype=np.int64)
    rank[np.argsort(-ahead, kind="stable")] = np.arange(len(ahead))
    own = gains[np.arange(len(gains)), top]
    shares = np.linspace(0, 1, _STEPS + 1)
    columns = np.stack([own * (rank < share * len(own)) for share in shares], axis=1)
    low, high = percentile_interval(bootstrap_means(columns, rng, _DRAWS, groups))
    return [
        {"share": float(s), "gain": float(g), "ci_low": float(a), "ci_high": float(b)}
        for s, g, a, b in zip(shares, columns.mean(axis=0), low, high, strict=True)
    ]


def _switches(
    choice: np.ndarray,
    gains: np.ndarray,
    best: int,
    texts: Sequence[str],
    names: Sequence[str],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    tokens = [set(words(mask_numbers(text))) for text in texts]
    everywhere = Counter(token for found in tokens for token in found)
    rows = []
    for p in np.unique(choice):
        mine = choice == p
        if p == best:
            continue
        own = gains[mine, p]
        low, high = percentile_interval(bootstrap_means(own[:, None], rng, _DRAWS))
        rows.append(
            {
                "prompt_id": names[int(p)],
                "queries": int(mine.sum()),
                "gain": float(own.mean()),
                "ci_low": float(low[0]),
                "ci_high": float(high[0]),
                "words": _standing_out([tokens[i] for i in np.flatnonzero(mine)], everywhere, len(texts)),
            }
        )
    return sorted(rows, key=lambda row: -row["queries"])


def _standing_out(mine: list[set[str]], everywhere: Counter[str], total: int) -> list[str]:
    """Return the words that stand in far more of these queries than in the others."""
    here = Counter(token for found in mine for token in found)
    rest = max(total - len(mine), 1)

    def odds(token: str) -> float:
        return ((here[token] + 0.5) / (len(mine) + 1)) / ((everywhere[token] - here[token] + 0.5) / (rest + 1))

    common = [token for token, count in here.items() if count >= _FEWEST and token[:1].isalpha()]
    return [t for t in sorted(common, key=lambda t: -odds(t))[:_WORDS] if odds(t) > 1.5]
