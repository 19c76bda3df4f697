"""Problem files of benchmarks, read as query lists: GSM8K and SVAMP."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oirl.logs.importing.base import Chunk, Refusal, Request
from oirl.logs.importing.objects import first_object, read_objects
from oirl.logs.importing.runs import BATCH, batches


@dataclass(frozen=True)
class Gsm8kProblems:
    """GSM8K: a row per problem with `question` and a worked `answer` that ends in `#### 18`."""

    name: str = "gsm8k"
    description: str = "GSM8K problems (train.jsonl, test.jsonl, or from the hub) as a query list"
    record: str = "queries"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept a first object that has just the two fields and the mark of the final answer."""
        first = first_object(path, head)
        return set(first) == {"question", "answer"} and "####" in str(first["answer"])

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield queries; the answer is what follows `####`, the worked solution goes to the metadata."""
        for batch in batches(read_objects(path), BATCH):
            rows, queries, answers, solutions = [], [], [], []
            refused = []
            for number, problem in batch:
                if isinstance(problem, Refusal):
                    refused.append(problem)
                    continue
                try:
                    solution, answer = problem["answer"].rsplit("####", 1)
                    query = problem["question"]
                except (ValueError, KeyError, TypeError, AttributeError) as e:
                    refused.append(Refusal(number, f"not a GSM8K problem ({type(e).__name__}: {e})", problem))
                    continue
                rows.append(number)
                queries.append(query)
                answers.append(answer.strip().replace(",", ""))
                solutions.append({"solution": solution.strip()})
            columns = _columns(queries, answers, solutions, "gsm8k", _split_of(path))
            yield Chunk(columns, np.array(rows, dtype=np.int64), refused)


@dataclass(frozen=True)
class SvampProblems:
    """SVAMP: a row per problem with `Body`, `Question`, `Answer`, `Equation` and `Type`."""

    name: str = "svamp"
    description: str = "SVAMP problems (SVAMP.json, or from the hub) as a query list"
    record: str = "queries"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept a first object that has the fields of SVAMP."""
        return {"Body", "Question", "Answer"} <= set(first_object(path, head))

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield queries: body and question in one text."""
        for batch in batches(read_objects(path), BATCH):
            rows, queries, answers, metadata = [], [], [], []
            refused = []
            for number, problem in batch:
                if isinstance(problem, Refusal):
                    refused.append(problem)
                    continue
                try:
                    body = problem["Body"].strip()
                    ended = body if body.endswith((".", ",", "!", "?")) else body + "."
                    query = f"{ended} {problem['Question'].strip()}"
                    answer = float(problem["Answer"])
                    if not math.isfinite(answer):
                        raise ValueError("the answer is no finite number")
                except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
                    refused.append(Refusal(number, f"not a SVAMP problem ({type(e).__name__}: {e})", problem))
                    continue
                rows.append(number)
                queries.append(query)
                answers.append(str(int(answer)) if answer.is_integer() else repr(answer))
                metadata.append({key.lower(): problem.get(key) for key in ("ID", "Type", "Equation")})
            columns = _columns(queries, answers, metadata, "svamp", _split_of(path))
            yield Chunk(columns, np.array(rows, dtype=np.int64), refused)


def _columns(
    queries: list[Any], answers: list[str], metadata: list[dict[str, Any]], dataset: str, split: str | None
) -> dict[str, list[Any]]:
    return {
        "query": queries,
        "answer": answers,
        "metadata": metadata,
        "dataset": [dataset] * len(queries),
        "split": [split] * len(queries),
    }


def _split_of(path: Path) -> str | None:
    """Return the split that the file, or the folder of a saved data set, is named after."""
    stem = path.name.split(".", 1)[0]
    for name in (stem, path.parent.name, stem.rpartition("-")[2]):
        if name in {"train", "test", "validation"}:
            return name
    return None


GSM8K = Gsm8kProblems()
SVAMP = SvampProblems()
