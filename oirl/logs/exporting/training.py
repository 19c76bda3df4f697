"""Formats for training: TRL's data sets and OpenAI's fine-tuning files, all as conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from oirl.logs.atomic import atomic_file
from oirl.logs.exporting.pipeline import ExportReport, check_written
from oirl.logs.pairs import right_over_wrong
from oirl.logs.rendering import fields_of, messages

Rows = Callable[[], Iterator[pa.RecordBatch]]
Example = dict[str, Any]

_NO_RESPONSE = "no response"
_NO_VERDICT = "no verdict"
_WRONG = "the response is wrong"
_NOT_FILLED = "the prompt cannot be filled with the query alone"
_ONE_SIDED = "no reply of the same query to pair with, one right and one wrong"


@dataclass(frozen=True)
class _Examples:
    """A JSON Lines file with one example per row of the log."""

    name: str
    description: str
    make: Callable[[dict[str, Any], list[dict[str, str]]], Example]
    right_only: bool
    records: tuple[str, ...] = ("interactions",)

    def write(self, rows: Rows, out: Path, report: ExportReport) -> None:
        """Write the examples; rows without a response, a verdict or a prompt that can be filled are left out."""
        _write_lines(out, self._examples(rows, report), report)

    def _examples(self, rows: Rows, report: ExportReport) -> Iterator[Example]:
        for batch in rows():
            for row in batch.select(["query", "prompt", "response", "correct", "metadata"]).to_pylist():
                given = messages(row["prompt"], row["query"], fields_of(row["prompt"], row["metadata"]))
                if row["response"] is None or not row["response"].strip():
                    report.left_out[_NO_RESPONSE] += 1
                elif row["correct"] is None:
                    report.left_out[_NO_VERDICT] += 1
                elif self.right_only and not row["correct"]:
                    report.left_out[_WRONG] += 1
                elif given is None:
                    report.left_out[_NOT_FILLED] += 1
                else:
                    yield self.make(row, given)


@dataclass(frozen=True)
class TrlPreference:
    """TRL's preference format: of pairs as they are, of a log right over wrong replies of one query."""

    name: str = "trl-preference"
    description: str = "TRL preference data (prompt, chosen, rejected): JSON Lines, from a log or preference pairs"
    records: tuple[str, ...] = ("preferences", "interactions")

    def write(self, rows: Rows, out: Path, report: ExportReport) -> None:
        """Write the pairs."""
        _write_lines(out, (self._example(pair) for pair in self._pairs(rows, report)), report)

    def _pairs(self, rows: Rows, report: ExportReport) -> Iterator[dict[str, Any]]:
        if report.record == "preferences":
            yield from (pair for batch in rows() for pair in batch.to_pylist())
            return
        pairs, used = right_over_wrong(rows())
        report.left_out[_ONE_SIDED] = report.rows_read - used
        yield from pairs

    def _example(self, pair: dict[str, Any]) -> Example:
        example: Example = {
            "prompt": _context(pair) or [{"role": "user", "content": pair["query"]}],
            "chosen": [_assistant(pair["chosen"])],
            "rejected": [_assistant(pair["rejected"])],
        }
        if pair.get("margin") is not None:
            example["margin"] = pair["margin"]
        return example


def _context(pair: dict[str, Any]) -> list[dict[str, str]] | None:
    """Return the messages before the reply, where an importer has kept them."""
    try:
        kept = json.loads(pair.get("metadata") or "{}").get("messages")
    except (ValueError, AttributeError, RecursionError):
        return None
    whole = isinstance(kept, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in kept)
    return kept if whole and kept else None


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _write_lines(out: Path, examples: Iterator[Example], report: ExportReport) -> None:
    with atomic_file(out) as temporary:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for example in examples:
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
                report.written += 1
        report.left_out = +report.left_out
        check_written(report)


TRL_SFT = _Examples(
    "trl-sft",
    "TRL supervised data (prompt, completion): JSON Lines of the right replies",
    lambda row, given: {"prompt": given, "completion": [_assistant(row["response"])]},
    right_only=True,
)
TRL_UNPAIRED = _Examples(
    "trl-unpaired",
    "TRL unpaired preferences (prompt, completion, label): JSON Lines of all replies with a verdict",
    lambda row, given: {"prompt": given, "completion": [_assistant(row["response"])], "label": row["correct"]},
    right_only=False,
)
OPENAI_FINETUNE = _Examples(
    "openai-finetune",
    "OpenAI fine-tuning file (messages): JSON Lines of the right replies",
    lambda row, given: {"messages": [*given, _assistant(row["response"])]},
    right_only=True,
)
TRL_PREFERENCE = TrlPreference()
