"""Bradley-Terry models of responses on preferences with known probabilities, their symmetries, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_queries
from scipy.special import expit

from oirl import BradleyTerryRewardModel, load
from oirl.errors import ConfigError, DataError, ModelFileError, NotFittedError, UnknownNameError
from oirl.logs.pairs import EMPTY, SAME
from oirl.records import PREFERENCE_SCHEMA
from oirl.rewards.preferences import PairedResponses, conform_pairs, preference_metrics

FAST: dict[str, dict[str, Any]] = {
    "linear": {"strength": 1.0},
    "classifier": {"strength": 1.0},
    "xgboost": {"rounds": 40, "colsample": 1.0},
    "mlp": {"epochs": 40, "learning_rate": 5e-3},
}
MODELS = sorted(FAST)


def counting(texts: list[str]) -> np.ndarray:
    return np.array([[t.count("good"), t.count("bad")] for t in texts], dtype=float)


def reward_of(texts: list[str]) -> np.ndarray:
    return counting(texts) @ (1.0, -0.5)


def make_responses(n: int, seed: int) -> list[str]:
    """Return texts of "good" and "bad" words, all different."""
    counts = np.random.default_rng(seed).integers(0, 4, (n, 2))
    return [f"{'good ' * a}{'bad ' * b}word {seed} {i}" for i, (a, b) in enumerate(counts.tolist())]


def table_of(queries: list[str], chosen: list[str], rejected: list[str], margin: Any = None) -> pa.Table:
    margins = [None] * len(queries) if margin is None else [float(m) for m in margin]
    rows = zip(queries, chosen, rejected, margins, strict=True)
    names = ("query", "chosen", "rejected", "margin")
    return pa.Table.from_pylist(
        [{"pair_id": str(i), **dict(zip(names, row, strict=True))} for i, row in enumerate(rows)], PREFERENCE_SCHEMA
    )


def make_preferences(n: int, *, per_query: int = 3, seed: int = 0, noise: bool = True) -> pa.Table:
    """Return pairs in which one text is preferred with σ(its reward − the other's); without noise always the better."""
    rng = np.random.default_rng([seed, 1])
    queries = [q for q in make_queries(n, seed) for _ in range(per_query)]
    a, b = make_responses(len(queries), seed), make_responses(len(queries), seed + 1000)
    difference = reward_of(a) - reward_of(b)
    ahead = rng.random(len(a)) < expit(difference) if noise else difference > 0
    pairs = [(x, y) if first else (y, x) for x, y, first in zip(a, b, ahead, strict=True)]
    kept = [noise or d != 0 for d in difference]
    rows = [(q, *p) for q, p, keep in zip(queries, pairs, kept, strict=True) if keep]
    return table_of(*(list(c) for c in zip(*rows, strict=True)))


def sides(pairs: pa.Table) -> tuple[list[str], list[str], list[str]]:
    return pairs["query"].to_pylist(), pairs["chosen"].to_pylist(), pairs["rejected"].to_pylist()


def swapped(pairs: pa.Table) -> pa.Table:
    names = [{"chosen": "rejected", "rejected": "chosen"}.get(n, n) for n in pairs.column_names]
    return pairs.rename_columns(names).select(PREFERENCE_SCHEMA.names)


def difference_of(model: BradleyTerryRewardModel, pairs: pa.Table) -> np.ndarray:
    queries, chosen, rejected = sides(pairs)
    return model.predict_reward(queries, chosen) - model.predict_reward(queries, rejected)


def fit(model: str = "linear", pairs: pa.Table | None = None, **options: Any) -> BradleyTerryRewardModel:
    options = {"embedder": counting, "params": FAST[model], **options}
    return BradleyTerryRewardModel(model, **options).fit(SMALL if pairs is None else pairs)


SMALL, NEW, SURE = make_preferences(60), make_preferences(60, seed=7), make_preferences(60, seed=7, noise=False)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_orders_unseen_pairs(model: str) -> None:
    assert (difference_of(fit(model, make_preferences(150)), SURE) > 0).mean() > 0.85


def test_probabilities_are_those_that_the_preferences_were_drawn_with() -> None:
    model = fit(pairs=make_preferences(500), params=None)
    queries, a, b = sides(NEW)
    predicted = expit(model.predict_reward(queries, a) - model.predict_reward(queries, b))
    truth = expit(reward_of(a) - reward_of(b))
    assert predicted == pytest.approx(truth, abs=0.08)
    assert np.abs(predicted - truth).mean() < 0.03
    assert (model.metrics_["ece"] or 1) < 0.05


def test_cross_fitted_metrics_are_near_the_best_that_can_be_known() -> None:
    pairs = make_preferences(500)
    model = fit(pairs=pairs, params=None)
    _, a, b = sides(pairs)
    p = expit(np.abs(reward_of(a) - reward_of(b)))
    accuracy, low, high = (model.metrics_[k] or 0 for k in ("pair_accuracy", "ci_low", "ci_high"))
    assert low < accuracy < high
    assert low < p.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p.mean() * (1 - p.mean()) / len(pairs)), rel=0.3)
    assert model.metrics_["log_loss"] == pytest.approx(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(), abs=0.02)
    assert model.metrics_["brier"] == pytest.approx((p * (1 - p)).mean(), abs=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_random_preferences_are_predicted_at_chance(model: str) -> None:
    pairs, accuracies = make_preferences(150, seed=3), []
    queries, a, b = sides(pairs)
    for seed in range(4):
        coin = np.random.default_rng([seed, 2]).random(len(pairs)) < 0.5
        chosen = [x if c else y for x, y, c in zip(a, b, coin, strict=True)]
        rejected = [y if c else x for x, y, c in zip(a, b, coin, strict=True)]
        found = fit(model, table_of(queries, chosen, rejected)).metrics_
        assert found["log_loss"] == pytest.approx(np.log(2), abs=0.03)
        assert found["brier"] == pytest.approx(0.25, abs=0.015)
        accuracies.append(found["pair_accuracy"])
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.04)


def test_scores_that_are_too_sure_of_themselves_are_calibrated() -> None:
    """Almost no penalty and many columns of noise: the scores alone would be far from the probabilities."""

    def noisy(texts: list[str]) -> np.ndarray:
        return np.array(
            [
                [*c, *np.random.default_rng(crc32(t.encode())).normal(size=60)]
                for t, c in zip(texts, counting(texts), strict=True)
            ]
        )

    model = fit(pairs=make_preferences(100), embedder=noisy, params={"strength": 1e-3})
    assert 0 < model._platt[0] < 0.2
    assert (model.metrics_["log_loss"] or 1) < np.log(2) + 0.02


@pytest.mark.parametrize("model", ["linear", "classifier"])
@pytest.mark.parametrize("embedder", [counting, "tfidf", "checks"], ids=["callable", "tfidf", "checks"])
def test_swapping_all_pairs_turns_the_differences_round(model: str, embedder: Any) -> None:
    a, b = fit(model, embedder=embedder), fit(model, swapped(SMALL), embedder=embedder)
    assert difference_of(b, NEW) == pytest.approx(-difference_of(a, NEW), abs=5e-3)
    assert np.abs(difference_of(a, NEW)).mean() > 0.1
    assert b.metrics_["pair_accuracy"] == pytest.approx(a.metrics_["pair_accuracy"], abs=0.01)


def test_the_order_of_the_pairs_does_not_matter() -> None:
    shuffled = SMALL.take(pa.array(np.random.default_rng(0).permutation(len(SMALL))))
    a, b = fit(embedder="tfidf"), fit(pairs=shuffled, embedder="tfidf")
    assert difference_of(b, NEW) == pytest.approx(difference_of(a, NEW), abs=2e-3)
    assert b.metrics_ == pytest.approx(a.metrics_, abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_the_mean_reward_of_the_training_responses_is_about_zero(model: str) -> None:
    found = fit(model)
    queries, chosen, rejected = sides(SMALL)
    rewards = found.predict_reward([*queries, *queries], [*chosen, *rejected])
    assert rewards.mean() == pytest.approx(0, abs=0.1)
    assert rewards.std() > 0.3
    assert found.predict_proba(queries, chosen) == pytest.approx(expit(found.predict_reward(queries, chosen)))


def test_the_mean_of_the_cross_fitted_rewards_is_zero() -> None:
    model = BradleyTerryRewardModel(embedder=counting, params={"strength": 1.0})
    seen = []
    learn = model._learn
    model._learn = lambda *a: seen.append(learn(*a)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    model.fit(SMALL)
    slope, intercept = model._platt
    assert (slope * seen[0][0] + intercept).mean() == pytest.approx(0, abs=1e-9)


def test_classifier_and_linear_agree_where_every_text_stands_in_one_pair() -> None:
    """Sun et al. (2025): both are consistent for the order; here both see two features."""
    pairs = make_preferences(200)
    linear, classifier = (difference_of(fit(m, pairs), NEW) for m in ("linear", "classifier"))
    assert np.corrcoef(linear, classifier)[0, 1] > 0.98
    assert not np.allclose(linear, classifier, atol=1e-3)


def test_spread_falls_with_more_pairs() -> None:
    queries, a, _ = sides(NEW)
    few, many = (fit(pairs=make_preferences(n)).estimate(queries, a).spread.mean() for n in (40, 400))
    assert 0 < many < 0.7 * few


def two_kinds(margin_of_good: float) -> pa.Table:
    """Return pairs decided by one "good", or by one "fine", each 3 to 1, with a margin of its own; the rest is 1."""
    queries = [q for q in make_queries(120) for _ in range(2)]
    rows = []
    for i, query in enumerate(queries):
        word, margin = ("good", margin_of_good) if i % 2 else ("bad", 1.0)
        pair = [f"{word} word {i}", f"word {i} too"]
        wins = (i // 2) % 4 != 0
        rows.append((query, *(pair if wins else pair[::-1]), margin if wins else -margin))
    return table_of(*(list(c) for c in zip(*rows, strict=True)))


def weights(model: BradleyTerryRewardModel) -> np.ndarray:
    """Return how much one "good" and one "bad" add to the score, before calibration."""
    scores = model._committee.scores(model._features.embed(model._features.prepare(["?"] * 3, ["good", "bad", "word"])))
    return (scores[:, :2] - scores[:, 2:]).mean(axis=0)


def test_pairs_with_a_larger_margin_ask_for_a_larger_difference() -> None:
    pairs = two_kinds(5.0)
    plain, margins = (weights(fit(pairs=pairs, margin=m, params={"strength": 1e-2})) for m in ("none", "pairs"))
    assert plain == pytest.approx(np.log(3), abs=0.1)
    # Margins are shares of their mean over all pairs, which is half of (5 + 1)/2, as one pair in four has lost.
    assert margins == pytest.approx(np.log(3) + np.array([5, 1]) / 1.5, abs=0.15)


def test_the_scale_of_margins_does_not_matter() -> None:
    pairs = make_preferences(60)
    a, b = (fit(pairs=table_of(*sides(pairs), margin=np.full(180, m)), margin="pairs") for m in (1.0, 250.0))
    assert difference_of(a, NEW) == pytest.approx(difference_of(b, NEW), abs=1e-4)
    assert not np.allclose(a._committee.members[0].state()["weights"], fit()._committee.members[0].state()["weights"])


@pytest.mark.parametrize(
    ("margin", "column", "message"),
    [
        ("half", np.ones(180), "margin='half'; allowed: none, pairs"),
        ("pairs", None, "margin='pairs', but 180 of 180 pairs have none"),
        ("pairs", np.zeros(180), "not above 0 on average"),
        ("pairs", -np.ones(180), "not above 0 on average"),
        ("pairs", np.r_[np.nan, np.ones(179)], "margin"),
        ("pairs", np.r_[np.inf, np.ones(179)], "margin"),
    ],
    ids=["unknown", "missing", "zero", "negative", "NaN", "infinite"],
)
def test_margins_that_cannot_be_used_are_refused(margin: str, column: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        fit(pairs=table_of(*sides(SMALL), margin=column), margin=margin)


def test_margins_may_be_missing_where_they_are_not_asked_for() -> None:
    assert fit(pairs=table_of(*sides(SMALL), margin=np.zeros(180))).data_["margin"] == "none"


def test_pairs_that_say_nothing_are_left_out_and_counted() -> None:
    queries, chosen, rejected = sides(SMALL)
    more = table_of(
        [*queries, "A?", "B?", "C?", "D?", " "],
        [*chosen, "same", "", "good", " \n", "x"],
        [*rejected, "same", "bad", "", "", "y"],
    )
    model = fit(pairs=more)
    assert model.left_out_ == {SAME: 1, EMPTY: 4}
    assert model.data_["n_pairs"] == 180
    assert model.data_["n_queries"] == 60
    assert difference_of(model, NEW) == pytest.approx(difference_of(fit(), NEW), abs=1e-6)
    assert fit().left_out_ == {}


def test_paired_responses_are_distinct_and_point_back() -> None:
    pairs = table_of(["A?", "A?", "B?"], ["x", "z", "x"], ["y", "x", "y"])
    rows = PairedResponses(pairs)
    assert sorted(zip(rows.queries, rows.responses, strict=True)) == [
        ("A?", "x"), ("A?", "y"), ("A?", "z"), ("B?", "x"), ("B?", "y"),
    ]  # fmt: skip
    for side, name in ((rows.chosen, "chosen"), (rows.rejected, "rejected")):
        assert [(rows.queries[i], rows.responses[i]) for i in side] == list(
            zip(pairs["query"].to_pylist(), pairs[name].to_pylist(), strict=True)
        )


def test_metrics_by_hand() -> None:
    """Right, wrong, undecided: (1 + 0 + ½)/3; each pair counts in both orders."""
    found = preference_metrics(np.array([2.0, -1.0, 0.0]), np.array([0.9, 0.3, 0.5]), np.arange(3))
    assert found["pair_accuracy"] == 0.5
    assert found["brier"] == pytest.approx((0.01 + 0.49 + 0.25) / 3)
    assert found["ece"] == pytest.approx((0.1 + 0.7 + 0.0) / 3)  # sure by .9, .7 and .5; right, wrong and half
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.3, 0.5]).mean())
    assert (found["ci_low"] or 1) < 0.5 < (found["ci_high"] or 0)


def test_the_interval_of_the_accuracy_is_clustered() -> None:
    """Forty pairs of four groups, alike within each, are no more than four pairs."""
    probability = np.repeat([0.9, 0.9, 0.9, 0.1], 10)
    alone = preference_metrics(probability - 0.5, probability, np.arange(40))
    grouped = preference_metrics(probability - 0.5, probability, np.repeat(np.arange(4), 10))
    width = [(m["ci_high"] or 0) - (m["ci_low"] or 0) for m in (alone, grouped)]
    assert alone["pair_accuracy"] == grouped["pair_accuracy"] == 0.75
    assert width[1] > 1.8 * width[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("embedder", [counting, "tfidf", "checks"], ids=["callable", "tfidf", "checks"])
def test_a_saved_model_says_the_same(model: str, embedder: Any, tmp_path: Path) -> None:
    params = {"epochs": 3} if model == "mlp" else FAST[model]
    margins = table_of(*sides(SMALL), margin=np.ones(180))
    found = fit(model, margins, embedder=embedder, margin="pairs", params=params)
    found.save(tmp_path / "m")
    restored = load(tmp_path / "m", embedder=embedder if embedder is counting else None)
    assert type(restored) is BradleyTerryRewardModel
    queries, chosen, _ = sides(NEW)
    a, b = (m.estimate(queries, chosen) for m in (found, restored))
    assert b.reward == pytest.approx(a.reward, abs=1e-6)
    assert b.spread == pytest.approx(a.spread, abs=1e-6)
    assert restored.margin == restored.clone().margin == "pairs"
    assert restored.metrics_ == found.metrics_
    assert restored.seen_.overlap(SMALL["query"].unique().to_pylist()) == (60, 0)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    fit().save(tmp_path / "m")
    file = tmp_path / "m" / "weights.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelFileError, match="SHA-256"):
        load(tmp_path / "m", embedder=counting)


@pytest.mark.parametrize("model", MODELS)
def test_same_seed_same_model(model: str) -> None:
    a, b = fit(model), fit(model).clone().fit(SMALL)
    assert np.array_equal(difference_of(a, NEW), difference_of(b, NEW))
    assert a.metrics_ == b.metrics_


def test_preferences_that_a_model_can_tell_for_sure_stay_finite() -> None:
    pairs = make_preferences(60, noise=False)
    for model in MODELS:
        found = fit(model, pairs)
        assert np.isfinite(difference_of(found, NEW)).all()
        assert all(v is not None and np.isfinite(v) for v in found.metrics_.values())


def test_a_response_of_which_nothing_is_known_gets_a_finite_reward() -> None:
    found = fit(embedder="tfidf").estimate(["水", ""], ["", "½"])
    assert np.isfinite([found.reward, found.spread]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(0, 0), "no pair that says anything .*there are none.*oirl pairs"),
        (lambda t: table_of(["A?"] * 2, ["x", ""], ["x", "y"]), "no pair that says anything .*oirl import"),
        (lambda t: t.slice(0, 3), "at least two unlike queries"),
        (lambda t: t.drop_columns(["rejected"]), "no column 'rejected'"),
        (lambda t: t.set_column(3, "rejected", pa.nulls(len(t), pa.string())), "'rejected' is empty in row 1"),
    ],
    ids=["empty", "nothing said", "one query", "no column", "nulls"],
)
def test_pairs_that_teach_nothing_are_refused(change: Callable[[pa.Table], pa.Table], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit(pairs=change(SMALL))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"folds": 1}, ConfigError, "folds=1.*at least 2"),
        ({"seed": 0.5}, ConfigError, "seed=0.5"),
        ({"model": "clasifier"}, UnknownNameError, "unknown preference-model.*did you mean 'classifier'"),
        ({"params": {"rounds": 3}}, ConfigError, "'linear'.*rounds"),
        ({"params": {"strength": "1"}}, ConfigError, "strength='1'"),
        ({"embedder": 5}, ConfigError, "embedder"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        BradleyTerryRewardModel(**{"embedder": counting, **options}).fit(SMALL)


def test_what_is_not_fitted_says_so() -> None:
    model = BradleyTerryRewardModel(margin="pairs", folds=3)
    with pytest.raises(NotFittedError, match="BradleyTerryRewardModel is not fitted"):
        model.predict_reward(["a"], ["b"])
    assert vars(model.clone()) == vars(model)
    assert model.embedder == "tfidf"


def test_optional_columns_may_be_absent() -> None:
    bare = SMALL.select(["pair_id", "query", "chosen", "rejected"])
    assert conform_pairs(bare).schema == PREFERENCE_SCHEMA
    assert np.array_equal(difference_of(fit(pairs=bare), NEW), difference_of(fit(), NEW))
