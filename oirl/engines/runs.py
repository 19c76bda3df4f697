"""A collecting run: its settings, by which it is known again, the cells that it asks for, and the rows they become."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from oirl.engines.base import Completion, Engine, Request, Sampling, derive_seed
from oirl.engines.designs import Cell, adaptive_round, balanced, check_design, full, random, top_two
from oirl.errors import ConfigError, DataError, MissingPackageError
from oirl.language_models import TRAINED_PROMPTS, Rendered, trained_prompts
from oirl.logs.checkers import apply_checker
from oirl.logs.grading import open_checker
from oirl.logs.rendering import messages, render, split_at_query
from oirl.records import Query

_ROUND = 50
_OTHER_MARK = re.compile(r"(?<!\{)\{[A-Za-z_]\w*(?:![a-z])?\}(?!\})")
_LARGEST = 2**31 - 1

Key = tuple[str, str, int]
"""Query, prompt, replicate: what a run is known by."""


class Run:
    """The settings of a run, and the cells that they ask for."""

    def __init__(
        self,
        engine: Engine,
        queries: Sequence[Query],
        prompts: Sequence[tuple[str, str]],
        out: Path,
        sampling: Sampling,
        design: str,
        replicates: int,
        grade: str | None,
    ) -> None:
        if not prompts:
            raise ConfigError("there is no prompt; name at least one")
        check_design(design, len(prompts))
        if replicates < 1:
            raise ConfigError(f"replicates = {replicates}; allowed: 1 or more")
        if design == "adaptive" and not (grade and any(q.answer is not None for q in queries)):
            raise ConfigError("the adaptive design needs verdicts: queries with an `answer`, and a checker to grade by")
        self.warnings: list[str] = []
        self.engine, self.queries, self.prompts, self.out = engine, _distinct(queries), list(prompts), out
        self.sampling, self.design, self.replicates = replace(sampling, n=1), design, replicates
        self.checker = open_checker(grade) if grade else None
        self.described = engine.describe()
        names = [name for name, _ in prompts]
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            texts = {template for name, template in prompts if name == twice[0]}
            what = "two prompts are equal" if len(texts) == 1 else f"two prompts have the id {twice[0]!r}"
            raise ConfigError(f"{what} ({min(texts)[:60]!r}); keep one, or give each its own id")
        for name, template in prompts:
            self.warnings += check_prompt(name, template)
        # Of a base with an adapter, the adapter's folder is named last.
        known = trained_prompts(engine.model) or trained_prompts(engine.model.rpartition("+")[2])
        if known and (others := [name for name, template in prompts if template not in known]):
            self.warnings.append(
                f"{engine.model} was tuned under other prompts than {', '.join(map(repr, others))}; what it has "
                f"learned holds for the very texts in its {TRAINED_PROMPTS}"
            )
        if grade and all(query.answer is None for query in self.queries):
            self.warnings.append(f"no query has an `answer`, so {grade} graded nothing")
        told = ["engine", "model", "model_fingerprint", "dtype", "chat", "options", "base_url"]
        told += ["logprobs_mode"] if sampling.logprobs else []
        self.identity = {name: self.described[name] for name in told if name in self.described} | {
            "sampling": self.sampling.to_dict(),
            "design": design,
            "grade": grade,
        }
        if design != "full":  # which prompt a query gets depends on what there is to choose from
            self.identity["prompts"] = _digest(self.prompts)
        if design in ("balanced", "adaptive"):
            self.identity |= {"queries": _digest([q.query_id for q in self.queries]), "replicates": replicates}
        self.run_id = _digest(self.identity)
        self.settings = json.dumps(self.sampling.to_dict() | self.described, ensure_ascii=False)

    def go_on(self, earlier: Mapping[str, Any]) -> None:
        """Take the name of an earlier run, which is this one: its model may lie elsewhere now."""
        self.identity = dict(earlier)
        self.run_id = _digest(self.identity)

    @property
    def total(self) -> int:
        """How many runs the design has."""
        return len(self.queries) * self.replicates * (len(self.prompts) if self.design == "full" else 1)

    def rounds(self, verdicts: Mapping[Key, bool | None]) -> Iterator[Iterable[Cell]]:
        """Yield the cells, of an adaptive design round by round: the next one is asked for when the last is made."""
        n, p, r = len(self.queries), len(self.prompts), self.replicates
        # A budget may stop the run: what is made then must be a fair sample, whatever the order of the file.
        order = sorted(range(n), key=lambda i: derive_seed(self.sampling.seed, "order", self.queries[i].query_id))
        if self.design == "full":
            yield (cell._replace(query=order[cell.query]) for cell in full(n, p, r))
        elif self.design == "random":
            keys = [self._keys(draw) for draw in range(r)]
            drawn = random([[of_draw[i] for i in order] for of_draw in keys], p)
            yield (cell._replace(query=order[cell.query]) for cell in drawn)
        elif self.design == "balanced":
            yield balanced(n, p, r, np.random.default_rng(self.sampling.seed))
        else:
            yield from self._adaptive(verdicts)

    def _adaptive(self, verdicts: Mapping[Key, bool | None]) -> Iterator[list[Cell]]:
        order = np.random.default_rng(self.sampling.seed).permutation(len(self.queries)).tolist()
        count: Counter[tuple[int, int]] = Counter()
        successes, runs = np.zeros(len(self.prompts)), np.zeros(len(self.prompts))
        for draw in range(self.replicates):
            keys = self._keys(draw)
            for start in range(0, len(order), _ROUND):
                queries = order[start : start + _ROUND]
                chances = top_two(successes, runs)
                cells = list(adaptive_round(queries, [keys[q] for q in queries], chances, count))
                yield cells
                for cell in cells:
                    verdict = verdicts.get(self.key(cell))
                    runs[cell.prompt] += verdict is not None
                    successes[cell.prompt] += verdict is True

    def _keys(self, draw: int) -> list[float]:
        return [derive_seed(self.sampling.seed, "prompt", q.query_id, draw) / 2**31 for q in self.queries]

    def key(self, cell: Cell) -> Key:
        """Return what a cell's run is known by."""
        return self.queries[cell.query].query_id, self.prompts[cell.prompt][0], cell.replicate

    def request(self, cell: Cell) -> Request:
        """Return what the engine is asked for a cell."""
        rendered = self.render(self.prompts[cell.prompt][1], self.queries[cell.query].query)
        assert rendered is not None
        return Request(rendered, derive_seed(self.sampling.seed, *self.key(cell)))

    def render(self, template: str, query: str) -> Rendered | None:
        """Return what the engine is given of a prompt and a query, None where the prompt needs more than a query."""
        return messages(template, query) if self.engine.chat else render(template, query)

    def row(self, cell: Cell, completion: Completion, cost: float | None) -> dict[str, Any]:
        """Return the row of a log, for the journal."""
        query, (prompt_id, template) = self.queries[cell.query], self.prompts[cell.prompt]
        told = {
            "finish_reason": completion.finish_reason,
            "error": completion.error,
            "model_fingerprint": completion.model_fingerprint,
        }
        if self.sampling.logprobs:  # what learns from the responses needs them as they were drawn
            told |= {name: getattr(completion, name) for name in ("prompt_ids", "token_ids", "logprobs")}
        verdict, told["grade_error"] = self._verdict(completion.text, query.answer)
        return asdict(query) | {
            "prompt_id": prompt_id,
            "prompt": template,
            "response": None if completion.text is None else _encodable(completion.text),
            "correct": verdict,
            "model": self.identity.get("model", self.engine.model),
            "run_id": self.run_id,
            "replicate": cell.replicate,
            "propensity": cell.propensity,
            "sampling": self.settings,
            "tokens_in": count_of(completion.tokens_in),
            "tokens_out": count_of(completion.tokens_out),
            "latency_s": completion.latency_s,
            "cost": cost,
            "created_at": datetime.now(timezone.utc).isoformat(),
            "metadata": _encodable(json.dumps(_with(query.metadata, told), ensure_ascii=False)),
        }

    def check_texts(self, table: pa.Table) -> None:
        """Refuse rows of an earlier session whose query, answer or prompt was another."""
        answers = {q.query_id: q.answer for q in self.queries}
        texts: dict[str, Mapping[str, str | None]] = {
            "query": {q.query_id: q.query for q in self.queries},
            "answer": answers,
            "prompt": dict(self.prompts),
        }
        for name, known in texts.items():
            ids = table["prompt_id" if name == "prompt" else "query_id"]
            pairs = pa.table([ids, table[name]], ["id", "text"]).group_by(["id", "text"]).aggregate([])
            for key, text in zip(pairs["id"].to_pylist(), pairs["text"].to_pylist(), strict=True):
                if known.get(key, text) != text:
                    raise DataError(
                        f"{self.out}: {'query' if name == 'answer' else name}_id {key!r} stood for another {name} "
                        f"before: {str(text)[:60]!r}; give it another id, or name another --out"
                    )

    def _verdict(self, response: str | None, answer: str | None) -> tuple[bool | None, str | None]:
        """Return the verdict, and why there is none where the checker failed: the response is paid for and stays."""
        if self.checker is None or response is None or answer is None:
            return None, None
        try:
            return apply_checker(self.checker, response, answer).correct, None
        except MissingPackageError:  # it can grade nothing
            raise
        except Exception as e:  # a checker of the user's raises what it likes
            return None, " ".join(f"{type(e).__name__}: {e}".split())


def _distinct(queries: Sequence[Query]) -> list[Query]:
    found: dict[str, Query] = {}
    for query in queries:
        known = found.setdefault(query.query_id, query)
        if (known.query, known.answer) != (query.query, query.answer):
            raise DataError(f"query_id {query.query_id!r} stands for two queries or answers: {known.query[:60]!r} …")
    if not found:
        raise DataError("there is no query")
    return list(found.values())


def count_of(value: Any) -> int | None:
    """Return a count of tokens as an engine gave it, None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST else None


def _encodable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which servers may send and no file holds."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _with(metadata: str | None, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a query's metadata and what is told of its run."""
    try:
        known = json.loads(metadata) if metadata else {}
    except (ValueError, RecursionError):
        known = metadata
    own = known if isinstance(known, dict) else {"query_metadata": known}
    return own | {k: v for k, v in told.items() if v is not None}


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_prompt(name: str, template: str) -> list[str]:
    """Return what should be known of a prompt that queries are to be asked under.

    Raises:
        ConfigError: If it cannot be filled with a query.
    """
    literals = split_at_query(template)
    if literals is None:
        raise ConfigError(f"prompt {name!r} cannot be filled with a query alone: {template[:60]!r}; use {{query}}")
    others = [mark for text in literals for mark in _OTHER_MARK.findall(text)]
    if others and len(literals) == 1:
        raise ConfigError(f"prompt {name!r} has {others[0]}, but no {{query}}: {template[:60]!r}; use {{query}}")
    return [f"prompt {name!r} gives the model {others[0]} as it stands: only {{query}} is filled in"] if others else []
