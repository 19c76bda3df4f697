"""What tests of the formats share: where the fixtures are, and an import that is read back at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import oirl
from oirl.logs.importing.pipeline import ImportReport

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"

Row = dict[str, Any]


def read(source: str | Path, folder: Path, **options: Any) -> tuple[ImportReport, list[Row]]:
    """Import `source` and return the report and the rows, with `metadata` as objects."""
    out = folder / "out" / "log.parquet"
    out.parent.mkdir(exist_ok=True)
    report = oirl.import_log(source, out, **options)
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == report.rows_kept
    return report, [row | {"metadata": json.loads(row["metadata"] or "{}")} for row in rows]


def column(rows: Iterable[Row], *names: str) -> list[Any]:
    """Return one column as a list, or several as a list of tuples."""
    return [row[names[0]] if len(names) == 1 else tuple(row[n] for n in names) for row in rows]


def refused(folder: Path) -> list[tuple[int, str]]:
    """Return (row, reason) of what the last import refused."""
    lines = (folder / "out" / "log.rejected.jsonl").read_text().splitlines()
    return [(entry["row"], entry["reason"]) for entry in map(json.loads, lines)]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
