"""Splits by query, without leaks: exact and near duplicates of a query stay on one side."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.errors import ConfigError, DataError
from oirl.logs.groups import first_positions, group_queries
from oirl.logs.pairs import group_pairs, mark_pairs, read_pairs, save_pairs
from oirl.logs.store import Source, conform_table, find_files, read_log, record_of, write_log
from oirl.logs.text import normalise


def assign_folds(keys: Sequence[str], groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each query, int64 in [0, folds); a group is never cut.

    Groups go in an order that only their keys and the seed decide, each to the fold with the fewest queries so far.

    Args:
        keys: An id per query, shape (n,).
        groups: Group per query, shape (n,).
        folds: How many folds, at least 2 and at most the number of groups.
        seed: Another seed gives another split.

    Raises:
        DataError: If there are fewer groups than folds.
    """
    order, members = _ordered_groups(keys, groups, seed)
    if len(order) < folds:
        raise DataError(f"{folds} folds need at least {folds} unlike queries, but there are {len(order)}")
    fold_of = np.empty(len(groups), dtype=np.int64)
    sizes = [0] * folds
    for group in order:
        fold = sizes.index(min(sizes))
        fold_of[members[group]] = fold
        sizes[fold] += len(members[group])
    return fold_of


def assign_test(keys: Sequence[str], groups: np.ndarray, test: float, seed: int) -> np.ndarray:
    """Return a mask of the queries that go to the test side: about the share `test`, whole groups only.

    Raises:
        ConfigError: If `test` is not strictly between 0 and 1.
        DataError: If there are fewer than two groups.
    """
    if not 0 < test < 1:
        raise ConfigError(f"the test share is {test}; it must lie between 0 and 1, such as 0.2")
    order, members = _ordered_groups(keys, groups, seed)
    if len(order) < 2:
        raise DataError("a split needs at least two unlike queries; all queries here are near duplicates of one")
    target = max(test * len(groups), 1)
    mask = np.zeros(len(groups), dtype=bool)
    taken = 0
    for group in order:
        size = len(members[group])
        # A group that would overshoot by more than it brings nearer is passed over.
        if taken < target and taken + size - target <= target - taken and taken + size < len(groups):
            mask[members[group]] = True
            taken += size
    if not taken:  # every group overshoots: the smallest does so least
        mask[members[min(order, key=lambda g: len(members[g]))]] = True
    return mask


def split(log: pa.Table, *, test: float = 0.2, by: str = "query", seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Split a log into a train and a test part that share no query and no near duplicate of one.

    Args:
        log: Interactions.
        test: Share of the queries in the test part, in (0, 1).
        by: "query" is the only way that does not leak; other words are refused.
        seed: Another seed gives another split; the order of the rows does not matter.

    Returns:
        The two parts, their column `split` set to "train" and "test".

    Raises:
        ConfigError: If `by` or `test` is not allowed.
        DataError: If the log has too few unlike queries.
    """
    _check_by(by)
    keys, texts, index = distinct_queries(log)
    mask = assign_test(keys, group_queries(texts).labels, test, seed)
    is_test = mask[index]
    return _marked(log.filter(pa.array(~is_test)), "train"), _marked(log.filter(pa.array(is_test)), "test")


def write_split(
    sources: Source | Sequence[Source],
    out: Source,
    *,
    test: float = 0.2,
    by: str = "query",
    folds: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read a log, or preference pairs, and write train.parquet and test.parquet, or those of each fold, to a folder.

    Args:
        sources: The log, as for `read_log`, or files of preference pairs.
        out: The folder; files of these names are replaced.
        test: Share of the queries in the test part; not used with folds.
        by: As for `split`.
        folds: Write `fold-0/`, `fold-1/`, … with a train and a test part each, instead of one split.
        seed: As for `split`.

    Returns:
        {"parts": [{file, rows, queries}], "warnings": [text]}.

    Raises:
        ConfigError: If an argument is not allowed.
        DataError: If the log has too few unlike queries.
    """
    _check_by(by)
    if folds is not None and folds < 2:
        raise ConfigError(f"--folds {folds}: at least 2 are needed")
    pairs = record_of(sources) == "preferences"
    divisible = _divisible_pairs(sources) if pairs else _divisible_log(sources)
    if folds is None:
        masks = {"": assign_test(divisible.keys, divisible.groups, test, seed)}
    else:
        fold = assign_folds(divisible.keys, divisible.groups, folds, seed)
        masks = {f"fold-{f}": fold == f for f in range(folds)}
    for source in find_files(sources, (".parquet",)):
        if source.name in _PARTS and Path(out).resolve() in source.resolve().parents:
            raise ConfigError(f"{source} would be overwritten by its own parts; name another folder than {out}")
    for old in Path(out).glob("fold-*"):
        # Folds of an earlier split beside these would let a query stand on both sides.
        if old.is_dir() and {file.name for file in old.iterdir()} <= _PARTS:
            shutil.rmtree(old)
    parts = []
    for folder, mask in masks.items():
        for name, chosen in (("train", ~mask), ("test", mask)):
            file = Path(out) / folder / f"{name}.parquet"
            part = divisible.rows.filter(pa.array(chosen[divisible.position]))
            if pairs:
                save_pairs(mark_pairs(part, name), file)
            else:
                write_log(_marked(part, name), file)
            queries = pc.count_distinct(part["query" if pairs else "query_id"]).as_py()
            parts.append({"file": str(file), "rows": len(part), "queries": queries})
    return {"parts": parts, "warnings": divisible.warnings}


class _Divisible(NamedTuple):
    """Rows, and the things among them that a split must not cut: their keys, their groups, each row's position."""

    rows: pa.Table
    keys: list[str]
    groups: np.ndarray
    position: np.ndarray
    warnings: list[str]


def _divisible_log(sources: Source | Sequence[Source]) -> _Divisible:
    log = read_log(sources)
    keys, texts, index = distinct_queries(log)
    groups = group_queries(texts)
    return _Divisible(log, keys, groups.labels, index, [w for w in [groups.warning()] if w])


def _divisible_pairs(sources: Source | Sequence[Source]) -> _Divisible:
    pairs = read_pairs(sources)
    if not len(pairs):
        raise DataError("the files hold no preference pair; there is nothing to split")
    groups = group_pairs(pairs)
    warnings = [w for w in [groups.warning()] if w]
    return _Divisible(pairs, pairs["pair_id"].to_pylist(), groups.labels, np.arange(len(pairs)), warnings)


def _check_by(by: str) -> None:
    if by != "query":
        raise ConfigError(f"by {by!r}: a log is split by 'query'; any other way lets test queries into training")


def _marked(log: pa.Table, split: str) -> pa.Table:
    column = pa.repeat(pa.scalar(split), len(log))
    if "split" in log.column_names:
        return log.set_column(log.column_names.index("split"), "split", column)
    return log.append_column("split", column)


def distinct_queries(log: pa.Table) -> tuple[list[str], list[str], np.ndarray]:
    """Return the distinct query ids of a log in order of appearance, the text of each, and each row's position."""
    log = conform_table(log, ("query_id", "query"))
    encoded = log["query_id"].cast(pa.string()).dictionary_encode().combine_chunks()
    index = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    first = np.unique(index, return_index=True)[1]
    return encoded.dictionary.to_pylist(), log["query"].take(pa.array(first)).to_pylist(), index


_PARTS = {"train.parquet", "test.parquet"}


@dataclass(frozen=True, slots=True)
class Leaks:
    """Queries of one split value that also stand in another.

    Attributes:
        exact: Queries whose normalised text stands under another split value too.
        near: Further queries that are near duplicates of one under another split value (`group_queries`).
        queries: Queries that carry a split value, counted once per value.
    """

    exact: int
    near: int
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as a dictionary for JSON."""
        return asdict(self)

    def warning(self) -> str | None:
        """Return a sentence for people, None where nothing leaks."""
        if not self.exact + self.near:
            return None
        shared = f"{self.exact:,} of {self.queries:,} queries stand under another value of `split` too"
        if not self.exact:
            return f"{self.near:,} of {self.queries:,} queries have a near duplicate under another value of `split`"
        return (
            f"the split column leaks, so that test figures are too good: {shared} (a query counts once per value), and "
            f"{self.near:,} have a near duplicate there; make a clean split with `oirl split LOG --out DIR`"
        )


def find_leaks(log: pa.Table, group_of: Mapping[str, int] | None = None) -> Leaks:
    """Count the queries that stand on more than one side of the log's own `split` column.

    Args:
        log: Interactions; rows with a null split do not count.
        group_of: Text of a query -> its group, where `group_queries` has been asked already.
    """
    rows = log.select(["query", "split"]).filter(pc.is_valid(log["split"])).group_by(["query", "split"]).aggregate([])
    sides = np.asarray(rows["split"].combine_chunks().dictionary_encode().indices, dtype=np.int64)
    if len(sides) == 0 or sides.max() == 0:
        return Leaks(0, 0, len(sides))
    texts = rows["query"].to_pylist()
    exact = _on_several_sides(first_positions([normalise(q) for q in texts]), sides)
    groups = group_queries(texts).labels if group_of is None else np.array([group_of[text] for text in texts])
    near = _on_several_sides(groups, sides) & ~exact
    return Leaks(int(exact.sum()), int(near.sum()), len(sides))


def train_rows(log: pa.Table) -> pa.Table:
    """Return the rows to learn from: those marked "train", else those not marked "test", or all if none is left.

    A log that is nothing but "test" says where it is from, as evaluations of public test sets do, and holds no other
    part to learn from.
    """
    train = pc.fill_null(pc.equal(log["split"], "train"), False)
    if pc.any(train).as_py():
        return log.filter(train)
    rest = pc.fill_null(pc.not_equal(log["split"], "test"), True)
    return log.filter(rest) if pc.any(rest).as_py() else log


def test_rows(log: pa.Table) -> pa.Table:
    """Return the rows to evaluate on: those marked "test", else those not marked "train", or all if none is left."""
    test = pc.fill_null(pc.equal(log["split"], "test"), False)
    if pc.any(test).as_py():
        return log.filter(test)
    rest = pc.fill_null(pc.not_equal(log["split"], "train"), True)
    return log.filter(rest) if pc.any(rest).as_py() else log


def _on_several_sides(groups: np.ndarray, sides: np.ndarray) -> np.ndarray:
    pairs = np.unique(np.stack([groups, sides]), axis=1)
    return (np.bincount(pairs[0]) > 1)[groups]


def _ordered_groups(keys: Sequence[str], groups: np.ndarray, seed: int) -> tuple[list[int], dict[int, list[int]]]:
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(i)
    # A group goes by its smallest key, so that the order of the rows changes nothing.
    rank = {g: _hash(f"{seed}:{min(keys[i] for i in m)}") for g, m in members.items()}
    return sorted(members, key=lambda g: rank[g]), members


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
