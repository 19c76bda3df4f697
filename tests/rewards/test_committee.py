"""Committees: no member scores what it has seen, nothing is chosen on the fold it is used for, the jackknife."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit

from oirl.rewards.calibration import cross_fit_platt, fit_platt
from oirl.rewards.committee import Committee, fit_committee, jackknife_error
from oirl.rewards.embedders import Matrix
from oirl.rewards.learners import Comparisons, Learner, LinearLearner, Target, Verdicts


class Memory(Learner):
    """Scores 1 a row that it has seen, 0 any other; rows are told apart by their first column."""

    name = "memory"

    def fit(self, rows: Matrix, target: Target, groups: np.ndarray, seed: int) -> Memory:
        self.seen, self.target, self.groups, self.seed = set(rows[:, 0].tolist()), target, groups, seed
        self.rows = rows[:, 0]
        return self

    def scores(self, rows: Matrix) -> np.ndarray:
        return np.array([float(x in self.seen) for x in rows[:, 0].tolist()])

    def state(self) -> dict[str, np.ndarray]:
        return {"seen": np.array(sorted(self.seen))}

    def restore(self, state: Mapping[str, np.ndarray]) -> Memory:
        self.seen = set(state["seen"].tolist())
        return self


class Guess(Memory):
    """One of several constants' signs: the score is `slope` times the second column, nothing is learned."""

    name = "guess"

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__(slope=slope)

    def candidates(self) -> Sequence[Learner]:
        return [Guess(slope) for slope in (-2.0, -1.0, 1.0, 2.0)]

    def scores(self, rows: Matrix) -> np.ndarray:
        return np.asarray(self.parameters["slope"] * rows[:, 1])


ROWS = np.c_[np.arange(24.0), np.random.default_rng(0).normal(size=24)]
FOLD = np.random.default_rng(1).permutation(np.arange(24) % 4)
ONES = Verdicts(np.ones(24, int), np.arange(24) % 2)


def within_folds(seed: int = 0) -> Comparisons:
    rng = np.random.default_rng(seed)
    sides = [rng.choice(np.flatnonzero(f == FOLD), 2, replace=False) for f in np.arange(40) % 4]
    return Comparisons(*np.array(sides).T, rng.random(40))


def test_every_row_is_scored_by_the_member_that_has_not_seen_its_fold() -> None:
    committee, held_out = fit_committee(Memory(), ROWS, ONES, FOLD, np.arange(24), 5)
    assert not held_out.any()
    assert np.array_equal(committee.scores(ROWS), np.arange(4)[:, None] != FOLD)
    assert [member.seed for member in committee.members] == [5, 6, 7, 8]


def test_members_get_their_own_rows_verdicts_and_groups() -> None:
    target = Verdicts(np.arange(24) + 30, np.arange(24))
    committee, _ = fit_committee(Memory(), ROWS, target, FOLD, np.arange(24) * 10, 0)
    for f, member in enumerate(committee.members):
        kept = np.flatnonzero(f != FOLD)
        assert np.array_equal(member.rows, kept)
        assert np.array_equal(member.groups, kept * 10)
        assert np.array_equal(member.target.runs, kept + 30)
        assert np.array_equal(member.target.successes, kept)


@pytest.mark.parametrize("with_margin", [False, True])
def test_members_get_the_comparisons_of_their_rows_in_new_positions(with_margin: bool) -> None:
    target = within_folds()
    if not with_margin:
        target = Comparisons(target.chosen, target.rejected)
    committee, held_out = fit_committee(Memory(), ROWS, target, FOLD, np.arange(24), 0)
    # A member has seen 18 of the 24 rows: scores of comparisons are taken from its mean.
    assert held_out == pytest.approx(np.full(24, -0.75))
    assert committee.scores(ROWS).mean(axis=1) == pytest.approx(np.zeros(4))
    for f, member in enumerate(committee.members):
        inside = FOLD[target.chosen] != f
        assert np.array_equal(member.rows[member.target.chosen], target.chosen[inside])
        assert np.array_equal(member.rows[member.target.rejected], target.rejected[inside])
        assert (member.target.margin is not None) == with_margin
        if with_margin:
            assert np.array_equal(member.target.margin, target.margin[inside])


@pytest.mark.parametrize("paired", [False, True])
def test_what_is_chosen_for_a_fold_does_not_depend_on_its_labels(paired: bool) -> None:
    """Labels of fold 0 that shout for another candidate sway every member but that of fold 0."""
    z = ROWS[:, 1]
    if paired:
        base = within_folds()
        up = z[base.chosen] > z[base.rejected]
        swap = np.where(FOLD[base.chosen] == 0, up, ~up)  # the higher column wins, but in fold 0
        target: Any = Comparisons(
            np.where(swap, base.rejected, base.chosen), np.where(swap, base.chosen, base.rejected)
        )
    else:
        runs = np.where(FOLD == 0, 1000, 1)
        target = Verdicts(runs, np.where((z > 0) == (FOLD != 0), runs, 0))
    committee, held_out = fit_committee(Guess(), ROWS, target, FOLD, np.arange(24), 0)
    slopes = [member.parameters["slope"] for member in committee.members]
    assert slopes[0] == 2.0
    if not paired:
        assert slopes[1:] == [-2.0, -2.0, -2.0]
    centre = z.mean() if paired else 0.0
    assert held_out == pytest.approx(np.array(slopes)[FOLD] * (z - centre))


def test_a_real_learner_keeps_its_strength_where_labels_of_the_fold_change() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(200, 30)).astype(np.float32)
    fold, runs = np.arange(200) % 5, np.ones(200, int)
    right = (rng.random(200) < expit(rows[:, 0])).astype(int)
    found = []
    for labels in (right, np.where(fold == 2, 1 - right, right), np.where(fold == 2, 1, right)):
        committee, scores = fit_committee(LinearLearner(), rows, Verdicts(runs, labels), fold, np.arange(200), 0)
        found.append((committee.members[2].parameters["strength"], scores[fold == 2]))
    assert found[0][0] == found[1][0] == found[2][0]
    assert np.array_equal(found[0][1], found[1][1])
    assert np.array_equal(found[0][1], found[2][1])


def test_the_strength_chosen_has_the_least_cross_fitted_log_loss_elsewhere() -> None:
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(120, 40)).astype(np.float32)
    fold, runs = np.arange(120) % 4, rng.integers(1, 4, 120)
    successes = rng.binomial(runs, expit(rows[:, 0]))
    committee, _ = fit_committee(LinearLearner(), rows, Verdicts(runs, successes), fold, np.arange(120), 0)
    losses = []
    for strength in LinearLearner.STRENGTHS:
        z = fit_committee(LinearLearner(strength), rows, Verdicts(runs, successes), fold, np.arange(120), 0)[1]
        losses.append(runs * np.logaddexp(0, z) - successes * z)
    for f, member in enumerate(committee.members):
        best = np.argmin([loss[fold != f].sum() for loss in losses])
        assert member.parameters["strength"] == LinearLearner.STRENGTHS[best]


def test_a_committee_comes_back_from_its_arrays() -> None:
    committee, _ = fit_committee(Memory(), ROWS, ONES, FOLD, np.arange(24), 0)
    arrays_ = committee.arrays()
    assert sorted(arrays_) == ["centres", *(f"member{i}.seen" for i in range(4))]
    restored = Committee.restore([Memory() for _ in committee.describe()], arrays_)
    assert np.array_equal(restored.scores(ROWS), committee.scores(ROWS))
    assert Committee([Guess(1.0), Guess(2.0)], np.zeros(2)).describe() == [{"slope": 1.0}, {"slope": 2.0}]


@given(arrays(np.float64, st.tuples(st.integers(2, 9), st.integers(1, 5)), elements=st.floats(-100, 100)))
def test_jackknife_equals_the_textbook(values: np.ndarray) -> None:
    """Tukey (1958): √((K − 1)/K · Σ_k (v_k − v̄)²)."""
    k = len(values)
    deviations = values - sum(values) / k
    assert jackknife_error(values) == pytest.approx(np.sqrt((k - 1) / k * (deviations**2).sum(axis=0)), abs=1e-9)


@given(arrays(np.float64, st.integers(2, 30), elements=st.floats(-100, 100)))
def test_jackknife_of_a_mean_is_its_standard_error(sample: np.ndarray) -> None:
    n = len(sample)
    left_out = (sample.sum() - sample) / (n - 1)
    assert jackknife_error(left_out[:, None])[0] == pytest.approx(sample.std(ddof=1) / np.sqrt(n), abs=1e-7)


def test_members_that_agree_have_no_error() -> None:
    assert jackknife_error(np.full((5, 3), 2.5)).tolist() == [0, 0, 0]


def test_platt_of_a_fold_is_learned_on_the_other_folds() -> None:
    rng = np.random.default_rng(0)
    scores, fold = rng.normal(size=300), rng.integers(0, 3, 300)
    runs = rng.integers(1, 4, 300)
    successes = rng.binomial(runs, expit(0.5 * scores + 0.4))
    whole, of_fold = cross_fit_platt(scores, runs, successes, fold)
    assert whole == fit_platt(scores, runs, successes)
    assert len(of_fold) == 3
    for f in range(3):
        other = fold != f
        assert of_fold[f] == fit_platt(scores[other], runs[other], successes[other])
    flipped = cross_fit_platt(scores, runs, np.where(fold == 1, runs - successes, successes), fold)[1]
    assert flipped[1] == of_fold[1]
    assert flipped[0] != of_fold[0]
