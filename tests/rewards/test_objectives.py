"""Losses against values by hand, against torch's own gradients, and against each other."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oirl.rewards.objectives import (
    bradley_terry_gradient,
    bradley_terry_loss,
    imitation_loss,
    preference_log_loss,
    total_reward,
)

REWARDS = arrays(np.float64, 6, elements=st.floats(-30, 30, width=16))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_equal_rewards_cost_log_two() -> None:
    loss, metrics = bradley_terry_loss(double(1.0, -4.0), double(1.0, -4.0))
    assert float(loss) == pytest.approx(log(2))
    assert metrics == {"ranking": pytest.approx(log(2)), "pair_accuracy": 0.5, "difference": 0.0}


def test_loss_by_hand() -> None:
    """σ(log 3) = 3/4 and σ(−log 3) = 1/4."""
    chosen, rejected = double(log(3), 0.0), double(0.0, log(3))
    loss, metrics = bradley_terry_loss(chosen, rejected)
    assert float(loss) == pytest.approx((log(4 / 3) + log(4)) / 2)
    assert metrics["pair_accuracy"] == 0.5
    assert metrics["difference"] == pytest.approx(0)


def test_margin_and_centring_by_hand() -> None:
    """Differences of 2 and 1 less margins of 2 and 1 are 0; the squared sums are 4² and 3²."""
    loss, metrics = bradley_terry_loss(double(3.0, 2.0), double(1.0, 1.0), margin=double(2.0, 1.0), centring=0.1)
    assert float(loss) == pytest.approx(log(2) + 0.1 * (16 + 9) / 2)
    assert metrics == {"ranking": pytest.approx(log(2)), "pair_accuracy": 1.0, "difference": 1.5}


def test_ties_count_half_and_losses_none() -> None:
    assert bradley_terry_loss(double(1, 2, 3, 0), double(1, 1, 1, 1))[1]["pair_accuracy"] == 0.625


def test_huge_differences_stay_finite() -> None:
    loss, _ = bradley_terry_loss(double(-1e4), double(1e4))
    assert float(loss) == 2e4
    assert preference_log_loss(np.array([-2e4])) == 2e4
    assert all(np.isfinite(g).all() for g in bradley_terry_gradient(np.array([-1e4]), np.array([1e4])))


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [0.0, 0.3])
def test_gradcheck(margin: bool, centring: float) -> None:
    rng = torch.Generator().manual_seed(0)
    r = [torch.randn(5, dtype=torch.float64, generator=rng, requires_grad=i < 2) for i in range(3)]

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return bradley_terry_loss(chosen, rejected, margin=r[2] if margin else None, centring=centring)[0]

    assert torch.autograd.gradcheck(loss, (r[0], r[1]))
    assert torch.autograd.gradgradcheck(loss, (r[0], r[1]))


@given(REWARDS, REWARDS, st.floats(-5, 5))
def test_a_shift_of_all_rewards_changes_nothing_without_centring(a: np.ndarray, b: np.ndarray, by: float) -> None:
    chosen, rejected = torch.from_numpy(a), torch.from_numpy(b)
    loss, shifted = bradley_terry_loss(chosen, rejected)[0], bradley_terry_loss(chosen + by, rejected + by)[0]
    assert float(shifted) == pytest.approx(float(loss), abs=1e-9)


def test_centring_prefers_rewards_around_zero() -> None:
    chosen, rejected = double(1.0, 2.0), double(-1.0, -2.0)
    at_zero = bradley_terry_loss(chosen, rejected, centring=0.01)[0]
    assert float(at_zero) == pytest.approx(float(bradley_terry_loss(chosen, rejected)[0]))
    assert bradley_terry_loss(chosen + 3, rejected + 3, centring=0.01)[0] > at_zero


@settings(deadline=None)
@given(REWARDS, REWARDS, REWARDS, st.booleans(), st.sampled_from([0.0, 0.5]))
def test_gradient_and_curvature_are_those_of_autograd(
    a: np.ndarray, b: np.ndarray, m: np.ndarray, margin: bool, centring: float
) -> None:
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in (a, b))
    shift = torch.tensor(m) if margin else None
    loss = len(a) * bradley_terry_loss(chosen, rejected, margin=shift, centring=centring)[0]
    up, down = torch.autograd.grad(loss, (chosen, rejected), create_graph=True)
    found = bradley_terry_gradient(a, b, margin=m if margin else None, centring=centring)
    assert found[0] == pytest.approx(up.detach().numpy(), abs=1e-9)
    assert found[1] == pytest.approx(down.detach().numpy(), abs=1e-9)
    for gradient, at in ((up, chosen), (down, rejected)):
        (curvature,) = torch.autograd.grad(gradient.sum(), at, retain_graph=True)
        assert found[2] == pytest.approx(curvature.numpy(), abs=1e-9)


@given(REWARDS, REWARDS)
def test_preference_log_loss_is_the_same_loss(a: np.ndarray, b: np.ndarray) -> None:
    loss = float(bradley_terry_loss(torch.from_numpy(a), torch.from_numpy(b))[0])
    assert preference_log_loss(a - b) == pytest.approx(loss, abs=1e-9)


def test_imitation_sums_over_tokens_and_averages_over_responses() -> None:
    logprobs, mask = double(-1.0, -2.0, -4.0, -8.0).view(2, 2), double(1, 1, 0, 1).view(2, 2)
    assert float(imitation_loss(logprobs, mask)) == (3 + 8) / 2


@given(st.floats(-1e6, 1e6))
def test_imitation_ignores_what_stands_in_padding(padding: float) -> None:
    logprobs, mask = double(-1.0, padding, -0.5).view(1, 3), double(1, 0, 1).view(1, 3)
    assert float(imitation_loss(logprobs, mask)) == 1.5


def test_no_gradient_flows_into_padding() -> None:
    logprobs = double(-1.0, -2.0, -0.5).view(1, 3).requires_grad_()
    imitation_loss(logprobs, double(1, 0, 1).view(1, 3)).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1, 0, -1]]


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_total_reward_by_hand(make: type) -> None:
    """The policy is ahead by 0.5 + 0.25 in the first response; in the second it is behind by 1."""
    reward, mask = make([2.0, 1.0]), make([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    logprobs = make([[-0.5, -0.25, -9.0], [-3.0, -7.0, -7.0]])
    ref_logprobs = make([[-1.0, -0.5, -1.0], [-2.0, -1.0, -5.0]])
    total = total_reward(reward, logprobs, ref_logprobs, mask, kl_coef=0.2)
    assert type(total) is type(reward)
    assert total.tolist() == pytest.approx([2 - 0.2 * 0.75, 1 + 0.2])
    assert total_reward(reward, logprobs, ref_logprobs, mask, kl_coef=0.0).tolist() == [2.0, 1.0]
    assert total_reward(reward, logprobs, logprobs, mask, kl_coef=5.0).tolist() == [2.0, 1.0]
