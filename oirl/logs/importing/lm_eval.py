"""lm-evaluation-harness: the samples that `--log_samples` writes, one line per document and filter."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oirl.errors import ConfigError, DataError, nearest
from oirl.logs.importing.base import Chunk, Refusal, Request
from oirl.logs.importing.lines import files_like, read_json_lines, read_whole
from oirl.logs.importing.lm_eval_sample import read_arguments, read_replies, read_target, read_verdict, slot_text
from oirl.logs.importing.runs import Run, as_list, choose, head_of, load_json, run_chunks, tidy
from oirl.logs.importing.templates import EXAMPLES, filled, is_plain, names_in, value_of
from oirl.logs.text import normalise, text_hash, text_id

_TIME = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)$")
_REFERENCES = re.compile(r"""\{[{%][^{}]*?[}%]\}|doc\[["'](\w+)["']\]|doc\.get\(["'](\w+)["']""")
_WORD = re.compile(r"[A-Za-z_]\w*")
_CODE = re.compile(r"\s*(?:def |lambda\b|@|<function)")
_GOLD = {"answer", "label", "target", "gold", "answer_key", "answerKey", "correct"}
_QUERY_FIELDS = ("question", "query", "problem", "input", "instruction", "prompt", "text", "sentence", "goal", "ctx")
_VOTES = {"majority_vote", "maj"}
_MAX_REPLIES = 10_000


@dataclass(slots=True)
class _Task:
    """What the results file says of one run of a task."""

    name: str
    run_id: str | None
    model: str | None = None
    known: bool = False
    lead: str = ""
    template: str | None = None
    source: str = ""
    prompt_id: str | None = None
    prompt: str | None = None
    shots: int = 0
    votes: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class LmEvalSamples:
    """Samples of lm-evaluation-harness, with model and template from the results file beside them."""

    name: str = "lm-eval"
    description: str = "lm-evaluation-harness samples_*.jsonl (--log_samples), or the folder of its results"
    record: str = "interactions"
    options: frozenset[str] = frozenset({"filter", "scorer"})

    def find(self, folder: Path) -> list[Path]:
        """Return the samples files of a folder; those of local models stand in hidden folders."""
        return [p for p in files_like(folder, (".jsonl",), self.sniff) if p.name.startswith("samples_")]

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept lines with the keys that every sample has."""
        keys = [b'"doc_id"', b'"doc"']
        # Of a document longer than the head only the first keys are in it.
        if not path.name.startswith("samples_"):
            keys += [b'"filtered_resps"', b'"arguments"']
        return head.lstrip(b"\xef\xbb\xbf \r\n")[:1] == b"{" and all(key in head for key in keys)

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield one row per document and reply, of one filter."""
        task = _task_of(path)
        if not task.known:
            request.warnings.append(
                f"{path.name}: no results_*.json of this run beside it, so the model is not known (--set model=NAME) "
                "and the prompt is recovered from the rendered texts"
            )
        yield from run_chunks(path, self._runs(path, task, request), request)

    def _runs(self, path: Path, task: _Task, request: Request) -> Iterator[Run | Refusal]:
        lines = _lines(path)
        first = head_of(lines)
        head = [s for _, s in first if isinstance(s, dict)]
        metrics = {str(m): None for s in head for m in as_list(s.get("metrics")) if isinstance(m, str)}
        reader = _Reader(task, choose(path, request.scorer, metrics, "metric"), head)
        filters: Counter[str] = Counter()
        wanted = self._wanted(path, request, head)
        for row, sample in itertools.chain(first, lines):
            if isinstance(sample, Refusal):
                yield sample
                continue
            kept = _filter_of(sample)
            filters[kept] += 1
            if wanted is None and len(filters) > 1:
                raise ConfigError(_two_filters(path))
            if wanted is None or kept == wanted:
                yield from reader.read(row, sample, kept)
        if len(reader.fields) > 1 and "query" not in request.mapped:
            request.warnings.append(
                f"{path.name}: the query is made of {' + '.join(f'doc.{f}' for f in reader.fields)}; "
                "--map query=doc.FIELD takes one of them"
            )
        left = sum(n for name, n in filters.items() if name != wanted) if wanted else 0
        self._tell(path, request, left, metrics)

    def _wanted(self, path: Path, request: Request, head: list[dict[str, Any]]) -> str | None:
        """Return the filter to read; None for a file with one filter only, which there is no choice in."""
        if request.filter is None:
            return None
        if any(_filter_of(sample) == request.filter for sample in head):
            request.followed = True
            return request.filter
        there = _filters(path)
        if request.filter in there:
            request.followed = True
            return request.filter
        problem = (
            f"{path}: --filter {request.filter}: no filter {request.filter!r}{nearest(request.filter, there)}; there: "
            f"{', '.join(there)}"
        )
        if len(there) > 1:
            raise ConfigError(problem)
        request.unfollowed = problem
        return None

    def _tell(self, path: Path, request: Request, left: int, metrics: dict[str, None]) -> None:
        """Say what was left out and chosen, once the whole file was read."""
        if left:
            request.warnings.append(f"{path.name}: {left:,} lines hold the same replies under other filters")
        if len(metrics) > 1 and request.scorer is None:
            request.warnings.append(
                f"{path.name}: the verdict is the metric {next(iter(metrics))!r}; --scorer chooses another: "
                f"{', '.join(metrics)}"
            )


class _Reader:
    """Samples of one task to runs."""

    def __init__(self, task: _Task, metric: str | None, head: list[dict[str, Any]]) -> None:
        self._task = task
        self._metric = metric
        self.fields = _query_fields(head, task)  # makes a template of a field's name, so it comes first
        self._plain = task.template is not None and is_plain(task.template)
        self._names = names_in(task.lead + (task.template or "")) if self._plain else []
        self._votes = task.votes if task.known else _votes_seen(head)
        self._ids: dict[int, int] = {}

    def _given(self, rendered: str | None, slots: dict[str, str]) -> str | None:
        """Return the template with its description, where that stands right before it."""
        whole = self._task.lead + (self._task.template or "")
        if self._plain and is_plain(whole) and rendered and filled(whole, slots) == rendered:
            return whole
        if not self._plain and self._task.template and rendered and rendered.startswith(self._task.lead):
            return whole
        return self._task.template

    def read(self, row: int, sample: dict[str, Any], kept: str) -> Iterator[Run | Refusal]:
        doc = sample.get("doc")
        doc = doc if isinstance(doc, dict) else {"doc": doc}
        slots = {name: text for name in doc if (text := slot_text(doc[name])) is not None}
        rendered, settings, options = read_arguments(sample.get("arguments"))
        query = "\n".join(slots[f] for f in self.fields if f in slots).strip()
        # A document without a text of its own, as in perplexity tasks, is what the model was given.
        query = query or slots.get("doc") or rendered or ""
        replies = read_replies(sample, options, self._metric)
        if len(replies) > _MAX_REPLIES:
            yield Refusal(row, f"{len(replies):,} replies to one document; at most {_MAX_REPLIES:,} are read")
            return
        target = read_target(sample.get("target"), options)
        votes = kept in self._votes and len(replies) > 1
        metrics = {m: sample.get(m) for m in as_list(sample.get("metrics")) if isinstance(m, str)}
        metadata = {
            "task": self._task.name or None,
            "doc_id": sample.get("doc_id"),
            "doc_hash": sample.get("doc_hash"),
            "filter": None if kept == "none" else kept,
            "filtered": None if options else sample.get("filtered_resps"),
            "metrics": metrics if len(metrics) > 1 or votes else None,
        }
        query_id = self._query_id(query, doc, sample.get("doc_hash"))
        if self._plain:
            shown = {n: text for n in self._names if (text := value_of(n, doc)) is not None}
        else:
            shown = {f: slots[f] for f in self.fields if f in slots} or {"query": query}
        for i, reply in enumerate(replies):
            values = {
                "query": query,
                "query_id": query_id,
                "response": reply,
                "answer": target,
                "model": self._task.model,
                "run_id": self._task.run_id,
                "sampling": tidy(settings) if settings else None,
                "metadata": tidy(metadata),
            }
            if self._task.prompt_id:
                values["prompt_id"] = self._task.prompt_id
                if self._task.prompt is not None:
                    values["prompt"] = self._task.prompt
            if len(replies) > 1:
                values["replicate"] = i
            # The score is that of the first reply only, or, where a filter votes, of none of them.
            verdict = None if i or votes else read_verdict(sample.get(self._metric) if self._metric else None)
            examples = f"{{{self._task.shots} examples}}" if self._task.shots else EXAMPLES
            yield Run(row, values, verdict, sample, rendered, shown, "", self._given(rendered, shown), examples)

    def _query_id(self, query: str, doc: dict[str, Any], doc_hash: Any) -> str | None:
        """Name a query by its text, as all formats do; other documents of the same text, such as choices, are told."""
        if self._task.prompt_id and isinstance(doc.get("query_id"), str):
            found: str = doc["query_id"]  # a task that `oirl export` wrote
            return found
        if not isinstance(doc_hash, str) or not query:
            return None
        # Hashes, not texts: of a large file these are many.
        first = self._ids.setdefault(text_hash(normalise(query)), text_hash(doc_hash))
        return None if first == text_hash(doc_hash) else f"{text_id(query)}-{doc_hash[:12]}"


def _filter_of(sample: dict[str, Any]) -> str:
    kept = sample.get("filter")
    return kept if isinstance(kept, str) else "none"


def _votes_seen(head: list[dict[str, Any]]) -> set[str]:
    """Return the filters whose result cannot be that of the first reply: what they found does not stand in it."""
    found: set[str] = set()
    for sample in head:
        replies, filtered = read_replies(sample, [], None), as_list(sample.get("filtered_resps"))
        scored = filtered[0] if filtered else None
        if len(replies) > 1 and isinstance(scored, str) and scored != "[invalid]" and scored not in (replies[0] or ""):
            found.add(_filter_of(sample))
    return found


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | Refusal]]:
    for row, sample in read_json_lines(path):
        if isinstance(sample, Refusal) or (isinstance(sample, dict) and "doc" in sample):
            yield row, sample
        else:
            yield row, Refusal(row, "not a sample of lm-eval: it has no `doc`", sample)


def _task_of(path: Path) -> _Task:
    """Return what the results file beside `path` says; without one, what the name of the file says."""
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl").removeprefix("samples_")
    time = _TIME.search(stem)
    name = stem[: time.start()] if time else stem
    task = _Task(name, time[1] if time else stem)
    beside = sorted(path.parent.glob("results_*.json"), reverse=True)
    same = [p for p in beside if time and time[1] in p.name]
    for file in same if time else beside:
        try:
            results = load_json(file, read_whole(file))
        except DataError:
            continue
        configs = results.get("configs") if isinstance(results, dict) else None
        if isinstance(configs, dict) and isinstance(configs.get(name), dict):
            _fill_task(task, results, configs[name])
            break
    return task


def _fill_task(task: _Task, results: dict[str, Any], config: dict[str, Any]) -> None:
    task.known = True
    task.model = _model_name(results)
    shots = config.get("num_fewshot")
    task.shots = shots if isinstance(shots, int) and not isinstance(shots, bool) and shots > 0 else 0
    template = config.get("doc_to_text")
    if isinstance(template, str) and template.strip():
        task.source = template
        task.template = None if _CODE.match(template) else template
    about = config.get("metadata")
    if task.name.startswith("oirl_") and isinstance(about, dict) and isinstance(about.get("prompt_id"), str):
        task.prompt_id = about["prompt_id"]
        task.prompt = about["prompt"] if isinstance(about.get("prompt"), str) else None
    lead = config.get("description")
    task.lead = lead if isinstance(lead, str) else ""
    for entry in as_list(config.get("filter_list")):
        steps = entry.get("filter") if isinstance(entry, dict) else None
        functions = [s.get("function") for s in as_list(steps) if isinstance(s, dict)]
        if _VOTES & {f for f in functions if isinstance(f, str)}:
            task.votes.add(str(entry.get("name")))


def _model_name(results: dict[str, Any]) -> str | None:
    config = results.get("config")
    config = config if isinstance(config, dict) else {}
    arguments = config.get("model_args")
    if isinstance(arguments, str):
        arguments = dict(pair.split("=", 1) for pair in arguments.split(",") if "=" in pair)
    if isinstance(arguments, dict):
        for key in ("pretrained", "model", "engine"):
            if isinstance(arguments.get(key), str) and arguments[key].strip():
                name: str = arguments[key]
                return name
    model = config.get("model")
    return model if isinstance(model, str) else None


def _query_fields(head: list[dict[str, Any]], task: _Task) -> list[str]:
    """Return the fields of `doc` that make the query: those that the template names, or that rendered prompts show."""
    docs = [s["doc"] for s in head if isinstance(s.get("doc"), dict)]
    known = list(dict.fromkeys(k for d in docs for k in d if slot_text(d[k]) is not None))
    template = task.source
    if template in known:  # the name of a field is short for that field alone
        task.template = "{{" + template + "}}"
        return [template]
    named = _named(template)
    used = [f for f in known if f in named]
    used = [f for f in used if f not in _GOLD] or used  # a function may look the gold answer up
    if not used or set(used) <= _GOLD:
        shown = Counter(f for s in head if isinstance(s.get("doc"), dict) for f in _shown(s))
        used = [f for f in known if shown[f] > 0.9 * len(docs)]
        preferred = [f for f in _QUERY_FIELDS if f in used]
        used = preferred[:1] or used
    # What is the same in every document is part of the instruction.
    varying = [f for f in used if len({str(d.get(f)) for d in docs}) > 1]
    if not varying and len(docs) > 1:  # a constant is no query
        varying = [f for f in _QUERY_FIELDS if f in known and len({str(d.get(f)) for d in docs}) > 1][:1]
    return varying or used or [f for f in _QUERY_FIELDS if f in known][:1]


def _named(template: str) -> set[str]:
    """Return the words that a template, or the source of a function, uses as fields."""
    found = {_WORD.findall(name)[0] for name in names_in(template) if _WORD.match(name)}
    for match in _REFERENCES.finditer(template):
        found.update(g for g in match.groups() if g)
        if match[0].startswith("{"):
            found.update(_WORD.findall(match[0]))
    return found


def _shown(sample: dict[str, Any]) -> Iterator[str]:
    rendered, _, _ = read_arguments(sample.get("arguments"))
    target = sample.get("target")
    for name, value in sample["doc"].items():
        text = slot_text(value)
        text = text.strip() if text else text
        if text and len(text) > 3 and text != target and rendered and text in rendered:
            yield name


def _filters(path: Path) -> list[str]:
    return list(dict.fromkeys(_filter_of(s) for _, s in _lines(path) if isinstance(s, dict)))


def _two_filters(path: Path) -> str:
    seen = [name[:80] for name in _filters(path)[:20]]
    return (
        f"{path}: its documents are scored under several filters, which may disagree: {', '.join(seen)}; "
        f"choose one with --filter, for example --filter {seen[0]}"
    )


LM_EVAL = LmEvalSamples()
