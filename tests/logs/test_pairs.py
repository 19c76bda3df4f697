"""Preference pairs: made by hand and by brute force, balance, what is left out, and splits that keep them together."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oirl.errors import ConfigError, DataError, NotFoundError, OirlError
from oirl.logs import atomic, pairs
from oirl.logs.groups import group_queries, join_groups
from oirl.logs.pairs import (
    CONTRADICTED,
    EMPTY,
    NO_RESPONSE,
    NO_VERDICT,
    ONE_SIDED,
    REPEATED,
    SAME,
    PairsReport,
    group_pairs,
    make_pairs,
    mark_pairs,
    read_pairs,
    save_pairs,
    usable_pairs,
    write_pairs,
)
from oirl.logs.splits import write_split
from oirl.logs.store import read_log, write_log
from oirl.records import INTERACTION_SCHEMA, PREFERENCE_SCHEMA

COWS = "how often does a farmer milk the brown cows in the old barn behind the house each day"
SHIP = "why does a ship of heavy steel float on the water while a small stone sinks at once"
TOPICS = "how are cows milked,why do ships float,name a river,what is rust,who wrote the iliad,where do bees sleep"
UNLIKE = TOPICS.split(",")


def row(query_id: str, response: str | None, correct: bool | None, prompt: str = "p", **extra: Any) -> dict[str, Any]:
    base = {
        "query_id": query_id,
        "query": f"Text of {query_id}?",
        "prompt_id": prompt,
        "prompt": f"{prompt}: {{query}}",
    }
    return {**base, "response": response, "correct": correct, "replicate": 0, **extra}


def log_of(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), INTERACTION_SCHEMA)


def pair(query: str, chosen: str, rejected: str, **extra: Any) -> dict[str, Any]:
    return {"query": query, "chosen": chosen, "rejected": rejected, **extra}


def pairs_of(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{"pair_id": f"p{i}", **row} for i, row in enumerate(rows)], PREFERENCE_SCHEMA)


def unlike_pairs() -> pa.Table:
    return pairs_of(*(pair(q, f"right {q}", f"wrong {q}", metadata=json.dumps({"k": q})) for q in UNLIKE))


def turns(*texts: str) -> str:
    roles = itertools.cycle(("user", "assistant"))
    return json.dumps({"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]})


def known(table: pa.Table) -> list[dict[str, Any]]:
    return [json.loads(text) for text in table["metadata"].to_pylist()]


def told(table: pa.Table) -> list[tuple[str | None, str, str, str]]:
    """Split, query id, chosen and rejected of each pair."""
    texts = table.select(["chosen", "rejected"]).to_pylist()
    return [
        (m.get("split"), m["query_id"], t["chosen"], t["rejected"]) for m, t in zip(known(table), texts, strict=True)
    ]


def net_counts(table: pa.Table) -> Counter[str]:
    """How much oftener each prompt was chosen than rejected."""
    net: Counter[str] = Counter()
    for m in known(table):
        net[m["chosen_prompt_id"]] += 1
        net[m["rejected_prompt_id"]] -= 1
    return net


def test_each_right_response_stands_over_each_wrong_one_of_its_query() -> None:
    log = log_of(
        row("q", "4", True, "a"),
        row("q", "5", False, "b"),
        row("r", "yes", False, "a", split="train"),
        row("q", "6", False, "a"),
        row("r", "no", True, "b", split="train"),
        row("q", "four", True, "c"),
    )
    made, report = make_pairs(log)
    assert made.schema.equals(PREFERENCE_SCHEMA)
    assert told(made) == [
        (None, "q", "4", "5"),
        (None, "q", "4", "6"),
        (None, "q", "four", "5"),
        (None, "q", "four", "6"),
        ("train", "r", "no", "yes"),
    ]
    assert made["query"].to_pylist() == ["Text of q?"] * 4 + ["Text of r?"]
    assert known(made)[0] == {"query_id": "q", "chosen_prompt_id": "a", "rejected_prompt_id": "b"}
    assert known(made)[4] == {"query_id": "r", "chosen_prompt_id": "b", "rejected_prompt_id": "a", "split": "train"}
    assert set(made["source"].to_pylist()) == {"verdicts"}
    assert (report.rows_read, report.rows_used, report.n_pairs, report.n_queries) == (6, 6, 5, 2)
    assert report.to_dict()["left_out"] == {}


def test_what_is_left_out_by_hand() -> None:
    log = log_of(
        row("q", "4", True),
        row("q", " 4\n", True),  # repeated
        row("q", "5", False),
        row("q", "5", None),  # no verdict
        row("q", "5 or 6", True),  # contradicted, with the next
        row("q", "5 or 6", False),
        row("q", None, True),  # no response, as the next two
        row("q", "", False),
        row("q", " \n", True),
        row("r", "yes", True),  # one-sided
        row("r", "aye", True),
        row("s", "x", True),  # contradicted: nothing is left of the query
        row("s", "x ", False),
        row("s", "x", False),  # repeated
    )
    made, report = make_pairs(log)
    assert told(made) == [(None, "q", "4", "5")]
    assert report.to_dict() == {
        "out": "",
        "rows_read": 14,
        "rows_used": 2,
        "n_pairs": 1,
        "n_queries": 1,
        "margin": "verdict",
        "left_out": {REPEATED: 2, NO_VERDICT: 1, CONTRADICTED: 4, NO_RESPONSE: 3, ONE_SIDED: 2},
    }


def test_a_query_on_two_sides_of_a_split_is_paired_on_each_apart() -> None:
    sides = {"train": ("a", "b"), "test": ("c", "d"), None: ("e", "f")}
    rows = [row("q", r, c, split=s) for s, two in sides.items() for r, c in zip(two, (True, False), strict=True)]
    made, report = make_pairs(log_of(*rows, row("q", "g", True, split="dev")))
    assert told(made) == [("train", "q", "a", "b"), ("test", "q", "c", "d"), (None, "q", "e", "f")]
    assert pairs.splits_of(made) == ["train", "test", None]
    assert report.left_out[ONE_SIDED] == 1


def test_the_same_text_on_two_sides_of_a_split_contradicts_nothing() -> None:
    rows = [row("q", "x", True, split="train"), row("q", "y", False, split="train")]
    rows += [row("q", "y", True, split="test"), row("q", "x", False, split="test")]
    rows += [row("q", "x", True, split="dev"), row("q", "y", False, split="dev")]
    made, report = make_pairs(log_of(*rows))
    assert told(made) == [("train", "q", "x", "y"), ("test", "q", "y", "x"), ("dev", "q", "x", "y")]
    assert len(set(made["pair_id"].to_pylist())) == 3
    assert report.rows_used == 6


@pytest.mark.parametrize(
    ("scores", "margins", "source"),
    [
        ((0.9, 0.2, 0.5), [0.7, 0.4], "score"),
        ((0.9, 0.2, None), [1.0, 1.0], "verdict"),  # one is not known
        ((0.9, 0.2, 0.9), [1.0, 1.0], "verdict"),  # one wrong response is scored as high as the right one
        ((None, None, None), [1.0, 1.0], "verdict"),
        ((0.9, float("nan"), 0.5), [1.0, 1.0], "verdict"),
    ],
)
def test_margins(scores: tuple[float | None, ...], margins: list[float], source: str) -> None:
    right, *wrong = scores
    rows = [row("q", f"w{i}", False, score=s) for i, s in enumerate(wrong)]
    made, report = make_pairs(log_of(row("q", "r", True, score=right), *rows))
    assert made["margin"].to_pylist() == pytest.approx(margins)
    assert report.margin == source


def test_a_score_of_a_response_in_no_pair_does_not_matter() -> None:
    rows = [row("q", "r", True, score=0.9), row("q", "w", False, score=0.4), row("one-sided", "x", True)]
    made, report = make_pairs(log_of(*rows))
    assert made["margin"].to_pylist() == pytest.approx([0.5])
    assert report.margin == "score"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row("q", None, True), row("q", None, False)], f"2 rows: {NO_RESPONSE}"),
        ([row("q", "a", None), row("q", "b", None), row("r", "c", None)], f"3 rows: {NO_VERDICT}"),
        ([row("q", "a", True), row("r", "b", False)], f"2 rows: {ONE_SIDED}"),
        ([row("q", "a", True), row("q", "a", False)], f"2 rows: {CONTRADICTED}"),
        ([], "no rows"),
    ],
)
def test_a_log_without_a_pair_says_why(rows: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(DataError, match="no pair of a right and a wrong response") as e:
        make_pairs(log_of(*rows))
    assert reason in str(e.value)


@pytest.mark.parametrize("per_query", [0, -1])
def test_less_than_one_pair_a_query_is_refused(per_query: int) -> None:
    with pytest.raises(ConfigError, match=f"{per_query}; at least 1"):
        make_pairs(log_of(row("q", "r", True), row("q", "w", False)), per_query=per_query)


ROWS = st.lists(
    st.builds(
        row,
        st.sampled_from(["q", "r", "s"]),
        st.sampled_from([None, "", "  ", "a", " a", "b", "c", "d", "e", "f\n"]),
        st.sampled_from([True, True, False, False, None]),
        st.sampled_from(["p1", "p2", "p3"]),
        split=st.sampled_from([None, "train", "test"]),
        score=st.one_of(st.none(), st.floats(0, 1)),
    ),
    max_size=40,
)


def expected_pairs(rows: list[dict[str, Any]]) -> set[tuple[str | None, str, str, str]]:
    """All comparisons of a log, written anew from the definition."""
    said: dict[bool, set[tuple[str | None, str, str]]] = {True: set(), False: set()}
    for r in rows:
        if r["correct"] is not None and (r["response"] or "").strip():
            said[r["correct"]].add((r.get("split"), r["query_id"], r["response"].strip()))
    right, wrong = said[True] - said[False], said[False] - said[True]
    return {(*a, b[2]) for a in right for b in wrong if a[:2] == b[:2]}


def check_report(report: PairsReport, made: pa.Table, rows: list[dict[str, Any]]) -> None:
    found = told(made)
    used = {("right", *t[:3]) for t in found} | {("wrong", t[0], t[1], t[3]) for t in found}
    assert report.rows_used == len(used)
    assert report.rows_used + report.left_out.total() == report.rows_read == len(rows)
    assert report.n_pairs == len(found)
    assert report.n_queries == len({t[:2] for t in found})


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_all_pairs_are_those_of_brute_force_in_whatever_order_the_rows_are(rows: list[Any], random: Any) -> None:
    expected = expected_pairs(rows)
    if not expected:
        with pytest.raises(DataError):
            make_pairs(log_of(*rows))
        return
    made, report = make_pairs(log_of(*rows))
    assert Counter(told(made)) == Counter(expected)  # none twice
    assert len(set(made["pair_id"].to_pylist())) == len(expected)
    check_report(report, made, rows)
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert set(make_pairs(log_of(*shuffled))[0]["pair_id"].to_pylist()) == set(made["pair_id"].to_pylist())


FEW_QUERIES = st.lists(
    st.builds(
        row,
        st.sampled_from(["q", "r"]),
        st.sampled_from("abcdefghijkl"),
        st.booleans(),
        st.sampled_from(["p1", "p2", "p3"]),
    ),
    min_size=10,
    max_size=30,
)


@given(FEW_QUERIES.filter(expected_pairs), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_so_many_pairs_of_a_query_use_fresh_responses_first(rows: list[Any], per_query: int, seed: int) -> None:
    expected = expected_pairs(rows)
    made, report = make_pairs(log_of(*rows), per_query=per_query, seed=seed)
    check_report(report, made, rows)
    found = told(made)
    assert set(found) <= expected
    assert len(set(found)) == len(found)
    for query in {t[:2] for t in expected}:
        of_all, of_found = ([t for t in ts if t[:2] == query] for ts in (expected, found))
        assert len(of_found) == min(per_query, len(of_all))
        for side in (2, 3):
            there, used = ({t[side] for t in ts} for ts in (of_all, of_found))
            assert len(used) == min(per_query, len(there))


def easy_and_hard(n: int = 100) -> pa.Table:
    """Three replies each: `easy` is always right on odd queries and 2 of 3 times on even ones, `hard` 1 of 3 times."""
    rows = []
    for q, (prompt, k) in itertools.product(range(n), itertools.product(("easy", "hard"), range(3))):
        right = k < 2 or q % 2 if prompt == "easy" else k == 0
        rows.append(row(f"q{q}", f"{prompt} {k}", bool(right), prompt))
    return log_of(*rows)


def test_chosen_pairs_do_not_tell_which_prompt_is_right_oftener() -> None:
    log = easy_and_hard()
    everything = make_pairs(log)[0]
    rng = np.random.default_rng(0)
    by_query: dict[str, list[int]] = {}
    for i, t in enumerate(told(everything)):
        by_query.setdefault(t[1], []).append(i)
    random = everything.take(pa.array([int(rng.choice(at)) for at in by_query.values()]))
    balanced = make_pairs(log, per_query=1)[0]
    assert len(balanced) == len(random) == 100
    assert net_counts(random)["easy"] > 30  # 54 on average: 2/3 − 1/3 of the 50 even queries, 3/4 of the odd ones
    # Nothing forces a net count: where easy is never wrong, hard can still stand over hard.
    assert abs(net_counts(balanced)["easy"]) <= 1
    assert abs(net_counts(balanced)["hard"]) <= 1


@pytest.mark.parametrize("per_query", [1, 2, 3])
def test_prompts_that_are_equally_good_stay_level(per_query: int) -> None:
    rows = [row(f"q{q}", f"{p} {c}", c, p) for q in range(60) for p in "abc" for c in (True, False)]
    made = make_pairs(log_of(*rows), per_query=per_query)[0]
    assert len(made) == 60 * per_query
    assert max(map(abs, net_counts(made).values())) <= 2


def test_pairs_that_are_forced_count_in_the_balance() -> None:
    forced = [row(f"f{q}", f"{p}", p == "a", p) for q in range(20) for p in "ab"]  # a over b: 20 times
    free = [row(f"q{q}", f"{p} {c}", c, p) for q in range(40) for p in "ab" for c in (True, False)]
    made = make_pairs(log_of(*forced, *free), per_query=1)[0]
    assert abs(net_counts(made)["a"]) <= 1  # 20 of the 40 free ones can be b over a


def test_the_seed_decides_between_equal_pairs() -> None:
    log = easy_and_hard(20)
    first, again, other = (make_pairs(log, per_query=2, seed=s)[0] for s in (1, 1, 2))
    assert first.equals(again)
    assert set(told(first)) != set(told(other))
    assert make_pairs(log, seed=1)[0].equals(make_pairs(log, seed=2)[0])  # all pairs: nothing to decide


def test_names_of_pairs_are_those_of_their_content() -> None:
    rows = [row("q", "r", True), row("q", "w", False)]
    alone, beside = make_pairs(log_of(*rows))[0], make_pairs(log_of(row("q", "v", False), *rows))[0]
    assert alone["pair_id"][0] == beside["pair_id"][told(beside).index((None, "q", "r", "w"))]
    others = [row("o", "r", True), row("o", "w", False)]  # the same two texts to another query
    assert make_pairs(log_of(*others))[0]["pair_id"][0] != alone["pair_id"][0]


def test_pairs_are_written_and_read(tmp_path: Path) -> None:
    log, out = easy_and_hard(4), tmp_path / "new" / "pairs.parquet"
    write_log(log, tmp_path / "log.parquet")
    report = write_pairs(tmp_path / "log.parquet", out, per_query=2, seed=3)
    assert report.out == str(out)
    assert (report.rows_read, report.n_pairs, report.n_queries) == (24, 8, 4)
    assert read_pairs(out).equals(make_pairs(log, per_query=2, seed=3)[0])
    assert read_pairs(tmp_path / "log.parquet").equals(make_pairs(log)[0])  # of a log: all pairs


def test_pairs_of_several_logs_are_made_of_all_of_them(tmp_path: Path) -> None:
    write_log(log_of(row("q", "r", True)), tmp_path / "a.parquet")
    write_log(log_of(row("q", "w", False)), tmp_path / "b.parquet")
    write_pairs([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "pairs.parquet")
    assert told(read_pairs(tmp_path / "pairs.parquet")) == [(None, "q", "r", "w")]


def test_a_log_and_pairs_are_not_read_as_one(tmp_path: Path) -> None:
    write_log(easy_and_hard(2), tmp_path / "log.parquet")
    write_pairs(tmp_path / "log.parquet", tmp_path / "pairs.parquet")
    with pytest.raises(ConfigError, match="name one kind"):
        read_pairs([tmp_path / "log.parquet", tmp_path / "pairs.parquet"])
    with pytest.raises(DataError, match=r"pairs\.parquet holds preferences, not interactions"):
        write_pairs(tmp_path / "pairs.parquet", tmp_path / "more.parquet")
    with pytest.raises(NotFoundError, match="no such file"):
        read_pairs(tmp_path / "none.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.parquet", "pairs.parquet"]


@pytest.mark.parametrize("out", ["log.parquet", "sub/../log.parquet", "link.parquet"])
def test_the_log_is_not_written_over(tmp_path: Path, out: str) -> None:
    write_log(easy_and_hard(2), tmp_path / "log.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.parquet").symlink_to(tmp_path / "log.parquet")
    before = (tmp_path / "log.parquet").read_bytes()
    for source in (tmp_path / "log.parquet", tmp_path, str(tmp_path / "l*.parquet")):
        with pytest.raises(ConfigError, match="is also the log; name another file"):
            write_pairs(source, tmp_path / out)
    assert (tmp_path / "log.parquet").read_bytes() == before


@pytest.mark.parametrize("error", [OSError("no room"), KeyboardInterrupt()], ids=["no room", "stopped"])
def test_a_write_that_fails_leaves_the_old_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_log(easy_and_hard(2), tmp_path / "log.parquet")
    out = tmp_path / "pairs.parquet"
    out.write_bytes(b"old")

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(atomic.os, "replace", failing)
    with pytest.raises((OirlError, KeyboardInterrupt)):
        write_pairs(tmp_path / "log.parquet", out)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.parquet", "pairs.parquet"]


def test_a_log_without_a_pair_leaves_the_old_pairs(tmp_path: Path) -> None:
    write_log(log_of(row("q", "r", True)), tmp_path / "log.parquet")
    (tmp_path / "pairs.parquet").write_bytes(b"old")
    with pytest.raises(DataError, match="all responses to the query are right"):
        write_pairs(tmp_path / "log.parquet", tmp_path / "pairs.parquet")
    assert (tmp_path / "pairs.parquet").read_bytes() == b"old"


def test_pairs_that_say_nothing_are_counted_by_reason() -> None:
    table = pairs_of(
        pair("q", "a", "b"),
        pair(" \n", "a", "b"),
        pair("q", "", "b"),
        pair("q", "a", "\u3000"),
        pair("q", " a", "a\n"),
        pair("q", "", ""),  # empty, not the same
        pair("q", "a", "A"),
    )
    usable, reasons = usable_pairs(table)
    assert usable["pair_id"].to_pylist() == ["p0", "p6"]
    assert reasons == {EMPTY: 4, SAME: 1}
    assert usable_pairs(usable) == (usable, Counter())
    assert len(usable_pairs(PREFERENCE_SCHEMA.empty_table())[0]) == 0


def test_marks_keep_the_other_metadata() -> None:
    table = pairs_of(
        pair("q", "a", "b", metadata='{"k": "é", "split": "test"}'),
        pair("q", "a", "c"),
        pair("q", "a", "d", metadata="no JSON"),
    )
    assert pairs.splits_of(table) == ["test", None, None]
    marked = mark_pairs(table, "train")
    assert known(marked) == [{"k": "é", "split": "train"}, {"split": "train"}, {"split": "train"}]
    assert marked.drop_columns("metadata").equals(table.drop_columns("metadata"))
    assert marked.schema.equals(PREFERENCE_SCHEMA)


@pytest.mark.parametrize(
    ("marks", "train", "test"),
    [
        (["train", "test", None, "dev"], [0], [1]),
        (["train", "train", None, "dev"], [0, 1], [2, 3]),
        (["train", "train"], [0, 1], [0, 1]),
        ([None, None], [0, 1], [0, 1]),
        (["dev", "test"], [0, 1], [1]),
        ([], [], []),
    ],
)
def test_pairs_to_learn_from_and_pairs_to_evaluate_on(
    marks: list[str | None], train: list[int], test: list[int]
) -> None:
    table = pairs_of(*(pair("q", "a", "b", metadata=json.dumps({"split": m}) if m else None) for m in marks))
    assert pairs.train_pairs(table)["pair_id"].to_pylist() == [f"p{i}" for i in train]
    assert pairs.test_pairs(table)["pair_id"].to_pylist() == [f"p{i}" for i in test]


LABELINGS = st.integers(0, 20).flatmap(
    lambda n: st.lists(st.lists(st.integers(-3, 12), min_size=n, max_size=n), min_size=1, max_size=3)
)


@given(LABELINGS)
@settings(max_examples=100, deadline=None)
def test_joined_groups_are_the_connected_parts(labelings: list[list[int]]) -> None:
    joined = join_groups(*(np.array(labels, dtype=np.int64) for labels in labelings)).tolist()
    n = len(labelings[0])
    reach = [{j for j in range(n) if any(labels[i] == labels[j] for labels in labelings)} for i in range(n)]
    for _ in range(n):
        reach = [set().union(*(reach[j] for j in r)) for r in reach]
    assert all((joined[i] == joined[j]) == (j in reach[i]) for i in range(n) for j in range(n))
    first = list(dict.fromkeys(joined))
    assert first == list(range(len(first)))  # numbered from 0 by first appearance


def test_groups_of_pairs_by_hand() -> None:
    opening, one, two = "hello, who are you?", "tell me of bees and of their honey", "and what of the moon above us"
    table = pairs_of(
        pair(COWS, "Twice.", "Never."),
        pair(SHIP, "It pushes water away below and behind it.", "By magic, as all that floats."),
        pair(COWS.upper() + " ", "At dawn.", "At noon."),  # 2 is with 0: the same query once normalised
        pair(COWS.replace("day", "week"), "Thrice.", "Once."),  # 3 is with 0: a near duplicate
        pair(
            UNLIKE[2], " by magic, as all  that floats.", "It  pushes water away below and behind it."
        ),  # 4 is with 1: the same two, the other way round
        pair(f"User: {opening} … {one}", "x1", "y1", metadata=turns(opening, "A bot.", one)),
        pair(f"User: {opening} … {two}", "x2", "y2", metadata=turns(opening.upper(), "I am.", two)),  # with 5
        pair(opening, "x3", "y3"),  # 7 is with 5: it asks with the opening alone
        pair(UNLIKE[3], "Twice.", "x3"),  # 8 is with none, though it shares a response with 0 and with 7
    )
    assert group_pairs(table).labels.tolist() == [0, 1, 0, 0, 1, 2, 2, 2, 3]
    assert group_pairs(table.slice(0, 0)).labels.tolist() == []


TAIL = "is what all of them said at once"
PAIR_LISTS = st.lists(
    st.builds(
        pair,
        st.sampled_from([COWS, COWS.upper(), COWS.replace("day", "week"), SHIP, *UNLIKE[:3]]),
        st.sampled_from([f"{c} {TAIL}" for c in ["a", "A ", "b", "c", "d", "e", "f"]]),
        st.sampled_from([f"{c} {TAIL}" for c in ["a", "b", "c", "d", "e", "f", "g"]]),
        metadata=st.sampled_from(
            [None, "", "[", "[1]", '{"messages": 3}', turns("x"), turns("x", "y"), turns("z", "y")]
        ),
    ),
    max_size=12,
)


@given(PAIR_LISTS)
@settings(max_examples=100, deadline=None)
def test_groups_of_pairs_are_coarser_than_each_reason_to_group(rows: list[Any]) -> None:
    rows = rows + [
        pair(c, f"{c}1", f"{c}2", metadata=None) for c in "abcdefghijklmn"
    ]  # so that no group is more than half
    labels = group_pairs(pairs_of(*rows)).labels.tolist()
    queries = [r["query"] for r in rows]
    alike = group_queries(list(dict.fromkeys(queries))).labels.tolist()
    of_query = dict(zip(dict.fromkeys(queries), alike, strict=True))
    turned = pairs_of(*({**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows))
    assert group_pairs(turned).labels.tolist() == labels
    for (i, a), (j, b) in itertools.combinations(enumerate(rows), 2):
        both = [{r["chosen"].strip().lower(), r["rejected"].strip().lower()} for r in (a, b)]
        opened = {r["metadata"] for r in (a, b)} in ({turns("x", "y")}, {turns("z", "y")})
        if of_query[a["query"]] == of_query[b["query"]] or both[0] == both[1] or opened:
            assert labels[i] == labels[j]


LONG = "as all of them said at once"


def comparisons() -> pa.Table:
    """Both orders of each of twelve comparisons, the second under another wording of the query."""
    rows = []
    for k in range(12):
        subject = f"{UNLIKE[k % 6]} {'today' if k < 6 else 'according to the old books of the town'}"
        rows.append(pair(subject, f"yes {k}, {LONG}", f"no {k}, {LONG}"))
        rows.append(pair(f"Number {'abcdefghijkl'[k]} of the raters was asked", f"No {k}, {LONG}", f"Yes {k}, {LONG}"))
    return pairs_of(*rows)


def sides(table: pa.Table) -> set[frozenset[str]]:
    texts = table.select(["chosen", "rejected"]).to_pylist()
    return {frozenset(t.lower() for t in row.values()) for row in texts}


@pytest.mark.parametrize("seed", range(10))
def test_both_orders_of_a_comparison_stay_on_one_side(tmp_path: Path, seed: int) -> None:
    save_pairs(comparisons(), tmp_path / "pairs.parquet")
    report = write_split(tmp_path / "pairs.parquet", tmp_path / "out", test=0.3, seed=seed)
    assert sum(p["rows"] for p in report["parts"]) == 24
    train, test = (read_pairs(tmp_path / "out" / f"{side}.parquet") for side in ("train", "test"))
    assert not sides(train) & sides(test)
    assert len(sides(test)) == 4  # of 24 pairs .3 are 7.2; comparisons bring two pairs each, so 8 are nearest
    assert set(pairs.splits_of(train)) == {"train"}
    assert set(pairs.splits_of(test)) == {"test"}
    write_split(tmp_path / "pairs.parquet", tmp_path / "folds", folds=4, seed=seed)
    held_out = [sides(read_pairs(tmp_path / "folds" / f"fold-{f}" / "test.parquet")) for f in range(4)]
    assert [len(h) for h in held_out] == [3] * 4
    assert set.union(*held_out) == sides(comparisons())


def test_a_query_and_its_conversation_stay_on_one_side_of_each_fold(tmp_path: Path) -> None:
    rows = []
    for k, text in enumerate(UNLIKE):
        rows.append(pair(f"User: {text} {k}-fold continued", f"a{k}", f"b{k}", metadata=turns(text, "Well.", "And?")))
        rows.append(pair(text.title(), f"c{k}", f"d{k}"))
        rows.append(pair(f"{text} ", f"e{k}", f"f{k}"))
    save_pairs(pairs_of(*rows), tmp_path / "pairs.parquet")
    for seed in range(5):
        report = write_split(tmp_path / "pairs.parquet", tmp_path / "out", folds=3, seed=seed)
        assert [p["rows"] for p in report["parts"]] == [12, 6] * 3
        assert [p["queries"] for p in report["parts"]] == [12, 6] * 3
        for f in range(3):
            part = {name: read_pairs(tmp_path / "out" / f"fold-{f}" / f"{name}.parquet") for name in ("train", "test")}
            topics = {
                name: {chosen[1:] for chosen in table["chosen"].to_pylist()}  # the number of the topic
                for name, table in part.items()
            }
            assert not topics["train"] & topics["test"]
            assert (len(topics["train"]), len(topics["test"])) == (4, 2)


def test_a_split_of_pairs_does_not_depend_on_their_order_but_on_the_seed(tmp_path: Path) -> None:
    table = pairs_of(*(pair(q, f"right {k} {q}", f"wrong {q}") for q in UNLIKE for k in range(3)))
    save_pairs(table, tmp_path / "pairs.parquet")
    order = np.random.default_rng(0).permutation(18)
    save_pairs(table.take(pa.array(order)), tmp_path / "shuffled.parquet")
    found = set()
    for seed in range(8):
        test = []
        for name in ("pairs", "shuffled"):
            write_split(tmp_path / f"{name}.parquet", tmp_path / name, test=0.34, seed=seed)
            test.append(frozenset(read_pairs(tmp_path / name / "test.parquet")["pair_id"].to_pylist()))
        assert test[0] == test[1]
        assert len(test[0]) == 6
        found.add(test[0])
    assert len(found) > 1


def test_a_split_of_pairs_keeps_everything_but_the_mark(tmp_path: Path) -> None:
    table = mark_pairs(unlike_pairs(), "old")
    save_pairs(table, tmp_path / "pairs.parquet")
    write_split(tmp_path / "pairs.parquet", tmp_path / "out", test=0.34)
    parts = pa.concat_tables([read_pairs(tmp_path / "out" / f"{side}.parquet") for side in ("train", "test")])
    assert parts.drop_columns("metadata").sort_by("pair_id").equals(table.drop_columns("metadata"))
    assert {m["k"] for m in known(parts)} == set(UNLIKE)
    assert sorted(pairs.splits_of(parts)) == ["test"] * 2 + ["train"] * 4


def test_pairs_of_one_query_cannot_be_split(tmp_path: Path) -> None:
    save_pairs(pairs_of(pair("q", "a", "b"), pair("Q", "c", "d")), tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="at least two unlike queries"):
        write_split(tmp_path / "pairs.parquet", tmp_path / "out")
    with pytest.raises(DataError, match="2 folds need at least 2"):
        write_split(tmp_path / "pairs.parquet", tmp_path / "out", folds=2)
    assert not (tmp_path / "out").exists()


def test_a_split_of_a_log_is_a_log_still(tmp_path: Path) -> None:
    rows = [row(q, a, a == "r", query=q) for q in UNLIKE for a in "rw"]
    write_log(log_of(*rows), tmp_path / "log.parquet")
    write_split(tmp_path / "log.parquet", tmp_path / "out", test=0.34)
    assert read_log(tmp_path / "out" / "test.parquet")["split"].to_pylist() == ["test"] * 4


def test_conversations_under_one_system_message_are_not_one() -> None:
    def under_system(text: str) -> str:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        return json.dumps({"messages": messages})

    texts = [UNLIKE[0], UNLIKE[1], UNLIKE[0]]
    table = pairs_of(
        *(
            pair(f"System: Be brief.\n\nUser: {q}", f"a{i}", f"b{i}", metadata=under_system(q))
            for i, q in enumerate(texts)
        )
    )
    assert group_pairs(table).labels.tolist() == [0, 1, 0]


def test_pairs_of_short_answers_to_unlike_queries_can_be_split(tmp_path: Path) -> None:
    rows = [row(q, a, a == ("yes", "no")[i % 2], query=q) for i, q in enumerate(UNLIKE) for a in ("yes", "no")]
    write_log(log_of(*rows), tmp_path / "log.parquet")
    write_pairs(tmp_path / "log.parquet", tmp_path / "pairs.parquet")
    report = write_split(tmp_path / "pairs.parquet", tmp_path / "out", test=0.34)
    assert [p["rows"] for p in report["parts"]] == [4, 2]


def test_a_split_of_pairs_warns_of_a_template(tmp_path: Path) -> None:
    save_pairs(
        pairs_of(*(pair(f"What is {a} plus 1?", f"It is {a + 1}.", f"It is {a}.") for a in range(10))),
        tmp_path / "pairs.parquet",
    )
    report = write_split(tmp_path / "pairs.parquet", tmp_path / "out")
    assert "10 of 10 queries follow one template" in " ".join(report["warnings"])


def test_metadata_with_half_a_character_can_be_marked() -> None:
    table = pairs_of(pair("q", "a", "b", metadata='{"k": "\\ud83d"}'))
    assert pairs.splits_of(mark_pairs(table, "train")) == ["train"]


def test_a_split_that_fails_leaves_the_folds_of_an_earlier_one(tmp_path: Path) -> None:
    save_pairs(unlike_pairs(), tmp_path / "pairs.parquet")
    write_split(tmp_path / "pairs.parquet", tmp_path / "out", folds=2)
    with pytest.raises(DataError, match="9 folds need at least 9"):
        write_split(tmp_path / "pairs.parquet", tmp_path / "out", folds=9)
    assert len(read_pairs(tmp_path / "out" / "fold-*" / "test.parquet")) == 6
