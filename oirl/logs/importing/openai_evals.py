"""OpenAI evals: the event log of one run, whose events are joined by sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oirl.errors import DataError
from oirl.logs.importing.base import Chunk, Refusal, Request
from oirl.logs.importing.lines import files_like, read_json_lines
from oirl.logs.importing.runs import Run, choose, number, run_chunks, text_of, tidy, whole
from oirl.logs.importing.templates import shared_affixes, system_template


@dataclass(slots=True)
class _Sample:
    """The events of one sample, each with its line."""

    sampling: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    match: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    row: int = 0


@dataclass(frozen=True)
class OpenAIEvals:
    """Event logs of OpenAI evals; events come in any order, so that a file is read before its first row."""

    name: str = "openai-evals"
    description: str = "OpenAI evals event log (.jsonl of oaieval --record_path)"
    record: str = "interactions"
    options: frozenset[str] = frozenset({"scorer"})

    def find(self, folder: Path) -> list[Path]:
        """Return the event logs in a folder."""
        return files_like(folder, (".jsonl",), self.sniff)

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept a log that begins with its `spec`, or whose lines are events of samples."""
        start = head.lstrip(b"\xef\xbb\xbf \r\n")
        spec = b'"spec"' in head and b'"completion_fns"' in head
        event = all(k in head for k in (b'"event_id"', b'"sample_id"', b'"run_id"', b'"type"'))
        return start[:1] == b"{" and (spec or event)

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield one row per sampled reply."""
        yield from run_chunks(path, _runs(path, request), request)


def _runs(path: Path, request: Request) -> Iterator[Run | Refusal]:
    spec: dict[str, Any] = {}
    samples: dict[str, _Sample] = {}
    for row, event in read_json_lines(path):
        if isinstance(event, dict) and isinstance(event.get("spec"), dict):
            spec = event["spec"]
        elif isinstance(event, Refusal):
            yield event
        elif problem := _add(samples, row, event):
            yield Refusal(row, problem, event)
    if not samples:
        raise DataError(f"{path} holds no events of samples")
    scores: dict[str, None] = {"match": None} if any(s.match for s in samples.values()) else {}
    # Other metrics, such as a grader's choice of a letter, are no scores.
    numbers = {
        n for s in samples.values() for n, v in s.metrics.items() if isinstance(v, bool) or number(v) is not None
    }
    scores |= {name: None for s in samples.values() for name in s.metrics if name in numbers}
    scorer = choose(path, request.scorer, scores, "score")
    if len(scores) > 1 and request.scorer is None:
        request.warnings.append(
            f"{path.name}: the verdict is {scorer!r}; --scorer chooses another: {', '.join(scores)}"
        )
    chats = {name: _chat(s.sampling[0][1].get("prompt")) for name, s in samples.items() if s.sampling}
    before = system_template([lead for lead, _ in chats.values()])
    start, end = shared_affixes(user for _, user in chats.values())
    for name, sample in samples.items():
        if name not in chats:
            yield Refusal(sample.row, f"sample {name!r} has no `sampling` event, so its query is not known")
            continue
        lead, user = chats[name]
        query = user[len(start) : len(user) - len(end)].strip()
        yield from _replies(name, sample, query, (lead, user, before), spec, scorer)


def _replies(
    name: str, sample: _Sample, query: str, chat: tuple[str, str, str], spec: dict[str, Any], scorer: str | None
) -> Iterator[Run]:
    lead, user, before = chat
    # A grading model's sampling events follow; only as many replies as verdicts belong to the model under test.
    count = len(sample.match) if len(sample.match) == len(sample.sampling) else 1
    replicate = 0
    sampling = sample.sampling
    if count == 1 and sample.match:
        # Of several samplings, such as a chain of thought and then the answer, the verdict is on one.
        judged = _text(sample.match[0][1].get("sampled"))
        sampling = [e for e in sampling if judged is not None and judged in _texts(e[1].get("sampled"))] or sampling
    for i, (row, data) in enumerate(sampling[:count]):
        match = sample.match[i][1] if i < len(sample.match) else {}
        usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
        value = match.get("correct") if scorer == "match" else sample.metrics.get(scorer or "")
        replies: list[str | None] = [*_texts(data.get("sampled"))] or [_text(match.get("sampled"))]
        for k, reply in enumerate(replies):
            values = {
                "query": query,
                "response": reply,
                "answer": _expected(match) or _text(sample.raw.get("ideal")),
                "dataset": spec.get("base_eval"),
                "split": None,
                "model": _model(spec, data),
                "run_id": spec.get("run_id"),
                "replicate": replicate if len(replies) > 1 or count > 1 else None,
                "tokens_in": whole((usage or {}).get("prompt_tokens")),
                "tokens_out": whole((usage or {}).get("completion_tokens")),
                "created_at": data.get("created_at"),
                "metadata": tidy({"sample_id": name, "picked": match.get("picked"), "metrics": sample.metrics}),
            }
            replicate += 1
            # The verdict is that of the first of several replies to one request.
            verdict = None if k else value if isinstance(value, bool) else number(value)
            if user != query:
                rendered = f"{lead}\n\n{user}" if lead else user
                yield Run(row, values, verdict, data, rendered, {"query": query})
            elif before:
                yield Run(row, values, verdict, data, lead, {}, "system", before)
            else:
                yield Run(row, values | {"prompt": ""}, verdict, data)


def _add(samples: dict[str, _Sample], row: int, event: Any) -> str | None:
    """Add an event to those of its sample; return what is wrong with it."""
    if not isinstance(event, dict):
        return f"a {type(event).__name__}, not an event"
    if "final_report" in event:
        return None
    if "sample_id" not in event:
        return "neither an event of a sample nor the spec or the report of a run"
    name, kind, data = event.get("sample_id"), event.get("type"), event.get("data")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        return "`sample_id` is neither text nor a number"
    if not isinstance(data, dict):
        return "the event has no `data`"
    sample = samples.setdefault(str(name), _Sample(row=row))
    if kind == "sampling":
        sample.sampling.append((row, data | {"created_at": event.get("created_at")}))
    elif kind == "match":
        sample.match.append((row, data))
    elif kind == "metrics":
        sample.metrics |= data
    elif kind == "raw_sample":
        sample.raw |= data
    return None


def _chat(prompt: Any) -> tuple[str, str]:
    """Return what stands before the last message, and that message; of plain text, all of it is the message."""
    if isinstance(prompt, list):
        texts = [text_of(m.get("content")) for m in prompt if isinstance(m, dict)]
        roles = [m.get("role") for m in prompt if isinstance(m, dict)]
        last = max((i for i, role in enumerate(roles) if role == "user"), default=len(texts) - 1)
        return ("\n\n".join(texts[:last]), texts[last]) if texts else ("", "")
    return "", _text(prompt) or ""


def _texts(sampled: Any) -> list[str]:
    items = sampled if isinstance(sampled, list) else [sampled]
    return [t for item in items if (t := _text(item)) is not None]


def _text(value: Any) -> str | None:
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None


def _expected(match: dict[str, Any]) -> str | None:
    expected = match.get("expected")
    return str(expected) if isinstance(expected, (int, float)) else _text(expected)


def _model(spec: dict[str, Any], data: dict[str, Any]) -> str | None:
    named = spec.get("completion_fns")
    return _text(named) or _text(data.get("model"))


OPENAI_EVALS = OpenAIEvals()
