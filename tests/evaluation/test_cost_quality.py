"""Quality against cost: by hand, by identities, on logs whose truth is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oirl.evaluation.costs import choose_by_cost, cost_points, cost_quality, weights_for


def test_choice_by_hand() -> None:
    scores, prices = np.array([[0.5, 0.9], [0.8, 0.85]]), np.array([1.0, 3.0])
    assert choose_by_cost(scores, prices, 0.0, 0, 0.0).tolist() == [1, 1]
    # .9 − .3 > .5 − .1, but .85 − .3 < .8 − .1.
    assert choose_by_cost(scores, prices, 0.1, 0, 0.0).tolist() == [1, 0]
    assert choose_by_cost(scores, prices, 1.0, 0, 0.0).tolist() == [0, 0]


def test_the_gap_by_hand() -> None:
    # The cheap prompt costs 1 and reaches .4, the dear one 5 and .8; a policy reaches .7 at 2.
    found = cost_quality([(2.0, 0.7)], best=(5.0, 0.8), cheapest=(1.0, 0.4))
    # Cost shares 0, ¼, 1; recovered 0, ¾, 1: ¼·¾/2 + ¾·(¾ + 1)/2.
    assert found["area"] == pytest.approx(0.25 * 0.75 / 2 + 0.75 * 1.75 / 2, abs=1e-3)
    assert found["cost_for_50"] == pytest.approx(0.25 * 0.5 / 0.75, abs=2e-3)
    assert found["cost_for_80"] == pytest.approx(0.25 + 0.75 * 0.05 / 0.25, abs=2e-3)
    assert found["perf_gain"] == 0
    assert found["cost_save"] == 0


def test_a_policy_above_the_best_prompt_gains_and_saves() -> None:
    found = cost_quality([(3.0, 0.88)], best=(4.0, 0.8), cheapest=(1.0, 0.4))
    assert found["perf_gain"] == pytest.approx(0.1)
    assert found["cost_save"] == pytest.approx(0.25)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_mixing_at_random_has_half_the_area(shares: list[float]) -> None:
    points = [(1 + 4 * s, 0.4 + 0.4 * s) for s in shares]
    found = cost_quality(points, best=(5.0, 0.8), cheapest=(1.0, 0.4))
    assert found["area"] == pytest.approx(0.5, abs=1e-6)
    assert found["cost_for_50"] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("best", [(1.0, 0.8), (5.0, 0.4), (5.0, 0.3)])
def test_without_a_gap_nothing_is_said(best: tuple[float, float]) -> None:
    assert set(cost_quality([(2.0, 0.5)], best, (1.0, 0.4)).values()) == {None}


def test_weights_run_from_nothing_to_cost_alone() -> None:
    weights = weights_for(np.array([1.0, 5.0]))
    assert weights[0] == 0
    assert (np.diff(weights) > 0).all()
    # At the largest, four units of cost are worth more than the whole of success.
    assert weights[-1] * 4 > 1
    assert weights_for(np.array([2.0, 2.0])).tolist() == [0.0]


def test_points_find_what_is_true() -> None:
    """Half of the queries are easy for the cheap prompt too; a choice that knows them saves half of the extra cost."""
    rng = np.random.default_rng(0)
    easy = rng.random(2000) < 0.5
    theta = np.stack([np.where(easy, 0.9, 0.2), np.full(2000, 0.9)], axis=1)
    rates = (rng.random((2000, 2)) < theta).astype(float)
    prices = np.array([1.0, 5.0])
    costs = np.broadcast_to(prices, rates.shape)
    points = cost_points(theta, rates, costs, prices, 0.01, np.arange(2000))
    choosing = [p for p in points if p.deploy]
    assert choosing
    thrifty = min(choosing, key=lambda p: abs(p.cost - 3))
    assert thrifty.cost == pytest.approx(3, abs=0.15)
    assert thrifty.value == pytest.approx(0.9, abs=0.03)
    assert points[-1].cost == 1
    assert all(a.cost >= b.cost - 0.2 for a, b in pairwise(points))


def test_scores_that_know_nothing_are_not_deployed() -> None:
    rng = np.random.default_rng(1)
    rates = (rng.random((400, 2)) < [0.5, 0.7]).astype(float)
    prices = np.array([1.0, 5.0])
    noise = rng.random((400, 2))
    points = cost_points(noise, rates, np.broadcast_to(prices, rates.shape), prices, 0.01, np.arange(400))
    assert not any(p.deploy for p in points)
    assert {p.cost for p in points} == {1.0, 5.0}
