"""A race: who leaves by figures worked out by hand, what luck does to it, and what may be claimed of the winner."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from oirl.engines.base import Completion, Engine, EngineError, Request, Sampling, derive_seed, failed, refused
from oirl.engines.spending import Budget
from oirl.errors import ConfigError
from oirl.language_models import Rendered
from oirl.logs.store import read_log
from oirl.records import Query
from oirl.selection import racing
from oirl.selection.racing import RISK, ROUND, RaceReport, losers, race
from oirl.statistics.intervals import paired_interval, success_interval

NAN = np.nan


class Coin(Engine):
    """Right with a probability that stands in the rendered text: `at 0.8`. All of a reply follows from the seed.

    Args:
        fails: Text in a query -> what becomes of its requests.
        dies_after: Replies after which the engine cannot go on.
        finish_reason: Of every reply.
    """

    name = "coin"
    model = "toy"
    chat = False

    def __init__(
        self,
        fails: dict[str, list[Completion]] | None = None,
        dies_after: int | None = None,
        finish_reason: str = "stop",
    ) -> None:
        self._fails, self._dies_after, self._finish_reason = fails or {}, dies_after, finish_reason
        self.asked: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "model": self.model, "chat": self.chat}

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for position, request in enumerate(requests):
            if len(self.asked) == self._dies_after:
                raise EngineError("the server is gone")
            text = text_of(request.rendered)
            self.asked.append(text)
            yield position, [self._reply(text, request.seed)]

    def _reply(self, text: str, seed: int) -> Completion:
        for mark, (completion,) in self._fails.items():
            if mark in text:
                return completion
        right = seed / 2**31 < float(re.findall(r"at (\d\.\d+)", text)[0])
        said = re.findall(r"item (\w+)", text)[0] if right else "nothing"
        return Completion(said, self._finish_reason, tokens_in=10, tokens_out=1, latency_s=0.5)


def text_of(rendered: Rendered) -> str:
    return rendered if isinstance(rendered, str) else "\n".join(turn["content"] for turn in rendered)


def items(n: int, start: int = 0) -> list[Query]:
    return [Query(f"q{i}", f"Name item {i}!", str(i)) for i in range(start, start + n)]


def prompts_at(*rates: float) -> list[tuple[str, str]]:
    """Return prompts p0, p1, … of known success; p0 is the one to beat."""
    return [(f"p{i}", f"{{query}} Way {i} at {rate:.3f}") for i, rate in enumerate(rates)]


def run(out: Path, prompts: list[tuple[str, str]], n: int = 60, n_confirm: int = 40, **settings: Any) -> RaceReport:
    known: dict[str, Any] = {"grade": "exact", "engine": Coin(), "queries": items(n), "confirm": items(n_confirm, 1000)}
    known |= settings
    given = [known.pop(name) for name in ("engine", "queries", "confirm")]
    return race(given[0], prompts, "p0", given[1], given[2], out, **known)


def verdicts(out: Path, prompt_id: str, queries: Sequence[Query]) -> list[bool | None]:
    rows = read_log(out).to_pylist()
    found = {row["query_id"]: row["correct"] for row in rows if row["prompt_id"] == prompt_id}
    return [found[q.query_id] for q in queries if q.query_id in found]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "race.parquet"


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


# Who leaves -------------------------------------------------------------------------------------------------


def pair(wins: int, losses: int, both: int = 0, neither: int = 0) -> np.ndarray:
    """Return verdicts of two prompts with so many queries of each kind."""
    return np.array([[1, 0]] * wins + [[0, 1]] * losses + [[1, 1]] * both + [[0, 0]] * neither, dtype=float)


@pytest.mark.parametrize(
    ("wins", "losses", "comparisons", "out_"),
    [
        (4, 0, 1, False),  # 1/16 = .0625
        (5, 0, 1, True),  # 1/32 = .0313
        (6, 1, 1, False),  # (1 + 7) / 128 = .0625
        (7, 1, 1, True),  # (1 + 8) / 256 = .0352
        (8, 2, 1, False),  # (1 + 10 + 45) / 1024 = .0547
        (9, 2, 1, True),  # (1 + 11 + 55) / 2048 = .0327
        (5, 0, 2, False),  # .0313 against .025
        (6, 0, 2, True),  # 1/64 = .0156
        (6, 0, 3, True),  # .0156 against .0167
        (6, 0, 4, False),  # .0156 against .0125
        (7, 0, 5, True),  # .0078 against .01
        (7, 0, 7, False),  # .0078 against .0071
        (5, 0, 0, True),  # nothing to compare with counts as one comparison
    ],
)
def test_p_values_by_hand(wins: int, losses: int, comparisons: int, out_: bool) -> None:
    assert RISK == 0.05
    assert losers(pair(wins, losses), comparisons).tolist() == [False, out_]
    assert losers(pair(losses, wins), comparisons).tolist() == [out_, False]
    # Queries on which they agree say nothing.
    assert losers(pair(wins, losses, both=30, neither=50), comparisons).tolist() == [False, out_]


def test_what_is_not_known_is_left_out_of_each_pair() -> None:
    base = pair(5, 0)
    unknown = np.array([[NAN, 1], [NAN, 0], [1, NAN], [0, NAN], [NAN, NAN]] * 20)
    assert losers(np.concatenate([base, unknown]), 1).tolist() == [False, True]
    assert losers(unknown, 1).tolist() == [False, False]
    assert losers(np.where([True, False], NAN, base), 1).tolist() == [False, False]
    # p2 has no verdict where p0 is better than p1, and is beaten by p0 elsewhere.
    three = np.array([[1, 0, NAN]] * 5 + [[1, NAN, 0]] * 5 + [[0, 0, 0]])
    assert losers(three, 1).tolist() == [False, True, True]


def test_one_rival_that_is_better_is_enough() -> None:
    columns = np.array([[1, 0, 1]] * 5 + [[0, 0, 1]] * 4, dtype=float)
    assert losers(columns, 1).tolist() == [False, True, False]  # p0 loses to p2 by 4 only
    assert losers(columns, 1000).tolist() == [False] * 3


def test_prompts_may_beat_each_other_in_a_circle() -> None:
    assert losers(np.array([[1, 0, 0]] * 5 + [[0, 1, 0]] * 5, dtype=float), 1).tolist() == [False, False, True]
    circle = np.array([[1, 0, NAN]] * 5 + [[NAN, 1, 0]] * 5 + [[0, NAN, 1]] * 5)
    assert losers(circle, 1).all()


@pytest.mark.parametrize("n_prompts", [1, 2, 5])
def test_equal_prompts_stay(n_prompts: int) -> None:
    column = (np.arange(100) % 3 == 0).astype(float)
    assert not losers(np.tile(column[:, None], (1, n_prompts)), 1).any()
    assert losers(np.empty((0, n_prompts)), 1).tolist() == [False] * n_prompts


def test_nobody_leaves_after_four_queries() -> None:
    for cells in product([0.0, 1.0, NAN], repeat=8):
        assert not losers(np.array(cells).reshape(4, 2), 1).any()
    assert not losers(pair(7, 0), 5 * 2).any()  # six prompts, two rounds: 1/128 against .005
    assert losers(pair(8, 0), 5 * 2).any()


TABLES = st.integers(1, 4).flatmap(
    lambda p: st.lists(st.lists(st.sampled_from([0.0, 1.0, 1.0, NAN]), min_size=p, max_size=p), min_size=1, max_size=25)
)


@settings(deadline=None)
@given(TABLES, st.integers(1, 30))
def test_it_is_the_exact_test_of_each_pair(table: list[list[float]], comparisons: int) -> None:
    found = np.array(table)
    expected = []
    for loser in found.T:
        chances = [1.0]
        for rival in found.T:
            wins, losses = int(((rival == 1) & (loser == 0)).sum()), int(((rival == 0) & (loser == 1)).sum())
            if wins + losses:
                chances.append(binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue)
        expected.append(min(chances) <= 0.05 / comparisons)
    assert losers(found, comparisons).tolist() == expected


@given(TABLES, st.integers(1, 30), st.randoms(use_true_random=False))
def test_the_order_of_prompts_and_queries_is_nothing(table: list[list[float]], comparisons: int, random: Any) -> None:
    found = np.array(table)
    columns, rows = list(range(found.shape[1])), list(range(len(found)))
    random.shuffle(columns)
    random.shuffle(rows)
    lost = losers(found, comparisons)
    assert losers(found[rows][:, columns], comparisons).tolist() == lost[columns].tolist()
    assert not (losers(found, comparisons + 5) & ~lost).any()  # more comparisons ask for more


# The risk ---------------------------------------------------------------------------------------------------


def leaving(truth: np.ndarray, rounds: int, comparisons: int) -> np.ndarray:
    """Return after how many rounds each prompt leaves, int (P,), `rounds` + 1 for those that stay."""
    after = np.full(truth.shape[1], rounds + 1)
    for i in range(1, rounds + 1):
        left = np.flatnonzero(after > rounds)
        lost = losers(truth[: i * ROUND][:, left], comparisons)
        after[left[lost]] = i
    return after


def simulate(
    chances: Sequence[float], races: int, rounds: int = 5, comparisons: int | None = None, alike: float = 0.0
) -> np.ndarray:
    """Return after how many rounds each prompt left in many races, int (races, P).

    Args:
        chances: Success of each prompt.
        races: How many.
        rounds: Of each.
        comparisons: Those that count; by default as `race` counts them.
        alike: Share of the queries on which all prompts do the same.
    """
    rng = np.random.default_rng(7)
    comparisons = (len(chances) - 1) * rounds if comparisons is None else comparisons
    shape = (rounds * ROUND, len(chances))
    found = []
    for _ in range(races):
        draws = np.where(rng.random((shape[0], 1)) < alike, rng.random((shape[0], 1)), rng.random(shape))
        found.append(leaving((draws < np.array(chances)).astype(float), rounds, comparisons))
    return np.array(found)


@pytest.mark.parametrize(("chance", "alike"), [(0.5, 0.0), (0.85, 0.0), (0.5, 0.6)])
def test_the_best_prompt_hardly_ever_leaves_even_if_it_is_no_better(chance: float, alike: float) -> None:
    """Equal prompts are the worst case: each of them is the best, and no luck of another may put it out."""
    share = (simulate([chance] * 5, 1000, alike=alike) <= 5).mean(axis=0)
    assert share.max() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    assert share.mean() <= 0.05


def test_without_the_correction_it_would_leave_too_often() -> None:
    assert (simulate([0.5] * 5, 200, comparisons=1) <= 5).mean() > 0.15


def test_worse_prompts_leave_early_and_the_better_one_stays() -> None:
    after = simulate([0.85, 0.4, 0.5, 0.8], 200)
    assert (after[:, 0] == 6).mean() >= 0.95
    assert (after[:, 1] <= 2).mean() > 0.9
    assert (after[:, 2] <= 3).mean() > 0.8
    assert (after[:, 3] == 6).mean() > 0.8  # so little worse that it cannot be told


# The race ---------------------------------------------------------------------------------------------------


def test_the_better_prompt_wins_and_the_worse_ones_leave(out: Path) -> None:
    engine = Coin()
    report = run(out, prompts_at(0.5, 0.9, 0.1, 0.2), n=100, engine=engine)
    assert (report.winner, report.incumbent, report.stopped) == ("p1", "p0", None)
    left = {r.prompt_id: r.left_after for r in report.racers}
    assert left["p0"] is None
    assert left["p1"] is None
    assert left["p2"] in (20, 40)
    assert left["p3"] in (20, 40)
    asked = Counter(re.findall(r"Way \d", " ".join(engine.asked)))
    assert asked == {"Way 0": 140, "Way 1": 140, "Way 2": left["p2"], "Way 3": left["p3"]}
    assert report.log == str(out)
    assert len(read_log(out)) == len(engine.asked)


def test_figures_are_those_of_the_log(out: Path) -> None:
    report = run(out, prompts_at(0.5, 0.8, 0.3))
    for racer in report.racers:
        right = np.array(verdicts(out, racer.prompt_id, items(60)), dtype=float)
        assert racer.n == len(right) == (racer.left_after or 60)
        assert (racer.success, racer.ci_low, racer.ci_high) == success_interval(right)
    assert report.winner == "p1"
    won, lost = (np.array(verdicts(out, name, items(40, 1000))) for name in ("p1", "p0"))
    expected = paired_interval(int((won & ~lost).sum()), int((lost & ~won).sum()), 40)
    assert (report.gain, report.ci_low, report.ci_high) == expected
    assert report.n_confirm == 40
    assert report.gain == pytest.approx(won.mean() - lost.mean())
    assert report.to_dict()["racers"][0]["prompt_id"] == "p1"


def test_confirmed_on_queries_that_the_race_has_not_seen(out: Path) -> None:
    """All verdicts of the race are turned round on the queries that confirm: so is the gain."""

    class Turned(Coin):
        def _reply(self, text: str, seed: int) -> Completion:
            number = re.findall(r"item (\d+)", text)[0]
            right = ("Way 1" in text) == (int(number) < 1000)
            return Completion(number if right else "nothing", "stop", tokens_in=1, tokens_out=1)

    report = run(out, prompts_at(0, 0), engine=Turned())
    assert report.winner == "p1"
    assert [r.success for r in report.racers] == [1.0, 0.0]
    assert (report.gain, report.n_confirm) == (-1.0, 40)
    assert report.ci_high is not None
    assert report.ci_high < 0


def test_only_the_finalists_are_confirmed(out: Path) -> None:
    run(out, prompts_at(0.5, 0.9, 0.85, 0.2))
    rows = read_log(out).to_pylist()
    assert {row["prompt_id"] for row in rows if int(row["answer"]) >= 1000} == {"p0", "p1"}
    assert Counter(row["prompt_id"] for row in rows if int(row["answer"]) >= 1000) == {"p0": 40, "p1": 40}


def test_stayed_first_then_by_when_they_left_then_by_success(out: Path) -> None:
    report = run(out, prompts_at(0.1, 0.95, 0.85, 0.0, 0.4, 0.5), n=100)
    keys = [(r.left_after is not None, -(r.left_after or 0), -(r.success or 0)) for r in report.racers]
    assert keys == sorted(keys)
    assert keys[0][0] is False
    assert keys[-1][0] is True
    assert report.winner == report.racers[0].prompt_id


def test_the_one_to_beat_never_leaves(out: Path) -> None:
    report = run(out, prompts_at(0.02, 0.95, 0.9, 0.9), n=80)
    (beaten,) = [r for r in report.racers if r.prompt_id == "p0"]
    assert (beaten.left_after, beaten.n) == (None, 80)
    assert report.winner != "p0"
    assert report.gain is not None
    assert report.gain > 0.7


def test_it_ends_when_only_the_one_to_beat_is_left(out: Path) -> None:
    engine = Coin()
    report = run(out, prompts_at(1.0, 0.0, 0.0), n=400, engine=engine)
    assert len(engine.asked) == 3 * ROUND  # and nothing is confirmed
    assert (report.winner, report.gain, report.ci_low, report.ci_high, report.n_confirm) == ("p0", None, None, None, 0)
    assert [(r.prompt_id, r.n, r.left_after) for r in report.racers[:1]] == [("p0", 20, None)]
    assert {r.left_after for r in report.racers[1:]} == {20}
    assert report.stopped is None


def test_the_one_to_beat_may_win_at_the_end(out: Path) -> None:
    engine = Coin()
    report = run(out, prompts_at(0.62, 0.55), n=40, engine=engine, sampling=Sampling(seed=4))
    assert report.winner == "p0"
    assert report.racers[1].left_after is None
    assert len(engine.asked) == 2 * 40
    assert report.gain is None


def test_alone_it_runs_one_round(out: Path) -> None:
    engine = Coin()
    report = run(out, prompts_at(0.5), n=100, engine=engine)
    assert (report.winner, len(engine.asked), report.gain) == ("p0", ROUND, None)


@pytest.mark.parametrize(("n", "after"), [(7, 7), (20, 20), (45, 20)])
def test_the_last_round_may_be_short(out: Path, n: int, after: int) -> None:
    report = run(out, prompts_at(1.0, 0.0), n=n)
    assert report.racers[1].left_after == after
    assert report.racers[1].n == after


def test_comparisons_are_those_of_all_rounds(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], int]] = []

    def watched(table: np.ndarray, comparisons: int) -> np.ndarray:
        seen.append((table.shape, comparisons))
        return losers(table, comparisons)

    monkeypatch.setattr(racing, "losers", watched)
    run(out, prompts_at(0.5, 0.5, 0.5, 0.0), n=45)
    assert [comparisons for _, comparisons in seen] == [3 * 3] * 3
    assert seen[0][0] == (20, 4)
    assert seen[-1][0] == (45, 3)


def test_a_race_needs_a_query(out: Path) -> None:
    with pytest.raises(ConfigError, match="at least one query"):
        run(out, prompts_at(0.5, 0.9), queries=[])
    assert not out.exists()


def test_nothing_to_confirm_on(out: Path) -> None:
    report = run(out, prompts_at(0.2, 0.9), confirm=[])
    assert report.winner == "p1"
    assert (report.gain, report.ci_low, report.ci_high, report.n_confirm, report.stopped) == (None, None, None, 0, None)


@pytest.mark.parametrize("last", [True, False])
def test_a_tie_is_no_win(out: Path, last: bool) -> None:
    """A prompt that is not better than the one to beat has not won, wherever they stand."""
    first, *others = prompts_at(1.0, 1.0, 0.0)
    report = run(out, [*others, first] if last else [first, *others])
    assert report.racers[0].success == report.racers[1].success == 1.0
    assert report.winner == "p0"


@pytest.mark.parametrize("last", [True, False])
def test_without_a_verdict_nobody_wins(out: Path, last: bool) -> None:
    """The checker cannot read the gold answers, as `numeric` letters: so nothing speaks for a candidate."""
    queries, confirm = ([Query(q.query_id, q.query, "B") for q in items(30, start)] for start in (0, 1000))
    first, *others = prompts_at(0.2, 0.9)
    prompts = [*others, first] if last else [first, *others]
    report = run(out, prompts, queries=queries, confirm=confirm, grade="numeric")
    assert [(r.n, r.success, r.ci_low, r.left_after) for r in report.racers] == [(0, None, None, None)] * 2
    assert (report.gain, report.n_confirm) == (None, 0)
    assert report.winner == "p0"


def test_queries_without_answers_count_for_nobody(out: Path) -> None:
    silent = [Query(q.query_id, q.query, None if i % 2 else q.answer) for i, q in enumerate(items(60))]
    report = run(out, prompts_at(0.1, 0.9), queries=silent, confirm=[*items(10, 1000), Query("x", "Name item 5!")])
    assert [r.n for r in report.racers] == [30, 30]
    assert report.n_confirm == 10
    right = np.array(verdicts(out, "p1", items(60)[::2]), dtype=float)
    assert report.racers[0].success == right.mean()


@pytest.mark.parametrize("broken", [failed("no room"), refused("too long")])
def test_requests_that_fail_count_as_wrong(out: Path, broken: list[Completion]) -> None:
    engine = Coin({"item 3! Way 1": broken, "item 1003! Way 0": broken})
    report = run(out, prompts_at(0.1, 0.9), engine=engine)
    assert {r.prompt_id: r.n for r in report.racers} == {"p0": 60, "p1": 60}
    assert report.n_confirm == 40
    assert report.winner == "p1"
    assert not any(verdicts(out, "p1", items(1, 3)))


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (Coin({"item 3! Way 1": failed("no room")}), "failed"),
        (Coin(finish_reason="length"), "cut off"),
    ],
)
def test_what_collecting_has_to_say_is_passed_on(out: Path, engine: Engine, said: str) -> None:
    """Responses that were cut off at the limit of tokens, or never came, are worth a word: `collect` gives it."""
    report = run(out, prompts_at(0.1, 0.9), engine=engine)
    assert any(said in warning for warning in report.warnings)


def test_each_run_is_told(out: Path) -> None:
    told: list[int] = []
    run(out, prompts_at(0.5, 0.9), n=40, progress=lambda made: told.append(made.done))
    assert len(told) == 2 * 40 + 2 * 40


def test_chat_models_are_given_messages(out: Path) -> None:
    engine = Coin()
    engine.chat = True
    prompts = [("p0", "Way 0 at 0.100"), ("p1", "{query} Way 1 at 0.900")]
    assert run(out, prompts, engine=engine).winner == "p1"
    assert "Way 0 at 0.100\nName item 0!" in engine.asked


# Budgets ----------------------------------------------------------------------------------------------------


def spent(out: Path) -> int:
    return sum(row["tokens_in"] + row["tokens_out"] for row in read_log(out).to_pylist())


@pytest.mark.parametrize("tokens", [300, 600, 1200])
def test_a_budget_that_ends_in_the_race_leaves_nothing_to_claim(out: Path, tokens: int) -> None:
    sampling = Sampling(max_tokens=1)
    report = run(out, prompts_at(0.5, 0.9, 0.5), budget=Budget(tokens, "tokens"), sampling=sampling)
    assert report.stopped == "the budget is spent"
    assert (report.gain, report.ci_low, report.ci_high, report.n_confirm) == (None, None, None, 0)
    assert not [row for row in read_log(out).to_pylist() if int(row["answer"]) >= 1000]
    assert tokens - 60 < spent(out) <= tokens
    assert sum(r.n for r in report.racers) == len(read_log(out))


def test_after_a_stop_nothing_is_confirmed_even_if_it_could_be_paid(out: Path) -> None:
    """A long query of the race is too dear; the short ones that would confirm are not."""
    long = [Query(q.query_id, q.query + " Please." * 500, q.answer) for q in items(20, 20)]
    settings: dict[str, Any] = {"budget": Budget(900, "tokens"), "sampling": Sampling(max_tokens=1)}
    report = run(out, prompts_at(0.1, 0.6), queries=[*items(20), *long], **settings)
    assert report.winner == "p1"
    assert [r.n for r in report.racers] == [20, 20]
    assert (report.stopped, report.gain, report.n_confirm) == ("the budget is spent", None, 0)
    assert len(read_log(out)) == 40


def test_a_budget_that_ends_in_the_confirmation(out: Path) -> None:
    sampling = Sampling(max_tokens=1)
    whole = run(out, prompts_at(0.3, 0.9), sampling=sampling)
    assert spent(out) == 200 * 11
    short = out.with_name("short.parquet")
    report = run(short, prompts_at(0.3, 0.9), sampling=sampling, budget=Budget(1700, "tokens"))
    assert report.stopped == "the budget is spent"
    assert 0 < report.n_confirm < 40
    made = {row["query_id"] for row in read_log(short).to_pylist() if row["prompt_id"] == "p0"}
    both = {row["query_id"] for row in read_log(short).to_pylist() if row["prompt_id"] == "p1"} & made
    asked = [item for item in items(40, 1000) if item.query_id in both]
    won, lost = (np.array(verdicts(short, name, asked)) for name in ("p1", "p0"))
    expected = paired_interval(int((won & ~lost).sum()), int((lost & ~won).sum()), report.n_confirm)
    assert (report.gain, report.ci_low, report.ci_high) == expected
    assert spent(short) <= 1700
    # With a larger budget it goes on, to the very report of a race in one go.
    again = run(short, prompts_at(0.3, 0.9), sampling=sampling, budget=Budget(1e6, "tokens"))
    assert asdict(again) | {"log": ""} == asdict(whole) | {"log": ""}


def test_a_budget_holds_for_all_rounds_and_sessions_together(out: Path) -> None:
    sampling, budget = Sampling(max_tokens=1), Budget(900, "tokens")
    for _ in range(3):
        report = run(out, prompts_at(0.5, 0.9, 0.5), sampling=sampling, budget=budget)
        assert report.stopped
        assert spent(out) <= 900
    whole = out.with_name("whole.parquet")
    expected = run(whole, prompts_at(0.5, 0.9, 0.5), sampling=sampling)
    report = run(out, prompts_at(0.5, 0.9, 0.5), sampling=sampling)
    assert asdict(report) | {"log": ""} == asdict(expected) | {"log": ""}


def test_money_is_a_budget_too(out: Path) -> None:
    report = run(
        out, prompts_at(0.5, 0.9), sampling=Sampling(max_tokens=1), budget=Budget(1, "money"), price=(1e3, 1e4)
    )
    assert report.stopped  # a run costs 0.02
    assert sum(row["cost"] for row in read_log(out).to_pylist()) <= 1 + 1e-9
    with pytest.raises(ConfigError, match="price"):
        run(out.with_name("other"), prompts_at(0.5, 0.9), budget=Budget(1, "money"))


# Going on ---------------------------------------------------------------------------------------------------


def rows(out: Path) -> list[dict[str, Any]]:
    return read_log(out).drop_columns(["created_at"]).to_pylist()


@pytest.mark.parametrize("dies_after", [0, 1, 79, 80, 81, 130, 175, 241, 270])
def test_killed_anywhere_it_goes_on_as_if_nothing_had_been(out: Path, dies_after: int) -> None:
    prompts, n = prompts_at(0.5, 0.9, 0.3, 0.7), 60
    whole, straight = Coin(), out.with_name("whole.parquet")
    expected = run(straight, prompts, n=n, engine=whole)
    assert expected.gain is not None
    assert len(whole.asked) > 270
    first, second = Coin(dies_after=dies_after), Coin()
    with pytest.raises(EngineError, match="the server is gone"):
        run(out, prompts, n=n, engine=first)
    report = run(out, prompts, n=n, engine=second)
    assert asdict(report) | {"log": ""} == asdict(expected) | {"log": ""}
    assert rows(out) == rows(straight)
    assert sorted(first.asked + second.asked) == sorted(whole.asked)  # nothing is run twice


def test_killed_again_and_again(out: Path) -> None:
    prompts = prompts_at(0.5, 0.9, 0.3)
    expected = run(out.with_name("whole.parquet"), prompts)
    engines = []
    for _ in range(20):
        engines.append(Coin(dies_after=30))
        with contextlib.suppress(EngineError):
            report = run(out, prompts, engine=engines[-1])
            break
    assert 5 < len(engines) < 20
    assert asdict(report) | {"log": ""} == asdict(expected) | {"log": ""}


def test_a_race_that_is_over_is_not_run_again(out: Path) -> None:
    first, idle = run(out, prompts_at(0.5, 0.9, 0.3)), Coin(dies_after=0)
    assert run(out, prompts_at(0.5, 0.9, 0.3), engine=idle) == first
    assert idle.asked == []


def test_another_race_does_not_go_on_in_its_log(out: Path) -> None:
    run(out, prompts_at(0.5, 0.9))
    with pytest.raises(ConfigError, match="other settings: seed was 0, is 1"):
        run(out, prompts_at(0.5, 0.9), sampling=Sampling(seed=1))


def test_equal_seeds_give_equal_races(tmp_path: Path) -> None:
    seeds = (0, 0, 1)
    found = [run(tmp_path / str(i), prompts_at(0.5, 0.6), sampling=Sampling(seed=s)) for i, s in enumerate(seeds)]
    figures = [[(r.prompt_id, r.success) for r in report.racers] for report in found]
    assert figures[0] == figures[1] != figures[2]


# What luck does to the winner -------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[RaceReport]]:
    """Return a function that runs many races of `race` itself, without writing logs."""
    made: dict[tuple[str, str], bool] = {}

    def collect(_: Any, queries: Sequence[Query], prompts: Sequence[tuple[str, str]], out: str, **__: Any) -> Any:
        for query, (name, template) in product(queries, prompts):
            rate = float(template.rpartition(" ")[2])
            made[query.query_id, name] = derive_seed(out, query.query_id, name) / 2**31 < rate
        return SimpleNamespace(stopped=None, warnings=[], errors={})

    def table(*_: Any) -> pa.Table:
        ids = {"query_id": [q for q, _ in made], "prompt_id": [p for _, p in made], "response": ["said"] * len(made)}
        return pa.table(ids | {"correct": list(made.values())})

    monkeypatch.setattr(racing, "collect", collect)
    monkeypatch.setattr(racing, "read_log", table)

    def races(count: int, rates: Sequence[float], n: int, n_confirm: int) -> list[RaceReport]:
        found = []
        for i in range(count):
            made.clear()
            found.append(
                race(Coin(), prompts_at(*rates), "p0", items(n), items(n_confirm, 1000), f"race {i}", grade="exact")
            )
        return found

    return races


def test_of_equal_prompts_the_confirmed_gain_is_none_though_the_race_shows_one(
    quick: Callable[..., list[RaceReport]],
) -> None:
    won = [r for r in quick(250, [0.5] * 6, 40, 40) if r.gain is not None]
    assert len(won) > 180  # mostly a candidate is ahead by luck
    assert all(r.n_confirm == 40 for r in won)
    claimed = np.array([r.gain for r in won])
    of_race = []
    for report in won:
        success = {r.prompt_id: r.success for r in report.racers}
        of_race.append((success[report.winner] or 0.0) - (success["p0"] or 0.0))
    error = claimed.std() / np.sqrt(len(won))
    assert abs(claimed.mean()) < 3 * error
    assert np.mean(of_race) > 0.08  # the winner on the queries that it won on
    assert np.mean(of_race) > 5 * error
    held = np.mean([r.ci_low <= 0 <= r.ci_high for r in won if r.ci_low is not None and r.ci_high is not None])
    assert held == pytest.approx(0.95, abs=0.04)


def test_a_true_gain_is_confirmed_without_bias(quick: Callable[..., list[RaceReport]]) -> None:
    found = quick(120, [0.5, 0.8, 0.5, 0.3], 60, 60)
    won = [r for r in found if r.winner == "p1"]
    assert len(won) > 110
    gains = np.array([r.gain for r in won])
    assert gains.mean() == pytest.approx(0.3, abs=3 * gains.std() / np.sqrt(len(won)))
    assert np.mean([bool(r.ci_low and r.ci_low > 0) for r in won]) > 0.85
