"""Off-policy estimators: by hand, by identities, and on simulated logs whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oirl.evaluation import estimators as e
from oirl.statistics.intervals import normal_interval, standard_error

# Two queries, two prompts. Query 0 was run once under prompt 0 (drawn with probability ½) and was right; query 1 three
# times under prompt 0 (drawn with ¼, once right) and once under prompt 1 (drawn with ¾, right).
SHARES = np.array([[1.0, 0.0], [0.75, 0.25]])
RATES = np.array([[1.0, 0.0], [1 / 3, 1.0]])
INVERSE = np.array([[2.0, 0.0], [4.0, 4 / 3]])
POLICY = np.array([[0.5, 0.5], [0.0, 1.0]])
ESTIMATE = np.array([[0.8, 0.4], [0.2, 0.6]])


def test_every_estimator_by_hand() -> None:
    w = e.importance_weights(POLICY, SHARES, INVERSE)
    assert w == pytest.approx(np.array([[1.0, 0.0], [0.0, 4 / 3]]))
    # Σ w r: 1·1·1 = 1; ¼·4⁄3·1 = ⅓.
    assert e.ips(SHARES, RATES, w) == pytest.approx([1, 1 / 3])
    # Σ w: 1 and ⅓, mean ⅔; value (1 + ⅓) / 2 / ⅔ = 1: every weighted run was right.
    assert e.snips(SHARES, RATES, w) == pytest.approx([1, 1])
    assert e.direct(POLICY, ESTIMATE) == pytest.approx([0.6, 0.6])
    # .6 + 1·(1 − .8) = .8; .6 + ¼·4⁄3·(1 − .6) = .7333.
    runs = (SHARES, RATES, w, POLICY, ESTIMATE)
    assert e.doubly_robust(*runs) == pytest.approx([0.8, 0.6 + 0.4 / 3])
    assert e.switch(*runs, threshold=1.0) == pytest.approx([0.8, 0.6])
    assert e.switch(*runs, threshold=0.0) == pytest.approx([0.6, 0.6])
    found = e.support(POLICY, SHARES, w, np.ones((2, 2), dtype=bool))
    # Weights of the queries: 1 and ⅓.
    assert found.effective_sample_size == pytest.approx((4 / 3) ** 2 / (1 + 1 / 9))
    assert found.largest_weight == pytest.approx(0.75)
    assert found.mean_weight == pytest.approx(2 / 3)
    assert found.unsupported_share == 0


def test_prompts_that_could_not_be_run_are_unsupported() -> None:
    shares = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    policy = np.array([[0.2, 0.5, 0.3], [0.0, 0.9, 0.1]])
    possible = np.array([[True, True, False], [False, True, False]])
    found = e.support(policy, shares, e.importance_weights(policy, shares, np.full((2, 3), 2.0)), possible)
    assert found.unsupported_share == pytest.approx(0.2)


EFFECTS = np.array([[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])


@dataclass
class Bandit:
    """A logged bandit: one run per query, the truth known."""

    shares: np.ndarray
    rates: np.ndarray
    inverse: np.ndarray
    policy: np.ndarray
    estimate: np.ndarray
    truth: float

    @property
    def weights(self) -> np.ndarray:
        return e.importance_weights(self.policy, self.shares, self.inverse)

    def contributions(self, name: str) -> np.ndarray:
        runs = (self.shares, self.rates, self.weights)
        if name in ("ips", "snips"):
            return {"ips": e.ips, "snips": e.snips}[name](*runs)
        if name == "direct":
            return e.direct(self.policy, self.estimate)
        if name == "doubly_robust":
            return e.doubly_robust(*runs, self.policy, self.estimate)
        return e.switch(*runs, self.policy, self.estimate, e.choose_threshold(*runs, self.policy, self.estimate))


def softmax(x: np.ndarray) -> np.ndarray:
    z = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(z / z.sum(axis=1, keepdims=True))


def bandit(seed: int, n: int = 400, *, quality: float = 0.7, greed: float = 1.0) -> Bandit:
    """Draw queries with three prompts; the logger prefers what is good, so that plain means would flatter it."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    theta = 1 / (1 + np.exp(-(0.6 + x @ EFFECTS)))
    logger = 0.8 * softmax(greed * 2 * theta) + 0.2 / 3
    drawn = (rng.random((n, 1)) > logger.cumsum(axis=1)).sum(axis=1)
    shares = np.eye(3)[drawn]
    rates = shares * (rng.random((n, 1)) < theta)
    policy = softmax(-3 * x @ np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    # 1: a perfect model of success; 0: one that knows nothing.
    estimate = quality * theta + (1 - quality) * 0.5
    return Bandit(shares, rates, 1 / logger, policy, estimate, TRUTH)


def _truth() -> float:
    rng = np.random.default_rng(10**6)
    x = rng.normal(size=(400_000, 2))
    theta = 1 / (1 + np.exp(-(0.6 + x @ EFFECTS)))
    policy = softmax(-3 * x @ np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    return float((policy * theta).sum(axis=1).mean())


TRUTH = _truth()


@pytest.mark.parametrize("name", ["ips", "snips", "doubly_robust"])
@pytest.mark.parametrize("quality", [0.0, 0.9])
def test_unbiased_with_known_propensities_whatever_the_model(name: str, quality: float) -> None:
    values = [bandit(seed, 300, quality=quality).contributions(name).mean() for seed in range(500)]
    assert abs(np.mean(values) - TRUTH) < 4 * np.std(values) / np.sqrt(500) + (0.003 if name == "snips" else 0)


def test_doubly_robust_with_wrong_propensities_but_a_right_model() -> None:
    values = []
    for seed in range(300):
        b = bandit(seed, 300, quality=1.0)
        wrong = e.importance_weights(b.policy, b.shares, np.full_like(b.inverse, 3.0))
        values.append(e.doubly_robust(b.shares, b.rates, wrong, b.policy, b.estimate).mean())
    assert abs(np.mean(values) - TRUTH) < 4 * np.std(values) / np.sqrt(300)


def test_the_direct_method_is_as_wrong_as_its_model() -> None:
    values = [bandit(seed, 300, quality=0.0).contributions("direct").mean() for seed in range(20)]
    assert values == pytest.approx([0.5] * 20)
    assert abs(TRUTH - 0.5) > 0.05


@pytest.mark.parametrize("name", ["ips", "snips", "doubly_robust", "switch"])
def test_nominal_intervals_cover_the_truth(name: str) -> None:
    hits = 0
    for seed in range(500):
        low, high = normal_interval(bandit(seed).contributions(name))
        hits += low <= TRUTH <= high
    assert 0.92 <= hits / 500 <= 0.98


def test_a_good_model_makes_doubly_robust_surer_than_weighting() -> None:
    b = bandit(1, quality=0.9)
    assert standard_error(b.contributions("doubly_robust")) < 0.85 * standard_error(b.contributions("ips"))


@given(st.integers(0, 10**6))
def test_weighting_is_the_mean_where_the_policy_is_the_logger(seed: int) -> None:
    b = bandit(seed, 50)
    weights = e.importance_weights(1 / b.inverse, b.shares, b.inverse)
    mean = (b.shares * b.rates).sum(axis=1).mean()
    assert e.ips(b.shares, b.rates, weights).mean() == pytest.approx(mean)
    assert e.snips(b.shares, b.rates, weights).mean() == pytest.approx(mean)
    assert e.support(1 / b.inverse, b.shares, weights, b.inverse > 0).effective_sample_size == pytest.approx(50)


@given(st.integers(0, 10**6))
def test_doubly_robust_is_direct_where_nothing_is_left_to_correct(seed: int) -> None:
    b = bandit(seed, 50)
    runs = (b.shares, b.estimate, b.weights, b.policy, b.estimate)
    assert e.doubly_robust(*runs) == pytest.approx(e.direct(b.policy, b.estimate))


@given(st.integers(0, 10**6))
def test_a_full_matrix_weighted_is_the_replay(seed: int) -> None:
    """Every prompt once: each has share 1/P and propensity 1/P, so that weighting gives Σ π r exactly."""
    b = bandit(seed, 30)
    rates = np.random.default_rng(seed).random((30, 3))
    shares = np.full((30, 3), 1 / 3)
    weights = e.importance_weights(b.policy, shares, np.full((30, 3), 3.0))
    assert e.ips(shares, rates, weights) == pytest.approx((b.policy * rates).sum(axis=1))
    assert e.doubly_robust(shares, rates, weights, b.policy, b.estimate) == pytest.approx(
        (b.policy * rates).sum(axis=1)
    )


def test_the_threshold_keeps_what_pays_and_drops_a_weight_that_decides_alone() -> None:
    b = bandit(3, 300, quality=1.0)
    weights = b.weights
    surprise = (b.shares * np.abs(b.rates - b.estimate)).sum(axis=1).argmax()
    weights[surprise] = 3000 * b.shares[surprise]
    runs = (b.shares, b.rates, weights, b.policy, b.estimate)
    threshold = e.choose_threshold(*runs)
    assert threshold < weights.max()
    assert standard_error(e.switch(*runs, threshold)) < standard_error(e.doubly_robust(*runs)) / 3
    even = np.where(b.shares > 0, 1.0, 0.0)
    assert e.choose_threshold(b.shares, b.rates, even, b.policy, np.zeros((300, 3))) == 1.0


def test_nothing_run_that_the_policy_takes_is_not_a_number() -> None:
    shares, policy = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    weights = e.importance_weights(policy, shares, np.array([[2.0, 0.0]]))
    assert np.isnan(e.snips(shares, np.array([[1.0, 0.0]]), weights)).all()
    assert e.support(policy, shares, weights, shares > 0).effective_sample_size == 0


def test_standard_errors_by_hand_and_in_clusters() -> None:
    values = np.array([0.0, 0.0, 1.0, 1.0])
    # Deviations ±½: Σ d² = 1, times 4⁄3, root, over 4.
    assert standard_error(values) == pytest.approx(np.sqrt(4 / 3) / 4)
    # Two clusters of sums −1 and 1: Σ = 2, times 2, root, over 4.
    assert standard_error(values, np.array([0, 0, 1, 1])) == pytest.approx(0.5)
    assert standard_error(np.stack([values, values], axis=1), np.array([7, 7, 9, 9])) == pytest.approx([0.5, 0.5])
    assert np.isnan(standard_error(np.array([1.0])))
    low, high = normal_interval(values)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.959964 * np.sqrt(4 / 3) / 4)


@pytest.mark.parametrize("estimate", [e.ips, e.snips])
def test_contributions_are_resampled_like_values(estimate: Callable[..., np.ndarray]) -> None:
    """The spread of the contributions is the spread of the estimate over logs."""
    values, errors = [], []
    for seed in range(400):
        b = bandit(seed, 200)
        found = estimate(b.shares, b.rates, b.weights)
        values.append(found.mean())
        errors.append(float(standard_error(found)))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)
