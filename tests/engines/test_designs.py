"""Which prompt is run on which query: coverage, uniformity, propensities, and what the adaptive design favours."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, chisquare

from oirl.engines.designs import FLOOR, Cell, adaptive_round, balanced, check_design, full, random, top_two
from oirl.errors import ConfigError

SIZES = st.integers(1, 6)
KEY = st.floats(0, 1, exclude_max=True)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def replicates_count_up(cells: list[Cell]) -> bool:
    """Say whether the runs of each (query, prompt) are numbered 0, 1, … in the order of the cells."""
    count: Counter[tuple[int, int]] = Counter()
    for cell in cells:
        if cell.replicate != count[cell.query, cell.prompt]:
            return False
        count[cell.query, cell.prompt] += 1
    return True


# full -------------------------------------------------------------------------------------------------------


@given(SIZES, SIZES, SIZES)
@QUICK
def test_full_covers_each_cell_once_and_first_runs_come_first(n: int, p: int, r: int) -> None:
    cells = list(full(n, p, r))
    assert len(cells) == n * p * r
    assert {cell[:3] for cell in cells} == {(q, a, k) for q in range(n) for a in range(p) for k in range(r)}
    assert {cell.propensity for cell in cells} == {None}
    assert all(one.replicate <= other.replicate for one, other in pairwise(cells))
    assert list(full(n, p, r + 1))[: n * p * r] == cells  # a part of it is a smaller design


# random -----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(KEY, min_size=3, max_size=3), min_size=1, max_size=4), st.integers(2, 7))
@QUICK
def test_random_takes_the_prompt_of_the_key(keys: list[list[float]], p: int) -> None:
    cells = list(random(keys, p))
    assert [cell.query for cell in cells] == [0, 1, 2] * len(keys)
    assert {cell.propensity for cell in cells} == {1 / p}
    flat = [key for draw in keys for key in draw]
    for cell, key in zip(cells, flat, strict=True):
        assert 0 <= cell.prompt < p
        assert cell.prompt <= key * p < cell.prompt + 1
    assert replicates_count_up(cells)
    assert list(random(keys[:1], p)) == cells[:3]  # more draws change nothing of those before
    fewer = [cell for cell in cells if cell.query < 2]
    assert list(random([draw[:2] for draw in keys], p)) == fewer  # nor do more queries


# balanced ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 25), st.integers(2, 6), st.integers(1, 14), st.integers(0, 1000))
@QUICK
def test_balanced_spreads_prompts_evenly(n: int, p: int, r: int, seed: int) -> None:
    cells = list(balanced(n, p, r, np.random.default_rng(seed)))
    order = [cell.query for cell in cells[:n]]
    assert sorted(order) == list(range(n))
    assert [cell.query for cell in cells] == order * r
    for m in range(n // p + 1):  # a budget may end it: a part of it is even too
        assert np.bincount([cell.prompt for cell in cells[: m * p]], minlength=p).tolist() == [m] * p
    cells = [cell for draw in range(r) for cell in sorted(cells[draw * n : (draw + 1) * n])]
    assert {cell.propensity for cell in cells} == {1 / p}
    assert replicates_count_up(cells)
    drawn = np.array([cell.prompt for cell in cells]).reshape(r, n)
    for query in range(n):
        for first in range(0, r, p):  # different prompts as long as there are any
            turn = drawn[first : first + p, query]
            assert len(set(turn)) == len(turn)
    for draw in drawn:  # each draw on its own is as even as it can be
        count = np.bincount(draw, minlength=p)
        assert count.max() - count.min() <= (n % p > 0)
    # A whole Latin square is even; of the last one m rows and w columns are used, which hold each prompt at most
    # min(m, w) times, and leave it out of m + w - p at least.
    m, w = n % p, r % p
    count = np.bincount(drawn.ravel(), minlength=p)
    assert count.sum() == n * r
    assert count.max() - count.min() <= min(m, w) - max(0, m + w - p)


def test_each_draw_of_balanced_is_uniform_over_seeds() -> None:
    n, p, r, seeds = 5, 3, 4, 3000
    count = np.zeros((r, n, p))
    for seed in range(seeds):
        for i, cell in enumerate(balanced(n, p, r, np.random.default_rng(seed))):
            count[i // n, cell.query, cell.prompt] += 1
    assert (count.sum(axis=2) == seeds).all()
    values = [chisquare(row).pvalue for row in count.reshape(-1, p)]
    assert min(values) > 1e-4  # twenty of them: one in 500 such tests would fail by chance, were the seeds not fixed


def test_balanced_follows_its_seed() -> None:
    one, again, other = (list(balanced(30, 4, 2, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert one == again
    assert one != other


# adaptive ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.lists(KEY, min_size=1, max_size=20))
@QUICK
def test_adaptive_round_takes_the_prompt_of_the_key(weights: list[int], keys: list[float]) -> None:
    chances = np.array(weights) / sum(weights)
    queries = list(range(100, 100 + len(keys)))
    cells = list(adaptive_round(queries, keys, chances, Counter()))
    assert [cell.query for cell in cells] == queries
    edges = np.concatenate([[0.0], np.cumsum(chances)])
    for cell, key in zip(cells, keys, strict=True):
        assert edges[cell.prompt] - 1e-12 <= key <= edges[cell.prompt + 1] + 1e-12
        assert cell.propensity == chances[cell.prompt]


def test_adaptive_round_follows_the_probabilities() -> None:
    chances = np.array([0.07, 0.0, 0.6, 0.33])
    n = 10_000
    keys = [(i + 0.5) / n for i in range(n)]
    drawn = np.bincount([cell.prompt for cell in adaptive_round(range(n), keys, chances, Counter())], minlength=4)
    assert np.abs(drawn - chances * n).max() <= 1
    assert drawn[1] == 0  # what has no chance is never taken
    ends = list(adaptive_round([0, 1], [0.0, 1 - 2**-53], chances, Counter()))
    assert [cell.prompt for cell in ends] == [0, 3]
    assert [cell.propensity for cell in ends] == [0.07, 0.33]


def test_adaptive_round_goes_on_counting() -> None:
    count = Counter({(4, 1): 2})
    chances = np.array([0.0, 1.0])
    cells = [*adaptive_round([4, 5], [0.5, 0.5], chances, count), *adaptive_round([4], [0.5], chances, count)]
    assert cells == [Cell(4, 1, 2, 1.0), Cell(5, 1, 0, 1.0), Cell(4, 1, 3, 1.0)]


def chances_of(successes: list[int], runs: list[int]) -> np.ndarray:
    return top_two(np.array(successes), np.array(runs))


def best_by_integration(successes: list[int], runs: list[int]) -> np.ndarray:
    """Return P(prompt is the best) = ∫ density of its success · Π P(each other's success is lower)."""
    posteriors = [beta(1 + s, 1 + n - s) for s, n in zip(successes, runs, strict=True)]

    def chance(a: int) -> float:
        others = [p for i, p in enumerate(posteriors) if i != a]
        middle, spread = posteriors[a].mean(), posteriors[a].std()
        low, high = max(middle - 12 * spread, 0), min(middle + 12 * spread, 1)
        return float(quad(lambda x: posteriors[a].pdf(x) * np.prod([p.cdf(x) for p in others]), low, high)[0])

    return np.array([chance(a) for a in range(len(runs))])


def chances_by_hand(best: np.ndarray) -> np.ndarray:
    """Return the chance of each prompt when a coin takes the likely best, or else draws until a rival comes up."""
    found = np.zeros(len(best))
    for first, chance in enumerate(best):
        found[first] += chance / 2
        for second, rival in enumerate(best):
            if second != first:
                found[second] += chance / 2 * rival / (1 - chance)
    return 0.8 * found + 0.2 / len(best)


@pytest.mark.parametrize(
    ("successes", "runs"),
    [
        ([8, 6, 3], [12, 12, 12]),
        ([30, 29, 20, 2], [40, 41, 38, 5]),
        ([0, 1, 0], [1, 1, 0]),
        ([90, 70], [100, 100]),
        ([2600, 2580, 2550], [5000, 5000, 5000]),
    ],
)
def test_top_two_by_hand(successes: list[int], runs: list[int]) -> None:
    best = best_by_integration(successes, runs)
    assert best.sum() == pytest.approx(1, abs=1e-6)
    assert chances_of(successes, runs) == pytest.approx(chances_by_hand(best), abs=1e-4)


def test_the_rival_of_a_clear_winner_is_the_second_best() -> None:
    """Where next to no doubt is left about the best, the formula still tells the second best from the worst."""
    successes, runs = [90, 65, 20], [100, 100, 100]
    by_hand = chances_by_hand(best_by_integration(successes, runs))
    assert by_hand == pytest.approx([0.8 * 0.5 + 1 / 15, 0.8 * 0.5 + 1 / 15, 1 / 15], abs=1e-3)
    assert chances_of(successes, runs) == pytest.approx(by_hand, abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=8))
@QUICK
def test_top_two_is_a_distribution_with_a_floor(data: list[tuple[int, int]]) -> None:
    right, wrong = np.array(data).T
    chances = top_two(right, right + wrong)
    assert chances.shape == (len(data),)
    assert chances.sum() == pytest.approx(1, abs=1e-12)
    assert chances.min() >= FLOOR / len(data) - 1e-12
    assert np.isfinite(chances).all()


def test_top_two_in_extreme_cases() -> None:
    assert top_two(np.array([3]), np.array([9])).tolist() == [1.0]
    # No doubt about the best: it has half, the others share the other half.
    certain = top_two(np.array([0, 4000, 0]), np.array([4000, 4000, 4000]))
    assert certain == pytest.approx([0.4 * 0.5 + 1 / 15, 0.8 * 0.5 + 1 / 15, 0.4 * 0.5 + 1 / 15])
    nothing = np.zeros(5)
    assert top_two(nothing, nothing) == pytest.approx([0.2] * 5)
    # Of two prompts the rival of one is always the other: each has half, whatever is known.
    for right in ([9, 1], [4000, 0], [0, 0]):
        assert top_two(np.array(right), np.array([4000, 4000])) == pytest.approx([0.5, 0.5])


def test_top_two_runs_the_best_and_its_rival_more() -> None:
    right = [80, 74, 72, 30]
    chances = chances_of(right, [100] * 4)
    assert chances[0] > chances[1] + 0.05
    assert chances[1] > chances[2] + 0.02
    assert chances[2] > 3 * chances[3]
    assert chances[3] == pytest.approx(FLOOR / 4, abs=1e-3)
    assert chances_of(right[::-1], [100] * 4)[::-1] == pytest.approx(chances)


def test_weights_of_an_adaptive_design_are_unbiased() -> None:
    truth = np.array([0.25, 0.5, 0.75])
    n, rounds, repeats = 30, 6, 120
    estimates, runs = np.zeros((repeats, 3)), np.zeros(3)
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        right, tried, count = np.zeros(3), np.zeros(3), Counter[tuple[int, int]]()
        for _ in range(rounds):
            chances = top_two(right, tried)
            for cell in adaptive_round(range(n), rng.random(n).tolist(), chances, count):
                verdict = rng.random() < truth[cell.prompt]
                tried[cell.prompt] += 1
                right[cell.prompt] += verdict
                estimates[repeat, cell.prompt] += verdict / (cell.propensity or np.nan) / (n * rounds)
        runs += tried
    error = estimates.std(axis=0, ddof=1) / np.sqrt(repeats)
    assert error.max() < 0.02
    assert (np.abs(estimates.mean(axis=0) - truth) < 3.5 * error).all()
    assert runs[2] > 1.3 * runs[0]
    assert runs[2] > runs[1] > runs[0]


# checks -----------------------------------------------------------------------------------------------------


def test_designs_that_cannot_be() -> None:
    for design in ("full", "random", "balanced", "adaptive"):
        check_design(design, 2)
    check_design("full", 1)
    with pytest.raises(ConfigError, match="'fractional'; allowed: full, random, balanced, adaptive"):
        check_design("fractional", 3)
    for design in ("random", "balanced", "adaptive"):
        with pytest.raises(ConfigError, match=f"'{design}' chooses between prompts, and there is one"):
            check_design(design, 1)
