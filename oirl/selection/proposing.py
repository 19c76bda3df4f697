"""Candidate prompts: proposed by a language model, screened by a reward model, raced, confirmed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from oirl.engines.base import Engine, EngineError, Sampling, derive_seed
from oirl.engines.collecting import Progress, read_earlier, size_of
from oirl.engines.runs import Run
from oirl.engines.spending import TOO_SMALL, Budget, Spending
from oirl.errors import ConfigError, DataError
from oirl.evaluation.success import PromptSuccess, prompt_success
from oirl.logs.atomic import atomic_file
from oirl.logs.cells import make_cells
from oirl.logs.grading import open_checker
from oirl.logs.groups import group_queries
from oirl.logs.splits import train_rows
from oirl.logs.store import conform_table
from oirl.logs.text import template_id
from oirl.records import INTERACTION_SCHEMA, Query
from oirl.rewards.training import without_sparse_prompts
from oirl.selection.answers import Answers, Proposer, answers_path
from oirl.selection.meta_prompt import Evidence, Failure, LoggedPrompt, read_candidates, why_not, write_meta_prompt
from oirl.selection.racing import Racer, RaceReport, race

_SHOWN_BEST, _SHOWN_WORST, _FAILURES = 5, 2, 4
_ROUNDS_OF_ASKING = 4


@dataclass(frozen=True)
class MetaPromptProposer:
    """Asks a language model for one prompt at a time, by the text of `meta_prompt`.

    Args:
        engine: Any engine; it needs to follow instructions.
        temperature: Of its sampling: at 0 all proposals would be one.
        max_tokens: The most tokens of a reply.
    """

    engine: Engine
    temperature: float = 1.0
    max_tokens: int = 1024

    def describe(self) -> dict[str, Any]:
        """Return what decides its replies, for JSON."""
        told = self.engine.describe()
        model = {name: told.get(name) for name in ("engine", "model", "model_fingerprint")}
        return model | {"temperature": self.temperature, "max_tokens": self.max_tokens}

    def propose(self, evidence: Evidence, already: Sequence[str], n: int, seed: int) -> list[str]:
        """Return the candidates of n replies; see `Proposer`.

        Raises:
            EngineError: If no request was answered.
        """
        text = write_meta_prompt(evidence, already)
        rendered = [{"role": "user", "content": text}] if self.engine.chat else text
        sampling = Sampling(max_tokens=self.max_tokens, temperature=self.temperature, seed=seed)
        replies = [completion for (completion,) in self.engine.generate([rendered] * n, sampling)]
        if all(reply.text is None for reply in replies):
            raise EngineError(f"the proposer {self.engine.model!r} does not answer: {replies[0].error}")
        return [candidate for reply in replies for candidate in read_candidates(reply.text or "")]


@dataclass(slots=True)
class Candidate:
    """A proposed prompt and what is known of it.

    Attributes:
        prompt_id: A hash of the template.
        prompt: The template.
        predicted: Mean success by the reward model, None without one. It has never seen the prompt: an extrapolation.
        raced: Whether it went into the race.
    """

    prompt_id: str
    prompt: str
    predicted: float | None = None
    raced: bool = False


@dataclass(slots=True)
class ProposeReport:
    """What came of proposing.

    Attributes:
        out: The prompt file, None where nothing was written.
        best_prompt: The best single prompt of the log, the one to beat.
        candidates: What was proposed and kept, in the order of the file.
        left_out: Reason -> how many proposals.
        race: The race; None where none was run.
        warnings: What is worth saying.
    """

    out: str | None
    best_prompt: LoggedPrompt
    candidates: list[Candidate]
    left_out: dict[str, int]
    race: RaceReport | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Screen:
    """Which candidates go into the race.

    Attributes:
        keep: At most so many.
        model: A fitted `PromptRewardModel` whose estimates order them; None for the order of proposal.
    """

    keep: int
    model: Any = None


@dataclass(frozen=True, slots=True)
class RacePlan:
    """How candidates are tried.

    Attributes:
        engine: What runs the model that the prompts are for.
        grade: The checker.
        log: The log of all runs of the race.
        n_race: Queries to race on, at most.
        n_confirm: Queries to confirm the winner on, at most.
        sampling: How responses are drawn.
        budget: The most to spend.
        price: Of a million tokens in and out.
    """

    engine: Engine
    grade: str
    log: str | Path
    n_race: int = 100
    n_confirm: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget | None = None
    price: tuple[float, float] | None = None


def propose(
    log: pa.Table,
    proposer: Proposer,
    n: int,
    *,
    screen: Screen,
    plan: RacePlan | None,
    seed: int = 0,
    progress: Callable[[Progress], None] = lambda _: None,
) -> ProposeReport:
    """Propose prompts for the task of a log, and race them against its best single prompt.

    Only rows that the log marks `train` are used, if it marks any: what is found can be evaluated on the others. What
    the proposer has answered is kept beside the race's log until `write_prompt_file` has written the outcome of a
    finished race: the same call goes on with the same candidates.

    Args:
        log: Interactions with verdicts, and answers if there is a race.
        proposer: What proposes.
        n: How many candidates are wanted.
        screen: Which of them are raced.
        plan: The race; None to propose and screen only.
        seed: For examples, queries and draws.
        progress: Called after each run of the race.

    Raises:
        DataError: If the log has no verdicts, or no queries to race on.
        EngineError: If an engine cannot go on, or proposes nothing that can be used.
    """
    rows = train_rows(conform_table(log, INTERACTION_SCHEMA.names))
    if screen.keep < 1:
        raise ConfigError(f"keep = {screen.keep}; allowed: 1 or more")
    cells, sparse = without_sparse_prompts(make_cells(rows))
    # By the lower end of the interval: of prompts with few runs, the highest share is mostly luck.
    evidence = gather_evidence(rows, sorted(prompt_success(cells), key=lambda s: -s.ci_low), seed)
    best = evidence.prompts[0]
    queries = [] if plan is None else _check(plan, rows, evidence, seed)
    answers = Answers(proposer, evidence, n, seed, None if plan is None else answers_path(plan.log))
    candidates, left_out = _candidates(rows, answers, n)
    if not candidates:
        answers.forget()  # another time it may propose something else
        reasons = (
            "; ".join(f"{count} times {why}" for why, count in left_out.most_common()) or "no <prompt> in any reply"
        )
        raise EngineError(f"the proposer gave no prompt that can be used: {reasons}")
    report = ProposeReport(None, best, candidates, dict(left_out.most_common()))
    report.warnings += [sparse] if sparse else []
    _screen(report, rows, screen)
    if plan is not None:
        report.race = _race(report, queries, plan, progress)
        _conclude(report)
    elif screen.model is None:
        report.warnings.append("no candidate was raced or estimated: there is no evidence for any of them")
    return report


def gather_evidence(rows: pa.Table, ranked: Sequence[PromptSuccess], seed: int) -> Evidence:
    """Return the best and worst prompts of a log and examples of what the best one got wrong.

    Args:
        rows: Graded interactions.
        ranked: Their prompts, best first.
        seed: Draws the examples.
    """
    texts = dict(zip(rows["prompt_id"].to_pylist(), rows["prompt"].to_pylist(), strict=True))
    shown = [*ranked[:_SHOWN_BEST], *ranked[max(_SHOWN_BEST, len(ranked) - _SHOWN_WORST) :]]
    names = ("prompt_id", "correct", "query", "response", "answer")
    wrong = [
        Failure(query, response, answer)
        for prompt, correct, query, response, answer in zip(*(rows[c].to_pylist() for c in names), strict=True)
        if prompt == ranked[0].prompt_id and correct is False and response
    ]
    chosen = np.random.default_rng(seed).permutation(len(wrong))[:_FAILURES]
    logged = tuple(LoggedPrompt(s.prompt_id, texts[s.prompt_id], s.success, s.n) for s in shown)
    return Evidence(logged, tuple(wrong[i] for i in chosen))


def write_prompt_file(report: ProposeReport, path: str | Path) -> None:
    """Write the candidates and the best logged prompt as JSON lines: a prompt file with its evidence.

    After a race the first is the winner if it is shown to be better, else the best logged prompt.
    """
    racers = {r.prompt_id: r for r in report.race.racers} if report.race else {}
    made = report.race
    shown = made is not None and made.ci_low is not None and made.ci_low > 0 and not made.stopped
    first = made.winner if made and shown else report.best_prompt.prompt_id
    rows = [_row(c.prompt_id, c.prompt, "proposed", racers, report) | _estimate(c) for c in report.candidates]
    best = report.best_prompt
    logged = {"logged": {"n": best.n, "success": best.success}}
    rows.append(_row(best.prompt_id, best.prompt, "logged", racers, report) | logged)
    if made is not None:
        rows.sort(key=lambda row: row["prompt_id"] != first)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    report.out = str(path)
    if made is not None and not made.stopped:
        answers_path(made.log).unlink(missing_ok=True)


def check_prompt_file(path: str | Path) -> None:
    """Refuse a file that is there and is not an earlier result of `propose`.

    Raises:
        ConfigError: If it would be lost.
    """
    file = Path(path)
    if not file.exists():
        return
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        ours = all(json.loads(line).get("source") in ("proposed", "logged") for line in lines)
    except (OSError, ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise ConfigError(f"{path} is there and holds no proposed prompts; name another file")


def _estimate(candidate: Candidate) -> dict[str, Any]:
    return {} if candidate.predicted is None else {"predicted": candidate.predicted, "extrapolation": True}


def _row(
    prompt_id: str, prompt: str, source: str, racers: Mapping[str, Racer], report: ProposeReport
) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt_id": prompt_id, "prompt": prompt, "source": source}
    racer = racers.get(prompt_id)
    if racer is not None:
        row["race"] = {k: v for k, v in asdict(racer).items() if k not in ("prompt_id", "prompt")}
    if report.race is not None and prompt_id == report.race.winner and report.race.gain is not None:
        confirmed = report.race
        row["confirmed"] = {
            "gain": confirmed.gain,
            "ci_low": confirmed.ci_low,
            "ci_high": confirmed.ci_high,
            "over": confirmed.incumbent,
            "n": confirmed.n_confirm,
        }
    return row


def _candidates(rows: pa.Table, answers: Answers, n: int) -> tuple[list[Candidate], Counter[str]]:
    """Ask until there are n candidates that differ, or the proposer has been asked often enough."""
    known = list(dict.fromkeys(rows["prompt"].to_pylist()))
    texts = [t for f in answers.evidence.failures for t in (f.query, f.response)]
    found: list[Candidate] = []
    left_out: Counter[str] = Counter()
    for turn in range(_ROUNDS_OF_ASKING):
        already = [c.prompt for c in found]
        for text in answers.turn(turn, already, n - len(found)):
            reason = why_not(text, [*known, *(c.prompt for c in found)], texts)
            if reason is not None:
                left_out[reason] += 1
            elif len(found) < n:
                found.append(Candidate(template_id(text), text))
        if len(found) >= n:
            break
    return found, left_out


def _screen(report: ProposeReport, rows: pa.Table, screen: Screen) -> None:
    """Order the candidates by the reward model's estimates, and mark those that are kept."""
    if screen.model is not None:
        queries = list(dict.fromkeys(rows["query"].to_pylist()))
        estimates = screen.model.predict_proba(queries, [c.prompt for c in report.candidates]).mean(axis=0)
        for candidate, estimate in zip(report.candidates, estimates, strict=True):
            candidate.predicted = float(estimate)
        report.candidates.sort(key=lambda c: -(c.predicted or 0.0))
        report.warnings.append("the reward model has seen none of the candidates: its estimates are extrapolations")
    for candidate in report.candidates[: screen.keep]:
        candidate.raced = True


def _check(plan: RacePlan, rows: pa.Table, evidence: Evidence, seed: int) -> list[Query]:
    """Return the queries of a race; what cannot be raced is said before a proposer is paid."""
    open_checker(plan.grade)
    spending = Spending(plan.budget, plan.price, plan.sampling.max_tokens)
    if plan.n_race < 1 or plan.n_confirm < 0:
        raise ConfigError(f"n_race = {plan.n_race}, n_confirm = {plan.n_confirm}; allowed: 1 or more, 0 or more")
    queries = unlike_queries(rows, seed, [failure.query for failure in evidence.failures])
    if len(queries) < 2:
        raise DataError("a race needs queries with an `answer` in the log; there are fewer than two")
    best = evidence.prompts[0]
    # A run of the best prompt, which refuses what cannot be filled in and a race log of other settings.
    run = Run(
        plan.engine,
        queries[: _raced(queries, plan)],
        [(best.prompt_id, best.prompt)],
        Path(plan.log),
        _race_sampling(plan),
        "full",
        1,
        plan.grade,
    )
    if read_earlier(run) is None:
        sizes = [size_of(run.request(cell).rendered) for cells in run.rounds({}) for cell in cells]
        if not spending.afford("any", min(sizes)):
            raise ConfigError(TOO_SMALL)
    return queries


def _raced(queries: Sequence[Query], plan: RacePlan) -> int:
    """Return how many of the queries are for the race; the others confirm."""
    return min(plan.n_race, max(len(queries) * plan.n_race // max(plan.n_race + plan.n_confirm, 1), 1))


def _race_sampling(plan: RacePlan) -> Sampling:
    # The log may have been collected with this very seed: drawn alike, its best prompt would be as lucky again.
    return replace(plan.sampling, seed=derive_seed(plan.sampling.seed, "race"))


def _race(
    report: ProposeReport, queries: list[Query], plan: RacePlan, progress: Callable[[Progress], None]
) -> RaceReport:
    prompts = [(c.prompt_id, c.prompt) for c in report.candidates if c.raced]
    prompts.append((report.best_prompt.prompt_id, report.best_prompt.prompt))
    raced = _raced(queries, plan)
    return race(
        plan.engine,
        prompts,
        report.best_prompt.prompt_id,
        queries[:raced],
        queries[raced : raced + plan.n_confirm],
        plan.log,
        grade=plan.grade,
        sampling=_race_sampling(plan),
        budget=plan.budget,
        price=plan.price,
        progress=progress,
    )


def unlike_queries(rows: pa.Table, seed: int, shown: Sequence[str] = ()) -> list[Query]:
    """Return one query of each group of near duplicates that has an answer, in random order.

    Args:
        rows: Interactions.
        seed: Decides the order.
        shown: Queries that a proposer has seen: their groups are left out.
    """
    names = ("query_id", "query", "answer", "dataset", "split")
    found: dict[str, Query] = {}
    for query_id, query, answer, dataset, split in zip(*(rows[c].to_pylist() for c in names), strict=True):
        if answer is not None:
            found.setdefault(query_id, Query(query_id, query, answer, dataset, split))
    queries = list(found.values())
    order = np.random.default_rng(seed).permutation(len(queries))
    texts = [*(q.query for q in queries), *shown]
    labels = group_queries(texts).labels.tolist() if texts else []
    seen: dict[int, Query] = {}
    for i in order:
        seen.setdefault(labels[i], queries[i])
    known = set(labels[len(queries) :])
    return [query for label, query in seen.items() if label not in known]


def _conclude(report: ProposeReport) -> None:
    """Say what may be claimed."""
    made = report.race
    if made is None:
        return
    report.warnings += made.warnings
    if made.stopped:
        report.warnings.append(f"the race is not finished, as {made.stopped}")
    elif made.winner == made.incumbent:
        report.warnings.append("no candidate did better than the best logged prompt in the race")
    elif made.gain is None:
        report.warnings.append("the winner was not confirmed: there were no other queries to compare it on")
    if made.ci_high is not None and made.ci_high < 0:
        report.warnings.append("on other queries the winner of the race does worse than the best logged prompt")
    elif made.ci_low is not None and made.ci_low <= 0:
        report.warnings.append("the winner is not shown to be better than the best logged prompt: the interval holds 0")
