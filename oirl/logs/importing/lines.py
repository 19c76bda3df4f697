"""Text files in blocks of whole lines, with flat memory whatever the lines hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from oirl.errors import DataError
from oirl.logs.importing.base import Refusal
from oirl.logs.store import first_line

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 32 << 20
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True, slots=True)
class Block:
    """Some whole lines.

    Attributes:
        data: The lines with their line breaks.
        first_line: Number of the first of them, counted from 1.
        refused: Lines too long to be read, which are not in `data`.
    """

    data: bytes
    first_line: int
    refused: list[Refusal] = field(default_factory=list)

    @property
    def line_count(self) -> int:
        """Number of lines, the last one counted though it has no line break."""
        return self.data.count(b"\n") + (bool(self.data) and not self.data.endswith(b"\n"))


def read_head(path: Path, size: int = 1 << 16) -> bytes:
    """Return the first bytes of a file, unpacked if it is gzipped; empty for what cannot be unpacked."""
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            return stream.read(size)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path} cannot be read: {first_line(e)}") from e


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield a file, gzipped or not, in blocks of whole lines; lines of more than 32 MiB are refused.

    Raises:
        DataError: If the file cannot be read, is truncated, or is not UTF-8 by its first bytes.
    """
    line = 1
    rest = b""
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            first = True
            while data := stream.read(BLOCK_BYTES):
                if first:
                    data, first = _without_bom(path, data), False
                cut = data.rfind(b"\n") + 1
                if not cut and len(rest) + len(data) > MAX_LINE_BYTES:
                    refusal = Refusal(line, f"a line of more than {MAX_LINE_BYTES >> 20} MiB", _start(rest))
                    data = _skip_line(stream)
                    line += 1
                    rest = data
                    yield Block(b"", line, [refusal])
                    continue
                if cut:
                    block = Block(rest + data[:cut], line)
                    line += block.line_count
                    rest = data[cut:]
                    yield block
                else:
                    rest += data
    except (pa.ArrowException, OSError, EOFError) as e:
        raise DataError(f"{path} cannot be read to its end: {first_line(e)}; is it truncated?") from e
    if rest:
        yield Block(rest, line)


def _skip_line(stream: pa.NativeFile) -> bytes:
    """Read on to the next line break and return what follows it."""
    while data := stream.read(BLOCK_BYTES):
        cut = data.find(b"\n")
        if cut >= 0:
            return data[cut + 1 :]
    return b""


def _without_bom(path: Path, data: bytes) -> bytes:
    if data[:2] in _BOMS:
        raise DataError(f"{path} is {_BOMS[data[:2]]}; it must be UTF-8 (convert it with iconv)")
    return data.removeprefix(b"\xef\xbb\xbf")


def _start(data: bytes) -> str:
    return data[:2000].decode("utf-8", "replace")
