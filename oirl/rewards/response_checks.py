"""What can be checked of a response without a model: its form, its numbers, and the calculations that it writes down.

On GSM8K replies the calculations carry most of what tells right from wrong replies to one query
(docs/response_models.md). How an answer is written (last, with a comma, in a box) is left out on purpose: it predicts
the rule by which verdicts were given rather than whether the answer is right. Pure functions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import log1p
from typing import NamedTuple

from oirl.logs.answers import extract_number
from oirl.rewards.arithmetic import Equation, find_equations, read_tokens

_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE = re.compile(r"[.!?](?=\s|$)")
_ITEM = re.compile(r"(?:[-*•]|\d{1,2}[.)])\s")
_NUMBER_WORDS = {
    **{word: float(i) for i, word in enumerate("one two three four five six seven eight nine ten".split(), 1)},
    **{"dozen": 12.0, "twice": 2.0, "double": 2.0, "triple": 3.0, "half": 0.5, "quarter": 0.25, "hundred": 100.0},
}
_PHRASES = {
    "hedges": r"\b(?:assum\w*|approximately|about|roughly|estimate\w*)\b",
    "corrects": r"\b(?:wait|however|but|actually|mistake|sorry|apologi\w*)\b",
    "concludes": r"\b(?:therefore|thus|hence|in conclusion|so)\b",
    "offers": r"\b(?:can you|could you|would you|please|let me know|feel free|happy to)\b",
    "declines": r"\b(?:cannot|can't|can not|unable|not able|impossible|not enough|don't|do not|no information)\b",
}
_FINDERS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _PHRASES.items()}
_FORM = (
    "length words sentences lines words_per_line length_to_query distinct_words repeated_lines repeated_phrases "
    "query_words_used new_words asked_words_at_end ends_in_letter ends_in_question questions exclamations items".split()
)
_NUMBERS = (
    "no_number numbers distinct_numbers query_numbers query_numbers_used query_numbers_unused answer_size answer_whole "
    "answer_negative answer_zero answer_in_query answer_to_largest answer_to_sum answer_above_all answer_below_all "
    "part_of_a_count answer_times one_step_answer".split()
)
_CALCULATIONS = (
    "equations true_share false any_false all_true last_true unknown_inputs unknown_input_share unexplained_share "
    "unexplained answer_is_last_result answer_is_result answer_unexplained answer_true steps reached unreached "
    "false_steps unknown_steps multiplied divided added subtracted steps_to_query equations_to_query unused_results "
    "sums differences products quotients negative_results part_results repeated_equations".split()
)
CHECKS = (*_FORM, *_PHRASES, *_NUMBERS, *_CALCULATIONS)
"""Names of what `check_response` returns, in its order."""
_MOST_STEPS = 40
_NEUTRAL = 0.5


class _Asked(NamedTuple):
    """What is read of a query once, for all its responses."""

    words: frozenset[str]
    asked: frozenset[str]
    length: int
    numbers: frozenset[float]
    known: frozenset[float]
    counts: bool


def check_response(query: str, response: str) -> list[float]:
    """Return the checks of a response, in the order of `CHECKS`; counts as log(1 + n)."""
    asked = _read_query(query)
    words = _WORD.findall(response.lower())
    tokens = read_tokens(response)
    values = [_key(t.value) for t in tokens if t.kind == "number"]
    found = extract_number(response)
    answer = float(found.value) * found.scale if found is not None and abs(found.value) < 1e15 else None
    equations = find_equations(tokens)
    phrases = [log1p(len(finder.findall(response))) for finder in _FINDERS.values()]
    return [
        *_form(response, words, asked),
        *phrases,
        *_numbers(values, answer, asked),
        *_calculations(equations, values, answer, asked),
    ]


@lru_cache(maxsize=4096)
def _read_query(query: str) -> _Asked:
    words = _WORD.findall(query.lower())
    last = re.split(r"(?<=[.!?])\s+", query.strip())[-1]
    tokens = [t for t in read_tokens(query) if t.kind == "number"]
    numbers = frozenset(_key(t.value) for t in tokens)
    shares = {_key(t.value / 100) for t in tokens if t.percent}
    written = {_NUMBER_WORDS[w] for w in words if w in _NUMBER_WORDS}
    return _Asked(
        frozenset(w for w in words if len(w) > 3),
        frozenset(w for w in _WORD.findall(last.lower()) if len(w) > 3),
        len(words),
        numbers,
        numbers | shares | written,
        "how many" in query.lower(),
    )


def _form(response: str, words: Sequence[str], asked: _Asked) -> list[float]:
    lines = [line.strip() for line in response.split("\n") if line.strip()]
    end = response.rstrip()[-1:]
    count, n_lines = max(len(words), 1), max(len(lines), 1)
    phrases = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    own = {w for w in words if len(w) > 3}
    closing = {w for w in _WORD.findall(re.split(r"(?<=[.!?])\s+|\n", response.rstrip())[-1].lower()) if len(w) > 3}
    return [
        log1p(len(response)),
        log1p(len(words)),
        log1p(len(_SENTENCE.findall(response))),
        log1p(len(lines)),
        len(words) / n_lines,
        log1p(len(words)) - log1p(asked.length),
        len(set(words)) / count,
        1 - len(set(lines)) / n_lines if lines else 0.0,
        1 - len(set(phrases)) / max(len(phrases), 1) if phrases else 0.0,
        len(asked.words & own) / max(len(asked.words), 1),
        len(own - asked.words) / max(len(own), 1),
        len(asked.asked & closing) / max(len(asked.asked), 1),
        float(end.isalpha()),
        float(end == "?"),
        log1p(response.count("?")),
        log1p(response.count("!")),
        log1p(sum(_ITEM.match(line) is not None for line in lines)),
    ]


def _numbers(values: Sequence[float], answer: float | None, asked: _Asked) -> list[float]:
    a = answer or 0.0
    size = _key(abs(a))
    largest, smallest = max(asked.numbers, default=0.0), min(asked.numbers, default=0.0)
    used = len(asked.numbers & set(values))
    return [
        float(answer is None),
        log1p(len(values)),
        log1p(len(set(values))),
        len(asked.numbers),
        used / max(len(asked.numbers), 1),
        len(asked.numbers) - used,
        log1p(size),
        float(a % 1 == 0),
        float(a < 0),
        float(a == 0),
        float(size in asked.known),
        log1p(size) - log1p(largest),
        log1p(size) - log1p(sum(asked.numbers)),
        float(size > largest),
        float(size < smallest),
        float(asked.counts and a % 1 != 0),
        log1p(sum(v == size for v in values)),
        float(_in_one_step(size, sorted(asked.known))),
    ]


def _calculations(
    equations: Sequence[Equation], values: Sequence[float], answer: float | None, asked: _Asked
) -> list[float]:
    count = len(equations)
    false = sum(not e.true for e in equations)
    size = _key(abs(answer or 0.0))
    # Which numbers a reader could account for: those of the query, and results.
    result_of: dict[float, Equation] = {}
    inputs = unknown = 0
    for equation in equations:
        for value in map(_key, equation.inputs):
            inputs += 1
            unknown += value not in asked.known and value not in result_of
        result_of[_key(abs(equation.result))] = equation
    results = [_key(abs(e.result)) for e in equations]
    unexplained = [v for v in values if v not in asked.known and v not in result_of]
    operators = Counter(o for e in equations for o in e.operators)
    own, behind = result_of.get(size), _trace(size, result_of, asked)
    return [
        log1p(count),
        (count - false) / count if count else 0.8,
        float(false),
        float(false > 0),
        float(count > 0 and not false),
        float(equations[-1].true) if count else _NEUTRAL,
        float(unknown),
        unknown / max(inputs, 1),
        len(unexplained) / max(len(values), 1),
        log1p(len(set(unexplained))),
        float(count > 0 and results[-1] == size),
        float(own is not None),
        float(own is None and size not in asked.known),
        _NEUTRAL if own is None else float(own.true),
        float(behind.steps),
        len(behind.used & asked.numbers) / max(len(asked.numbers), 1),
        float(len(asked.numbers - behind.used)),
        float(behind.false),
        float(behind.unknown),
        *(float(behind.operators[o]) for o in "*/+-"),
        float(behind.steps - len(asked.numbers)),
        float(count - len(asked.numbers)),
        log1p(len(set(results) - behind.seen)),
        *(log1p(operators[o]) for o in "+-*/"),
        float(any(e.result < 0 for e in equations)),
        float(sum(e.result % 1 != 0 for e in equations)),
        float(count - len({(e.inputs, e.operators) for e in equations})),
    ]


class _Behind(NamedTuple):
    """What lies behind an answer, going back from results to their inputs."""

    seen: set[float]
    used: set[float]
    steps: int
    false: int
    unknown: int
    operators: Counter[str]


def _trace(size: float, result_of: dict[float, Equation], asked: _Asked) -> _Behind:
    seen: set[float] = set()
    used: set[float] = set()
    steps = false = unknown = 0
    operators: Counter[str] = Counter()
    waiting = [size]
    while waiting and steps < _MOST_STEPS:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        equation = result_of.get(value)
        if equation is None or (value in asked.numbers and value != size):
            if value in asked.known:
                used.add(value)
            else:
                unknown += 1
            continue
        steps += 1
        false += not equation.true
        operators.update(equation.operators)
        waiting.extend(_key(abs(v)) for v in equation.inputs)
    return _Behind(seen, used, steps, false, unknown, operators)


def _in_one_step(size: float, numbers: Sequence[float]) -> bool:
    """Tell whether one operation on two numbers of the query gives the answer."""
    for i, a in enumerate(numbers):
        for b in numbers[i:]:
            results = [a + b, abs(a - b), a * b, *([a / b] if b else []), *([b / a] if a else [])]
            if any(abs(r - size) < 1e-6 for r in results):
                return True
    return False


def _key(value: float) -> float:
    return round(value, 4)
