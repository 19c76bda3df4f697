"""Learners of scores against their first-order conditions, against scikit-learn, and on problems with a known truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from oirl.errors import ConfigError
from oirl.rewards import network
from oirl.rewards.learners import (
    BoostedLearner,
    ClassifierLearner,
    Comparisons,
    Learner,
    LinearLearner,
    NetworkLearner,
    Verdicts,
    check_above_zero,
    fit_differences,
    fit_logistic,
)

ALL: dict[str, Callable[[], Learner]] = {
    "linear": lambda: LinearLearner(1.0),
    "classifier": lambda: ClassifierLearner(1.0),
    "xgboost": lambda: BoostedLearner(rounds=30),
    "mlp": lambda: NetworkLearner(hidden=(16,), epochs=20, learning_rate=1e-2),
}


def verdicts(n: int = 200, d: int = 4, seed: int = 0) -> tuple[np.ndarray, Verdicts]:
    """Return rows, and verdicts with log-odds x·(1, −1, 0.5, 0, …) + 0.3, one to four runs each."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d)).astype(np.float32)
    runs = rng.integers(1, 5, n)
    return rows, Verdicts(runs, rng.binomial(runs, expit(rows[:, :3] @ (1.0, -1.0, 0.5) + 0.3)))


def pairs_by(reward: np.ndarray, m: int, seed: int = 0, *, noisy: bool) -> Comparisons:
    """Return m comparisons of random rows, of which the one with the higher reward wins, or wins by Bradley-Terry."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, len(reward), m)
    b = (a + rng.integers(1, len(reward), m)) % len(reward)
    ahead = rng.random(m) < expit(reward[a] - reward[b]) if noisy else reward[a] > reward[b]
    return Comparisons(np.where(ahead, a, b), np.where(ahead, b, a))


def order(scores: np.ndarray, target: Comparisons) -> float:
    return float((scores[target.chosen] > scores[target.rejected]).mean())


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_the_gradient_of_logistic_regression_is_zero_at_the_solution(strength: float) -> None:
    rows, target = verdicts()
    w, b = fit_logistic(rows, target.successes / target.runs, target.runs.astype(float), strength)
    error = target.runs * expit(rows @ w.astype(float) + b) - target.successes
    scale = np.abs(target.runs * 0.5 - target.successes).sum()
    assert rows.T.astype(float) @ error + strength * w == pytest.approx(0, abs=1e-3 * scale)
    assert error.sum() + 1e-3 * b == pytest.approx(0, abs=1e-3 * scale)


@pytest.mark.parametrize("margin", [False, True])
def test_the_gradient_on_differences_is_zero_at_the_solution(margin: bool) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(150, 5)).astype(np.float32)
    m = rng.random(150) if margin else None
    w = fit_differences(rows, m, 2.0).astype(float)
    missing = expit(-(rows @ w - (0 if m is None else m)))
    assert 2.0 * w - rows.T.astype(float) @ missing == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("strength", [0.5, 5.0])
def test_equals_scikit_learn_on_verdicts(strength: float) -> None:
    rows, target = verdicts()
    learner = LinearLearner(strength).fit(rows, target, np.arange(200), 0)
    both = np.r_[rows, rows], np.repeat([1, 0], 200), np.r_[target.successes, target.runs - target.successes]
    theirs = LogisticRegression(C=1 / strength, tol=1e-8).fit(both[0], both[1], sample_weight=both[2])
    assert learner.scores(rows) == pytest.approx(theirs.decision_function(rows), abs=2e-3)


@pytest.mark.parametrize("strength", [0.5, 5.0])
def test_equals_scikit_learn_on_differences(strength: float) -> None:
    rows = verdicts()[0]
    target = pairs_by(rows[:, 0] - rows[:, 1], 300, noisy=True)
    learner = LinearLearner(strength).fit(rows, target, np.arange(200), 0)
    x = rows[target.chosen] - rows[target.rejected]
    sign = np.where(np.arange(300) % 2, 1, -1)
    theirs = LogisticRegression(C=1 / strength, tol=1e-8, fit_intercept=False).fit(x * sign[:, None], sign)
    assert learner.scores(rows) == pytest.approx(theirs.decision_function(rows), abs=2e-3)
    assert learner.state()["intercept"].tolist() == [0.0]


@pytest.mark.parametrize("name", ["linear", "classifier", "mlp"])
@pytest.mark.parametrize("paired", [False, True])
def test_sparse_rows_say_what_dense_rows_say(name: str, paired: bool) -> None:
    rows, target = verdicts()
    rows[np.abs(rows) < 0.7] = 0
    given_target = pairs_by(rows[:, 0], 200, noisy=True) if paired else target
    dense = ALL[name]().fit(rows, given_target, np.arange(200) // 4, 3)
    sparse = ALL[name]().fit(sp.csr_matrix(rows), given_target, np.arange(200) // 4, 3)
    assert sparse.scores(sp.csr_matrix(rows)) == pytest.approx(dense.scores(rows), abs=1e-3)


def test_recovers_the_weights_of_simulated_bradley_terry_data() -> None:
    rows = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    truth = np.array([1.0, -2.0, 0.5, 0.0])
    learner = LinearLearner(0.3).fit(rows, pairs_by(rows @ truth, 20_000, noisy=True), np.arange(2000), 0)
    assert learner.state()["weights"] == pytest.approx(truth, abs=0.08)


def test_a_margin_asks_for_a_larger_difference() -> None:
    """Two rows apart by 1, preferred 3 to 1: without margin w = log 3, with a margin m it is log 3 + m."""
    rows = np.array([[1.0], [0.0]], dtype=np.float32)
    pairs = np.tile([0, 0, 0, 1], 1000), np.tile([1, 1, 1, 0], 1000)
    for m in (0.0, 0.5):
        # The one in four the other way round has the margin −m, so that all ask for the same shift.
        margin = np.tile([m, m, m, -m], 1000)
        learner = LinearLearner(1e-3).fit(rows, Comparisons(*pairs, margin), np.arange(2), 0)
        assert learner.scores(rows)[0] == pytest.approx(np.log(3) + m, abs=0.01)


@pytest.mark.parametrize("name", ["linear", "xgboost", "mlp"])
def test_margins_widen_the_scores_of_every_learner(name: str) -> None:
    rows = verdicts()[0]
    target = pairs_by(rows[:, 0], 400, noisy=True)
    wide = Comparisons(target.chosen, target.rejected, np.full(400, 3.0))
    a, b = (ALL[name]().fit(rows, t, np.arange(200), 0).scores(rows) for t in (target, wide))
    assert (b[target.chosen] - b[target.rejected]).mean() > (a[target.chosen] - a[target.rejected]).mean() + 0.05


@pytest.mark.parametrize("name", ["linear", "xgboost", "mlp"])
@pytest.mark.parametrize("successes", [0, 1])
def test_one_outcome_only_stays_finite_and_says_so(name: str, successes: int) -> None:
    rows = verdicts()[0]
    target = Verdicts(np.ones(200, int), np.full(200, successes))
    scores = ALL[name]().fit(rows, target, np.arange(200), 0).scores(rows)
    assert np.isfinite(scores).all()
    assert ((scores > 0) == bool(successes)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), st.floats(1e-3, 1e3), st.booleans())
def test_logistic_regression_stays_finite_on_anything_separable(seed: int, n: int, scale: float, paired: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(n, 3)) * scale).astype(np.float32)
    target: Any = Verdicts(np.ones(n, int), (rows[:, 0] > 0).astype(int))
    if paired:
        target = pairs_by(rows[:, 0], 20, seed, noisy=False) if n > 1 else Comparisons(*np.zeros((2, 0), int))
    assert np.isfinite(LinearLearner(0.3).fit(rows, target, np.arange(n), 0).scores(rows)).all()


def test_the_intercept_of_one_right_row_by_hand() -> None:
    """The faint pull holds it where σ(−b) = b / 1000: b = 5.24."""
    _, b = fit_logistic(np.zeros((1, 1), dtype=np.float32), np.ones(1), np.ones(1), 1.0)
    assert b == pytest.approx(5.24, abs=0.05)
    assert expit(-b) == pytest.approx(b / 1000, rel=0.05)


def test_no_pairs_leave_all_scores_equal() -> None:
    rows = verdicts()[0]
    none = Comparisons(np.zeros(0, int), np.zeros(0, int))
    assert not LinearLearner(1.0).fit(rows, none, np.arange(200), 0).scores(rows).any()


@pytest.mark.parametrize("name", ["linear", "xgboost"])
def test_counts_weigh_as_rows_do(name: str) -> None:
    make = {"linear": ALL["linear"], "xgboost": lambda: BoostedLearner(subsample=1.0, colsample=1.0, rounds=20)}[name]
    rows, target = verdicts(80)
    each = np.repeat(np.arange(80), target.runs)
    outcome = np.concatenate(
        [np.r_[np.ones(s, int), np.zeros(r - s, int)] for s, r in zip(target.successes, target.runs, strict=True)]
    )
    counted = make().fit(rows, target, np.arange(80), 0)
    spread_out = make().fit(rows[each], Verdicts(np.ones(len(each), int), outcome), each, 0)
    assert counted.scores(rows) == pytest.approx(spread_out.scores(rows), abs=3e-3)


def test_the_classifier_takes_chosen_for_right_as_often_as_it_was_chosen() -> None:
    rows = np.eye(4, dtype=np.float32)
    pairs = Comparisons(np.array([0, 0, 1]), np.array([1, 2, 2]))  # the last row stands in no pair
    classifier = ClassifierLearner(1.0).fit(rows, pairs, np.arange(4), 0)
    by_hand = LinearLearner(1.0).fit(rows[:3], Verdicts(np.full(3, 2), np.array([2, 1, 0])), np.arange(3), 0)
    assert classifier.scores(rows) == pytest.approx(by_hand.scores(rows), abs=1e-5)
    assert (np.diff(classifier.scores(rows)[:3]) < 0).all()


def test_the_classifier_learns_verdicts_as_logistic_regression_does() -> None:
    rows, target = verdicts()
    a, b = (make(1.0).fit(rows, target, np.arange(200), 0).scores(rows) for make in (ClassifierLearner, LinearLearner))
    assert np.array_equal(a, b)


def nonlinear(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and a reward that no linear score can follow: high where two signs agree (XOR)."""
    rows = np.random.default_rng(seed).uniform(-1, 1, size=(n, 2)).astype(np.float32)
    return rows, np.where(rows[:, 0] * rows[:, 1] > 0, 1.0, -1.0)


@pytest.mark.parametrize(
    ("learner", "least"),
    [
        (BoostedLearner(colsample=1.0), 0.95),
        (NetworkLearner(hidden=(32,), epochs=60, learning_rate=5e-3, dropout=0.0, patience=10), 0.95),
    ],
    ids=["xgboost", "mlp"],
)
def test_trees_and_networks_order_a_nonlinear_reward(learner: Learner, least: float) -> None:
    rows, reward = nonlinear(400, 0)
    learner.fit(rows, pairs_by(reward, 1500, noisy=False), np.arange(400), 0)
    new, truth = nonlinear(400, 1)
    target = pairs_by(truth, 1500, noisy=False)
    unlike = truth[target.chosen] != truth[target.rejected]
    target = Comparisons(target.chosen[unlike], target.rejected[unlike])
    assert order(learner.scores(new), target) > least
    linear = LinearLearner(1.0).fit(rows, pairs_by(reward, 1500, noisy=False), np.arange(400), 0)
    assert order(linear.scores(new), target) < 0.65


def test_trees_follow_a_sine() -> None:
    rows = np.random.default_rng(0).uniform(-3, 3, size=(500, 1)).astype(np.float32)
    reward = 3 * np.sin(rows[:, 0])
    learner = BoostedLearner(colsample=1.0, max_depth=3).fit(
        rows, pairs_by(reward, 6000, noisy=True), np.arange(500), 0
    )
    scores = learner.scores(rows)
    # On the scale of the reward too, not in its order alone.
    assert np.corrcoef(scores, reward)[0, 1] > 0.95
    assert np.polyfit(reward, scores, 1)[0] == pytest.approx(1, abs=0.2)
    # What the chosen gain the rejected lose.
    assert scores.mean() == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("paired", [False, True])
def test_same_seed_same_state_and_back(name: str, paired: bool) -> None:
    rows, target = verdicts()
    given_target = pairs_by(rows[:, 0], 300, noisy=True) if paired else target
    first = ALL[name]().fit(rows, given_target, np.arange(200) // 2, 7)
    torch.rand(5)  # what others draw must not matter
    second = ALL[name]().fit(rows, given_target, np.arange(200) // 2, 7)
    state = first.state()
    assert {k: v.tobytes() for k, v in state.items()} == {k: v.tobytes() for k, v in second.state().items()}
    assert all(array.dtype.kind in "fu" for array in state.values())
    restored = ALL[name]().restore(state)
    assert restored.scores(rows) == pytest.approx(first.scores(rows), abs=1e-5)
    assert first.describe()["name"] == name
    assert type(first)(**{k: v for k, v in first.describe().items() if k != "name"}).parameters == first.parameters


def test_another_seed_gives_another_network() -> None:
    rows, target = verdicts()
    a, b = (ALL["mlp"]().fit(rows, target, np.arange(200), seed).scores(rows) for seed in (0, 1))
    assert not np.allclose(a, b)


def test_training_a_network_leaves_the_generator_of_torch_alone() -> None:
    rows, target = verdicts()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ALL["mlp"]().fit(rows, target, np.arange(200), 0)
    assert torch.equal(torch.rand(3), expected)


def test_a_network_scores_as_torch_would() -> None:
    """One unit by hand: relu(2x − 1) · 3 + 0.5."""
    learner = NetworkLearner(hidden=1).restore(
        {f"layer_{i}": np.array(a, dtype=np.float32) for i, a in enumerate([[[2.0]], [-1.0], [[3.0]], [0.5]])}
    )
    assert learner.scores(np.array([[0.0], [0.5], [2.0]], dtype=np.float32)).tolist() == [0.5, 0.5, 9.5]


@pytest.mark.parametrize("paired", [False, True])
@given(n_groups=st.integers(1, 40), seed=st.integers(0, 99))
def test_early_stopping_never_cuts_a_group(paired: bool, n_groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.sort(rng.integers(0, n_groups, 100)) * 7
    chosen, rejected = rng.permutation(100), np.arange(100)
    target: Any = Comparisons(chosen, rejected) if paired else Verdicts(np.ones(100, int), np.ones(100, int))
    learned, held_out = network._divide(target, groups, rng)
    of_item = groups[chosen] if paired else groups
    assert sorted([*learned, *held_out]) == list(range(100))
    assert not set(of_item[learned]) & set(of_item[held_out])
    found = len(set(groups))
    assert len(set(of_item[held_out])) == (max(1, round(found / 10)) if found >= 10 else 0)


def test_a_network_stops_when_it_gets_no_better_and_keeps_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that mean nothing: what is learned of them after a while makes the held-out loss worse."""
    rng = np.random.default_rng(0)
    rows, groups = rng.normal(size=(100, 20)).astype(np.float32), np.arange(100) // 2
    target = Verdicts(np.ones(100, int), rng.integers(0, 2, 100))
    losses = []
    real = network._loss

    def spy(*arguments: Any) -> torch.Tensor:
        loss = real(*arguments)
        if not torch.is_grad_enabled():
            losses.append(float(loss))
        return loss

    monkeypatch.setattr(network, "_loss", spy)
    learner = NetworkLearner(hidden=64, learning_rate=1e-2, dropout=0.5, epochs=200, patience=2)
    learner.fit(rows, target, groups, 0)
    assert 2 < len(losses) == int(np.argmin(losses)) + 1 + 2 < 200
    _, held_out = network._divide(target, groups, np.random.default_rng(0))
    z = learner.scores(rows[held_out])
    # Nothing is dropped where the held-out loss is taken.
    assert np.mean(np.logaddexp(0, z) - target.successes[held_out] * z) == pytest.approx(min(losses), abs=1e-5)


def test_counts_weigh_as_rows_do_in_the_loss_of_a_network() -> None:
    rows = np.array([[1.0], [-2.0]], dtype=np.float32)
    net = network._make(1, [], 0.0)
    counted = network._loss(net, rows, Verdicts(np.array([4, 1]), np.array([3, 0])), np.arange(2))
    each = Verdicts(np.ones(5, int), np.array([1, 1, 1, 0, 0]))
    one_by_one = network._loss(net, rows[[0, 0, 0, 0, 1]], each, np.arange(5))
    assert counted.item() == pytest.approx(one_by_one.item())


def test_few_groups_are_all_learned_from_to_the_last_pass() -> None:
    rows, target = verdicts(90)
    short, long = (
        NetworkLearner(hidden=8, epochs=e).fit(rows, target, np.arange(90) // 10, 0).scores(rows) for e in (1, 40)
    )
    assert not np.allclose(short, long)


def test_only_an_open_strength_leaves_a_choice() -> None:
    assert [c.parameters["strength"] for c in LinearLearner().candidates()] == [30.0, 10.0, 3.0, 1.0, 0.3]
    assert all(type(c) is ClassifierLearner for c in ClassifierLearner().candidates())
    closed = LinearLearner(2.0)
    assert closed.candidates() == [closed]
    boosted = BoostedLearner()
    assert boosted.candidates() == [boosted]


def test_fresh_copies_do_not_share_what_they_learn() -> None:
    rows, target = verdicts()
    learner = LinearLearner(1.0)
    learner.fresh().fit(rows, target, np.arange(200), 0)
    assert not hasattr(learner, "_weights")


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: LinearLearner(0.0), "strength=0.0 .*'linear'.* number above 0"),
    (lambda: LinearLearner(float("nan")), "strength=nan"),
    (lambda: LinearLearner(True), "strength=True"),
    (lambda: ClassifierLearner(-1), "'classifier'"),
    (lambda: BoostedLearner(rounds=2.5), "rounds=2.5 .* whole number above 0"),
    (lambda: BoostedLearner(max_depth=0), "max_depth=0"),
    (lambda: BoostedLearner(eta="fast"), "eta='fast'"),
    (lambda: NetworkLearner(hidden=(4, 0)), "hidden=0"),
    (lambda: NetworkLearner(epochs=-1), "epochs=-1"),
    (lambda: NetworkLearner(learning_rate=None), "learning_rate=None"),
    (lambda: check_above_zero("x", batch=1.0), "batch=1.0 of the model 'x'"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_parameters_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BoostedLearner(subsample=1.5),
        lambda: BoostedLearner(colsample=2.0),
        lambda: BoostedLearner(min_child_weight=-1.0),
        lambda: NetworkLearner(dropout=1.5),
        lambda: NetworkLearner(dropout="much"),
        lambda: NetworkLearner(weight_decay=-0.1),
    ],
    ids=["subsample", "colsample", "min_child_weight", "dropout", "dropout is text", "weight_decay"],
)
def test_shares_and_weights_out_of_range_are_the_users_error(make: Callable[[], Learner]) -> None:
    """XGBoost and torch would refuse these in words of their own, in the middle of a fit."""
    rows, target = verdicts(40)
    with pytest.raises(ConfigError):
        make().fit(rows, target, np.arange(40), 0)


@pytest.mark.parametrize("learner", [BoostedLearner, NetworkLearner])
def test_centring_draws_the_sum_of_two_scores_to_zero(learner: Any) -> None:
    """Only differences are learned; with centring, a constant that all rows share is not left to chance."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 3)).astype(np.float32) + np.array([2, 0, 0], np.float32)
    order = np.argsort(rows[:, 0])
    pairs = Comparisons(order[100:], order[:100])
    sums = []
    for centring in (0.0, 1.0):
        scores = learner(centring=centring).fit(rows, pairs, np.arange(200), 0).scores(rows)
        assert (scores[pairs.chosen] > scores[pairs.rejected]).mean() > 0.8
        sums.append(np.abs(scores[pairs.chosen] + scores[pairs.rejected]).mean() / scores.std())
    assert sums[1] < 0.9 * sums[0]
