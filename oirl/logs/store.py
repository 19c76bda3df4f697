"""Log files: Parquet, read in batches from files, folders and patterns, written whole or not at all."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oirl import __version__
from oirl.errors import ConfigError, DataError, NotFoundError, nearest
from oirl.logs.atomic import atomic_file
from oirl.logs.fingerprint import Fingerprint
from oirl.records import INTERACTION_SCHEMA, SCHEMA_VERSION, SCHEMAS

Source: TypeAlias = str | os.PathLike[str]
BATCH_ROWS = 65_536
_PREFIX = "oirl."


class LogWriter:
    """Write batches to a Parquet file that appears under its name only when it is complete.

    Args:
        path: The file to write; an earlier one is replaced on success.
        record: A key of `records.SCHEMAS`; it fixes the columns.

        notes: What else the file's metadata shall say, name -> text.

    Use as a context manager; leaving it by an exception leaves no file behind.
    """

    def __init__(self, path: Source, record: str = "interactions", notes: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self.notes = dict(notes or {})
        self.record = record
        self.schema = SCHEMAS[record]
        self.rows = 0
        self.fingerprint = ""

    def __enter__(self) -> LogWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_file(self.path))
            self._fingerprint = Fingerprint(self.schema)
            # Only columns of few distinct values gain from a dictionary; on free text it doubles the time.
            few = [f.name for f in self.schema if f.name not in {"response", "metadata", "latency_s", "cost"}]
            self._writer = stack.enter_context(
                pq.ParquetWriter(temporary, self.schema, compression="zstd", use_dictionary=few)
            )
            self._stack = stack.pop_all()
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch that has the schema of the record."""
        self._fingerprint.update(batch)
        self._writer.write_batch(batch, row_group_size=BATCH_ROWS * 4)
        self.rows += batch.num_rows

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.fingerprint = self._fingerprint.hexdigest()
            self._writer.add_key_value_metadata(
                {f"{_PREFIX}{name}": text for name, text in self.notes.items()}
                | {
                    f"{_PREFIX}record": self.record,
                    f"{_PREFIX}schema_version": str(SCHEMA_VERSION),
                    f"{_PREFIX}version": __version__,
                    f"{_PREFIX}fingerprint": self.fingerprint,
                }
            )
        self._stack.__exit__(*error)  # type: ignore[arg-type]


def write_log(table: pa.Table, path: Source) -> str:
    """Write a table of interactions to `path` and return its fingerprint.

    Args:
        table: The required columns of `Interaction`, and any of the others.
        path: The Parquet file to write; it appears when it is complete.

    Raises:
        DataError: If a required column is missing or null, or a column has a type that does not fit.
    """
    check_required(table.column_names, str(path))
    with LogWriter(path) as writer:
        for batch in table.to_batches(BATCH_ROWS):
            writer.write(conform(batch, str(path)))
    return writer.fingerprint


def read_log(sources: Source | Sequence[Source], columns: Sequence[str] | None = None) -> pa.Table:
    """Read logs into one table with the columns of `Interaction`.

    Args:
        sources: A Parquet file, a folder of them, a glob pattern, or several of these.
        columns: The columns to read; all of the schema when None.

    Raises:
        NotFoundError: If a source names no file.
        DataError: If a file is not a readable log.
        ConfigError: If a column is not one of the schema.
    """
    schema = _select(INTERACTION_SCHEMA, columns)
    return pa.Table.from_batches(scan_log(sources, columns), schema)


def scan_log(
    sources: Source | Sequence[Source],
    columns: Sequence[str] | None = None,
    batch_rows: int = BATCH_ROWS,
    record: str = "interactions",
) -> Iterator[pa.RecordBatch]:
    """Yield the batches of logs, or of files of another record, in order and with flat memory; else as `read_log`."""
    schema = _select(SCHEMAS[record], columns)
    for path in find_files(sources, (".parquet",)):
        with open_parquet(path) as file:
            _check_version(path, _metadata(file), record)
            names = file.schema_arrow.names
            there = [name for name in schema.names if name in names]
            check_required(names, str(path), schema)
            try:
                for batch in file.iter_batches(batch_rows, columns=there):
                    yield conform(batch, str(path), schema)
            except (pa.ArrowException, OSError) as e:
                raise DataError(f"{path} is damaged: {first_line(e)}; write or import it again") from e


def record_of(sources: Source | Sequence[Source]) -> str:
    """Return the record that files hold, a key of `records.SCHEMAS`; a file that does not say so holds interactions.

    Raises:
        ConfigError: If the files hold different records.
    """
    paths = find_files(sources, (".parquet",))
    found = {log_metadata(path).get("record", "interactions"): path for path in paths}
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(str(p) for p in found.values())} hold {' and '.join(found)}; name one kind")
    return next(iter(found))


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        DataError: If it is not Parquet, or is truncated.
    """
    try:
        file = pq.ParquetFile(path)
        file.schema_arrow.names  # noqa: B018  (names that are not UTF-8 are found here)
        return file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"{path} is not a readable Parquet file ({first_line(e)}); for other formats use `oirl import` first"
        ) from e


def find_files(sources: Source | Sequence[Source], suffixes: tuple[str, ...] = ()) -> list[Path]:
    """Return the files that sources name, in a stable order.

    Args:
        sources: A file, a folder, a glob pattern, or several of these.
        suffixes: In a folder only files that end like this are taken; all visible files when empty.

    Raises:
        NotFoundError: If a source names no file.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        try:
            path.exists()
        except OSError as e:
            raise NotFoundError(f"{source}: {e.strerror}") from e
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and _visible(p, path)]
            files = [p for p in inside if not suffixes or p.name.endswith(suffixes)]
            if not files:
                raise NotFoundError(f"the folder {path} holds no {' or '.join(suffixes)} file".replace("  ", " "))
        elif path.exists():
            files = [path]
        else:
            files = [Path(p) for p in sorted(glob.glob(str(source), recursive=True)) if os.path.isfile(p)]
            if not files:
                raise NotFoundError(f"{source}: no such file, folder or pattern")
        found.extend(p for p in files if p not in found)
    if not found:
        raise ConfigError("no file named; name a file, a folder or a pattern")
    return found


def check_required(names: Sequence[str], where: str, schema: pa.Schema = INTERACTION_SCHEMA) -> None:
    """Refuse a table that lacks a required column, naming the columns that it has."""
    for field in schema:
        if field.name not in names and not field.nullable and field.name != "replicate":
            raise DataError(
                f"{where}: no column {field.name!r}{nearest(field.name, names)}; columns there: "
                f"{', '.join(names) or 'none'}; use `oirl import` with --map to make a log of it"
            )


def conform(batch: pa.RecordBatch, where: str, schema: pa.Schema = INTERACTION_SCHEMA) -> pa.RecordBatch:
    """Return the batch with exactly the columns and types of `schema`; absent optional columns are null.

    Raises:
        DataError: If a required column is absent or holds nulls, or a column cannot be cast without loss.
    """
    columns = []
    for field in schema:
        if field.name in batch.schema.names:
            column = batch.column(field.name)
            if column.type != field.type:
                try:
                    if pa.types.is_boolean(field.type) and pa.types.is_primitive(column.type):
                        _check_zero_one(column)
                    column = column.cast(field.type)
                except pa.ArrowException as e:
                    raise DataError(
                        f"{where}: column {field.name!r} is {column.type}, but must be {field.type}: {first_line(e)}"
                    ) from e
        elif field.name == "replicate":
            column = pa.repeat(pa.scalar(0, pa.int32()), batch.num_rows)
        elif field.nullable:
            column = pa.nulls(batch.num_rows, field.type)
        else:
            there = ", ".join(batch.schema.names) or "none that oirl knows"
            raise DataError(
                f"{where}: no column {field.name!r}{nearest(field.name, batch.schema.names)}; columns there: {there}; "
                "use `oirl import` with --map to make a log of it"
            )
        if not field.nullable and column.null_count:
            row = column.is_null().index(True).as_py() + 1
            raise DataError(f"{where}: column {field.name!r} is empty in row {row} of a batch; it is required")
        if pa.types.is_string(field.type):
            _check_text(column, field.name, where)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _check_text(column: pa.Array, name: str, where: str) -> None:
    try:
        column.validate(full=True)
    except pa.ArrowException as e:
        raise DataError(f"{where}: column {name!r} is not UTF-8; import the log anew with `oirl import`") from e


def conform_table(table: pa.Table, columns: Sequence[str], where: str = "the table") -> pa.Table:
    """Return some columns of a table of interactions in the types of the schema; see `conform` for errors."""
    schema = _select(INTERACTION_SCHEMA, columns)
    return pa.Table.from_batches([conform(batch, where, schema) for batch in table.to_batches()], schema)


def _check_zero_one(column: pa.Array) -> None:
    known = column.drop_null()
    if len(known) and not pc.all(pc.is_in(known, pa.array([0, 1], column.type))).as_py():
        raise pa.ArrowInvalid("it holds values other than 0 and 1")


def log_metadata(path: Source) -> dict[str, str]:
    """Return record, schema_version, version and fingerprint as a file carries them (empty if not ours)."""
    with open_parquet(Path(path)) as file:
        return _metadata(file)


def table_fingerprint(table: pa.Table) -> str:
    """Return the content fingerprint of a table of interactions."""
    fingerprint = Fingerprint(table.schema)
    for batch in table.to_batches():
        fingerprint.update(batch)
    return fingerprint.hexdigest()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without a trailing period."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _select(schema: pa.Schema, columns: Iterable[str] | None) -> pa.Schema:
    if columns is None:
        return schema
    for name in columns:
        if name not in schema.names:
            raise ConfigError(
                f"there is no column {name!r}{nearest(name, schema.names)}; columns: {', '.join(schema.names)}"
            )
    return pa.schema([schema.field(name) for name in columns])


def _metadata(file: pq.ParquetFile) -> dict[str, str]:
    prefix = _PREFIX.encode()
    raw = file.metadata.metadata or {}
    return {k[len(prefix) :].decode(): v.decode() for k, v in raw.items() if k.startswith(prefix)}


def _check_version(path: Path, metadata: dict[str, str], wanted: str = "interactions") -> None:
    record = metadata.get("record", "interactions")
    if record != wanted:
        advice = "; name a log" if wanted == "interactions" else ""
        raise DataError(f"{path} holds {record}, not {wanted}{advice}")
    version = metadata.get("schema_version", "1")
    if not version.isdigit() or int(version) > SCHEMA_VERSION:
        raise DataError(f"{path} has schema version {version}, this oirl reads up to {SCHEMA_VERSION}; update oirl")


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)
