"""The losses of supervised updates: values and gradients by hand, identities, what they do not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from oirl.tuning.losses import (
    contrastive_loss,
    negative_entropy,
    sequence_logprobs,
    supervised_loss,
    token_logprobs,
)

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)
EXACT = {"rel": 1e-5, "abs": 1e-5}

# P = (1/2, 1/4, 1/4) and P = (1/10, 1/5, 7/10)
LOGITS = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
TARGETS = torch.tensor([1, 2])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a function at a point."""
    at = at.clone().requires_grad_()
    function(at).backward()
    assert at.grad is not None
    return at.grad


# supervised -------------------------------------------------------------------------------------------------


def test_token_logprobs_by_hand() -> None:
    assert token_logprobs(LOGITS, TARGETS).tolist() == pytest.approx([math.log(0.25), math.log(0.7)])


def test_token_logprobs_of_half_precision_are_computed_in_float32() -> None:
    logits = draw(0, 5, 7).to(torch.bfloat16)
    targets = torch.tensor([0, 1, 2, 3, 4])
    found = token_logprobs(logits, targets)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_logprobs(logits.float(), targets))


def test_supervised_loss_is_minus_the_logprob_of_each_token() -> None:
    loss = supervised_loss(LOGITS, TARGETS)
    assert loss.tolist() == pytest.approx([-math.log(0.25), -math.log(0.7)])
    assert loss.tolist() == pytest.approx((-token_logprobs(LOGITS, TARGETS)).tolist())


def test_gradient_of_the_supervised_loss_is_the_distribution_less_the_target() -> None:
    found = slope(lambda x: supervised_loss(x, TARGETS).sum(), LOGITS)
    assert found.flatten().tolist() == pytest.approx([0.5, 0.25 - 1, 0.25, 0.1, 0.2, 0.7 - 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 0.9])
def test_label_smoothing_mixes_in_the_mean_over_the_vocabulary(smoothing: float) -> None:
    means = (math.log(0.5) + 2 * math.log(0.25)) / 3, (math.log(0.1) + math.log(0.2) + math.log(0.7)) / 3
    own = math.log(0.25), math.log(0.7)
    by_hand = [-(1 - smoothing) * o - smoothing * m for o, m in zip(own, means, strict=True)]
    assert supervised_loss(LOGITS, TARGETS, label_smoothing=smoothing).tolist() == pytest.approx(by_hand)


def test_smoothed_loss_has_no_gradient_at_the_smoothed_target() -> None:
    smoothing, vocabulary = 0.3, 4
    aim = torch.full((1, vocabulary), smoothing / vocabulary)
    aim[0, 2] += 1 - smoothing
    found = slope(lambda x: supervised_loss(x, torch.tensor([2]), label_smoothing=smoothing).sum(), aim.log())
    assert found.flatten().tolist() == pytest.approx([0] * vocabulary, abs=1e-6)


@given(SEEDS, st.integers(1, 6), st.floats(-50, 50))
@QUICK
def test_losses_of_tokens_do_not_depend_on_what_is_added_to_all_logits(seed: int, m: int, shift: float) -> None:
    logits, targets = draw(seed, m, 5), torch.arange(m) % 5
    for loss in (lambda x: supervised_loss(x, targets), negative_entropy):
        assert torch.allclose(loss(logits + shift), loss(logits), rtol=1e-4, atol=1e-4)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
@QUICK
def test_the_loss_of_a_token_does_not_depend_on_the_tokens_beside_it(seed: int, m: int, k: int) -> None:
    logits, targets = draw(seed, m + k, 5), torch.arange(m + k) % 5
    parts = [supervised_loss(logits[:m], targets[:m]), supervised_loss(logits[m:], targets[m:])]
    assert torch.allclose(supervised_loss(logits, targets), torch.cat(parts))
    parts = [negative_entropy(logits[:m]), negative_entropy(logits[m:])]
    assert torch.allclose(negative_entropy(logits), torch.cat(parts))


# sequences --------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5), st.lists(st.integers(0, 4), max_size=20))
@QUICK
def test_sequence_logprobs_equal_a_loop(seed: int, extra: int, rows: list[int]) -> None:
    n = 5 + extra
    values = -draw(seed, len(rows)).abs()
    by_hand = [0.0] * n
    for value, row in zip(values.tolist(), rows, strict=True):
        by_hand[row] += value
    found = sequence_logprobs(values, torch.tensor(rows, dtype=torch.long), n)
    assert found.tolist() == pytest.approx(by_hand, **EXACT)


def test_a_row_without_tokens_has_the_logprob_zero() -> None:
    found = sequence_logprobs(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([2, 0, 2]), 4)
    assert found.tolist() == [-2.0, 0.0, -5.0, 0.0]


def test_gradient_of_a_sequence_reaches_its_own_tokens_only() -> None:
    rows = torch.tensor([1, 0, 1, 2])
    found = slope(lambda x: sequence_logprobs(x, rows, 3)[1], torch.zeros(4))
    assert found.tolist() == [1.0, 0.0, 1.0, 0.0]


# contrastive ------------------------------------------------------------------------------------------------


def test_contrastive_loss_by_hand() -> None:
    table = torch.tensor([[0.6, 0.2, 0.2], [0.1, 0.3, 0.1], [0.25, 0.25, 0.5]]).log() - 30
    by_hand = -math.log(0.6) - math.log(0.3 / 0.5) - math.log(0.5)
    assert contrastive_loss(table, torch.arange(3)).item() == pytest.approx(by_hand)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
@QUICK
def test_contrastive_loss_is_the_cross_entropy_of_guessing_the_instruction(seed: int, n: int, k: int) -> None:
    table, own = draw(seed, n, k), [i % k for i in range(n)]
    by_hand = 0.0
    for i, row in enumerate(table.double().numpy()):
        by_hand -= math.log(np.exp(row[own[i]]) / np.exp(row).sum())
    assert contrastive_loss(table, torch.tensor(own)).item() == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


def test_gradient_of_the_contrastive_loss_is_the_guess_less_the_instruction() -> None:
    table = torch.tensor([[0.6, 0.4], [0.7, 0.3]]).log()
    found = slope(lambda x: contrastive_loss(x, torch.tensor([0, 1])), table)
    assert found.flatten().tolist() == pytest.approx([0.6 - 1, 0.4, 0.7, 0.3 - 1])


def test_contrastive_loss_of_instructions_that_make_no_difference_is_log_k() -> None:
    table = torch.full((3, 4), -812.0)
    assert contrastive_loss(table, torch.tensor([0, 3, 1])).item() == pytest.approx(3 * math.log(4))


def test_contrastive_loss_of_a_single_instruction_is_nothing() -> None:
    assert contrastive_loss(torch.tensor([[-5.0], [-900.0]]), torch.tensor([0, 0])).item() == 0


def test_contrastive_loss_stays_finite_for_long_outputs() -> None:
    table = torch.tensor([[-9000.0, -12000.0], [-9000.0, -12000.0]])
    assert contrastive_loss(table, torch.tensor([0, 1])).item() == pytest.approx(3000)


def test_what_has_no_chance_is_left_out_of_the_contrast() -> None:
    table = torch.tensor([[-1.0, -2.0, -math.inf], [-3.0, -0.5, -1.0]])
    own = torch.tensor([1, 0])
    apart = contrastive_loss(table[:1, :2], own[:1]) + contrastive_loss(table[1:], own[1:])
    assert contrastive_loss(table, own).item() == pytest.approx(apart.item())
    found = slope(lambda x: contrastive_loss(x, own), table)
    assert found[0, 2].item() == 0
    assert torch.isfinite(found).all()


@given(SEEDS, st.integers(2, 6))
@QUICK
def test_contrastive_loss_does_not_depend_on_how_likely_outputs_are_or_on_order(seed: int, n: int) -> None:
    table, own = draw(seed, n, n), torch.arange(n)
    value = contrastive_loss(table, own).item()
    shifted = table + 10 * draw(seed + 1, n, 1)  # an output that is unlikely under all instructions alike
    assert contrastive_loss(shifted, own).item() == pytest.approx(value, rel=1e-4, abs=1e-4)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert contrastive_loss(table[order][:, order], own).item() == pytest.approx(value, **EXACT)


# entropy ----------------------------------------------------------------------------------------------------


def test_negative_entropy_by_hand() -> None:
    first = 0.5 * math.log(0.5) + 0.5 * math.log(0.25)
    second = 0.1 * math.log(0.1) + 0.2 * math.log(0.2) + 0.7 * math.log(0.7)
    assert negative_entropy(LOGITS).tolist() == pytest.approx([first, second])


def test_gradient_of_the_negative_entropy_by_hand() -> None:
    """d/dz_j Σ p log p = p_j (log p_j − Σ p log p)."""
    p = [0.5, 0.25, 0.25]
    total = sum(v * math.log(v) for v in p)
    found = slope(lambda x: negative_entropy(x).sum(), LOGITS[:1])
    assert found.flatten().tolist() == pytest.approx([v * (math.log(v) - total) for v in p])


@given(SEEDS, st.floats(1.1, 5))
@QUICK
def test_a_broader_distribution_has_the_lower_negative_entropy(seed: int, heat: float) -> None:
    logits = draw(seed, 3, 6)
    broad, narrow = negative_entropy(logits / heat), negative_entropy(logits)
    assert bool((broad < narrow).all())
    assert bool((narrow < 0).all())


@given(SEEDS)
@QUICK
def test_a_step_down_the_negative_entropy_raises_the_entropy(seed: int) -> None:
    logits = draw(seed, 3, 6)
    stepped = logits - 0.05 * slope(lambda x: negative_entropy(x).sum(), logits)
    p = torch.softmax(stepped, dim=-1)
    q = torch.softmax(logits, dim=-1)
    assert -(p * p.log()).sum() > -(q * q.log()).sum()


def test_negative_entropy_goes_from_minus_log_v_to_zero() -> None:
    assert negative_entropy(torch.zeros(2, 8)).tolist() == pytest.approx([-math.log(8)] * 2)
    certain = torch.tensor([[300.0, 0.0, 0.0]])
    assert negative_entropy(certain).item() == 0
    assert torch.isfinite(slope(lambda x: negative_entropy(x).sum(), certain)).all()
