"""Text files in blocks of whole lines, with flat memory whatever the lines hold."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from oirl.errors import DataError
from oirl.logs.importing.base import Refusal, Values
from oirl.logs.store import first_line

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 32 << 20
MAX_RATIO = 200
"""How many times its size a packed document may unpack to, from 16 MiB on; packed logs stay well below 100."""
_HARMLESS = 16 << 20
_MAX_VALUES = 4_000_000
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True, slots=True)
class Block:
    """Some whole lines.

    Attributes:
        data: The lines with their line breaks.
        first_line: Number of the first of them, counted from 1.
        line_count: Number of lines, the last one counted though it has no line break.
        refused: Lines too long to be read, which are not in `data`.
    """

    data: bytes
    first_line: int
    line_count: int
    refused: list[Refusal] = field(default_factory=list)


class CheckedText(io.RawIOBase):
    """A stream of text that is checked as it is read: it must be UTF-8, and its quotes are counted.

    Args:
        path: The file, for messages.
        stream: Its bytes, unpacked.
    """

    def __init__(self, path: Path, stream: pa.NativeFile) -> None:
        super().__init__()
        self._path = path
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._quotes = 0
        self._tail = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes.

        Raises:
            DataError: If they are not UTF-8.
        """
        data: bytes = self._stream.read(size) if size >= 0 else self._stream.read()
        try:
            self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as e:
            raise DataError(f"{self._path} is not UTF-8 ({e.reason}); convert it with iconv") from e
        self._quotes += data.count(b'"')
        self._tail = (self._tail + data)[-(1 << 16) :]
        return data

    def quote_left_open(self, last: Mapping[str, Values]) -> bool:
        """Say whether the text ended inside quotes, as far as `last`, the columns of its last rows, shows it.

        An odd number of quotes alone is no sign: 5" is five inches.
        """
        if self._quotes % 2 == 0:
            return False
        values = [column[-1] for column in last.values() if len(column)]
        line = self._tail.rstrip(b"\r\n").rpartition(b"\n")[2]
        return line.count(b'"') % 2 == 1 or any("\n" in (value.as_py() or "") for value in values)


def read_head(path: Path, size: int = 1 << 16) -> bytes:
    """Return the first bytes of a file, unpacked if it is gzipped.

    Raises:
        DataError: If the file cannot be read or unpacked.
    """
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            return stream.read(size)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path} cannot be read: {first_line(e)}") from e


def files_like(folder: Path, suffixes: tuple[str, ...], sniff: Callable[[Path, bytes], bool]) -> list[Path]:
    """Return the files of a folder, however deep, whose names end in `suffixes` and which `sniff` accepts."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.name.lower().removesuffix(".gz")
        if not name.endswith(suffixes) or name.endswith(".rejected.jsonl") or not path.is_file():
            continue
        try:
            if sniff(path, read_head(path)):
                found.append(path)
        except DataError:
            continue
    return found


def read_whole(path: Path) -> bytes:
    """Return a whole file, unpacked, without its byte order mark.

    Raises:
        DataError: If the file cannot be read, is truncated, is not UTF-8 by its first bytes, or unpacks to 200 times
            its size.
    """
    try:
        limit = largest_unpacked(path.stat().st_size)
        with pa.input_stream(str(path), compression="detect") as stream:
            pieces, size = [], 0
            while piece := stream.read(BLOCK_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise DataError(
                        f"{path} unpacks to more than {MAX_RATIO} times its size; is it made to fill memory?"
                    )
            return _without_bom(path, b"".join(pieces))
    except (pa.ArrowException, OSError, EOFError) as e:
        raise DataError(f"{path} cannot be read to its end: {first_line(e)}; is it truncated?") from e


def largest_unpacked(packed: int) -> int:
    """Return how many bytes may come out of `packed` ones."""
    return max(_HARMLESS, MAX_RATIO * packed)


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
                    yield Block(b"", line, 0, [refusal])
                    continue
                if cut:
                    text = rest + data[:cut]
                    block = Block(text, line, text.count(b"\n"))
                    line += block.line_count
                    rest = data[cut:]
                    yield block
                else:
                    rest += data
    except (pa.ArrowException, OSError, EOFError) as e:
        raise DataError(f"{path} cannot be read to its end: {first_line(e)}; is it truncated?") from e
    if rest:
        yield Block(rest, line, rest.count(b"\n") + (not rest.endswith(b"\n")))


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line that is not blank, a `Refusal` for one that is not JSON.

    Raises:
        DataError: As `read_blocks`.
    """
    for block in read_blocks(path):
        yield from ((r.row, r) for r in block.refused)
        yield from parse_json_lines(block)


def parse_json_lines(block: Block) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line of a block, a `Refusal` for one that is not JSON."""
    for row, line in enumerate(block.data.split(b"\n"), block.first_line):
        if not line.strip():
            continue
        if too_many_values(line):
            yield row, Refusal(row, f"a line of more than {_MAX_VALUES:,} values", _start(line))
            continue
        try:
            yield row, json.loads(line.decode())  # of bytes, json would guess UTF-16
        except (ValueError, RecursionError) as e:
            kind = "not UTF-8" if isinstance(e, UnicodeDecodeError) else f"not JSON ({str(e)[:200]})"
            yield row, Refusal(row, kind, _start(line))


def too_many_values(line: bytes) -> bool:
    """Say whether a line would fill the memory with values, however few bytes it takes in a packed file."""
    return len(line) > _MAX_VALUES and line.count(b",") + line.count(b"[") + line.count(b"{") > _MAX_VALUES


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
