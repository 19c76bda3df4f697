"""Rows of any table or list as objects, for formats that are known by their fields and not by their files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from oirl.errors import DataError
from oirl.logs.importing.base import Refusal
from oirl.logs.importing.lines import MAX_LINE_BYTES, read_head, read_json_lines, read_whole
from oirl.logs.importing.runs import load_json
from oirl.logs.store import first_line, open_parquet

_ROWS = 1024


def read_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number, object) of a Parquet, Arrow, CSV, JSON Lines or JSON file, a `Refusal` where a row is none.

    Raises:
        DataError: If the file as a whole cannot be read.
    """
    head = read_head(path)
    if head.startswith(b"PAR1"):
        with open_parquet(path) as file:
            yield from _batches(path, file.iter_batches(_ROWS))
    elif _is_arrow(path, head):
        with _arrow(path) as reader:
            yield from _batches(path, reader)
    elif _is_csv(path):
        yield from _csv(path)
    elif head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        values = load_json(path, read_whole(path))
        for row, value in enumerate(values, 1):
            yield row, value if isinstance(value, dict) else _no_object(row, value)
    else:
        for row, value in read_json_lines(path):
            yield row, value if isinstance(value, (dict, Refusal)) else _no_object(row, value)


def first_object(path: Path, head: bytes) -> dict[str, Any]:
    """Return the first object of a file, as far as it can be told from the head; {} if there is none."""
    stat = path.stat()
    return _first_object(path, head, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)  # format after format asks for it
def _first_object(path: Path, head: bytes, time: int, size: int) -> dict[str, Any]:
    try:
        if head.startswith(b"PAR1") or _is_arrow(path, head) or _is_csv(path):
            return next((o for _, o in read_objects(path) if isinstance(o, dict)), {})
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        text = start.removeprefix(b"[").decode("utf-8", "ignore").lstrip()
        value, _ = json.JSONDecoder().raw_decode(text)
    except (DataError, ValueError, OverflowError, KeyError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _no_object(row: int, value: Any) -> Refusal:
    return Refusal(row, f"a {type(value).__name__}, not a JSON object", value)


def _is_csv(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def _is_arrow(path: Path, head: bytes) -> bool:
    return head.startswith(b"ARROW1") or (path.suffix in {".arrow", ".arrows"} and head.startswith(b"\xff\xff\xff\xff"))


def _arrow(path: Path) -> Any:
    try:
        source = pa.memory_map(str(path))
        if source.read(6) == b"ARROW1":
            file = ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            return pa.RecordBatchReader.from_batches(file.schema, batches)
        source.seek(0)
        return ipc.open_stream(source)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} is not a readable Arrow file: {first_line(e)}") from e


def _batches(path: Path, batches: Any) -> Iterator[tuple[int, Any]]:
    row = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # offsets out of bounds would end the process
            for start in range(0, batch.num_rows, _ROWS):
                for value in batch.slice(start, _ROWS).to_pylist():
                    row += 1
                    yield row, value
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as e:
        raise DataError(f"{path} is damaged after row {row}: {first_line(e)}") from e


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            delimiter = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
            reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter)
            header = next(reader, [])
            for row, cells in enumerate(reader, 1):
                if len(cells) == len(header):
                    yield row, {n: c if c else None for n, c in zip(header, cells, strict=True)}
                elif cells:
                    yield row, Refusal(row, f"{len(cells)} cells where the header has {len(header)}", cells[:50])
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 ({e.reason}); convert it with iconv") from e
    except (csv.Error, pa.ArrowException, OSError, EOFError) as e:
        raise DataError(f"{path} cannot be read as csv: {first_line(e)}") from e
    finally:
        csv.field_size_limit(before)
