"""The interval of Bonett and Price: figures by hand, its symmetries, and its level, worked out over all outcomes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multinomial

from oirl.statistics.intervals import paired_interval


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    n = draw(st.integers(1, 2000))
    first = draw(st.integers(0, n))
    return first, draw(st.integers(0, n - first)), n


@pytest.mark.parametrize(
    ("first_only", "second_only", "n", "expected"),
    [
        # Of 22: 4/22 and 2/22; 2/22 ± z √((6/22 − (2/22)²) / 22) = 0.090909 ± 0.214892.
        (3, 1, 20, (0.1, -0.123983, 0.305801)),
        # Of 12: 1/12 and 1/12; 0 ± z √((2/12) / 12) = 0 ± 0.230984.
        (0, 0, 10, (0.0, -0.230984, 0.230984)),
        # Of 12: 11/12 and 1/12; 10/12 ± z √((1 − (10/12)²) / 12) = 0.833333 ± 0.312754, cut at 1.
        (10, 0, 10, (1.0, 0.520580, 1.0)),
        # Of 102: 31/102 and 11/102; 20/102 ± z √((42/102 − (20/102)²) / 102) = 0.196078 ± 0.118573.
        (30, 10, 100, (0.2, 0.077505, 0.314652)),
        # Of 3: 2/3 and 1/3; 1/3 ± z √((1 − 1/9) / 3) = 1/3 ± 1.066869, cut at the gain of 1.
        (1, 0, 1, (1.0, -0.733536, 1.0)),
    ],
)
def test_figures_by_hand(first_only: int, second_only: int, n: int, expected: tuple[float, float, float]) -> None:
    assert paired_interval(first_only, second_only, n) == pytest.approx(expected, abs=2e-6)


@given(counts())
def test_what_every_interval_keeps(case: tuple[int, int, int]) -> None:
    first, second, n = case
    gain, low, high = paired_interval(first, second, n)
    assert gain == (first - second) / n
    assert -1 <= low <= gain <= high <= 1
    assert high > low
    turned = paired_interval(second, first, n)
    assert turned == pytest.approx((-gain, -high, -low), abs=1e-12)


@given(st.integers(1, 5000))
def test_without_any_disagreement_there_is_still_doubt(n: int) -> None:
    _, low, high = paired_interval(0, 0, n)
    assert low == -high
    assert high == pytest.approx(1.959964 * math.sqrt(2) / (n + 2), rel=1e-6)


def test_more_cases_with_the_same_shares_tell_more() -> None:
    widths = [np.ptp(paired_interval(3 * k, k, 20 * k)[1:]) for k in (1, 2, 5, 20, 100)]
    assert widths == sorted(widths, reverse=True)
    assert paired_interval(300, 100, 2000)[1] > 0  # a gain of a tenth, shown


def test_far_from_the_edges_it_is_wald() -> None:
    first, second, n = 4000, 3000, 20_000
    gain, low, high = paired_interval(first, second, n)
    half = 1.959964 * math.sqrt(((first + second) / n - gain**2) / n)
    assert (low, high) == pytest.approx((gain - half, gain + half), abs=2e-4)


def outcomes(first: float, second: float, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (first only, second only, chance) of all outcomes that are not next to impossible."""
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij"))
    a, b = a[a + b <= n], b[a + b <= n]
    chance = multinomial.pmf(np.stack([a, b, n - a - b], axis=1), n, [first, second, 1 - first - second])
    likely = chance > 1e-9
    return a[likely], b[likely], chance[likely]


@pytest.mark.parametrize("n", [30, 60, 200])
@pytest.mark.parametrize(
    ("first", "second"), [(0.02, 0.02), (0.1, 0.1), (0.3, 0.3), (0.15, 0.05), (0.3, 0.1), (0.5, 0.2), (0.05, 0.0)]
)
def test_the_level_is_kept(first: float, second: float, n: int) -> None:
    """The chance that the interval holds the truth, exactly: no simulation, so no luck."""
    a, b, chance = outcomes(first, second, n)
    ends = np.array([paired_interval(int(i), int(j), n)[1:] for i, j in zip(a, b, strict=True)])
    truth = first - second
    held = chance[(ends[:, 0] <= truth) & (truth <= ends[:, 1])].sum()
    assert chance.sum() == pytest.approx(1, abs=1e-4)
    # Where hardly anything disagrees there is no test of just 5%: such an interval is too wide, not too narrow.
    assert held >= 0.93
    if n * (first + second) >= 10:
        assert held <= 0.975
