"""What the replies of a log show: verdicts that a careful checker changes, replies cut off, answers not given last."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.logs.checkers import answer_kind, apply_checker, choice, numeric

MOST_GRADED = 50_000
"""Replies that are graded at most; of more, a sample."""
_EXAMPLES = 5
_SHOWN = 300
_NUMERAL = re.compile(r"\d[\d,]*(?:\.\d+)?")
_LONG = 200
_FEWEST_REPEATED, _ONLY_LAST = 20, 0.95
_PILE, _SHORTEST_LIMIT, _BELOW, _OUTLIER = 0.01, 32, 8, 5
_REASON = r'"(?:finish_reason|stop_reason)": ?"[^"]+"'
_CUT_REASON = r'"(?:finish_reason|stop_reason)": ?"(?:length|max_tokens|model_length|MAX_TOKENS)"'
_LIMIT = r'"(?:max_tokens|max_new_tokens|max_gen_toks)": ?(?P<limit>\d+)'
_ANSWERED = r"(?i)answer(?: is)?:? ?[*(]*[a-z0-9]{1,12}[*)]*$"


@dataclass(frozen=True, slots=True)
class Labels:
    """What a careful checker makes of the logged verdicts.

    Attributes:
        checker: "numeric" or "choice", by what the gold answers look like; None for free text, which no checker judges.
        regraded: Replies that it judged.
        changed: Those of them whose logged verdict is the opposite.
        to_right: Those of them that were logged as wrong.
        answer_not_last: Replies that are wrong under both, though the gold number stands in them.
        sampled: Whether `regraded` is a sample of the replies.
        examples: Some changed ones: row, query_id, prompt_id, answer, response (its end), logged, careful.
    """

    checker: str | None = None
    regraded: int = 0
    changed: int = 0
    to_right: int = 0
    answer_not_last: int = 0
    sampled: bool = False
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as a dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CutOff:
    """Replies that ended because of a limit.

    Attributes:
        replies: Replies with a text.
        cut_off: Those known to be cut off; None where the log does not tell.
        source: How that is known: "finish reason", "max_tokens" or "many replies of the largest length".
        end_midway: Replies of 200 characters or more that end in the middle of a sentence: a hint, no proof.
        wrong_if_cut: Share of wrong verdicts among the cut-off ones (among those that end midway where the log does not
            tell); None if there are none.
    """

    replies: int = 0
    cut_off: int | None = None
    source: str | None = None
    end_midway: int = 0
    wrong_if_cut: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as a dictionary for JSON."""
        return asdict(self)


def check_labels(log: pa.Table, rng: np.random.Generator) -> Labels:
    """Grade replies with the checker that fits their gold answers and compare with the logged verdicts.

    Args:
        log: Interactions with response, answer and correct.
        rng: Chooses the sample of a large log.
    """
    known = [pc.is_valid(log[name]) for name in ("response", "answer", "correct")]
    rows = np.flatnonzero(pc.and_(pc.and_(known[0], known[1]), known[2]).to_numpy(zero_copy_only=False))
    checker, name = _checker_for(log, rows)
    if checker is None:
        return Labels()
    chosen = rows if len(rows) <= MOST_GRADED else np.sort(rng.choice(rows, MOST_GRADED, replace=False))
    part = log.select(["query_id", "prompt_id", "response", "answer", "correct"]).take(pa.array(chosen))
    judged = changed = to_right = not_last = 0
    examples: list[dict[str, Any]] = []
    for at, row in zip(chosen.tolist(), part.to_pylist(), strict=True):
        verdict = apply_checker(checker, row["response"], row["answer"]).correct
        if verdict is None:
            continue
        judged += 1
        if verdict != row["correct"]:
            changed += 1
            to_right += verdict
            if len(examples) < _EXAMPLES:
                examples.append(_example(at, row, verdict))
        elif not verdict and name == "numeric":
            not_last += _holds_number(row["response"], row["answer"])
    return Labels(name, judged, changed, to_right, not_last, len(chosen) < len(rows), examples)


def check_cut_off(log: pa.Table) -> CutOff:
    """Find replies that ended because of a limit: by finish reason, by `max_tokens`, by length, or by how they end.

    Args:
        log: Interactions with response, correct, tokens_out, sampling and metadata.
    """
    has_text = pc.is_valid(log["response"])
    texts = log.filter(has_text)
    if not len(texts):
        return CutOff()
    midway = _ends_midway(texts["response"])
    cut, source = _known_cut(texts)
    of = midway if cut is None else cut
    verdicts = texts["correct"].to_numpy(zero_copy_only=False)[of]
    graded = [v for v in verdicts.tolist() if v is not None]
    return CutOff(
        len(texts),
        None if cut is None else int(cut.sum()),
        source,
        int(midway.sum()),
        float(1 - np.mean(graded)) if graded else None,
    )


def repeated_until_right(log: pa.Table) -> float | None:
    """Return the share of repeated queries (or of repeats of a prompt) in which only the last run is right.

    Where runs were repeated until one was right, success is overstated, whatever the propensities say.

    Args:
        log: Interactions in the order in which they were run, with query_id, prompt_id and correct.

    Returns:
        The larger of the two shares, None where it is below 95% or there are fewer than 20 repeated groups.
    """
    graded = log.filter(pc.is_valid(log["correct"]))
    right = graded["correct"].to_numpy(zero_copy_only=False).astype(bool)
    query = np.asarray(graded["query_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64)
    prompt = np.asarray(graded["prompt_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64)
    found = []
    for key in (query, query * (prompt.max(initial=0) + 1) + prompt):
        order = np.argsort(key, kind="stable")
        last = np.r_[key[order][1:] != key[order][:-1], True] if len(order) else np.zeros(0, dtype=bool)
        groups = np.cumsum(np.r_[True, last[:-1]]) - 1 if len(order) else np.zeros(0, dtype=np.int64)
        sizes = np.bincount(groups)
        early = np.bincount(groups, weights=right[order] & ~last, minlength=len(sizes))
        repeated = sizes > 1
        if repeated.sum() >= _FEWEST_REPEATED and right[order][last][repeated].mean() > 0.5:
            found.append(float((early[repeated] == 0).mean()))
    share = max(found, default=0.0)
    return share if share >= _ONLY_LAST else None


def _checker_for(log: pa.Table, rows: np.ndarray) -> tuple[Callable[[str, str], Any] | None, str | None]:
    known: Sequence[str] = log["answer"].take(pa.array(rows)).to_pylist()
    kind = answer_kind(known)
    return {"numeric": numeric, "choice": choice, None: None}[kind], kind


def _example(at: int, row: dict[str, Any], verdict: bool) -> dict[str, Any]:
    kept = {name: row[name] for name in ("query_id", "prompt_id", "answer")}
    return {"row": at + 1, **kept, "response": row["response"][-_SHOWN:], "logged": row["correct"], "careful": verdict}


def _holds_number(response: str, answer: str) -> bool:
    gold = {m.replace(",", "") for m in _NUMERAL.findall(answer.rpartition("####")[2])}
    return bool(gold) and not gold.isdisjoint(m.replace(",", "") for m in _NUMERAL.findall(response))


def _ends_midway(responses: pa.ChunkedArray) -> np.ndarray:
    """Return which long replies end with a letter, a comma or an operator, bool (n,)."""
    trimmed = pc.utf8_rtrim_whitespace(responses)
    long = pc.greater_equal(pc.utf8_length(responses), _LONG)
    end = pc.utf8_slice_codeunits(trimmed, -1)
    open_end = pc.match_substring_regex(end, r"[\p{L},;:=+*/(\-]")
    # A reply may well end with its answer, as a letter or a word.
    answered = pc.match_substring_regex(pc.utf8_slice_codeunits(trimmed, -40), _ANSWERED)
    open_end = pc.and_not(open_end, answered)
    return np.asarray(pc.and_(long, open_end).to_numpy(zero_copy_only=False), dtype=bool)


def _known_cut(texts: pa.Table) -> tuple[np.ndarray | None, str | None]:
    """Return which replies were cut off and how that is known: row by row, by finish reason or by max_tokens."""
    metadata, sampling = (pc.fill_null(texts[name], "") for name in ("metadata", "sampling"))
    reasoned = np.asarray(pc.match_substring_regex(metadata, _REASON).to_numpy(zero_copy_only=False), dtype=bool)
    cut = np.asarray(pc.match_substring_regex(metadata, _CUT_REASON).to_numpy(zero_copy_only=False), dtype=bool)
    tokens = texts["tokens_out"].to_numpy(zero_copy_only=False).astype(float)
    limits = pc.extract_regex(sampling, _LIMIT)
    limit = np.array([float(v["limit"]) if v and v["limit"] else np.nan for v in limits.to_pylist()])
    limited = np.isfinite(tokens) & np.isfinite(limit)
    if reasoned.any() or limited.any():
        by_limit = limited & ~reasoned & (np.nan_to_num(tokens) >= np.nan_to_num(limit, nan=np.inf))
        names = [n for n, seen in (("finish reason", reasoned), ("max_tokens", limited & ~reasoned)) if seen.any()]
        return cut | by_limit, " and ".join(names)
    return (None, None) if np.isnan(tokens).all() else _pile(tokens)


def _pile(tokens: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    """Find many replies of exactly the largest length, where just below it there are few."""
    largest = np.nanmax(tokens)
    at, below = (tokens == largest).sum(), ((tokens < largest) & (tokens >= largest - _BELOW)).sum() / _BELOW
    if largest >= _SHORTEST_LIMIT and at >= max(10, _PILE * len(tokens)) and at >= _OUTLIER * max(below, 1):
        return np.asarray(tokens == largest, dtype=bool), "many replies of the largest length"
    return None, None
