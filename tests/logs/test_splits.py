"""Splits without leaks: groups by hand and by brute force, shares, order of rows, folds, and leaks found."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log
from hypothesis import given, settings
from hypothesis import strategies as st

import oirl
from oirl.errors import ConfigError, DataError
from oirl.logs import splits
from oirl.logs.groups import NEAR_DUPLICATE, group_queries
from oirl.logs.splits import assign_folds, assign_test, find_leaks, split, write_split
from oirl.logs.text import mask_numbers, normalise, words

COWS = "a farmer keeps 12 brown cows in the old barn behind the house and milks them every morning at five"
SHIP = "the captain counts 7 crates of tea on the deck before the ship leaves the small harbour at noon today"
FILL = [f"{w} weighs how much when {v} is left out" for w, v in zip("abcdefghij", "klmnopqrst", strict=True)]


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == g).tolist()) for g in np.unique(labels)}


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of 3-word shingles with numbers masked, written anew from its definition."""
    sets = []
    for text in (a, b):
        tokens = words(mask_numbers(text))
        sets.append({tuple(tokens[i : i + 3]) for i in range(max(len(tokens) - 2, 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def log_of(queries: list[str], **columns: list[object]) -> pa.Table:
    n = len(queries)
    table = pa.table(
        {
            "query_id": [normalise(q) for q in queries],
            "query": queries,
            "prompt_id": ["p"] * n,
            "prompt": ["P"] * n,
            "correct": [True] * n,
        }
    )
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def test_exact_near_and_masked_duplicates_are_one_group() -> None:
    queries = [
        COWS,
        SHIP,
        COWS.upper() + "  ",  # exact, once normalised
        COWS.replace("12", "1,250"),  # another number
        SHIP.replace("today", "again"),  # the last word differs: 1 shingle of 18 each, similarity 17 / 19
        *FILL,
    ]
    assert similarity(queries[1], queries[4]) == pytest.approx(17 / 19)
    groups = partition(group_queries(queries).labels)
    assert frozenset({0, 2, 3}) in groups
    assert frozenset({1, 4}) in groups
    assert len(groups) == 2 + len(FILL)


def test_unlike_queries_with_shared_words_stay_apart() -> None:
    other = COWS.replace("brown", "white").replace("barn", "shed").replace("milks", "feeds")
    assert similarity(COWS, other) < 0.5
    labels = group_queries([COWS, other, *FILL]).labels
    assert labels[0] != labels[1]


def test_a_chain_of_near_duplicates_is_one_group() -> None:
    chain = [COWS]
    for old, new in (("farmer", "woman"), ("five", "six"), ("house", "wood")):
        chain.append(chain[-1].replace(old, new))
    assert similarity(chain[0], chain[3]) < NEAR_DUPLICATE
    assert all(similarity(a, b) >= NEAR_DUPLICATE for a, b in itertools.pairwise(chain[:3]))
    labels = group_queries([*chain[:3], *FILL]).labels
    assert len(set(labels[:3].tolist())) == 1


def test_a_template_of_more_than_half_is_cut_and_said() -> None:
    queries = [f"What is {a} plus {a + 3}?" for a in range(20)] + ["what is  0 plus 3?", *FILL]
    grouping = group_queries(queries)
    assert len(set(grouping.labels[:20].tolist())) == 20
    assert grouping.labels[0] == grouping.labels[20]  # exact duplicates stay together even so
    assert grouping.templated == 21
    assert "21 of 31 queries follow one template" in str(grouping.warning())
    assert group_queries([COWS, SHIP]).warning() is None


def test_half_is_not_a_template() -> None:
    queries = [f"What is {a} plus {a + 3}?" for a in range(10)] + FILL
    grouping = group_queries(queries)
    assert grouping.templated == 0
    assert len(set(grouping.labels[:10].tolist())) == 1


def test_queries_without_words() -> None:
    assert group_queries([]).labels.tolist() == []
    assert len(set(group_queries(["", "!!!", "🎉", "???"]).labels.tolist())) == 4


@pytest.mark.parametrize("seed", range(3))
def test_no_pair_above_the_threshold_is_cut_apart(seed: int) -> None:
    """Queries with a long preamble in common, as few-shot ones have, against a comparison of all pairs."""
    rng = np.random.default_rng(seed)
    vocabulary = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(400)]
    preambles = [" ".join(rng.choice(vocabulary, 100)) for _ in range(3)]
    queries = []
    for i in range(150):
        tail = rng.choice(vocabulary, 20).tolist()
        queries.append(f"{preambles[i % 3]} {' '.join(tail)}")
        for at in rng.integers(0, 20, 3):
            tail[at] = rng.choice(vocabulary)
        queries.append(f"{preambles[i % 3]} {' '.join(tail)}")
    labels = group_queries(queries).labels
    near = [(i, i + 1) for i in range(0, 300, 2) if similarity(queries[i], queries[i + 1]) >= NEAR_DUPLICATE]
    assert len(near) > 100
    assert [(i, j) for i, j in near if labels[i] != labels[j]] == []


TEXTS = st.lists(
    st.builds(
        lambda base, edit, number: base.replace("12", str(number)).replace("at", edit),
        st.sampled_from([COWS, SHIP, *FILL]),
        st.sampled_from(["at", "At", "near", "before"]),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=25,
)


@given(TEXTS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_groups_do_not_depend_on_the_order(queries: list[str], random: object) -> None:
    order = list(range(len(queries)))
    random.shuffle(order)  # type: ignore[attr-defined]
    straight = group_queries(queries).labels
    shuffled = np.empty(len(queries), dtype=np.int64)
    shuffled[order] = group_queries([queries[i] for i in order]).labels
    assert partition(shuffled) == partition(straight)
    first = list(dict.fromkeys(straight.tolist()))
    assert first == sorted(first)  # numbered by first appearance
    for i, j in itertools.combinations(range(len(queries)), 2):
        if normalise(queries[i]) == normalise(queries[j]):
            assert straight[i] == straight[j]


GROUPS = st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda g: len(set(g)) > 1)


@given(GROUPS, st.floats(0.05, 0.95), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_group_is_never_cut(groups: list[int], share: float, seed: int) -> None:
    keys, labels = [f"k{i}" for i in range(len(groups))], np.array(groups)
    mask = assign_test(keys, labels, share, seed)
    assert 0 < mask.sum() < len(groups)
    assert all(len(set(mask[labels == g])) == 1 for g in set(groups))
    assert (assign_test(keys, labels, share, seed) == mask).all()
    folds = assign_folds(keys, labels, 2, seed)
    assert set(folds.tolist()) == {0, 1}
    assert all(len(set(folds[labels == g])) == 1 for g in set(groups))


def test_the_share_is_about_what_was_asked_for() -> None:
    keys = [f"k{i}" for i in range(1000)]
    single = np.arange(1000)
    assert {int(assign_test(keys, single, 0.2, s).sum()) for s in range(20)} == {200}
    # One group of 300 among single queries: .2 can be met without it, whatever the seed says.
    large = np.concatenate([np.zeros(30, dtype=np.int64), np.arange(1, 21)])
    shares = [float(assign_test(keys[:50], large, 0.2, seed).mean()) for seed in range(100)]
    assert (min(shares), max(shares)) == (pytest.approx(0.2), pytest.approx(0.2))


def test_seeds_differ_and_keys_decide() -> None:
    keys, groups = [f"k{i}" for i in range(200)], np.arange(200)
    masks = [assign_test(keys, groups, 0.3, seed) for seed in range(4)]
    assert all((a != b).any() for a, b in itertools.combinations(masks, 2))
    back = assign_test(keys[::-1], groups, 0.3, 0)[::-1]
    assert (back == masks[0]).all()


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        assign_test(["a", "b"], np.array([0, 1]), share, 0)


def test_too_few_queries() -> None:
    with pytest.raises(DataError, match="at least two unlike"):
        assign_test(["a", "b"], np.array([0, 0]), 0.5, 0)
    with pytest.raises(DataError, match="3 folds need at least 3"):
        assign_folds(["a", "b"], np.array([0, 1]), 3, 0)
    with pytest.raises(DataError):
        split(log_of(["one"]))
    with pytest.raises(ConfigError, match="'row'"):
        split(make_log(5), by="row")


def test_folds_are_even() -> None:
    sizes = np.bincount(assign_folds([f"k{i}" for i in range(103)], np.arange(103), 5, 0))
    assert sorted(sizes.tolist()) == [20, 20, 21, 21, 21]


def test_split_of_a_log_keeps_rows_and_does_not_depend_on_their_order() -> None:
    log = make_log(60, replicates=2)
    order = np.random.default_rng(0).permutation(len(log))
    train, test = split(log, test=0.25, seed=3)
    assert len(train) + len(test) == len(log)
    assert not set(train["query_id"].to_pylist()) & set(test["query_id"].to_pylist())
    assert set(train["split"].to_pylist()) == {"train"}
    assert set(test["split"].to_pylist()) == {"test"}
    assert set(test["query_id"].to_pylist()) == set(
        split(log.take(pa.array(order)), test=0.25, seed=3)[1]["query_id"].to_pylist()
    )
    leaks = find_leaks(pa.concat_tables([train, test]))
    assert (leaks.exact, leaks.near) == (0, 0)


def test_split_without_a_split_column() -> None:
    train, test = split(log_of([COWS, SHIP, *FILL]), test=0.3)
    assert (train["split"][0].as_py(), test["split"][0].as_py()) == ("train", "test")


def test_write_split_and_folds(tmp_path: Path) -> None:
    oirl.write_log(make_log(50, replicates=1), tmp_path / "log.parquet")
    report = write_split(tmp_path / "log.parquet", tmp_path / "out", test=0.2)
    parts = {Path(p["file"]).name: p for p in report["parts"]}
    assert parts["train.parquet"]["rows"] + parts["test.parquet"]["rows"] == 150
    assert parts["train.parquet"]["queries"] + parts["test.parquet"]["queries"] == 50
    for part in parts.values():
        log = oirl.read_log(part["file"])
        assert (len(log), len(set(log["query_id"].to_pylist()))) == (part["rows"], part["queries"])
    write_split(tmp_path / "log.parquet", tmp_path / "folds", folds=3)
    held_out = [oirl.read_log(tmp_path / "folds" / f"fold-{f}" / "test.parquet") for f in range(3)]
    ids = [set(t["query_id"].to_pylist()) for t in held_out]
    assert sum(map(len, held_out)) == 150
    assert len(set.union(*ids)) == sum(map(len, ids)) == 50
    for f in range(3):
        train = oirl.read_log(tmp_path / "folds" / f"fold-{f}" / "train.parquet")
        assert set(train["query_id"].to_pylist()) == set.union(*ids) - ids[f]
    with pytest.raises(ConfigError, match="at least 2"):
        write_split(tmp_path / "log.parquet", tmp_path / "folds", folds=1)


def test_fewer_folds_leave_no_folds_of_another_split(tmp_path: Path) -> None:
    """A pattern such as fold-*/test.parquet must not mix two splits."""
    oirl.write_log(make_log(30, replicates=1), tmp_path / "log.parquet")
    write_split(tmp_path / "log.parquet", tmp_path / "out", folds=4)
    write_split(tmp_path / "log.parquet", tmp_path / "out", folds=2, seed=1)
    held_out = oirl.read_log(tmp_path / "out" / "fold-*" / "test.parquet")
    assert len(held_out) == 90


def test_leaks_by_hand() -> None:
    queries = [COWS, SHIP, FILL[0], FILL[1], COWS.upper(), SHIP.replace("7", "9"), FILL[2], FILL[0], FILL[3]]
    sides = ["train"] * 4 + ["test"] * 3 + ["train", None]
    leaks = find_leaks(log_of(queries, split=sides))
    # COWS stands on both sides, counted on each; SHIP has a near duplicate on the other side, counted on each.
    assert leaks.to_dict() == {"exact": 2, "near": 2, "queries": 7}
    assert "2 of 7 queries stand under another value of `split` too" in str(leaks.warning())


@pytest.mark.parametrize("sides", [[None] * 3, ["train"] * 3])
def test_one_side_has_no_leaks(sides: list[str | None]) -> None:
    leaks = find_leaks(log_of([COWS, COWS, SHIP], split=sides))
    assert (leaks.exact, leaks.near, leaks.warning()) == (0, 0, None)


def test_rows_to_learn_from_and_rows_to_evaluate_on() -> None:
    def sides(of: pa.Table) -> list[str | None]:
        return of["split"].to_pylist()

    log = log_of(["a", "b", "c", "d"], split=["train", "test", None, "dev"])
    assert sides(splits.train_rows(log)) == ["train"]
    assert sides(splits.test_rows(log)) == ["test"]
    assert sides(splits.test_rows(log.filter(pa.array([True, False, True, True])))) == [None, "dev"]
    bare = log.filter(pa.array([False, False, True, False]))
    assert sides(splits.train_rows(bare)) == sides(splits.test_rows(bare)) == [None]
    unmarked = log.filter(pa.array([False, True, True, True]))
    assert sides(splits.train_rows(unmarked)) == [None, "dev"]
    test_only = log.filter(pa.array([False, True, False, False]))
    assert sides(splits.train_rows(test_only)) == ["test"]
    only = log.filter(pa.array([True, False, False, False]))
    assert sides(splits.test_rows(only)) == ["train"]


@pytest.mark.real_data
def test_the_published_split_of_svamp_leaks(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "prompt_oirl_llama2" / "svamp.parquet"
    report = oirl.import_log(source, tmp_path / "log.parquet")
    assert (report.rows_kept, report.n_queries) == (165_040, 3_961)
    log = oirl.read_log(tmp_path / "log.parquet", ["query_id", "query", "split"])
    test = set(log["query"].filter(pa.array([s == "test" for s in log["split"].to_pylist()])).to_pylist())
    leaks = find_leaks(log)
    assert leaks.exact >= 2 * len(test)  # every test query also stands in the train part
    train, held_out = split(log)
    healed = find_leaks(pa.concat_tables([train, held_out]))
    assert (healed.exact, healed.near) == (0, 0)
