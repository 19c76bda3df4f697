"""A log's queries and prompts as inputs of other tools, to be run again: lm-eval tasks, promptfoo configs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from oirl.logs.atomic import atomic_file, atomic_folder
from oirl.logs.exporting.pipeline import ExportReport, check_written
from oirl.logs.rendering import PROMPTFOO_TEXT, fields_of, jinja

Rows = Callable[[], Iterator[pa.RecordBatch]]

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?%?")
_NO_ANSWER = "no gold answer, so there is nothing to check"
_NOT_FILLED = "the prompt cannot be filled with the query alone"
_READ = "promptfoo would read a part of the query, the answer or the prompt as a template or a file"
_NAMES = re.compile(r"\b(?:env|process|query|answer)\b")
_OUTSIDE = re.compile(r"\b(?:env|process)\b")
_FILES = ("file://", "package:")


@dataclass(slots=True)
class _Inputs:
    """The distinct queries and prompts of a log."""

    queries: dict[str, dict[str, str]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LmEvalTask:
    """A folder of lm-evaluation-harness tasks: one per prompt, all over the same documents."""

    name: str = "lm-eval"
    description: str = "folder of lm-evaluation-harness tasks: the log's queries under each of its prompts"
    records: tuple[str, ...] = ("interactions",)

    def write(self, rows: Rows, out: Path, report: ExportReport) -> None:
        """Write data.jsonl, a task per prompt, and the group `oirl` of them all."""
        import yaml

        inputs = _collect(rows, report, lambda query, answer, prompt: None)
        numeric = all(_NUMBER.fullmatch(q["answer"]) for q in inputs.queries.values())
        names: dict[str, str] = {}
        with atomic_folder(out, marker="_oirl.yaml", others=("data.jsonl", "oirl_*.yaml")) as folder:
            lines = [json.dumps(q, ensure_ascii=False) + "\n" for q in inputs.queries.values()]
            (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
            for prompt_id, template in inputs.prompts.items():
                task = _unique(f"oirl_{_slug(prompt_id)}", names)
                names[task] = prompt_id
                text = yaml.safe_dump(
                    _task(task, template, numeric, {"prompt_id": prompt_id, "prompt": inputs.originals[prompt_id]}),
                    sort_keys=False,
                    allow_unicode=True,
                )
                (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
            group = yaml.safe_dump({"group": "oirl", "task": list(names)}, sort_keys=False)
            (folder / "_oirl.yaml").write_text(group, encoding="utf-8")
            report.written = len(inputs.queries) * len(names)
            check_written(report)
        report.next = f"cd {out} && lm_eval --include_path . --tasks oirl --log_samples --output_path ../results …"


@dataclass(frozen=True)
class PromptfooConfig:
    """A config of promptfoo: prompts, and a test per query that looks for the gold answer."""

    name: str = "promptfoo"
    description: str = "promptfoo config (.yaml): the log's prompts, and a test per query"
    records: tuple[str, ...] = ("interactions",)

    def write(self, rows: Rows, out: Path, report: ExportReport) -> None:
        """Write the config; its provider is `echo` until the user names a real one."""
        import yaml

        inputs = _collect(rows, report, _promptfoo_problem)
        tests = [
            {
                "description": query["query_id"],
                "vars": {"query": query["query"], "answer": query["answer"]},
                "assert": [_assertion(query["answer"])],
            }
            for query in inputs.queries.values()
        ]
        config = {
            "description": "Queries and prompts of a log, to be run again: put your model in place of echo",
            "providers": ["echo"],
            "prompts": [{"label": name, "raw": _no_path(raw)} for name, raw in inputs.prompts.items()],
            "tests": tests,
        }
        with atomic_file(out) as temporary:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")
            report.written = len(tests) * len(inputs.prompts)
            check_written(report)
        report.next = f"promptfoo eval -c {out} -o results.json, with your model under `providers`"


def _promptfoo_problem(query: str, answer: str, prompt: str) -> str | None:
    """Return why promptfoo would not fill in a row's texts as they are.

    It fills variables in as they are, but for statements and comments of a template, other variables, and the
    environment, which it reads before anything else is rendered, in prompts too.
    """
    for text in (query, answer):
        marked = ("{%" in text and "%}" in text) or ("{#" in text and "#}" in text)
        if marked or _named(text, _NAMES) or text.startswith(_FILES):
            return _READ
    return _READ if _named(prompt, _OUTSIDE) or prompt.startswith(_FILES) else None


def _named(text: str, names: re.Pattern[str]) -> bool:
    """Say whether one of some names stands between `{{` and `}}`."""
    pieces = [piece.partition("{{")[2] for piece in text.split("}}")[:-1]]
    return any(names.search(piece) for piece in pieces)


def _no_path(raw: str) -> str:
    """Return a prompt that promptfoo takes for a text: one line with a dot or a slash could be a file's name."""
    return PROMPTFOO_TEXT + raw if "\n" not in raw and any(c in raw for c in "./\\*") else raw


def _collect(rows: Rows, report: ExportReport, problem: Callable[[str, str, str], str | None]) -> _Inputs:
    inputs = _Inputs()
    templates: dict[str, str | None] = {}
    for batch in rows():
        for row in batch.select(["query_id", "query", "prompt_id", "prompt", "answer", "metadata"]).to_pylist():
            template = templates.setdefault(row["prompt_id"], jinja(row["prompt"]))
            answer = (row["answer"] or "").rpartition("####")[2].strip()
            reason = _NO_ANSWER if not answer else _NOT_FILLED if template is None else None
            if fields_of(row["prompt"], row["metadata"]) is not None:
                reason = reason or _NOT_FILLED
            reason = reason or problem(row["query"], answer, row["prompt"])
            if reason:
                report.left_out[reason] += 1
                continue
            query = {"query_id": row["query_id"], "query": row["query"], "answer": answer}
            inputs.queries.setdefault(row["query_id"], query)
            inputs.prompts.setdefault(row["prompt_id"], template or "")
            inputs.originals.setdefault(row["prompt_id"], row["prompt"])
    return inputs


def _task(task: str, template: str, numeric: bool, origin: dict[str, str]) -> dict[str, Any]:
    ignored = {"ignore_case": True, "ignore_punctuation": not numeric}
    config: dict[str, Any] = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "data.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": template,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, **ignored}],
    }
    if numeric:
        config["metric_list"][0]["regexes_to_ignore"] = [",", r"\$", "%", r"\.$"]
        last = {"function": "regex", "group_select": -1, "regex_pattern": r"(-?\$?[0-9][0-9,]*(?:\.[0-9]+)?)"}
        config["filter_list"] = [{"name": "last-number", "filter": [last, {"function": "take_first"}]}]
    config["metadata"] = {"version": 1.0, **origin}
    return config


def _assertion(answer: str) -> dict[str, str]:
    if _NUMBER.fullmatch(answer):
        # The number itself, not a part of a longer one.
        return {"type": "regex", "value": rf"(^|[^0-9.,]){re.escape(answer)}($|[^0-9.,]|[.,]($|[^0-9]))"}
    return {"type": "icontains", "value": answer}


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()[:60] or "prompt"


def _unique(name: str, taken: dict[str, str]) -> str:
    found, i = name, 2
    while found in taken:
        found, i = f"{name}_{i}", i + 1
    return found


LM_EVAL = LmEvalTask()
PROMPTFOO = PromptfooConfig()
