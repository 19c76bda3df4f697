"""Zip archives of others, read without trust: no file is written, no member grows beyond a limit.

Python's `zipfile` lists members that are packed with Zstandard (method 93), but reads them from Python 3.14 on only.
Members are therefore unpacked here, with Arrow's codec for that method.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from oirl.errors import DataError
from oirl.logs.importing.lines import MAX_RATIO, largest_unpacked
from oirl.logs.store import first_line

MAX_MEMBER_BYTES = 256 << 20
_MAX_MEMBERS = 1_000_000
_ENCRYPTED = 0x1
_STEP = 1 << 20


class MemberError(Exception):
    """A member that cannot be read, while others may be."""


class Archive:
    """A zip archive, open for reading.

    Args:
        path: The file.

    Raises:
        DataError: If it is no zip archive, is cut off, or its members overlap, as in a zip bomb.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror}") from e
        try:
            with zipfile.ZipFile(self._file) as directory:
                members = directory.infolist()
                start = directory.start_dir
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, UnicodeDecodeError) as e:
            self._file.close()
            raise DataError(f"{path} is not a readable zip archive: {first_line(e)}; is it cut off?") from e
        # A later member of the same name replaces an earlier one.
        self._members = {m.filename: m for m in members}
        try:
            self._check(members, start)
        except DataError:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def names(self) -> Iterator[str]:
        """Yield the names of the members."""
        yield from self._members

    def read(self, name: str) -> bytes:
        """Return the content of a member.

        Raises:
            MemberError: If it is missing, damaged, encrypted, packed in another way, larger than 256 MiB, or unpacks to
                200 times its size.
        """
        member = self._members.get(name)
        if member is None:
            raise MemberError("not in the archive")
        if member.flag_bits & _ENCRYPTED:
            raise MemberError("it is encrypted")
        if member.file_size > MAX_MEMBER_BYTES:
            raise MemberError(f"it is larger than {MAX_MEMBER_BYTES >> 20} MiB")
        if member.file_size > largest_unpacked(member.compress_size):
            raise MemberError(f"it unpacks to more than {MAX_RATIO} times its size, as if made to fill memory")
        try:
            data = self._unpack(member, self._packed(member))
        except (pa.ArrowException, OSError, zlib.error, EOFError, ValueError, OverflowError) as e:
            raise MemberError(f"it is damaged: {first_line(e)}") from e
        if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
            raise MemberError("it is damaged: size or checksum do not agree")
        return data

    def _check(self, members: list[zipfile.ZipInfo], end: int) -> None:
        if len(members) > _MAX_MEMBERS:
            raise DataError(f"{self._path} has {len(members):,} members; at most {_MAX_MEMBERS:,} are read")
        at = 0
        for member in sorted(members, key=lambda m: m.header_offset):
            if member.header_offset < at or member.header_offset + member.compress_size > end:
                raise DataError(f"{self._path}: its members overlap; it is damaged, or made to fill the memory")
            at = member.header_offset + 30 + member.compress_size

    def _packed(self, member: zipfile.ZipInfo) -> bytes:
        self._file.seek(member.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError("no header where the directory names one")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        self._file.seek(names, 1)
        data = self._file.read(member.compress_size)
        if len(data) < member.compress_size:
            raise EOFError("cut off")
        return data

    def _unpack(self, member: zipfile.ZipInfo, packed: bytes) -> bytes:
        if member.compress_type == zipfile.ZIP_STORED:
            return packed
        # One byte more than promised is enough to see that a member is larger than it says.
        limit = member.file_size + 1
        if member.compress_type == zipfile.ZIP_DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit)
        if member.compress_type == 93:
            pieces: list[bytes] = []
            size = 0
            with pa.CompressedInputStream(pa.BufferReader(packed), "zstd") as stream:
                while size < limit and (piece := stream.read(min(_STEP, limit - size))):
                    pieces.append(piece)
                    size += len(piece)
            return b"".join(pieces)
        raise MemberError(f"it is packed by method {member.compress_type}, which is not read here")
