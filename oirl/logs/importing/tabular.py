"""Tables whose columns the user names: JSON Lines, CSV, TSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.ipc as ipc
import pyarrow.json as pjson

from oirl.errors import DataError, nearest
from oirl.logs.importing.base import Chunk, Refusal, Request, Values
from oirl.logs.importing.coerce import column_at, column_paths
from oirl.logs.importing.lines import (
    Block,
    CheckedText,
    parse_json_lines,
    read_blocks,
    read_head,
    read_whole,
    too_many_values,
)
from oirl.logs.importing.runs import dig
from oirl.logs.store import BATCH_ROWS, first_line, open_parquet
from oirl.records import SCHEMAS

HEAD_ROWS = 200
_CSV_BLOCK = 1 << 24
_ARROW_TYPES: dict[type, pa.DataType] = {bool: pa.bool_(), str: pa.string(), int: pa.int64(), float: pa.float64()}


def check_fields(path: Path, fields: Mapping[str, str], there: Iterable[str], explicit: Iterable[str]) -> None:
    """Refuse a file that lacks a field that is required or that the user has named.

    Args:
        path: The file, for the message.
        fields: Column of the record -> field of the file.
        there: The fields that the file has.
        explicit: Columns that must come from the file.

    Raises:
        DataError: Naming the missing field and those that are there.
    """
    have = list(there)
    for column in explicit:
        source = fields[column]
        if source not in have:
            named = f"no field {source!r}{nearest(source, have)}"
            raise DataError(
                f"{path}: {named} for the column {column!r}; fields there: {', '.join(have) or 'none'}; "
                f"use --map {column}=FIELD, or --set {column}=TEXT where it is the same for all rows"
            )


def needed(fields: Mapping[str, str]) -> list[str]:
    """Return the columns that the file must have: the texts that have no default, and those mapped by name."""
    return [c for c, source in fields.items() if c in {"query", "prompt"} or c != source]


@dataclass(frozen=True)
class JsonLines:
    """JSON objects, one a line, plain or gzipped; also a file that holds one JSON array of objects."""

    name: str = "jsonl"
    description: str = "JSON Lines (.jsonl, .ndjson, also .gz), or one JSON array of objects (.json)"
    record: str = "interactions"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept what begins like a JSON object or array."""
        return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield the objects; a block of lines that Arrow cannot read at once is read line by line."""
        fields = request.fields
        schema: pa.Schema | None = None
        empty = True
        if read_head(path).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from self._array(path, fields)
            return
        for block in read_blocks(path):
            if schema is None:
                head = [o for o in map(_try_object, block.data.split(b"\n", HEAD_ROWS)[:HEAD_ROWS]) if o]
                if head:
                    check_fields(path, fields, _fields_of(head, fields), needed(fields))
                    schema = _json_schema(head, fields)
            empty = empty and not block.data.strip() and not block.refused
            columns = None if schema is None or block.refused else _arrow_columns(block, schema, fields)
            if columns is not None:
                count = len(next(iter(columns.values())))
                yield Chunk(columns, np.arange(block.first_line, block.first_line + count))
            else:
                yield _object_chunk(parse_json_lines(block), fields, block.refused)
        if empty:
            raise DataError(f"{path} is empty; JSON objects, one a line, are needed")

    def _array(self, path: Path, fields: Mapping[str, str]) -> Iterator[Chunk]:
        try:
            objects = json.loads(read_whole(path))
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path} begins like a JSON array, but is not one: {e}") from e
        head = [o for o in objects[:HEAD_ROWS] if isinstance(o, dict)]
        check_fields(path, fields, _fields_of(head, fields), needed(fields))
        for start in range(0, len(objects), BATCH_ROWS):
            yield _object_chunk(enumerate(objects[start : start + BATCH_ROWS], start + 1), fields, [])


@dataclass(frozen=True)
class Delimited:
    """A table in text with a header row; the first delimiter of the class separates the cells."""

    name: str
    description: str
    delimiter: str
    suffixes: tuple[str, ...]
    record: str = "interactions"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept by the end of the file's name, before .gz."""
        name = path.name.lower().removesuffix(".gz")
        return bool(head) and name.endswith(self.suffixes) and b"\0" not in head

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield the rows; one with too few or too many cells is refused."""
        fields = request.fields
        refused: list[Refusal] = []

        def invalid(row: pcsv.InvalidRow) -> str:
            reason = f"{row.actual_columns} cells where the header has {row.expected_columns}"
            refused.append(Refusal(row.number or 0, reason, (row.text or "")[:2000]))
            return "skip"

        header = self._header(path)
        check_fields(path, fields, header, needed(fields))
        wanted = [source for source in dict.fromkeys(fields.values()) if source in header]
        repeated = [name for name in wanted if header.count(name) > 1]
        if repeated:
            raise DataError(f"{path}: the header names {repeated[0]!r} twice; rename one of the two")
        try:
            with pa.input_stream(str(path), compression="detect") as stream:
                text = CheckedText(path, stream)
                reader = pcsv.open_csv(
                    pa.PythonFile(text, mode="r"),
                    pcsv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK),
                    pcsv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=invalid),
                    pcsv.ConvertOptions(
                        include_columns=wanted,
                        column_types=dict.fromkeys(wanted, pa.string()),
                        strings_can_be_null=True,
                        null_values=[""],
                        quoted_strings_can_be_null=False,
                    ),
                )
                last: Chunk | None = None
                for last in self._batches(reader, fields, refused):
                    yield last
                if last is not None and text.quote_left_open(last.columns):
                    raise DataError(f"{path}: a quote is left open, so that the rows after it are lost; is it cut off?")
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{path} cannot be read as {self.name}: {_explain(e)}") from e

    def _batches(
        self, reader: Iterable[pa.RecordBatch], fields: Mapping[str, str], refused: list[Refusal]
    ) -> Iterator[Chunk]:
        row = 0
        for batch in reader:
            # A refused row has a number of its own, the header being row 1; the others fill the gaps. Arrow reads a
            # block ahead, so that some refused rows belong to a later batch.
            skipped = np.sort(np.array([r.row - 1 for r in refused], dtype=np.int64))
            rows = np.arange(row + 1, row + 1 + batch.num_rows + len(skipped))
            rows = rows[~np.isin(rows, skipped)][: batch.num_rows]
            if len(rows):
                row = int(rows[-1])
            given = [Refusal(r.row - 1, r.reason, r.raw) for r in refused if r.row - 1 <= row]
            refused[:] = [r for r in refused if r.row - 1 > row]
            columns = {c: batch.column(s) for c, s in fields.items() if s in batch.schema.names}
            # "" in quotes is an empty reply; elsewhere it is nothing, as tools quote empty cells too.
            columns = {c: v if c == "response" else _without_empty(v) for c, v in columns.items()}
            if "prompt" in columns:  # an empty prompt is a prompt
                columns["prompt"] = pc.fill_null(columns["prompt"], "")
            yield Chunk(columns, rows, given)
        if refused:
            yield Chunk({}, np.zeros(0, dtype=np.int64), [Refusal(r.row - 1, r.reason, r.raw) for r in refused])

    def _header(self, path: Path) -> list[str]:
        text = read_head(path, 1 << 20).decode("utf-8-sig", "replace")
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter), [])
        except csv.Error as e:
            raise DataError(f"{path} cannot be read as {self.name}: {e}") from e
        if any("\ufffd" in name for name in header):
            raise DataError(f"{path}: the header is not UTF-8; convert the file with iconv")
        return header


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file with columns of any names."""

    name: str = "parquet"
    description: str = "Parquet table (.parquet)"
    record: str = "interactions"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept by Parquet's first bytes."""
        return head.startswith(b"PAR1")

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield the rows in batches."""
        fields = request.fields
        with open_parquet(path) as file:
            check_fields(path, fields, column_paths(file.schema_arrow, fields), needed(fields))
            names = file.schema_arrow.names
            tops = [s if s in names else s.split(".")[0] for s in fields.values()]
            wanted = [name for name in dict.fromkeys(tops) if name in names]
            try:
                yield from _batch_chunks(file.iter_batches(BATCH_ROWS, columns=wanted), fields)
            except (pa.ArrowException, OSError) as e:
                raise DataError(f"{path} is damaged: {first_line(e)}") from e


@dataclass(frozen=True)
class ArrowTable:
    """An Arrow IPC file or stream, also called Feather."""

    name: str = "arrow"
    description: str = "Arrow IPC file or stream (.arrow, .feather), folder of a saved data set, hf://NAME of the hub"
    record: str = "interactions"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept by Arrow's first bytes, or by name for a stream, which has none of its own."""
        return head.startswith(b"ARROW1") or (
            path.suffix in {".arrow", ".arrows"} and head.startswith(b"\xff\xff\xff\xff")
        )

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield the record batches."""
        fields = request.fields
        try:
            with pa.memory_map(str(path)) as source:
                if source.read(6) == b"ARROW1":
                    file = ipc.open_file(source)
                    batches = (file.get_batch(i) for i in range(file.num_record_batches))
                    schema = file.schema
                else:
                    source.seek(0)
                    stream = ipc.open_stream(source)
                    batches, schema = iter(stream), stream.schema
                check_fields(path, fields, column_paths(schema, fields), needed(fields))
                told = "split" in schema.names or "split" in request.mapped or "split" not in fields
                split = None if told else _saved_split(path)
                for chunk in _batch_chunks(batches, fields):
                    if split:
                        chunk = replace(chunk, columns={**chunk.columns, "split": [split] * len(chunk.rows)})
                    yield chunk
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            raise DataError(f"{path} is not a readable Arrow file: {first_line(e)}") from e


def _saved_split(path: Path) -> str | None:
    """Return the split that a file of a saved set of splits belongs to."""
    return path.parent.name if (path.parent.parent / "dataset_dict.json").is_file() else None


def _without_empty(values: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)


def _batch_chunks(batches: Iterable[pa.RecordBatch], fields: Mapping[str, str]) -> Iterator[Chunk]:
    row = 1
    for whole in batches:
        for start in range(0, whole.num_rows, BATCH_ROWS):
            batch = whole.slice(start, BATCH_ROWS)
            found = {c: column_at(batch, s) for c, s in fields.items()}
            columns = {c: v for c, v in found.items() if v is not None}
            rows = np.arange(row, row + batch.num_rows)
            row += batch.num_rows
            yield _checked(columns, rows)


def _checked(columns: dict[str, Any], rows: np.ndarray) -> Chunk:
    """Return a chunk without the rows whose text is not UTF-8, which Arrow and Parquet files may hold.

    Raises:
        pa.ArrowException: If a column is damaged.
    """
    bad = np.zeros(len(rows), dtype=bool)
    reasons: dict[int, str] = {}
    for name, values in columns.items():
        values.validate()
        try:
            values.validate(full=True)
        except pa.ArrowException as e:
            if "UTF8" not in str(e):
                raise
            for i, value in enumerate(values.cast(pa.large_binary()).to_pylist()):
                try:
                    (value or b"").decode()
                except UnicodeDecodeError:
                    bad[i] = True
                    reasons.setdefault(i, f"{name} is not UTF-8")
    if not reasons:
        return Chunk(columns, rows)
    kept = pa.array(~bad)
    refused = [Refusal(int(rows[i]), reason) for i, reason in sorted(reasons.items())]
    return Chunk({n: v.filter(kept) for n, v in columns.items()}, rows[~bad], refused)


def _fields_of(head: list[dict[str, Any]], fields: Mapping[str, str]) -> list[str]:
    """Return the keys of objects, and the dotted paths among `fields` that lead somewhere in one of them."""
    dotted = [s for s in fields.values() if any(dig(o, s) is not None for o in head)]
    return list(dict.fromkeys([*(k for o in head for k in o), *dotted]))


def _try_object(line: bytes) -> dict[str, Any] | None:
    if too_many_values(line):
        return None
    try:
        value = json.loads(line.decode())  # of bytes, json would guess UTF-16
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_schema(head: list[dict[str, Any]], fields: Mapping[str, str]) -> pa.Schema:
    # Types are taken from the first rows, never guessed by Arrow, which would read a query such as
    # "2024-01-01" as a time.
    types = {f.name: f.type for schema in SCHEMAS.values() for f in schema}
    found = {}
    for column, source in fields.items():
        seen = {type(o[source]) for o in head if o.get(source) is not None}
        # A number in a text column keeps its digits only if Arrow does not make a float of it.
        seen = {str} if seen == {float} and pa.types.is_string(types[column]) else seen
        arrow = _ARROW_TYPES.get(seen.pop()) if len(seen) == 1 else None
        found[source] = arrow or types[column]
        if pa.types.is_timestamp(found[source]):
            found[source] = pa.string()
    return pa.schema(found.items())


def _arrow_columns(block: Block, schema: pa.Schema, fields: Mapping[str, str]) -> dict[str, Values] | None:
    # pyarrow takes null for a row, and a block that begins with null ends the process.
    if b"\nnull" in block.data or block.data.lstrip()[:4] == b"null":
        return None
    try:
        table = pjson.read_json(
            pa.BufferReader(block.data),
            pjson.ReadOptions(block_size=1 << 22),
            pjson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowException, OSError):
        return None
    if table.num_rows != block.line_count:
        return None
    try:
        table.validate(full=True)
    except pa.ArrowException:
        return None
    # A dotted field, such as doc.question, is not a key of the objects: only the slow way finds it.
    if any("." in source and table.column(source).null_count == len(table) for source in fields.values()):
        return None
    return {c: table.column(s) for c, s in fields.items()}


def _object_chunk(objects: Iterable[tuple[int, Any]], fields: Mapping[str, str], refused: list[Refusal]) -> Chunk:
    rows: list[int] = []
    columns: dict[str, list[Any]] = {c: [] for c in fields}
    refused = list(refused)
    for number, value in objects:
        if isinstance(value, Refusal):
            refused.append(value)
        elif not isinstance(value, dict):
            refused.append(Refusal(number, f"a {type(value).__name__}, not a JSON object", value))
        else:
            rows.append(number)
            for column, source in fields.items():
                columns[column].append(dig(value, source))
    return Chunk(columns, np.array(rows, dtype=np.int64), refused)


def _explain(error: BaseException) -> str:
    text = first_line(error)
    if "UTF8" in text or "utf-8" in text.lower():
        return f"{text}; the file must be UTF-8 (convert it with iconv)"
    if "straddling" in text:
        return "a row is longer than 16 MiB (is a quote left open?)"
    return text


JSONL = JsonLines()
CSV = Delimited("csv", "comma-separated values with a header (.csv, also .gz)", ",", (".csv",))
TSV = Delimited("tsv", "tab-separated values with a header (.tsv, also .gz)", "\t", (".tsv", ".tab"))
PARQUET = ParquetTable()
ARROW = ArrowTable()
