"""The losses of online updates: values and slopes by hand, identities, and what they do not depend on.

Among the latter are padding, micro-batches and devices: two processes, each with half of the rows, learn the same.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from oirl.tuning.losses import supervised_loss, token_logprobs
from oirl.tuning.policy_losses import (
    WEIGHTS,
    Metrics,
    apa_loss,
    awr_loss,
    clipped_value_loss,
    importance_weights,
    interpolated_loss,
    ppo_loss,
    reinforce_loss,
    sequence_weights,
    token_weights,
    value_loss,
)

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5)
FILLS = st.sampled_from([0.0, 1e30, -7.0, math.nan, math.inf, -math.inf])
ONE = torch.ones(1, 1, dtype=torch.long)
LEARNED = 3  # parameters of the linear model that micro-batches and devices learn

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, Metrics]]


def weighted_reinforce(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
    return importance_weights(x[2], x[3], mask, cap=1.5) * reinforce_loss(x[0], x[1], mask)[0], {}


# Losses of (k, n, t), of which the first is what is learned: the log probability, or the value.
LOSSES: dict[str, tuple[int, Loss]] = {
    "apa": (3, lambda x, mask: apa_loss(*x, mask, kl_coef=0.7)),
    "awr": (2, lambda x, mask: awr_loss(*x, mask, kl_coef=0.7, max_weight=2.0)),
    "ppo": (3, lambda x, mask: ppo_loss(*x, mask, clip_range=0.2)),
    "reinforce": (2, lambda x, mask: reinforce_loss(*x, mask)),
    "importance": (4, weighted_reinforce),
    "value": (2, lambda x, mask: value_loss(*x, mask)),
    "clipped_value": (3, lambda x, mask: clipped_value_loss(*x, mask, clip_range=0.3)),
}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.7


def draw_rows(seed: int, k: int, lengths: list[int]) -> list[torch.Tensor]:
    """Return k numbers for each token of each row, (k, length)."""
    return [draw(seed + 31 * i, k, length) for i, length in enumerate(lengths)]


def padded(
    rows: list[torch.Tensor], *, fill: float = 0.0, left: bool = False, extra: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as (k, n, t), and the mask."""
    width = max(1, *(row.shape[1] for row in rows)) + extra
    values = torch.full((rows[0].shape[0], len(rows), width), fill, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - row.shape[1] if left else 0
        values[:, i, start : start + row.shape[1]] = row
        mask[i, start : start + row.shape[1]] = 1
    return values, mask


def slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a function at a point."""
    at = at.clone().requires_grad_()
    function(at).sum().backward()
    assert at.grad is not None
    return at.grad


def of_one(loss: Loss, *values: float) -> tuple[float, float, dict[str, float]]:
    """Return the loss of a single token, its slope in the first value, and the metrics."""
    x = torch.tensor(values, dtype=torch.float64)[:, None, None].requires_grad_()
    found, metrics = loss(x, ONE)
    found.sum().backward()
    assert x.grad is not None
    return found.item(), x.grad[0].item(), {name: value.item() for name, value in metrics.items()}


# weights ----------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    assert token_weights(mask).flatten().tolist() == pytest.approx([0.25, 0, 0, 0.25, 0.25, 0.25, 0, 0, 0])
    third = 1 / 3 / 2
    assert sequence_weights(mask).flatten().tolist() == pytest.approx([0.5, 0, 0, third, third, third, 0, 0, 0])


@pytest.mark.parametrize("name", WEIGHTS)
@given(LENGTHS, st.booleans(), st.integers(0, 3))
@QUICK
def test_weights_sum_to_one_and_do_not_depend_on_padding(name: str, lengths: list[int], left: bool, extra: int) -> None:
    rows = draw_rows(0, 1, lengths)
    _, plain = padded(rows)
    _, mask = padded(rows, left=left, extra=extra)
    found = WEIGHTS[name](mask)
    assert float(found.sum()) == pytest.approx(1 if sum(lengths) else 0, abs=1e-6)
    assert not found[~mask.bool()].any()
    assert torch.equal(found[mask.bool()], WEIGHTS[name](plain)[plain.bool()])
    assert torch.equal(found, WEIGHTS[name](mask.bool()))


@given(LENGTHS)
@QUICK
def test_long_responses_count_more_by_tokens_and_the_same_by_sequences(lengths: list[int]) -> None:
    _, mask = padded(draw_rows(0, 1, lengths))
    n, filled = max(1, sum(lengths)), max(1, sum(length > 0 for length in lengths))
    by_token, by_sequence = token_weights(mask).sum(dim=1), sequence_weights(mask).sum(dim=1)
    assert by_token.tolist() == pytest.approx([length / n for length in lengths], abs=1e-6)
    assert by_sequence.tolist() == pytest.approx([(length > 0) / filled for length in lengths], abs=1e-6)


# APA --------------------------------------------------------------------------------------------------------


def test_apa_loss_by_hand() -> None:
    """The target is −1.5 + 0.4/0.5 = −0.7; log π = −1 is 0.3 short: loss 0.09, slope 2 · (−0.3)."""
    loss, gradient, metrics = of_one(lambda x, mask: apa_loss(*x, mask, kl_coef=0.5), -1.0, -1.5, 0.4)
    assert loss == pytest.approx(0.09)
    assert gradient == pytest.approx(-0.6)
    assert metrics["target_gap"] == pytest.approx(0.3)


@given(SEEDS, st.floats(0.05, 20))
@QUICK
def test_apa_loss_is_zero_at_its_target_and_its_slope_is_twice_the_gap(seed: int, kl_coef: float) -> None:
    (anchor, advantages, gap), mask = padded(draw_rows(seed, 3, [4, 2, 5]))
    target = anchor + advantages / kl_coef
    at_target, _ = apa_loss(target, anchor, advantages, mask, kl_coef=kl_coef)
    assert at_target.max() < 1e-24
    loss, metrics = apa_loss(target + gap, anchor, advantages, mask, kl_coef=kl_coef)
    assert torch.allclose(loss, gap.square())
    assert torch.allclose(metrics["target_gap"], gap.abs())
    found = slope(lambda x: apa_loss(x, anchor, advantages, mask, kl_coef=kl_coef)[0], target + gap)
    assert torch.allclose(found, 2 * gap)


def test_apa_target_without_advantage_is_the_anchor() -> None:
    assert of_one(lambda x, mask: apa_loss(*x, mask, kl_coef=0.1), -1.5, -1.5, 0.0)[:2] == (0, 0)


# AWR --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_weight", "weight", "capped"), [(20.0, 3.0, 0), (2.0, 2.0, 1), (math.inf, 3.0, 0)])
def test_awr_loss_by_hand(max_weight: float, weight: float, capped: int) -> None:
    """Adv/λ = log 3, log π = −2: the loss is 2 weights, its slope −1 of them."""
    loss, gradient, metrics = of_one(
        lambda x, mask: awr_loss(*x, mask, kl_coef=0.5, max_weight=max_weight), -2.0, 0.5 * math.log(3)
    )
    assert loss == pytest.approx(2 * weight)
    assert gradient == pytest.approx(-weight)
    assert metrics == pytest.approx({"weight": weight, "capped": capped})


@given(SEEDS, st.integers(1, 6))
@QUICK
def test_awr_of_a_large_lambda_is_behaviour_cloning(seed: int, m: int) -> None:
    logits, advantages = draw(seed, m, 5), 10 * draw(seed + 1, m)
    targets, mask = torch.arange(m) % 5, torch.ones(m)

    def awr(x: torch.Tensor, kl_coef: float) -> torch.Tensor:
        logprobs = token_logprobs(x, targets).double()
        return awr_loss(logprobs, advantages, mask, kl_coef=kl_coef, max_weight=20.0)[0]

    cloning = supervised_loss(logits, targets).double()
    assert torch.allclose(awr(logits, 1e12), cloning, atol=1e-9)
    found = slope(lambda x: awr(x, 1e12), logits)
    assert torch.allclose(found, slope(lambda x: supervised_loss(x, targets), logits), atol=1e-7)
    # what is left is of first order in 1/λ: −Adv/λ log π
    left = (awr(logits, 1e4) - cloning) * 1e4
    assert torch.allclose(left, advantages * cloning, rtol=0.01)


@given(SEEDS, st.floats(0.1, 5), st.floats(0.5, 20))
@QUICK
def test_awr_weights_rise_with_the_advantage_up_to_the_cap(seed: int, kl_coef: float, most: float) -> None:
    (logprobs, advantages), mask = padded(draw_rows(seed, 2, [4, 6]))
    _, metrics = awr_loss(logprobs, advantages, mask, kl_coef=kl_coef, max_weight=most)
    kept = mask.bool()
    by_hand = [min(math.exp(a / kl_coef), most) for a in advantages[kept].tolist()]
    assert metrics["weight"][kept].tolist() == pytest.approx(by_hand)
    assert (metrics["capped"][kept] == 1).tolist() == [math.exp(a / kl_coef) > most for a in advantages[kept].tolist()]


def test_an_awr_weight_that_would_overflow_is_capped() -> None:
    def awr(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        return awr_loss(x[0], x[1], mask, kl_coef=0.001, max_weight=20.0)

    assert of_one(awr, -2.0, 1000.0)[:2] == pytest.approx((40, -20))
    assert of_one(awr, -2.0, -1000.0)[:2] == (0, 0)


def test_no_slope_of_awr_and_reinforce_reaches_the_advantages() -> None:
    for name in ("awr", "reinforce"):
        x = draw(0, 2, 1, 4).requires_grad_()
        LOSSES[name][1](x, torch.ones(1, 4))[0].sum().backward()
        assert x.grad is not None
        assert x.grad[0].all()
        assert not x.grad[1].any()


# PPO and REINFORCE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, 0),  # within the range, d ρ/d log π = ρ
        (0.9, -2.0, 1.8, 1.8, 0),
        (1.5, 2.0, -2.4, 0.0, 1),  # likelier already: 1.2 · 2, and no more to be had
        (1.5, -2.0, 3.0, 3.0, 0),  # likelier though it is worse: back
        (0.5, 2.0, -1.0, -1.0, 0),  # less likely though it is better: back
        (0.5, -2.0, 1.6, 0.0, 1),  # less likely already: 0.8 · 2
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_ppo_loss_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: int) -> None:
    found, slope_of_it, metrics = of_one(LOSSES["ppo"][1], -2.0 + math.log(ratio), -2.0, advantage)
    assert found == pytest.approx(loss)
    assert slope_of_it == pytest.approx(gradient)
    assert metrics["ratio"] == pytest.approx(ratio)
    assert metrics["clipped"] == clipped


@given(SEEDS, st.floats(0.05, 0.5))
@QUICK
def test_ppo_of_a_policy_that_has_not_moved_has_the_slope_of_reinforce(seed: int, clip_range: float) -> None:
    (logprobs, advantages), mask = padded(draw_rows(seed, 2, [4, 2, 5]))
    old = logprobs.clone()
    found = slope(lambda x: ppo_loss(x, old, advantages, mask, clip_range=clip_range)[0], logprobs)
    assert torch.allclose(found, slope(lambda x: reinforce_loss(x, advantages, mask)[0], logprobs))
    assert torch.allclose(found, -advantages)


@given(SEEDS, st.floats(0.05, 0.5))
@QUICK
def test_ppo_slope_is_zero_just_where_a_move_in_favour_has_gone_too_far(seed: int, clip_range: float) -> None:
    (logprobs, old, advantages), mask = padded(draw_rows(seed, 3, [6, 6]))
    loss, metrics = ppo_loss(logprobs, old, advantages, mask, clip_range=clip_range)
    found = slope(lambda x: ppo_loss(x, old, advantages, mask, clip_range=clip_range)[0], logprobs)
    ratio = (logprobs - old).exp()
    too_far = ((advantages > 0) & (ratio > 1 + clip_range)) | ((advantages < 0) & (ratio < 1 - clip_range))
    assert torch.equal(found == 0, too_far)
    assert torch.equal(metrics["clipped"] == 1, too_far)
    assert torch.allclose(found[~too_far], -(ratio * advantages)[~too_far])
    assert bool((loss >= -ratio * advantages - 1e-12).all())  # a pessimist's bound


@given(SEEDS)
@QUICK
def test_the_distance_that_ppo_tells_is_zero_at_first_and_never_negative(seed: int) -> None:
    (logprobs, shift, advantages), mask = padded(draw_rows(seed, 3, [6, 6]))
    still = ppo_loss(logprobs, logprobs, advantages, mask, clip_range=0.2)[1]["kl_old"]
    moved = ppo_loss(logprobs + shift, logprobs, advantages, mask, clip_range=0.2)[1]["kl_old"]
    assert not still.any()
    assert bool((moved > 0).all())
    small = ppo_loss(logprobs + 1e-4 * shift, logprobs, advantages, mask, clip_range=0.2)[1]["kl_old"]
    assert torch.allclose(small, 0.5e-8 * shift.square(), rtol=1e-3, atol=1e-15)


def test_ppo_slope_of_a_clipped_token_is_zero_however_far_it_went() -> None:
    old, advantages = torch.zeros(1, 1), torch.ones(1, 1)
    found = slope(lambda x: ppo_loss(x, old, advantages, ONE, clip_range=0.2)[0], torch.full((1, 1), 95.0))
    assert found.item() == 0


def test_reinforce_loss_by_hand() -> None:
    assert of_one(LOSSES["reinforce"][1], -2.0, 3.0)[:2] == pytest.approx((6, -3))
    assert of_one(LOSSES["reinforce"][1], -2.0, -0.5)[:2] == pytest.approx((-1, 0.5))


# interpolation with likelihood ------------------------------------------------------------------------------


def test_interpolated_loss_by_hand() -> None:
    """−0.3 − 2 (0.25 · (−1) + 0.75 · (−2)) = 3.2; the slopes are 1, and −2 of each weight."""
    sampled, logprobs, weights = torch.tensor(-0.3), torch.tensor([-1.0, -2.0]), torch.tensor([0.25, 0.75])
    assert interpolated_loss(sampled, logprobs, weights, mle_coef=2.0).item() == pytest.approx(3.2)
    found = slope(lambda x: interpolated_loss(sampled, x, weights, mle_coef=2.0), logprobs)
    assert found.tolist() == pytest.approx([-0.5, -1.5])
    assert slope(lambda x: interpolated_loss(x, logprobs, weights, mle_coef=2.0), sampled).item() == 1


@given(SEEDS, LENGTHS, st.floats(0, 10), st.sampled_from([0.0, 1e30, -7.0]), st.booleans(), st.integers(0, 3))
@QUICK
def test_the_interpolated_loss_is_that_of_both_and_does_not_depend_on_padding(
    seed: int, lengths: list[int], mle_coef: float, fill: float, left: bool, extra: int
) -> None:
    sampled, rows = draw(seed, 1)[0], draw_rows(seed, 1, lengths)
    tokens = torch.cat([row[0] for row in rows])
    (logprobs,), mask = padded(rows, fill=fill, left=left, extra=extra)
    found = interpolated_loss(sampled, logprobs, token_weights(mask), mle_coef=mle_coef)
    by_hand = float(sampled) - mle_coef * (float(tokens.mean()) if len(tokens) else 0.0)
    assert found.item() == pytest.approx(by_hand, rel=1e-5, abs=1e-5)
    gradient = slope(lambda x: interpolated_loss(sampled, x, token_weights(mask), mle_coef=mle_coef), logprobs)
    assert not gradient[~mask.bool()].any()


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_the_interpolated_loss_does_not_depend_on_padding_that_is_not_a_number(fill: float) -> None:
    logprobs, weights = torch.tensor([[-1.0, -2.0, fill]]), torch.tensor([[0.5, 0.5, 0.0]])
    assert interpolated_loss(torch.tensor(1.0), logprobs, weights, mle_coef=2.0).item() == pytest.approx(4)


# values -----------------------------------------------------------------------------------------------------


def test_value_loss_by_hand() -> None:
    assert of_one(LOSSES["value"][1], 1.0, 3.0)[:2] == pytest.approx((2, -2))
    assert of_one(LOSSES["value"][1], 3.0, 3.0)[:2] == (0, 0)


@pytest.mark.parametrize(
    ("value", "returned", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, 0.405, -0.9, 0),  # within 1 ± 0.2, 0.9² / 2
        (1.5, 3.0, 1.62, 0.0, 1),  # on the way and too far: (1.2 − 3)² / 2
        (0.5, 0.0, 0.32, 0.0, 1),  # (0.8 − 0)² / 2
        (1.5, 0.0, 1.125, 1.5, 0),  # the wrong way: back, 1.5² / 2
        (0.5, 3.0, 3.125, -2.5, 0),  # 2.5² / 2
    ],
)
def test_clipped_value_loss_by_hand(value: float, returned: float, loss: float, gradient: float, clipped: int) -> None:
    found, slope_of_it, metrics = of_one(
        lambda x, mask: clipped_value_loss(*x, mask, clip_range=0.2), value, 1.0, returned
    )
    assert found == pytest.approx(loss)
    assert slope_of_it == pytest.approx(gradient)
    assert metrics["value_clipped"] == clipped


@given(SEEDS)
@QUICK
def test_the_clipped_value_loss_is_the_plain_one_at_first_and_never_less(seed: int) -> None:
    (values, old, returns), mask = padded(draw_rows(seed, 3, [4, 2, 5]))
    plain = value_loss(values, returns, mask)[0]
    assert bool((clipped_value_loss(values, old, returns, mask, clip_range=0.1)[0] >= plain).all())
    assert torch.allclose(clipped_value_loss(values, values, returns, mask, clip_range=0.1)[0], plain)
    assert torch.allclose(clipped_value_loss(values, old, returns, mask, clip_range=1e6)[0], plain)
    found = slope(lambda x: clipped_value_loss(x, values, returns, mask, clip_range=0.1)[0], values)
    assert torch.allclose(found, slope(lambda x: value_loss(x, returns, mask)[0], values))


# importance weights -----------------------------------------------------------------------------------------


def test_importance_weights_by_hand() -> None:
    old, engine = torch.tensor([[0.5, 0.2, 0.4, 0.1]]).log(), torch.tensor([[0.25, 0.4, 0.4, 0.01]]).log()
    mask = torch.tensor([[1, 1, 1, 1]])
    assert importance_weights(old, engine, mask, cap=3.0)[0].tolist() == pytest.approx([2, 0.5, 1, 3])
    assert importance_weights(old, engine, mask, cap=1.0)[0].tolist() == pytest.approx([1, 0.5, 1, 1])
    assert importance_weights(old, engine, torch.tensor([[1, 0, 0, 1]]), cap=3.0)[0].tolist() == pytest.approx(
        [2, 0, 0, 3]
    )


def test_an_importance_weight_that_would_overflow_is_capped() -> None:
    assert importance_weights(torch.zeros(1), torch.full((1,), -1000.0), torch.ones(1), cap=5.0).tolist() == [5]


@given(SEEDS, LENGTHS, FILLS, st.booleans(), st.integers(0, 3))
@QUICK
def test_importance_weights_do_not_depend_on_padding(
    seed: int, lengths: list[int], fill: float, left: bool, extra: int
) -> None:
    rows = draw_rows(seed, 2, lengths)
    (old, engine), plain = padded(rows)
    (old_other, engine_other), mask = padded(rows, fill=fill, left=left, extra=extra)
    found = importance_weights(old_other, engine_other, mask, cap=2.0)
    assert not found[~mask.bool()].any()
    assert torch.equal(found[mask.bool()], importance_weights(old, engine, plain, cap=2.0)[plain.bool()])


# what no loss depends on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@given(SEEDS, LENGTHS, FILLS, st.booleans(), st.integers(0, 3), st.sampled_from(sorted(WEIGHTS)))
@QUICK
def test_neither_values_nor_slopes_depend_on_padding(
    name: str, seed: int, lengths: list[int], fill: float, left: bool, extra: int, weights: str
) -> None:
    k, loss_of = LOSSES[name]
    rows = draw_rows(seed, k, lengths)

    def found(**how: object) -> list[torch.Tensor]:
        x, mask = padded(rows, **how)  # type: ignore[arg-type]
        kept = mask.bool()
        x.requires_grad_()
        loss, metrics = loss_of(x, mask)
        (WEIGHTS[weights](mask) * loss).sum().backward()
        assert x.grad is not None
        for each in (loss, *metrics.values()):
            assert each.shape == mask.shape
            assert not each[~kept].any()
        assert not any(metric.requires_grad for metric in metrics.values())
        assert not x.grad[:, ~kept].any()
        assert torch.isfinite(x.grad).all()
        return [loss[kept].detach(), *(metric[kept] for metric in metrics.values()), x.grad[:, kept]]

    for one, other in zip(found(), found(fill=fill, left=left, extra=extra), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_tokens_may_stand_in_a_row_or_in_a_table_and_masks_be_of_any_type(name: str) -> None:
    k, loss_of = LOSSES[name]
    x, mask = padded(draw_rows(5, k, [3, 0, 5]), fill=3.0)
    table, metrics = loss_of(x, mask)
    row, others = loss_of(x.flatten(1), mask.flatten().bool())
    assert torch.equal(table.flatten(), row)
    assert {key: value.flatten().tolist() for key, value in metrics.items()} == {
        key: value.tolist() for key, value in others.items()
    }
    assert torch.equal(loss_of(x, mask.float())[0], table)


# micro-batches and devices ----------------------------------------------------------------------------------


def weighted(name: str, seed: int, lengths: list[int], weights: str) -> list[torch.Tensor]:
    """Return features of tokens, what the loss takes beside what is learned, and weights of the whole update."""
    rows = draw_rows(seed, LEARNED + LOSSES[name][0] - 1, lengths)
    _, mask = padded(rows)
    told = WEIGHTS[weights](mask)
    return [torch.cat([row, told[i][mask[i].bool()][None].double()]) for i, row in enumerate(rows)]


def learn(name: str, rows: list[torch.Tensor], **how: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of some rows by a linear model of their features, and its slope in the model's parameters."""
    theta = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64, requires_grad=True)
    x, mask = padded(rows, **how)  # type: ignore[arg-type]
    learned = torch.einsum("knt,k->nt", x[:LEARNED], theta)
    loss, _ = LOSSES[name][1](torch.stack([learned, *x[LEARNED:-1]]), mask)
    total = (x[-1] * loss).sum()
    total.backward()
    assert theta.grad is not None
    return total.detach(), theta.grad


@pytest.mark.parametrize("name", LOSSES)
@given(SEEDS, LENGTHS, st.lists(st.integers(0, 5), max_size=3), st.booleans(), st.sampled_from(sorted(WEIGHTS)))
@QUICK
def test_micro_batches_with_weights_of_the_whole_sum_to_it(
    name: str, seed: int, lengths: list[int], cuts: list[int], left: bool, weights: str
) -> None:
    rows = weighted(name, seed, lengths, weights)
    loss, gradient = learn(name, rows)
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [rows[a:b] for a, b in itertools.pairwise(edges) if b > a]
    found = [learn(name, part, left=left, fill=9.0) for part in parts]
    assert torch.allclose(sum(f[0] for f in found), loss, atol=1e-12)  # type: ignore[arg-type]
    assert torch.allclose(sum(f[1] for f in found), gradient, atol=1e-12)  # type: ignore[arg-type]


UPDATE = [1, 6, 2, 0, 5, 3]  # lengths of rows


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_mean_over_parts_with_weights_of_their_own_is_another_update(name: str, weights: str) -> None:
    rows = weighted(name, 1, UPDATE, weights)
    _, gradient = learn(name, rows)
    parts = []
    for part in (rows[::2], rows[1::2]):
        _, mask = padded(part)
        told = WEIGHTS[weights](mask)
        own = [torch.cat([row[:-1], told[i][mask[i].bool()][None].double()]) for i, row in enumerate(part)]
        parts.append(learn(name, own)[1])
    assert not torch.allclose((parts[0] + parts[1]) / 2, gradient, rtol=1e-3)


def learn_with_others(rank: int, folder: str) -> None:
    """Take every other row, of each loss, and write down the sum over processes of the slopes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = {}
    for name in LOSSES:
        for weights in WEIGHTS:
            rows = weighted(name, 1, UPDATE, weights)
            _, gradient = learn(name, rows[rank::2], left=rank == 1, extra=rank)
            torch.distributed.all_reduce(gradient, op=torch.distributed.ReduceOp.SUM)
            found[f"{name} {weights}"] = gradient.tolist()
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
def test_two_processes_with_half_of_the_rows_each_learn_what_one_learns(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=learn_with_others, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first == second
    alone = {
        f"{name} {weights}": learn(name, weighted(name, 1, UPDATE, weights))[1].tolist()
        for name in LOSSES
        for weights in WEIGHTS
    }
    assert first.keys() == alone.keys()
    for key, gradient in alone.items():
        assert max(map(abs, gradient)) > 1e-3
        assert first[key] == pytest.approx(gradient, rel=0, abs=1e-10), key
