"""Policies by hand and by properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oirl.evaluation.policies import one_hot, replay, switch

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


def test_one_hot_by_hand() -> None:
    assert one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
