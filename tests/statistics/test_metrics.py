"""Metrics by hand, by brute force over pairs, and against the rows that cells stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from oirl.statistics import metrics

CELL = st.tuples(
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.9, 1.0]),  # scores, with many ties
    st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    st.integers(0, 3),
)
CELLS = st.lists(CELL, min_size=1, max_size=14)


def arrays(cells: list[tuple[float, tuple[int, int], int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.array([c[0] for c in cells]),
        np.array([c[1][0] for c in cells]),
        np.array([c[1][1] for c in cells]),
        np.array([c[2] for c in cells]),
    )


def rows(score: np.ndarray, runs: np.ndarray, successes: np.ndarray, group: np.ndarray) -> list[tuple[float, int, int]]:
    return [
        (float(s), int(i < k), int(g))
        for s, n, k, g in zip(score, runs, successes, group, strict=True)
        for i in range(n)
    ]


def pairs_in_order(runs: list[tuple[float, int, int]], *, within: bool) -> float:
    value = total = 0.0
    for s, y, g in runs:
        for t, z, h in runs:
            if y == 1 and z == 0 and (g == h or not within):
                total += 1
                value += 1.0 if s > t else 0.5 if s == t else 0.0
    return value / total if total else math.nan


def test_auc_by_hand() -> None:
    # Right runs at .8 and .5, wrong ones at .5 and .2: pairs 1, 1, ½, 1.
    score, runs, successes = np.array([0.8, 0.5, 0.2]), np.array([1, 2, 1]), np.array([1, 1, 0])
    assert metrics.auc(score, runs, successes) == 3.5 / 4


def test_auc_within_by_hand() -> None:
    # Group 0: one pair, in order. Group 1: one pair, the wrong way. Group 2: no pair. Across groups all would be mixed.
    score = np.array([0.9, 0.1, 0.3, 0.6, 0.99])
    right = np.array([1, 0, 1, 0, 1])
    group = np.array([0, 0, 1, 1, 2])
    assert metrics.auc_within(score, np.ones(5, dtype=int), right, group) == 0.5


@given(CELLS)
def test_auc_equals_brute_force(cells: list[tuple[float, tuple[int, int], int]]) -> None:
    score, runs, successes, group = arrays(cells)
    each = rows(score, runs, successes, group)
    assert metrics.auc(score, runs, successes) == pytest.approx(pairs_in_order(each, within=False), nan_ok=True)
    expected = pairs_in_order(each, within=True)
    assert metrics.auc_within(score, runs, successes, group) == pytest.approx(expected, nan_ok=True)


@given(CELLS, st.randoms(use_true_random=False))
def test_the_order_of_cells_does_not_matter(cells: list, random: object) -> None:
    shuffled = list(cells)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    a, b = arrays(cells), arrays(shuffled)
    assert metrics.auc_within(*a) == pytest.approx(metrics.auc_within(*b), nan_ok=True)
    assert metrics.ece(*a[:3]) == pytest.approx(metrics.ece(*b[:3]))


@given(CELLS)
def test_cells_equal_the_rows_they_stand_for(cells: list[tuple[float, tuple[int, int], int]]) -> None:
    p, runs, successes, group = arrays(cells)
    each = rows(p, runs, successes, group)
    score, outcome = np.array([r[0] for r in each]), np.array([r[1] for r in each])
    ones = np.ones(len(each), dtype=int)
    for metric in (metrics.auc, metrics.brier, metrics.log_loss, metrics.ece):
        assert metric(p, runs, successes) == pytest.approx(metric(score, ones, outcome), nan_ok=True)


def test_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    p, ones = rng.random(500).round(2), np.ones(500, dtype=int)
    y = rng.binomial(1, p)
    assert metrics.auc(p, ones, y) == pytest.approx(roc_auc_score(y, p))
    assert metrics.brier(p, ones, y) == pytest.approx(brier_score_loss(y, p))
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    assert metrics.log_loss(p, ones, y) == pytest.approx(sklearn_log_loss(y, clipped))


def test_brier_and_log_loss_by_hand() -> None:
    p, runs, successes = np.array([0.8, 0.5]), np.array([2, 1]), np.array([1, 0])
    assert metrics.brier(p, runs, successes) == pytest.approx((0.04 + 0.64 + 0.25) / 3)
    expected = -(math.log(0.8) + math.log(0.2) + math.log(0.5)) / 3
    assert metrics.log_loss(p, runs, successes) == pytest.approx(expected)


def test_log_loss_of_a_certain_mistake_is_finite() -> None:
    one = np.array([1])
    assert metrics.log_loss(np.array([0.0]), one, one) == pytest.approx(-math.log(1e-7))
    assert metrics.log_loss(np.array([1.0]), one, 0 * one) == pytest.approx(-math.log(1e-7), rel=1e-4)


def test_ece_by_hand() -> None:
    # Bins of width 1/15: .95 and 1.0 share the last, where 2 of 4 are right: |2 − (.95 · 2 + 1 · 2)| = 1.9;
    # .05 stands alone, 1 of 2 right: |1 − .1| = .9.
    p, runs, successes = np.array([0.95, 1.0, 0.05]), np.array([2, 2, 2]), np.array([1, 1, 1])
    assert metrics.ece(p, runs, successes) == pytest.approx((1.9 + 0.9) / 6)


def test_ece_of_calibrated_predictions_goes_to_zero() -> None:
    rng = np.random.default_rng(1)
    p, runs = rng.random(20_000), np.full(20_000, 5)
    assert metrics.ece(p, runs, rng.binomial(runs, p)) < 0.01
    assert metrics.ece(p, runs, rng.binomial(runs, p**2)) > 0.1


def test_not_defined_is_nan() -> None:
    one = np.array([1, 1])
    assert math.isnan(metrics.auc(np.array([0.2, 0.3]), one, one))
    assert math.isnan(metrics.auc(np.array([0.2, 0.3]), one, 0 * one))
    assert math.isnan(metrics.auc_within(np.array([0.2, 0.3]), one, np.array([0, 1]), np.array([0, 1])))


def test_skill() -> None:
    assert metrics.skill(0.1, 0.2) == pytest.approx(0.5)
    assert metrics.skill(0.2, 0.2) == 0
    assert metrics.skill(0.3, 0.2) < 0
    assert math.isnan(metrics.skill(0.0, 0.0))
