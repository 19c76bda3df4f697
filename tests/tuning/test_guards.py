"""What tells that a run goes wrong: limits, and a reward that rises while gold falls."""

from __future__ import annotations

import numpy as np
import pytest

from oirl.tuning.guards import drifted, over_optimised, pairs_of, too_far


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


def gamed(change: np.ndarray, rise: float = 1.0, groups: np.ndarray | None = None, comparisons: int = 1) -> str | None:
    n = len(change)
    zero, own = np.zeros(n), np.arange(n)
    return over_optimised(zero, zero + rise, zero, change, own if groups is None else groups, comparisons=comparisons)


def test_a_reward_is_gamed_if_gold_has_fallen_for_sure() -> None:
    # 100 queries, gold falls by 1 on 10 of them: mean −0.1, s.e. √(0.1 · 0.9/99) ≈ 0.0302, 1.645 of which are 0.0496.
    change = -(np.arange(100) < 10).astype(float)
    told = gamed(change)
    assert told is not None
    assert "risen by 1 while gold has fallen by 0.1 (at least 0.0504)" in told
    assert gamed(change, rise=-0.1) is None  # the reward has not risen: the policy is worse, not gaming
    # On 2 of 100: mean −0.02, s.e. 0.0141, upper end +0.003.
    assert gamed(-(np.arange(100) < 2).astype(float)) is None
    assert gamed(np.zeros(100)) is None


def test_a_run_that_looks_often_must_see_more() -> None:
    # On 5 of 100: −0.05 + 1.645 · 0.0219 lies below zero, −0.05 + 2.81 · 0.0219 (20 comparisons) does not.
    change = -(np.arange(100) < 5).astype(float)
    assert gamed(change) is not None
    assert gamed(change, comparisons=20) is None
    assert [pairs_of(n) for n in (1, 2, 3, 11)] == [1, 1, 3, 55]


def test_the_rewards_of_another_model_do_not_count() -> None:
    change, zero = -(np.arange(100) < 10).astype(float), np.zeros(100)
    told = over_optimised(None, zero - 5, zero, change, np.arange(100))
    assert told == "gold has fallen by 0.1 (at least 0.0504): the reward is being gamed"


def test_a_handful_of_queries_tells_nothing() -> None:
    assert gamed(-np.ones(19)) is None
    assert gamed(-np.ones(20)) is not None


def test_near_duplicates_count_as_one() -> None:
    change = -(np.arange(200) < 10).astype(float)
    assert gamed(change) is not None
    assert gamed(change, groups=np.arange(200) // 10) is None  # one group of ten has fallen: that may be chance


def test_queries_without_a_reward_do_not_count() -> None:
    change = -(np.arange(100) < 10).astype(float)
    change[50:] = np.nan
    assert "gold has fallen by 0.2" in str(gamed(change))
    assert gamed(np.full(5, np.nan)) is None


def test_false_alarms_are_rare_where_nothing_is_gamed() -> None:
    """200 runs of which nothing changes but luck: ten looks at 60 queries, each against the best so far."""
    rng = np.random.default_rng(0)
    alarms, looks, n = 0, 10, 60
    for _ in range(200):
        best = rng.random(n) < 0.5
        for _ in range(looks):
            now = rng.random(n) < 0.5
            told = over_optimised(
                np.zeros(n), np.ones(n), best * 1.0, now * 1.0, np.arange(n), comparisons=pairs_of(looks + 1)
            )
            if told is not None:
                alarms += 1
                break
            best = now if now.mean() > best.mean() else best
    assert alarms <= 15  # 5% of 200 are 10
