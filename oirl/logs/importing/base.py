"""What an importer is: it recognises files of one format and yields their rows in chunks.

An importer is one object behind the registry (kind "formats"). It knows nothing of ids, checks or files that are
written: the pipeline does that for all formats alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

Values: TypeAlias = "pa.Array | list[Any]"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that was not kept.

    Attributes:
        row: Line of a text file, row of a table or list, counted from 1.
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


@dataclass(slots=True)
class PromptNote:
    """Where a prompt of a file comes from, and how sure that is.

    Attributes:
        prompt: The prompt template.
        source: "format" if the format keeps the template, "recovered" if it was found by aligning rendered prompts
            with their queries.
        rows: Rows of the file under this prompt whose rendered text is known.
        fits: Those whose rendered text is the template, filled; the rest differ from it.
    """

    prompt: str
    source: str
    rows: int = 0
    fits: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the note as a dictionary for JSON."""
        return asdict(self)


@dataclass(slots=True)
class Request:
    """What the user asks of one file beyond its rows, and what the importer has to say of it.

    Attributes:
        fields: Column of the record -> name of the field that holds it, for formats with free field names.
        mapped: Those of `fields` that the user has named; formats with a meaning of their own follow only these.
        filter: Which of several filters of one run to read (lm-eval).
        scorer: Which score gives the verdict, where a format keeps several.
        warnings: What the importer found worth saying, added by it.
        prompts: Where each prompt comes from, added by the importer.
        followed: Set by the importer where `filter` was among the choices of a file.
        unfollowed: Set where a file has no choice of filters, and another than `filter`: what to say if no file of the
            import has it.
    """

    fields: Mapping[str, str]
    mapped: Mapping[str, str] = field(default_factory=dict)
    filter: str | None = None
    scorer: str | None = None
    warnings: list[str] = field(default_factory=list)
    prompts: list[PromptNote] = field(default_factory=list)
    followed: bool = False
    unfollowed: str | None = None


class Importer(Protocol):
    """One format that `oirl import` reads.

    A format of a tool may also have `find(folder) -> list[Path]`, the runs of that tool in a folder, and `options`,
    which of "filter" and "scorer" it follows.
    """

    name: str
    description: str
    record: str
    """A key of `records.SCHEMAS`: what a row of this format becomes."""

    def sniff(self, path: Path, head: bytes) -> bool:
        """Say whether the file `path` is of this format; `head` holds its first bytes, unpacked."""
        ...

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield the rows of `path`, a file that `sniff` has accepted or a path that `find` has given.

        Raises:
            DataError: If the file as a whole cannot be read.
        """
        ...
