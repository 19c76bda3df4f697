"""Preference pairs: made from verdicts, where the right one of two replies is preferred, and read from files."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.errors import ConfigError, DataError
from oirl.logs.groups import Grouping, first_positions, group_queries, join_groups
from oirl.logs.store import (
    BATCH_ROWS,
    LogWriter,
    Source,
    conform,
    conform_table,
    find_files,
    read_log,
    record_of,
    scan_log,
)
from oirl.logs.text import normalise, template_id
from oirl.records import PREFERENCE_SCHEMA

PAIRED = ("query_id", "query", "prompt_id", "response", "correct", "score", "split")
"""The columns of a log that pairs are made from."""
NO_VERDICT = "no verdict"
NO_RESPONSE = "no response, or an empty one"
REPEATED = "the same response as an earlier one to this query, with the same verdict"
CONTRADICTED = "the same response stands as right and as wrong"
ONE_SIDED = "all responses to the query are right, or all are wrong"
_FEW_WORDS = 12
_MOST_REPLIES = 32
SAME = "chosen and rejected are the same text"
EMPTY = "query, chosen or rejected is empty"


@dataclass(slots=True)
class PairsReport:
    """What `write_pairs` made.

    Attributes:
        out: The file.
        rows_read: Rows of the log.
        rows_used: Rows that stand in at least one pair.
        n_pairs: Pairs written.
        n_queries: Queries that they come from.
        margin: Where margins come from: "score" (difference of scores) or "verdict" (right − wrong = 1).
        left_out: Reason -> number of rows that stand in no pair for it.
    """

    out: str = ""
    rows_read: int = 0
    rows_used: int = 0
    n_pairs: int = 0
    n_queries: int = 0
    margin: str = "verdict"
    left_out: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return {**asdict(self), "left_out": dict(+self.left_out)}


@dataclass(slots=True)
class _Asked:
    """One query on one side of a split: its distinct right and wrong replies, and the scores of these."""

    query_id: str
    query: str
    split: str | None
    right: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    wrong: dict[str, tuple[str, float | None]] = field(default_factory=dict)


def make_pairs(log: pa.Table, *, per_query: int | None = None, seed: int = 0) -> tuple[pa.Table, PairsReport]:
    """Pair right with wrong responses to one query.

    A text counts once per query and verdict; a text that stands as right and as wrong is no evidence and is left out.
    A query that stands on two sides of a split is paired on each side apart.

    Args:
        log: Interactions; needs the columns of `PAIRED`.
        per_query: At most so many pairs of a query, chosen so that each response is used as evenly as can be and each
            prompt stands about as often among the chosen as among the rejected; all pairs when None.
        seed: Decides between pairs that are equally good.

    Returns:
        Preference pairs, in the order of the queries, and what was made of the rows. `margin` is the difference of the
        scores where every response in a pair has one and the right one's is higher throughout, else 1.

    Raises:
        ConfigError: If `per_query` is below 1.
        DataError: If there is no pair; the message says why.
    """
    if per_query is not None and per_query < 1:
        raise ConfigError(f"per_query={per_query}; at least 1 is needed, or leave it out for all pairs")
    if seed < 0:
        raise ConfigError(f"seed={seed}; a whole number of 0 or more is needed")
    log = conform_table(log, PAIRED)
    report = PairsReport(rows_read=len(log))
    asked = _replies_by_query(log, report)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    balance: Counter[str] = Counter()
    for query in asked:
        if per_query is not None and len(query.right) * len(query.wrong) > per_query:
            chosen = _balanced(query, per_query, balance, rng)
        else:
            chosen = [(r, w) for r in query.right for w in query.wrong]
        balance.update(query.right[r][0] for r, _ in chosen)
        balance.subtract(query.wrong[w][0] for _, w in chosen)
        if not chosen:
            report.left_out[ONE_SIDED] += len(query.right) + len(query.wrong)
            continue
        report.n_queries += 1
        used = len({r for r, _ in chosen}) + len({w for _, w in chosen})
        report.rows_used += used
        report.left_out["not among the pairs chosen"] += len(query.right) + len(query.wrong) - used
        rows += [_pair_row(query, r, w) for r, w in chosen]
    if not rows:
        why = "; ".join(f"{n:,} rows: {reason}" for reason, n in (+report.left_out).most_common(3))
        raise DataError(
            f"the log gives no pair of a right and a wrong response to one query ({why or 'no rows'}); responses come "
            "in with `oirl import --map response=FIELD`, verdicts with --grade CHECKER"
        )
    report.n_pairs = len(rows)
    if all(row["margin"] is not None and row["margin"] > 0 for row in rows):
        report.margin = "score"
    else:
        for row in rows:
            row["margin"] = 1.0
    return pa.Table.from_pylist(rows, PREFERENCE_SCHEMA), report


def write_pairs(
    sources: Source | Sequence[Source], out: Source, *, per_query: int | None = None, seed: int = 0
) -> PairsReport:
    """Read a log and write its preference pairs; see `make_pairs`.

    Raises:
        ConfigError: If `out` is a source, or `per_query` is below 1.
        DataError: If the log gives no pair.
    """
    if Path(out).resolve() in {path.resolve() for path in find_files(sources, (".parquet",))}:
        raise ConfigError(f"{out} is also the log; name another file for the pairs")
    try:
        pairs, report = make_pairs(read_log(sources, PAIRED), per_query=per_query, seed=seed)
    except DataError as e:
        shown = sources if isinstance(sources, (str, os.PathLike)) else ", ".join(map(str, sources))
        raise DataError(str(e) if str(shown) in str(e) else f"{shown}: {e}") from e
    save_pairs(pairs, out)
    report.out = str(out)
    return report


def save_pairs(pairs: pa.Table, out: Source) -> None:
    """Write a table of preference pairs as Parquet, whole or not at all."""
    with LogWriter(out, "preferences") as writer:
        for batch in pairs.to_batches(BATCH_ROWS):
            writer.write(conform(batch, str(out), PREFERENCE_SCHEMA))


def read_pairs(sources: Source | Sequence[Source]) -> pa.Table:
    """Read preference pairs, or make them of a log that is named instead (all pairs of each query).

    Raises:
        NotFoundError: If a source names no file.
        DataError: If a file cannot be read, or the log gives no pair.
    """
    if record_of(sources) == "interactions":
        return make_pairs(read_log(sources, PAIRED))[0]
    return pa.Table.from_batches(scan_log(sources, record="preferences"), PREFERENCE_SCHEMA)


def usable_pairs(pairs: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """Return the pairs that say something, and reason -> number of those that do not: empty or equal texts."""
    trimmed = [pc.utf8_trim_whitespace(pairs[name]) for name in ("query", "chosen", "rejected")]
    empty = pc.equal(pc.binary_length(trimmed[0]), 0)
    for column in trimmed[1:]:
        empty = pc.or_(empty, pc.equal(pc.binary_length(column), 0))
    same = pc.and_not(pc.equal(trimmed[1], trimmed[2]), empty)
    counts = Counter({EMPTY: pc.sum(empty).as_py() or 0, SAME: pc.sum(same).as_py() or 0})
    return pairs.filter(pc.invert(pc.or_(empty, same))), +counts


def splits_of(pairs: pa.Table) -> list[str | None]:
    """Return the split value that each pair's metadata keeps, None where it keeps none."""
    return [_kept(text).get("split") for text in pairs["metadata"].to_pylist()]


def train_pairs(pairs: pa.Table) -> pa.Table:
    """Return the pairs that a model may learn from: those marked "train", or all if none is marked so."""
    train = np.array([s == "train" for s in splits_of(pairs)], dtype=bool)
    return pairs.filter(pa.array(train)) if train.any() else pairs


def test_pairs(pairs: pa.Table) -> pa.Table:
    """Return the pairs to evaluate on: those marked "test", else those not marked "train", or all if none is left."""
    marks = splits_of(pairs)
    for kept in ([s == "test" for s in marks], [s != "train" for s in marks]):
        if any(kept):
            return pairs.filter(pa.array(kept))
    return pairs


def mark_pairs(pairs: pa.Table, split: str) -> pa.Table:
    """Return pairs whose metadata say to which part of a split they belong."""
    # As ASCII: half of a surrogate pair, which JSON may hold, is no text.
    texts = [json.dumps(_kept(text) | {"split": split}) for text in pairs["metadata"].to_pylist()]
    return pairs.set_column(pairs.column_names.index("metadata"), "metadata", pa.array(texts, pa.string()))


def group_pairs(pairs: pa.Table) -> Grouping:
    """Return the group of each pair: what belongs together must not be cut by a split.

    Pairs belong together if their queries are near duplicates, begin with the same turn of one conversation, or if
    they compare the same two responses, in whichever order (those of a few words, such as yes and no, excepted).
    """
    encoded = pairs["query"].cast(pa.string()).dictionary_encode().combine_chunks()
    texts = encoded.dictionary.to_pylist()
    which = np.asarray(encoded.indices, dtype=np.int64)
    if not texts:
        return Grouping(which, 0)
    grouping = group_queries(texts)
    metadata = pairs["metadata"].to_pylist()
    openings = [normalise(_opening(texts[i], m)) for i, m in zip(which.tolist(), metadata, strict=True)]
    both = zip(pairs["chosen"].to_pylist(), pairs["rejected"].to_pylist(), strict=True)
    compared = ["\x1f".join(sorted((normalise(a), normalise(b)))) for a, b in both]
    same = first_positions(compared)
    short = np.array([len(text.split()) < _FEW_WORDS for text in compared])
    same[short] = np.flatnonzero(short)
    labels = join_groups(grouping.labels[which], first_positions(openings), same)
    return Grouping(labels, grouping.templated, len(texts))


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


def _replies_by_query(log: pa.Table, report: PairsReport) -> list[_Asked]:
    asked: dict[tuple[str | None, str], _Asked] = {}
    for row in _rows(log):
        text = (row["response"] or "").strip()
        if row["correct"] is None:
            report.left_out[NO_VERDICT] += 1
        elif not text:
            report.left_out[NO_RESPONSE] += 1
        else:
            key = (row["split"], row["query_id"])
            query = asked.setdefault(key, _Asked(row["query_id"], row["query"], row["split"]))
            side = query.right if row["correct"] else query.wrong
            if text in side:
                report.left_out[REPEATED] += 1
            side.setdefault(text, (row["prompt_id"], row["score"]))
    for query in asked.values():
        for text in query.right.keys() & query.wrong.keys():
            del query.right[text], query.wrong[text]
            report.left_out[CONTRADICTED] += 2
    return list(asked.values())


def _rows(log: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in log.select(list(PAIRED)).to_batches(BATCH_ROWS):
        yield from batch.to_pylist()


def _balanced(query: _Asked, count: int, balance: Counter[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Choose pairs of one query: fresh responses first, then prompts that were rejected oftener than chosen.

    `balance` says how much oftener each prompt was chosen than rejected so far in the log.
    """
    used: Counter[tuple[str, str]] = Counter()
    ahead: Counter[str] = Counter(balance)
    # Of very many responses, some drawn at random serve as well as all pairs of all.
    sides = [list(side) for side in (query.right, query.wrong)]
    most = max(_MOST_REPLIES, count)
    drawn = [[side[i] for i in rng.permutation(len(side))[:most]] for side in sides]
    left = [(r, w) for r in drawn[0] for w in drawn[1]]
    left = [left[i] for i in rng.permutation(len(left))]
    found = []
    for _ in range(count):

        def cost(pair: tuple[str, str]) -> tuple[int, int]:
            of_right, of_wrong = query.right[pair[0]][0], query.wrong[pair[1]][0]
            return used["right", pair[0]] + used["wrong", pair[1]], ahead[of_right] - ahead[of_wrong]

        pair = min(left, key=cost)
        left.remove(pair)
        found.append(pair)
        used.update([("right", pair[0]), ("wrong", pair[1])])
        ahead[query.right[pair[0]][0]] += 1
        ahead[query.wrong[pair[1]][0]] -= 1
    return found


def _pair_row(query: _Asked, right: str, wrong: str) -> dict[str, Any]:
    (right_prompt, right_score), (wrong_prompt, wrong_score) = query.right[right], query.wrong[wrong]
    known = {
        "query_id": query.query_id,
        "chosen_prompt_id": right_prompt,
        "rejected_prompt_id": wrong_prompt,
        "split": query.split,
    }
    return {
        "pair_id": template_id(f"{query.split}\x1f{query.query_id}\x1f{right}\x1f{wrong}"),
        "query": query.query,
        "chosen": right,
        "rejected": wrong,
        "margin": None if right_score is None or wrong_score is None else right_score - wrong_score,
        "source": "verdicts",
        "metadata": json.dumps({k: v for k, v in known.items() if v is not None}, ensure_ascii=False),
    }


def _kept(metadata: str | None) -> dict[str, Any]:
    try:
        found = json.loads(metadata) if metadata else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {"metadata": found}


def _opening(query: str, metadata: str | None) -> str:
    """Return the first turn of a conversation, the query itself where it is not one."""
    if metadata and "messages" in metadata:
        turns = _kept(metadata).get("messages")
        said = (
            [t for t in turns if isinstance(t, dict) and t.get("role") != "system"] if isinstance(turns, list) else []
        )
        if len(said) > 1:
            return str(said[0].get("content"))
    return query
