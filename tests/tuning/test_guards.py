"""What tells that a run goes wrong: limits, and a reward that rises while gold falls."""

from __future__ import annotations

import numpy as np
import pytest

from oirl.tuning.guards import drifted, over_optimised, too_far


def test_a_policy_is_too_far_above_the_limit_only() -> None:
    assert too_far(5.0, None) is None
    assert too_far(5.0, 5.0) is None
    assert too_far(5.1, 5.0) == "the KL of a response from the reference is 5.1 nats, above max_kl = 5"
    assert too_far(float("nan"), 5.0) is None  # what is no number ends a run elsewhere


@pytest.mark.parametrize(
    ("tokens", "distinct", "told"),
    [
        (19.9, 0.5, None),
        (20.1, 0.5, "2 times the tokens"),
        (4.9, 0.5, "0.49 times the tokens"),
        (10.0, 0.26, None),
        (10.0, 0.24, "0.48 times what it was"),
        (10.0, 5.0, None),  # more variety is no drift
        (10.0, None, None),
    ],
)
def test_drift_is_a_factor_of_length_or_of_variety(tokens: float, distinct: float | None, told: str | None) -> None:
    found = drifted({"tokens_mean": 10.0, "distinct_2": 0.5}, {"tokens_mean": tokens, "distinct_2": distinct}, 2.0)
    assert (found is None) if told is None else told in str(found)


def gamed(change: np.ndarray, rise: float = 1.0, groups: np.ndarray | None = None, among: int = 1) -> str | None:
    n = len(change)
    zero = np.zeros(n)
    return over_optimised(zero, zero + rise, zero, change, np.arange(n) if groups is None else groups, among=among)


def test_a_reward_is_gamed_if_gold_has_fallen_for_sure() -> None:
    # 100 queries, gold falls by 1 on 10 of them: mean −0.1, s.e. √(0.1 · 0.9/99) ≈ 0.0302, upper end −0.041.
    change = -(np.arange(100) < 10).astype(float)
    told = gamed(change)
    assert told is not None
    assert "risen by 1 while gold has fallen by 0.1 [0.0409, 0.159]" in told
    assert gamed(change, rise=-0.1) is None  # the reward has not risen: the policy is worse, not gaming
    # On 3 of 100: mean −0.03, s.e. 0.0171, upper end +0.004.
    assert gamed(-(np.arange(100) < 3).astype(float)) is None
    assert gamed(np.zeros(100)) is None


def test_the_best_of_many_validations_is_good_by_luck_too() -> None:
    # On 5 of 100: −0.05 ± 1.96 · 0.0219 lies below zero, −0.05 ± 2.81 · 0.0219 (the best of ten) does not.
    change = -(np.arange(100) < 5).astype(float)
    assert gamed(change) is not None
    assert gamed(change, among=10) is None


def test_near_duplicates_count_as_one() -> None:
    change = -(np.arange(100) < 10).astype(float)
    assert gamed(change, groups=np.arange(100) // 10) is None  # one group of ten has fallen: that may be chance


def test_queries_without_a_reward_do_not_count() -> None:
    change = -(np.arange(100) < 10).astype(float)
    change[50:] = np.nan
    assert "gold has fallen by 0.2" in str(gamed(change))
    assert gamed(np.full(5, np.nan)) is None


def test_false_alarms_are_rare_where_nothing_is_gamed() -> None:
    """A policy of which nothing changes but luck: 40 looks at 200 queries, each against the best so far."""
    rng = np.random.default_rng(0)
    alarms, looks = 0, 0
    for _ in range(40):
        best = rng.random(200) < 0.5
        for look in range(1, 11):
            now = rng.random(200) < 0.5
            alarm = over_optimised(
                np.zeros(200), np.ones(200), best.astype(float), now.astype(float), np.arange(200), among=look
            )
            alarms, looks = alarms + (alarm is not None), looks + 1
            best = now if now.mean() > best.mean() else best
    assert alarms / looks < 0.05
