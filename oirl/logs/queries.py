"""Queries and candidate prompts from users' files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oirl.errors import ConfigError, DataError, NotFoundError
from oirl.logs.importing.base import Chunk, Request
from oirl.logs.importing.coerce import coerce
from oirl.logs.importing.objects import read_objects
from oirl.logs.importing.pipeline import detect
from oirl.logs.store import find_files
from oirl.logs.text import normalise, template_id, text_id
from oirl.records import QUERY_SCHEMA, Query


def read_queries(path: str | Path) -> tuple[list[str], list[str]]:
    """Return (query_ids, queries) of a file, row by row; see `read_query_records`."""
    records = read_query_records(path)
    return [record.query_id for record in records], [record.query for record in records]


def read_query_records(path: str | Path) -> list[Query]:
    """Return the queries of a JSONL, CSV, TSV, Parquet, Arrow, text or problem file (GSM8K, SVAMP), row by row.

    Args:
        path: A file with a column `query` and, if they are there, `query_id` (by default a hash of the text), `answer`,
            `dataset`, `split` and `metadata`; or a text file with a query a line.

    Raises:
        NotFoundError: If the file is not there.
        DataError: If it cannot be read, lacks the column, or a row has no query.
    """
    found = find_files(path)
    if len(found) > 1:
        raise ConfigError(f"{path} names {len(found)} files; one file of queries is needed")
    file = found[0]
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; a file with a column `query` is needed")
    if file.suffix.lower() == ".txt":
        pairs = zip(*parse_query_lines(_read_text(file).splitlines(), str(file)), strict=True)
        return [Query(name, text) for name, text in pairs]
    records: list[Query] = []
    for chunk in _query_chunks(file):
        if chunk.refused:
            raise DataError(f"{file}:{chunk.refused[0].row}: {chunk.refused[0].reason}")
        columns: dict[str, list[Any]] = {}
        bad: dict[int, str] = {}
        for name in (name for name in QUERY_SCHEMA.names if name in chunk.columns):
            array, refused = coerce(QUERY_SCHEMA.field(name), chunk.columns[name])
            columns[name], bad = array.to_pylist(), bad | refused
        for i, text in enumerate(columns["query"]):
            if i in bad or text is None or not text.strip():
                raise DataError(f"{file}:{chunk.rows[i]}: {bad.get(i, 'query is empty: it is required')}")
            row = {name: values[i] for name, values in columns.items()}
            records.append(
                Query(**{**row, "query_id": text_id(text) if row.get("query_id") is None else row["query_id"]})
            )
    if not records:
        raise DataError(f"{file} holds no query")
    return records


def _query_chunks(file: Path) -> Iterator[Chunk]:
    importer = detect(file)
    try:
        yield from importer.chunks(file, Request({name: name for name in QUERY_SCHEMA.names}))
    except DataError as e:
        # What helps an import does not help here.
        message, _, advice = str(e).partition("; use --map")
        raise DataError(f"{message}; rename the column to `query`" if advice else message) from e


def parse_query_lines(lines: Iterable[str], where: str) -> tuple[list[str], list[str]]:
    """Return (query_ids, queries) of lines: each a query, or a JSON object with `query` and maybe `query_id`.

    Raises:
        DataError: If a line begins like a JSON object but is none, or lacks `query`, or there is no line.
    """
    ids: list[str] = []
    queries: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        name = None
        if text.startswith("{"):
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as e:
                raise DataError(f"{where}:{number}: begins like a JSON object, but is none: {e}") from e
            text, name = row.get("query"), row.get("query_id")
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{where}:{number}: no text under `query`; keys there: {', '.join(row) or 'none'}")
        _check_unicode(text, f"{where}:{number}")
        ids.append(text_id(text) if name is None else str(name))
        queries.append(text)
    if not queries:
        raise DataError(f"{where}: no query; give one as an argument, with --in FILE, or a line each on stdin")
    return ids, queries


def read_candidates(path: str | Path) -> tuple[list[str], list[str], list[list[str]], int]:
    """Return (query_ids, queries, responses of each, rows without a response) of a file of candidate responses.

    Args:
        path: JSONL, JSON, CSV, TSV, Parquet (a log, say) or Arrow. A row has `query` and `response`, or, in JSONL, JSON
            and Arrow files, `query` and a list `responses`; rows of one query need not stand together. `query_id` is a
            hash of the text by default.

    Raises:
        NotFoundError: If the file is not there.
        DataError: If it cannot be read, a row has no query, or no row has a response.
    """
    found = find_files(path)
    if len(found) > 1:
        raise ConfigError(f"{path} names {len(found)} files; one file of candidate responses is needed")
    file = found[0]
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; rows with `query` and `response` are needed")
    return _gather(read_objects(file), str(file))


def parse_candidate_lines(lines: Iterable[str], where: str) -> tuple[list[str], list[str], list[list[str]], int]:
    """Return what `read_candidates` does of JSON lines."""

    def objects() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise DataError(f"{where}:{number}: not a JSON object with `query` and `response`: {e}") from e

    return _gather(objects(), where)


def _gather(rows: Iterable[tuple[int, Any]], where: str) -> tuple[list[str], list[str], list[list[str]], int]:
    found: dict[str, tuple[str, list[str]]] = {}
    without = 0
    for number, row in rows:
        if not isinstance(row, dict):
            reason = getattr(row, "reason", f"a {type(row).__name__}, not an object")
            raise DataError(f"{where}:{number}: {reason}")
        query, name = row.get("query"), row.get("query_id")
        if not isinstance(query, str) or not query.strip():
            there = ", ".join(map(str, row)) or "none"
            raise DataError(f"{where}:{number}: no text under `query`; fields there: {there}")
        given = row.get("responses") if row.get("responses") is not None else [row.get("response")]
        texts = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
        wrong = next((t for t in texts if t is not None and not isinstance(t, str)), None)
        if wrong is not None:
            raise DataError(f"{where}:{number}: a response is a {type(wrong).__name__}; texts are needed")
        for text in (query, *(t for t in texts if t is not None)):
            _check_unicode(text, f"{where}:{number}")
        key = text_id(query) if name is None else str(name)
        kept = [t for t in texts if t is not None]
        without += len(texts) - len(kept)
        if kept:
            known = found.setdefault(key, (query, []))
            if normalise(known[0]) != normalise(query):
                raise DataError(f"{where}:{number}: query_id {key!r} stood for another query in an earlier row")
            known[1].extend(kept)
    if not found:
        raise DataError(f"{where}: no response to rank; rows with `query` and `response` are needed")
    return list(found), [q for q, _ in found.values()], [r for _, r in found.values()], without


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where}: not valid Unicode (half of a surrogate pair)") from e


def read_prompts(path: str | os.PathLike[str]) -> list[tuple[str | None, str | None]]:
    """Return (prompt_id, template) pairs of a prompt file; one of the two may be None.

    Text files hold a template per line. JSONL files hold objects with `prompt_id`, `prompt` or both; YAML files a list
    of such objects or of templates, or a mapping from id to template.

    Raises:
        NotFoundError: If the file is not there.
        DataError: If it does not hold prompts.
    """
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"{file}: no such file; a prompt file (.txt, .jsonl or .yaml) is needed")
    text = _read_text(file)
    suffix = file.suffix.lower()
    if suffix in {".csv", ".tsv", ".parquet", ".arrow"}:
        raise DataError(f"{file}: prompts are read from .txt (one a line), .jsonl or .yaml files, not from {suffix}")
    if suffix in {".yaml", ".yml"}:
        entries = _yaml_entries(file, text)
    elif suffix in {".jsonl", ".ndjson", ".json"}:
        entries = _json_entries(file, text)
    else:
        entries = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    prompts = [_prompt(file, number, entry) for number, entry in entries]
    if not prompts:
        raise DataError(f"{file} holds no prompt")
    return prompts


def read_templates(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Return (prompt_id, template) of every prompt of a file; the id is by default a hash of the template.

    Raises:
        NotFoundError: If the file is not there.
        DataError: If it does not hold prompts, or one has no template.
    """
    found = read_prompts(path)
    for number, (name, template) in enumerate(found, 1):
        if template is None:
            raise DataError(f"{path}: prompt {number} ({name!r}) has no template; give it one under `prompt`")
    return [(template_id(text) if name is None else name, text) for name, text in found if text is not None]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8 (byte {e.start}); convert it with iconv") from e


def _json_entries(file: Path, text: str) -> list[tuple[int, Any]]:
    try:
        if text.lstrip().startswith("["):
            return list(enumerate(json.loads(text), 1))
        return [(n, json.loads(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (ValueError, RecursionError) as e:
        raise DataError(f"{file} is not JSONL: {e}") from e


def _yaml_entries(file: Path, text: str) -> list[tuple[int, Any]]:
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise DataError(f"{file} is not YAML: {' '.join(str(e).split())}") from e
    if isinstance(document, dict):
        return [(n, {"prompt_id": k, "prompt": v}) for n, (k, v) in enumerate(document.items(), 1)]
    if isinstance(document, list):
        return list(enumerate(document, 1))
    raise DataError(f"{file}: a list of prompts, or a mapping from id to template, is needed")


def _prompt(file: Path, number: int, entry: Any) -> tuple[str | None, str | None]:
    if isinstance(entry, str):
        _check_unicode(entry, f"{file}:{number}")
        return None, entry
    if isinstance(entry, dict):
        name, text = entry.get("prompt_id"), entry.get("prompt")
        _check_unicode(f"{name}{text}", f"{file}:{number}")
        if (name is not None or text is not None) and (text is None or isinstance(text, str)):
            return (None if name is None else str(name)), text
    raise DataError(f"{file}:{number}: a template, or an object with prompt_id and prompt, is needed")


def check_rows_file(path: str | Path) -> str:
    """Return the ending of a file that rows can be written to.

    Raises:
        ConfigError: If the file's name has another ending.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in {".jsonl", ".csv", ".parquet"}:
        raise ConfigError(f"{path}: rows are written to .jsonl, .csv or .parquet; name such a file")
    return suffix


def write_rows(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Write rows to a .jsonl, .csv or .parquet file, whole or not at all.

    Raises:
        ConfigError: If the file's name has another ending.
    """
    import pyarrow as pa
    import pyarrow.csv as pcsv
    import pyarrow.parquet as pq

    from oirl.logs.atomic import atomic_file

    suffix = check_rows_file(path)
    with atomic_file(path) as temporary:
        if suffix in {".csv", ".parquet"}:
            # A mapping or list is a cell of JSON: a column for each of its keys would differ from row to row.
            flat = [{k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()} for row in rows]
            names = list(dict.fromkeys(k for row in flat for k in row))
            table = pa.table({name: [row.get(name) for row in flat] for name in names})
            if suffix == ".csv":
                pcsv.write_csv(table, temporary)
            else:
                pq.write_table(table, temporary)
        else:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
