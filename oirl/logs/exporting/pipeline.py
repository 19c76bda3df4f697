"""`export_log`: one log, or one file of preference pairs, to a format of another tool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from oirl.errors import ConfigError, DataError
from oirl.logs.store import Source, find_files, record_of, scan_log
from oirl.registry import resolve


@dataclass(slots=True)
class ExportReport:
    """What an export wrote and left out.

    Attributes:
        out: The file or folder that was written.
        format: The format.
        record: What the source holds: "interactions", "preferences" or "queries".
        rows_read: Rows of the source.
        written: Examples, pairs or tests written.
        left_out: Reason -> number of rows of the source that were left out for it.
        next: What to type next, where the tool is run on the result.
    """

    out: str
    format: str
    record: str
    rows_read: int = 0
    written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    next: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return {**asdict(self), "left_out": dict(self.left_out)}


class Exporter(Protocol):
    """One format that `oirl export` writes."""

    name: str
    description: str
    records: tuple[str, ...]
    """The records that it takes."""

    def write(self, rows: Callable[[], Iterator[pa.RecordBatch]], out: Path, report: ExportReport) -> None:
        """Write the rows, whole or not at all, and count in the report what was written and left out."""
        ...


def export_log(sources: Source | Sequence[Source], out: Source, *, to: str) -> ExportReport:
    """Write a log, or preference pairs, as files that another tool loads.

    Args:
        sources: The log or the preference pairs: files, folders or patterns.
        out: The file or folder to write.
        to: A registered export format.

    Raises:
        UnknownNameError: If the format is not known.
        ConfigError: If the format cannot hold what the source holds, or `out` is a source.
        DataError: If nothing could be written.
    """
    exporter: Exporter = resolve("exports", to)
    record = record_of(sources)
    if record not in exporter.records:
        raise ConfigError(f"--to {to} writes {' or '.join(exporter.records)}, but the source holds {record}")
    if Path(out).resolve() in {path.resolve() for path in find_files(sources, (".parquet",))}:
        raise ConfigError(f"{out} is also the source; name another file to write")
    report = ExportReport(str(out), to, record)
    report.rows_read = sum(batch.num_rows for batch in scan_log(sources, ["query"], record=record))
    exporter.write(lambda: scan_log(sources, record=record), Path(out), report)
    return report


def check_written(report: ExportReport) -> None:
    """Refuse a result without content, before it takes the place of a file.

    Raises:
        DataError: If nothing was written; the message says why.
    """
    if not report.written:
        why = "; ".join(f"{count:,} rows: {reason}" for reason, count in report.left_out.most_common(3))
        raise DataError(f"--to {report.format}: nothing to write; {why or 'the source has no rows'}")
