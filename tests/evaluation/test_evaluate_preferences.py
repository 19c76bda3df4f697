"""The evaluation on preference pairs: by hand with known rewards, bins that partition, annotators, learning curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_queries
from scipy.special import expit
from scipy.stats import spearmanr

from oirl import BradleyTerryRewardModel, ResponseRewardModel
from oirl.errors import DataError, NotFittedError
from oirl.evaluation.preferences import annotator_agreement, evaluate_preferences, learning_curve
from oirl.logs.pairs import EMPTY, SAME, group_pairs, make_pairs, mark_pairs
from oirl.records import PREFERENCE_SCHEMA
from oirl.rewards.base import Estimates
from oirl.rewards.training import SeenQueries
from oirl.statistics.intervals import success_interval

CONTRACT = {"pair_accuracy", "ci_low", "ci_high", "brier", "ece", "n_pairs"}
BIN = {"low", "high", "n_pairs", "pair_accuracy", "ci_low", "ci_high"}


class Known:
    """A fitted model whose rewards are a function of the response."""

    def __init__(self, reward: Callable[[str], float], seen: Sequence[str] = (), **data: Any) -> None:
        self.reward = reward
        self.seen_ = SeenQueries.of(seen)
        self.data_: dict[str, Any] = data

    def estimate(self, queries: Sequence[str], responses: Sequence[str]) -> Estimates:
        found = np.array([self.reward(r) for r in responses], dtype=float)
        return Estimates(found, np.zeros(len(found)))


def number(response: str) -> float:
    """Return the number that a response begins with."""
    return float(response.split()[0])


def pairs_of(
    rows: Sequence[tuple[str, str]], queries: Sequence[str] | None = None, **columns: Sequence[Any]
) -> pa.Table:
    """Return pairs of (chosen, rejected), each of its own query if none are given."""
    names = make_queries(len(rows)) if queries is None else queries
    return pa.Table.from_pylist(
        [
            {"pair_id": str(i), "query": q, "chosen": c, "rejected": r} | {k: v[i] for k, v in columns.items()}
            for i, (q, (c, r)) in enumerate(zip(names, rows, strict=True))
        ],
        PREFERENCE_SCHEMA,
    )


def made(n: int = 80, seed: int = 0) -> pa.Table:
    """Return pairs with random rewards, lengths, margins and three sources."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        a, b = rng.normal(size=2)
        rows.append(tuple(f"{v:.3f} {'x' * rng.integers(0, 30)} {i}" for v in (a + 0.7, b)))
    names = rng.choice(["chat", "code", "safety"], n).tolist()
    return pairs_of(rows, margin=rng.exponential(size=n).tolist(), source=names)


PAIRS = made()
HAND = pairs_of([("3 a", "1 bb"), ("1 cccc", "2 d"), ("2 ee", "2 fff"), ("1.5 g", "1 h")])
"""Differences of 2, −1, 0 and ½; the chosen one is longer in the second pair and in the fourth."""


def test_values_by_hand() -> None:
    found = evaluate_preferences(Known(number), HAND)
    difference = np.array([2, -1, 0, 0.5])
    assert found.model["pair_accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found.model["ties"] == 0.25
    assert found.model["brier"] == pytest.approx(np.mean((1 - expit(difference)) ** 2))
    assert found.model["log_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-difference))))
    expected = success_interval(np.array([1, 0, 0.5, 1]))
    assert (found.model["ci_low"], found.model["ci_high"]) == pytest.approx(expected[1:])
    assert (found.n_pairs, found.model["n_pairs"], found.n_queries) == (4, 4, 4)
    lengths = [3, 4, 6, 3, 4, 5, 5, 3]
    rewards = [3, 1, 1, 2, 2, 2, 1.5, 1]
    assert found.length["correlation"] == pytest.approx(spearmanr(rewards, lengths).statistic)
    assert (found.length["chosen_longer"]["pair_accuracy"], found.length["chosen_longer"]["n_pairs"]) == (0.5, 2)
    assert (found.length["chosen_shorter"]["pair_accuracy"], found.length["chosen_shorter"]["n_pairs"]) == (0.75, 2)


def test_the_document_keeps_the_contract() -> None:
    document = evaluate_preferences(Known(number), PAIRS).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["model"].keys() >= CONTRACT
    assert document["warnings"] == []
    assert document["model"]["ci_low"] < document["model"]["pair_accuracy"] < document["model"]["ci_high"]
    assert 0.5 < document["model"]["pair_accuracy"] < 1


def test_the_accuracy_falls_to_one_less_it_where_rewards_are_turned_round() -> None:
    one, other = (evaluate_preferences(Known(f), PAIRS) for f in (number, lambda r: -number(r)))
    assert one.model["pair_accuracy"] == pytest.approx(1 - other.model["pair_accuracy"])  # type: ignore[operator]
    flat = evaluate_preferences(Known(lambda r: 1.0), PAIRS)
    assert (flat.model["pair_accuracy"], flat.model["ties"], flat.model["brier"]) == (0.5, 1.0, 0.25)
    assert flat.length["correlation"] is None
    json.dumps(flat.to_dict(), allow_nan=False)


def test_a_constant_reward_more_changes_nothing() -> None:
    one, other = (evaluate_preferences(Known(f), PAIRS).to_dict() for f in (number, lambda r: number(r) + 64))
    assert one["model"] == pytest.approx(other["model"])


@pytest.mark.parametrize(
    ("share", "prefers", "right"),
    [(0.7, "longer", [0, 1, 0, 1]), (0.5, "longer", [0, 1, 0, 1]), (0.3, "shorter", [1, 0, 1, 0])],
)
def test_the_null_of_length_by_hand(share: float, prefers: str, right: list[float]) -> None:
    rows = [("3 a", "1 bb"), ("1 cccc", "2 d"), ("2 ee", "2 fff"), ("1.5 gg", "1 h")]
    null = evaluate_preferences(Known(number, longer_preferred=share), pairs_of(rows)).null_models["length"]
    gain = np.array([1, 0, 0.5, 1]) - right
    half = 1.959964 * gain.std(ddof=1) / 2
    assert null["prefers"] == prefers
    assert null["pair_accuracy"] == pytest.approx(np.mean(right))
    assert [null["gain"], null["gain_ci_low"], null["gain_ci_high"]] == pytest.approx(
        [gain.mean(), gain.mean() - half, gain.mean() + half]
    )


def test_equal_lengths_are_half_right_by_length() -> None:
    null = evaluate_preferences(Known(number), pairs_of([("2 a", "1 b"), ("2 aa", "1 b")])).null_models["length"]
    assert null["pair_accuracy"] == pytest.approx(0.75)
    assert null["gain"] == pytest.approx(0.25)


def test_a_model_that_counts_letters_gains_nothing_over_length() -> None:
    null = evaluate_preferences(Known(len), PAIRS).null_models["length"]
    assert null["gain"] == null["gain_ci_low"] == null["gain_ci_high"] == 0


@pytest.mark.parametrize("key", ["by_margin", "by_length_difference"])
def test_bins_partition_the_pairs(key: str) -> None:
    document = evaluate_preferences(Known(number), PAIRS).to_dict()
    bins = document[key]
    assert len(bins) == 4
    assert all(b.keys() == BIN for b in bins)
    assert sum(b["n_pairs"] for b in bins) == 80
    total = sum(b["n_pairs"] * b["pair_accuracy"] for b in bins) / 80
    assert total == pytest.approx(document["model"]["pair_accuracy"])
    values = np.array(
        PAIRS["margin"].to_pylist()
        if key == "by_margin"
        else [len(r["chosen"]) - len(r["rejected"]) for r in PAIRS.to_pylist()]
    )
    for b in bins:
        assert b["n_pairs"] == ((values >= b["low"]) & (values <= b["high"])).sum()
    assert all(a["high"] < b["low"] for a, b in pairwise(bins))
    if key == "by_margin":
        assert [b["n_pairs"] for b in bins] == [20] * 4


def test_bins_by_hand() -> None:
    """Of margins 1, 1, 1, 1, 1, 2 most quarters are the same: two kinds are left at most."""
    rows = [("2 a", "1 b"), ("1 a", "2 b"), ("2 c", "1 d"), ("2 e", "1 f"), ("2 g", "2 h"), ("1 i", "2 j")]
    found = evaluate_preferences(Known(number), pairs_of(rows, margin=[1, 1, 1, 1, 1, 2]))
    assert sum(b["n_pairs"] for b in found.by_margin) == 6
    assert found.by_margin[0]["low"] == 1
    assert found.by_margin[-1]["high"] == 2
    even = evaluate_preferences(Known(number), pairs_of(rows[:4], margin=[4.0, 1.0, 3.0, 2.0]))
    assert [(b["low"], b["pair_accuracy"]) for b in even.by_margin] == [(1, 0), (2, 1), (3, 1), (4, 1)]


def test_margins_that_are_not_known_or_all_alike_have_no_bins() -> None:
    rows = [("2 a", "1 b"), ("1 a", "2 bb"), ("2 c", "1 d")]
    for margin in ([1.0, None, 2.0], [1.0, 1.0, 1.0], [None] * 3):
        assert evaluate_preferences(Known(number), pairs_of(rows, margin=margin)).by_margin == []


def test_subsets_count_alike_whatever_their_size() -> None:
    rows = [("2 a", "1 b"), ("2 c", "1 d"), ("2 e", "1 f"), ("1 g", "2 h"), ("1 i", "2 j"), ("2 k", "2 l")]
    found = evaluate_preferences(Known(number), pairs_of(rows, source=["chat"] * 4 + ["code"] + [None]))
    subsets = found.subsets["subsets"]
    assert {name: s["pair_accuracy"] for name, s in subsets.items()} == {"": 0.5, "chat": 0.75, "code": 0.0}
    assert {name: s["n_pairs"] for name, s in subsets.items()} == {"": 1, "chat": 4, "code": 1}
    assert found.subsets["mean"] == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert found.model["pair_accuracy"] == pytest.approx(3.5 / 6)
    assert evaluate_preferences(Known(number), pairs_of(rows, source=["chat"] * 6)).subsets == {}


def test_annotators_by_hand() -> None:
    """A: two say x, one y: of six ordered pairs of judgments two agree. B: both agree. C was judged once."""
    rows = [("x", "y"), ("X ", "y"), ("y", "x"), ("u", "v"), ("u", "v"), ("s", "t")]
    queries = ["A?", "a?", "A?", "B?", "B?", "C?"]
    found = annotator_agreement(pairs_of(rows, queries))
    assert found == {
        "n_comparisons": 2,
        "n_judgments": 5,
        "agreement": pytest.approx((2 + 2) / (6 + 2)),
        "ceiling": pytest.approx((2 + 2) / 5),
    }
    assert evaluate_preferences(Known(len), pairs_of(rows, queries)).agreement == found


def test_annotators_who_never_judge_the_same_have_no_agreement() -> None:
    assert annotator_agreement(PAIRS) is None
    unlike = pairs_of([("x", "y"), ("x", "z"), ("x", "y")], ["A?", "A?", "B?"])
    assert annotator_agreement(unlike) is None
    against = pairs_of([("x", "y"), ("y", "x")], ["A?", "A?"])
    assert annotator_agreement(against) == {"n_comparisons": 1, "n_judgments": 2, "agreement": 0.0, "ceiling": 0.5}


def test_no_model_beats_the_ceiling_of_annotators() -> None:
    rng = np.random.default_rng(0)
    rows, queries = [], []
    for i, query in enumerate(make_queries(30)):
        for _ in range(4):
            texts = (f"1 a {i}", f"2 b {i}")
            rows.append(texts if rng.random() < 0.3 else texts[::-1])
            queries.append(query)
    pairs = pairs_of(rows, queries)
    agreement = annotator_agreement(pairs)
    assert agreement is not None
    votes: dict[str, int] = {}
    for row in pairs.to_pylist():
        votes[row["chosen"]] = votes.get(row["chosen"], 0) + 1
    best = evaluate_preferences(Known(lambda r: votes.get(r, 0)), pairs)
    assert best.model["pair_accuracy"] == pytest.approx(agreement["ceiling"])
    assert evaluate_preferences(Known(number), pairs).model["pair_accuracy"] <= agreement["ceiling"]  # type: ignore[operator]


def test_intervals_are_clustered_by_query() -> None:
    """The same pair of one query ten times over is no more evidence than one."""
    rows = [(f"{2 - i % 2} a", "1.5 b") for i in range(40)]
    once = evaluate_preferences(Known(number), pairs_of(rows))
    many = evaluate_preferences(Known(number), pairs_of(rows * 10, make_queries(40) * 10))
    for name in ("pair_accuracy", "ci_low", "ci_high"):
        assert many.model[name] == pytest.approx(once.model[name])
    null, of_many = once.null_models["length"], many.null_models["length"]
    assert of_many["gain_ci_low"] == pytest.approx(null["gain_ci_low"])


def test_reliability_shows_each_pair_in_both_orders() -> None:
    rows = [("2 a", "1 b")] * 9 + [("1 a", "2 b")] * 3
    bins = evaluate_preferences(Known(number), pairs_of(rows)).reliability
    assert [b["predicted"] for b in bins] == pytest.approx([expit(-1), expit(1)])
    assert [b["observed"] for b in bins] == pytest.approx([3 / 12, 9 / 12])
    assert [b["runs"] for b in bins] == [12, 12]


# What is read, told and refused ---------------------------------------------------------------------------


def test_pairs_marked_test_are_used() -> None:
    parts = [mark_pairs(PAIRS.slice(0, 50), "train"), mark_pairs(PAIRS.slice(50, 30), "test")]
    found = evaluate_preferences(Known(number), pa.concat_tables(parts))
    assert found.model == evaluate_preferences(Known(number), PAIRS.slice(50, 30)).model
    assert found.n_pairs == 30


def test_training_queries_and_few_queries_are_told() -> None:
    model = Known(number, seen=PAIRS["query"].to_pylist()[:9])
    (warning,) = evaluate_preferences(model, PAIRS).warnings
    assert "of the 80 queries 9 stood in the training log" in warning
    assert any("fewer than 20" in w for w in evaluate_preferences(Known(number), HAND).warnings)


def test_pairs_that_say_nothing_are_left_out_and_counted() -> None:
    rows = [("2 a", "1 b"), ("1 c", "1 c"), ("", "1 d")]
    found = evaluate_preferences(Known(number), pairs_of(rows))
    assert (found.n_pairs, found.left_out) == (1, {SAME: 1, EMPTY: 1})


@pytest.mark.parametrize("rows", [[("2 a", "1 b")], [("2 a", "1 b"), ("2 c", "1 d")]], ids=["one", "two"])
def test_few_pairs_are_strict_json(rows: list[tuple[str, str]]) -> None:
    document = evaluate_preferences(Known(number), pairs_of(rows)).to_dict()
    json.dumps(document, allow_nan=False)
    assert document["model"]["pair_accuracy"] == 1
    assert document["model"]["ci_low"] < 0.5  # so few are no proof


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")])
def test_a_margin_that_is_no_number_is_strict_json(odd: float) -> None:
    margins = [odd, *PAIRS["margin"].to_pylist()[1:]]
    at = PREFERENCE_SCHEMA.names.index("margin")
    document = evaluate_preferences(Known(number), PAIRS.set_column(at, "margin", pa.array(margins))).to_dict()
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("model", "pairs", "kind", "message"),
    [
        (BradleyTerryRewardModel(), PAIRS, NotFittedError, "fitted"),
        (Known(number), PAIRS.slice(0, 0), DataError, "no pair to evaluate on"),
        (Known(number), pairs_of([("1 a", "1 a")]), DataError, "no pair to evaluate on .1: chosen and rejected"),
        (Known(number), PAIRS.drop_columns(["chosen"]), DataError, "chosen"),
    ],
)
def test_bad_input_is_refused(model: Any, pairs: pa.Table, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        evaluate_preferences(model, pairs)


# Fitted models --------------------------------------------------------------------------------------------


def counting(texts: list[str]) -> np.ndarray:
    return np.array([[t.count("good"), t.count("bad")] for t in texts], dtype=float)


def worded(n: int, seed: int = 0, per_query: int = 1) -> pa.Table:
    """Return pairs of which the response with more good words is chosen, with some noise."""
    rng = np.random.default_rng(seed)
    rows, queries = [], [q for q in make_queries(n, seed) for _ in range(per_query)]
    for i in range(len(queries)):
        a, b = rng.integers(0, 5, 2)
        texts = [f"{'good ' * a}it is {i}", f"{'good ' * b}it was {i}"]
        rows.append(tuple(texts if rng.random() < expit(2.0 * (a - b)) else texts[::-1]))
    return pairs_of(rows, queries)


def test_a_fitted_model_knows_more_than_length() -> None:
    model = BradleyTerryRewardModel(embedder=counting).fit(worded(150))
    found = evaluate_preferences(model, worded(100, seed=3))
    assert found.warnings == []
    assert found.null_models["length"]["prefers"] == "longer"
    assert found.model["pair_accuracy"] > 0.75  # type: ignore[operator]
    assert found.model["ece"] < 0.1  # type: ignore[operator]


def test_a_model_of_correctness_prefers_what_it_thinks_right() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i, query in enumerate(make_queries(120)):
        a, b = (int(x) for x in rng.integers(10, 40, 2))
        for k in range(2):
            text = f"Step 1: {a} + {b} = {a + b + k}. The answer is {a + b + k}."
            row = {"query_id": f"q{i}", "query": query, "prompt_id": "p", "prompt": "{query}", "response": text}
            rows.append(row | {"correct": k == 0})
    log = pa.Table.from_pylist(rows)
    model = ResponseRewardModel(params={"strength": 3.0}).fit(log.slice(0, 160))
    pairs, _ = make_pairs(log.slice(160))
    found = evaluate_preferences(model, pairs)
    assert found.n_pairs == 40
    assert found.model["pair_accuracy"] > 0.95  # type: ignore[operator]
    assert found.null_models["length"]["gain_ci_low"] > 0.2


class Recorded:
    """A model that keeps what it was fitted to and rewards by the number of pairs that it has seen."""

    def __init__(self, fits: list[list[str]]) -> None:
        self.fits = fits

    def clone(self) -> Recorded:
        return Recorded(self.fits)

    def fit(self, pairs: pa.Table) -> Recorded:
        self.fits.append(pairs["pair_id"].to_pylist())
        return self

    def estimate(self, queries: Sequence[str], responses: Sequence[str]) -> Estimates:
        self.fits[-1] += [f"asked {q}" for q in queries]
        return Estimates(counting(list(responses))[:, 0], np.zeros(len(responses)))


def test_a_learning_curve_uses_whole_groups_of_other_folds() -> None:
    pairs = worded(40, per_query=3)
    fits: list[list[str]] = []
    curve = learning_curve(Recorded(fits), pairs, shares=(0.1, 0.5, 1.0))  # type: ignore[arg-type]
    assert len(fits) == 5 * 3
    group = dict(zip(pairs["pair_id"].to_pylist(), group_pairs(pairs).labels.tolist(), strict=True))
    members = {g: {p for p, of in group.items() if of == g} for g in group.values()}
    of_query = {r["query"]: r["pair_id"] for r in pairs.to_pylist()}
    tested: list[set[str]] = []
    for f in range(0, 15, 3):
        learned = [{x for x in fit if not x.startswith("asked ")} for fit in fits[f : f + 3]]
        asked = [{x.removeprefix("asked ") for x in fit if x.startswith("asked ")} for fit in fits[f : f + 3]]
        assert learned[0] < learned[1] < learned[2]
        assert asked[0] == asked[1] == asked[2]
        for part in learned:
            assert all(members[group[p]] <= part for p in part)
        held_out = {p for q in asked[0] for p in members[group[of_query[q]]]}
        assert learned[2] == set(group) - held_out
        tested.append(held_out)
    assert set.union(*tested) == set(group)
    assert sum(map(len, tested)) == len(group)
    means = [np.mean([sum(not x.startswith("asked ") for x in fits[f + s]) for f in range(0, 15, 3)]) for s in range(3)]
    assert [c["n_pairs"] for c in curve] == pytest.approx(means)
    assert curve[2]["n_pairs"] == pytest.approx(0.8 * 120)
    # What is judged is the same at every share, and by this model alike.
    queries, chosen, rejected = (pairs[name].to_pylist() for name in ("query", "chosen", "rejected"))
    right = (np.sign(counting(chosen)[:, 0] - counting(rejected)[:, 0]) + 1) / 2
    assert [c["pair_accuracy"] for c in curve] == pytest.approx([right.mean()] * 3)
    low, high = success_interval(right, group_pairs(pairs).labels)[1:]
    assert (curve[0]["ci_low"], curve[0]["ci_high"]) == pytest.approx((low, high))
    assert len(queries) == 120


def test_a_learning_curve_grows_and_is_the_same_again() -> None:
    pairs = worded(150)
    model = BradleyTerryRewardModel(params={"strength": 10.0})
    curve = learning_curve(model, pairs, shares=(0.05, 0.3, 1.0))
    assert [c["n_pairs"] for c in curve] == sorted(c["n_pairs"] for c in curve)
    assert curve[-1]["pair_accuracy"] > curve[0]["pair_accuracy"] + 0.05
    assert all(c["ci_low"] <= c["pair_accuracy"] <= c["ci_high"] for c in curve)
    assert learning_curve(model, pairs, shares=(0.05, 0.3, 1.0)) == curve
    assert learning_curve(model, pairs, shares=(0.05, 0.3, 1.0), seed=1) != curve
    assert not hasattr(model, "data_")  # the model given learns nothing itself


def test_the_whole_share_is_what_cross_fitting_finds() -> None:
    pairs = worded(100)
    model = BradleyTerryRewardModel(embedder=counting).fit(pairs)
    (last,) = learning_curve(model, pairs, shares=(1.0,))
    assert last["pair_accuracy"] == pytest.approx(model.metrics_["pair_accuracy"], abs=0.05)


@pytest.mark.parametrize("n", [1, 4])
def test_a_learning_curve_of_too_few_queries_is_refused(n: int) -> None:
    with pytest.raises(DataError):
        learning_curve(BradleyTerryRewardModel(embedder=counting), worded(n))


def test_a_learning_curve_of_nothing_is_refused() -> None:
    with pytest.raises(DataError):
        learning_curve(BradleyTerryRewardModel(embedder=counting), PREFERENCE_SCHEMA.empty_table())
