"""A race of prompts: all on the same queries, the losers out early, the winner confirmed on queries of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from oirl.engines.base import Engine, Sampling
from oirl.engines.collecting import Progress, collect
from oirl.engines.spending import Budget
from oirl.errors import ConfigError
from oirl.logs.store import read_log
from oirl.records import Query
from oirl.statistics.intervals import paired_interval, success_interval

ROUND = 20
"""Queries of each round: after each one, prompts may leave."""
RISK = 0.05
"""The probability, at most, with which the best prompt leaves the race."""


@dataclass(slots=True)
class Racer:
    """A prompt in the race.

    Attributes:
        prompt_id: Its name.
        prompt: The template.
        n: Queries on which it has a verdict.
        success: Share of them that it got right.
        ci_low: Lower end of the 95% interval.
        ci_high: Upper end.
        left_after: Queries after which it left the race; None if it stayed to the end.
    """

    prompt_id: str
    prompt: str
    n: int = 0
    success: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    left_after: int | None = None


@dataclass(slots=True)
class RaceReport:
    """What came out of a race.

    Attributes:
        log: The log of all runs.
        racers: The prompts, those that stayed first, best first.
        winner: The best of those that stayed.
        incumbent: The prompt to beat.
        n_confirm: Queries, none of them of the race, on which winner and incumbent were compared.
        gain: Success of the winner less that of the incumbent there; None where nothing was compared.
        ci_low: Lower end of its 95% interval.
        ci_high: Upper end.
        stopped: Why the race ended before its end, None if it did not.
        warnings: What is worth saying.
    """

    log: str
    racers: list[Racer]
    winner: str
    incumbent: str
    n_confirm: int = 0
    gain: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    stopped: str | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return asdict(self)


def losers(verdicts: np.ndarray, comparisons: int) -> np.ndarray:
    """Return which prompts another one beats, bool (P,).

    Each pair is compared on the queries on which they disagree, by the exact binomial test (McNemar); a prompt is out
    where some rival's one-sided p-value is at most RISK / `comparisons`.

    Args:
        verdicts: 1 right, 0 wrong, NaN not known, float (Q, P): all prompts on the same queries.
        comparisons: How often the best prompt is compared with another one in the whole race.
    """
    right, wrong = verdicts == 1, verdicts == 0
    wins = right.T.astype(int) @ wrong.astype(int)  # (P, P): a right where b is wrong
    # The chance of at least so many wins if both were equally good.
    chance = binom.sf(wins - 1, wins + wins.T, 0.5)
    np.fill_diagonal(chance, 1.0)
    return np.asarray((chance <= RISK / max(comparisons, 1)).any(axis=0))


def race(
    engine: Engine,
    prompts: Sequence[tuple[str, str]],
    incumbent: str,
    queries: Sequence[Query],
    confirm: Sequence[Query],
    out: str | Path,
    *,
    grade: str,
    sampling: Sampling | None = None,
    budget: Budget | None = None,
    price: tuple[float, float] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> RaceReport:
    """Race prompts over queries in rounds, then compare the winner with the incumbent on other queries.

    The success of a winner on the queries that it won on is too good by as much as luck chose it; the gain that counts
    is the one on `confirm`. The race goes on from `out` where it was stopped.

    Args:
        engine: What runs the model.
        prompts: (prompt_id, template) of each prompt, the incumbent among them.
        incumbent: Id of the prompt to beat.
        queries: With answers; best unlike each other, as the tests take them for independent.
        confirm: Other queries, unlike those; winner and incumbent are run on all of them. None are used if empty.
        out: The log of all runs.
        grade: The checker.
        sampling: How responses are drawn.
        budget: The most to spend.
        price: Of a million tokens in and out.
        progress: Called after each run.

    Raises:
        ConfigError: If there is no query.
        EngineError: If the engine cannot go on; the same race goes on from there.
    """
    warnings: list[str] = []

    def run(some: Sequence[tuple[str, str]], asked: Sequence[Query]) -> str | None:
        given: dict[str, Any] = {"budget": budget, "price": price, "progress": progress}
        made = collect(engine, asked, some, out, sampling=sampling, grade=grade, **given)
        warnings[:] = made.warnings  # they speak of all rows of the log
        return made.stopped

    if not queries:
        raise ConfigError("a race needs at least one query")
    racers = {name: Racer(name, text) for name, text in prompts}
    rounds = -(-len(queries) // ROUND)
    comparisons = (len(prompts) - 1) * rounds
    stopped = None
    for i in range(rounds):
        asked = queries[: (i + 1) * ROUND]
        left = [(r.prompt_id, r.prompt) for r in racers.values() if r.left_after is None]
        stopped = run(left, asked)
        verdicts = _verdicts(out, [name for name, _ in left], asked)
        for (name, _), lost in zip(left, losers(verdicts, comparisons), strict=True):
            if lost and name != incumbent:
                racers[name].left_after = len(asked)
        if stopped or len([r for r in racers.values() if r.left_after is None]) == 1:
            break
    _describe(racers, _verdicts(out, list(racers), queries))
    # Who is as good as the one to beat has not won.
    order = {name: (-(r.success or 0.0), name != incumbent) for name, r in racers.items()}
    ordered = sorted(racers.values(), key=lambda r: (-(r.left_after or len(queries) + 1), order[r.prompt_id]))
    stayed = [r for r in ordered if r.left_after is None]
    report = RaceReport(str(out), ordered, stayed[0].prompt_id, incumbent, stopped=stopped)
    if stayed[0].prompt_id != incumbent and confirm and not stopped:
        finalists = [(name, racers[name].prompt) for name in (stayed[0].prompt_id, incumbent)]
        report.stopped = run(finalists, confirm)
        _confirm(report, _verdicts(out, [name for name, _ in finalists], confirm))
    report.warnings = warnings
    if all(not r.n for r in ordered):
        report.warnings.append(f"the checker {grade!r} gave no verdict on any response: does it fit the answers?")
    return report


def _verdicts(log: str | Path, prompt_ids: Sequence[str], queries: Sequence[Query]) -> np.ndarray:
    """Return the verdicts of some prompts on some queries, float (Q, P), NaN where there is none.

    A run that failed is wrong: left out, it would help a prompt that fails on the hard queries.
    """
    table = read_log(log, ["query_id", "query", "prompt_id", "prompt", "replicate", "response", "correct"])
    row = {query.query_id: i for i, query in enumerate(queries)}
    column = {name: i for i, name in enumerate(prompt_ids)}
    found = np.full((len(row), len(column)), np.nan)
    names = ("query_id", "prompt_id", "response", "correct")
    for query, prompt, response, verdict in zip(*(table[name].to_pylist() for name in names), strict=True):
        if query in row and prompt in column and (verdict is not None or response is None):
            found[row[query], column[prompt]] = bool(verdict)
    return found


def _describe(racers: Mapping[str, Racer], verdicts: np.ndarray) -> None:
    for racer, column in zip(racers.values(), verdicts.T, strict=True):
        known = column[~np.isnan(column)]
        racer.n = len(known)
        if len(known):
            racer.success, racer.ci_low, racer.ci_high = success_interval(known)


def _confirm(report: RaceReport, verdicts: np.ndarray) -> None:
    both = verdicts[~np.isnan(verdicts).any(axis=1)]
    report.n_confirm = len(both)
    if len(both):
        first, second = int((both[:, 0] > both[:, 1]).sum()), int((both[:, 0] < both[:, 1]).sum())
        report.gain, report.ci_low, report.ci_high = paired_interval(first, second, len(both))
