"""Collecting a log: queries under prompts on an engine, graded, resumable, within a budget."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from oirl.engines.base import Completion, Engine, EngineError, Request, Sampling, failed
from oirl.engines.designs import Cell
from oirl.engines.journal import Journal, check_same_run
from oirl.engines.runs import Key, Run, count_of
from oirl.engines.spending import TOO_SMALL, Budget, Spending
from oirl.errors import ConfigError, DataError
from oirl.language_models import Rendered
from oirl.logs.store import LogWriter, conform, log_metadata, read_log
from oirl.records import INTERACTION_SCHEMA, Query

RUN = "run"
"""Key of a log's file metadata under which the settings of the run stand that collected it."""
_GIVE_UP_AFTER = 20
_MANY_CUT = 0.05
_ROWS_AT_A_TIME = 20_000


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        total: Runs to make in all, those of earlier sessions among them.
        done: Runs that are made.
        failed: Those of them that have no response.
        graded: Runs with a verdict.
        right: Those of them that are right.
        tokens_in: Tokens read, in all sessions.
        tokens_out: Tokens sampled, in all sessions.
        money: What they cost, None where no price is known.
        seconds: Since this session began.
        new_tokens_out: Tokens sampled in this session.
        new: Runs made in this session.
    """

    total: int
    done: int = 0
    failed: int = 0
    graded: int = 0
    right: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    money: float | None = None
    seconds: float = 0.0
    new_tokens_out: int = 0
    new: int = 0


@dataclass(slots=True)
class CollectReport:
    """What a collecting run has done.

    Attributes:
        out: The log.
        run_id: Name of the run: a hash of its settings.
        progress: The counts at the end.
        stopped: Why not all runs were made, None if they were.
        errors: Reason -> count of the runs that failed.
        warnings: What is worth saying.
    """

    out: str
    run_id: str
    progress: Progress
    stopped: str | None = None
    errors: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return asdict(self)


def collect(
    engine: Engine,
    queries: Sequence[Query],
    prompts: Sequence[tuple[str, str]],
    out: str | Path,
    *,
    sampling: Sampling | None = None,
    design: str = "full",
    replicates: int = 1,
    grade: str | None = None,
    budget: Budget | None = None,
    price: tuple[float, float] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> CollectReport:
    """Run queries under prompts and write a log; what an earlier session of the same run has made is not made again.

    Every finished run is appended to a journal beside `out` at once. When all is done, or the budget is, the log is
    written and the journal removed. A response depends on the seed, its query, prompt and replicate alone, so that a
    run in several sessions gives the rows of an uninterrupted one. A log that these settings have collected is gone on
    with: more replicates or a larger budget add rows, and runs that failed are tried again.

    Args:
        engine: What runs the model.
        queries: What to ask; with gold answers if `grade` is given. Equal ones are asked once.
        prompts: (prompt_id, template) of each prompt.
        out: The log to write.
        sampling: How responses are drawn; `n` is not used.
        design: "full": every query under every prompt. "random": a prompt drawn for each run. "balanced": the same, but
            each prompt equally often, different ones for a query. "adaptive": random in rounds of 50, prompts that may
            be the best more often (`designs.top_two`). All but "full" write propensities down.
        replicates: Runs of each cell of a full design, runs of each query of the others.
        grade: A registered checker, or `package.module:function`.
        budget: The most to spend in all sessions together.
        price: Of a million tokens in and out.
        progress: Called after each run.

    Raises:
        ConfigError: If the settings do not fit each other, or `out` holds something else.
        DataError: If two queries of one id differ, or the journal is damaged.
        EngineError: If the engine cannot go on; what is done stays in the journal.
    """
    if Path(out).is_dir():
        raise ConfigError(f"{out} is a folder; name a file")
    run = Run(engine, queries, prompts, Path(out), sampling or Sampling(), design, replicates, grade)
    spending = Spending(budget, price, run.sampling.max_tokens)
    with Journal(f"{out}.journal", run.identity) as journal:
        made = _Made(run, spending, journal, progress)
        report = CollectReport(str(out), run.run_id, made.progress)
        for cells in run.rounds(made.verdicts):
            if not made.make(cells):
                report.stopped = "the budget is spent"
                break
        table = made.table()
        _write(run, table)
        journal.remove()
    _tell(report, run, table)
    return report


class _Made:
    """The runs that are made, in this session and those before."""

    def __init__(self, run: Run, spending: Spending, journal: Journal, progress: Callable[[Progress], None]) -> None:
        self.progress = Progress(run.total)
        self.verdicts: dict[Key, bool | None] = {}
        self._run, self._spending, self._journal, self._tell = run, spending, journal, progress
        self._tables: list[pa.Table] = []
        self._new: list[dict[str, Any]] = []
        self._place: dict[Key, int] = {}
        self._rows = 0
        self._failed_before: dict[Key, int] = {}
        self._without: set[Key] = set()
        self._failed_once: set[Key] = set()
        self._failures_in_a_row, self._any_success = 0, False
        self._began = time.monotonic()
        run.go_on(journal.identity)
        earlier = read_earlier(run)
        if earlier is not None:
            self._load(earlier)
        for start in range(0, len(journal.rows), _ROWS_AT_A_TIME):
            self._load(_table(journal.rows[start : start + _ROWS_AT_A_TIME], str(journal.path)))
        journal.rows.clear()

    def make(self, cells: Iterable[Cell]) -> bool:
        """Make the runs that are not made; False if the budget did not allow for all of them."""
        todo: deque[Cell] = deque()
        for cell in cells:
            key = self._run.key(cell)
            if key in self._place:
                self._count(self.verdicts[key], key in self._without, None)
            else:
                todo.append(cell)
        while todo:
            taken: list[Cell] = []
            waiting: set[int] = set()
            requests = self._requests(todo, taken, waiting)
            for position, completions in self._run.engine.stream(requests, self._run.sampling):
                completion = self._checked(position, completions, waiting)
                if self._finish(taken[position], completion) is None:
                    todo.append(taken[position])
            if not taken:
                return False
            for position in sorted(waiting):
                if self._finish(taken[position], failed("the engine gave no completion")[0]) is None:
                    todo.append(taken[position])
        return True

    def _checked(self, position: Any, completions: Any, waiting: set[int]) -> Completion:
        """Return the completion of a request; an engine that mixes requests up would spoil the log."""
        ours = isinstance(position, int) and position in waiting
        found = list(completions) if isinstance(completions, (list, tuple)) else []
        if not ours or len(found) != 1 or not isinstance(found[0], Completion):
            what = "one completion of each request" if ours else "each request once, by its position"
            name = getattr(self._run.engine, "name", "?")
            raise EngineError(f"the engine {name!r} breaks its contract: it must yield {what}; got {position!r}")
        waiting.remove(position)
        if found[0].text is None and found[0].error is None:
            return failed("the engine gave neither a response nor a reason")[0]
        return found[0]

    def table(self) -> pa.Table:
        """Return all rows, by query, prompt and replicate; those outside of this design come last."""
        self._pack()
        queries = {q.query_id: i for i, q in enumerate(self._run.queries)}
        prompts = {name: i for i, (name, _) in enumerate(self._run.prompts)}

        def order(key: Key) -> tuple[int, int, int]:
            return queries.get(key[0], len(queries)), prompts.get(key[1], len(prompts)), key[2]

        place = self._failed_before | self._place  # what could not be tried again stays as it was
        places = [place[key] for key in sorted(place, key=order)]
        tables = self._tables or [INTERACTION_SCHEMA.empty_table()]
        return pa.concat_tables(tables).take(pa.array(places, pa.int64()))

    def _requests(self, todo: deque[Cell], taken: list[Cell], waiting: set[int]) -> Iterator[Request]:
        while todo:
            self._run.engine.check_not_paused()  # an engine of somebody else's may not look
            request = self._run.request(todo[0])
            if not self._spending.afford(self._run.key(todo[0]), size_of(request.rendered)):
                return
            waiting.add(len(taken))
            taken.append(todo.popleft())
            yield request

    def _finish(self, cell: Cell, completion: Completion) -> Key | None:
        """Keep a run, unless it has failed for the first time and may do better later."""
        key = self._run.key(cell)
        tokens_in, tokens_out = count_of(completion.tokens_in), count_of(completion.tokens_out)
        self._spending.settle(key, tokens_in, tokens_out, answered=completion.error is None)
        if completion.error is None:
            self._failures_in_a_row, self._any_success = 0, True
        elif not completion.refused and key not in self._failed_once:
            self._failed_once.add(key)
            self._failures_in_a_row += 1
            self._give_up(completion.error)
            return None
        elif not self._any_success:
            self._failures_in_a_row += 1
        row = self._run.row(cell, completion, self._spending.cost(tokens_in, tokens_out))
        self._journal.append(row)
        self._new.append(row)
        self._count(row["correct"], completion.error is not None, tokens_out or 0)
        self._place[key], self.verdicts[key] = self._rows + len(self._new) - 1, row["correct"]
        if len(self._new) == _ROWS_AT_A_TIME:
            self._pack()
        self._tell(self.progress)
        self._give_up(completion.error)
        return key

    def _give_up(self, error: str | None) -> None:
        if self._failures_in_a_row >= _GIVE_UP_AFTER:
            raise EngineError(
                f"{_GIVE_UP_AFTER} requests in a row failed, the last with: {error}; {self.progress.done:,} runs are "
                f"kept in {self._journal.path}, and the same command goes on from there"
            )

    def _count(self, verdict: bool | None, failed: bool, new_tokens_out: int | None) -> None:
        progress = self.progress
        progress.done += 1
        progress.failed += failed
        progress.graded += verdict is not None
        progress.right += verdict is True
        if new_tokens_out is not None:
            progress.new += 1
            progress.new_tokens_out += new_tokens_out
        progress.tokens_in, progress.tokens_out = self._spending.tokens_in, self._spending.tokens_out
        progress.money = self._spending.money
        progress.seconds = time.monotonic() - self._began

    def _pack(self) -> None:
        if self._new:
            self._tables.append(_table(self._new, "the run"))
            self._rows += len(self._new)
            self._new = []

    def _load(self, table: pa.Table) -> None:
        """Take rows of an earlier session; failed runs are to be made again, but in an adaptive design."""
        self._run.check_texts(table)
        names = (
            "query_id",
            "prompt_id",
            "replicate",
            "prompt",
            "query",
            "correct",
            "response",
            "tokens_in",
            "tokens_out",
        )
        for i, values in enumerate(zip(*(table[name].to_pylist() for name in names), strict=True)):
            key, (prompt, query, verdict, response, tokens_in, tokens_out) = values[:3], values[3:]
            if key in self._place:  # killed between writing the log and removing the journal
                continue
            if self._spending.limited:  # what an engine did not tell was paid for all the same
                self._spending.promise(key, size_of(self._run.render(prompt, query) or ""))
            self._spending.settle(key, tokens_in, tokens_out, answered=response is not None)
            if response is None and self._run.design != "adaptive":
                self._failed_before[key] = self._rows + i
                self._failed_once.add(key)
                continue
            self._place[key], self.verdicts[key] = self._rows + i, verdict
            self._any_success |= response is not None
            if response is None:
                self._without.add(key)
        self._tables.append(table)
        self._rows += len(table)


def read_earlier(run: Run) -> pa.Table | None:
    """Return the rows of the log that is to be gone on with, None if there is none, or none that was ever answered.

    Raises:
        ConfigError: If the log is not of this run.
    """
    if not run.out.exists():
        return None
    kept = log_metadata(run.out).get(RUN)
    if kept is None:
        raise ConfigError(f"{run.out} is there and was not collected by oirl; name another --out")
    earlier, table = json.loads(kept), read_log(run.out)
    if earlier != run.identity and table["response"].null_count == len(table):
        return None  # other settings may be what helps
    check_same_run(str(run.out), earlier, run.identity)
    run.go_on(earlier)
    return table


def _table(rows: list[dict[str, Any]], where: str) -> pa.Table:
    """Return rows of a journal in the schema of a log."""
    columns = {}
    for name in INTERACTION_SCHEMA.names:
        values = [row.get(name) for row in rows]
        try:
            if name == "created_at":
                values = [None if value is None else datetime.fromisoformat(value) for value in values]
            columns[name] = pa.array(values, INTERACTION_SCHEMA.field(name).type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
            raise DataError(f"{where}: column {name!r}: {e}") from e
    return pa.Table.from_batches([conform(b, where) for b in pa.table(columns).to_batches()], INTERACTION_SCHEMA)


def _write(run: Run, table: pa.Table) -> None:
    if not len(table):
        raise ConfigError(TOO_SMALL)
    with LogWriter(run.out, notes={RUN: json.dumps(run.identity, ensure_ascii=False)}) as writer:
        for batch in table.to_batches(_ROWS_AT_A_TIME):
            writer.write(batch)


def _tell(report: CollectReport, run: Run, table: pa.Table) -> None:
    """Say what should be known of the rows."""
    notes = [_notes(text) for text in table["metadata"].to_pylist()]
    silent = pc.is_null(table["response"]).to_pylist()
    report.errors = dict(Counter(str(n.get("error")) for n, f in zip(notes, silent, strict=True) if f).most_common())
    report.warnings += run.warnings
    if ungraded := Counter(note["grade_error"] for note in notes if isinstance(note.get("grade_error"), str)):
        reason, count = ungraded.most_common(1)[0]
        report.warnings.append(f"the checker failed on {ungraded.total():,} responses, {count:,} times with {reason}")
    failures = sum(report.errors.values())
    if failures:
        again = "" if run.design == "adaptive" else "; the same command tries them again"
        report.warnings.append(f"{failures:,} runs failed and stand in the log without a response{again}")
    cut = sum(note.get("finish_reason") == "length" for note in notes)
    if cut > _MANY_CUT * len(notes):
        report.warnings.append(f"{cut / len(notes):.0%} of the responses were cut off at the limit of tokens")
    if run.checker is None and any(query.answer is not None for query in run.queries):
        report.warnings.append("the queries have answers, but nothing was graded: name a checker (--grade)")


def _notes(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def size_of(rendered: Rendered) -> int:
    """Return the most tokens that a text or messages may be, by their bytes and what stands around them."""
    if isinstance(rendered, str):
        return len(rendered.encode("utf-8", "replace")) + 8
    return sum(len(turn["content"].encode("utf-8", "replace")) + 64 for turn in rendered)
