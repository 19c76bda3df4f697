"""KL estimates, what a KL costs, and rewards token by token: by hand, exact expectations, invariances."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from oirl.tuning.kl import AdaptiveKl, FixedKl, kl_k1, kl_k2, kl_k3
from oirl.tuning.shaping import RunningMoments, at_last_token, penalised_rewards

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5)
FILLS = st.sampled_from([0.0, 1e30, -7.0, math.nan, math.inf, -math.inf])
ESTIMATES = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}

POLICY = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a function at a point."""
    at = at.clone().requires_grad_()
    function(at).backward()
    assert at.grad is not None
    return at.grad


def padded(
    rows: list[torch.Tensor], *, fill: float = 0.0, left: bool = False, extra: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of (k, length) as (k, n, t), and the mask."""
    width = max(1, *(row.shape[1] for row in rows)) + extra
    values = torch.full((rows[0].shape[0], len(rows), width), fill, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - row.shape[1] if left else 0
        values[:, i, start : start + row.shape[1]] = row
        mask[i, start : start + row.shape[1]] = 1
    return values, mask


# estimates --------------------------------------------------------------------------------------------------


def test_estimates_by_hand() -> None:
    """log π − log π_ref = log 2 and −log 4, hence ρ = 1/2 and 4."""
    logprobs, ref = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.25, 0.4]).log()
    assert kl_k1(logprobs, ref).tolist() == pytest.approx([math.log(2), -math.log(4)])
    assert kl_k2(logprobs, ref).tolist() == pytest.approx([math.log(2) ** 2 / 2, math.log(4) ** 2 / 2])
    assert kl_k3(logprobs, ref).tolist() == pytest.approx([0.5 - 1 + math.log(2), 4 - 1 - math.log(4)], rel=1e-5)


def test_slopes_of_the_estimates_by_hand() -> None:
    """With x = log π − log π_ref: d k1/dx = 1, d k2/dx = x, d k3/dx = d(e^−x − 1 + x)/dx = 1 − e^−x = 1 − ρ."""
    logprobs, ref = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.25, 0.4]).log()
    assert slope(lambda x: kl_k1(x, ref).sum(), logprobs).tolist() == [1, 1]
    assert slope(lambda x: kl_k2(x, ref).sum(), logprobs).tolist() == pytest.approx([math.log(2), -math.log(4)])
    assert slope(lambda x: kl_k3(x, ref).sum(), logprobs).tolist() == pytest.approx([1 - 0.5, 1 - 4])


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_of_a_policy_that_has_not_moved_are_zero(name: str) -> None:
    logprobs = POLICY.log()
    assert ESTIMATES[name](logprobs, logprobs).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@given(SEEDS, st.integers(-9, 1))
@QUICK
def test_the_second_and_the_third_estimate_are_never_negative(kind: torch.dtype, seed: int, power: int) -> None:
    logprobs = -draw(seed, 200).abs().to(kind)
    ref = logprobs + (10.0**power * draw(seed + 1, 200)).to(kind)
    assert bool((kl_k2(logprobs, ref) >= 0).all())
    assert bool((kl_k3(logprobs, ref) >= 0).all())


def test_the_third_estimate_does_not_lose_small_divergences() -> None:
    shift = torch.tensor([1e-3, -1e-3])  # ρ − 1 − log ρ = shift²/2 ± shift³/6
    by_hand = [0.5e-6 + 1e-9 / 6, 0.5e-6 - 1e-9 / 6]
    assert kl_k3(torch.zeros(2), shift).tolist() == pytest.approx(by_hand, rel=0.05)
    assert kl_k3(torch.zeros(2), shift.double()).tolist() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_expectation_of_the_first_and_the_third_estimate_is_the_divergence(name: str) -> None:
    expectation = (POLICY * ESTIMATES[name](POLICY.log(), REFERENCE.log())).sum()
    assert float(expectation) == pytest.approx(divergence(POLICY, REFERENCE), rel=1e-12)


def test_the_expectation_of_the_second_estimate_is_not_the_divergence() -> None:
    expectation = (POLICY * kl_k2(POLICY.log(), REFERENCE.log())).sum()
    assert float(expectation) != pytest.approx(divergence(POLICY, REFERENCE), rel=0.05)


def test_the_second_estimate_is_right_to_second_order() -> None:
    """Both are ε²/2 Var u + O(ε³): as ε halves, the divergence falls by 4 and the bias by 8."""
    direction = draw(3, 4)
    true, bias = [], []
    for epsilon in (0.02, 0.01):
        p = torch.softmax(REFERENCE.log() + epsilon * direction, dim=0)
        true.append(divergence(p, REFERENCE))
        bias.append(float((p * kl_k2(p.log(), REFERENCE.log())).sum()) - true[-1])
    assert true[0] / true[1] == pytest.approx(4, rel=0.05)
    assert bias[0] / bias[1] == pytest.approx(8, rel=0.05)


def test_the_expected_slope_of_an_estimate_is_that_of_a_divergence_for_the_second_only() -> None:
    """Under π: E ∇k1 = E ∇log π = 0, E ∇k2 = ∇KL(π‖ref), E ∇k3 = −Σ ref ∇log π = ∇KL(ref‖π)."""
    logits, ref = POLICY.log(), REFERENCE.log()

    def expected(name: str) -> torch.Tensor:
        return slope(lambda x: (POLICY * ESTIMATES[name](torch.log_softmax(x, 0), ref)).sum(), logits)

    forward = slope(lambda x: (torch.softmax(x, 0) * (torch.log_softmax(x, 0) - ref)).sum(), logits)
    backward = slope(lambda x: (REFERENCE * (ref - torch.log_softmax(x, 0))).sum(), logits)
    assert torch.allclose(expected("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(expected("k2"), forward, atol=1e-12)
    assert torch.allclose(expected("k3"), backward, atol=1e-12)
    assert not torch.allclose(forward, backward, atol=1e-2)


# controllers ------------------------------------------------------------------------------------------------


def test_a_fixed_coefficient_stays() -> None:
    fixed = FixedKl(0.3)
    for kl in (0.0, 1e9, -5.0):
        fixed.update(kl, 1000)
        assert fixed.kl_coef == 0.3


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (7.2, 0.2), (7.3, 0.2), (600.0, 0.2), (4.8, -0.2), (0.0, -0.2), (-3.0, -0.2)],
)
def test_the_adaptive_coefficient_by_hand(kl: float, error: float) -> None:
    """β (1 + clip(KL/6 − 1, ±0.2) · 64/10000)."""
    adaptive = AdaptiveKl(0.05, target=6.0, horizon=10_000)
    adaptive.update(kl, 64)
    assert adaptive.kl_coef == pytest.approx(0.05 * (1 + error * 0.0064), rel=1e-12)


@given(st.floats(1e-3, 10), st.floats(0.1, 50), st.floats(-10, 500), st.integers(1, 256))
@QUICK
def test_a_divergence_above_the_target_costs_more_afterwards(first: float, target: float, kl: float, n: int) -> None:
    adaptive = AdaptiveKl(first, target=target, horizon=1000)
    adaptive.update(kl, n)
    if abs(kl / target - 1) > 1e-9:
        assert (adaptive.kl_coef > first) == (kl > target)
    assert abs(adaptive.kl_coef / first - 1) <= 0.2 * n / 1000 + 1e-12
    adaptive.update(kl, 0)
    adaptive.kl_coef = first
    adaptive.update(target, n)
    assert adaptive.kl_coef == pytest.approx(first)


def test_the_adaptive_coefficient_changes_by_about_a_fifth_over_the_horizon() -> None:
    adaptive = AdaptiveKl(1.0, target=1.0, horizon=1000)
    for _ in range(100):
        adaptive.update(50.0, 10)
    assert adaptive.kl_coef == pytest.approx(math.exp(0.2), rel=1e-3)


def test_the_adaptive_coefficient_settles_where_the_target_is_met() -> None:
    """A policy that is 3/β away from its reference is 2 away at β = 1.5."""
    for first in (0.1, 20.0):
        adaptive = AdaptiveKl(first, target=2.0, horizon=100)
        for _ in range(2000):
            adaptive.update(3 / adaptive.kl_coef, 10)
        assert adaptive.kl_coef == pytest.approx(1.5, rel=1e-6)


# rewards token by token -------------------------------------------------------------------------------------


def test_the_reward_of_a_response_stands_at_its_last_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    found = at_last_token(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), mask)
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 3], [0, 4, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(at_last_token(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), mask.bool()), found)


def test_slope_of_the_reward_at_the_last_token() -> None:
    mask, told = torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([[2.0, 3.0, 5.0], [7.0, 7.0, 7.0]])
    assert slope(lambda x: (at_last_token(x, mask) * told).sum(), torch.ones(2)).tolist() == [3, 0]


def test_a_response_without_tokens_may_lack_a_reward() -> None:
    found = at_last_token(torch.tensor([math.nan, 2.0]), torch.tensor([[0, 0], [1, 1]]))
    assert found.tolist() == [[0, 0], [0, 2]]


@given(SEEDS, LENGTHS, st.booleans(), st.integers(0, 3))
@QUICK
def test_a_response_has_its_reward_wherever_its_padding_stands(
    seed: int, lengths: list[int], left: bool, extra: int
) -> None:
    rows = [draw(seed + i, 1, length) for i, length in enumerate(lengths)]
    rewards = draw(seed + 99, len(rows))
    _, mask = padded(rows, left=left, extra=extra)
    found = at_last_token(rewards, mask)
    for i, length in enumerate(lengths):
        assert found[i][mask[i].bool()].tolist() == [0.0] * (length - 1) + [float(rewards[i])] * (length > 0)
        assert not found[i][~mask[i].bool()].any()


def test_penalised_rewards_by_hand() -> None:
    """r − 0.1 (log π − log π_ref): 0 − 0.1 · 0.5, 1 − 0.1 · (−2), and nothing outside of the mask."""
    rewards = torch.tensor([[0.0, 1.0, 9.0]])
    logprobs, ref = torch.tensor([[-1.0, -3.0, -1.0]]), torch.tensor([[-1.5, -1.0, -1.0]])
    mask = torch.tensor([[1, 1, 0]])
    found = penalised_rewards(rewards, logprobs, ref, mask, kl_coef=0.1)
    assert found[0].tolist() == pytest.approx([-0.05, 1.2, 0])
    assert penalised_rewards(rewards, logprobs, ref, mask, kl_coef=0.0)[0].tolist() == [0, 1, 0]


def test_slopes_of_penalised_rewards_by_hand() -> None:
    zeros, mask = torch.zeros(1, 3), torch.tensor([[0, 1, 1]])

    def total(x: torch.Tensor) -> torch.Tensor:
        return penalised_rewards(x[0], x[1], x[2], mask, kl_coef=0.25).sum()

    found = slope(total, torch.stack([zeros, zeros, zeros]))
    assert found[:, 0].tolist() == [[0, 1, 1], [0, -0.25, -0.25], [0, 0.25, 0.25]]


@given(SEEDS, LENGTHS, st.floats(0, 10), FILLS, st.booleans())
@QUICK
def test_the_penalised_rewards_of_a_response_sum_to_its_reward_less_its_log_ratio(
    seed: int, lengths: list[int], kl_coef: float, fill: float, left: bool
) -> None:
    rows = [draw(seed + i, 2, length) for i, length in enumerate(lengths)]
    whole = draw(seed + 99, len(rows))
    (logprobs, ref), mask = padded(rows, fill=fill, left=left)
    found = penalised_rewards(at_last_token(whole, mask), logprobs, ref, mask, kl_coef=kl_coef)
    for i, row in enumerate(rows):
        by_hand = float(whole[i]) - kl_coef * (row[0].sum() - row[1].sum()).item() if lengths[i] else 0.0
        assert float(found[i].sum()) == pytest.approx(by_hand, abs=1e-9)


@given(SEEDS, LENGTHS, FILLS, st.booleans(), st.integers(0, 3))
@QUICK
def test_penalised_rewards_and_their_slopes_do_not_depend_on_padding(
    seed: int, lengths: list[int], fill: float, left: bool, extra: int
) -> None:
    rows = [draw(seed + i, 4, length) for i, length in enumerate(lengths)]

    def found(**how: object) -> tuple[torch.Tensor, torch.Tensor]:
        values, mask = padded(rows, **how)  # type: ignore[arg-type]
        kept = mask.bool()
        values.requires_grad_()
        result = penalised_rewards(values[0], values[1], values[2], mask, kl_coef=0.3)
        assert not result[~kept].any()
        (result[kept] * values[3][kept]).sum().backward()
        assert values.grad is not None
        assert not values.grad[:, ~kept].any()
        return result[kept], values.grad[:, kept]

    plain, other = found(), found(fill=fill, left=left, extra=extra)
    assert torch.equal(other[0], plain[0])
    assert torch.equal(other[1], plain[1])


# running moments --------------------------------------------------------------------------------------------


def test_running_moments_by_hand() -> None:
    """1, 2, 6: mean 3, squared distances 4 + 1 + 9 = 14, of which 14/2 is the variance of a sample."""
    moments = RunningMoments()
    moments.add(torch.tensor([1.0, 2.0]))
    moments.add(torch.tensor([6.0]))
    assert (moments.count, moments.mean, moments.squares) == pytest.approx((3, 3, 14))
    assert moments.deviation == pytest.approx(math.sqrt(7))


@given(SEEDS, st.lists(st.integers(0, 7), min_size=1, max_size=8), st.floats(-1e3, 1e3), st.floats(1e-2, 1e2))
@QUICK
def test_running_moments_equal_those_of_all_however_they_are_split(
    seed: int, sizes: list[int], shift: float, scale: float
) -> None:
    values = shift + scale * draw(seed, sum(sizes))
    moments = RunningMoments()
    for part in values.split(sizes):
        moments.add(part)
        moments = restored(moments)  # a run may stop and go on at any time
    assert moments.count == len(values)
    if len(values) > 1:
        assert moments.mean == pytest.approx(np.mean(values.numpy()), rel=1e-9, abs=1e-9)
        assert moments.deviation == pytest.approx(np.std(values.numpy(), ddof=1), rel=1e-6)


def restored(moments: RunningMoments) -> RunningMoments:
    other = RunningMoments()
    other.restore(json.loads(json.dumps(moments.state())))
    assert (other.count, other.mean, other.squares) == (moments.count, moments.mean, moments.squares)
    return other


def test_the_deviation_is_one_where_there_is_none() -> None:
    moments = RunningMoments()
    assert (moments.count, moments.mean, moments.deviation) == (0, 0, 1)
    moments.add(torch.zeros(0))
    assert (moments.count, moments.deviation) == (0, 1)
    moments.add(torch.tensor([5.0]))
    assert (moments.mean, moments.deviation) == (5, 1)
    moments.add(torch.tensor([5.0, 5.0]))
    assert (moments.count, moments.mean, moments.deviation) == (3, 5, 1)
