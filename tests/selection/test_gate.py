"""The gate: known gains, the rule for the margin, and reasons that say what the figures say."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from conftest import make_log

from oirl import PromptSelector
from oirl.logs.cells import Cells
from oirl.rewards.training import HeldOut
from oirl.selection.gate import MARGINS, best_margin, cross_fitted_gains, decide


def held_out(rates: np.ndarray, scores: np.ndarray, fold: np.ndarray, runs: np.ndarray | None = None) -> HeldOut:
    """Return predictions on a log of one run per cell (0 or 1 where `runs` says), right where `rates` is 1."""
    runs = np.ones(rates.shape, dtype=np.int64) if runs is None else runs
    q, p = np.nonzero(runs)
    ids, prompts = [f"q{i}" for i in range(len(rates))], [f"p{j}" for j in range(rates.shape[1])]
    right = (rates[q, p] * runs[q, p]).astype(np.int64)
    return HeldOut(Cells(ids, ids, prompts, prompts, q, p, runs[q, p], right), scores, fold)


def known_gain(n: int, gain: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (rates, scores): p0 right on 60%, and on a share `gain` of all p1 is right where p0 is not, as scored."""
    rng = np.random.default_rng(seed)
    first = (np.arange(n) % 10 < 6).astype(float)
    wins = np.flatnonzero(first == 0)[: round(n * gain)]
    second = np.zeros(n)
    second[wins] = 1
    scores = np.tile([0.6, 0.2], (n, 1))
    scores[wins, 1] = 0.9
    order = rng.permutation(n)
    return np.stack([first, second], axis=1)[order], scores[order]


@pytest.mark.parametrize("gain", [0.1, 0.3])
def test_a_known_gain_is_found(gain: float) -> None:
    rates, scores = known_gain(400, gain)
    decision = decide(held_out(rates, scores, np.arange(400) % 5), 0, np.random.default_rng(0))
    assert decision.policy == "selector"
    assert decision.gain == pytest.approx(gain)
    half = 1.96 * np.sqrt(gain * (1 - gain) / 400)
    assert decision.gain_ci_low == pytest.approx(gain - half, abs=0.01)
    assert decision.gain_ci_high == pytest.approx(gain + half, abs=0.01)
    assert (decision.best_prompt, decision.n_queries) == ("p0", 400)


def test_a_loss_keeps_the_gate_shut() -> None:
    rates, scores = known_gain(200, 0.2)
    misled = scores.copy()
    misled[:, 1] = np.where(rates[:, 0] == 1, 0.9, 0.1)  # it switches exactly where that is wrong
    decision = decide(held_out(rates, misled, np.arange(200) % 5), 0, np.random.default_rng(0))
    assert decision.policy == "best_prompt"
    assert decision.gain <= 0


def test_no_switch_is_a_gain_of_zero_and_shut() -> None:
    rates, _ = known_gain(100, 0.2)
    decision = decide(held_out(rates, np.tile([0.6, 0.5], (100, 1)), np.arange(100) % 5), 0, np.random.default_rng(0))
    assert (decision.policy, decision.gain, decision.margin) == ("best_prompt", 0.0, MARGINS[0])


def test_gains_are_against_the_best_single_prompt_that_is_named() -> None:
    fold = np.arange(20) % 2
    rates = np.tile([1.0, 0.0], (20, 1))
    gains, switched = cross_fitted_gains(np.tile([0.1, 0.9], (20, 1)), rates, fold, 0, (0.01,))
    assert gains.tolist() == [-1.0] * 20
    assert switched.all()
    gains, switched = cross_fitted_gains(np.tile([0.9, 0.1], (20, 1)), rates, fold, 0, (0.01,))
    assert gains.tolist() == [0.0] * 20
    assert not switched.any()


def test_the_margin_is_chosen_on_the_other_folds() -> None:
    # Switching helps in fold 0 and hurts in fold 1: fold 0 takes fold 1's large margin and does not switch at all.
    fold = np.repeat([0, 1], 50)
    rates = np.stack([np.r_[np.zeros(50), np.ones(50)], np.r_[np.ones(50), np.zeros(50)]], axis=1)
    gains, _ = cross_fitted_gains(np.tile([0.5, 0.53], (100, 1)), rates, fold, 0, (0.01, 0.05))
    assert gains[fold == 0].tolist() == [0.0] * 50
    assert gains[fold == 1].tolist() == [-1.0] * 50


def test_near_duplicates_count_as_one_piece_of_evidence() -> None:
    """Twenty-five wordings of ten variants each: the interval is that of 25 queries, not of 250."""
    rng = np.random.default_rng(0)
    story = rng.random(25) < 0.5
    rates = np.stack([np.zeros(250), np.repeat(story, 10).astype(float)], axis=1)
    scores = np.tile([0.1, 0.9], (250, 1))
    log = held_out(rates, scores, np.repeat(np.arange(25), 10) % 5)
    alone = decide(log, 0, np.random.default_rng(0))
    grouped = decide(dataclasses.replace(log, groups=np.repeat(np.arange(25), 10)), 0, np.random.default_rng(0))
    assert grouped.gain == alone.gain
    width = (grouped.gain_ci_high - grouped.gain_ci_low) / (alone.gain_ci_high - alone.gain_ci_low)
    assert width == pytest.approx(np.sqrt(10), rel=0.15)


def test_the_margin_is_the_first_unless_another_is_clearly_better() -> None:
    rng = np.random.default_rng(0)
    advantage = rng.choice([0.005, 0.03, 0.2], 400)
    scores = np.stack([np.full(400, 0.5), 0.5 + advantage], axis=1)
    base = np.zeros(400)
    weak_hurts = np.where(advantage < 0.1, -1.0, 1.0)
    assert best_margin(scores, np.stack([base, weak_hurts], axis=1), 0, MARGINS) == 0.05
    all_help = np.ones(400)
    assert best_margin(scores, np.stack([base, all_help], axis=1), 0, MARGINS) == 0.0
    assert best_margin(scores, np.stack([base, base], axis=1), 0, MARGINS) == MARGINS[0] == 0.01
    # One query in 400 that a wider margin saves is luck, not evidence.
    one = np.where(np.arange(400) == np.flatnonzero(advantage == 0.03)[0], -1.0, 0.0)
    assert best_margin(scores, np.stack([base, one], axis=1), 0, MARGINS) == 0.01


def test_only_queries_run_under_every_prompt_count() -> None:
    rates, scores = known_gain(100, 0.2)
    runs = np.ones((100, 2), dtype=np.int64)
    runs[:30, 1] = 0
    decision = decide(held_out(rates, scores, np.arange(100) % 5, runs), 0, np.random.default_rng(0))
    assert decision.n_queries == 70
    assert decision.gain == pytest.approx((rates[30:, 1] * (scores[30:, 1] > 0.6)).mean())


def test_without_complete_queries_the_gain_is_not_known() -> None:
    rates, scores = known_gain(40, 0.2)
    runs = np.ones((40, 2), dtype=np.int64)
    runs[:, 1] = np.arange(40) == 3
    decision = decide(held_out(rates, scores, np.arange(40) % 5, runs), 0, np.random.default_rng(0))
    assert (decision.policy, decision.gain, decision.n_queries) == ("best_prompt", None, 1)
    assert "only 1 of 40 queries" in decision.reason
    assert decision.best_prompt == "p0"


def test_two_lucky_queries_do_not_open_the_gate() -> None:
    """A bootstrap of two equal gains has no width; an interval from +1 to +1 of two queries claims certainty."""
    rates = np.array([[1.0, 0.0]] * 38 + [[0.0, 1.0]] * 2)
    scores = np.tile([0.5, 0.9], (40, 1))
    runs = np.ones((40, 2), dtype=np.int64)
    runs[:38, 1] = 0
    decision = decide(held_out(rates, scores, np.arange(40) % 5, runs), 0, np.random.default_rng(0))
    assert decision.n_queries == 2
    assert decision.policy == "best_prompt"


def test_few_lucky_switches_do_not_open_the_gate_more_often_than_announced() -> None:
    """Scores that know nothing and switch on 1.5% of 300 queries to a prompt as good there: the true gain is 0."""
    opened = 0
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        switched = rng.random(300) < 0.015
        rates = (rng.random((300, 2)) < np.stack([np.full(300, 0.6), np.where(switched, 0.6, 0.3)], axis=1)).astype(
            float
        )
        scores = np.tile([0.6, 0.3], (300, 1))
        scores[switched, 1] = 0.9
        opened += (
            decide(held_out(rates, scores, np.arange(300) % 5), 0, rng, margins=(0.01,), draws=300).policy == "selector"
        )
    # 2.5% of 1,500 with four standard errors of room.
    assert opened <= 62


def test_no_switch_is_no_gain_that_was_measured() -> None:
    rates, _ = known_gain(100, 0.2)
    decision = decide(held_out(rates, np.tile([0.6, 0.5], (100, 1)), np.arange(100) % 5), 0, np.random.default_rng(0))
    assert "no query was predicted to gain" in decision.reason
    assert not re.search(r"[+-]\d", decision.reason)


@pytest.mark.parametrize("effect", [0.1, 0.2, 0.3])
def test_reasons_say_what_the_figures_say(effect: float) -> None:
    decision = PromptSelector().fit(make_log(100, effect=effect)).deployment_
    gain, low, high = (float(n) / 100 for n in re.findall(r"[+-]\d+\.\d+", decision.reason))
    assert gain == pytest.approx(decision.gain, abs=5e-5)
    assert low == pytest.approx(decision.gain_ci_low, abs=5e-5)
    assert high == pytest.approx(decision.gain_ci_high, abs=5e-5)
    assert "points" in decision.reason
    assert low <= gain <= high
    assert f"{decision.n_queries:,} queries" in decision.reason
    assert decision.best_prompt in decision.reason
    assert (decision.policy == "selector") == (decision.gain_ci_low > 0) == ("beat" in decision.reason)
    assert ("not shown to be above zero" in decision.reason) == (decision.policy == "best_prompt")


def test_one_seed_one_decision() -> None:
    rates, scores = known_gain(200, 0.05)
    log = held_out(rates, scores, np.arange(200) % 5)
    a, b, c = (decide(log, 0, np.random.default_rng(s)) for s in (0, 0, 1))
    assert a == b
    assert a.gain == c.gain
    assert set(a.to_dict()) == {
        "policy",
        "reason",
        "best_prompt",
        "margin",
        "gain",
        "gain_ci_low",
        "gain_ci_high",
        "n_queries",
    }
