"""Drawing tokens: the distribution that is drawn from by hand, the draw as inverse CDF, seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from oirl.engines.draws import draw, sampling_logprobs, uniforms

ALMOST_ONE = math.nextafter(1.0, 0.0)


def logits(*probabilities: float) -> torch.Tensor:
    """Return one row of logits of these probabilities, shifted: only differences count."""
    return torch.tensor([[math.log(p) + 3.7 if p else -math.inf for p in probabilities]], dtype=torch.float64)


def kept(*probabilities: float, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None) -> list[float]:
    return sampling_logprobs(logits(*probabilities), temperature, top_p, top_k)[0].exp().tolist()


def drawn(probabilities: list[float], at: float, dtype: torch.dtype = torch.float64) -> int:
    token = draw(torch.tensor([probabilities], dtype=dtype).log(), torch.tensor([[at]], dtype=dtype))
    assert token.shape == (1, 1)
    assert token.dtype == torch.int64
    return int(token)


def by_definition(row: list[float], temperature: float, top_p: float, top_k: int | None) -> list[float]:
    """Return the distribution as its definition reads, in plain Python."""
    top = max(row)
    p = [math.exp((x - top) / temperature) for x in row]
    if top_k is not None:
        least = sorted(p, reverse=True)[min(top_k, len(p)) - 1]
        p = [x if x >= least else 0.0 for x in p]
    p = [x / sum(p) for x in p]
    chosen, so_far = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if chosen and so_far >= top_p and top_p < 1:
            break
        chosen.append(i)
        so_far += p[i]
    return [x / so_far if i in chosen else 0.0 for i, x in enumerate(p)]


@pytest.mark.parametrize(
    ("probabilities", "how", "expected"),
    [
        ((0.5, 0.3, 0.2), {}, (0.5, 0.3, 0.2)),
        ((0.5, 0.3, 0.2), {"temperature": 0.5}, (25 / 38, 9 / 38, 4 / 38)),  # p ** 2
        ((0.64, 0.36), {"temperature": 2.0}, (8 / 14, 6 / 14)),  # p ** 0.5
        ((0.2, 0.5, 0.3), {"top_k": 2}, (0, 5 / 8, 3 / 8)),
        ((0.2, 0.5, 0.3), {"top_k": 1}, (0, 1, 0)),
        ((0.2, 0.5, 0.3), {"top_k": 3}, (0.2, 0.5, 0.3)),
        ((0.2, 0.5, 0.3), {"top_k": 99}, (0.2, 0.5, 0.3)),
        ((0.2, 0.2, 0.4, 0.2), {"top_k": 2}, (0.2, 0.2, 0.4, 0.2)),  # all as likely as the second
        ((0.3, 0.3, 0.25, 0.15), {"top_k": 1}, (0.5, 0.5, 0, 0)),
        ((0.2, 0.5, 0.3), {"top_p": 0.49}, (0, 1, 0)),
        ((0.2, 0.5, 0.3), {"top_p": 0.51}, (0, 5 / 8, 3 / 8)),  # with the token that crosses the threshold
        ((0.2, 0.5, 0.3), {"top_p": 0.79}, (0, 5 / 8, 3 / 8)),
        ((0.2, 0.5, 0.3), {"top_p": 0.81}, (0.2, 0.5, 0.3)),
        ((0.2, 0.5, 0.3), {"top_p": 1e-12}, (0, 1, 0)),  # one is always left
        ((0.25, 0.25, 0.25, 0.25), {"top_p": 0.7}, (1 / 3, 1 / 3, 1 / 3, 0)),  # of equals the first
        ((0.25, 0.25, 0.25, 0.25), {"top_p": 1e-12}, (1, 0, 0, 0)),
        ((0.0, 0.6, 0.0, 0.4), {"top_p": 0.99}, (0, 0.6, 0, 0.4)),
        # Temperature goes before top-p, top-k before top-p: each changes which tokens stay.
        ((0.5, 0.3, 0.2), {"temperature": 0.5, "top_p": 0.6}, (1, 0, 0)),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 2, "top_p": 0.5}, (1, 0, 0, 0)),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 2, "top_p": 0.6}, (4 / 7, 3 / 7, 0, 0)),
    ],
)
def test_what_is_drawn_from_by_hand(probabilities: tuple[float, ...], how: dict, expected: tuple[float, ...]) -> None:
    assert kept(*probabilities, **how) == pytest.approx(expected, abs=1e-12)


def test_a_token_that_cannot_be_drawn_has_no_finite_logprob() -> None:
    found = sampling_logprobs(logits(0.2, 0.5, 0.3), 1.0, 1.0, 2)[0]
    assert found[0] == -torch.inf
    assert found[1:].tolist() == pytest.approx([math.log(5 / 8), math.log(3 / 8)])


def test_rows_do_not_touch_each_other() -> None:
    rows = torch.cat([logits(0.2, 0.5, 0.3), logits(0.6, 0.1, 0.3), logits(1 / 3, 1 / 3, 1 / 3)])
    for how in ((0.7, 1.0, None), (1.0, 0.6, None), (1.0, 1.0, 1), (1.3, 0.8, 2)):
        together = sampling_logprobs(rows, *how)
        for i in range(3):
            assert together[i].tolist() == sampling_logprobs(rows[i : i + 1], *how)[0].tolist()


@given(
    st.lists(st.integers(-30, 30), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.5, 1.0, 1.7, 5.0]),
    st.sampled_from([0.013, 0.21, 0.47, 0.83, 0.989, 1.0]),
    st.none() | st.integers(1, 14),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_drawn_from_is_as_defined(
    tenths: list[int], temperature: float, top_p: float, top_k: int | None
) -> None:
    row = [x / 10 for x in tenths]
    found = sampling_logprobs(torch.tensor([row], dtype=torch.float64), temperature, top_p, top_k)[0].exp().tolist()
    assert sum(found) == pytest.approx(1)
    assert found == pytest.approx(by_definition(row, temperature, top_p, top_k), abs=1e-9)


@pytest.mark.parametrize(
    ("at", "token"),
    [(0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 2), (0.99, 2), (ALMOST_ONE, 2)],
)
def test_draw_is_the_inverse_of_the_cumulated_probability(at: float, token: int) -> None:
    assert drawn([0.2, 0.5, 0.3], at) == token


def test_each_row_is_drawn_by_its_own_number() -> None:
    rows = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.2, 0.5, 0.3]], dtype=torch.float64).log()
    at = torch.tensor([[0.3], [0.3], [0.8]], dtype=torch.float64)
    assert draw(rows, at).tolist() == [[1], [0], [2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("at", [0.0, 1e-300, 0.5, 1 - 2**-24, ALMOST_ONE])
def test_a_token_of_no_probability_is_never_drawn(at: float, dtype: torch.dtype) -> None:
    for probabilities in ([0.0, 1.0, 0.0], [0.0, 0.3, 0.0, 0.7, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        assert probabilities[drawn(probabilities, at, dtype)] > 0
    for n in range(2, 200, 13):  # the sum of these is one only up to rounding
        p = sampling_logprobs(torch.tensor([[0.1] * n + [-math.inf] * 50], dtype=dtype), 1.0, 1.0, None)
        assert int(draw(p, torch.tensor([[at]], dtype=dtype))) < n


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any),
    st.floats(0, ALMOST_ONE),
    st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    st.none() | st.integers(1, 5),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_drawn_can_be_drawn(weights: list[int], at: float, top_p: float, top_k: int | None) -> None:
    found = sampling_logprobs(logits(*(w / sum(weights) for w in weights)), 1.0, top_p, top_k)
    token = int(draw(found, torch.tensor([[at]], dtype=torch.float64)))
    assert found[0, token] > -torch.inf
    below = found[0].exp()[:token].sum().item()
    assert below - 1e-12 <= at <= below + found[0, token].exp().item() + 1e-12


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, None), (0.6, 1.0, None), (1.0, 0.8, None), (1.5, 0.9, 5)]
)
def test_frequencies_are_those_of_the_probabilities(temperature: float, top_p: float, top_k: int | None) -> None:
    row = [0.9, -1.2, 0.0, 0.4, 2.0, -0.3, 1.1, -2.5]
    n = 8000
    logprobs = sampling_logprobs(torch.tensor([row], dtype=torch.float64), temperature, top_p, top_k)
    at = torch.tensor(uniforms(range(1, n + 1), 1))
    counts = np.bincount(draw(logprobs.expand(n, -1).contiguous(), at)[:, 0].numpy(), minlength=len(row))
    expected = n * np.array(by_definition(row, temperature, top_p, top_k))
    assert (counts[expected == 0] == 0).all()
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_numbers_depend_on_the_seed_alone() -> None:
    seeds = [5, 0, 2**31 - 1, 5]
    rows = uniforms(seeds, 7)
    assert rows.shape == (4, 7)
    assert rows.dtype == np.float64
    assert (rows[0] == rows[3]).all()
    assert (rows[0] != rows[1]).all()
    for seed, row in zip(seeds, rows, strict=True):
        assert (uniforms([seed], 7)[0] == row).all()
        assert (uniforms([seed], 100)[0, :7] == row).all()  # of a longer response the same first tokens
    assert ((rows >= 0) & (rows < 1)).all()
    assert uniforms([], 3).shape == (0, 3)


def test_numbers_are_equal_on_every_machine() -> None:
    """A log that was begun elsewhere goes on with the same draws."""
    assert uniforms([0, 7], 2) == pytest.approx(
        np.array([[0.011546754286331562, 0.24154919656271812], [0.8720734548204873, 0.29536538151378355]]), abs=0
    )


def test_numbers_of_neighbouring_seeds_are_independent() -> None:
    rows = uniforms(range(2000), 2)
    assert abs(np.corrcoef(rows[:-1, 0], rows[1:, 0])[0, 1]) < 0.1
    assert abs(np.corrcoef(rows[:, 0], rows[:, 1])[0, 1]) < 0.1
    assert chisquare(np.histogram(rows, bins=20, range=(0, 1))[0]).pvalue > 1e-3
