"""A small valid file of every format, made in code from invented data, with what must come out of it."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

Pieces = list[Any]
"""What a file is made of and mutations work on: its lines, its one JSON value, its rows or its zip members."""

QUESTIONS = [
    ("Mia packs 3 crates with 4 jars each. How many jars is that?", "12", "12"),
    ("A tram holds 20 people and 7 get off. How many stay?", "13", "14"),
    ("Noor buys 5 pens at 2 coins each. What does she pay?", "10", "10"),
    ("Six hens lay 9 eggs a day between them. How many in 2 days?", "18", "81"),
]
"""Query, answer, reply; the first and the third reply are right."""
RIGHT = [reply == answer for _, answer, reply in QUESTIONS]
LEAD, TAIL = "Solve the puzzle.\nPuzzle: ", "\nResult:"

_TOKEN = re.compile(r'"@@(deep|digits)(\d+)@@"')


def deep(levels: int) -> str:
    """Return what becomes `levels` nested lists in JSON; a real value of that depth could not be written."""
    return f"@@deep{levels}@@"


def digits(count: int) -> str:
    """Return what becomes a whole number of `count` digits in JSON."""
    return f"@@digits{count}@@"


def to_json(value: Any, **options: Any) -> str:
    """Return JSON (with NaN, as most tools write it); tokens of `deep` and `digits` are filled in."""

    def fill(match: re.Match[str]) -> str:
        size = int(match[2])
        return "[" * size + "]" * size if match[1] == "deep" else "9" * size

    return _TOKEN.sub(fill, json.dumps(value, **options))


# Writers: pieces to bytes


def lines(pieces: Pieces) -> bytes:
    return "".join(to_json(p) + "\n" for p in pieces).encode()


def document(pieces: Pieces) -> bytes:
    return "\n".join(to_json(p, indent=1) for p in pieces).encode()


def array(pieces: Pieces) -> bytes:
    return to_json(pieces).encode()


def delimited(delimiter: str) -> Callable[[Pieces], bytes]:
    def write(pieces: Pieces) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        for row in pieces:
            cells = row if isinstance(row, list) else [row]
            writer.writerow([c if isinstance(c, str) else "" if c is None else to_json(c) for c in cells])
        return text.getvalue().encode("utf-8", "surrogatepass")

    return write


def _table(pieces: Pieces) -> pa.Table:
    objects = [p if isinstance(p, dict) else {"odd": str(p)} for p in pieces]
    rows = [{n.encode("utf-8", "replace").decode(): v for n, v in o.items()} for o in objects]
    names = list(dict.fromkeys(n for r in rows for n in r))
    columns = {}
    for name in names:
        values = [r.get(name) for r in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):  # of several types: as text
            columns[name] = pa.array([None if v is None else to_json(v) for v in values], pa.string())
    return pa.table(columns)


def parquet(pieces: Pieces) -> bytes:
    table, sink = _table(pieces), pa.BufferOutputStream()
    try:
        pq.write_table(table, sink)
    except pa.ArrowException:  # structs without fields, which Parquet does not have
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({n: [to_json(v) for v in table[n].to_pylist()] for n in table.column_names}), sink)
    return sink.getvalue().to_pybytes()


def arrow(pieces: Pieces) -> bytes:
    table = _table(pieces)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@dataclass
class Member:
    """A member of a zip archive; what is not given is as it should be."""

    name: str | bytes
    data: bytes
    method: int = 8
    flags: int = 0x800
    crc: int | None = None
    size: int | None = None
    packed: bytes | None = None
    packed_size: int | None = None
    offset: int | None = None
    system: int = 3
    attributes: int = 0o100644 << 16
    version: int = 20


def zip_bytes(members: list[Member], comment: bytes = b"") -> bytes:
    """Return a zip archive; unlike `zipfile`, this writes any nonsense that a member asks for."""
    body, directory = b"", b""
    for m in members:
        name = m.name if isinstance(m.name, bytes) else m.name.encode("utf-8", "surrogatepass")
        packed = m.packed if m.packed is not None else _pack(m.data, m.method)
        crc = zlib.crc32(m.data) if m.crc is None else m.crc
        size = len(m.data) if m.size is None else m.size
        packed_size = len(packed) if m.packed_size is None else m.packed_size
        stamp = (m.flags, m.method, 0, 0x21, crc, min(packed_size, 0xFFFFFFFF), min(size, 0xFFFFFFFF), len(name))
        extra = struct.pack("<HHQQ", 1, 16, size, packed_size) if size > 0xFFFFFFFE else b""
        if extra:
            stamp = (*stamp[:5], 0xFFFFFFFF, 0xFFFFFFFF, len(name))
        at = len(body) if m.offset is None else m.offset
        body += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", m.version, *stamp, len(extra)) + name + extra + packed
        directory += struct.pack(
            "<4sBBHHHHHIIIHHHHHII", b"PK\1\2", m.version, m.system, m.version, *stamp, len(extra), 0, 0, 0,
            m.attributes, at,
        ) + name + extra  # fmt: skip
    count = min(len(members), 0xFFFF)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), len(comment))
    return body + directory + end + comment


def _pack(data: bytes, method: int) -> bytes:
    if method == 8:
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        return packer.compress(data) + packer.flush()
    if method == 93:
        return pa.compress(data, codec="zstd", asbytes=True)
    return data


def eval_archive(method: int) -> Callable[[Pieces], bytes]:
    """Return a writer of .eval files: pieces are {"name": member, "value": its JSON}."""

    def write(pieces: Pieces) -> bytes:
        members = []
        for piece in pieces:
            name, value = (piece.get("name"), piece.get("value")) if isinstance(piece, dict) else ("odd", piece)
            text = name if isinstance(name, str) else to_json(name)
            members.append(Member(text[:60_000], to_json(value).encode(), method))
        return zip_bytes(members)

    return write


# Samples


@dataclass(frozen=True)
class Sample:
    """One file of a format.

    Attributes:
        name: Of the sample; several may be of one format.
        format: The registered format.
        file: Where it stands in the folder that holds it, with the files beside it.
        pieces: What it is made of.
        write: Makes bytes of the pieces.
        beside: Other files of the same run -> their JSON.
        kept: Rows kept.
        refused: Rows refused.
        right: Rows that are correct; None for preferences and query lists.
        queries: Distinct queries.
        text: Whether it may be gzipped.
        options: What `import_log` needs to be told.
    """

    name: str
    format: str
    file: str
    pieces: Callable[[], Pieces]
    write: Callable[[Pieces], bytes]
    kept: int = 4
    refused: int = 0
    right: int | None = 2
    queries: int = 4
    text: bool = True
    beside: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, folder: Path, content: bytes | None = None, beside: Mapping[str, bytes] | None = None) -> Path:
        """Write the sample, or `content` in its place, into a folder and return its path."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.write(self.pieces()) if content is None else content)
        for name, value in self.beside.items():
            data = (beside or {}).get(name)
            (path.parent / name).write_bytes(to_json(value()).encode() if data is None else data)
        return path


def _log_rows() -> Pieces:
    return [
        {"query": q, "prompt": "Count. {query}", "response": r, "answer": a, "correct": r == a, "tokens_out": i}
        for i, (q, a, r) in enumerate(QUESTIONS)
    ]


def _log_cells() -> Pieces:
    rows = _log_rows()
    return [list(rows[0]), *([to_json(v) if isinstance(v, (bool, int)) else v for v in r.values()] for r in rows)]


def _gsm8k() -> Pieces:
    return [{"question": q, "answer": f"Work it out, step by step.\n#### {a}"} for q, a, _ in QUESTIONS]


def _svamp() -> Pieces:
    return [
        {"ID": f"x-{i}", "Body": q.split(". ")[0], "Question": q.split(". ")[-1], "Answer": float(a),
         "Equation": "( 1 )", "Type": "Sum"}
        for i, (q, a, _) in enumerate(QUESTIONS)
    ]  # fmt: skip


def _lm_eval() -> Pieces:
    return [
        {
            "doc_id": i,
            "doc": {"puzzle": q, "solution": a},
            "target": a,
            "arguments": {"gen_args_0": {"arg_0": LEAD + q + TAIL, "arg_1": {"until": ["\n\n"], "temperature": 0.0}}},
            "resps": [[r]],
            "filtered_resps": [r],
            "filter": "first-word",
            "metrics": ["exact_match"],
            "doc_hash": f"{i:064x}",
            "exact_match": float(r == a),
        }
        for i, (q, a, r) in enumerate(QUESTIONS)
    ]


def _lm_eval_choice() -> Pieces:
    return [
        {
            "doc_id": i,
            "doc": {"puzzle": q, "options": ["12", "10"]},
            "target": "0",
            "arguments": [[LEAD + q + TAIL, " 12"], [LEAD + q + TAIL, " 10"]],
            "resps": [[["-1.5", "False"]], [["-2.5", "False"]]],
            "filtered_resps": [["-1.5", "False"], ["-2.5", "False"]],
            "filter": "none",
            "metrics": ["acc", "acc_norm"],
            "acc": float(i % 2),
            "acc_norm": 1.0,
        }
        for i, (q, _, _) in enumerate(QUESTIONS)
    ]


def _lm_eval_results() -> Any:
    return {
        "results": {"puzzles": {"alias": "puzzles"}},
        "configs": {
            "puzzles": {
                "task": "puzzles",
                "doc_to_text": LEAD + "{{puzzle}}" + TAIL,
                "num_fewshot": 0,
                "filter_list": [{"name": "first-word", "filter": [{"function": "take_first"}]}],
            }
        },
        "config": {"model": "dummy", "model_args": "pretrained=tiny/model"},
    }


def _inspect_header() -> dict[str, Any]:
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": "e1",
            "run_id": "r1",
            "task": "puzzles",
            "task_id": "t1",
            "created": "2026-01-02T03:04:05+00:00",
            "dataset": {"name": "puzzles", "samples": 4},
            "model": "mock/model",
            "scorers": [{"name": "match"}],
        },
        "plan": {"name": "plan", "steps": [{"solver": "generate", "params": {}}], "config": {"temperature": 0.5}},
        "results": {"total_samples": 4},
    }


def _inspect_samples() -> Pieces:
    return [
        {
            "id": i,
            "epoch": 1,
            "input": q,
            "target": a,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": LEAD + q + TAIL},
                {"role": "assistant", "source": "generate", "content": [{"type": "text", "text": r}]},
            ],
            "output": {
                "model": "mock/model",
                "choices": [{"message": {"role": "assistant", "content": r}, "stop_reason": "stop"}],
                "usage": {"input_tokens": 20, "output_tokens": 2},
                "time": 0.25,
            },
            "scores": {"match": {"value": "C" if r == a else "I", "answer": r}},
            "attachments": {},
        }
        for i, (q, a, r) in enumerate(QUESTIONS, 1)
    ]


def _inspect_json() -> Pieces:
    return [_inspect_header() | {"samples": _inspect_samples()}]


def _inspect_members() -> Pieces:
    header = _inspect_header()
    start = {"version": 2, "eval": header["eval"], "plan": header["plan"]}
    samples = [{"name": f"samples/{s['id']}_epoch_1.json", "value": s} for s in _inspect_samples()]
    return [{"name": "_journal/start.json", "value": start}, *samples, {"name": "header.json", "value": header}]


def _promptfoo_rows() -> Pieces:
    return [
        {
            "promptIdx": 0,
            "testIdx": i,
            "promptId": "p1",
            "provider": {"id": "exec:solve", "label": ""},
            "prompt": {"raw": LEAD + q + TAIL, "label": LEAD + "{{puzzle}}" + TAIL},
            "vars": {"puzzle": q, "expected": a},
            "response": {"output": r, "tokenUsage": {"prompt": 9, "completion": 1}, "cached": False},
            "success": r == a,
            "score": float(r == a),
            "namedScores": {"short": 1},
            "latencyMs": 12,
            "cost": 0.001,
            "failureReason": 0 if r == a else 1,
            "error": None if r == a else "Expected output to equal",
            "gradingResult": {"componentResults": [{"assertion": {"type": "equals", "value": a}}]},
        }
        for i, (q, a, r) in enumerate(QUESTIONS)
    ]


def _promptfoo() -> Pieces:
    stats = {"successes": 2, "failures": 2, "errors": 0}
    prompts = [{"raw": LEAD + "{{puzzle}}" + TAIL, "label": "solve", "provider": "exec:solve",
                "metrics": {"testPassCount": 2}}]  # fmt: skip
    results = {"version": 3, "timestamp": "2026-01-02T03:04:05.000Z", "prompts": prompts, "results": _promptfoo_rows(),
               "stats": stats}  # fmt: skip
    return [{"evalId": "eval-abc", "results": results, "config": {}, "shareableUrl": None}]


def _promptfoo_cells() -> Pieces:
    label = "[exec:solve] " + LEAD + "{{puzzle}}" + TAIL
    header = ["puzzle", "expected", label, "Status", "Score", "Named Scores", "Grader Reason", "Comment"]
    rows = [[q, a, r, "PASS" if r == a else "FAIL", "1.00", "{}", "", ""] for q, a, r in QUESTIONS]
    return [header, *rows]


def _promptfoo_old_cells() -> Pieces:
    header = ["puzzle", "[exec:solve] " + LEAD + "{{puzzle}}" + TAIL]
    return [header, *([q, f"[{'PASS' if r == a else 'FAIL'}] (1.00) {r}"] for q, a, r in QUESTIONS)]


def _openai_evals() -> Pieces:
    def event(i: int, k: int, kind: str, data: Any) -> Any:
        return {"run_id": "run1", "event_id": 2 * i + k, "sample_id": f"puzzles.test.{i}", "type": kind, "data": data,
                "created_by": "", "created_at": "2026-01-02 03:04:05.000000+00:00"}  # fmt: skip

    spec = {"completion_fns": ["mock"], "eval_name": "puzzles.test.v0", "base_eval": "puzzles", "split": "test",
            "run_id": "run1", "created_at": "2026-01-02 03:04:05"}  # fmt: skip
    rows: Pieces = [{"spec": spec}, {"final_report": {"accuracy": 0.5}}]
    for i, (q, a, r) in enumerate(QUESTIONS):
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LEAD + q + TAIL}]
        rows.append(event(i, 1, "match", {"correct": r == a, "expected": a, "picked": r, "sampled": r}))
        rows.append(event(i, 0, "sampling", {"prompt": prompt, "sampled": [r], "usage": {"prompt_tokens": 5}}))
    return rows


def _helm() -> Pieces:
    states = [
        {
            "instance": {
                "id": f"id{i}",
                "split": "test",
                "input": {"text": q},
                "references": [{"output": {"text": a}, "tags": ["correct"]}],
            },
            "train_trial_index": 0,
            "request_mode": None,
            "request": {"model": "mock/model", "prompt": LEAD + q + TAIL, "temperature": 0.0, "max_tokens": 9},
            "result": {"success": True, "completions": [{"text": r, "logprob": -1.0}], "request_time": 0.5,
                       "request_datetime": 1_700_000_000},
        }
        for i, (q, a, r) in enumerate(QUESTIONS)
    ]  # fmt: skip
    return [{"adapter_spec": {"model": "mock/model", "method": "generation"}, "request_states": states}]


def _helm_stats() -> Any:
    return [
        {
            "instance_id": f"id{i}",
            "train_trial_index": 0,
            "stats": [
                {"name": {"name": "exact_match", "split": "test"}, "count": 1, "mean": float(r == a)},
                {"name": {"name": "num_output_tokens"}, "count": 1, "mean": 3},
            ],
        }
        for i, (_, a, r) in enumerate(QUESTIONS)
    ]


def _helm_choice() -> Pieces:
    states = [
        {
            "instance": {
                "id": f"id{i}",
                "input": {"text": q},
                "references": [
                    {"output": {"text": "12"}, "tags": ["correct"]},
                    {"output": {"text": "10"}, "tags": []},
                ],
            },
            "train_trial_index": 0,
            "reference_index": k,
            "request": {"model": "mock/model", "prompt": f"{LEAD}{q}{TAIL} {text}"},
            "result": {"success": True, "completions": [{"text": text, "logprob": -1.0 - k}]},
        }
        for i, (q, _, _) in enumerate(QUESTIONS)
        for k, text in enumerate(("12", "10"))
    ]
    return [{"adapter_spec": {"method": "multiple_choice_separate_original"}, "request_states": states}]


def _helm_spec() -> Any:
    return {"name": "puzzles:mode=direct,model=mock_model"}


def _gepa() -> Pieces:
    return [
        {
            "candidates": [{"solve": "Count."}, {"solve": "Count slowly."}],
            "val_subscores": [{"0": 1.0, "1": 0.0}, [1, 0]],
            "val_aggregate_scores": [0.5, 0.5],
            "parents": [[None], [0]],
        }
    ]


def _hh() -> Pieces:
    return [
        {
            "chosen": f"\n\nHuman: {q}\n\nAssistant: It is {a}.",
            "rejected": f"\n\nHuman: {q}\n\nAssistant: I do not know {i}.",
        }
        for i, (q, a, _) in enumerate(QUESTIONS)
    ]


def _rewardbench() -> Pieces:
    return [
        {"id": i, "prompt": q, "chosen": a, "rejected": f"not {a}", "subset": "math", "chosen_model": "m1",
         "rejected_model": "m2"}
        for i, (q, a, _) in enumerate(QUESTIONS)
    ]  # fmt: skip


def _ultrafeedback() -> Pieces:
    def completion(text: str, rating: int, model: str) -> Any:
        notes = {"helpfulness": {"Rating": str(rating)}, "honesty": {"Rating": str(rating)}}
        return {"response": text, "model": model, "annotations": notes, "overall_score": rating + 1.0}

    return [
        {
            "source": "invented",
            "instruction": q,
            "completions": [completion(a, 5, "m1"), completion(f"no {a}", 2, "m2")],
        }
        for q, a, _ in QUESTIONS
    ]


def _trl() -> Pieces:
    return [
        {
            "prompt": [{"role": "user", "content": q}],
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": f"no {a}"}],
            "score_chosen": 5.0,
            "score_rejected": 2.0,
        }
        for q, a, _ in QUESTIONS
    ]


def _trl_implicit() -> Pieces:
    return [{"chosen": f"{q} Is it {a}?", "rejected": f"{q} Is it not?", "source": "x"} for q, a, _ in QUESTIONS]


def _trl_unpaired() -> Pieces:
    return [{"prompt": q, "completion": r, "label": r == a} for q, a, r in QUESTIONS]


def _router() -> Pieces:
    header = ["sample_id", "prompt", "eval_name", "small", "large", "small|model_response", "small|total_cost"]
    rows = [
        [f"s{i}", q, "puzzles", "1.0" if r == a else "0.0", "0.0" if r == a else "1.0", r, "0.1"]
        for i, (q, a, r) in enumerate(QUESTIONS)
    ]
    return [header, *rows]


SAMPLES = {
    sample.name: sample
    for sample in [
        Sample("gsm8k", "gsm8k", "train.jsonl", _gsm8k, lines, right=None),
        Sample("svamp", "svamp", "SVAMP.json", _svamp, array, right=None),
        Sample("lm-eval", "lm-eval", "samples_puzzles_2026-01-02T03-04-05.678.jsonl", _lm_eval, lines,
               beside={"results_2026-01-02T03-04-05.678.json": _lm_eval_results}),
        Sample("lm-eval-choice", "lm-eval", "samples_puzzles_2026-01-02T03-04-05.678.jsonl", _lm_eval_choice, lines),
        Sample("inspect", "inspect", "log.json", _inspect_json, document),
        Sample("inspect-eval", "inspect", "log.eval", _inspect_members, eval_archive(8), text=False),
        Sample("inspect-zstd", "inspect", "log.eval", _inspect_members, eval_archive(93), text=False),
        Sample("promptfoo", "promptfoo", "out.json", _promptfoo, document),
        Sample("promptfoo-jsonl", "promptfoo", "out.jsonl", _promptfoo_rows, lines),
        Sample("promptfoo-csv", "promptfoo", "out.csv", _promptfoo_cells, delimited(",")),
        Sample("promptfoo-old-csv", "promptfoo", "out.csv", _promptfoo_old_cells, delimited(",")),
        Sample("openai-evals", "openai-evals", "events.jsonl", _openai_evals, lines),
        Sample("helm", "helm", "run/scenario_state.json", _helm, document, text=False,
               beside={"per_instance_stats.json": _helm_stats, "run_spec.json": _helm_spec}),
        Sample("helm-choice", "helm", "run/scenario_state.json", _helm_choice, document, text=False,
               beside={"per_instance_stats.json": _helm_stats}),
        Sample("gepa", "gepa", "result.json", _gepa, document, queries=2),
        Sample("hh-rlhf", "hh-rlhf", "pairs.jsonl", _hh, lines, right=None),
        Sample("rewardbench", "rewardbench", "pairs.jsonl", _rewardbench, lines, right=None),
        Sample("ultrafeedback", "ultrafeedback", "pairs.jsonl", _ultrafeedback, lines, right=None),
        Sample("trl", "trl", "pairs.jsonl", _trl, lines, right=None),
        Sample("trl-implicit", "trl", "pairs.json", _trl_implicit, array, right=None),
        Sample("trl-parquet", "trl", "pairs.parquet", _trl, parquet, right=None, text=False),
        Sample("trl-arrow", "trl", "pairs.arrow", _trl, arrow, right=None, text=False),
        Sample("trl-unpaired", "trl-unpaired", "rows.jsonl", _trl_unpaired, lines),
        Sample("router", "router", "table.csv", _router, delimited(","), kept=8, right=4),
        Sample("parquet", "parquet", "log.parquet", _log_rows, parquet, text=False),
        Sample("arrow", "arrow", "log.arrow", _log_rows, arrow, text=False),
        Sample("jsonl", "jsonl", "rows.jsonl", _log_rows, lines),
        Sample("csv", "csv", "rows.csv", _log_cells, delimited(",")),
        Sample("tsv", "tsv", "rows.tsv", _log_cells, delimited("\t")),
    ]
}  # fmt: skip
