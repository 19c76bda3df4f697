"""Verdicts for logged responses: run a checker over rows and count what it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from oirl.errors import ConfigError
from oirl.logs.checkers import apply_checker
from oirl.registry import resolve


@dataclass(slots=True)
class GradeCounts:
    """What grading did to the rows that were kept.

    Attributes:
        checker: The checker's name.
        graded: Rows that got a verdict of the checker.
        changed: Rows whose logged verdict was the opposite.
        to_right: Those of them that were logged as wrong.
        filled: Rows that had no verdict before.
        not_gradable: Rows without a response or without a readable answer; their logged verdict stays.
    """

    checker: str
    graded: int = 0
    changed: int = 0
    to_right: int = 0
    filled: int = 0
    not_gradable: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as a dictionary for JSON."""
        return asdict(self)


def open_checker(name: str) -> Callable[[str, str], Any]:
    """Return a checker: a registered one ("numeric", "exact", "choice", "math"), or `package.module:function`.

    Raises:
        UnknownNameError: If it is not registered.
        ConfigError: If it is no function.
    """
    checker = resolve("checkers", name)
    if not callable(checker):
        raise ConfigError(f"the checker {name!r} is a {type(checker).__name__}, not a function")
    return checker


class Grader:
    """Grade responses with a checker and count the changes.

    Args:
        name: A registered checker ("numeric", "exact", "choice", "math") or `package.module:function`.
    """

    def __init__(self, name: str) -> None:
        self._checker = open_checker(name)
        self.counts = GradeCounts(name)

    def grade(self, response: pa.Array, answer: pa.Array, logged: pa.Array) -> pa.Array:
        """Return the verdicts; where the checker has none, the logged one stays.

        Args:
            response: Texts, null where there is none.
            answer: Gold answers, null where there is none.
            logged: Verdicts so far, null where not known.
        """
        counts = self.counts
        verdicts: list[bool | None] = []
        rows = zip(response.to_pylist(), answer.to_pylist(), logged.to_pylist(), strict=True)
        for reply, gold, before in rows:
            verdict = None
            if reply is not None and gold is not None:
                verdict = apply_checker(self._checker, reply, gold).correct
            if verdict is None:
                counts.not_gradable += 1
                verdicts.append(before)
                continue
            counts.graded += 1
            counts.filled += before is None
            counts.changed += before is not None and before != verdict
            counts.to_right += before is False and verdict
            verdicts.append(verdict)
        return pa.array(verdicts, pa.bool_())
