"""Checkers: pure functions `(response, answer) -> Verdict` that grade a response against the gold answer.

The rules of `numeric`, beside those of `oirl.logs.answers` (where it looks) and `oirl.logs.numbers` (what it reads):

* In the gold answer it looks after `####`, in `\\boxed{...}`, else for the last number.
* Values are compared exactly, or to a relative 1e-9 when one of them is not whole.
* Rounding: a decimal of two or more places (and significant digits) also equals a fraction, or a decimal of
  more than six places, that rounds to it: 0.33 = 1/3 = 0.3333333. But 0.3 is not 1/3, nor 0.13 = 0.125.
* Percent: the sign is a unit, 50% = 50. When the other side has no sign and is not whole, 50% = 0.5 as well;
  a whole number is never read in hundredths, so that "100% sure" does not answer 1.
* "2 million" equals 2,000,000, and also 2 when the other side has no such word.
"""

from __future__ import annotations

import re
import reprlib
import threading
import unicodedata
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from oirl.errors import ConfigError, require
from oirl.logs.answers import SCOPE, extract_number, last_boxed
from oirl.logs.numbers import Number, last_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from fractions import Fraction


class Verdict(NamedTuple):
    """What a checker found.

    Attributes:
        correct: Whether the response is right; None where the gold answer itself cannot be read.
        extracted: The part of the response that was compared, None where nothing readable was found.
    """

    correct: bool | None
    extracted: str | None


def numeric(response: str, answer: str) -> Verdict:
    """Compare the number that the response gives with that of the gold answer.

    Args:
        response: A model's reply.
        answer: The gold answer: a number, or a worked solution that ends in `#### number`.
    """
    gold = _gold_number(answer) if len(answer) <= SCOPE else _read_gold(answer)
    found = extract_number(response)
    extracted = found.text if found else None
    if gold is None:
        return Verdict(None, extracted)
    return Verdict(found is not None and _same(found, gold), extracted)


def _read_gold(answer: str) -> Number | None:
    _, mark, tail = answer.rpartition("####")
    text = tail if mark else (last_boxed(answer) or answer)
    return last_number(text)


_gold_number = lru_cache(maxsize=65536)(_read_gold)


def _same(found: Number, gold: Number) -> bool:
    if found.scale == gold.scale:
        if found.value == gold.value:
            return True
        if found.value.denominator == gold.value.denominator == 1:
            return False
    pairs = ((a, b) for a in _readings(found, gold) for b in _readings(gold, found))
    if any(_close(a, b) for a, b in pairs):
        return True
    if found.percent or gold.percent or found.scale != 1 or gold.scale != 1:
        return False
    return _rounds_to(found, gold) or _rounds_to(gold, found)


def _readings(number: Number, other: Number) -> Iterator[Fraction]:
    """Yield the values that a number may stand for beside `other`."""
    yield number.value * number.scale
    if number.scale != 1 and other.scale == 1:
        yield number.value
    if number.percent and not other.percent and other.value.denominator != 1:
        yield number.value / 100


def _close(a: Fraction, b: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) * 10**9 <= max(abs(a), abs(b))


def _rounds_to(short: Number, long: Number) -> bool:
    """Whether `short` is `long` rounded to at least two decimals, where `long` has no end of its own."""
    unit = 10**short.places if short.places >= 2 else 0
    if abs(short.value) * unit < 10:
        return False
    endless = long.places == -1 or (long.places > 6 and long.places > short.places)
    return endless and abs(short.value - long.value) * 2 * unit <= 1


# Text, letters, expressions ---------------------------------------------------------------------------------

_MARKS_BEFORE = " \"'`*_“”‘’«»,;:!?¿¡"
_MARKS_AFTER = _MARKS_BEFORE + ".…"
_CHOICE_GOLD = re.compile(r"\W*([A-Ja-j])(?:\W*|[).:\]]\W.*)", re.DOTALL)
_CHOICE_PHRASE = re.compile(
    r"\b(?:answer|choice|option)(?: (?:to|for) [^.:\n]{1,80}?)?"
    r"(?:\s{1,3}(?:is|would be|should be)\b|[\s*_]{0,4}[:=])[\s*_:]{0,4}"
    r"(?:the )?(?:(?:option|choice|letter|answer) )?"
    r"[\s*_(\[\"'$\\{]{0,8}(?:text\{)?\(?(?P<letter>[A-J])(?![\w'’])"
    r"(?P<article>(?<=[AaIi]) +(?!because\b|since\b|as\b|and\b|for\b)[A-Za-z])?",
    re.IGNORECASE,
)
_CHOICE_LINE = re.compile(r"^[ \t*_#>\[-]{0,8}([A-J])[)\].:](?=[\s*]|$)", re.MULTILINE)
_CHOICE_END = re.compile(r"(?:^|[\s*_\[\"'])([A-J])$")
_PROSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")
_MAX_EXPRESSION = 20_000
_LETTER = re.compile(r"\(?[A-Ja-j]\)?\.?")
_SAMPLED, _MOST = 200, 0.9
ANSWER_KINDS = ("numeric", "choice", "text")
"""What `stated_answer` can read."""
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}")


def exact(response: str, answer: str) -> Verdict:
    """Compare the whole texts after Unicode NFKC and casefold, without outer quotes and marks.

    Args:
        response: A model's reply.
        answer: The gold answer; not gradable when nothing of it is left.
    """
    said, gold = _plain(response), _plain(answer)
    if not gold:
        return Verdict(None, said or None)
    return Verdict(said == gold, said or None)


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # A leading point stays, as it may be that of .5
    return " ".join(folded.split()).lstrip(_MARKS_BEFORE).rstrip(_MARKS_AFTER)


def choice(response: str, answer: str) -> Verdict:
    """Compare the letter A to J that the response chooses with the gold letter.

    The letter is looked for in `\\boxed{}`, after "answer is" or "answer:" (also choice, option), as the
    whole response, as the last one in parentheses, as the only label that opens a line (`B) Paris`), then at
    the end.

    Args:
        response: A model's reply.
        answer: The gold letter such as "B", "(b)" or "B) Paris".
    """
    gold, said = _CHOICE_GOLD.fullmatch(answer), _chosen(response)
    if gold is None:
        return Verdict(None, said)
    return Verdict(said == gold[1].upper(), said)


def _chosen(response: str) -> str | None:
    """Return the letter that a response chooses, in upper case."""
    boxed = _CHOICE_GOLD.fullmatch(_LATEX_TEXT.sub(r"\1", last_boxed(response) or ""))
    if boxed:
        return boxed[1].upper()
    stated = [m["letter"] for m in _CHOICE_PHRASE.finditer(response) if not m["article"]]
    if stated:
        return stated[-1].upper()
    text = response.strip(" \t\r\n*_`\"'$.!:")
    if len(text.strip("()[]")) == 1 and text.strip("()[]").upper() in "ABCDEFGHIJ":
        return text.strip("()[]").upper()
    inside = re.findall(r"\(([A-J])\)", response) or re.findall(r"\(([a-j])\)", response)
    if inside:
        return str(inside[-1]).upper()
    labels = set(_CHOICE_LINE.findall(response))
    if len(labels) == 1:
        return str(labels.pop())
    last = _CHOICE_END.search(text[-3:])
    return last[1] if last else None


def answer_kind(answers: Sequence[str]) -> str | None:
    """Return what gold answers look like: "numeric", "choice", or None where they are free text or there are none."""
    texts = answers if len(answers) <= _SAMPLED else [answers[i * len(answers) // _SAMPLED] for i in range(_SAMPLED)]
    if not texts:
        return None
    if sum(apply_checker(numeric, text, text).correct is True for text in texts) >= _MOST * len(texts):
        return "numeric"
    if sum(_LETTER.fullmatch(text.strip()) is not None for text in texts) >= _MOST * len(texts):
        return "choice"
    return None


def response_kind(responses: Sequence[str]) -> str:
    """Return how to read the answers of responses whose gold answers are not known: "numeric", "choice" or "text"."""
    texts = [r for r in responses if r.strip()]
    if len(texts) > _SAMPLED:
        texts = [texts[i * len(texts) // _SAMPLED] for i in range(_SAMPLED)]
    for kind in ("choice", "numeric"):
        if texts and sum(stated_answer(text, kind) is not None for text in texts) >= _MOST * len(texts):
            return kind
    return "text"


def stated_answer(response: str, kind: str) -> str | None:
    """Return the answer of a response in a form in which equal answers are equal texts, None where it gives none.

    Args:
        response: A model's reply.
        kind: "numeric" (the number that it concludes with), "choice" (the letter) or "text" (the whole text, plain).
    """
    if kind == "choice":
        return _chosen(response)
    if kind == "numeric":
        number = extract_number(response)
        return None if number is None else str(number.value * number.scale)
    return _plain(response) or None


def math(response: str, answer: str) -> Verdict:
    """Compare expressions (LaTeX, sets, intervals) by means of the optional package math-verify.

    Its time limits work by signals, so that they hold in the main thread only.

    Args:
        response: A model's reply.
        answer: The gold expression, with or without `$...$`; not gradable when it cannot be parsed.

    Raises:
        MissingPackageError: If math-verify is not installed.
    """
    require("math_verify", "math", "the math checker")
    from math_verify import parse, verify

    seconds = 5 if threading.current_thread() is threading.main_thread() else None

    def read(text: str) -> list[Any]:
        text = text[-_MAX_EXPRESSION:]
        # math-verify looks for expressions between delimiters: a text that is one expression must get them.
        bare = "$" not in text and "\\boxed" not in text and not _PROSE.search(text)
        for form in (f"${text}$", text) if bare else (text,):
            with suppress(Exception):  # whatever its grammar does on a text that is no mathematics
                if found := parse(form, parsing_timeout=seconds):
                    return list(found)
        return []

    gold, said = read(answer.rpartition("####")[2].strip()), read(response.strip())
    extracted = str(said[-1]) if said else None
    if not gold:
        return Verdict(None, extracted)
    correct = False
    with suppress(Exception):
        correct = bool(said) and bool(verify(gold, said, timeout_seconds=seconds))
    return Verdict(correct, extracted)


def apply_checker(checker: Callable[[str, str], Any], response: str, answer: str) -> Verdict:
    """Return a checker's verdict, whatever form of it the checker returns.

    Args:
        checker: One of this module's, or your own: it returns True, False, None (not gradable), a `Verdict`,
            or a pair of one of the three and the extracted text or None.
        response: A model's reply.
        answer: The gold answer.

    Raises:
        ConfigError: If the checker returns anything else.
    """
    returned = checker(response, answer)
    correct, extracted = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if (correct is None or isinstance(correct, (bool, np.bool_))) and isinstance(extracted, (str, type(None))):
        return Verdict(None if correct is None else bool(correct), extracted)
    module, name = getattr(checker, "__module__", None), getattr(checker, "__qualname__", None)
    raise ConfigError(
        f"checker {f'{module}:{name}' if name else repr(checker)} returned {reprlib.repr(returned)}, of type "
        f"{type(returned).__name__}; allowed: True, False, None, or a pair of one of them and a text"
    )
