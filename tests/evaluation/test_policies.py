"""Policies and ceilings by hand, by simulation and by properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oirl.evaluation.policies import held_out_ceiling, one_draw_oracle, replay, switch

SCORES = arrays(float, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=st.floats(0, 1))


def test_switch_by_hand() -> None:
    scores = np.array([[0.5, 0.7, 0.6], [0.5, 0.51, 0.5], [0.9, 0.1, 0.1], [0.5, 0.5, 0.5]])
    assert switch(scores, 0, 0.0).tolist() == [1, 1, 0, 0]
    assert switch(scores, 0, 0.05).tolist() == [1, 0, 0, 0]
    assert switch(scores, 0, 0.3).tolist() == [0, 0, 0, 0]
    assert switch(scores, 2, 0.0).tolist() == [1, 1, 0, 2]


def test_a_gain_equal_to_the_margin_does_not_pay() -> None:
    assert switch(np.array([[0.25, 0.75]]), 0, 0.5).tolist() == [0]
    assert switch(np.array([[0.25, 0.75]]), 0, 0.49).tolist() == [1]


@given(SCORES, st.lists(st.floats(0, 1), min_size=2, max_size=5), st.data())
def test_a_larger_margin_never_switches_more(scores: np.ndarray, margins: list[float], data: st.DataObject) -> None:
    best = data.draw(st.integers(0, scores.shape[1] - 1))
    switched = [switch(scores, best, m) != best for m in sorted(margins)]
    for wide, narrow in pairwise(switched):
        assert not (narrow & ~wide).any()


@given(SCORES, st.data())
def test_a_switch_goes_to_the_highest_score_or_not_at_all(scores: np.ndarray, data: st.DataObject) -> None:
    best = data.draw(st.integers(0, scores.shape[1] - 1))
    choice = switch(scores, best, 0.0)
    assert (replay(scores, choice) == scores.max(axis=1)).all()
    assert (choice[scores[:, best] == scores.max(axis=1)] == best).all()


def test_replay_by_hand() -> None:
    rates = np.array([[0.0, 1.0], [0.5, 0.25], [1.0, 0.0]])
    assert replay(rates, np.array([1, 0, 1])).tolist() == [1.0, 0.5, 0.0]


def test_one_draw_oracle_by_hand() -> None:
    runs, successes = np.array([[2, 2], [1, 4]]), np.array([[1, 1], [0, 1]])
    assert one_draw_oracle(runs, successes) == pytest.approx(((1 - 0.25) + (1 - 0.75)) / 2)


def test_one_draw_oracle_by_simulation() -> None:
    rng = np.random.default_rng(0)
    runs = rng.integers(1, 5, (30, 3))
    successes = rng.binomial(runs, 0.4)
    drawn = rng.random((4000, 30, 3)) < successes / runs
    assert one_draw_oracle(runs, successes) == pytest.approx(drawn.any(axis=2).mean(), abs=0.01)


def simulated(seed: int, truth: np.ndarray, n_runs: int) -> tuple[np.ndarray, np.ndarray]:
    runs = np.full(truth.shape, n_runs)
    return runs, np.random.default_rng(seed).binomial(runs, truth)


@pytest.mark.parametrize("n_runs", [2, 3, 8])
def test_on_pure_noise_the_ceiling_holds_no_luck(n_runs: int) -> None:
    truth = np.full((400, 4), 0.5)
    flat = np.full((400, 4), 0.5)
    values = [
        held_out_ceiling(*simulated(s, truth, n_runs), flat, np.random.default_rng(1000 + s), draws=20)
        for s in range(40)
    ]
    # Every choice is worth ½; the oracle of one run per prompt would say .94.
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 0.5) < 4 * error
    assert one_draw_oracle(*simulated(0, truth, n_runs)) > 0.85


@pytest.mark.parametrize("n_runs", [2, 4, 16])
def test_the_ceiling_is_a_lower_bound_that_more_runs_raise(n_runs: int) -> None:
    rng = np.random.default_rng(1)
    truth = rng.beta(1, 1, (300, 3))
    best = truth.max(axis=1).mean()
    flat = np.tile(truth.mean(axis=0), (300, 1))
    values = [
        held_out_ceiling(*simulated(s, truth, n_runs), flat, np.random.default_rng(1000 + s), draws=20)
        for s in range(30)
    ]
    error = np.std(values) / np.sqrt(len(values))
    assert np.mean(values) < best + 3 * error
    assert np.mean(values) > truth.mean(axis=0).max() + 0.02
    assert np.mean(values) > best - {2: 0.2, 4: 0.1, 16: 0.04}[n_runs]


def test_the_ceiling_uses_what_an_estimate_knows() -> None:
    rng = np.random.default_rng(2)
    truth = np.where(rng.random((400, 1)) < 0.5, [0.9, 0.1], [0.1, 0.9])
    runs, successes = simulated(3, truth, 2)
    blind = held_out_ceiling(runs, successes, np.full(truth.shape, 0.5), rng)
    told = held_out_ceiling(runs, successes, truth, rng)
    realised = (successes / runs)[np.arange(400), truth.argmax(axis=1)].mean()
    assert told == pytest.approx(realised, abs=0.01)
    assert blind < told - 0.02


def test_the_run_left_out_is_not_seen() -> None:
    """Two runs that contradict each other: whichever is seen, the other one is scored."""
    runs, successes = np.array([[2, 2]]), np.array([[1, 1]])
    flat = np.full((1, 2), 0.5)
    value = held_out_ceiling(runs, successes, flat, np.random.default_rng(0), draws=4000)
    # (left out, left out) is one of 4 cases, each ¼. A seen 1 means a left-out 0. Seen (1,1) and (1,0) pick prompt 0,
    # whose run left out is wrong; (0,1) picks prompt 1: wrong; (0,0): a right one. So ¼.
    assert value == pytest.approx(0.25, abs=0.03)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_ceiling_lies_between_zero_and_the_oracle_of_all_runs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = rng.integers(2, 5, (6, 3))
    successes = rng.binomial(runs, rng.random((6, 3)))
    value = held_out_ceiling(runs, successes, rng.random((6, 3)), rng, draws=5)
    assert 0 <= value <= (successes > 0).any(axis=1).mean() + 1e-12
