"""What an importer is: it recognises files of one format and yields their rows in chunks.

An importer is one object behind the registry (kind "formats"). It knows nothing of ids, checks or files that are
written: the pipeline does that for all formats alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

Values: TypeAlias = "pa.Array | list[Any]"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that was not kept.

    Attributes:
        row: Line of a text file, row of a table, counted from 1.
        reason: What is wrong, and what is allowed.
        raw: What stood there, as far as it could be read.
    """

    row: int
    reason: str
    raw: Any = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a file, by column.

    Attributes:
        columns: Name of a column of the record -> values of any type, all of one length.
        rows: Line or row number of each, counted from 1, int64.
        refused: Rows that could not even be read; they are not among the columns.
    """

    columns: Mapping[str, Values]
    rows: np.ndarray
    refused: list[Refusal] = field(default_factory=list)


class Importer(Protocol):
    """One format that `oirl import` reads."""

    name: str
    description: str
    record: str
    """A key of `records.SCHEMAS`: what a row of this format becomes."""

    def sniff(self, path: Path, head: bytes) -> bool:
        """Say whether `path` is of this format; `head` holds its first bytes, unpacked, or is empty for a folder."""
        ...

    def chunks(self, path: Path, fields: Mapping[str, str]) -> Iterator[Chunk]:
        """Yield the rows of `path`.

        Args:
            path: A file, or a folder that `sniff` has accepted.
            fields: Column of the record -> name of the field that holds it, for formats with free field names.

        Raises:
            DataError: If the file as a whole cannot be read.
        """
        ...
