"""Chunks of raw columns to checked record batches: types, ids, replicates, verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.errors import ConfigError
from oirl.logs.grading import Grader
from oirl.logs.importing.base import Chunk, Refusal
from oirl.logs.importing.coerce import coerce
from oirl.logs.importing.keys import KeyCounter, row_keys
from oirl.logs.text import normalise, template_id, text_id
from oirl.records import SCHEMAS

_ID_OF = {"query_id": ("query",), "prompt_id": ("prompt",), "pair_id": ("query", "chosen", "rejected")}
_MAY_BE_BLANK = frozenset({"prompt"})
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_CELL = ("query_id", "prompt_id", "model", "run_id")


class RowBuilder:
    """Make batches of one record from chunks, remembering across chunks what ids stand for.

    Args:
        record: A key of `records.SCHEMAS`.
        constants: Column -> value for all rows.
        grader: Gives the verdicts, if not None.
    """

    def __init__(self, record: str, constants: Mapping[str, str], grader: Grader | None = None) -> None:
        self.record = record
        self.schema = SCHEMAS[record]
        self.n_rows = 0
        self.n_verdicts = 0
        self._constants = {name: self._constant(name, value) for name, value in constants.items()}
        self._grader = grader
        self._cells = KeyCounter()
        self._numbered = KeyCounter()
        self._queries = KeyCounter()
        self._prompts = KeyCounter()
        self._texts: dict[str, dict[str, int]] = {"query_id": {}, "prompt_id": {}}

    @property
    def n_queries(self) -> int:
        """Distinct queries so far."""
        return len(self._queries)

    @property
    def n_prompts(self) -> int:
        """Distinct prompts so far."""
        return len(self._prompts)

    def build(self, chunk: Chunk) -> tuple[pa.RecordBatch, list[Refusal]]:
        """Return the rows of a chunk that fit, and the others with reasons."""
        n = len(chunk.rows)
        bad: dict[int, str] = {}
        columns: dict[str, pa.Array] = {}
        for field in self.schema:
            columns[field.name] = self._column(field, chunk, n, bad)
        made = self._default_ids(columns)
        self._check_required(columns, bad)
        self._check_ranges(columns, bad)
        self._check_ids(columns, made, bad)
        keep = _keep_mask(n, bad)
        columns = _filter(columns, keep)
        rows = np.flatnonzero(keep)
        duplicates = self._number_replicates(columns)
        if duplicates:
            bad |= {int(rows[i]): reason for i, reason in duplicates.items()}
            columns = _filter(columns, _keep_mask(len(rows), duplicates))
        if self._grader:
            columns["correct"] = self._grader.grade(columns["response"], columns["answer"], columns["correct"])
        self.n_rows += len(columns[self.schema.names[0]])
        if "correct" in columns:
            self.n_verdicts += len(columns["correct"]) - columns["correct"].null_count
        batch = pa.RecordBatch.from_arrays([columns[f.name] for f in self.schema], schema=self.schema)
        refused = [Refusal(int(chunk.rows[i]), reason, _raw_row(chunk, i)) for i, reason in sorted(bad.items())]
        return batch, sorted(chunk.refused + refused, key=lambda r: r.row)

    def _constant(self, name: str, value: str) -> pa.Scalar:
        array, bad = coerce(self.schema.field(name), [value])
        if bad:
            raise ConfigError(f"--set {name}={value}: {bad[0]}")
        return array[0]

    def _column(self, field: pa.Field, chunk: Chunk, n: int, bad: dict[int, str]) -> pa.Array:
        if field.name in self._constants:
            return pa.repeat(self._constants[field.name], n)
        values = chunk.columns.get(field.name)
        if values is None:
            return pa.nulls(n, field.type)
        array, reasons = coerce(field, values)
        for i, reason in reasons.items():
            bad.setdefault(i, reason)
        return array

    def _default_ids(self, columns: dict[str, pa.Array]) -> set[str]:
        """Fill ids that are missing; return the names of those that were all missing, and so cannot conflict."""
        made = set()
        for name, sources in _ID_OF.items():
            if name in columns and columns[name].null_count:
                if columns[name].null_count == len(columns[name]):
                    made.add(name)
                columns[name] = pc.coalesce(columns[name], _text_ids(name, [columns[s] for s in sources]))
        return made

    def _check_required(self, columns: dict[str, pa.Array], bad: dict[int, str]) -> None:
        # An id that comes from a text is empty because that text is: the text is named first.
        required = [f for f in self.schema if not f.nullable and f.name != "replicate"]
        for field in sorted(required, key=lambda f: f.name in _ID_OF):
            column = columns[field.name]
            empty = column.is_null()
            if field.name not in _MAY_BE_BLANK:
                blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(column)), 0)
                empty = pc.or_(empty, pc.fill_null(blank, False))
            for i in _indices(empty):
                bad.setdefault(i, f"{field.name} is empty: it is required")

    def _check_ranges(self, columns: dict[str, pa.Array], bad: dict[int, str]) -> None:
        if self.record != "interactions":
            return
        p = columns["propensity"]
        wrong = pc.fill_null(pc.or_(pc.less_equal(p, 0.0), pc.greater(p, 1.0)), False)
        for i in _indices(wrong):
            bad.setdefault(i, f"propensity is {p[i].as_py()}: a probability above 0, up to 1, is needed")
        for i in _indices(pc.fill_null(pc.less(columns["replicate"], 0), False)):
            bad.setdefault(i, "replicate is negative: 0, 1, … are allowed")

    def _check_ids(self, columns: dict[str, pa.Array], made: set[str], bad: dict[int, str]) -> None:
        """Refuse rows whose id has stood for another text; remember what each given id stands for."""
        for name, known in self._texts.items():
            if name not in columns or name in made:
                continue
            source = _ID_OF[name][0]
            # Rows refused already decide nothing.
            good = np.flatnonzero(_keep_mask(len(columns[name]), bad))
            ids = columns[name].take(pa.array(good)).dictionary_encode()
            texts = columns[source].take(pa.array(good)).dictionary_encode()
            # Ids of queries come from normalised text: another spelling is the same query.
            shown = [normalise(t) if source == "query" else t for t in texts.dictionary.to_pylist()]
            width = max(len(shown), 1)
            pairs = np.asarray(ids.indices, dtype=np.int64) * width + np.asarray(texts.indices, dtype=np.int64)
            distinct, first = np.unique(pairs, return_index=True)
            names = ids.dictionary.to_pylist()
            wrong = []
            for pair in distinct[np.argsort(first)].tolist():
                text = hash(shown[pair % width])
                if known.setdefault(names[pair // width], text) != text:
                    wrong.append(pair)
            for i in good[np.isin(pairs, wrong)].tolist() if wrong else ():
                what = columns[name][i].as_py()
                bad[i] = f"{name} is {what!r}: it stood for another {source} in an earlier row"

    def _number_replicates(self, columns: dict[str, pa.Array]) -> dict[int, str]:
        """Number repeated runs that carry no number; return the rows that repeat a number."""
        if self.record != "interactions":
            keys = row_keys([columns[self.schema.names[0]]])
            seen = self._cells.add(keys)
            self._queries.add(row_keys([columns["query"]]) if self.record == "preferences" else keys)
            return {int(i): f"{self.schema.names[0]} repeats an earlier row" for i in np.flatnonzero(seen)}
        self._queries.add(row_keys([columns["query_id"]]))
        self._prompts.add(row_keys([columns["prompt_id"]]))
        cell = row_keys([columns[name] for name in _CELL])
        given = columns["replicate"]
        missing = given.is_null().to_numpy(zero_copy_only=False)
        numbers = pc.fill_null(given, 0).to_numpy(zero_copy_only=False).astype(np.int64)
        refused: dict[int, str] = {}
        if not missing.all():
            at = np.flatnonzero(~missing)
            seen = self._numbered.add(_numbered_keys(cell[at], numbers[at])) > 0
            seen |= numbers[at] < self._cells.counts(cell[at])
            reason = "the same query, prompt, model, run and replicate as an earlier row"
            refused = {int(i): reason for i in at[seen]}
        waiting = np.flatnonzero(missing)
        while len(waiting):
            numbers[waiting] = self._cells.add(cell[waiting])
            if not len(self._numbered):
                break
            # A number that an earlier row carries is passed over.
            taken = self._numbered.counts(_numbered_keys(cell[waiting], numbers[waiting])) > 0
            waiting = waiting[taken]
        columns["replicate"] = pa.array(numbers, pa.int32())
        return refused


def _numbered_keys(cells: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return (cells ^ (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)) * _MIX


def _text_ids(name: str, columns: list[pa.Array]) -> pa.Array:
    if len(columns) > 1:
        joined = pc.binary_join_element_wise(*columns, "\x1f", null_handling="emit_null")
    else:
        joined = columns[0]
    encoded = joined.dictionary_encode()
    to_id = template_id if name == "prompt_id" else text_id
    ids = pa.array([to_id(t) for t in encoded.dictionary.to_pylist()], pa.string())
    return ids.take(encoded.indices)


def _indices(mask: pa.Array) -> list[int]:
    if not pc.any(mask).as_py():
        return []
    return [int(i) for i in mask.to_numpy(zero_copy_only=False).nonzero()[0]]


def _keep_mask(n: int, bad: Mapping[int, str]) -> np.ndarray:
    keep = np.ones(n, dtype=bool)
    keep[list(bad)] = False
    return keep


def _filter(columns: dict[str, pa.Array], keep: np.ndarray) -> dict[str, pa.Array]:
    if keep.all():
        return columns
    mask = pa.array(keep)
    return {name: column.filter(mask) for name, column in columns.items()}


def _python_value(value: Any) -> Any:
    if not isinstance(value, pa.Scalar):
        return value
    try:
        return value.as_py()
    except ValueError:  # nanoseconds, which Python's times do not have
        return value.cast(pa.string()).as_py()


def _raw_row(chunk: Chunk, i: int) -> dict[str, Any]:
    raw = {}
    for name, values in chunk.columns.items():
        value = _python_value(values[i])
        if value is not None:
            raw[name] = value
    return raw
