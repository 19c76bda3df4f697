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
    r"|(?P<bold>\*\*+)|(?P<operator>\\times|\\cdot|\\div|[-+*/×÷·−–^])|(?P<bracket>[()])|(?P<equals>[=≈])"
    r"|(?P<word>[^\W\d_]+)|(?P<blank>(?:[$€£ \t_]|\\(?!times|cdot|div))+)|(?P<stop>.)",
    re.DOTALL,
)
_OPERATORS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "\\times": "*", "\\cdot": "*", "\\div": "/"}
_MOST_WORDS, _MOST_TOKENS = 4, 60
_CENT = 0.011
_LARGEST = 1e15
_LARGEST_EXPONENT = 12


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
        operators: The operators: any of + - * / ^.
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
            bullet = match[0] in "-–*" and _opens_line(text, match.start()) and text[match.end() :][:1].isspace()
            found.append(Token("stop" if bullet else kind, _OPERATORS.get(match[0], match[0])))
        elif kind == "word":
            word = match[0].lower()
            found.append(Token("operator", "*") if word == "x" else Token(kind, word))
        elif kind not in ("blank", "bold"):
            found.append(Token(kind, match[0]))
    return found


def _opens_line(text: str, at: int) -> bool:
    while at and text[at - 1] in " \t":
        at -= 1
    return at == 0 or text[at - 1] == "\n"


def find_equations(tokens: Sequence[Token]) -> list[Equation]:
    """Return the equations of a text, in order."""
    found = []
    for at, token in enumerate(tokens):
        if token.kind != "equals":
            continue
        before = _before(tokens, at)
        left, right = _read(before), _read(_after(tokens, at))
        if left is None or right is None or not (left.operators or right.operators):
            continue
        if not left.operators and (before[-1].kind == "word" or any(t.text == "of" for t in before)):
            continue  # "cost of 3 apples = 3 x $2", "half of 8 = 8 / 2": the number on the left is no result
        sums, stated = (left, right) if left.operators else (right, left)
        result = stated.numbers[-1].value
        if stated.operators or stated.value < 0:
            result = stated.value if stated.operators else -result
        inputs = tuple(n.value for n in sums.numbers)
        found.append(Equation(inputs, tuple(sums.operators), result, _agree(sums, stated)))
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
            found.append(token)
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
            found.append(token)
            continue
        depth += (token.text == "(") - (token.text == ")")
        # "= 12 (3 for each)": a bracket after the result is a remark.
        if depth < 0 or (last == "number" and (token.kind == "number" or token.text == "(")):
            break
        words, last = 0, token.kind
        found.append(token)
    return found


def _read(tokens: list[Token]) -> _Side | None:
    """Evaluate one side; words, and operators that join nothing (the slash of "eggs/day"), are left out."""
    end = Token("stop", "")
    kept = []
    for token, after, later in zip(tokens, [*tokens[1:], end], [*tokens[2:], end, end], strict=False):
        joins = _begins_term(after) or (after.text == "-" and _begins_term(later))
        if token.kind != "word" and (token.kind != "operator" or joins):
            kept.append(token)
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


def _begins_term(token: Token) -> bool:
    return token.kind == "number" or token.text == "("


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
    value, at = _power(tokens, at)
    while at < len(tokens) and tokens[at].text in ("*", "/", "("):
        divides = tokens[at].text == "/"
        factor, at = _power(tokens, at + (tokens[at].text != "("))
        value = value / factor if divides else value * factor
    return value, at


def _power(tokens: list[Token], at: int) -> tuple[float, int]:
    value, at = _factor(tokens, at)
    if at < len(tokens) and tokens[at].text == "^":
        exponent, at = _factor(tokens, at + 1)
        if not (exponent % 1 == 0 and 0 <= exponent <= _LARGEST_EXPONENT):
            raise _NotReadable
        value = value**exponent
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
