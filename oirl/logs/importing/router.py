"""Wide tables of routers, such as RouteLLM's: one column of verdicts per model, and the model is the action."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oirl.errors import DataError
from oirl.logs.importing.base import Chunk, Refusal, Request
from oirl.logs.importing.lines import read_head
from oirl.logs.importing.objects import read_objects
from oirl.logs.importing.runs import Run, head_of, number, run_chunks, text_of
from oirl.records import SCHEMAS

_QUERIES = ("query", "question", "prompt", "instruction", "input", "text")
_RESPONSE, _COST = "|model_response", "|total_cost"
_CORRECT, _REPLY = "_correct", "_response"
_WORDS = {"true": True, "false": False}
_MAJORITY = 0.8
_ABOUT = re.compile(
    r"(is|has)_.*|label|target|gold|answer|difficulty|level|length|.*_(?:id|len|length|count|tokens)", re.I
)
"""Columns that say something of the query, though they hold numbers as verdicts do."""
_IDS = ("query_id", "sample_id", "id", "index", "idx", "unnamed: 0", "")


@dataclass(frozen=True)
class RouterTable:
    """One row per query, one column of verdicts per model: to choose the model per query."""

    name: str = "router"
    description: str = "wide table: a query, and one column of verdicts per model (RouteLLM, RouterBench)"
    record: str = "interactions"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept tables in text that have a query and at least two columns of verdicts, and no column of a log."""
        if not path.name.lower().removesuffix(".gz").endswith(".csv"):
            return False
        try:
            first = [o for _, o in zip(range(20), _objects(path), strict=False)]
        except DataError:
            return False
        names = list(first[0]) if first else []
        return _query_field(names) is not None and not _log_columns(names) and len(_models(first)) > 1

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield one row per query and model."""
        rows = read_objects(path)
        head = head_of(rows)
        first = [o for _, o in head if isinstance(o, dict)]
        names = list(dict.fromkeys(n for o in first for n in o))
        query = request.mapped.get("query") or _query_field(names)
        models = [m for m in _models(first) if m not in request.mapped.values()]
        if query is None or len(models) < 2:
            raise DataError(
                f"{path}: a column of queries (--map query=FIELD) and two columns of verdicts (true, false, or a "
                f"number from 0 to 1), one per model, are needed; columns there: {', '.join(names)}"
            )
        request.warnings.append(f"{path.name}: the columns taken as models are {', '.join(models)}")

        def runs() -> Iterator[Run | Refusal]:
            for part in (head, rows):
                for row, value in part:
                    if isinstance(value, Refusal):
                        yield value
                    else:
                        yield from _row(row, value, query, models)

        yield from run_chunks(path, runs(), request)


def _row(row: int, value: dict[str, Any], query: str, models: Sequence[str]) -> Iterator[Run | Refusal]:
    asked = value.get(query)
    text = _unlisted(asked) if isinstance(asked, str) else text_of(asked)
    sample = next((value[n] for n in ("query_id", "sample_id") if value.get(n) is not None), None)
    for model in models:
        cell = value.get(model)
        verdict = _verdict(cell)
        if cell not in (None, "") and (verdict is None or not 0 <= verdict <= 1):
            reason = f"the verdict of {model!r} is {str(cell)[:60]!r}: true, false or a number from 0 to 1 is needed"
            yield Refusal(row, reason, value)
            continue
        if verdict is None:
            continue
        bare = model.removesuffix(_CORRECT)
        name = model if bare in value else bare
        values = {
            "query": text,
            "query_id": sample,
            # The model is what is chosen per query, so it takes the place of the prompt.
            "prompt_id": name,
            "prompt": name,
            "model": name,
            "response": value.get(model + _RESPONSE, value.get(name + _REPLY)),
            "cost": value.get(model + _COST),
            "dataset": value.get("eval_name"),
        }
        dataset = value.get("eval_name")
        # One data set, or one column, may be graded where others have verdicts.
        yield Run(row, values, verdict, value, scale=dataset if isinstance(dataset, str) else name)


def _unlisted(text: str) -> str:
    """Return the turns of a text that is a Python list of texts, as RouterBench has them; else the text itself."""
    if not (text.startswith("[") and text.endswith("]")) or len(text) > 1_000_000:
        return text
    try:
        turns = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    whole = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
    return "\n\n".join(turns) if whole else text


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    if b"\0" in read_head(path, 1 << 12):
        return
    for _, value in read_objects(path):
        if isinstance(value, dict):
            yield value


def _query_field(names: Sequence[str]) -> str | None:
    return next((n for n in _QUERIES if n in names), None)


def _log_columns(names: Sequence[str]) -> bool:
    """Say whether a table is a log already: it has verdicts in a column of their own, or a prompt beside the query."""
    known = {"correct", "response", "prompt_id", "model", "score"} & set(names)
    return bool(known) or {"query", "prompt"} <= set(names)


def _models(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns that hold verdicts: most cells of theirs are; the others are refused one by one."""
    found = []
    reserved = {*SCHEMAS["interactions"].names, *_QUERIES}
    for name in dict.fromkeys(n for row in rows for n in row):
        cells = [row[name] for row in rows if row.get(name) not in (None, "")]
        usual = name not in reserved and name.lower() not in _IDS and not name.endswith((_RESPONSE, _COST, _REPLY))
        good = sum((v := _verdict(cell)) is not None and 0 <= v <= 1 for cell in cells)
        if usual and not _ABOUT.fullmatch(name) and cells and good >= _MAJORITY * len(cells):
            found.append(name)
    return found


def _verdict(cell: Any) -> bool | float | None:
    if isinstance(cell, bool):
        return cell
    if isinstance(cell, str):
        word = cell.strip().lower()
        if word in _WORDS:
            return _WORDS[word]
        try:
            return number(float(word))
        except ValueError:
            return None
    return number(cell)


ROUTER = RouterTable()
