"""The ceiling of a choice per query: by hand, against logs with a known truth, on SVAMP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oirl
from oirl.evaluation.ceilings import Ceiling, best_choice_ceiling, one_draw_oracle
from oirl.logs.cells import make_cells
from oirl.logs.groups import group_queries


def test_one_draw_oracle_by_hand() -> None:
    runs, successes = np.array([[2, 2], [1, 4]]), np.array([[1, 1], [0, 1]])
    assert one_draw_oracle(runs, successes) == pytest.approx(((1 - 0.25) + (1 - 0.75)) / 2)


def test_one_draw_oracle_by_simulation() -> None:
    rng = np.random.default_rng(0)
    runs = rng.integers(1, 5, (30, 3))
    successes = rng.binomial(runs, 0.4)
    drawn = rng.random((4000, 30, 3)) < successes / runs
    assert one_draw_oracle(runs, successes) == pytest.approx(drawn.any(axis=2).mean(), abs=0.01)


def logit(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def world(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return θ of n queries under five prompts."""
    difficulty = rng.normal(0, 1.5, (n, 1))
    step = np.linspace(0, 0.2, 5)
    if kind == "alike":  # the same for all queries: nothing to choose
        return np.tile(np.linspace(0.5, 0.55, 5), (n, 1))
    if kind == "difficulty":  # queries differ, the order of the prompts does not
        return logit(difficulty + step)
    if kind == "smooth":
        return logit(difficulty + rng.normal(0, 0.4, (n, 5)) + step)
    if kind == "sure":  # verdicts hardly vary, as at temperature 0
        return np.where(rng.random((n, 5)) < 0.5, 0.02, 0.98)
    if kind == "opposed":  # two prompts for two kinds of query
        first = rng.random((n, 1)) < 0.5
        return np.where(first, [0.9, 0.1, 0.55, 0.5, 0.5], [0.1, 0.9, 0.55, 0.5, 0.5])
    return np.where(rng.random((n, 5)) < 0.1, 0.95, 0.6)  # "rare": now and then a prompt that hits


def estimate(kind: str, n_runs: int, seed: int, queries: int = 600) -> Ceiling:
    rng = np.random.default_rng(seed)
    runs = np.full((queries, 5), n_runs)
    return best_choice_ceiling(runs, rng.binomial(runs, world(kind, queries, rng)), rng)


@pytest.mark.parametrize("n_runs", [2, 4])
@pytest.mark.parametrize("kind", ["alike", "difficulty", "smooth", "opposed", "rare", "sure"])
def test_intervals_hold_the_truth_on_logs_where_it_is_known(kind: str, n_runs: int) -> None:
    truth = float(world(kind, 200_000, np.random.default_rng(10**6)).max(axis=1).mean())
    found = [estimate(kind, n_runs, seed) for seed in range(15)]
    covered = sum(c.ci_low <= truth <= c.ci_high for c in found)
    assert covered >= 11
    off = np.mean([c.value for c in found]) - truth
    lucky = np.mean([c.one_draw_oracle for c in found]) - truth
    assert abs(off) < 0.05
    assert abs(off) < lucky / 2  # the hindsight of one run is much further off
    held_out = [c.held_out for c in found]
    assert np.mean(held_out) < truth + 3 * np.std(held_out) / np.sqrt(len(held_out))


@pytest.mark.parametrize(("queries", "prompts"), [(30, 2), (60, 2), (40, 3)])
def test_sure_verdicts_of_few_queries_are_covered_too(queries: int, prompts: int) -> None:
    """Where verdicts hardly vary, the ceiling is close to the hindsight of one run, which is itself known by chance."""
    truth = float(np.where(np.random.default_rng(9).random((200_000, prompts)) < 0.5, 0.02, 0.98).max(axis=1).mean())
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        runs = np.full((queries, prompts), 2)
        theta = np.where(rng.random(runs.shape) < 0.5, 0.02, 0.98)
        c = best_choice_ceiling(runs, rng.binomial(runs, theta), rng)
        hits += c.ci_low <= truth <= c.ci_high
    assert hits / 60 >= 0.85


def test_bounds_hold_the_truth_though_the_best_prompt_is_so_by_luck() -> None:
    """Eight equal prompts, one run each: the best of them looks better than ½, and the ceiling is ½."""
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        runs = np.ones((60, 8), dtype=int)
        c = best_choice_ceiling(runs, rng.binomial(runs, 0.5), rng)
        hits += c.ci_low <= 0.5 <= c.ci_high
    assert hits / 60 >= 0.9


def test_more_runs_tell_more() -> None:
    few, many = estimate("smooth", 2, 3), estimate("smooth", 16, 3)
    assert many.ci_high - many.ci_low < few.ci_high - few.ci_low
    assert many.value - many.held_out < few.value - few.held_out


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(20, 60))
def test_figures_are_in_order(seed: int, prompts: int, queries: int) -> None:
    rng = np.random.default_rng(seed)
    runs = rng.integers(2, 5, (queries, prompts))
    c = best_choice_ceiling(runs, rng.binomial(runs, rng.random((queries, prompts))), rng)
    assert 0 <= c.ci_low <= c.value <= c.ci_high <= 1
    assert c.value <= max(c.one_draw_oracle, c.best_prompt) + 1e-12
    assert c.gain == pytest.approx(c.value - c.best_prompt)
    assert 0 <= c.gain_ci_low <= c.gain <= c.gain_ci_high
    assert max(c.best_prompt, c.held_out) <= c.value + 1e-12


def test_without_repeated_runs_there_are_bounds_only() -> None:
    runs, successes = np.ones((50, 2), dtype=int), np.zeros((50, 2), dtype=int)
    successes[:30, 0] = successes[20:45, 1] = 1
    c = best_choice_ceiling(runs, successes, np.random.default_rng(0))
    assert c.value is None
    # Success .6 and .5, hindsight .9, each with its sampling error.
    assert 0.4 < c.ci_low < 0.6
    assert 0.9 < c.ci_high < 1
    assert "bounds only" in c.method


def test_queries_not_run_twice_do_not_count() -> None:
    runs = np.full((60, 2), 2)
    runs[30:] = 1
    successes = runs.copy()
    successes[30:] = 0
    c = best_choice_ceiling(runs, successes, np.random.default_rng(0))
    assert (c.n_queries, c.value, c.best_prompt) == (30, 1.0, 1.0)


def test_no_complete_query_gives_nothing() -> None:
    runs = np.array([[1, 0], [0, 1]])
    c = best_choice_ceiling(runs, runs, np.random.default_rng(0))
    assert c.value is c.ci_low is c.ci_high is c.one_draw_oracle is None
    assert "not known" in c.method


def test_near_duplicates_widen_the_interval() -> None:
    rng = np.random.default_rng(5)
    theta = np.repeat(world("smooth", 40, rng), 15, axis=0)
    runs = np.full(theta.shape, 3)
    k = rng.binomial(runs, theta)
    alone = best_choice_ceiling(runs, k, np.random.default_rng(0))
    grouped = best_choice_ceiling(runs, k, np.random.default_rng(0), np.repeat(np.arange(40), 15))
    assert grouped.ci_high - grouped.ci_low > alone.ci_high - alone.ci_low


def test_one_seed_one_ceiling() -> None:
    assert estimate("rare", 3, 1, 100) == estimate("rare", 3, 1, 100)


def test_svamp(real_data: Path, tmp_path: Path) -> None:
    """Most of the hindsight on SVAMP is luck (data README: .837 naive, .662 by three runs, .621 best single)."""
    oirl.import_log(real_data / "prompt_oirl_llama2" / "svamp.parquet", tmp_path / "log.parquet")
    cells = make_cells(oirl.read_log(tmp_path / "log.parquet"))
    cells = cells.of_prompts([p for p in cells.prompt_ids if not p.startswith("gpt4")])
    groups = group_queries(cells.queries).labels
    c = best_choice_ceiling(*cells.matrices(), np.random.default_rng(0), groups)
    assert c.one_draw_oracle == pytest.approx(0.83, abs=0.01)
    assert c.best_prompt == pytest.approx(0.621, abs=0.005)
    assert 0.655 < c.held_out < 0.68
    assert c.held_out < c.value < c.ci_high < c.one_draw_oracle
