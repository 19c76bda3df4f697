"""From a log to confirmed prompts: the evidence, the asking, the screen, the race, the file and the claims."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries

from oirl import PromptRewardModel, PromptSelector, collect, open_engine, read_log
from oirl.engines.base import Completion, Engine, EngineError, Request, Sampling, failed, refused
from oirl.engines.spending import Budget
from oirl.errors import ConfigError, DataError, OirlError
from oirl.evaluation.success import prompt_success
from oirl.language_models import Rendered
from oirl.logs.cells import make_cells
from oirl.logs.groups import group_queries
from oirl.logs.queries import read_templates
from oirl.logs.text import template_id
from oirl.records import INTERACTION_SCHEMA, Query
from oirl.selection import proposing
from oirl.selection.meta_prompt import Evidence, LoggedPrompt, write_meta_prompt
from oirl.selection.proposing import (
    Candidate,
    MetaPromptProposer,
    Proposer,
    ProposeReport,
    RacePlan,
    Screen,
    gather_evidence,
    propose,
    unlike_queries,
    write_prompt_file,
)
from oirl.selection.racing import RaceReport, race
from oirl.selection.selector import read_candidates as read_prompt_file
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems
from oirl_data.prompts import PROMPTS as DEMO_PROMPTS

GOOD, FAIR, POOR = "{query} Well, at 0.95", "{query} Fairly, at 0.50", "{query} Poorly, at 0.05"
LOGGED = {"fair": FAIR, "poor": POOR}
NO_MARK = "it does not say where the query goes"


class Coin(Engine):
    """Right with a probability that stands in the rendered text, `at 0.8`; the answer to a query is its last word."""

    name = "coin"
    model = "toy"
    chat = False

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[str] = []
        self._dies_after = dies_after

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "model": self.model, "chat": self.chat}

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for position, request in enumerate(requests):
            if len(self.asked) == self._dies_after:
                raise EngineError("the server is gone")
            assert isinstance(request.rendered, str)
            self.asked.append(request.rendered)
            right = request.seed / 2**31 < float(re.findall(r"at (\d\.\d+)", request.rendered)[0])
            said = answer_of(request.rendered.partition("?")[0]) if right else "nothing"
            yield position, [Completion(said, "stop", tokens_in=10, tokens_out=1)]


class Says(Engine):
    """A proposer's model: it gives the replies that it is told, in turn, and then the last one for ever."""

    name = "says"
    model = "toy-proposer"

    def __init__(self, *replies: str | Completion, chat: bool = False) -> None:
        self.chat, self._replies = chat, list(replies)
        self.asked: list[Rendered] = []
        self.seeds: list[int] = []
        self.sampling: list[Sampling] = []

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "model": self.model}

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for position, request in enumerate(requests):
            self.asked.append(request.rendered)
            self.seeds.append(request.seed)
            self.sampling.append(sampling)
            reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
            yield position, [Completion(reply, "stop") if isinstance(reply, str) else reply]


class Fixed:
    """A proposer that gives what it is told, turn by turn, and keeps what it was asked."""

    def __init__(self, *turns: list[str]) -> None:
        self.turns = list(turns)
        self.calls: list[tuple[Evidence, list[str], int, int]] = []

    def propose(self, evidence: Evidence, already: Sequence[str], n: int, seed: int) -> list[str]:
        self.calls.append((evidence, list(already), n, seed))
        return self.turns.pop(0) if self.turns else []


def answer_of(query: str) -> str:
    return query.split()[-1].strip("?")


def make_task(
    n: int = 90, prompts: dict[str, str] = LOGGED, *, queries: Sequence[str] = (), answers: bool = True, seed: int = 0
) -> pa.Table:
    """Return a log of prompts whose text says how good they are."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, query in enumerate(queries or make_queries(n, seed)):
        answer = answer_of(query)
        for prompt_id, prompt in prompts.items():
            right = bool(rng.random() < float(prompt.split()[-1]))
            rows.append(
                {
                    **{"query_id": f"q{i}", "query": query, "prompt_id": prompt_id, "prompt": prompt, "replicate": 0},
                    **{"response": answer if right else f"no {i}", "correct": right},
                    **{"answer": answer if answers else None},
                }
            )
    return pa.Table.from_pylist(rows, schema=INTERACTION_SCHEMA)


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, INTERACTION_SCHEMA.field(name), pa.array(values, INTERACTION_SCHEMA.field(name).type))


def run(
    log: pa.Table, proposer: Proposer, n: int = 1, *, out: Path | None = None, keep: int = 4, **settings: Any
) -> ProposeReport:
    """Propose, and race if there is a place for the log of the race."""
    model, seed = settings.pop("model", None), settings.pop("seed", 0)
    known: dict[str, Any] = {"engine": Coin(), "grade": "exact", "n_race": 40, "n_confirm": 40} | settings
    plan = None if out is None else RacePlan(log=out, **known)
    return propose(log, proposer, n, screen=Screen(keep, model), plan=plan, seed=seed)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "race.parquet"


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def task() -> pa.Table:
    return make_task()


# The evidence -----------------------------------------------------------------------------------------------


def evidence_of(log: pa.Table, seed: int = 0) -> Evidence:
    return gather_evidence(log, prompt_success(make_cells(log)), seed)


def test_best_prompts_stand_first_and_the_worst_are_shown_too() -> None:
    rates = {f"p{i}": f"{{query}} Way {i} at {rate}" for i, rate in enumerate([0.1, 0.9, 0.2, 0.6, 0.8, 0.4, 0.3, 0.7])}
    log = make_task(200, rates)
    ranked = prompt_success(make_cells(log))
    shown = evidence_of(log).prompts
    assert [p.prompt_id for p in shown] == ["p1", "p4", "p7", "p3", "p5", "p2", "p0"]  # all but the one in the middle
    assert [p.prompt_id for p in shown] == [s.prompt_id for s in (*ranked[:5], *ranked[-2:])]
    for prompt in shown:
        mine = log.filter(pa.compute.equal(log["prompt_id"], prompt.prompt_id))["correct"].to_pylist()
        assert prompt == LoggedPrompt(prompt.prompt_id, rates[prompt.prompt_id], np.mean(mine), 200)


@pytest.mark.parametrize(("n", "count"), [(1, 1), (5, 5), (6, 6), (7, 7), (9, 7)])
def test_no_prompt_is_shown_twice(n: int, count: int) -> None:
    shown = evidence_of(make_task(30, {f"p{i}": f"{{query}} Way {i} at 0.{i + 1}" for i in range(n)})).prompts
    assert len({p.prompt_id for p in shown}) == len(shown) == count
    assert [p.success for p in shown] == sorted((p.success for p in shown), reverse=True)


def test_failures_are_those_of_the_best_prompt(task: pa.Table) -> None:
    rows = task.to_pylist()
    wrong = {(r["query"], r["response"], r["answer"]) for r in rows if r["prompt_id"] == "fair" and not r["correct"]}
    found = [(f.query, f.response, f.answer) for f in evidence_of(task).failures]
    assert len(found) == len(set(found)) == 4
    assert set(found) < wrong


def test_failures_are_drawn_by_the_seed(task: pa.Table) -> None:
    assert evidence_of(task, 3) == evidence_of(task, 3)
    drawn = [evidence_of(task, seed).failures for seed in range(20)]
    assert len({f.query for failures in drawn for f in failures}) > 20


def test_runs_without_a_verdict_or_a_response_are_no_failures() -> None:
    log = make_task(40)
    verdicts = log["correct"].to_pylist()
    responses = log["response"].to_pylist()
    kinds = [None if i % 8 < 4 else right for i, right in enumerate(verdicts)]
    texts = [("" if i % 16 == 6 else None) if i % 8 == 6 else text for i, text in enumerate(responses)]
    log = with_column(with_column(log, "correct", kinds), "response", texts)
    left = [r["query"] for r in log.to_pylist() if r["prompt_id"] == "fair" and r["correct"] is False and r["response"]]
    assert {f.query for seed in range(30) for f in evidence_of(log, seed).failures} == set(left)


def test_a_prompt_that_never_failed_shows_no_failure() -> None:
    perfect = evidence_of(make_task(30, {"all": "{query} at 1.0", "poor": POOR}))
    assert perfect.failures == ()
    assert perfect.prompts[0].prompt_id == "all"


def test_answers_need_not_be_known() -> None:
    assert {f.answer for f in evidence_of(make_task(40, answers=False)).failures} == {None}


def test_one_lucky_run_does_not_make_the_best_prompt(task: pa.Table) -> None:
    """As in `fit` and `audit`: a prompt that was hardly run is no prompt to beat."""
    row = task.slice(0, 1).to_pylist()[0] | {"prompt_id": "lucky", "prompt": "{query} Luck at 0.10", "correct": True}
    log = pa.concat_tables([task, pa.Table.from_pylist([row], schema=INTERACTION_SCHEMA)])
    assert PromptSelector(PromptRewardModel()).fit(log).deployment_.best_prompt == "fair"
    proposer = Fixed([GOOD])
    report = run(log, proposer)
    assert report.best_prompt.prompt_id == "fair"
    assert [p.prompt_id for p in proposer.calls[0][0].prompts] == ["fair", "poor"]
    assert [warning for warning in report.warnings if "lucky (1)" in warning]


def test_a_few_runs_that_were_all_right_do_not_make_the_best_prompt() -> None:
    """Run on a ninth of the queries: no sparse prompt, but ten of ten show less than 76 of 80."""
    log = make_task(90, {"good": "{query} at 0.95", "few": "{query} Luck at 1.0", "poor": POOR})
    rows = [row for row in log.to_pylist() if row["prompt_id"] != "few" or int(row["query_id"][1:]) < 10]
    few = pa.Table.from_pylist(rows, schema=INTERACTION_SCHEMA)
    proposer = Fixed([GOOD])
    assert run(few, proposer).best_prompt.prompt_id == "good"
    assert [p.prompt_id for p in proposer.calls[0][0].prompts] == ["good", "few", "poor"]
    assert [p.n for p in proposer.calls[0][0].prompts] == [90, 10, 90]


# Asking -----------------------------------------------------------------------------------------------------


def test_candidates_are_named_by_their_text(task: pa.Table) -> None:
    report = run(task, Fixed([GOOD, "Other way: {query}"]), 2)
    assert [(c.prompt_id, c.prompt, c.predicted, c.raced) for c in report.candidates] == [
        (template_id(text), text, None, True) for text in (GOOD, "Other way: {query}")
    ]
    assert report.best_prompt == evidence_of(task).prompts[0]
    assert (report.out, report.race, report.left_out) == (None, None, {})


def test_what_is_left_out_is_counted_by_reason(task: pa.Table) -> None:
    failure = evidence_of(task).failures[0]
    turn = [
        *("No mark.", "None here either.", "{query} {{context}}", FAIR.upper().replace("{QUERY}", "{query}")),
        *(GOOD, "{query}  WELL at 0.95!", f"As in: {failure.query} {{query}}", "Another: {query}"),
    ]
    report = run(task, Fixed(turn), 2)
    assert [c.prompt for c in report.candidates] == [GOOD, "Another: {query}"]
    assert list(report.left_out.items())[:2] == [(NO_MARK, 2), ("it is known already", 2)]  # most frequent first
    assert report.left_out["it cannot be filled with a query alone"] == 1
    assert report.left_out["it copies a query or a response of the log"] == 1


def test_more_than_were_wanted_are_not_kept(task: pa.Table) -> None:
    report = run(task, Fixed([f"Way {i}: {{query}}" for i in range(5)]), 3)
    assert [c.prompt for c in report.candidates] == [f"Way {i}: {{query}}" for i in range(3)]
    assert report.left_out == {}


def test_asked_again_for_what_is_missing_with_what_there_is(task: pa.Table) -> None:
    proposer = Fixed(["One: {query}", "no"], ["Two: {query}", "one {query}"], [], ["Three: {query}", "Four: {query}"])
    report = run(task, proposer, 4, seed=5)
    assert [c.prompt for c in report.candidates] == ["One: {query}", "Two: {query}", "Three: {query}", "Four: {query}"]
    assert [already for _, already, _, _ in proposer.calls] == [
        [],
        ["One: {query}"],
        ["One: {query}", "Two: {query}"],
        ["One: {query}", "Two: {query}"],
    ]
    assert [n for _, _, n, _ in proposer.calls] == [4, 3, 2, 2]
    assert len({seed for _, _, _, seed in proposer.calls}) == 4  # else a model would say the same again
    assert {id(evidence) for evidence, _, _, _ in proposer.calls} == {id(proposer.calls[0][0])}
    assert report.left_out == {NO_MARK: 1, "it is known already": 1}
    other, same = Fixed(["One: {query}"]), Fixed(["One: {query}"])
    run(task, other, 1, seed=6)
    run(task, same, 1, seed=5)
    assert same.calls[0][3] == proposer.calls[0][3] != other.calls[0][3]


def test_asked_four_times_at_most(task: pa.Table) -> None:
    proposer = Fixed(*[["One: {query}"]] * 10)
    report = run(task, proposer, 2)
    assert len(proposer.calls) == 4
    assert len(report.candidates) == 1
    assert report.left_out == {"it is known already": 3}


def test_not_asked_again_without_need(task: pa.Table) -> None:
    proposer = Fixed(["One: {query}", "Two: {query}"], ["Three: {query}"])
    run(task, proposer, 2)
    assert len(proposer.calls) == 1


def test_nothing_usable_is_an_error_with_the_reasons(task: pa.Table) -> None:
    proposer = Fixed(["nothing", FAIR], ["nothing", FAIR], [], ["nothing"])
    with pytest.raises(EngineError, match=f"no prompt .* used: 3 times {NO_MARK}; 2 times it is known already"):
        run(task, proposer, 2)
    with pytest.raises(EngineError, match="no prompt that can be used: no <prompt> in any reply"):
        run(task, Fixed())


def test_a_prompt_of_the_log_is_not_proposed_even_if_it_is_not_shown() -> None:
    prompts = {f"p{i}": f"{{query}} Way {i} at 0.{i + 1}" for i in range(9)}
    log = make_task(60, prompts)
    hidden = set(prompts) - {p.prompt_id for p in evidence_of(log).prompts}
    report = run(log, Fixed([prompts[name] for name in sorted(hidden)] + [GOOD]))
    assert report.left_out == {"it is known already": 2}


def test_a_log_without_verdicts_is_refused(task: pa.Table) -> None:
    proposer = Fixed([GOOD])
    with pytest.raises(DataError, match="verdict"):
        run(with_column(task, "correct", [None] * len(task)), proposer)
    assert proposer.calls == []


def test_a_table_with_the_needed_columns_is_enough() -> None:
    """As for `PromptRewardModel.fit`, `split` and all else that takes a table of interactions."""
    try:
        report = run(make_log(60), Fixed([GOOD]))  # no responses, no answers: nothing to show of them
    except OirlError:
        return
    assert report.best_prompt.prompt_id == "c"


# Asking a language model ------------------------------------------------------------------------------------

EVIDENCE = Evidence((LoggedPrompt("fair", FAIR, 0.5, 90),), ())


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_is_asked_once_for_each_prompt(chat: bool) -> None:
    replies = "<prompt>A {query}</prompt>", "I have none.", "<prompt>B {query}</prompt> <prompt>C</prompt>"
    engine = Says(*replies, chat=chat)
    found = MetaPromptProposer(engine, temperature=0.8, max_tokens=77).propose(EVIDENCE, ["Z {query}"], 3, 11)
    assert found == ["A {query}", "B {query}", "C"]
    text = write_meta_prompt(EVIDENCE, ["Z {query}"])
    assert engine.asked == [[{"role": "user", "content": text}] if chat else text] * 3
    assert set(engine.sampling) == {Sampling(max_tokens=77, temperature=0.8, seed=11)}
    assert len(set(engine.seeds)) == 3
    again = Says("<prompt>A {query}</prompt>")
    MetaPromptProposer(again).propose(EVIDENCE, [], 2, 12)
    assert not set(again.seeds) & set(engine.seeds)


def test_a_model_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(EngineError, match="'toy-proposer' does not answer: no room"):
        MetaPromptProposer(Says(*failed("no room"))).propose(EVIDENCE, [], 3, 0)
    some = Says(*refused("too long"), "<prompt>A {query}</prompt>", *refused("too long"))
    assert MetaPromptProposer(some).propose(EVIDENCE, [], 3, 0) == ["A {query}"]


def test_a_broken_engine_ends_it(task: pa.Table) -> None:
    class Broken(Says):
        def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
            raise EngineError("no server at this address")
            yield

    with pytest.raises(EngineError, match="no server"):
        run(task, MetaPromptProposer(Broken("")), 2)


def test_a_model_that_says_the_same_for_ever_gives_one(task: pa.Table) -> None:
    engine = Says(f"Better:\n<prompt>\n{GOOD}\n</prompt>")
    report = run(task, MetaPromptProposer(engine), 3)
    assert [c.prompt for c in report.candidates] == [GOOD]
    assert report.left_out == {"it is known already": 2 + 2 + 2 + 2}
    assert len(engine.asked) == 3 + 2 + 2 + 2
    assert "proposed already" in str(engine.asked[3])
    assert "proposed already" not in str(engine.asked[2])


def test_the_small_model_cannot_read_so_much() -> None:
    with (
        open_engine("transformers", str(small_lm_path())) as engine,
        pytest.raises(EngineError, match=r"does not answer: .*tokens"),
    ):
        MetaPromptProposer(engine, max_tokens=8).propose(EVIDENCE, [], 2, 0)


# Only what may be learned from ------------------------------------------------------------------------------


def test_test_queries_are_neither_shown_nor_raced(out: Path) -> None:
    log = make_task(120)
    sides = [["train", "test", "dev", None][int(name[1:]) % 4] for name in log["query_id"].to_pylist()]
    log = with_column(log, "split", sides)
    train = {row["query"] for row in log.to_pylist() if row["split"] == "train"}
    shown: set[str] = set()
    for seed in range(8):
        proposer = Fixed([GOOD])
        run(log, proposer, seed=seed)
        shown |= {f.query for f in proposer.calls[0][0].failures}
        assert [p.n for p in proposer.calls[0][0].prompts] == [30, 30]
    assert len(shown) > 4
    assert shown <= train
    report = run(log, Fixed([GOOD]), out=out)
    raced = set(read_log(out)["query"].to_pylist())
    assert len(raced) > 20
    assert raced <= train
    assert report.best_prompt.n == 30


def test_a_prompt_that_is_good_on_test_rows_only_is_not_the_best() -> None:
    log = make_task(80)
    sides = ["test" if int(name[1:]) % 2 else "train" for name in log["query_id"].to_pylist()]
    verdicts = [
        right if side == "train" else name == "poor"
        for right, side, name in zip(log["correct"].to_pylist(), sides, log["prompt_id"].to_pylist(), strict=True)
    ]
    marked = with_column(with_column(log, "correct", verdicts), "split", sides)
    assert run(marked, Fixed([GOOD])).best_prompt.prompt_id == "fair"
    assert run(with_column(marked, "split", [None] * len(log)), Fixed([GOOD])).best_prompt.prompt_id == "poor"


def test_the_screen_reads_train_queries_only() -> None:
    class Watched:
        def predict_proba(self, queries: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
            self.queries = list(queries)
            return np.full((len(queries), len(prompts)), 0.5)

    log = make_task(20)
    sides = ["test" if int(name[1:]) % 2 else "train" for name in log["query_id"].to_pylist()]
    model = Watched()
    run(with_column(log, "split", sides), Fixed([GOOD]), model=model)
    train = [q for q, side in zip(log["query"].to_pylist(), sides, strict=True) if side == "train"]
    assert model.queries == list(dict.fromkeys(train))


# The screen -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> PromptRewardModel:
    prompts = {f"p{i}": f"{{query}} {word}, at {rate}" for i, (word, rate) in enumerate(WORDS)}
    return PromptRewardModel("logistic").fit(make_task(150, prompts, seed=3))


WORDS = [("carefully slowly", 0.9), ("carefully", 0.75), ("quickly", 0.25), ("quickly rashly", 0.1)]


def test_a_reward_model_orders_the_candidates(task: pa.Table, fitted: PromptRewardModel) -> None:
    texts = ["{query} rashly quickly at 0.1", "{query} slowly carefully at 0.9", "{query} in silence at 0.5"]
    report = run(task, Fixed(texts), 3, keep=2, model=fitted)
    queries = list(dict.fromkeys(task["query"].to_pylist()))
    means = dict(zip(texts, fitted.predict_proba(queries, texts).mean(axis=0), strict=True))
    assert {c.prompt: c.predicted for c in report.candidates} == pytest.approx(means)
    assert [c.prompt for c in report.candidates] == sorted(texts, key=lambda text: -means[text])
    assert report.candidates[0].prompt == texts[1]
    assert [c.raced for c in report.candidates] == [True, True, False]
    assert report.warnings == ["the reward model has seen none of the candidates: its estimates are extrapolations"]


def test_without_a_race_or_a_model_there_is_no_evidence(
    task: pa.Table, fitted: PromptRewardModel, out: Path, tmp_path: Path
) -> None:
    said = "no candidate was raced or estimated: there is no evidence for any of them"
    assert run(task, Fixed([GOOD])).warnings == [said]
    assert said not in run(task, Fixed([GOOD]), model=fitted).warnings
    assert said not in run(task, Fixed([GOOD]), out=out).warnings


def test_without_one_the_order_is_that_of_the_proposals(task: pa.Table, out: Path) -> None:
    report = run(task, Fixed([f"Way {i}: {{query}} at 0.50" for i in range(5)]), 5, keep=3, out=out)
    assert [c.prompt for c in report.candidates] == [f"Way {i}: {{query}} at 0.50" for i in range(5)]
    assert [c.raced for c in report.candidates] == [True, True, True, False, False]
    assert {c.predicted for c in report.candidates} == {None}
    assert report.race is not None
    assert {r.prompt_id for r in report.race.racers} == {c.prompt_id for c in report.candidates[:3]} | {"fair"}
    assert set(read_log(out)["prompt_id"].to_pylist()) == {r.prompt_id for r in report.race.racers}


def test_what_the_model_likes_goes_into_the_race(task: pa.Table, fitted: PromptRewardModel, out: Path) -> None:
    texts = ["{query} rashly quickly at 0.10", "{query} slowly carefully at 0.90"]
    report = run(task, Fixed(texts), 2, keep=1, model=fitted, out=out)
    assert report.race is not None
    assert {r.prompt for r in report.race.racers} == {texts[1], FAIR}
    assert report.race.winner == template_id(texts[1])


@pytest.mark.parametrize("keep", [0, -1])
def test_something_must_be_kept(task: pa.Table, keep: int) -> None:
    with pytest.raises(ConfigError, match=f"keep = {keep}"):
        run(task, Fixed([GOOD]), keep=keep)


# Queries ----------------------------------------------------------------------------------------------------


def near_duplicates(n: int = 40) -> tuple[list[str], np.ndarray]:
    """Return queries in threes: one, the same with another number, and the same with a word before it."""
    base = make_queries(n, 5)
    found = [text for q in base for text in (q, re.sub(r"\d+", "101", q), f"Quick, {q}")]
    return found, group_queries(found).labels


def by_query(log: pa.Table, name: str, keep: Callable[[int], bool]) -> pa.Table:
    """Return the log with a column emptied in the rows of some queries."""
    numbers = [int(query_id[1:]) for query_id in log["query_id"].to_pylist()]
    values = [v if keep(i) else None for v, i in zip(log[name].to_pylist(), numbers, strict=True)]
    return with_column(log, name, values)


def test_one_query_of_each_group_of_near_duplicates() -> None:
    texts, labels = near_duplicates()
    assert Counter(labels.tolist()) == dict.fromkeys(range(40), 3)
    log = make_task(queries=texts)
    found = unlike_queries(log, 0)
    assert sorted(labels[texts.index(q.query)] for q in found) == list(range(40))
    first = [[q.query_id for q in unlike_queries(log, seed)] for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    assert first[0] != sorted(first[0])
    # Any of a group may stand for it, and any may come first.
    assert len({q.query_id for seed in range(10) for q in unlike_queries(log, seed)}) > 80


def test_queries_carry_what_the_log_says_of_them() -> None:
    log = with_column(make_task(30), "dataset", ["sums"] * 60)
    by_text = {row["query"]: row for row in log.to_pylist()}
    for query in unlike_queries(log, 0):
        row = by_text[query.query]
        assert (query.query_id, query.answer, query.dataset) == (row["query_id"], row["answer"], "sums")


def test_queries_without_an_answer_are_not_raced() -> None:
    log = make_task(30)
    found = unlike_queries(by_query(log, "answer", lambda i: i % 3 != 0), 0)
    assert len(found) == 20
    assert all(q.answer and int(q.query_id[1:]) % 3 for q in found)
    assert unlike_queries(make_task(5, answers=False), 0) == []
    # One row with the answer is enough.
    once = [a if i % 2 else None for i, a in enumerate(log["answer"].to_pylist())]
    assert len(unlike_queries(with_column(log, "answer", once), 0)) == 30


def test_race_and_confirmation_are_unlike_each_other_too(out: Path) -> None:
    texts, labels = near_duplicates()
    report = run(make_task(queries=texts), Fixed([GOOD]), out=out, n_race=15, n_confirm=20)
    assert report.race is not None
    rows = read_log(out).to_pylist()
    asked = {row["query"] for row in rows}
    groups = [labels[texts.index(q)] for q in asked]
    assert len(groups) == len(set(groups)) == 15 + 20
    assert report.race.n_confirm == 20
    assert {r.prompt_id: r.n for r in report.race.racers} == {"fair": 15, template_id(GOOD): 15}


@pytest.mark.parametrize(
    ("n", "n_race", "n_confirm", "expected"),
    [
        (60, 20, 30, (20, 30)),  # there are enough
        (60, 100, 200, (20, 40)),  # shared in proportion
        (60, 40, 0, (40, None)),
        (60, 100, 0, (60, None)),
        (3, 100, 200, (1, 2)),
        (2, 100, 200, (1, 1)),
    ],
)
def test_how_queries_are_shared(
    out: Path, monkeypatch: pytest.MonkeyPatch, n: int, n_race: int, n_confirm: int, expected: tuple[int, int | None]
) -> None:
    given: list[tuple[int, int]] = []

    def watched(*arguments: Any, **settings: Any) -> RaceReport:
        given.append((len(arguments[3]), len(arguments[4])))
        assert not {q.query_id for q in arguments[3]} & {q.query_id for q in arguments[4]}
        return race(*arguments, **settings)

    monkeypatch.setattr(proposing, "race", watched)
    log = make_task(n, {"all": "{query} at 1.0"})  # it has not failed: so no query was shown to the proposer
    run(log, Fixed(["{query} Too at 1.0"]), out=out, n_race=n_race, n_confirm=n_confirm)
    assert given == [(expected[0], expected[1] or 0)]


def test_queries_that_the_proposer_was_shown_do_not_confirm(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told their answers, and the best logged prompt is known to fail on them: they speak for any candidate."""
    confirming: list[str] = []

    def watched(*arguments: Any, **settings: Any) -> RaceReport:
        confirming.extend(q.query for q in arguments[4])
        return RaceReport("log", [], "new", "fair")

    monkeypatch.setattr(proposing, "race", watched)
    texts, labels = near_duplicates()
    group = dict(zip(texts, labels.tolist(), strict=True))
    log = make_task(queries=texts)
    for seed in range(3):
        confirming.clear()
        proposer = Fixed([GOOD])
        run(log, proposer, out=out, seed=seed, n_race=10, n_confirm=40)
        shown = {group[f.query] for f in proposer.calls[0][0].failures}
        assert len(confirming) > 20
        assert not shown & {group[query] for query in confirming}


def test_the_prompt_to_beat_is_drawn_anew(tmp_path: Path) -> None:
    """It was chosen as the best by its logged runs: the same draws again would flatter it as much as that choice."""
    texts = make_queries(60)
    queries = [Query(f"q{i}", text, answer_of(text)) for i, text in enumerate(texts)]
    prompts = [(f"p{i}", f"{{query}} Way {i} at 0.50") for i in range(4)]
    sampling = Sampling(max_tokens=99)  # that of `oirl generate`, and the same seed, if nothing else is said
    collect(Coin(), queries, prompts, tmp_path / "log.parquet", sampling=sampling, grade="exact")
    log = read_log(tmp_path / "log.parquet")
    report = run(log, Fixed([GOOD]), out=tmp_path / "race.parquet", sampling=sampling)
    best = report.best_prompt.prompt_id
    before, after = (
        {row["query_id"]: row["correct"] for row in table.to_pylist() if row["prompt_id"] == best}
        for table in (log, read_log(tmp_path / "race.parquet"))
    )
    assert len(after) > 40
    assert np.mean([before[name] == right for name, right in after.items()]) < 0.8


@pytest.mark.parametrize("n", [0, 1])
def test_a_race_needs_queries_with_answers(out: Path, n: int) -> None:
    log = make_task(20)
    few = by_query(log, "answer", lambda i: i < n)
    with pytest.raises(DataError, match="queries with an `answer`"):
        run(few, Fixed([GOOD]), out=out)
    assert not out.exists()
    assert run(few, Fixed([GOOD])).race is None  # to propose, none are needed


def test_a_race_on_no_query_is_refused(task: pa.Table, out: Path) -> None:
    with pytest.raises((ConfigError, DataError)) as e:
        run(task, Fixed([GOOD]), out=out, n_race=0)
    assert "no such file" not in str(e.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": 0},
        {"grade": "no-such-checker"},
        {"budget": Budget(2.5, "money")},  # and no price
        {"answers": False},
    ],
    ids=["keep", "grade", "budget", "answers"],
)
def test_what_cannot_be_raced_is_said_before_the_proposer_is_paid(out: Path, wrong: dict[str, Any]) -> None:
    proposer = Fixed([GOOD])
    with pytest.raises(OirlError):
        run(make_task(40, answers=wrong.pop("answers", True)), proposer, out=out, **wrong)
    assert proposer.calls == []


def test_a_prompt_to_beat_that_cannot_be_raced_is_said_before_the_proposer_is_paid(out: Path) -> None:
    proposer = Fixed([GOOD])
    log = make_task(40, {"two": "{{question}} {{context}} at 0.90", "poor": POOR})
    with pytest.raises(ConfigError, match="cannot be filled with a query alone"):
        run(log, proposer, out=out)
    assert proposer.calls == []


def test_the_log_of_another_race_is_said_before_the_proposer_is_paid(task: pa.Table, out: Path) -> None:
    run(task, Fixed([GOOD]), out=out)
    proposer = Fixed([GOOD])
    with pytest.raises(ConfigError, match="other settings"):
        run(task, proposer, out=out, sampling=Sampling(temperature=0.5))
    assert proposer.calls == []


# What may be claimed ----------------------------------------------------------------------------------------


def test_a_better_prompt_is_confirmed_without_a_warning(task: pa.Table, out: Path) -> None:
    report = run(task, Fixed([GOOD, POOR.replace("Poorly", "Badly")]), 2, out=out)
    made = report.race
    assert made is not None
    assert (made.winner, made.incumbent, made.stopped) == (template_id(GOOD), "fair", None)
    assert made.gain is not None
    assert made.ci_low is not None
    assert 0 < made.ci_low < 0.45 == pytest.approx(made.gain, abs=0.25)
    assert report.warnings == []
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["race"]["gain"] == made.gain


def test_no_candidate_did_better(task: pa.Table, out: Path) -> None:
    report = run(task, Fixed(["{query} Bad at 0.05"]), out=out)
    assert report.race is not None
    assert (report.race.winner, report.race.gain) == ("fair", None)
    assert report.warnings == ["no candidate did better than the best logged prompt in the race"]


def test_a_candidate_that_is_as_good_did_not_do_better(out: Path) -> None:
    report = run(make_task(40, {"all": "{query} at 1.0"}), Fixed(["{query} Also at 1.0"]), out=out)
    assert report.warnings == ["no candidate did better than the best logged prompt in the race"]


def test_no_other_queries_to_confirm_on(task: pa.Table, out: Path) -> None:
    report = run(task, Fixed([GOOD]), out=out, n_confirm=0)
    assert report.race is not None
    assert (report.race.winner, report.race.gain) == (template_id(GOOD), None)
    assert report.warnings == ["the winner was not confirmed: there were no other queries to compare it on"]


def test_a_checker_that_reads_no_answer_shows_nothing(task: pa.Table, out: Path) -> None:
    """`numeric`, the default of the command, on answers that are words: there is not a single verdict."""
    report = run(task, Fixed([GOOD]), out=out, grade="numeric")
    assert report.race is not None
    assert {r.n for r in report.race.racers} == {0}
    assert report.race.winner == "fair"
    assert any("verdict" in warning for warning in report.warnings)


def test_a_gain_that_may_be_luck_is_not_shown(tmp_path: Path, task: pa.Table) -> None:
    for seed in range(30):
        out, sampling = tmp_path / f"{seed}.parquet", Sampling(seed=seed)
        report = run(task, Fixed(["{query} Same at 0.52"]), out=out, sampling=sampling)
        made = report.race
        assert made is not None
        if made.ci_low is not None and made.ci_low <= 0 < (made.gain or 0):
            break
    said = "the winner is not shown to be better than the best logged prompt: the interval holds 0"
    assert report.warnings == [said]


@pytest.fixture
def warnings_of(task: pa.Table, monkeypatch: pytest.MonkeyPatch, out: Path) -> Callable[..., list[str]]:
    """Return a function that gives what is said of a race that came out in some way."""

    def said(**fields: Any) -> list[str]:
        monkeypatch.setattr(proposing, "race", lambda *_, **__: RaceReport("log", [], "new", "fair", **fields))
        return run(task, Fixed([GOOD]), out=out).warnings

    return said


def test_a_loss_is_not_called_an_interval_that_holds_0(warnings_of: Callable[..., list[str]]) -> None:
    (said,) = warnings_of(n_confirm=100, gain=-0.3, ci_low=-0.4, ci_high=-0.2)
    assert "holds 0" not in said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_confirm": 100, "gain": 0.3, "ci_low": 0.1, "ci_high": 0.5}, []),
        ({"n_confirm": 100, "gain": 0.1, "ci_low": -0.1, "ci_high": 0.3}, ["is not shown to be better"]),
        ({"n_confirm": 100, "gain": 0.1, "ci_low": 0.0, "ci_high": 0.3}, ["is not shown to be better"]),
        ({}, ["was not confirmed"]),
        ({"stopped": "the budget is spent"}, ["the race is not finished, as the budget is spent"]),
    ],
)
def test_what_is_said_of_a_race(warnings_of: Callable[..., list[str]], fields: dict[str, Any], said: list[str]) -> None:
    found = warnings_of(**fields)
    assert len(found) == len(said)
    assert all(part in warning for part, warning in zip(said, found, strict=True))


def test_a_race_stopped_by_its_budget_says_so(task: pa.Table, out: Path) -> None:
    settings: dict[str, Any] = {"budget": Budget(500, "tokens"), "sampling": Sampling(max_tokens=1)}
    report = run(task, Fixed([GOOD]), out=out, **settings)
    assert report.race is not None
    assert (report.race.stopped, report.race.gain) == ("the budget is spent", None)
    assert report.warnings == ["the race is not finished, as the budget is spent"]


def test_stopped_while_confirming_what_is_not_shown_is_still_said(task: pa.Table, out: Path) -> None:
    """The race, and a few of the queries that confirm: the interval holds 0."""
    settings: dict[str, Any] = {"budget": Budget(40 * 22 + 180, "tokens"), "sampling": Sampling(max_tokens=1)}
    report = run(task, Fixed(["{query} Rather at 0.70"]), out=out, **settings)
    made = report.race
    assert made is not None
    assert made.stopped
    assert 0 < made.n_confirm < 10
    assert made.ci_low is not None
    assert made.ci_low <= 0
    assert any("not finished" in warning for warning in report.warnings)
    assert any("not shown to be better" in warning for warning in report.warnings)


def test_what_the_race_has_to_say_is_said(task: pa.Table, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def talkative(*arguments: Any, **settings: Any) -> RaceReport:
        made = race(*arguments, **settings)
        made.warnings.append("half of the responses were cut off")
        return made

    monkeypatch.setattr(proposing, "race", talkative)
    report = run(task, Fixed([GOOD]), out=out)
    made = report.race
    assert made is not None
    assert "half of the responses were cut off" in [*report.warnings, *made.warnings]


# Again ------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_reports(task: pa.Table, tmp_path: Path) -> None:
    def once(name: str, seed: int) -> tuple[ProposeReport, list[str]]:
        out = tmp_path / name
        report = run(task, Fixed([GOOD, "{query} So at 0.60"]), 2, out=out, seed=seed, sampling=Sampling(seed=seed))
        assert report.race is not None
        report.race.log = ""
        return report, read_log(out)["query"].to_pylist()

    assert once("a", 1) == once("b", 1)
    assert once("a", 1)[1] != once("c", 2)[1]


def test_killed_in_the_race_the_same_call_goes_on(task: pa.Table, tmp_path: Path) -> None:
    proposals = [GOOD, "{query} So at 0.60"]
    whole = run(task, Fixed(proposals), 2, out=tmp_path / "whole.parquet")
    out, first, second = tmp_path / "cut.parquet", Coin(dies_after=90), Coin()
    with pytest.raises(EngineError, match="gone"):
        run(task, Fixed(proposals), 2, out=out, engine=first)
    report = run(task, Fixed(proposals), 2, out=out, engine=second)
    assert report.race is not None
    assert whole.race is not None
    assert replace(report.race, log="") == replace(whole.race, log="")
    assert len(first.asked) + len(second.asked) == len(read_log(out))


# The file ---------------------------------------------------------------------------------------------------


def read_file(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def report(task: pa.Table, out: Path) -> ProposeReport:
    return run(task, Fixed(["{query} Bad at 0.05", GOOD, "{query} Never raced at 0.50"]), 3, keep=2, out=out)


def test_the_winner_stands_first_with_its_evidence(report: ProposeReport, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompt_file(report, path)
    assert report.out == str(path)
    first, *others = read_file(path)
    made = report.race
    assert made is not None
    assert (first["prompt_id"], first["prompt"], first["source"]) == (template_id(GOOD), GOOD, "proposed")
    confirmed = {"gain": made.gain, "ci_low": made.ci_low, "ci_high": made.ci_high, "over": "fair", "n": made.n_confirm}
    assert first["confirmed"] == confirmed
    (racer,) = [r for r in made.racers if r.prompt_id == template_id(GOOD)]
    assert first["race"] == {
        **{"n": racer.n, "success": racer.success, "ci_low": racer.ci_low, "ci_high": racer.ci_high},
        "left_after": None,
    }
    assert [row["prompt"] for row in others] == ["{query} Bad at 0.05", "{query} Never raced at 0.50", FAIR]
    assert [row["source"] for row in others] == ["proposed", "proposed", "logged"]
    assert [set(row) - {"prompt_id", "prompt", "source"} for row in others] == [{"race"}, set(), {"race", "logged"}]
    assert others[2]["logged"] == {"n": 90, "success": report.best_prompt.success}
    assert others[0]["race"]["left_after"] in (20, 40)


def test_the_best_logged_prompt_stands_first_if_it_won(task: pa.Table, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompt_file(run(task, Fixed(["{query} Bad at 0.05"]), out=out), path)
    rows = read_file(path)
    assert [row["prompt_id"] for row in rows] == ["fair", template_id("{query} Bad at 0.05")]
    assert not any("confirmed" in row for row in rows)


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"gain": 0.3, "ci_low": 0.1, "ci_high": 0.5}, "new"),
        ({"gain": 0.3, "ci_low": 0.0, "ci_high": 0.6}, "fair"),
        ({"gain": -0.3, "ci_low": -0.5, "ci_high": -0.1}, "fair"),
        ({}, "fair"),
        ({"gain": 0.3, "ci_low": 0.1, "ci_high": 0.5, "stopped": "the budget is spent"}, "fair"),
        ({"stopped": "the budget is spent"}, "fair"),
    ],
)
def test_the_first_of_the_file_is_one_that_may_be_used(tmp_path: Path, fields: dict[str, Any], first: str) -> None:
    """Whoever takes the first prompt of the file takes the winner only where it is shown to be better."""
    candidates = [Candidate("other", "Other. {query}"), Candidate("new", GOOD)]
    made = RaceReport("log", [], "new", "fair", n_confirm=40 if fields else 0, **fields)
    report = ProposeReport(None, LoggedPrompt("fair", FAIR, 0.5, 90), candidates, {}, made)
    write_prompt_file(report, tmp_path / "prompts.jsonl")
    names = [name for name, _ in read_templates(tmp_path / "prompts.jsonl")]
    assert names == [first, *(name for name in ("other", "new", "fair") if name != first)]


def test_without_a_race_the_order_is_kept(task: pa.Table, fitted: PromptRewardModel, tmp_path: Path) -> None:
    path = tmp_path / "new" / "prompts.jsonl"
    texts = ["{query} rashly quickly at 0.1", "{query} slowly carefully at 0.9"]
    write_prompt_file(run(task, Fixed(texts), 2, model=fitted), path)
    rows = read_file(path)
    assert [row["prompt"] for row in rows] == [texts[1], texts[0], FAIR]
    assert [row.get("extrapolation") for row in rows] == [True, True, None]
    assert rows[0]["predicted"] > rows[1]["predicted"]
    assert "predicted" not in rows[2]
    write_prompt_file(run(task, Fixed(texts), 2), path)
    assert [row["prompt"] for row in read_file(path)] == [*texts, FAIR]
    assert not any("predicted" in row or "extrapolation" in row for row in read_file(path))


def test_it_is_a_prompt_file(report: ProposeReport, tmp_path: Path, fitted: PromptRewardModel) -> None:
    path = tmp_path / "prompts.jsonl"
    report.candidates[0].prompt = 'Zwei\nZeilen — "{query}" \u2028 🙂'
    write_prompt_file(report, path)
    templates = read_templates(path)
    expected = {c.prompt_id: c.prompt for c in report.candidates} | {"fair": FAIR}
    assert dict(templates) == expected
    assert templates[0] == (template_id(GOOD), GOOD)
    assert "Zwei\\nZeilen — " in path.read_text(encoding="utf-8")  # for people too
    selector = PromptSelector(PromptRewardModel("logistic")).fit(make_task(60, dict(LOGGED, good=GOOD)))
    (choice,) = selector.select(["What?"], read_prompt_file(path, selector.model_))
    assert choice.prompt in expected.values()


def test_it_is_written_whole_or_not_at_all(
    report: ProposeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "files" / "prompts.jsonl"
    path.parent.mkdir()
    path.write_text("what was there\n")
    real, calls = json.dumps, iter(range(99))

    def breaks(*arguments: Any, **settings: Any) -> str:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(proposing.json, "dumps", breaks)
        with pytest.raises(KeyboardInterrupt):
            write_prompt_file(report, path)
    assert path.read_text() == "what was there\n"
    assert os.listdir(path.parent) == ["prompts.jsonl"]
    assert report.out is None
    write_prompt_file(report, path)
    assert len(read_file(path)) == 4


def test_half_of_a_surrogate_pair_does_not_lose_the_others(task: pa.Table, tmp_path: Path) -> None:
    """A server's JSON may hold one. Written or left out: it must not be found when all else is done."""
    report = run(task, Fixed([GOOD, "{query} Well done \ud83d"], ["{query} More at 0.5"]), 2)
    write_prompt_file(report, tmp_path / "prompts.jsonl")
    assert GOOD in [text for _, text in read_templates(tmp_path / "prompts.jsonl")]


# The small language model -----------------------------------------------------------------------------------


def test_the_small_model_is_given_a_better_prompt(tmp_path: Path) -> None:
    """`Answer only.` makes it guess; `Work step by step.` is what it was taught to do well with."""
    problems = generate_problems(60, random.Random(8), held_out=True, distinct_masked=True)
    rows = [
        {
            **{"query_id": f"p{i}", "query": p.query, "prompt_id": name, "prompt": DEMO_PROMPTS[name], "replicate": 0},
            **{"response": "It is 0.", "correct": i % 10 < share, "answer": str(p.answer)},
        }
        for i, p in enumerate(problems)
        for name, share in (("answer", 4), ("plain", 3))
    ]
    log = pa.Table.from_pylist(rows, schema=INTERACTION_SCHEMA)
    sampling = Sampling(max_tokens=60, temperature=0.7)
    with open_engine("transformers", str(small_lm_path()), {"batch_size": 32}) as engine:
        report = run(
            log,
            MetaPromptProposer(Says("<prompt>{query} Work step by step.</prompt>")),
            **{"engine": engine, "grade": "numeric", "n_race": 20, "n_confirm": 40, "sampling": sampling},
            out=tmp_path / "race.parquet",
        )
    made = report.race
    assert made is not None
    assert made.winner == template_id(DEMO_PROMPTS["steps"])
    assert 30 < made.n_confirm <= 40  # what the proposer was shown confirms nothing
    assert made.gain is not None
    assert made.gain > 0.1
    assert report.warnings == []
