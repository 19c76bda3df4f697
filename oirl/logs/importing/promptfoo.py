"""promptfoo: what `promptfoo eval -o` writes as JSON, JSONL or CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oirl.errors import DataError
from oirl.logs.importing.base import Chunk, PromptNote, Refusal, Request
from oirl.logs.importing.lines import (
    MAX_LINE_BYTES,
    files_like,
    read_blocks,
    read_json_lines,
    read_whole,
    too_many_values,
)
from oirl.logs.importing.runs import Run, as_dict, as_list, choose, head_of, load_json, number, run_chunks, tidy, whole
from oirl.logs.importing.templates import names_in, shown, value_of, varying
from oirl.logs.rendering import PROMPTFOO_TEXT

_ANSWERS = ("answer", "expected", "gold", "target", "ideal", "reference", "solution", "label", "__expected")
_RAW = re.compile(r"\{% raw %\}(.*)\{% endraw %\}", re.DOTALL)
_EXACT = {"equals", "contains", "icontains"}
_COLUMN = re.compile(r"\[(.+?)\] (.*)", re.DOTALL)
_CELL = re.compile(r"\[(PASS|FAIL|ERROR)\] ?(?:\((-?[\d.]{1,30})(?![\d.])[^)\n]*\) ?)?", re.DOTALL)
_EXTRA = {"Status", "Score", "Named Scores", "Grader Reason", "Comment"}
_PROVIDER_ERROR = 2
_NO_HEADS: list[dict[str, Any]] = []
_NOTHING: dict[str, Any] = {}


@dataclass(frozen=True)
class PromptfooResults:
    """Results of promptfoo; each test under each prompt and provider is one run."""

    name: str = "promptfoo"
    description: str = "promptfoo results (-o out.json, out.jsonl or out.csv)"
    record: str = "interactions"
    options: frozenset[str] = frozenset({"scorer"})

    def find(self, folder: Path) -> list[Path]:
        """Return the results in a folder."""
        return files_like(folder, (".json", ".jsonl", ".csv"), self.sniff)

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept by the keys of results, or by the header of the table."""
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if start[:1] == b"{":
            row = all(key in head for key in (b'"provider"', b'"prompt"', b'"vars"', b'"success"'))
            return row or (b'"results"' in head and (b'"testPassCount"' in head or b'"evalId"' in start[:200]))
        return path.name.lower().removesuffix(".gz").endswith(".csv") and bool(_columns(_header(head)))

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield one row per result."""
        if path.name.lower().removesuffix(".gz").endswith(".csv"):
            source, heads, about = _table(path), _NO_HEADS, _NOTHING
        else:
            source, heads, about = _open(path)
        first = head_of(source)
        reader = _Reader(path, heads, about, [r for _, r in first if isinstance(r, dict)], request)

        def runs() -> Iterator[Run | Refusal]:
            for part in (first, source):
                for row, result in part:
                    yield reader.read(row, result)

        yield from run_chunks(path, runs(), request)
        reader.tell(path, request)


class _Reader:
    """Results of one file to runs."""

    def __init__(
        self,
        path: Path,
        heads: list[dict[str, Any]],
        about: dict[str, Any],
        first: list[dict[str, Any]],
        request: Request,
    ) -> None:
        self._heads = heads
        self._labels: dict[str, str | None] = {}
        self._unasserted = 0
        self._run_id = about.get("evalId")
        self._created = about.get("timestamp")
        named = {name: None for r in first for name in as_dict(r.get("namedScores"))}
        self._scorer = choose(path, request.scorer, {"success": None, **named}, "score")
        rows = [_vars(r) for r in first]
        used = list(dict.fromkeys(re.split(r"\W", n)[0] for h in heads for n in names_in(_raw(h))))
        known = list(dict.fromkeys(n for row in rows for n in row))
        used = [n for n in used if n in known] or shown([(_raw(r.get("prompt")), _vars(r)) for r in first])
        used = [n for n in used or known if n not in _ANSWERS or n == "label"] or known
        self._fields = varying(used, rows)
        if len(self._fields) > 1 and "query" not in request.mapped:
            request.warnings.append(
                f"{path.name}: the query is made of {' + '.join(f'vars.{f}' for f in self._fields)}; "
                "--map query=vars.NAME takes one of them"
            )

    def read(self, row: int, result: Any) -> Run | Refusal:
        """Return one result as a run."""
        if isinstance(result, Refusal):
            return result
        if not isinstance(result, dict) or "success" not in result:
            return Refusal(row, "not a result of promptfoo: it has no `success`", result)
        values = _vars(result)
        response = as_dict(result.get("response"))
        usage = as_dict(response.get("tokenUsage")) or as_dict(result.get("tokenUsage"))
        failed = result.get("failureReason") == _PROVIDER_ERROR or (
            bool(result.get("error")) and response.get("output") is None
        )
        latency = number(result.get("latencyMs"))
        provider = result.get("provider")
        model = as_dict(provider).get("label") or as_dict(provider).get("id") or provider
        named = as_dict(result.get("namedScores"))
        columns: dict[str, Any] = {
            "query": "\n".join(values[f] for f in self._fields if f in values),
            "response": _output(response.get("output")),
            "answer": next((values[n] for n in _ANSWERS if n in values and n not in self._fields), None)
            or _expected(result),
            "model": model if isinstance(model, str) else None,
            "run_id": self._run_id,
            "tokens_in": whole(usage.get("prompt")),
            "tokens_out": whole(usage.get("completion")),
            "latency_s": latency / 1000 if latency is not None and latency >= 0 else None,
            "cost": number(result.get("cost")) if "cost" in result else number(response.get("cost")),
            "created_at": self._created if isinstance(self._created, str) else None,
            "metadata": tidy(
                {
                    "prompt_label": as_dict(result.get("prompt")).get("label"),
                    "test": result.get("testIdx"),
                    "named_scores": named,
                    "error": result.get("error") if failed else None,
                    "cached": response.get("cached") or None,
                    "description": as_dict(result.get("testCase")).get("description"),
                }
            ),
        }
        verdict: bool | float | None = None
        if not failed and self._scorer == "success" and not _asserted(result):
            self._unasserted += 1  # promptfoo calls a test that checks nothing a success
        elif not failed and self._scorer == "success":
            verdict = result["success"] if isinstance(result["success"], bool) else number(result["success"])
            columns["score"] = number(result.get("score"))
        elif not failed:
            value = named.get(self._scorer or "")
            verdict = value if isinstance(value, bool) else number(value)
        key, given = self._template(result)
        prompt = result.get("prompt")
        rendered = _raw(prompt) if isinstance(prompt, (dict, str)) and not result.get("label_only") else None
        shape = (given if given is not None else rendered or "").lstrip()
        if shape[:1] in ("[", "{") and not shape.startswith(("{{", "{%", "{#")):
            # A chat is parsed and written anew with its values in it, so only its rendered texts can be aligned.
            values = {n: json.dumps(v, ensure_ascii=False)[1:-1] for n, v in values.items()}
            given = given if rendered is None else None
        elif given is not None:
            raw = values | {n: v for n, v in as_dict(result.get("vars")).items() if isinstance(v, (dict, list))}
            values = {n: text for n in names_in(given) if (text := value_of(n, raw)) is not None}
        if rendered is None:  # of a table; a label may be the template, else it is but its name
            columns["prompt"] = given or ""
            columns["prompt_id"] = None if given else key or None
            self._labels.setdefault(key, given)
        return Run(row, columns, verdict, result, rendered, values, key, given)

    def tell(self, path: Path, request: Request) -> None:
        """Say where the prompts of a table come from."""
        request.prompts.extend(PromptNote(given, "format") for given in self._labels.values() if given)
        if self._unasserted:
            request.warnings.append(
                f"{path.name}: {self._unasserted:,} results are of tests without assertions, which have no verdict; "
                "--grade can give one"
            )
        named = [label for label, given in self._labels.items() if not given]
        if named:
            request.warnings.append(
                f"{path.name}: the table has only the labels of some prompts ({', '.join(named)[:200]}), so these have "
                "names but no text; results written with -o results.json have both"
            )

    def _template(self, result: dict[str, Any]) -> tuple[str, str | None]:
        """Return which template a result belongs to, and its text where the file keeps it."""
        prompt = as_dict(result.get("prompt"))
        place, label = result.get("promptIdx"), prompt.get("label") or prompt.get("display")
        if self._heads:
            head: dict[str, Any] | None = None
            if isinstance(place, int) and not isinstance(place, bool) and 0 <= place < len(self._heads):
                head = self._heads[place]
            else:  # version 2 names prompts by their labels only
                same = [h for h in self._heads if label and (h.get("label") or h.get("display")) == label]
                head = same[0] if same else None
            if head is not None and _raw(head):
                return _raw(head), _raw(head)
        if isinstance(label, str) and names_in(label):
            return str(label), str(label)
        return str(result.get("promptId") or label or ""), None


def _open(path: Path) -> tuple[Iterator[tuple[int, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Return the results, the prompts and what is said of the run."""
    first = next(iter(read_blocks(path)), None)
    line = first.data.split(b"\n", 1)[0] if first else b""
    try:
        row = None if too_many_values(line) else json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and "results" not in row:
        return read_json_lines(path), [], {}
    document = load_json(path, read_whole(path))
    results = document.get("results") if isinstance(document, dict) else None
    about = dict(document) if isinstance(document, dict) else {}
    heads: Any = about.get("prompts")
    if isinstance(results, dict):
        about.setdefault("timestamp", results.get("timestamp"))
        heads = results.get("prompts") or as_dict(as_dict(results.get("table")).get("head")).get("prompts")
        results = results.get("results")
    if not isinstance(results, list):
        raise DataError(f"{path} is not a result of promptfoo: it has no list `results`")
    heads = heads if isinstance(heads, list) else []
    return iter(enumerate(results, 1)), [h if isinstance(h, dict) else {"raw": str(h)} for h in heads], about


def _header(head: bytes) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(head.decode("utf-8-sig", "ignore"), newline="")), [])
    except csv.Error:
        return []


def _columns(header: list[str]) -> list[tuple[int, int, str, str]]:
    """Return (first column, column after the last, provider, label) of each prompt in a table."""
    starts = [(i, match) for i, name in enumerate(header) if (match := _COLUMN.fullmatch(name))]
    ends = [*(i for i, _ in starts[1:]), len(header)]
    found = [(i, end, match[1], match[2]) for (i, match), end in zip(starts, ends, strict=False)]
    between = [header[k] for start, end, *_ in found for k in range(start + 1, end)]
    # Between two prompts stands nothing but what promptfoo adds itself.
    return found if all(n in _EXTRA or n.startswith(("Metric: ", "Metadata")) for n in between) else []


def _table(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the results of a CSV table; a row holds those of all prompts on one test."""
    try:
        text = read_whole(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 ({e.reason}); convert it with iconv") from e
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        header = next(reader, [])
        columns = _columns(header)
        for row, cells in enumerate(reader, 1):
            if not cells:
                continue
            if len(cells) != len(header):
                reason = f"{len(cells)} cells where the header has {len(header)}"
                yield row, Refusal(row, reason, cells[:50])
                continue
            first = columns[0][0] if columns else 0
            values = dict(zip(header[:first], cells[:first], strict=True))
            # A column of promptfoo's own, if any test has a description.
            about = values.pop("Description", None) if header[0] == "Description" and first > 1 else None
            for start, end, provider, label in columns:
                result = _from_cells(values, header[start + 1 : end], cells[start:end], provider, label)
                yield row, result | {"testCase": {"description": about or None}}
    except csv.Error as e:
        raise DataError(f"{path} cannot be read as a table: {e}") from e
    finally:
        csv.field_size_limit(before)


def _from_cells(values: dict[str, str], names: list[str], cells: list[str], provider: str, label: str) -> Any:
    """Return a result in the shape of the JSON files."""
    output, extra = cells[0], dict(zip(names, cells[1:], strict=True))
    status, score = extra.get("Status", ""), extra.get("Score", "")
    if not status and (match := _CELL.match(output)):  # of earlier versions: [PASS] (1.00) output
        status, score, output = match[1], match[2] or "", output[match.end() :]
    try:
        named = json.loads(extra.get("Named Scores") or "{}")
    except (ValueError, RecursionError):
        named = {}
    try:
        graded = float(score) if score else None
    except ValueError:
        graded = None
    result: dict[str, Any] = {
        "provider": {"id": provider},
        "prompt": {"label": label},
        "vars": values,
        "response": {"output": None if status == "ERROR" else output},
        "error": output if status == "ERROR" else None,
        "success": {"PASS": True, "FAIL": False}.get(status),
        "score": graded,
        "namedScores": named,
        "failureReason": _PROVIDER_ERROR if status == "ERROR" else 0,
        "label_only": True,
    }
    return result


def _raw(prompt: Any) -> str:
    raw = prompt if isinstance(prompt, str) else as_dict(prompt).get("raw")
    return "" if raw is None else _text(raw).removeprefix(PROMPTFOO_TEXT)


def _vars(result: dict[str, Any]) -> dict[str, str]:
    values = as_dict(result.get("vars")) or as_dict(as_dict(result.get("testCase")).get("vars"))
    texts = {n: _text(v) for n, v in values.items()}
    # A variable is itself a template to promptfoo; what is marked as raw is filled in without the marks.
    return {n: m[1] if (m := _RAW.fullmatch(t)) else t for n, t in texts.items() if values[n] is not None}


def _output(output: Any) -> str | None:
    return None if output is None else _text(output)


def _text(value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply"


def _asserted(result: dict[str, Any]) -> bool:
    """Say whether anything was checked; tables do not tell, and are believed."""
    test = result.get("testCase")
    if not isinstance(test, dict) or ("assert" not in test and "vars" not in test):
        return True
    checked = as_list(test.get("assert")) or as_list(as_dict(result.get("gradingResult")).get("componentResults"))
    return bool(checked) or result.get("success") is False


def _expected(result: dict[str, Any]) -> str | None:
    """Return the text that an assertion compares the output with."""
    for component in as_list(as_dict(result.get("gradingResult")).get("componentResults")):
        assertion = as_dict(as_dict(component).get("assertion"))
        if assertion.get("type") in _EXACT:
            value = as_dict(as_dict(component).get("metadata")).get("renderedAssertionValue", assertion.get("value"))
            if isinstance(value, str) and "{{" not in value:
                return value
    return None


PROMPTFOO = PromptfooResults()
