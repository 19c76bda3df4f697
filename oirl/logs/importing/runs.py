"""Runs that tools have logged, as objects, to chunks: prompts from templates, verdicts from scores, fields by --map."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from oirl.errors import ConfigError, DataError, nearest
from oirl.logs.importing.base import Chunk, PromptNote, Refusal, Request
from oirl.logs.importing.templates import EXAMPLES, Template, recover
from oirl.logs.rendering import TEMPLATE_FIELDS

BATCH = 4096
HEAD = 500
_BATCH_CHARACTERS = 32 << 20
_MAX_DEPTH = 40
T = TypeVar("T")


@dataclass(slots=True)
class Run:
    """One run of a prompt on a query, as a tool has logged it.

    Attributes:
        row: Line, or place in the file's list of runs, counted from 1.
        values: Column -> value, where it is known.
        verdict: Outcome: a boolean, a number (1 right, 0 wrong, others graded), or None.
        source: The object in the file, which `--map` looks into.
        rendered: The text given to the model, if the prompt is to be recovered from it.
        slots: Name -> text of what was filled into the template.
        key: Which of the file's templates it is.
        scale: Which of the file's scales the score is on; a scale is of verdicts or of grades.
        given: The template as far as the tool keeps it.
        examples: What stands for examples that differ from row to row.
    """

    row: int
    values: dict[str, Any]
    verdict: bool | float | None = None
    source: Any = None
    rendered: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    given: str | None = None
    examples: str = EXAMPLES
    scale: str = ""


def run_chunks(path: Path, runs: Iterable[Run | Refusal], request: Request) -> Iterator[Chunk]:
    """Yield runs in chunks; what the first of them show (scale of the scores, templates) holds for all.

    Args:
        path: The file, for messages.
        runs: What was read, in order.
        request: Of the user; warnings and notes on prompts are added to it.

    Raises:
        DataError: If a field named by --map is in none of the first runs.
    """
    scale, prompts = Scale(), Prompts()
    checked = False
    for batch in _run_batches(runs, bool(request.mapped)):
        kept = [r for r in batch if isinstance(r, Run)]
        refused = [r for r in batch if isinstance(r, Refusal)]
        if kept and not checked:
            _check_mapped(path, kept[:HEAD], request)
            checked = True
        scale.learn(kept)
        prompts.learn(kept)
        for run in kept:
            correct, score = scale.read(run)
            run.values.setdefault("correct", correct)
            run.values.setdefault("score", score)
            if "prompt" not in run.values:
                prompts.fill(run, path)
        yield _assembled(kept, refused, request)
    request.prompts.extend(prompts.notes())
    request.warnings.extend(f"{path.name}: {text}" for text in [*prompts.warnings(), *scale.warnings()])


def row_chunks(path: Path, rows: Iterable[Run | Refusal], request: Request) -> Iterator[Chunk]:
    """Yield rows that are no runs, such as preference pairs, in chunks; see `run_chunks` for the rest."""
    checked = False
    for batch in _run_batches(rows, bool(request.mapped)):
        kept = [r for r in batch if isinstance(r, Run)]
        if kept and not checked:
            _check_mapped(path, kept[:HEAD], request)
            checked = True
        yield _assembled(kept, [r for r in batch if isinstance(r, Refusal)], request)


def _assembled(kept: list[Run], refused: list[Refusal], request: Request) -> Chunk:
    for run in kept:
        for column, source in request.mapped.items():
            run.values[column] = dig(run.source, source)
    names = dict.fromkeys(name for run in kept for name in run.values)
    columns = {name: [run.values.get(name) for run in kept] for name in names}
    return Chunk(columns, np.array([r.row for r in kept], dtype=np.int64), refused)


class Scale:
    """Whether the scores of a file are verdicts (0 and 1 only) or grades; grades are no verdicts."""

    def __init__(self) -> None:
        self._graded: dict[str, bool] = {}
        self._between = 0

    def learn(self, runs: Iterable[Run]) -> None:
        """Decide, for each scale, by the first runs that have a score."""
        found: dict[str, bool] = {}
        for run in runs:
            if run.verdict is not None and run.scale not in self._graded:
                found[run.scale] = found.get(run.scale, False) or run.verdict not in (0, 1)
        self._graded |= found

    def read(self, run: Run) -> tuple[bool | None, float | None]:
        """Return `correct` and `score`."""
        if run.verdict is None:
            return None, None
        graded = self._graded[run.scale]
        if run.verdict in (0, 1) and not graded:
            return bool(run.verdict), None
        self._between += not graded
        return None, float(run.verdict)

    def warnings(self) -> list[str]:
        """Say where scores are no verdicts."""
        graded = [scale for scale, found in self._graded.items() if found]
        if graded:
            where = f" of {', '.join(graded)}" if graded != [""] else ""
            return [f"scores{where} are grades, not 0 and 1: they stand in the column `score`, without verdict"]
        if self._between:
            return [f"{self._between:,} scores are neither 0 nor 1: they stand in the column `score`, without verdict"]
        return []


class Prompts:
    """The templates of a file, each recovered from the first rendered prompts that show it, then checked on all."""

    def __init__(self) -> None:
        self._templates: dict[str, Template | None] = {}
        self._notes: dict[str, PromptNote] = {}
        self._unnamed = False

    def learn(self, runs: Iterable[Run]) -> None:
        """Recover the templates that are new among `runs`."""
        new: dict[str, list[Run]] = {}
        for run in runs:
            if run.key not in self._templates and "prompt" not in run.values and run.rendered is not None:
                new.setdefault(run.key, []).append(run)
        for key, shown in new.items():
            first = shown[0]
            rows = [(run.rendered or "", run.slots) for run in shown[:HEAD]]
            template = recover(rows, first.given, first.examples)
            self._templates[key] = template
            if template is not None:
                kept = first.given is not None and template.text.endswith(first.given)
                self._notes[key] = PromptNote(template.text, "format" if kept else "recovered")
            elif first.given is not None:
                self._notes[key] = PromptNote(first.given, "format")

    def fill(self, run: Run, path: Path) -> None:
        """Set the prompt of a run and count whether its rendered text fits."""
        note = self._notes.get(run.key)
        if note is None:
            run.values["prompt"] = run.given or ""
            if not run.given:
                self._unnamed = True
                # Never the rendered text: it would make a prompt of its own of every query.
                run.values.setdefault("prompt_id", f"unknown:{path.name}{':' if run.key else ''}{run.key}")
            return
        run.values["prompt"] = note.prompt
        if run.rendered is not None:
            template = self._templates[run.key]
            if template is not None and template.comparable:
                fits = template.fits(run.rendered, run.slots)
                note.rows += 1
                note.fits += fits
                self._keep_fields(run, template.parts[1::2], fits)

    def _keep_fields(self, run: Run, names: Sequence[str], fits: bool) -> None:
        """Keep what was filled into a template where the query alone does not tell it, for who renders it again.

        Where the rendered text is not the template, filled, nothing is kept: it cannot be rendered again.
        """
        fields = {name: run.slots.get(name, "") for name in names}
        plain = len(fields) == 1 and all(name.isidentifier() for name in fields)
        if not plain or any(text.strip() != run.values.get("query") for text in fields.values()):
            kept = fields if fits else {}
            run.values["metadata"] = {**as_dict(run.values.get("metadata")), TEMPLATE_FIELDS: kept}

    def notes(self) -> list[PromptNote]:
        """Return what was found."""
        return list(self._notes.values())

    def warnings(self) -> list[str]:
        """Say which prompts are unsure."""
        found = []
        if self._unnamed:
            found.append(
                "no template was found behind the rendered prompts, so the prompt has a name but no text; give it one "
                "with --set prompt=TEXT"
            )
        for key, template in self._templates.items():
            note = self._notes.get(key)
            if note is None:
                continue
            if template is None or not template.comparable:
                found.append(f"the prompt {_short(note.prompt)} could not be compared with the rendered texts")
            elif note.fits < note.rows:
                found.append(
                    f"the prompt {_short(note.prompt)} fits {note.fits:,} of {note.rows:,} rendered texts "
                    f"({note.source}); the others differ from it in some way"
                )
        return found


def choose(path: Path, given: str | None, choices: Mapping[str, Any], what: str) -> str | None:
    """Return the score that the user has named, or the first one.

    Args:
        path: The file, for messages.
        given: What --scorer names.
        choices: The scores that the file has, its main one first.
        what: What these are called in the format.

    Raises:
        ConfigError: If the file has no score of that name.
    """
    if given is None:
        return next(iter(choices), None)
    if given not in choices:
        raise ConfigError(
            f"{path}: --scorer {given}: no {what} {given!r}{nearest(given, choices)}; there: "
            f"{', '.join(choices) or 'none'}"
        )
    return given


def dig(value: Any, path: str) -> Any:
    """Return `value[path]`, or follow a dotted path through objects and lists."""
    if isinstance(value, dict) and path in value:
        return value[path]
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def head_of(source: Iterator[T]) -> list[T]:
    """Take the first items of an iterator, as many as a look at a file needs and memory allows."""
    head: list[T] = []
    weight = 0
    for item in source:
        head.append(item)
        weight += _weight(item)
        if len(head) == HEAD or weight > _BATCH_CHARACTERS:
            break
    return head


def _weight(value: Any) -> int:
    """Return about how many characters a parsed value holds."""
    waiting, total = [value], 0
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            total += len(found)
        elif isinstance(found, dict):
            waiting.extend(found.values())
            total += 16 * len(found)
        elif isinstance(found, (list, tuple)):
            waiting.extend(found)
            total += 8 * len(found)
    return total


def _run_batches(runs: Iterable[Run | Refusal], sources: bool) -> Iterator[list[Run | Refusal]]:
    """Yield batches of runs with flat memory: heavy runs in small batches, what they were read from only if needed."""
    batch: list[Run | Refusal] = []
    weight = 0
    for run in runs:
        batch.append(run)
        if isinstance(run, Run):
            weight += sum(len(v) for v in run.values.values() if isinstance(v, str)) + len(run.rendered or "")
            if sources:
                weight += _weight(run.source)
            else:
                run.source = None
        if len(batch) == BATCH or weight > _BATCH_CHARACTERS:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of up to `size` items."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def as_dict(value: Any) -> dict[str, Any]:
    """Return `value` if it is an object, else an empty one: what is absent or of another type says nothing."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return `value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """Return a finite number, or None where `value` is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """Return a whole number that a count of tokens can be, or None."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < 2**31 and found == int(found) else None


def text_of(content: Any) -> str:
    """Return the text of a chat message's content: a text, or a list of parts of which some hold text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [p if isinstance(p, str) else p.get("text") for p in content if isinstance(p, (str, dict))]
        return "\n".join(p for p in parts if isinstance(p, str))
    return ""


def tidy(value: Any, depth: int = 0) -> Any:
    """Return a value that can stand in a column of JSON: without NaN, empty entries and endless nesting."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if depth > _MAX_DEPTH:
        return "nested too deeply"
    if isinstance(value, dict):
        return {str(k): tidy(v, depth + 1) for k, v in value.items() if v is not None and v != {} and v != []}
    if isinstance(value, list):
        return [tidy(v, depth + 1) for v in value]
    return value


def load_json(path: Path, data: bytes) -> Any:
    """Return the value of a JSON file.

    Raises:
        DataError: If it is not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not readable JSON: {str(e)[:200]}; is it cut off?") from e


def _check_mapped(path: Path, runs: list[Run], request: Request) -> None:
    for column, source in request.mapped.items():
        if all(dig(run.source, source) is None for run in runs):
            there = sorted({name for run in runs[:50] for name in _paths(run.source)})
            raise DataError(
                f"{path}: --map {column}={source}: no field {source!r}{nearest(source, there)}; fields there: "
                f"{', '.join(there[:60])}"
            )


def _paths(value: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    if not isinstance(value, dict) or depth > 2:
        return
    for name, inner in value.items():
        yield prefix + str(name)
        yield from _paths(inner, f"{prefix}{name}.", depth + 1)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
