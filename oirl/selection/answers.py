"""What proposes prompts, and what it has answered: kept on disk, as it need not answer so again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from oirl.engines.base import derive_seed
from oirl.errors import DataError
from oirl.logs.atomic import atomic_file
from oirl.selection.meta_prompt import Evidence


class Proposer(Protocol):
    """What proposes prompts: a language model that is asked, or a prompting policy that was trained to.

    It may have a method `describe`, which returns what decides its answers, for JSON: those that are kept are then
    taken for its own only while that stays as it is.
    """

    def propose(self, evidence: Evidence, already: Sequence[str], n: int, seed: int) -> list[str]:
        """Return up to n candidate templates, given what a log tells and the candidates that there are already."""
        ...


class Answers:
    """The answers of a proposer, turn by turn.

    Args:
        proposer: What is asked.
        evidence: What it is shown.
        n: How many candidates are wanted.
        seed: For its draws.
        path: Where the answers are kept, and taken from if the same was asked before; None to keep nothing.

    Raises:
        DataError: If the file is there and holds something else.
    """

    def __init__(self, proposer: Proposer, evidence: Evidence, n: int, seed: int, path: Path | None) -> None:
        self.evidence = evidence
        self._proposer, self._seed, self._path = proposer, seed, path
        describe = getattr(proposer, "describe", None)
        told = describe() if describe else f"{type(proposer).__module__}.{type(proposer).__qualname__}"
        asked = json.dumps([told, asdict(evidence), n, seed], sort_keys=True)
        self._asked = blake2b(asked.encode(), digest_size=16).hexdigest()
        self._turns = self._read()

    def turn(self, number: int, already: Sequence[str], n: int) -> list[str]:
        """Return up to n templates; `already` are the candidates that came of the turns before."""
        if number == len(self._turns):
            seed = derive_seed(self._seed, "propose", number)
            self._turns.append(list(self._proposer.propose(self.evidence, already, n, seed)))
            if self._path is not None:
                with atomic_file(self._path) as temporary:
                    temporary.write_text(json.dumps({"asked": self._asked, "turns": self._turns}), encoding="utf-8")
        return self._turns[number]

    def forget(self) -> None:
        """Remove what is kept."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self) -> list[list[str]]:
        if self._path is None or not self._path.exists():
            return []
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            asked, turns = kept["asked"], list(kept["turns"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise DataError(f"{self._path}: not the answers of a proposer; move the file away") from e
        return turns if asked == self._asked else []


def answers_path(log: str | Path) -> Path:
    """Return where the answers are kept that a race with this log goes on with."""
    return Path(f"{log}.proposals")
