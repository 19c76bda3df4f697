"""Calculations that a text writes down, and whether they are true. Pure functions.

An equation is `expression = expression` with a number on each side and an operator on one, units and a few words among
them allowed: "16 eggs/day - 3 eggs/day = 13 eggs/day".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d])|\d+(?:\.\d+)?|\.\d+)(?P<percent> ?%)?"
    r"|(?P<operator>\\times|\\cdot|\\div|[-+*/×÷·−–])|(?P<bracket>[()])|(?P<equals>[=≈])|(?P<word>[^\W\d_]+)"
    r"|(?P<blank>[$€£\\ \t_]+)|(?P<stop>.)",
    re.DOTALL,
)
_OPERATORS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "\\times": "*", "\\cdot": "*", "\\div": "/"}
_MOST_WORDS, _MOST_TOKENS = 4, 60
_CENT = 0.011
_LARGEST = 1e15


class Token(NamedTuple):
    """A piece of a text; kinds are "number", "operator", "bracket", "equals", "word" and "stop".

    `value` is as written: 20% is 20. `places` counts the digits after the point.
    """

    kind: str
    text: str
    value: float = 0.0
    places: int = 0
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Equation:
    """A calculation that a text writes down.

    Attributes:
        inputs: Numbers on the side with the operators.
        operators: The operators: any of + - * /.
        result: The number on the other side.
        true: Whether both sides are equal, rounding of the result allowed.
    """

    inputs: tuple[float, ...]
    operators: tuple[str, ...]
    result: float
    true: bool


def read_tokens(text: str) -> list[Token]:
    """Return the tokens of a text in order; a word `x` is the operator `*`."""
    found = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if match["number"] is not None:
            plain = match["number"].replace(",", "")
            places = len(plain.partition(".")[2])
            value = min(float(plain), _LARGEST)
            found.append(Token("number", match["number"], value, places, match["percent"] is not None))
        elif kind == "operator":
            found.append(Token(kind, _OPERATORS.get(match[0], match[0])))
        elif kind == "word":
            word = match[0].lower()
            found.append(Token("operator", "*") if word == "x" else Token(kind, word))
        elif kind != "blank":
            found.append(Token(kind, match[0]))
    return found


def find_equations(tokens: Sequence[Token]) -> list[Equation]:
    """Return the equations of a text, in order."""
    found = []
    for at, token in enumerate(tokens):
        if token.kind != "equals":
            continue
        left, right = _read(_before(tokens, at)), _read(_after(tokens, at))
        if left is None or right is None or not (left.operators or right.operators):
            continue
        sums, stated = (left, right) if left.operators else (right, left)
        result = stated.numbers[-1]
        inputs = tuple(n.value for n in sums.numbers)
        found.append(Equation(inputs, tuple(sums.operators), result.value, _agree(sums, stated)))
    return found


class _Side(NamedTuple):
    value: float
    numbers: list[Token]
    operators: list[str]


def _agree(sums: _Side, stated: _Side) -> bool:
    places = min(n.places for n in stated.numbers) if not stated.operators else 6
    # A result is right to its last digit shown, to a cent, or to a millionth of its size.
    slack = max(0.5 * 10.0**-places if sums.value % 1 else 0.0, _CENT, abs(sums.value) * 1e-6)
    last = stated.numbers[-1]
    readings = [stated.value, last.value] if last.percent else [stated.value]
    if any(n.percent for n in sums.numbers):
        readings.append(stated.value / 100)
    return any(abs(sums.value - reading) <= slack for reading in readings)


def _before(tokens: Sequence[Token], at: int) -> list[Token]:
    found: list[Token] = []
    words = depth = 0
    last = ""
    for token in reversed(tokens[max(0, at - _MOST_TOKENS) : at]):
        if token.kind in ("equals", "stop"):
            break
        if token.kind == "word":
            words += 1
            if words > _MOST_WORDS:
                break
            continue
        depth += (token.text == ")") - (token.text == "(")
        if depth < 0 or (token.kind == "number" and last == "number"):
            break
        words, last = 0, token.kind
        found.append(token)
    return found[::-1]


def _after(tokens: Sequence[Token], at: int) -> list[Token]:
    found: list[Token] = []
    words = depth = 0
    last = ""
    for token in tokens[at + 1 : at + 1 + _MOST_TOKENS]:
        if token.kind in ("equals", "stop"):
            break
        if token.kind == "word":
            words += 1
            if words > _MOST_WORDS:
                break
            continue
        depth += (token.text == "(") - (token.text == ")")
        # "= 12 (3 for each)": a bracket after the result is a remark.
        if depth < 0 or (last == "number" and token.kind in ("number", "bracket")):
            break
        words, last = 0, token.kind
        found.append(token)
    return found


def _read(tokens: list[Token]) -> _Side | None:
    """Evaluate one side; operators that join nothing, such as the slash of "eggs/day", are left out."""
    kept = [
        token
        for i, token in enumerate(tokens)
        if token.kind != "operator"
        or (i + 1 < len(tokens) and (tokens[i + 1].kind == "number" or tokens[i + 1].text == "("))
    ]
    while kept and kept[0].kind == "operator" and kept[0].text != "-":
        kept.pop(0)
    numbers = [t for t in kept if t.kind == "number"]
    if not numbers:
        return None
    try:
        value, rest = _sum(kept, 0)
    except (_NotReadable, ZeroDivisionError, OverflowError, RecursionError):
        return None
    if rest != len(kept) or abs(value) > _LARGEST:
        return None
    operators = [t.text for i, t in enumerate(kept) if t.kind == "operator" and i > 0 and kept[i - 1].text != "("]
    return _Side(value, numbers, operators)


class _NotReadable(Exception):
    pass


def _sum(tokens: list[Token], at: int) -> tuple[float, int]:
    value, at = _product(tokens, at)
    while at < len(tokens) and tokens[at].text in ("+", "-"):
        sign = 1 if tokens[at].text == "+" else -1
        term, at = _product(tokens, at + 1)
        value += sign * term
    return value, at


def _product(tokens: list[Token], at: int) -> tuple[float, int]:
    value, at = _factor(tokens, at)
    while at < len(tokens) and tokens[at].text in ("*", "/", "("):
        divides = tokens[at].text == "/"
        factor, at = _factor(tokens, at + (tokens[at].text != "("))
        value = value / factor if divides else value * factor
    return value, at


def _factor(tokens: list[Token], at: int) -> tuple[float, int]:
    if at >= len(tokens):
        raise _NotReadable
    token = tokens[at]
    if token.kind == "number":
        return (token.value / 100 if token.percent else token.value), at + 1
    if token.text == "-":
        value, at = _factor(tokens, at + 1)
        return -value, at
    if token.text != "(":
        raise _NotReadable
    value, at = _sum(tokens, at + 1)
    if at >= len(tokens) or tokens[at].text != ")":
        raise _NotReadable
    return value, at + 1
