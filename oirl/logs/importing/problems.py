"""Problem files of benchmarks, read as query lists: GSM8K and SVAMP."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oirl.errors import DataError
from oirl.logs.importing.base import Chunk, Refusal
from oirl.logs.importing.lines import read_blocks, read_whole


@dataclass(frozen=True)
class Gsm8kProblems:
    """GSM8K: a line per problem with `question` and a worked `answer` that ends in `#### 18`."""

    name: str = "gsm8k"
    description: str = "GSM8K problems (train.jsonl, test.jsonl) as a query list"
    record: str = "queries"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept a first object that has just the two fields and the mark of the final answer."""
        try:
            first = json.loads(head.split(b"\n", 1)[0])
        except (ValueError, RecursionError):
            return False
        return isinstance(first, dict) and set(first) == {"question", "answer"} and "####" in str(first["answer"])

    def chunks(self, path: Path, fields: Mapping[str, str]) -> Iterator[Chunk]:
        """Yield queries; the answer is what follows `####`, the worked solution goes to the metadata."""
        split = path.name.split(".", 1)[0]
        for block in read_blocks(path):
            rows, queries, answers, solutions = [], [], [], []
            refused = list(block.refused)
            for number, line in enumerate(block.data.split(b"\n"), block.first_line):
                if not line.strip():
                    continue
                try:
                    problem = json.loads(line)
                    solution, answer = problem["answer"].rsplit("####", 1)
                    query = problem["question"]
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                    refused.append(Refusal(number, f"not a GSM8K problem ({type(e).__name__}: {e})", _text(line)))
                    continue
                rows.append(number)
                queries.append(query)
                answers.append(answer.strip().replace(",", ""))
                solutions.append({"solution": solution.strip()})
            columns = _columns(queries, answers, solutions, "gsm8k", split)
            yield Chunk(columns, np.array(rows, dtype=np.int64), refused)


@dataclass(frozen=True)
class SvampProblems:
    """SVAMP: one JSON array of problems with `Body`, `Question`, `Answer`, `Equation` and `Type`."""

    name: str = "svamp"
    description: str = "SVAMP problems (SVAMP.json) as a query list"
    record: str = "queries"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept a JSON array whose first object has the fields of SVAMP."""
        start = head[:4096]
        return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and all(
            k in start for k in (b'"Body"', b'"Question"', b'"Answer"')
        )

    def chunks(self, path: Path, fields: Mapping[str, str]) -> Iterator[Chunk]:
        """Yield queries: body and question in one text."""
        try:
            problems = json.loads(read_whole(path))
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path} is not a JSON array of problems: {e}") from e
        if not isinstance(problems, list):
            raise DataError(f"{path} is not a JSON array of problems, but a {type(problems).__name__}")
        rows, queries, answers, metadata = [], [], [], []
        refused = []
        for number, problem in enumerate(problems, 1):
            try:
                body = problem["Body"].strip()
                query = f"{body if body.endswith(('.', ',', '!', '?')) else body + '.'} {problem['Question'].strip()}"
                answer = float(problem["Answer"])
                if not math.isfinite(answer):
                    raise ValueError("the answer is no finite number")
                extra = {"id": problem.get("ID"), "type": problem.get("Type"), "equation": problem.get("Equation")}
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
                refused.append(Refusal(number, f"not a SVAMP problem ({type(e).__name__}: {e})", problem))
                continue
            rows.append(number)
            queries.append(query)
            answers.append(str(int(answer)) if answer.is_integer() else repr(answer))
            metadata.append(extra)
        columns = _columns(queries, answers, metadata, "svamp", None)
        yield Chunk(columns, np.array(rows, dtype=np.int64), refused)


def _columns(
    queries: list[Any], answers: list[str], metadata: list[dict[str, Any]], dataset: str, split: str | None
) -> dict[str, list[Any]]:
    known = split if split in {"train", "test", "validation"} else None
    return {
        "query": queries,
        "answer": answers,
        "metadata": metadata,
        "dataset": [dataset] * len(queries),
        "split": [known] * len(queries),
    }


def _text(line: bytes) -> str:
    return line[:2000].decode("utf-8", "replace")


GSM8K = Gsm8kProblems()
SVAMP = SvampProblems()
