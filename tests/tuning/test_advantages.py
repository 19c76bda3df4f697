"""Advantages, returns, baselines and whitening: by hand, against brute force, and what they do not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch

from oirl.tuning.advantages import (
    BASELINES,
    WHITENING,
    centred,
    explained_variance,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    returns_to_go,
    standardised,
    unchanged,
)

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)
SHARES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5)
FILLS = st.sampled_from([0.0, 1e30, -7.0, math.nan, math.inf, -math.inf])
GROUPS = st.lists(st.integers(0, 4), min_size=1, max_size=12)

# What is given token by token: its function of two tensors (n, t) and a mask.
BY_TOKEN: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "advantages": lambda x, y, mask: generalised_advantages(x, y, mask, gamma=0.9, gae_lambda=0.7)[0],
    "returns": lambda x, y, mask: generalised_advantages(x, y, mask, gamma=0.9, gae_lambda=0.7)[1],
    "returns to go": lambda x, y, mask: returns_to_go(x, mask, gamma=0.9),
    "unchanged": lambda x, y, mask: unchanged(x, mask),
    "centred": lambda x, y, mask: centred(x, mask),
    "standardised": lambda x, y, mask: standardised(x, mask),
}
WITHIN_ROWS = ["advantages", "returns", "returns to go", "unchanged"]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_rows(seed: int, lengths: list[int]) -> list[torch.Tensor]:
    """Return two numbers for each token of each row, (2, length)."""
    return [draw(seed + 31 * i, 2, length) for i, length in enumerate(lengths)]


def padded(
    rows: list[torch.Tensor], *, fill: float = 0.0, left: bool = False, extra: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as (2, n, t), and the mask."""
    width = max(1, *(row.shape[1] for row in rows)) + extra
    values = torch.full((2, len(rows), width), fill, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - row.shape[1] if left else 0
        values[:, i, start : start + row.shape[1]] = row
        mask[i, start : start + row.shape[1]] = 1
    return values, mask


def slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a function at a point."""
    at = at.clone().requires_grad_()
    function(at).backward()
    assert at.grad is not None
    return at.grad


def full(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long)


# generalised advantage estimation ---------------------------------------------------------------------------


def test_generalised_advantages_by_hand() -> None:
    """δ = (1 + 0.9·1 − 0.5, 0 + 0.9·0.2 − 1, 2 − 0.2) = (1.4, −0.82, 1.8), and each takes 0.9 · 0.5 of the next."""
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 0.2]])
    advantages, returns = generalised_advantages(rewards, values, full(1, 3), gamma=0.9, gae_lambda=0.5)
    by_hand = [1.4 + 0.45 * -0.01, -0.82 + 0.45 * 1.8, 1.8]
    assert advantages[0].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert returns[0].tolist() == pytest.approx([by_hand[0] + 0.5, by_hand[1] + 1.0, 2.0])


def test_slopes_of_the_first_advantage_by_hand() -> None:
    """dÂ_0/dr_k = (γλ)^k, dÂ_0/dV_0 = −1, and dÂ_0/dV_k = (γλ)^{k−1} γ − (γλ)^k."""
    gamma, lam = 0.9, 0.6
    rewards, values = draw(0, 1, 3), draw(1, 1, 3)

    def first(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return generalised_advantages(rewards, values, full(1, 3), gamma=gamma, gae_lambda=lam)[0][0, 0]

    of_rewards = slope(lambda x: first(x, values), rewards)
    assert of_rewards[0].tolist() == pytest.approx([1, 0.54, 0.54**2])
    of_values = slope(lambda x: first(rewards, x), values)
    assert of_values[0].tolist() == pytest.approx([-1, 0.9 - 0.54, 0.54 * 0.9 - 0.54**2])


@given(SEEDS, LENGTHS, SHARES, SHARES, st.booleans())
@QUICK
def test_generalised_advantages_equal_the_double_sum(
    seed: int, lengths: list[int], gamma: float, lam: float, left: bool
) -> None:
    rows = draw_rows(seed, lengths)
    by_hand = []
    for rewards, values in (row.tolist() for row in rows):
        values = [*values, 0.0]
        for t in range(len(rewards)):
            terms = range(t, len(rewards))
            deltas = {k: rewards[k] + gamma * values[k + 1] - values[k] for k in terms}
            by_hand.append(sum((gamma * lam) ** (k - t) * deltas[k] for k in terms))
    (rewards, values), mask = padded(rows, left=left)
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    assert advantages[mask.bool()].tolist() == pytest.approx(by_hand, abs=1e-9)
    assert torch.allclose(returns, advantages + values)


@given(SEEDS, LENGTHS, SHARES)
@QUICK
def test_at_lambda_one_advantages_are_returns_less_values(seed: int, lengths: list[int], gamma: float) -> None:
    (rewards, values), mask = padded(draw_rows(seed, lengths))
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    ahead = returns_to_go(rewards, mask, gamma=gamma)
    assert torch.allclose(advantages, ahead - values)
    assert torch.allclose(returns, ahead)  # in which values have no part


@given(SEEDS, LENGTHS, SHARES)
@QUICK
def test_at_lambda_zero_advantages_look_one_step_ahead(seed: int, lengths: list[int], gamma: float) -> None:
    (rewards, values), mask = padded(draw_rows(seed, lengths))
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=gamma, gae_lambda=0.0)
    ahead = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1)  # the padding is 0: the episode has ended
    assert torch.allclose(returns, rewards + gamma * ahead)
    assert torch.allclose(advantages, rewards + gamma * ahead - values)


@given(SEEDS, LENGTHS, SHARES)
@QUICK
def test_advantages_of_values_that_foresee_all_are_zero(seed: int, lengths: list[int], lam: float) -> None:
    (rewards, _), mask = padded(draw_rows(seed, lengths))
    values = returns_to_go(rewards, mask, gamma=0.8)
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=0.8, gae_lambda=lam)
    assert torch.allclose(advantages, torch.zeros_like(advantages), atol=1e-12)
    assert torch.allclose(returns, values)


def test_returns_to_go_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [9.0, 1.0, 2.0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert returns_to_go(rewards, mask).tolist() == [[7.0, 6.0, 4.0], [0.0, 3.0, 2.0]]
    assert returns_to_go(rewards, mask, gamma=0.5).tolist() == [[3.0, 4.0, 4.0], [0.0, 2.0, 2.0]]
    assert returns_to_go(rewards, mask, gamma=0.0).tolist() == [[1.0, 2.0, 4.0], [0.0, 1.0, 2.0]]


# what stands beside the tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_TOKEN)
@given(SEEDS, LENGTHS, FILLS, st.booleans(), st.integers(0, 3))
@QUICK
def test_neither_values_nor_slopes_depend_on_padding(
    name: str, seed: int, lengths: list[int], fill: float, left: bool, extra: int
) -> None:
    rows = draw_rows(seed, lengths)
    told = draw(seed + 1, sum(lengths))  # weights of the tokens, so that no slope vanishes by symmetry

    def found(**how: object) -> tuple[torch.Tensor, torch.Tensor]:
        values, mask = padded(rows, **how)  # type: ignore[arg-type]
        kept = mask.bool()
        values.requires_grad_()
        result = BY_TOKEN[name](values[0], values[1], mask)
        assert not result[~kept].any()
        (result[kept] * told).sum().backward()
        assert values.grad is not None
        assert not values.grad[:, ~kept].any()
        return result[kept].detach(), values.grad[:, kept]

    plain, other = found(), found(fill=fill, left=left, extra=extra)
    assert torch.isfinite(other[1]).all()
    assert torch.allclose(other[0], plain[0], rtol=1e-10, atol=1e-12)
    assert torch.allclose(other[1], plain[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", WITHIN_ROWS)
@given(SEEDS, LENGTHS, st.integers(0, 5))
@QUICK
def test_the_advantages_of_a_row_do_not_depend_on_the_rows_beside_it(
    name: str, seed: int, lengths: list[int], cut: int
) -> None:
    rows = draw_rows(seed, lengths)
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    found = []
    for some in [rows, *parts]:
        (x, y), mask = padded(some)
        found.append(BY_TOKEN[name](x, y, mask)[mask.bool()])
    assert torch.allclose(torch.cat(found[1:]), found[0])


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_mask_may_be_of_any_type(name: str) -> None:
    (x, y), mask = padded(draw_rows(3, [3, 0, 5]))
    for kind in (torch.bool, torch.float32, torch.int8):
        assert torch.equal(BY_TOKEN[name](x, y, mask.to(kind)), BY_TOKEN[name](x, y, mask))


@pytest.mark.parametrize("name", BY_TOKEN)
def test_where_there_are_no_tokens_all_is_zero(name: str) -> None:
    x, y = torch.full((2, 3), math.nan), torch.full((2, 3), math.inf)
    assert not BY_TOKEN[name](x, y, torch.zeros(2, 3, dtype=torch.long)).any()


# baselines --------------------------------------------------------------------------------------------------


def test_baselines_by_hand() -> None:
    """Query 4 has the rewards 1, 3, 8: mean 4, means of the others 5.5, 4.5, 2. Query 2 has 5 and 6, query 0 one."""
    rewards, groups = torch.tensor([1.0, 5.0, 3.0, 7.0, 8.0, 6.0]), [4, 2, 4, 0, 4, 2]
    assert group_advantages(rewards, groups).tolist() == pytest.approx([-3, -0.5, -1, 0, 4, 0.5])
    assert leave_one_out_advantages(rewards, groups).tolist() == pytest.approx([-4.5, -1, -1.5, 0, 6, 1])


def test_slopes_of_the_baselines_by_hand() -> None:
    """d(R_0 − mean)/dR = 1 − 1/3 and −1/3; without oneself in the mean 1 and −1/2; another query has no part."""
    rewards, groups = draw(0, 4), [0, 0, 1, 0]
    found = slope(lambda x: group_advantages(x, groups)[0], rewards)
    assert found.tolist() == pytest.approx([2 / 3, -1 / 3, 0, -1 / 3])
    found = slope(lambda x: leave_one_out_advantages(x, groups)[0], rewards)
    assert found.tolist() == pytest.approx([1, -1 / 2, 0, -1 / 2])


@given(SEEDS, GROUPS)
@QUICK
def test_baselines_equal_a_loop(seed: int, groups: list[int]) -> None:
    rewards = draw(seed, len(groups))
    own, others = [], []
    for i, query in enumerate(groups):
        mates = [j for j, other in enumerate(groups) if other == query]
        own.append(float(rewards[i] - rewards[mates].mean()))
        rest = [j for j in mates if j != i]
        others.append(float(rewards[i] - rewards[rest].mean()) if rest else 0.0)
    assert group_advantages(rewards, groups).tolist() == pytest.approx(own, abs=1e-12)
    assert leave_one_out_advantages(rewards, groups).tolist() == pytest.approx(others, abs=1e-12)


@given(SEEDS, GROUPS)
@QUICK
def test_leave_one_out_is_the_group_baseline_stretched(seed: int, groups: list[int]) -> None:
    rewards = draw(seed, len(groups))
    own, others = group_advantages(rewards, groups), leave_one_out_advantages(rewards, groups)
    for i, query in enumerate(groups):
        n = groups.count(query)
        assert float(others[i]) == pytest.approx(float(own[i]) * n / (n - 1) if n > 1 else 0.0, abs=1e-12)
        assert n > 1 or float(own[i]) == 0


@pytest.mark.parametrize("name", BASELINES)
@given(SEEDS, GROUPS, st.floats(-100, 100))
@QUICK
def test_advantages_over_a_baseline_have_the_mean_zero_and_do_not_see_what_a_query_adds(
    name: str, seed: int, groups: list[int], shift: float
) -> None:
    rewards, index = draw(seed, len(groups)), torch.tensor(groups)
    found = BASELINES[name](rewards, groups)
    for query in set(groups):
        assert float(found[index == query].sum()) == pytest.approx(0, abs=1e-12)
    added = rewards + shift * draw(seed + 1, 5)[index]  # what all responses to a query have in common
    assert torch.allclose(BASELINES[name](added, groups), found, atol=1e-10)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(BASELINES[name](rewards[order], index[order].tolist()), found[order])


@pytest.mark.parametrize("name", BASELINES)
def test_no_responses_have_no_advantages(name: str) -> None:
    assert BASELINES[name](torch.zeros(0), []).tolist() == []


# whitening --------------------------------------------------------------------------------------------------


def test_whitening_by_hand() -> None:
    """Of 1, 2, 6 the mean is 3, and the variance (4 + 1 + 9)/3."""
    advantages, mask = torch.tensor([[1.0, 2.0], [6.0, 50.0]]), torch.tensor([[1, 1], [1, 0]])
    assert unchanged(advantages, mask).tolist() == [[1, 2], [6, 0]]
    assert centred(advantages, mask).tolist() == [[-2, -1], [3, 0]]
    by_hand = [v / math.sqrt(14 / 3) for v in (-2, -1, 3, 0)]
    assert standardised(advantages, mask).flatten().tolist() == pytest.approx(by_hand)


def test_slopes_of_whitening_by_hand() -> None:
    """With z = (x − m)/s: dz_i/dx_j = (δ_ij − 1/n − z_i z_j/n)/s, and of x − m it is δ_ij − 1/n. x = (1, 3), s = 1."""
    advantages = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    found = slope(lambda x: unchanged(x, full(1, 3))[0, 0], advantages)
    assert found[0].tolist() == [1, 0, 0]
    found = slope(lambda x: centred(x, full(1, 3))[0, 0], advantages)
    assert found[0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    s = math.sqrt(14 / 3)
    z = [-2 / s, -1 / s, 3 / s]
    by_hand = [((j == 0) - 1 / 3 - z[0] * z[j] / 3) / s for j in range(3)]
    found = slope(lambda x: standardised(x, full(1, 3))[0, 0], advantages)
    assert found[0].tolist() == pytest.approx(by_hand)


@given(SEEDS, LENGTHS, st.booleans())
@QUICK
def test_whitened_advantages_have_the_mean_zero_and_the_variance_one(seed: int, lengths: list[int], left: bool) -> None:
    (advantages, _), mask = padded(draw_rows(seed, lengths), left=left)
    kept = mask.bool()
    if kept.sum() < 2:
        return
    assert float(centred(advantages, mask)[kept].mean()) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(centred(advantages, mask)[kept].var(), advantages[kept].var())
    found = standardised(advantages, mask)[kept]
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.var(correction=0)) == pytest.approx(1)


@given(SEEDS, st.floats(0.01, 100), st.booleans(), st.floats(-1000, 1000))
@QUICK
def test_standardised_advantages_do_not_depend_on_the_unit_of_rewards(
    seed: int, scale: float, negative: bool, shift: float
) -> None:
    (advantages, _), mask = padded(draw_rows(seed, [3, 5, 2]))
    sign = -1 if negative else 1
    found = standardised(sign * scale * advantages + shift, mask)
    assert torch.allclose(found, sign * standardised(advantages, mask), atol=1e-8)
    moved = centred(sign * scale * advantages + shift, mask)
    assert torch.allclose(moved, sign * scale * centred(advantages, mask), atol=1e-8)


@given(st.floats(-1e6, 1e6), st.lists(st.integers(1, 6), min_size=1, max_size=5))
@QUICK
def test_advantages_that_are_all_alike_are_zero_when_whitened(value: float, lengths: list[int]) -> None:
    (_, _), mask = padded(draw_rows(0, lengths))
    advantages = torch.full(mask.shape, value, dtype=torch.float64)
    assert centred(advantages, mask).abs().max() <= 1e-14 * abs(value)
    assert standardised(advantages, mask).abs().max() <= 1e-14 * abs(value)


@pytest.mark.parametrize(("value", "n"), [(5.7, 3), (0.3, 6), (-1.3, 6), (0.1, 7)])
def test_advantages_in_float32_that_are_all_alike_are_zero_when_whitened(value: float, n: int) -> None:
    assert standardised(torch.full((1, n), value), full(1, n)).abs().max() < 1e-3


def test_a_single_token_is_zero_when_whitened() -> None:
    advantages, mask = torch.tensor([[5.0, 7.0]]), torch.tensor([[0, 1]])
    assert centred(advantages, mask).tolist() == standardised(advantages, mask).tolist() == [[0, 0]]


def test_small_differences_between_large_advantages_are_no_noise() -> None:
    advantages = torch.tensor([[1000.0, 1000.5, 1001.0]])
    assert standardised(advantages, full(1, 3))[0].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])


def test_tables_name_what_settings_may_ask_for() -> None:
    assert set(WHITENING) == {"none", "centre", "standardise"}
    assert (WHITENING["none"], WHITENING["centre"], WHITENING["standardise"]) == (unchanged, centred, standardised)
    assert set(BASELINES) == {"group", "leave_one_out"}
    assert (BASELINES["group"], BASELINES["leave_one_out"]) == (group_advantages, leave_one_out_advantages)


# explained variance -----------------------------------------------------------------------------------------


def test_explained_variance_by_hand() -> None:
    """R = 1, 2, 3 has the variance 2/3; R − V = 0, 0, 1 has 1/3 − 1/9 = 2/9."""
    returns, values = torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[1.0, 2.0], [2.0, -99.0]])
    assert explained_variance(values, returns, torch.tensor([[1, 1], [1, 0]])) == pytest.approx(2 / 3)


@given(SEEDS, st.floats(-10, 10))
@QUICK
def test_explained_variance_of_a_forecast_of_a_constant_and_of_the_contrary(seed: int, shift: float) -> None:
    (returns, _), mask = padded(draw_rows(seed, [3, 5, 2]), fill=math.nan)
    assert explained_variance(returns + shift, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, shift), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)  # Var(2R) = 4 Var(R)


@given(st.floats(-100, 100, width=32), st.integers(1, 9))
@QUICK
def test_explained_variance_of_constant_returns_is_not_a_number(value: float, n: int) -> None:
    returns = torch.full((1, n), value)
    assert math.isnan(explained_variance(draw(0, 1, n), returns, full(1, n)))
    assert math.isnan(explained_variance(returns, returns, torch.zeros(1, n)))
