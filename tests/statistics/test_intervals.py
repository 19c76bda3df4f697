"""The bootstrap against theory, and coverage of its intervals on simulated logs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oirl.statistics.intervals import bootstrap_means, percentile_interval, success_interval


def test_mean_and_variance_are_those_of_theory() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=(40, 2))
    draws = bootstrap_means(values, np.random.default_rng(1), 60_000)
    # Given the values, a resampled mean has the sample's mean and its variance (over n) divided by n.
    variance = values.var(axis=0) / 40
    assert draws.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=4 * np.sqrt(variance.max() / 60_000))
    assert draws.var(axis=0) == pytest.approx(variance, rel=0.03)
    covariance = np.cov(values.T, ddof=0)[0, 1] / 40
    assert np.cov(draws.T, ddof=0)[0, 1] == pytest.approx(covariance, abs=0.05 * variance.max())


def test_columns_stay_paired() -> None:
    a = np.random.default_rng(0).random(30)
    draws = bootstrap_means(np.stack([a, a + 0.25, -a], axis=1), np.random.default_rng(1), 500)
    assert draws[:, 1] - draws[:, 0] == pytest.approx(0.25)
    assert draws[:, 2] == pytest.approx(-draws[:, 0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=30), st.integers(0, 99))
def test_draws_stay_within_the_values_and_the_interval_within_the_draws(values: list[float], seed: int) -> None:
    column = np.array(values)[:, None]
    draws = bootstrap_means(column, np.random.default_rng(seed), 200)
    assert draws.shape == (200, 1)
    assert draws.min() >= column.min() - 1e-12
    assert draws.max() <= column.max() + 1e-12
    low, high = percentile_interval(draws)
    assert draws.min() <= low <= high <= draws.max()


def test_one_seed_one_result_and_another_another() -> None:
    values = np.random.default_rng(0).random((50, 1))
    a, b, c = (bootstrap_means(values, np.random.default_rng(s), 300) for s in (7, 7, 8))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_many_rows_go_in_blocks_and_give_the_same_theory() -> None:
    values = np.random.default_rng(0).random((300_000, 1))
    draws = bootstrap_means(values, np.random.default_rng(1), 30)
    assert draws.shape == (30, 1)
    assert np.abs(draws - values.mean()).max() < 5 * values.std() / np.sqrt(300_000)
    assert draws.std() > 0.3 * values.std() / np.sqrt(300_000)


def test_percentiles_by_hand() -> None:
    low, high = percentile_interval(np.arange(101.0)[:, None], level=0.9)
    assert (low[0], high[0]) == (pytest.approx(5), pytest.approx(95))


def test_clusters_are_resampled_whole() -> None:
    """Ten copies of each of 40 values have the interval of the 40, not of 400; singles have the plain one."""
    values = np.random.default_rng(0).random((40, 1))
    plain = bootstrap_means(values, np.random.default_rng(1), 4000).std()
    copies = np.repeat(values, 10, axis=0)
    clusters = np.repeat(np.arange(40), 10)
    assert bootstrap_means(copies, np.random.default_rng(1), 4000, clusters).std() == pytest.approx(plain)
    assert bootstrap_means(copies, np.random.default_rng(1), 4000).std() == pytest.approx(plain / 10**0.5, rel=0.1)
    same = bootstrap_means(values, np.random.default_rng(1), 100, np.arange(40))
    assert same == pytest.approx(bootstrap_means(values, np.random.default_rng(1), 100))


def coverage(kind: str, simulations: int = 400) -> float:
    """Return how often the 95% interval holds the known truth: 120 queries, 2 runs, 2 prompts, mixed difficulty."""
    hits = 0
    for seed in range(simulations):
        rng = np.random.default_rng(seed)
        ease = rng.beta(2, 2, 120)  # mean ½: what queries share makes the two columns dependent
        better = np.clip(ease + 0.08 * rng.integers(-1, 2, 120), 0, 1)
        rates = rng.binomial(2, np.stack([ease, better])) / 2
        if kind == "gain":
            low, high = (v[0] for v in percentile_interval(bootstrap_means((rates[1] - rates[0])[:, None], rng, 500)))
            hits += low <= 0.0 <= high
        else:
            _, low, high = success_interval(rates[0])
            hits += low <= 0.5 <= high
    return hits / simulations


@pytest.mark.parametrize("kind", ["gain", "success"])
def test_intervals_cover_the_truth_as_often_as_they_say(kind: str) -> None:
    assert 0.92 <= coverage(kind) <= 0.98


def test_clusters_of_unlike_sizes_give_means_over_queries() -> None:
    """Whatever clusters are drawn, the mean of ones is one; and a large cluster weighs by its queries."""
    clusters = np.repeat([0, 1, 2], [1, 5, 50])
    assert bootstrap_means(np.ones((56, 1)), np.random.default_rng(0), 200, clusters) == pytest.approx(1.0)
    draws = bootstrap_means((clusters == 2).astype(float)[:, None], np.random.default_rng(0), 500, clusters)
    possible = {a * 50 / (a * 50 + b * 5 + c) for a in range(4) for b in range(4 - a) for c in [3 - a - b]}
    assert {round(float(d), 9) for d in draws[:, 0]} <= {round(v, 9) for v in possible}
