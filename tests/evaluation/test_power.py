"""What a log can tell apart: comparisons of prompts and the detectable gain."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from oirl.evaluation.power import compare_prompts, power_of


def full(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.ones(rates.shape, dtype=int), rates, np.arange(len(rates))


def test_a_pair_by_hand() -> None:
    # First prompt right on 3 of 4 queries, second on 1 of them: differences 1, 1, 0, 0.
    rates = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], dtype=float)
    (c,) = compare_prompts(["a", "b"], *full(rates), best=0)
    error = np.sqrt(1 * 4 / 3) / 4  # Σ (d − ½)² = 1
    assert (c.first, c.second, c.difference, c.n_queries) == ("a", "b", 0.5, 4)
    assert c.standard_error == pytest.approx(error)
    assert c.p_value == pytest.approx(2 * t.sf(0.5 / error, 3))
    assert not c.told_apart


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_differences_without_any_spread_are_as_sure_as_a_sign_test(n: int) -> None:
    (c,) = compare_prompts(["a", "b"], *full(np.c_[np.ones(n), np.zeros(n)]), best=0)
    assert c.p_value == pytest.approx(2 * 0.5**n)
    assert c.told_apart == (2 * 0.5**n <= 0.05)
    thirds = np.c_[np.full(n, 2 / 3), np.full(n, 1 / 3)]  # what rounding leaves is no spread
    assert compare_prompts(["a", "b"], *full(thirds), best=0)[0].p_value == pytest.approx(2 * 0.5**n)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_few_queries_seldom_tell_equal_prompts_apart(n: int) -> None:
    rng = np.random.default_rng(0)
    told = [compare_prompts(["a", "b"], *full((rng.random((n, 2)) < 0.5).astype(float)), best=0) for _ in range(400)]
    assert sum(bool(c) and c[0].told_apart for c in told) / 400 < 0.08


def test_the_better_one_comes_first() -> None:
    (c,) = compare_prompts(["a", "b"], *full(np.array([[0, 1], [0, 1], [1, 1]], dtype=float)), best=1)
    assert (c.first, c.second) == ("b", "a")
    assert c.difference == pytest.approx(2 / 3)


def test_pairs_share_queries_and_near_duplicates_count_as_one() -> None:
    rng = np.random.default_rng(0)
    rates = (rng.random((200, 2)) < [0.6, 0.5]).astype(float)
    runs = np.ones((200, 2), dtype=int)
    runs[:50, 0] = 0
    (c,) = compare_prompts(["a", "b"], runs, rates, np.arange(200), 0)
    assert c.n_queries == 150
    (doubled,) = compare_prompts(
        ["a", "b"], np.tile(runs, (2, 1)), np.tile(rates, (2, 1)), np.tile(np.arange(200), 2), 0
    )
    assert doubled.standard_error == pytest.approx(c.standard_error, rel=1e-9)


def test_among_equal_prompts_a_difference_is_seldom_claimed() -> None:
    """Holm: of all pairs of ten equal prompts, in at most 5% of the logs any is told apart."""
    claimed = 0
    for seed in range(200):
        rates = (np.random.default_rng(seed).random((150, 10)) < 0.5).astype(float)
        names = [str(i) for i in range(10)]
        claimed += any(c.told_apart for c in compare_prompts(names, *full(rates), best=0))
    assert claimed / 200 < 0.09


def test_many_prompts_are_compared_with_the_best_only() -> None:
    rates = (np.random.default_rng(0).random((60, 40)) < 0.5).astype(float)
    found = compare_prompts([str(i) for i in range(40)], *full(rates), best=7)
    assert len(found) == 39
    assert all("7" in (c.first, c.second) for c in found)


def test_the_detectable_gain_is_found_as_often_as_promised() -> None:
    """Of logs where one prompt is better by just that much, about 80% show it at 5%."""
    rng = np.random.default_rng(1)
    base = (rng.random((400, 2)) < 0.6).astype(float)
    power = power_of(*full(base), best=int(base.mean(axis=0).argmax()))
    gain = power.smallest_detectable_gain
    assert gain is not None
    found = 0
    for _ in range(400):
        rates = (rng.random((400, 2)) < [0.6 + gain / 2, 0.6 - gain / 2]).astype(float)
        difference = rates[:, 0] - rates[:, 1]
        found += difference.mean() > 1.96 * difference.std() / 20
    assert 0.7 < found / 400 < 0.9


def test_queries_for_one_point_follow_the_square_law() -> None:
    rates = (np.random.default_rng(2).random((500, 2)) < 0.5).astype(float)
    p = power_of(*full(rates), best=0)
    assert p.queries_for_one_point == int(np.ceil(500 * (p.smallest_detectable_gain / 0.01) ** 2))
    assert p.more_queries == p.queries_for_one_point - 500


@pytest.mark.parametrize(
    "rates", [np.ones((10, 2)), np.ones((50, 2)), np.ones((50, 1)), np.tile([2 / 3, 1 / 3], (50, 1))]
)
def test_where_nothing_can_be_said_nothing_is(rates: np.ndarray) -> None:
    assert power_of(*full(rates), best=0).smallest_detectable_gain is None
