"""A log as a plain table: JSON Lines and CSV, every column."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from oirl.logs.atomic import atomic_file
from oirl.logs.exporting.pipeline import ExportReport, check_written
from oirl.records import SCHEMAS

Rows = Callable[[], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per row, without its empty columns."""

    name: str = "jsonl"
    description: str = "JSON Lines, every column; `oirl import` reads it back unchanged"
    records: tuple[str, ...] = tuple(SCHEMAS)

    def write(self, rows: Rows, out: Path, report: ExportReport) -> None:
        """Write the rows."""
        with atomic_file(out) as temporary:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                for batch in rows():
                    for row in batch.to_pylist():
                        kept = {k: _plain(v) for k, v in row.items() if v is not None}
                        file.write(json.dumps(kept, ensure_ascii=False) + "\n")
                    report.written += batch.num_rows
            check_written(report)


@dataclass(frozen=True)
class Csv:
    """A table with a header; an empty cell is a value that is not known."""

    name: str = "csv"
    description: str = "CSV with a header, every column that holds anything"
    records: tuple[str, ...] = tuple(SCHEMAS)

    def write(self, rows: Rows, out: Path, report: ExportReport) -> None:
        """Write the rows."""
        used: dict[str, None] = {}
        for batch in rows():
            used |= {n: None for n in batch.schema.names if batch.column(n).null_count < batch.num_rows}
        names = [n for n in SCHEMAS[report.record].names if n in used]
        schema = pa.schema([(n, pa.string()) for n in names])
        with atomic_file(out) as temporary:
            with pcsv.CSVWriter(str(temporary), schema) as writer:
                for batch in rows():
                    columns = [_text(batch.column(n)) for n in names]
                    writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
                    report.written += batch.num_rows
            check_written(report)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _text(column: pa.Array) -> pa.Array:
    if pa.types.is_timestamp(column.type):
        return pc.strftime(column, format="%Y-%m-%dT%H:%M:%SZ")
    return column.cast(pa.string())


JSONL = JsonLines()
CSV = Csv()
