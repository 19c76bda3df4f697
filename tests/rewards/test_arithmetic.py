"""Calculations in texts, by hand: what is read, what is true, and texts that no one would write."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oirl.rewards.arithmetic import Equation, find_equations, read_tokens


def equations(text: str) -> list[Equation]:
    return find_equations(read_tokens(text))


def verdicts(text: str) -> list[bool]:
    return [e.true for e in equations(text)]


def test_an_equation_has_inputs_operators_and_a_result() -> None:
    assert equations("He has 3 + 4 * 2 = 11 eggs.") == [Equation((3.0, 4.0, 2.0), ("+", "*"), 11.0, True)]
    assert equations("She pays 20 = 4 * 5.") == [Equation((4.0, 5.0), ("*",), 20.0, True)]


TRUE = {
    "units": "16 eggs/day - 3 eggs/day - 4 eggs/day = 9 eggs/day",
    "unit after a slash": "1.5 hours * 60 minutes/hour = 90 minutes",
    "four words between": "5 of the big boxes * 6 pens each = 30 pens in all of them",
    "dollars": "$1,000.50 + $2 = $1,002.50",
    "euros": "€5 × 3 = €15",
    "millions": "1,000,000 - 1 = 999,999",
    "percent as a factor": "20% * 50 = 10",
    "percent as a result": "5 / 20 = 25%",
    "percent of a percentage": "5 / 20 * 100 = 25%",
    "percents that add up": "20% + 30% = 50%",
    "percents without the last sign": "20% + 30% = 50",
    "brackets": "(3 + 4) * (2 - 1) = 7",
    "nested brackets": "2 * ((3 + 4) - (2 + 1)) = 8",
    "a bracket multiplies": "2 + 3(4) = 14",
    "a sign in brackets": "5 * (-3) + 20 = 5",
    "a leading sign": "-3 + 5 = 2",
    "minus after minus": "20 - 3 - 4 = 13",
    "product before sum": "2 + 3 * 4 = 14",
    "division from the left": "100 / 5 / 2 = 10",
    "unicode": "3×4÷2−1·2 = 4",
    "dashes": "7 – 5 = 2",
    "the letter x": "5 x 3 = 15",
    "x without spaces": "5x3=15",
    "LaTeX without spaces": "3\\times4\\div2\\cdot5=30",
    "LaTeX with dollars": "$3 + 4 = 7$",
    "bold": "**3 + 4 = 7**",
    "a bold result": "3 + 4 = **7**",
    "a bold start": "**12** + 5 = 17",
    "a star as a bullet": "* 3 + 4 = 7",
    "a number as a label": "1. 3 + 4 = 7",
    "a remark after the result": "3 * 5 = 15 (5 for each)",
    "annotation of GSM8K": "<<5*3=15>>15",
    "rounding to a cent": "10 / 3 = 3.33",
    "rounding to a whole": "10 / 3 = 3",
    "rounding up": "20 / 3 = 7",
    "rounding to tenths": "22 / 7 = 3.1",
    "a half goes either way": "10 / 4 = 2",
    "approximately": "22 / 7 ≈ 3.14",
    "floats": "0.1 + 0.2 = 0.3",
    "large numbers": "123456 * 1000 = 123456000",
    "a decimal point first": ".5 + .25 = .75",
    "line before": "Let us see:\n3 + 4 = 7",
    "both sides": "2 * 6 = 3 * 4",
    "all of it in a bracket": "He has some (3 + 4 = 7) left.",
}


@pytest.mark.parametrize("name", TRUE)
def test_true_equations(name: str) -> None:
    assert verdicts(TRUE[name]) == [True]


FALSE = {
    "sum": "3 + 4 = 8",
    "units": "16 eggs - 3 eggs = 12 eggs",
    "off by a tenth": "1.5 + 1.5 = 3.1",
    "a cent and a half": "1.00 + 1.00 = 2.015",
    "rounded too much": "20 / 3 = 6.6",
    "a whole number is not rounded": "10 * 3 = 31",
    "sign": "3 - 5 = 2",
    "percent": "20% * 50 = 11",
    "product before sum": "2 + 3 * 4 = 20",
    "brackets": "(2 + 3) * 4 = 14",
    "large numbers": "123456 * 1000 = 123457000",
    "both sides": "2 * 6 = 3 * 5",
    "on the left": "9 = 4 + 4",
}


@pytest.mark.parametrize("name", FALSE)
def test_false_equations(name: str) -> None:
    assert verdicts(FALSE[name]) == [False]


NONE = {
    "no operator": "x = 5, and n = 12",
    "two plain sides": "5 = 5",
    "no number on one side": "total = 3 + 4",
    "division by zero": "1 / 0 = 0",
    "an unopened bracket": "3 + 4) = 7",
    "over a line's end": "3 + 4\n= 7",
    "over a sentence's end": "3 + 4. = 7",
    "no equals sign": "3 + 4 is 7",
    "empty": "",
    "too large": "999999999999 * 999999999999 = 5",
    "more than four words": "3 + 4 of these big red eggs = 7",
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_equation(name: str) -> None:
    assert equations(NONE[name]) == []


def test_several_equations_stand_in_order() -> None:
    text = "First 3 + 4 = 7 apples. Then 7 * 2 = 15 apples, so 15 - 5 = $10."
    assert [(e.result, e.true) for e in equations(text)] == [(7.0, True), (15.0, False), (10.0, True)]


def test_a_chain_is_read_link_by_link() -> None:
    assert equations("3 * 4 + 1 = 12 + 1 = 13") == [
        Equation((3.0, 4.0, 1.0), ("*", "+"), 13.0, True),
        Equation((12.0, 1.0), ("+",), 13.0, True),
    ]
    assert equations("The cost of 3 apples = 3 x $2 = $6") == [Equation((3.0, 2.0), ("*",), 6.0, True)]
    assert verdicts("Half of 8 = 8 / 2 = 4") == [True]
    assert verdicts("10 - 3 = 7 * 2 = 14") == [False, True]


def test_tokens_keep_value_places_and_percent() -> None:
    found = read_tokens("Pay $1,234.50 or 20 % X 3.")
    assert [(t.kind, t.text, t.value, t.places, t.percent) for t in found] == [
        ("word", "pay", 0, 0, False),
        ("number", "1,234.50", 1234.5, 2, False),
        ("word", "or", 0, 0, False),
        ("number", "20", 20, 0, True),
        ("operator", "*", 0, 0, False),
        ("number", "3", 3, 0, False),
        ("stop", ".", 0, 0, False),
    ]


def test_a_comma_that_parts_no_thousands_ends_a_number() -> None:
    assert [t.value for t in read_tokens("1,2,3 and 1,0000 and 12,345,678") if t.kind == "number"] == [
        1, 2, 3, 1, 0, 12345678,
    ]  # fmt: skip


# Each of these is a true calculation that is read otherwise, or not read.


@pytest.mark.parametrize("text", ["5 * -3 = -15", "10 - -3 = 13", "6 / -2 = -3"])
def test_a_sign_after_an_operator_is_a_sign(text: str) -> None:
    assert verdicts(text) == [True]


def test_a_dash_as_a_bullet_is_no_sign() -> None:
    assert verdicts("We add:\n- 3 + 4 = 7\n- 5 * 2 = 10") == [True, True]


def test_bold_numbers_are_not_multiplied() -> None:
    assert verdicts("5 + **3** = 8") == [True]


@pytest.mark.parametrize("text", ["3 \\times 4 = 12", "12 \\div 4 = 3", "\\( 3 \\cdot 4 = 12 \\)"])
def test_operators_of_latex_after_a_space_are_read(text: str) -> None:
    assert verdicts(text) == [True]


def test_a_negative_result_is_negative() -> None:
    (found,) = equations("3 - 5 = -2")
    assert found.true
    assert found.result == -2


@pytest.mark.parametrize("text", ["12 = 2 * (3 + 3)", "6 + 6 = (4 + 8)"])
def test_a_bracket_may_end_the_right_side(text: str) -> None:
    assert verdicts(text) == [True]


def test_a_result_that_is_a_fraction_has_the_value_of_the_fraction() -> None:
    (found,) = equations("1/2 + 1/4 = 3/4")
    assert found.true
    assert found.result == 0.75


def test_a_power_is_not_cut_in_two() -> None:
    assert verdicts("3^2 + 1 = 10") in ([], [True])


PIECE = st.sampled_from("0 1 7 12 3.5 1,000 20% + - * / = = ( ) x × \\times $ eggs per . \n ** ≈ ^".split(" "))


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECE, max_size=80).map(" ".join) | st.lists(PIECE, max_size=80).map("".join) | st.text())
def test_no_text_raises(text: str) -> None:
    for found in equations(text):
        assert found.inputs
        assert set(found.operators) <= set("+-*/^")
        assert isinstance(found.true, bool)


@given(st.text())
def test_tokens_are_of_known_kinds(text: str) -> None:
    kinds = {"number", "operator", "bracket", "equals", "word", "stop"}
    assert {t.kind for t in read_tokens(text)} <= kinds


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from("+-*"), st.integers(-2, 2))
def test_an_equation_of_integers_is_true_if_it_is(a: int, b: int, operator: str, off: int) -> None:
    exact = {"+": a + b, "-": a - b, "*": a * b}[operator]
    if exact + off < 0:
        return
    (found,) = equations(f"We get {a:,} {operator} {b:,} = {exact + off:,} in all.")
    assert found.inputs == (a, b)
    assert found.result == exact + off
    assert found.true == (abs(off) <= abs(exact) * 1e-6)


HOSTILE = {
    "digits": "9" * 100_000,
    "thousands": "1,234" + ",567" * 25_000 + "8",
    "points": "1." * 50_000,
    "equals": "=" * 100_000,
    "sums": "1+1=" * 25_000,
    "operators": "1" + "-" * 100_000 + "1 = 2",
    "brackets": "(" * 50_000 + "1" + ")" * 50_000 + " = 1 + 0",
    "words": "1 + 1 " + "a" * 100_000 + " = 2",
    "spaces": "1 +" + " " * 100_000 + "1 = 2",
    "backslashes": "\\" * 100_000 + "times 3 = 4",
    "products": "999999999999999*" * 6_000 + "0 = 1",
    "percents": "1%" * 50_000 + "= 1 + 1",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_long_hostile_texts_are_read_to_their_end(name: str) -> None:
    assert isinstance(equations(HOSTILE[name]), list)


def test_numbers_without_end_are_capped() -> None:
    (token,) = read_tokens("9" * 5000)
    assert token.value == 1e15
