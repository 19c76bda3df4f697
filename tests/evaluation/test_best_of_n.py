"""Choosing among N by brute force over all subsets, identities between the curves, and the law of over-optimisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import combinations
from math import comb, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oirl.evaluation.best_of_n import (
    Candidates,
    best_of_n_kl,
    curves,
    expected_of_best,
    expected_of_vote,
    expected_of_weighted_vote,
    fit_over_optimisation,
    order_weights,
    sizes_up_to,
    turns_down,
)


def candidates(q: int, m: int, seed: int = 0, *, answers: int = 3, levels: int = 4) -> Candidates:
    """Return candidates with many ties; answer −1 stands for none, and the gold follows the answer, with some noise."""
    rng = np.random.default_rng(seed)
    answer = rng.integers(-1, answers, (q, m))
    gold = ((answer == 0) ^ (rng.random((q, m)) < 0.1)).astype(float)
    reward = rng.integers(0, levels, (q, m)) + 0.5 * gold
    return Candidates(reward, gold, answer, rng.integers(0, 4, (q, m)) / 2)


def best_by_hand(reward: np.ndarray, value: np.ndarray, n: int) -> float:
    """Return the mean over all subsets of the mean value of those with the highest reward."""
    worth = []
    for subset in map(list, combinations(range(len(reward)), n)):
        best = reward[subset] == reward[subset].max()
        worth.append(value[subset][best].mean())
    return float(np.mean(worth))


def vote_by_hand(gold: np.ndarray, answer: np.ndarray, weight: np.ndarray, n: int) -> float:
    """Return the mean over all subsets of the gold of a random response with one of the answers with the most votes."""
    found = []
    for subset in map(list, combinations(range(len(gold)), n)):
        votes = {a: weight[subset][answer[subset] == a].sum() for a in set(answer[subset].tolist()) - {-1}}
        most = max(votes.values(), default=0)
        won = [gold[subset][answer[subset] == a].mean() for a, v in votes.items() if v == most]
        found.append(np.mean(won) if most > 0 else gold[subset].mean())
    return float(np.mean(found))


@pytest.mark.parametrize("m", [1, 2, 5, 7])
def test_order_weights_count_subsets(m: int) -> None:
    found = order_weights(m, range(1, m + 1))
    for n in range(1, m + 1):
        firsts = [min(subset) for subset in combinations(range(m), n)]
        assert found[n - 1] == pytest.approx(np.bincount(firsts, minlength=m) / comb(m, n), abs=1e-12)


@given(st.integers(1, 600), st.data())
def test_order_weights_are_a_falling_distribution(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    (found,) = order_weights(m, [n])
    assert found.sum() == pytest.approx(1)
    assert found[0] == pytest.approx(n / m)
    assert (np.diff(found) <= 1e-12).all()
    assert not found[m - n + 1 :].any()


@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
@pytest.mark.parametrize("m", [1, 3, 6])
def test_expected_of_best_is_the_mean_over_all_subsets(m: int, levels: int) -> None:
    c = candidates(5, m, levels, levels=levels)
    value = np.random.default_rng(1).normal(size=(5, m))
    found = expected_of_best(c.reward, value, range(1, m + 1))
    for q in range(5):
        for n in range(1, m + 1):
            assert found[q, n - 1] == pytest.approx(best_by_hand(c.reward[q], value[q], n))


def test_expected_of_best_by_hand() -> None:
    """Of two of three: the best in two subsets of three, the middle in one; then ties."""
    value = np.array([[1.0, 0.0, 0.25]])
    assert expected_of_best(np.array([[5.0, 9.0, 7.0]]), value, [1, 2, 3])[0] == pytest.approx([1.25 / 3, 0.25 / 3, 0])
    assert expected_of_best(np.array([[2.0, 2.0, 1.0]]), value, [3])[0] == pytest.approx([0.5])


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_the_order_of_responses_does_not_matter(seed: int, m: int) -> None:
    c, rng = candidates(3, m, seed), np.random.default_rng(seed)
    shuffle = rng.permutation(m)
    again = Candidates(c.reward[:, shuffle], c.gold[:, shuffle], c.answer[:, shuffle], c.weight[:, shuffle])
    sizes = [m]
    a, b = curves(c, sizes, np.random.default_rng(0)), curves(again, sizes, np.random.default_rng(0))
    for name in a:
        assert a[name] == pytest.approx(b[name])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("m", [2, 3, 6])
def test_votes_of_all_by_brute_force(m: int, weighted: bool) -> None:
    c = candidates(40, m, m)
    weight = c.weight if weighted else np.ones_like(c.weight)
    found = expected_of_vote(c, weight, m, np.random.default_rng(0))
    expected = [vote_by_hand(c.gold[q], c.answer[q], weight[q], m) for q in range(40)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_votes_of_some_come_near_the_mean_over_all_subsets(n: int, weighted: bool) -> None:
    c = candidates(12, 6, 3)
    weight = c.weight if weighted else np.ones_like(c.weight)
    found = expected_of_vote(c, weight, n, np.random.default_rng(0), draws=4000)
    expected = np.array([vote_by_hand(c.gold[q], c.answer[q], weight[q], n) for q in range(12)])
    # Each draw lies in [0, 1]: its standard error is at most ½/√4000 < 0.008.
    assert found == pytest.approx(expected, abs=0.04)
    assert found.mean() == pytest.approx(expected.mean(), abs=0.012)


def test_votes_by_hand() -> None:
    """Two for answer 0 (half of them right), one for answer 1 (right); the weight turns it round."""
    c = Candidates(np.zeros((1, 3)), np.array([[1.0, 0.0, 1.0]]), np.array([[0, 0, 1]]), np.array([[1.0, 1.0, 5.0]]))
    rng = np.random.default_rng(0)
    assert expected_of_vote(c, np.ones((1, 3)), 3, rng).tolist() == [0.5]
    assert expected_of_vote(c, c.weight, 3, rng).tolist() == [1.0]
    assert expected_of_vote(c, np.array([[1.0, 1.0, 2.0]]), 3, rng).tolist() == [0.75]
    assert expected_of_vote(c, np.zeros((1, 3)), 3, rng) == pytest.approx([2 / 3])


def test_votes_that_rounding_alone_tells_apart_are_tied() -> None:
    c = Candidates(np.zeros((1, 4)), np.array([[1.0, 1, 1, 0]]), np.array([[0, 0, 0, 1]]), np.zeros((1, 4)))
    weight = np.array([[0.1, 0.1, 0.1, 0.3]])
    assert weight[0, :3].sum() != weight[0, 3]
    assert expected_of_vote(c, weight, 4, np.random.default_rng(0)).tolist() == [0.5]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_without_answers_a_vote_is_chance(n: int) -> None:
    gold = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    c = Candidates(np.zeros((2, 4)), gold, np.full((2, 4), -1), np.ones((2, 4)))
    found = expected_of_vote(c, c.weight, n, np.random.default_rng(0), draws=4000)
    assert found == pytest.approx([0.25, 0.75], abs=0.03)


def test_one_answer_is_worth_more_than_none() -> None:
    """The single response with an answer wins every vote it takes part in."""
    c = Candidates(np.zeros((1, 3)), np.array([[1.0, 0.0, 0.0]]), np.array([[0, -1, -1]]), np.ones((1, 3)))
    assert expected_of_vote(c, c.weight, 3, np.random.default_rng(0)).tolist() == [1.0]


def test_nothing_is_drawn_for_one_or_for_all() -> None:
    c = candidates(10, 5)
    for n in (1, 5):
        a, b = (expected_of_vote(c, c.weight, n, np.random.default_rng(seed), draws=1) for seed in (0, 1))
        assert np.array_equal(a, b)
    assert expected_of_vote(c, c.weight, 1, np.random.default_rng(0)) == pytest.approx(c.gold.mean(axis=1))


def test_queries_with_unlike_numbers_of_answers_give_no_warning() -> None:
    """A numpy warning would land on the standard error of whoever draws a curve."""
    c = Candidates(np.zeros((2, 3)), np.ones((2, 3)), np.array([[0, 0, 0], [0, 1, 2]]), np.ones((2, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expected_of_vote(c, c.weight, 3, np.random.default_rng(0)).tolist() == [1.0, 1.0]


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_curves_keep_their_order(seed: int, m: int) -> None:
    c, sizes = candidates(4, m, seed), list(range(1, m + 1))
    found = curves(c, sizes, np.random.default_rng(seed))
    assert all(array.shape == (4, m) for array in found.values())
    worst = expected_of_best(-c.gold, c.gold, sizes)
    for name in ("best_of_n", "random"):
        assert (found["oracle"] >= found[name] - 1e-9).all()
        assert (found[name] >= worst - 1e-9).all()
    assert (np.diff(found["proxy"], axis=1) >= -1e-9).all()
    assert (np.diff(found["oracle"], axis=1) >= -1e-9).all()
    assert found["proxy"][:, -1] == pytest.approx(c.reward.max(axis=1))
    assert found["oracle"][:, -1] == pytest.approx(c.gold.max(axis=1))
    for name in ("best_of_n", "random", "oracle", "majority"):
        assert found[name][:, 0] == pytest.approx(c.gold.mean(axis=1))


def test_a_reward_that_is_gold_is_the_oracle_and_one_that_says_nothing_is_chance() -> None:
    c = candidates(6, 5)
    flat = Candidates(np.ones_like(c.reward), c.gold, c.answer, c.weight)
    perfect = Candidates(c.gold, c.gold, c.answer, c.weight)
    found = curves(perfect, [1, 3, 5], np.random.default_rng(0))
    assert np.array_equal(found["best_of_n"], found["oracle"])
    found = curves(flat, [1, 3, 5], np.random.default_rng(0))
    assert found["best_of_n"] == pytest.approx(found["random"])


def weighted_by_hand(c: Candidates, q: int, n: int) -> float:
    """Return the mean over all subsets of the gold of the best by reward among those with the weightiest answers."""
    found = []
    for subset in map(list, combinations(range(c.gold.shape[1]), n)):
        answer, weight, reward, gold = (x[q][subset] for x in (c.answer, c.weight, c.reward, c.gold))
        votes = {a: weight[answer == a].sum() for a in set(answer.tolist()) - {-1}}
        most = max(votes.values(), default=0)
        there = np.isin(answer, [a for a, v in votes.items() if v == most]) if most > 0 else np.ones(n, bool)
        found.append(gold[there][reward[there].argmax()])
    return float(np.mean(found))


@pytest.mark.parametrize("m", [2, 4, 6])
def test_the_weighted_vote_of_all_by_brute_force(m: int) -> None:
    c = candidates(40, m, m)
    found = expected_of_weighted_vote(c, m, np.random.default_rng(0))
    assert found == pytest.approx([weighted_by_hand(c, q, m) for q in range(40)])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_weighted_vote_of_some_comes_near_the_mean_over_all_subsets(n: int) -> None:
    c = candidates(12, 6, 3)
    found = expected_of_weighted_vote(c, n, np.random.default_rng(0), draws=4000)
    assert found == pytest.approx([weighted_by_hand(c, q, n) for q in range(12)], abs=0.04)


def test_both_votes_see_the_same_subsets() -> None:
    """With one answer to each response, equal weights and no reward, the two votes are one and the same."""
    c = candidates(20, 6)
    alike = np.zeros_like(c.reward)
    plain = Candidates(alike, np.repeat(c.gold[:, :1], 6, axis=1), np.zeros((20, 6), dtype=int), np.ones((20, 6)))
    found = curves(plain, [2, 3, 5], np.random.default_rng(1))
    assert np.array_equal(found["majority"], found["weighted_majority"])


def test_kl_by_hand() -> None:
    assert best_of_n_kl([1, 2, 4]) == pytest.approx([0, log(2) - 0.5, log(4) - 0.75])


@pytest.mark.parametrize("n", [2, 5, 30])
def test_kl_is_that_of_the_best_of_n_of_a_continuous_reward(n: int) -> None:
    """The quantile of the best has the density n u^(n−1): KL = ∫ n u^(n−1) log(n u^(n−1)) du."""
    u = (np.arange(200_000) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert best_of_n_kl([n])[0] == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


@given(st.integers(1, 5000))
def test_sizes_rise_to_the_most(most: int) -> None:
    sizes = sizes_up_to(most)
    assert sizes[: min(most, 16)] == list(range(1, min(most, 16) + 1))
    assert sizes[-1] == most
    assert (np.diff(sizes) > 0).all()
    assert len(sizes) < 36


def test_sizes_by_hand() -> None:
    assert sizes_up_to(64)[15:] == [16, 23, 33, 47, 64]


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.2), (1.0, 0.05), (0.3, -0.1), (-0.2, 0.1)])
def test_recovers_alpha_and_beta(alpha: float, beta: float) -> None:
    kl = best_of_n_kl(sizes_up_to(256))
    d = np.sqrt(kl)
    found = fit_over_optimisation(kl, d * (alpha - beta * d))
    assert found is not None
    assert (found.alpha, found.beta) == (pytest.approx(alpha), pytest.approx(beta))
    if alpha > 0 and beta > 0:
        assert found.peak_kl == pytest.approx((alpha / (2 * beta)) ** 2)
        grid = np.linspace(0, 40, 4001) ** 2
        assert grid[np.argmax(np.sqrt(grid) * (alpha - beta * np.sqrt(grid)))] == pytest.approx(found.peak_kl, rel=0.02)
    else:
        assert found.peak_kl is None


def test_few_sizes_say_nothing_of_over_optimisation() -> None:
    assert fit_over_optimisation(best_of_n_kl([1, 2, 4]), np.array([0, 0.1, 0.2])) is None
    assert fit_over_optimisation(best_of_n_kl([1, 2, 4, 8]), np.array([0, 0.1, 0.2, 0.2])) is not None


RISING, HUMP = np.array([[0.0, 1.0, 2.0]] * 4), np.array([[0.0, 1.0, 0.25], [0.0, 1.0, 0.75]] * 2)


@pytest.mark.parametrize(
    ("proxy", "gold", "lower_end", "expected"),
    [
        (RISING, HUMP, np.min, (1, 0.5)),
        (RISING, HUMP[:, ::-1].copy(), np.min, (1, 1.0)),
        (RISING, RISING, np.min, None),
        (RISING[:, ::-1], HUMP, np.min, None),
        (np.zeros((4, 3)), HUMP, np.min, None),
        (RISING, HUMP, lambda loss: 0.0, None),
        (RISING, HUMP, lambda loss: float("nan"), None),
    ],
    ids=["sure", "sure from the left", "gold rises", "proxy falls", "proxy flat", "may be chance", "no interval"],
)
def test_turns_down_only_where_gold_surely_falls_while_the_proxy_rises(
    proxy: np.ndarray, gold: np.ndarray, lower_end: Callable[[np.ndarray], float], expected: tuple[int, float] | None
) -> None:
    assert turns_down(proxy, gold, lower_end) == expected


def test_turns_down_asks_for_the_interval_of_the_loss_of_each_query() -> None:
    asked = []
    turns_down(RISING, HUMP, lambda loss: asked.append(loss.tolist()) or 1.0)
    assert asked == [[0.75, 0.25, 0.75, 0.25]]


def test_a_proxy_that_likes_one_kind_of_wrong_answer_turns_down() -> None:
    """One in twenty responses is wrong and loved by the proxy: best of many finds it."""
    rng = np.random.default_rng(0)
    gold = (rng.random((300, 64)) < 0.5).astype(float)
    reward = gold + rng.normal(size=gold.shape)
    hacks = rng.random(gold.shape) < 0.05
    gold[hacks], reward[hacks] = 0, 6
    c = Candidates(reward, gold, np.full(gold.shape, -1), np.ones(gold.shape))
    sizes = sizes_up_to(64)
    found = curves(c, sizes, rng)
    down = turns_down(found["proxy"], found["best_of_n"], lambda x: x.mean() - 1.96 * x.std() / np.sqrt(len(x)))
    assert down is not None
    assert 2 <= sizes[down[0]] <= 8
    assert down[1] > 0.3
    law = fit_over_optimisation(best_of_n_kl(sizes), (found["best_of_n"] - found["best_of_n"][:, :1]).mean(axis=0))
    assert law is not None
    assert law.beta > 0
