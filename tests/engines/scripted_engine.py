"""A fast engine for tests: replies by a rule of rendered text and seed, fails where it is told to, keeps count."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from oirl import read_log
from oirl.engines.base import Completion, Engine, EngineError, Request, Sampling
from oirl.language_models import Rendered
from oirl.records import Query

PROMPTS = [("low", "{query} In way low."), ("mid", "In way mid: {query}"), ("high", "Way high.")]
RATES = {"low": 0.2, "mid": 0.5, "high": 0.8}
TIMES = ("created_at",)


def questions(n: int, start: int = 0) -> list[Query]:
    """Return queries whose answer can be worked out of their text."""
    texts = [f"What is {i} plus {i % 7}?" for i in range(start, start + n)]
    return [Query(f"q{i}", text, str(i + i % 7)) for i, text in enumerate(texts, start)]


def text_of(rendered: Rendered) -> str:
    return rendered if isinstance(rendered, str) else "\n\n".join(turn["content"] for turn in rendered)


def reply(rendered: Rendered, seed: int, rates: dict[str, float] = RATES) -> Completion:
    """Add up rightly with the rate of the prompt's way; all of the reply follows from text and seed."""
    text = text_of(rendered)
    a, b = (int(number) for number in re.findall(r"(\d+) plus (\d+)", text)[0])
    rate = next(rate for way, rate in rates.items() if re.search(rf"[Ww]ay {way}", text))
    said = a + b if seed / 2**31 < rate else a + b + 1 + seed % 5
    words = f"By {seed}: the answer is {said}."
    return Completion(words, "stop", tokens_in=len(text.split()), tokens_out=len(words.split()), latency_s=0.25)


class Scripted(Engine):
    """Reply by a rule.

    Args:
        answer: (rendered, seed) -> completion.
        chat: Whether it is given messages.
        in_flight: Requests at a time; more than one finish in a shuffled order.
        dies_after: Replies after which the engine cannot go on.
        told: What `describe` says beside or instead of the usual.
    """

    name = "scripted"
    model = "toy"

    def __init__(
        self,
        answer: Callable[[Rendered, int], Completion] = reply,
        *,
        chat: bool = False,
        in_flight: int = 1,
        dies_after: int | None = None,
        told: dict[str, Any] | None = None,
    ) -> None:
        self.chat, self._answer, self._in_flight, self._dies_after = chat, answer, in_flight, dies_after
        self._told, self._random = told or {}, random.Random(in_flight)
        self.requests: list[Request] = []
        self.finished = 0
        self.closed = False

    def describe(self) -> dict[str, Any]:
        known = {"engine": self.name, "engine_version": "7.1", "model": self.model, "model_fingerprint": "abc"}
        return known | {"chat": self.chat} | self._told

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        pending = enumerate(requests)
        running: list[tuple[int, Request]] = []
        while True:
            while len(running) < self._in_flight and (item := next(pending, None)) is not None:
                running.append(item)
                self.requests.append(item[1])
            if not running:
                return
            if self.finished == self._dies_after:
                raise EngineError("the server is gone")
            position, request = running.pop(self._random.randrange(len(running)))
            self.finished += 1
            yield position, [self._answer(request.rendered, request.seed)] * sampling.n

    def close(self) -> None:
        self.closed = True


def rows(log: Path | pa.Table, without: tuple[str, ...] = TIMES) -> list[dict[str, Any]]:
    """Return the rows of a log without the columns that no two runs share."""
    table = read_log(log) if isinstance(log, Path) else log
    return table.drop_columns(list(without)).to_pylist()


def notes(row: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(row["metadata"])
    assert isinstance(found, dict)
    return found
