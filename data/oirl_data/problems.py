"""Arithmetic word problems, written by rule from a seeded random source.

Eight kinds of problem, three or four wordings each. All numbers, also those between the steps, are whole
and lie in 0 to `MAX_NUMBER`, because the tokenizer of the small model has one token per whole number.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

MAX_NUMBER = 60
ONE_STEP_SHARE = 0.25

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo",
    "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Viktor",
)  # fmt: skip
OBJECTS = (
    "apples", "balls", "books", "buttons", "cards", "cups", "flowers", "hats", "kites", "lamps", "marbles",
    "pencils", "plates", "shells", "stamps", "stickers", "stones", "toys",
)  # fmt: skip
COLOURS = ("blue", "green", "grey", "large", "new", "old", "red", "small", "white")
CONTAINERS = ("bags", "boxes", "baskets", "drawers")


@dataclass(frozen=True)
class Step:
    """One calculation: `left op right = result`, with `op` one of `+ - x /`."""

    left: int
    op: str
    right: int
    result: int


@dataclass(frozen=True)
class Problem:
    """A word problem with its answer.

    Attributes:
        query: The text of the problem.
        answer: The right answer.
        kind: The kind of problem, a key of `KINDS`.
        steps: The calculations that lead to the answer; the last one's result is the answer.
        unit: What is counted, as it stands in the query.
    """

    query: str
    answer: int
    kind: str
    steps: tuple[Step, ...]
    unit: str


def _step(left: int, op: str, right: int) -> Step:
    """Work out one calculation."""
    if op == "+":
        return Step(left, op, right, left + right)
    if op == "-":
        return Step(left, op, right, left - right)
    if op == "x":
        return Step(left, op, right, left * right)
    return Step(left, op, right, left // right)


def _factors(rng: random.Random, limit: int) -> tuple[int, int]:
    """Draw two factors with a product of at most `limit`."""
    first = rng.randint(2, 9)
    return first, rng.randint(2, min(9, limit // first))


Draft = tuple[str, dict[str, int], tuple[Step, ...]]


def _add(rng: random.Random) -> Draft:
    a, b = rng.randint(3, 24), rng.randint(3, 15)
    first = _step(a, "+", b)
    if rng.random() < ONE_STEP_SHARE:
        wording = rng.choice(
            (
                "{n} has {a} {o}. {m} gives {n} {b} more. How many {u} does {n} have now?",
                "{n} sees {a} {o} on the table and {b} on the floor. How many {u} does {n} see in all?",
            )
        )
        return wording, {"a": a, "b": b}, (first,)
    c = rng.randint(3, 15)
    wording = rng.choice(
        (
            "{n} finds {a} {o} on Monday, {b} on Tuesday and {c} on Friday. How many {u} does {n} find in all?",
            "{n} has {a} {o}, {m} has {b} and {k} has {c}. How many {u} do they have together?",
            "{n} has {a} {o}, gets {b} from {m} and buys {c} more. How many {u} does {n} have now?",
        )
    )
    return wording, {"a": a, "b": b, "c": c}, (first, _step(first.result, "+", c))


def _take(rng: random.Random) -> Draft:
    a, b = rng.randint(20, 50), rng.randint(3, 15)
    first = _step(a, "-", b)
    if rng.random() < ONE_STEP_SHARE:
        wording = rng.choice(
            (
                "{n} had {a} {o}, then lost {b}. How many {u} does {n} still have?",
                "A shop has {a} {o}. {n} buys {b} of them. How many {u} are left in the shop?",
            )
        )
        return wording, {"a": a, "b": b}, (first,)
    c = rng.randint(3, min(15, first.result - 2))
    wording = rng.choice(
        (
            "{n} has {a} {o} and gives {b} to {m} and {c} to {k}. How many {u} are left?",
            "{n} had {a} {o}, lost {b} and sold {c}. How many {u} does {n} still have?",
            "There were {a} {o} in the garden. {n} took {b} away and {m} took {c}. How many {u} are left?",
        )
    )
    return wording, {"a": a, "b": b, "c": c}, (first, _step(first.result, "-", c))


def _groups(rng: random.Random) -> Draft:
    a, b = _factors(rng, 36)
    first = _step(a, "x", b)
    if rng.random() < ONE_STEP_SHARE:
        wording = rng.choice(
            (
                "{n} has {a} {box} with {b} {o} in each. How many {u} are there in all?",
                "{n} makes {b} {o} each day. How many {u} does {n} make in {a} days?",
            )
        )
        return wording, {"a": a, "b": b}, (first,)
    c = rng.randint(3, 15)
    wording = rng.choice(
        (
            "{n} has {a} {box} with {b} {o} in each and {c} more on the table. How many {u} are there in all?",
            "{n} packs {b} {o} into each of {a} {box} and has {c} over. How many {u} does {n} have in all?",
            "{n} makes {b} {o} each day for {a} days, and {m} makes {c}. How many {u} do they make together?",
        )
    )
    return wording, {"a": a, "b": b, "c": c}, (first, _step(first.result, "+", c))


def _share(rng: random.Random) -> Draft:
    friends, each = _factors(rng, 48)
    total = friends * each
    last = _step(total, "/", friends)
    if rng.random() < ONE_STEP_SHARE or total < 8:
        wording = rng.choice(
            (
                "{n} shares {a} {o} equally among {b} friends. How many {u} does each friend get?",
                "{n} and {m} lay {a} {o} in {b} equal rows. How many {u} are in each row?",
            )
        )
        return wording, {"a": total, "b": friends}, (last,)
    c = rng.randint(3, min(15, total - 3))
    wording = rng.choice(
        (
            "{n} has {a} {o}, finds {c} more and shares all equally among {b} friends. "
            "How many {u} does each friend get?",
            "{n} has {a} {o} and {m} has {c}. They put them into {b} {box}, the same number in each. "
            "How many {u} are in each?",
        )
    )
    return wording, {"a": total - c, "b": friends, "c": c}, (_step(total - c, "+", c), last)


def _bulk(rng: random.Random) -> Draft:
    a, b = _factors(rng, 48)
    first = _step(a, "x", b)
    c = rng.randint(2, min(15, first.result - 2))
    wording = rng.choice(
        (
            "{n} buys {a} {box} of {b} {o} and gives {c} to {m}. How many {u} are left?",
            "{n} has {a} {box} with {b} {o} in each, but {c} are broken. How many {u} are not broken?",
            "{n} makes {b} {o} each day for {a} days, then sells {c}. How many {u} are left?",
        )
    )
    return wording, {"a": a, "b": b, "c": c}, (first, _step(first.result, "-", c))


def _compare(rng: random.Random) -> Draft:
    b, more = rng.randint(3, 24), rng.randint(3, 15)
    if rng.random() < ONE_STEP_SHARE:
        wording = rng.choice(
            (
                "{n} has {a} {o} and {m} has {b}. How many more {u} does {n} have than {m}?",
                "{n} has {b} {o} and {m} has {a}. How many fewer {u} does {n} have than {m}?",
            )
        )
        return wording, {"a": b + more, "b": b}, (_step(b + more, "-", b),)
    c = rng.randint(3, 15)
    total = _step(b, "+", c)
    wording = rng.choice(
        (
            "{n} needs {a} {o}. {n} has {b} and {m} brings {c}. How many more {u} does {n} need?",
            "{n} has {a} {o}, {m} has {b} and {k} has {c}. How many more {u} does {n} have than {m} and {k} together?",
        )
    )
    numbers = {"a": total.result + more, "b": b, "c": c}
    return wording, numbers, (total, _step(numbers["a"], "-", total.result))


def _price(rng: random.Random) -> Draft:
    a, b = _factors(rng, 36)
    first = _step(a, "x", b)
    c = rng.randint(3, 15)
    if rng.random() < 0.5:
        wording = rng.choice(
            (
                "{n} buys {a} {o} for {b} coins each and a bag for {c} coins. How many coins does {n} pay?",
                "{n} sells {a} {o} for {b} coins each and had {c} coins before. How many coins does {n} have now?",
            )
        )
        return wording, {"a": a, "b": b, "c": c}, (first, _step(first.result, "+", c))
    wording = rng.choice(
        (
            "{n} has {c} coins and buys {a} {o} for {b} coins each. How many coins are left?",
            "{n} buys {a} {o} for {b} coins each and pays with {c} coins. How many coins does {n} get back?",
        )
    )
    paid = first.result + c
    return wording, {"a": a, "b": b, "c": paid}, (first, _step(paid, "-", first.result))


def _before(rng: random.Random) -> Draft:
    a, b = rng.randint(20, 35), rng.randint(3, 15)
    if rng.random() < ONE_STEP_SHARE:
        wording = "{n} gave {b} {o} to {m} and now has {a}. How many {u} did {n} have at first?"
        return wording, {"a": a, "b": b}, (_step(a, "+", b),)
    c = rng.randint(3, 15)
    first = _step(a, "-", c)
    wording = rng.choice(
        (
            "{n} gave {b} {o} to {m}, then found {c} more and now has {a}. How many {u} did {n} have at first?",
            "{n} lost {b} {o}, then {m} gave {n} {c} more. Now {n} has {a}. How many {u} did {n} have at first?",
        )
    )
    return wording, {"a": a, "b": b, "c": c}, (first, _step(first.result, "+", b))


KINDS: dict[str, Callable[[random.Random], Draft]] = {
    "add": _add,
    "take": _take,
    "groups": _groups,
    "share": _share,
    "bulk": _bulk,
    "compare": _compare,
    "price": _price,
    "before": _before,
}


def masked(query: str) -> str:
    """Return the query in lower case with every number replaced by `n`: equal means near duplicate."""
    return re.sub(r"\d+", "n", query.lower())


def is_held_out(query: str) -> bool:
    """Tell whether a query is kept from the training of the small model.

    A third of all masked texts is held out, by a checksum of the masked text, so that no query of the log
    and no near duplicate of one is ever trained on, whatever the seeds are.
    """
    return zlib.crc32(masked(query).encode()) % 3 == 0


def make_problem(rng: random.Random, kind: str | None = None) -> Problem:
    """Write one problem.

    Args:
        rng: The random source.
        kind: A key of `KINDS`, or None to draw one.
    """
    kind = kind or rng.choice(tuple(KINDS))
    wording, numbers, steps = KINDS[kind](rng)
    name, other, third = rng.sample(NAMES, 3)
    unit = rng.choice(OBJECTS)
    query = wording.format(
        n=name,
        m=other,
        k=third,
        u=unit,
        o=f"{rng.choice(COLOURS)} {unit}",
        box=rng.choice(CONTAINERS),
        **numbers,
    )
    return Problem(query, steps[-1].result, kind, steps, "coins" if kind == "price" else unit)


def generate_problems(
    n: int,
    rng: random.Random,
    *,
    held_out: bool | None = None,
    distinct_masked: bool = False,
) -> list[Problem]:
    """Write problems with distinct queries, about as many of each kind.

    Args:
        n: How many problems.
        rng: The random source; equal sources give equal problems.
        held_out: True for only problems kept from training, False for only the others, None for both.
        distinct_masked: True to ask that the queries stay distinct when their numbers are masked.
    """
    kinds = tuple(KINDS)
    seen: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < n:
        problem = make_problem(rng, kinds[len(problems) % len(kinds)])
        key = masked(problem.query) if distinct_masked else problem.query
        if key in seen or (held_out is not None and is_held_out(problem.query) is not held_out):
            continue
        seen.add(key)
        problems.append(problem)
    rng.shuffle(problems)
    return problems
