"""From files of any known format to one log: recognise, convert, check, grade, write."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oirl.errors import ConfigError, DataError, nearest
from oirl.logs.atomic import atomic_file
from oirl.logs.grading import Grader
from oirl.logs.importing.base import Importer, Refusal, Request
from oirl.logs.importing.hub import PREFIX, hub_files, saved_files
from oirl.logs.importing.lines import read_head
from oirl.logs.importing.rows import RowBuilder
from oirl.logs.store import LogWriter, Source, find_files
from oirl.records import SCHEMAS
from oirl.registry import names, resolve

_TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".feather")


@dataclass(slots=True)
class ImportReport:
    """What an import read, kept and refused.

    Attributes:
        out: The file that was written.
        record: "interactions", "preferences" or "queries".
        files: Each source file with its format and counts.
        rows_read: Rows found in all files.
        rows_kept: Rows written.
        rows_refused: Rows refused; kept and refused make up the rows read.
        reasons: [{reason, count, first}], the most frequent first; `first` is file:row.
        rejected_file: Where the refused rows stand with their reasons; None if there are none.
        n_queries: Distinct queries.
        n_prompts: Distinct prompts.
        grade: Counts of the checker, None without one.
        prompts: For formats of tools: [{file, prompt, source, rows, fits}], where each prompt comes from and how many
            of the rendered texts are that template, filled.
        fingerprint: Of the content written.
        warnings: What the log lacks.
    """

    out: str
    record: str = "interactions"
    files: list[dict[str, Any]] = field(default_factory=list)
    rows_read: int = 0
    rows_kept: int = 0
    rows_refused: int = 0
    reasons: list[dict[str, Any]] = field(default_factory=list)
    rejected_file: str | None = None
    n_queries: int = 0
    n_prompts: int = 0
    grade: dict[str, Any] | None = None
    prompts: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str = ""
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return asdict(self)

    def add(self, file: dict[str, Any], request: Request) -> None:
        """Add what became of one file."""
        self.files.append(file)
        self.rows_kept += file["rows_kept"]
        self.rows_refused += file["rows_refused"]
        self.rows_read = self.rows_kept + self.rows_refused
        self.prompts.extend({"file": file["file"], **note.to_dict()} for note in request.prompts)
        self.warnings.extend(request.warnings)


def import_log(
    sources: Source | Sequence[Source],
    out: Source,
    *,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    constants: Mapping[str, str] | None = None,
    grade: str | None = None,
    filter: str | None = None,
    scorer: str | None = None,
    strict: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ImportReport:
    """Read files of a known format and write one log; rows that do not fit are refused with a reason.

    Args:
        sources: Files, folders or glob patterns.
        out: The log to write. Refused rows go to `<out without .parquet>.rejected.jsonl`.
        format: A registered format, or "auto" to recognise it file by file.
        mapping: Column of the log -> field of the files, where the names differ; fields may be dotted paths.
        constants: Column of the log -> value for all rows.
        grade: A checker that gives the verdicts.
        filter: Which of several filters of one run to read (lm-eval).
        scorer: Which score gives the verdict, where a format keeps several; its main one by default.
        strict: Refuse everything at the first row that does not fit.
        progress: Called with a line of text now and then.

    Raises:
        DataError: If a file cannot be read, lacks a needed field, or no row of it all can be kept.
        ConfigError: If `mapping` or `constants` name no column of the record.
        UnknownNameError: If the format or the checker is not known.
        NotFoundError: If a source is not there.
    """
    located = _locate(sources, format)
    record = _one_record(located)
    _check_options(located, {"filter": filter, "scorer": scorer})
    mapping, constants = dict(mapping or {}), dict(constants or {})
    _check_columns(record, mapping, constants)
    if grade and record != "interactions":
        raise ConfigError(f"--grade needs interactions, but these files hold {record}")
    _check_target(out, located)
    grader = Grader(grade) if grade else None
    builder = RowBuilder(record, constants, grader)
    report = ImportReport(out=str(out), record=record, warnings=_left_alone(sources, located))
    fields = {c: mapping.get(c, c) for c in SCHEMAS[record].names if c not in constants}

    with LogWriter(out, record) as writer, _Rejections(out, strict) as rejections:
        unfollowed: list[str | None] = []
        for path, importer in located:
            request = Request(fields, mapping, filter, scorer)
            file: dict[str, Any] = {"file": str(path), "format": importer.name, "rows_kept": 0, "rows_refused": 0}
            for chunk in importer.chunks(path, request):
                batch, refused = builder.build(chunk)
                rejections.add(path, refused)
                writer.write(batch)
                file["rows_kept"] += batch.num_rows
                file["rows_refused"] += len(refused)
                if progress:
                    progress(f"{path.name}: {file['rows_kept']:,} rows kept, {file['rows_refused']:,} refused")
            report.add(file, request)
            unfollowed.append(None if request.followed else request.unfollowed)
        if filter is not None and all(unfollowed):
            raise ConfigError(str(unfollowed[0]))
        _check_kept(report, located, rejections, grader)
    report.reasons = rejections.summary()
    report.rejected_file = rejections.written
    report.n_queries, report.n_prompts = builder.n_queries, builder.n_prompts
    report.grade = grader.counts.to_dict() if grader else None
    report.fingerprint = writer.fingerprint
    report.warnings.extend(_warnings(builder, grader))
    return report


def _warnings(builder: RowBuilder, grader: Grader | None) -> list[str]:
    found = []
    if grader and grader.counts.not_gradable:
        found.append(
            f"{grader.counts.not_gradable:,} rows have no response or no readable answer to grade; what verdict they "
            "had was kept, so the log mixes two graders"
        )
    if builder.record == "interactions" and builder.n_prompts > max(20, builder.n_rows / 2):
        found.append(
            f"{builder.n_prompts:,} prompts in {builder.n_rows:,} rows: the prompts look like rendered texts, with the "
            "queries in them; map the column `prompt` to the template, or name it with --set prompt=TEXT"
        )
    if builder.record == "interactions" and not builder.n_verdicts:
        found.append("no row has a verdict; `oirl fit` needs some: --map correct=FIELD, or --grade numeric")
    return found


def detect(path: Path) -> Importer:
    """Return the importer of the first registered format that accepts `path`.

    Raises:
        DataError: If none does; the message lists the formats.
    """
    importer = _sniff(path)
    if importer is None:
        known = ", ".join(names("formats"))
        raise DataError(f"{path}: format not recognised; name one with --format: {known}")
    return importer


def _sniff(path: Path) -> Importer | None:
    head = read_head(path)
    for name in names("formats"):
        importer: Importer = resolve("formats", name)
        if importer.sniff(path, head):
            return importer
    return None


def _locate(sources: Source | Sequence[Source], format: str) -> list[tuple[Path, Importer]]:
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    located: list[tuple[Path, Importer]] = []
    seen: set[Path] = set()
    for source in _expanded(sources):
        for path, importer in _found(source, format):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            if path.is_file() and path.stat().st_size == 0:
                raise DataError(f"{path} is empty")
            located.append((path, importer or (detect(path) if format == "auto" else _named(format))))
    if not located:
        raise ConfigError("no file named; name a file, a folder or a pattern")
    return located


def _expanded(sources: Sequence[Source]) -> list[Source]:
    """Return the sources, patterns that match folders replaced by what they match."""
    found: list[Source] = []
    for source in sources:
        matched = [] if os.path.exists(source) else sorted(glob.glob(str(source)))
        holding = [m for m in matched if os.path.isfile(m) or any(p.is_file() for p in Path(m).rglob("*"))]
        found.extend(holding if any(os.path.isdir(m) for m in matched) and holding else [source])
    return found


def _found(source: Source, format: str) -> list[tuple[Path, Importer | None]]:
    """Return the files of a source, with their importer where the source as a whole tells it."""
    if str(source).startswith(PREFIX):
        return [(path, None) for path in hub_files(str(source))]
    folder = Path(source)
    if folder.is_dir():
        runs = _runs_in(folder, format)
        if runs:
            return list(runs)
        saved = saved_files(folder)
        if saved:
            return [(path, None) for path in saved]
    return [(path, None) for path in find_files(source)]


def _left_alone(sources: Source | Sequence[Source], located: list[tuple[Path, Importer]]) -> list[str]:
    """Say which tables of a folder were not read because it holds the runs of tools."""
    taken = {path.resolve() for path, _ in located}
    folders = [Path(s) for s in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    tables = [
        str(path)
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name.lower().removesuffix(".gz").endswith(_TABLES) and path.resolve() not in taken
        if not path.name.endswith(".rejected.jsonl")
    ]
    if not tables:
        return []
    shown = ", ".join(tables[:5]) + (", …" if len(tables) > 5 else "")
    return [
        f"{len(tables):,} tables beside the runs of tools were not read: {shown}; name them as sources to read them"
    ]


def _runs_in(folder: Path, format: str) -> list[tuple[Path, Importer]]:
    """Return the runs of tools that a folder holds; if it holds any, its other files are none."""
    asked = [resolve("formats", name) for name in names("formats")] if format == "auto" else [_named(format)]
    finders = [importer for importer in asked if hasattr(importer, "find")]
    return [(path, importer) for importer in finders for path in importer.find(folder)]


def _check_options(located: list[tuple[Path, Importer]], options: Mapping[str, str | None]) -> None:
    for option, value in options.items():
        if value is None:
            continue
        followed = [i for _, i in located if option in getattr(i, "options", ())]
        if not followed:
            raise ConfigError(f"--{option} {value}: the format {located[0][1].name} has no {option}s; leave it out")


def _named(format: str) -> Importer:
    importer: Importer = resolve("formats", format)
    if not hasattr(importer, "chunks"):
        raise ConfigError(f"--format {format} names a {type(importer).__name__}, not an importer (see `oirl formats`)")
    return importer


def _one_record(located: list[tuple[Path, Importer]]) -> str:
    records = {importer.record: path for path, importer in located}
    if len(records) > 1:
        pairs = ", ".join(f"{path} holds {record}" for record, path in records.items())
        raise ConfigError(f"one import makes one kind of file, but {pairs}; import them one by one")
    return next(iter(records))


def _check_target(out: Source, located: list[tuple[Path, Importer]]) -> None:
    for target in (Path(out), rejected_path(out)):
        if target.resolve() in {path.resolve() for path, _ in located}:
            raise ConfigError(f"{target} is also a source; name another file to write")
    if Path(out).suffix.lower() in {".csv", ".tsv", ".json", ".jsonl", ".arrow"}:
        raise ConfigError(f"{out}: logs are Parquet files; name one that ends in .parquet")


def _check_columns(record: str, mapping: Mapping[str, str], constants: Mapping[str, str]) -> None:
    known = SCHEMAS[record].names
    for option, given in (("--map", mapping), ("--set", constants)):
        for column in given:
            if column not in known:
                raise ConfigError(
                    f"{option} {column}={given[column]}: no column {column!r}{nearest(column, known)}; "
                    f"columns of {record}: {', '.join(known)}"
                )
    for column in mapping.keys() & constants.keys():
        raise ConfigError(f"column {column!r} stands in both --map and --set; keep one of the two")


def _check_kept(
    report: ImportReport, located: list[tuple[Path, Importer]], rejections: _Rejections, grader: Grader | None
) -> None:
    if not report.rows_kept:
        raise DataError(_nothing_kept(located, rejections))
    if grader and not grader.counts.graded:
        raise DataError(
            f"--grade {grader.counts.checker}: no row could be graded, as none has both a `response` and a readable "
            "`answer`; map them with --map response=FIELD --map answer=FIELD"
        )


def _nothing_kept(located: list[tuple[Path, Importer]], rejections: _Rejections) -> str:
    first = rejections.summary()
    where = located[0][0] if len(located) == 1 else f"{len(located)} files"
    why = f"; {first[0]['first']}: {first[0]['reason']}" if first else "; there are no rows"
    return f"{where}: no row could be kept{why}"


def _json_line(entry: dict[str, Any]) -> str:
    try:
        return json.dumps(entry, ensure_ascii=True, default=str, allow_nan=False) + "\n"
    except (ValueError, RecursionError):  # NaN, or nested too deeply: as text, cut short
        return json.dumps({**entry, "raw": _short(entry["raw"])}, ensure_ascii=True) + "\n"


def _short(value: Any) -> str:
    try:
        return repr(value)[:2000]
    except RecursionError:
        return "nested too deeply"


def rejected_path(out: Source) -> Path:
    """Return where the refused rows of an import to `out` go."""
    return Path(out).parent / (Path(out).name.removesuffix(".parquet") + ".rejected.jsonl")


class _Rejections:
    """Refused rows, counted by reason and written beside the log when the import succeeds."""

    def __init__(self, out: Source, strict: bool) -> None:
        self._path = rejected_path(out)
        self._strict = strict
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self.written: str | None = None

    def __enter__(self) -> _Rejections:
        self._file = atomic_file(self._path)
        self._temporary = self._file.__enter__()
        self._handle = self._temporary.open("w", encoding="utf-8", newline="\n")
        return self

    def add(self, path: Path, refused: list[Refusal]) -> None:
        for refusal in refused:
            where = f"{path}:{refusal.row}"
            if self._strict:
                raise DataError(f"{where}: {refusal.reason} (--strict refuses the file for it)")
            # Values differ from row to row; what is wrong with them is the same reason.
            kind = re.sub(r"^(\w+) is (?!empty).*: ", r"\1: ", re.sub(r" \(.*\)$", "", refusal.reason))
            self._counts[kind] += 1
            self._first.setdefault(kind, where)
            entry = {"file": str(path), "row": refusal.row, "reason": refusal.reason, "raw": refusal.raw}
            self._handle.write(_json_line(entry))

    def summary(self) -> list[dict[str, Any]]:
        return [
            {"reason": reason, "count": count, "first": self._first[reason]}
            for reason, count in self._counts.most_common()
        ]

    def __exit__(self, *error: Any) -> None:
        self._handle.close()
        if error[0] is None and self._counts:
            self._file.__exit__(None, None, None)
            self.written = str(self._path)
        else:
            self._temporary.unlink(missing_ok=True)
            if error[0] is None:
                # An earlier import's refusals would be taken for this one's.
                self._path.unlink(missing_ok=True)
