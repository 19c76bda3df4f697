"""What the losses of online updates learn in the end: one state, five actions, exact expectations over actions.

The policy is a softmax of five logits, so that it contains every target, and losses are population losses: weighted
by the probability that an action is drawn. Equations are those of Zhu et al. 2023 (2306.02231).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from oirl.tuning.advantages import BASELINES
from oirl.tuning.policy_losses import (
    apa_loss,
    awr_loss,
    importance_weights,
    interpolated_loss,
    ppo_loss,
    reinforce_loss,
    value_loss,
)
from oirl.tuning.shaping import penalised_rewards

QUICK = settings(max_examples=15, deadline=None, derandomize=True)
K = 5
ALL = torch.ones(K, dtype=torch.long)
REF = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)  # π_init
REWARDS = torch.tensor([0.3, -0.8, 1.0, 0.1, 1.4], dtype=torch.float64)
ADVANTAGES = REWARDS - (REF * REWARDS).sum()  # of π_init: its expectation under it is 0
OLD = torch.tensor([0.1, 0.15, 0.3, 0.25, 0.2], dtype=torch.float64)  # a policy that has moved away from π_init

Population = Callable[[torch.Tensor], torch.Tensor]  # the loss of log π of all actions


def slope(loss: Population, logits: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a population loss in the logits."""
    logits = logits.clone().requires_grad_()
    loss(torch.log_softmax(logits, dim=0)).backward()
    assert logits.grad is not None
    return logits.grad


def descend(loss: Population, logits: torch.Tensor, *, rate: float, steps: int) -> torch.Tensor:
    """Return the logits after so many steps of gradient descent."""
    for _ in range(steps):
        logits = logits - rate * slope(loss, logits)
    return logits


def minimiser(loss: Population, start: torch.Tensor = REF) -> torch.Tensor:
    """Return the policy of the least population loss, searched from another one."""
    logits = start.log().requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-15, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        value = loss(torch.log_softmax(logits, dim=0))
        value.backward()
        return value

    search.step(closure)
    return torch.softmax(logits.detach(), dim=0)


def tilted(policy: torch.Tensor, advantages: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Return π exp(Adv/λ)/Z, equation (3)."""
    return torch.softmax(policy.log() + advantages / kl_coef, dim=0)


def log_z(advantages: torch.Tensor, kl_coef: float) -> torch.Tensor:
    return (REF * (advantages / kl_coef).exp()).sum().log()


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the total variation."""
    return float((p - q).abs().sum()) / 2


def apa(drawn: torch.Tensor, advantages: torch.Tensor, kl_coef: float) -> Population:
    """Return equation (8), with actions drawn from a policy."""
    return lambda logprobs: (drawn * apa_loss(logprobs, REF.log(), advantages, ALL, kl_coef=kl_coef)[0]).sum()


def awr(drawn: torch.Tensor, advantages: torch.Tensor, kl_coef: float, most: float = math.inf) -> Population:
    """Return equation (5)."""
    return lambda logprobs: (drawn * awr_loss(logprobs, advantages, ALL, kl_coef=kl_coef, max_weight=most)[0]).sum()


def reinforce(drawn: torch.Tensor, advantages: torch.Tensor) -> Population:
    return lambda logprobs: (drawn * reinforce_loss(logprobs, advantages, ALL)[0]).sum()


def ppo(drawn: torch.Tensor, advantages: torch.Tensor, clip_range: float = 0.2) -> Population:
    old = drawn.log()
    return lambda logprobs: (drawn * ppo_loss(logprobs, old, advantages, ALL, clip_range=clip_range)[0]).sum()


def shaped(policy: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Return the penalised reward of each action, less its expectation."""
    rewards = penalised_rewards(REWARDS[None], policy.log()[None], REF.log()[None], ALL[None], kl_coef=kl_coef)[0]
    return rewards - (policy * rewards).sum()


# APA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [REF, OLD])
@pytest.mark.parametrize("kl_coef", [0.3, 1.0, 10.0])
def test_apa_with_the_normaliser_taken_off_converges_to_the_target(kl_coef: float, drawn: torch.Tensor) -> None:
    target = tilted(REF, ADVANTAGES, kl_coef)
    loss = apa(drawn, ADVANTAGES - kl_coef * log_z(ADVANTAGES, kl_coef), kl_coef)
    found = torch.softmax(descend(loss, torch.zeros(K, dtype=torch.float64), rate=0.5, steps=1500), dim=0)
    assert torch.allclose(found, target, rtol=0, atol=1e-6)
    assert loss(found.log()) < 1e-10
    assert distance(found, REF) > 0.02


@given(st.lists(st.floats(0.05, 1), min_size=K, max_size=K), st.floats(0.5, 5))
@QUICK
def test_apa_with_the_normaliser_taken_off_does_not_ask_who_drew(weights: list[float], kl_coef: float) -> None:
    drawn = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    loss = apa(drawn, ADVANTAGES - kl_coef * log_z(ADVANTAGES, kl_coef), kl_coef)
    assert torch.allclose(minimiser(loss), tilted(REF, ADVANTAGES, kl_coef), rtol=0, atol=1e-6)


@pytest.mark.parametrize("drawn", [REF, OLD])
def test_apa_with_z_taken_for_one_misses_the_target(drawn: torch.Tensor) -> None:
    """With Σ π = 1 held by a multiplier μ, 2 q (log π − log target) / π = μ: the gap is not 0 but as π/q, q = drawn."""
    kl_coef = 0.5
    target = tilted(REF, ADVANTAGES, kl_coef)
    loss = apa(drawn, ADVANTAGES, kl_coef)
    found = minimiser(loss)
    gap = found.log() - REF.log() - ADVANTAGES / kl_coef
    multipliers = drawn * gap / found
    assert torch.allclose(multipliers, multipliers.mean().expand(K), rtol=1e-5)
    assert float(multipliers.mean()) * float(log_z(ADVANTAGES, kl_coef)) < 0
    assert distance(found, target) > 0.02
    assert loss(found.log()) < loss(target.log())
    assert loss(target.log()).item() == pytest.approx(float(log_z(ADVANTAGES, kl_coef)) ** 2)


@pytest.mark.parametrize("drawn", [REF, OLD])
@pytest.mark.parametrize("kl_coef", [20.0, 100.0])
def test_the_miss_of_apa_by_hand(kl_coef: float, drawn: torch.Tensor) -> None:
    """Let log π = log π* + δ. Then δ − log Z = c π/q and E δ = 0 to first order, so δ = log Z (1 − (π*/q)/E(π*/q))."""
    target = tilted(REF, ADVANTAGES, kl_coef)
    ratio = target / drawn
    by_hand = log_z(ADVANTAGES, kl_coef) * (1 - ratio / (target * ratio).sum())
    found = minimiser(apa(drawn, ADVANTAGES, kl_coef)).log() - target.log()
    assert torch.allclose(found, by_hand, rtol=0.02, atol=0.02 * float(by_hand.abs().max()))


def test_the_miss_of_apa_shrinks_as_lambda_grows() -> None:
    """Appendix A: Z = Σ π_init exp(A/λ) ≈ 1 + E A/λ = 1, A having no expectation under π_init, from which is drawn.

    What is left of log Z is Var(A)/2λ², and by the formula above δ is log Z times what is left of 1 − π*/q, A/λ: the
    miss falls as λ^−3, where the policy moves by λ^−1.
    """
    misses, moves = {}, {}
    for kl_coef in (0.5, 1.0, 2.0, 5.0, 20.0, 40.0):
        found = minimiser(apa(REF, ADVANTAGES, kl_coef))
        misses[kl_coef] = distance(found, tilted(REF, ADVANTAGES, kl_coef))
        moves[kl_coef] = distance(found, REF)
        if kl_coef >= 20:
            rest = float(log_z(ADVANTAGES, kl_coef)) * 2 * kl_coef**2
            assert rest == pytest.approx(float((REF * ADVANTAGES.square()).sum()), rel=0.05)
    values = list(misses.values())
    assert values == sorted(values, reverse=True)
    assert misses[20.0] / misses[40.0] == pytest.approx(8, rel=0.1)
    assert moves[20.0] / moves[40.0] == pytest.approx(2, rel=0.1)
    assert misses[20.0] / moves[20.0] < 1e-3


def test_rewards_that_are_no_advantages_make_apa_miss_by_more() -> None:
    """With E A ≠ 0, log Z ≈ E A/λ: the miss falls as λ^−2 only."""
    misses = [
        distance(minimiser(apa(REF, REWARDS + 1, kl_coef)), tilted(REF, REWARDS, kl_coef)) for kl_coef in (40.0, 80.0)
    ]
    assert misses[0] / misses[1] == pytest.approx(4, rel=0.1)
    assert misses[0] > 10 * distance(minimiser(apa(REF, ADVANTAGES, 40.0)), tilted(REF, ADVANTAGES, 40.0))


def test_where_the_policy_that_drew_is_not_the_reference_no_lambda_makes_the_miss_of_apa_small() -> None:
    """The limit of appendix A: E A = 0 under π_old, not under π_init, hence log Z ≈ E_init A/λ, and 1 − π*/q stays.

    The miss falls as 1/λ, just as the move does: a share of the move is wrong however large λ is.
    """
    advantages = REWARDS - (OLD * REWARDS).sum()
    shares = []
    for kl_coef in (50.0, 100.0, 200.0):
        target = tilted(REF, advantages, kl_coef)
        shares.append(distance(minimiser(apa(OLD, advantages, kl_coef)), target) / distance(target, REF))
    assert shares[2] > 0.1
    assert shares[2] == pytest.approx(shares[1], rel=0.02)


@given(st.lists(st.floats(-2, 2), min_size=K, max_size=K), st.floats(-3, 3), st.floats(0.3, 5))
@QUICK
def test_of_a_policy_that_draws_itself_z_is_a_baseline_of_apa(
    logits: list[float], shift: float, kl_coef: float
) -> None:
    """Under π, the slope of what is added to all advantages is 2 · shift/λ · E ∇log π = 0."""
    at = torch.tensor(logits, dtype=torch.float64)
    drawn = torch.softmax(at, dim=0)
    found = slope(apa(drawn, ADVANTAGES + shift, kl_coef), at)
    assert torch.allclose(found, slope(apa(drawn, ADVANTAGES, kl_coef), at), atol=1e-12)


@pytest.mark.parametrize("kl_coef", [0.5, 2.0])
def test_rounds_of_apa_of_one_step_converge_to_the_target_though_z_is_taken_for_one(kl_coef: float) -> None:
    """Where π = q, the gap is as π/q = 1, the same for all actions: a normalised policy is then the target itself."""
    logits = REF.log()
    for _ in range(1000):
        drawn = torch.softmax(logits, dim=0)
        logits = descend(apa(drawn, REWARDS - (drawn * REWARDS).sum(), kl_coef), logits, rate=0.5, steps=1)
    target = tilted(REF, REWARDS, kl_coef)
    assert torch.allclose(torch.softmax(logits, dim=0), target, rtol=0, atol=1e-6)
    assert distance(minimiser(apa(REF, ADVANTAGES, kl_coef)), target) > 1e-3  # where one set of rollouts would lead


@pytest.mark.parametrize(("kl_coef", "converges"), [(2.0, True), (0.8, True), (0.5, False)])
def test_rounds_of_apa_until_the_least_loss_converge_only_if_the_target_is_near(
    kl_coef: float, converges: bool
) -> None:
    """Near π*, a round multiplies the error by −k/(1 − k), k = KL(π*‖π_init): rounds diverge where k > 1/2.

    Advantages under π* make log Z = −k. With q = π*(1 + e), π = π*(1 + d), the gap d + k = c π/q is, to first order,
    (k + dc)(1 + d − e), and Σ π* d = Σ π* e = 0 make dc = 0: d (1 − k) = −k e.
    """
    target = tilted(REF, REWARDS, kl_coef)
    k = float((target * (target / REF).log()).sum())
    assert (k < 0.5) == converges
    off = torch.tensor([0.5, -0.3, 0.1, 0.4, -0.2], dtype=torch.float64)
    off = 1e-3 * (off - (target * off).sum())
    drawn = target * (1 + off)
    found = minimiser(apa(drawn, REWARDS - (drawn * REWARDS).sum(), kl_coef), drawn) / target - 1
    assert torch.allclose(found, -k / (1 - k) * off, rtol=0.02, atol=2e-5)
    policy, distances = REF, []
    for _ in range(25):
        policy = minimiser(apa(policy, REWARDS - (policy * REWARDS).sum(), kl_coef), policy)
        distances.append(distance(policy, target))
    assert (max(distances[-10:]) < 1e-6) == converges


# AWR --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [REF, OLD])
@pytest.mark.parametrize("kl_coef", [0.5, 2.0])
def test_awr_converges_to_the_drawing_policy_tilted_by_the_advantage(kl_coef: float, drawn: torch.Tensor) -> None:
    """Equation (7): Σ q e^{A/λ} (−log π) is a cross-entropy, least where π is as q e^{A/λ}."""
    found = descend(awr(drawn, ADVANTAGES, kl_coef), torch.zeros(K, dtype=torch.float64), rate=0.5, steps=1000)
    assert torch.allclose(torch.softmax(found, dim=0), tilted(drawn, ADVANTAGES, kl_coef), rtol=0, atol=1e-6)


def test_awr_with_a_cap_converges_to_the_capped_tilt() -> None:
    most = 2.0
    tilt = (ADVANTAGES / 0.5).exp()
    assert 0 < int((tilt > most).sum()) < K
    target = REF * tilt.clamp(max=most)
    found = minimiser(awr(REF, ADVANTAGES, 0.5, most))
    assert torch.allclose(found, target / target.sum(), rtol=0, atol=1e-6)


def test_rounds_of_awr_go_on_and_on() -> None:
    """Each round tilts the policy of the round before: after k of them it is π_init e^{kR/λ}, without an anchor."""
    policy, kl_coef = REF, 2.0
    for k in range(1, 5):
        advantages = REWARDS - (policy * REWARDS).sum()
        policy = minimiser(awr(policy, advantages, kl_coef))
        assert torch.allclose(policy, tilted(REF, REWARDS, kl_coef / k), rtol=0, atol=1e-6)


# PPO and REINFORCE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_coef", [0.4, 2.0])
def test_ppo_with_penalised_rewards_converges_to_the_target(kl_coef: float) -> None:
    """At a fixed point R − β log π/π_init is the same for all actions: π is as π_init e^{R/β}."""
    logits = REF.log()
    for _ in range(1000):
        drawn = torch.softmax(logits, dim=0)
        logits = descend(ppo(drawn, shaped(drawn, kl_coef)), logits, rate=0.5 / kl_coef, steps=4)
    found = torch.softmax(logits, dim=0)
    assert torch.allclose(found, tilted(REF, REWARDS, kl_coef), rtol=0, atol=1e-6)
    assert distance(found, REF) > 0.05


@pytest.mark.parametrize("kl_coef", [0.4, 2.0])
def test_reinforce_with_penalised_rewards_converges_to_the_target(kl_coef: float) -> None:
    logits = REF.log()
    for _ in range(1500):
        drawn = torch.softmax(logits, dim=0)
        logits = descend(reinforce(drawn, shaped(drawn, kl_coef)), logits, rate=2 / kl_coef, steps=1)
    found = torch.softmax(logits, dim=0)
    assert torch.allclose(found, tilted(REF, REWARDS, kl_coef), rtol=0, atol=1e-6)


@given(st.lists(st.floats(-2, 2), min_size=K, max_size=K), st.floats(0, 3), st.floats(-5, 5))
@QUICK
def test_penalised_rewards_give_the_slope_of_the_reward_less_the_divergence(
    logits: list[float], kl_coef: float, baseline: float
) -> None:
    """Whatever the baseline, and by REINFORCE and PPO alike: ∇ E R − β ∇ KL = E (R − β log π/π_init) ∇log π."""
    at = torch.tensor(logits, dtype=torch.float64)
    drawn = torch.softmax(at, dim=0)

    def objective(logprobs: torch.Tensor) -> torch.Tensor:
        return -(logprobs.exp() * (REWARDS - kl_coef * (logprobs - REF.log()))).sum()

    true = slope(objective, at)
    advantages = shaped(drawn, kl_coef) + baseline
    assert torch.allclose(slope(reinforce(drawn, advantages), at), true, atol=1e-10)
    assert torch.allclose(slope(ppo(drawn, advantages), at), true, atol=1e-10)


def test_a_set_of_rollouts_moves_ppo_no_further_than_its_range() -> None:
    """Actions that are better are clipped where they are 1.2 as likely, those that are worse where they are 0.8."""
    found = torch.softmax(descend(ppo(REF, ADVANTAGES), REF.log(), rate=0.05, steps=1500), dim=0)
    moved = found / REF
    signs = ADVANTAGES.sign()
    assert bool((signs * (moved - 1) > 0).all())
    assert float(moved.max()) < 1.25
    free = torch.softmax(descend(reinforce(REF, ADVANTAGES), REF.log(), rate=0.05, steps=1500), dim=0)
    assert float((free / REF).max()) > 2


@pytest.mark.parametrize("n", [2, 3])
def test_leave_one_out_is_unbiased_and_the_group_baseline_short_by_one_in_n(n: int) -> None:
    """Over all K^n groups of responses: E Σ_i A_i ∇log π_i / n is ∇ E R, and (n − 1)/n of it."""
    at = OLD.log()
    true = slope(lambda logprobs: -(logprobs.exp() * REWARDS).sum(), at)
    for name, share in (("leave_one_out", 1.0), ("group", (n - 1) / n)):
        counted = torch.zeros(K, dtype=torch.float64)  # E of the advantage by which an action is counted
        for drawn in itertools.product(range(K), repeat=n):
            index = torch.tensor(drawn)
            advantages = BASELINES[name](REWARDS[index], [0] * n)
            counted.index_add_(0, index, OLD[index].prod() * advantages / n)
        found = slope(lambda logprobs, a=counted: reinforce_loss(logprobs, a, ALL)[0].sum(), at)
        assert torch.allclose(found, share * true, atol=1e-12)


def test_importance_weights_make_up_for_an_engine_that_draws_otherwise() -> None:
    engine = tilted(OLD, REWARDS.flip(0), 20.0)
    at = OLD.log()
    true = slope(reinforce(OLD, ADVANTAGES), at)
    assert not torch.allclose(slope(reinforce(engine, ADVANTAGES), at), true, rtol=0.01)
    weights = importance_weights(OLD.log(), engine.log(), ALL, cap=10.0)
    assert torch.allclose(slope(reinforce(engine * weights, ADVANTAGES), at), true, atol=1e-12)
    capped = importance_weights(OLD.log(), engine.log(), ALL, cap=1.0)
    assert float((engine * capped).sum()) < 1  # what the cap costs


# likelihood and values --------------------------------------------------------------------------------------


def test_likelihood_of_references_holds_reinforce_back() -> None:
    """At a fixed point π (A − α) + α ref = 0 with A = R − E R: with α in place, no reference response dies out."""
    logits, mle_coef = REF.log(), 0.7
    for _ in range(1000):
        drawn = torch.softmax(logits, dim=0)
        advantages = REWARDS - (drawn * REWARDS).sum()
        sampled = reinforce(drawn, advantages)
        logits = descend(
            lambda x, sampled=sampled: interpolated_loss(sampled(x), x, REF, mle_coef=mle_coef),
            logits,
            rate=1.0,
            steps=1,
        )
    found = torch.softmax(logits, dim=0)
    advantages = REWARDS - (found * REWARDS).sum()
    assert torch.allclose(found * (mle_coef - advantages), mle_coef * REF, rtol=0, atol=1e-6)
    assert float((found * REWARDS).sum()) > float((REF * REWARDS).sum()) + 0.1


def test_the_value_of_the_least_loss_is_the_mean_return() -> None:
    value = torch.zeros((), dtype=torch.float64)
    for _ in range(100):
        at = value.clone().requires_grad_()
        (OLD * value_loss(at.expand(K), REWARDS, ALL)[0]).sum().backward()
        assert at.grad is not None
        value = value - 0.5 * at.grad
    assert float(value) == pytest.approx(float((OLD * REWARDS).sum()), abs=1e-9)
