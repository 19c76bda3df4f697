"""Budgets: their forms, and that no run spends more than was allowed, whatever is in flight."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oirl.engines.spending import Budget, Spending
from oirl.errors import ConfigError

PRICE = (0.5, 2.0)
"""Of a million tokens in and out."""


# Forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("200000tokens", 200_000, "tokens"),
        ("500ktokens", 500_000, "tokens"),
        ("1.5Mtokens", 1_500_000, "tokens"),
        ("1_000_000 tokens", 1_000_000, "tokens"),
        (" 12 tokens ", 12, "tokens"),
        ("0.25ktokens", 250, "tokens"),
        ("2.50money", 2.5, "money"),
        ("3 money", 3, "money"),
        ("1kmoney", 1000, "money"),
    ],
)
def test_budgets_are_read(text: str, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount, unit)


BAD = [
    *("", "tokens", "5", "-5tokens", "+5tokens", "5 dollars", "1e6tokens", "5Ktokens", "5mtokens", "5token", "5k k"),
    *("5ktokens!", "x5tokens", ".5tokens", "5.tokens", "1,000tokens", "nantokens", "inftokens", "5tokensmoney"),
    *("_tokens", "___ktokens", "_money"),
]


@pytest.mark.parametrize("text", BAD)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"allowed: a number and `tokens` or `money`, such as 500ktokens or 2\.50money"
    ):
        Budget.parse(text)


@given(st.text(alphabet="0123456789._kM tokensmoney-", max_size=14))
@settings(deadline=None, derandomize=True)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except ConfigError:
        return
    assert budget.unit in ("tokens", "money")
    assert 0 <= budget.amount < math.inf


def test_money_needs_prices() -> None:
    with pytest.raises(ConfigError, match="--prices FILE with its name or `default`"):
        Spending(Budget(2.5, "money"), None, 10)
    Spending(Budget(2.5, "tokens"), None, 10)
    Spending(None, None, 10)


# What is spent ----------------------------------------------------------------------------------------------


def test_spending_by_hand() -> None:
    spending = Spending(None, PRICE, 100)
    assert spending.afford("a", 10**9)  # without a budget all is allowed
    spending.settle("a", 1000, 500)
    spending.settle("of an earlier session", 200, 50)
    assert (spending.tokens_in, spending.tokens_out) == (1200, 550)
    assert spending.money == pytest.approx((1200 * 0.5 + 550 * 2.0) / 1e6)
    assert spending.cost(3, 4) == pytest.approx(9.5e-6)
    assert spending.cost(None, 4) is None
    assert spending.cost(3, None) is None
    spending.afford("b", 10)
    spending.settle("b", None, None)  # a request that failed
    assert (spending.tokens_in, spending.tokens_out) == (1200, 550)
    assert Spending(None, None, 100).money is None


def test_a_budget_by_hand() -> None:
    spending = Spending(Budget(100, "tokens"), None, 20)
    assert spending.afford("a", 30)  # at most 30 + 20
    assert spending.afford("b", 30)  # and as many again: all of it
    assert not spending.afford("c", 1)
    spending.settle("a", 30, 5)
    assert not spending.afford("c", 1)  # 35 spent, 50 promised, 21 are too many
    spending.settle("b", 30, 0)
    assert spending.afford("c", 15)  # 65 spent
    assert not spending.afford("d", 0)


def test_a_budget_of_money_by_hand() -> None:
    spending = Spending(Budget(100e-6, "money"), PRICE, 20)
    assert spending.afford("a", 40)  # at most 20 + 40 millionths
    assert not spending.afford("b", 2)
    spending.settle("a", 40, 0)
    assert spending.afford("b", 80)  # 20 spent, 40 + 40
    assert not spending.afford("c", 1)


def test_a_refused_request_promises_nothing() -> None:
    spending = Spending(Budget(100, "tokens"), None, 10)
    assert not spending.afford("big", 91)
    assert spending.afford("small", 90)


def test_more_tokens_than_bytes_are_reckoned_with_from_then_on() -> None:
    """A chat template puts tokens of its own around a text."""
    spending = Spending(Budget(100, "tokens"), None, 0)
    assert spending.afford("a", 10)
    spending.settle("a", 30, 0)
    assert not spending.afford("b", 51)  # 30 spent, 51 bytes, 20 more than bytes
    assert spending.afford("b", 50)


def test_one_cheap_request_says_nothing_of_the_next() -> None:
    """100 bytes of prose are 20 tokens; 100 bytes of digits may be 100."""
    spending = Spending(Budget(130, "tokens"), None, 10)
    assert spending.afford("prose", 100)
    spending.settle("prose", 20, 10)
    for i in range(2):
        if spending.afford(i, 100):
            spending.settle(i, 100, 10)
    assert spending.tokens_in + spending.tokens_out <= 130


SHARE = st.sampled_from([0.0, 0.1, 0.5, 1.0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 200), SHARE, SHARE),
        st.tuples(st.just("answer"), st.integers(0, 3), st.just(0.0), st.just(0.0)),
        st.tuples(st.just("fail"), st.integers(0, 3), st.just(0.0), st.just(0.0)),
    ),
    min_size=5,
    max_size=30,
)


def spend(budget: Budget, max_tokens: int, steps: list[tuple[str, int, float, float]]) -> Spending:
    """Ask, and let what is in flight finish in any order: with at most a token a byte and `max_tokens` of response."""
    spending = Spending(budget, PRICE, max_tokens)
    flying: list[tuple[int, int, int]] = []
    for i, (what, number, share_in, share_out) in enumerate(steps):
        if what == "ask":
            if spending.afford(i, number):
                flying.append((i, round(number * share_in), round(max_tokens * share_out)))
        elif flying:
            key, tokens_in, tokens_out = flying.pop(number % len(flying))
            spending.settle(key, *((tokens_in, tokens_out) if what == "answer" else (None, None)))
    for key, tokens_in, tokens_out in flying:
        spending.settle(key, tokens_in, tokens_out)
    return spending


@given(st.integers(0, 1000), st.integers(1, 50), STEPS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_sequence_spends_more_tokens_than_allowed(amount: int, max_tokens: int, steps: list) -> None:
    spending = spend(Budget(amount, "tokens"), max_tokens, steps)
    assert spending.tokens_in + spending.tokens_out <= amount


@given(st.integers(0, 1000), st.integers(1, 50), STEPS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_sequence_spends_more_money_than_allowed(millionths: int, max_tokens: int, steps: list) -> None:
    spending = spend(Budget(millionths / 1e6, "money"), max_tokens, steps)
    assert spending.money is not None
    assert spending.money <= millionths / 1e6 + 1e-12


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), min_size=1, max_size=20))
@settings(deadline=None, derandomize=True)
def test_what_surely_fits_is_allowed(requests: list[tuple[int, int]]) -> None:
    amount = sum(size + 20 for size, _ in requests)
    spending = Spending(Budget(amount, "tokens"), None, 20)
    for i, (size, tokens_out) in enumerate(requests):
        assert spending.afford(i, size)
        if i % 2:
            spending.settle(i, size, tokens_out)
