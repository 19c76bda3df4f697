"""Checkers: pure functions `(response, answer) -> Verdict` that grade a response against the gold answer.

The rules of `numeric`:

* Where it looks in a response: `#### n`, then the last `\\boxed{...}`, then the last "answer is" or "answer:"
  that a number follows, then the result of the last equation if the last sentence repeats it ("= 36. So Annie
  pays $36 for 12 kg"), then the last number. In the gold: after `####`, in `\\boxed{}`, else the last number.
* Values are compared exactly, or to a relative 1e-9 when one of them is not whole.
* Rounding: a decimal of two or more places (and significant digits) also equals a fraction, or a decimal of
  more than six places, that rounds to it: 0.33 = 1/3 = 0.3333333. But 0.3 is not 1/3, nor 0.13 = 0.125.
* Percent: the sign is a unit, 50% = 50. When the other side has no sign and is not whole, 50% = 0.5 as well;
  a whole number is never read in hundredths, so that "100% sure" does not answer 1.
* "2 million" equals 2,000,000, and also 2 when the other side has no such word.
* A minus is a sign unless it stands between two terms (10-5, x - 5) or is a bullet.
* Not numbers: 12:30, 3:4, dates, versions, letters with digits (mp3), exponents and indices. The hour of 5:00
  and an ordinal (5th) are read when their line has no other number; labels (`3.`, `Step 3:`, Orbius-5) when
  the text has no other.
* Out of scope: words (twelve), 1.234,56, 1 000, 1,00,000, roots and pi (use `math`), more than 300 digits. A
  list without spaces such as 1,100,200 cannot be told from one number.
"""

from __future__ import annotations

import re
import reprlib
import threading
import unicodedata
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from oirl.errors import ConfigError, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Verdict(NamedTuple):
    """What a checker found.

    Attributes:
        correct: Whether the response is right; None where the gold answer itself cannot be read.
        extracted: The part of the response that was compared, None where nothing readable was found.
    """

    correct: bool | None
    extracted: str | None


# Numbers ----------------------------------------------------------------------------------------------------
# Every repeat in these patterns is bounded, or followed by what it cannot itself match, so that none takes
# more than linear time on a hostile text.

_DIGITS = r"(?:[0-9]{1,3}(?:(?:,\\!|,|\{,\}|\\,|[\u2009\u202f])[0-9]{3})+(?![0-9])|[0-9]+)"
_NUM = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![.0-9])\.[0-9]+)"
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SUPER = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def _latex_fraction(tag: str) -> str:
    braces = rf"\{{ ?(?P<sign{tag}>-?)(?P<top{tag}>{_NUM}) ?\}} ?\{{ ?(?P<low{tag}>{_NUM}) ?\}}"
    return rf"\\[dt]?frac ?(?:{braces}|(?P<top1{tag}>[0-9])(?P<low1{tag}>[0-9]))"


_NUMBER = re.compile(
    rf"(?=[0-9.\\{_VULGAR}])(?:(?P<num>{_NUM})(?:"
    rf" ?(?:[x×*·]|\\times|\\cdot) ?10(?: ?\^ ?\{{? ?(?P<ten>[-−+]?[0-9]+)\}}?|(?P<super>⁻?[{_SUPER}]+))"
    r"|[eE](?P<exp>[-−+]?[0-9]+)"
    r"|\^\{?(?P<power>[-−]?[0-9]+)\}?"
    rf"| ?{_latex_fraction('m')}"
    r"|(?: | and )(?P<top>[0-9]{1,6})/(?P<low>[0-9]{1,6})"
    rf"| ?/ ?(?P<over>{_NUM})"
    rf"| ?(?P<vulgar>[{_VULGAR}])"
    rf")?|{_latex_fraction('f')}|(?P<alone>[{_VULGAR}]))"
)
_AFTER = re.compile(
    r"(?P<percent> ?\\?%| percent\b)"
    r"| (?P<scale>hundred|thousand|million|billion|trillion)\b"
    r"|(?P<ordinal>(?:\^\{?(?:\\text\{)?)?(?:st|nd|rd|th)\b)"
    r"|(?P<hour>:00(?![0-9:]))"
    r"|(?P<bad>[:./][0-9]|\^(?!\{?\\circ)| ?(?:\\sqrt|\\pi\b|π|√))",
    re.IGNORECASE,
)
_BAD_BEFORE = re.compile(
    r"[0-9][:./]$|\^\{?-?$|[A-Za-z})\]]_\{?$|√$|sqrt[\[{(]$"
    r"|(?<![\\A-Za-z])(?!(?:Rs|INR|US|USD|EUR|GBP|AUD|CAD)$)[A-Za-z]*[A-WYZa-wyz]$"
)
_MINUS = re.compile(r"[-−–]\s?(?:\\?[$€£¥₹]\s?)?$")
_LABEL_END = re.compile(r"[.)] +\S")
_LABEL_COLON = re.compile(r" ?\*{0,2}:")
_LABEL_NAME = re.compile(r"[^A-Za-z0-9]*[A-Za-z]+(?: [A-Za-z0-9]+){0,3} $")
_ENUMERATED = frozenset(
    re.findall(
        r"\w+",
        "step expert solver philosopher scholar question equation problem part case option table figure clue",
    )
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_SEPARATORS = str.maketrans("", "", "{},\\!\u2009\u202f")
_SUPER_DIGITS = str.maketrans(f"⁻−{_SUPER}", "--0123456789")
_MAX_CHARS = 300
_MAX_TAIL = 200_000


class Number(NamedTuple):
    """A number read from a text.

    Attributes:
        text: As written, with its sign and percent sign, without currency and unit.
        value: The exact value, before percent and scale.
        places: Decimal places without trailing zeros; -1 for a fraction.
        percent: Whether a percent sign follows.
        scale: 10**6 for "million" and so on, else 1.
        rank: 0 for a plain number, 1 for an ordinal or an hour, 2 for a label: read only for want of better.
    """

    text: str
    value: Fraction
    places: int
    percent: bool
    scale: int
    rank: int


def extract_number(response: str) -> Number | None:
    """Return the number that a response gives as its answer, or None (see the module for the order)."""
    found = None
    if "####" in response:
        found = _leading_number(response[response.rfind("####") :][:_SCOPE])
    if found is None and "\\" in response:
        found = _stated_number(_last_boxed(response) or "")
    return found or _after_answer_phrase(response) or _concluded_number(response)


def numeric(response: str, answer: str) -> Verdict:
    """Compare the number that the response gives with that of the gold answer.

    Args:
        response: A model's reply.
        answer: The gold answer: a number, or a worked solution that ends in `#### number`.
    """
    gold = _gold_number(answer) if len(answer) <= _SCOPE else _read_gold(answer)
    found = extract_number(response)
    extracted = found.text if found else None
    if gold is None:
        return Verdict(None, extracted)
    return Verdict(found is not None and _same(found, gold), extracted)


def _read_gold(answer: str) -> Number | None:
    _, mark, tail = answer.rpartition("####")
    text = tail if mark else (_last_boxed(answer) or answer)
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


def last_number(text: str) -> Number | None:
    """Return the last number of a text, of the best rank that its last line with a number has."""
    hit = _last_hit(_tail(text))
    return hit.number if hit else None


class _Hit(NamedTuple):
    number: Number
    line: str
    begin: int  # of the line in the text
    at: int  # of the number in the line


def _tail(text: str) -> str:
    # The cut may split a number, whose rest then goes too.
    return text if len(text) <= _MAX_TAIL else text[-_MAX_TAIL:].lstrip("0123456789.,/:")


def _last_hit(text: str) -> _Hit | None:
    """Go through the lines from the end, as most searches end soon."""
    label, end = None, len(text)
    while end >= 0:
        begin = text.rfind("\n", 0, end) + 1
        line, end = text[begin:end], begin - 1
        minor = None
        for m in reversed(list(_NUMBER.finditer(line))):
            number = _read(line, m)
            if number is None:
                continue
            hit = _Hit(number, line, begin, m.start())
            if number.rank == 0:
                return hit
            if number.rank == 1:
                minor = minor or hit
            else:
                label = label or hit
        if minor:
            return minor
    return label


def _read(line: str, m: re.Match[str]) -> Number | None:
    """Return what a match of `_NUMBER` means in its line, or None if it is no number there."""
    start, end = m.span()
    if end - start > _MAX_CHARS:
        return None
    after = _AFTER.match(line, end)
    kind = after.lastgroup if after else None
    before = line[max(0, start - 24) : start]
    if kind == "bad" or (before and before[-1] not in " $*(=" and _BAD_BEFORE.search(before)):
        return None
    try:
        value, text, places = _value(m)
    except (ZeroDivisionError, OverflowError):
        return None
    if _negative(before):
        value, text = -value, "-" + text
    scale = 1
    if after and kind in ("percent", "scale"):
        text += after.group()
        scale = _SCALES.get(after.group().strip().lower(), 1)
    return Number(text, value, places, kind == "percent", scale, _rank(line, start, end, before, kind))


def _value(m: re.Match[str]) -> tuple[Fraction, str, int]:
    """Return value, text and decimal places of a match.

    Raises:
        ZeroDivisionError: If a denominator is zero.
        OverflowError: If a power is too large to be meant as an answer.
    """
    kind, text = m.lastgroup, m.group()
    if kind == "num":
        return _decimal(text), text, len(text.partition(".")[2].rstrip("0"))
    if kind == "alone":
        return _vulgar(text), text, -1
    if kind in ("lowf", "low1f"):
        return _ratio(m, "f"), text, -1
    num = _decimal(m["num"])
    if kind in ("ten", "super", "exp", "power"):
        base = num if kind == "power" else Fraction(10)
        power = base ** _exponent(m[kind], len(m["num"]))
        return (power if kind == "power" else num * power), text, 0
    if kind == "over":
        return num / _decimal(m["over"]), text, -1
    if kind == "vulgar":
        return num + _vulgar(m["vulgar"]), text, -1
    if kind == "low":
        part = Fraction(int(m["top"]), int(m["low"]))
        if part < 1 and num.denominator == 1:
            return num + part, text, -1
        return part, f"{m['top']}/{m['low']}", -1
    return num + _ratio(m, "m"), text, -1


def _decimal(text: str) -> Fraction:
    whole, _, part = text.translate(_NO_SEPARATORS).partition(".")
    return Fraction(int(whole + part), 10 ** len(part)) if part else Fraction(int(whole))


def _ratio(m: re.Match[str], tag: str) -> Fraction:
    if m["top1" + tag]:
        return Fraction(int(m["top1" + tag]), int(m["low1" + tag]))
    value = _decimal(m["top" + tag]) / _decimal(m["low" + tag])
    return -value if m["sign" + tag] else value


def _vulgar(character: str) -> Fraction:
    return Fraction(unicodedata.numeric(character)).limit_denominator(10)


def _exponent(text: str, digits: int) -> int:
    text = text.translate(_SUPER_DIGITS)
    if len(text) > 4 or digits > 30 or abs(int(text)) > _MAX_CHARS:
        raise OverflowError
    return int(text)


def _negative(before: str) -> bool:
    """Whether the text before a number ends in a minus that is a sign, not a subtraction, range or bullet."""
    dash = _MINUS.search(before)
    if dash is None:
        return before[-9:].lower() == "negative "
    lead = before[: dash.start()]
    tight = not dash.group()[1:2].isspace()
    previous = lead.rstrip()[-1:]
    if previous.isalpha():
        return tight and lead[-1].isspace()
    if previous.isdigit() or previous in tuple(")]}%-–—" + _VULGAR):
        return False
    return tight or previous == "="


def _rank(line: str, start: int, end: int, before: str, kind: str | None) -> int:
    if kind in ("ordinal", "hour"):
        return 1
    word = before.rstrip().rpartition(" ")[2].strip("(*_[#").lower()
    if before[-1:] == " " and (word in _ENUMERATED or word[:-1] in _ENUMERATED):
        return 2
    if before[-1:] == "-" and before[-2:-1].isalpha():
        return 2
    if start < 8 and _LABEL_END.match(line, end) and not line[:start].strip(" \t*_#>•-("):
        return 2
    if start < 48 and _LABEL_COLON.match(line, end) and _LABEL_NAME.fullmatch(line, 0, start):
        return 2
    return 0


# Where a response states its answer -------------------------------------------------------------------------

_SCOPE = 600
_MAX_PHRASES = 50
_ANSWER = re.compile(
    r"\banswer(?: (?:to|for) [^.:\n]{1,80}?)?"
    r"(?:\s{1,3}(?P<verb>is|was|would be|will be|should be|equals)\b[\s*_]{0,4}:?|[\s*_]{0,4}[:=])"
    r"(?!\s{0,3}not\b)",
    re.IGNORECASE,
)
_LABEL_LEAD = re.compile(
    r"[\W_]{0,8}(?:(?:so|therefore|thus|hence),? )?(?:(?:the|my|our) )?(?:(?:final|correct|consensus) ?)?",
    re.IGNORECASE,
)
_LATER_STEP = re.compile(
    r"\n[ \t*_#>]{0,8}(?:(?:step|part|stage|phase|layer|(?:sub-?)?question) )?0?([1-9][0-9]?)[.):]\s",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"[^A-Za-z0-9]*(?:(?:about|approximately|approx|roughly|exactly|only|just|actually|indeed|still)[^A-Za-z0-9]*)*"
)
_SENTENCE_END = re.compile(r"(?<!\bNo)(?<!\bRs)(?<!approx)[.!?](?=[\s\"”'’)*_]|$)")
_PARENTHESIS = re.compile(r"(?<!\\)\([^()]*\)")
_ASIDE = re.compile(r"[;]|,(?![0-9])|\b(?:because|since|as|which|so)\b")
_OPERATOR = re.compile(r" ?(?:[-+*/×÷·]|x\b|\\times|\\cdot|\\div)[ $]*[0-9]")
_LIST_ITEM = re.compile(r"[ \t*_#>]{0,8}[0-9]{1,2}[.)] +\S")
_BLANK = " \t\r*_:$\\[("
_SUMS_UP = re.compile(
    r"\b(?:total (?:of|is)|resulting|which (?:is|means)|so|together|altogether)\b", re.IGNORECASE
)
_BOX = re.compile(r"\\(?:boxed|fbox) ?\{")


def _last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}`, braces matched, or None."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    m = _BOX.match(text, at) if at >= 0 else None
    if m is None:
        return None
    depth, begin = 1, m.end()
    for i, character in enumerate(text[begin : begin + _SCOPE], begin):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[begin:i]
    return None


def _concluded_number(response: str) -> Number | None:
    """Return the result of the last equation where the last sentence repeats it, else the last number.

    "= 36. So Annie pays $36 for 12 kg" answers 36. Replies often end in a condition of the question, which
    the last number alone would take for the answer.
    """
    text = _tail(response)
    hit = _last_hit(text)
    if hit is None or hit.number.rank:
        return hit.number if hit else None
    window = max(0, hit.at - _SCOPE)
    start = max((m.end() for m in _SENTENCE_END.finditer(hit.line, window, hit.at)), default=window)
    if "=" in hit.line[start : hit.at]:  # the sentence has an equation of its own
        return hit.number
    equals = text.rfind("=", 0, hit.begin + start)
    result = _leading_number(text[equals + 1 : equals + 100]) if equals >= 0 else None
    if result is None or abs(result.value) == abs(hit.number.value):
        return hit.number
    for m in _NUMBER.finditer(hit.line, start, hit.at):
        number = _read(hit.line, m)
        if number and number.rank == 0 and abs(number.value) == abs(result.value):
            return hit.number if _SUMS_UP.search(hit.line, m.end(), hit.at) else number
    return hit.number


def _leading_number(text: str) -> Number | None:
    """Return the number that directly follows a `####` or `=`; a heading has words or a label there."""
    line = text.lstrip("#").split("\n", 1)[0]
    for m in _NUMBER.finditer(line):
        number = _read(line, m)
        opening = _OPENING.match(line)
        return number if number and number.rank == 0 and opening and opening.end() >= m.start() else None
    return None


def _after_answer_phrase(response: str) -> Number | None:
    """Return the number stated by the last "answer is" or "answer:" that a number follows.

    Not taken: a heading that merely ends in "answer:" (let's check our answer:), "Answer:" where it labels
    several parts, and an answer after which the numbered steps go on.
    """
    if "nswer" not in response and "NSWER" not in response:
        return None
    phrases = list(_ANSWER.finditer(response))[-_MAX_PHRASES:]
    labels = {m.start(): _label(response, m) for m in phrases if m["verb"] is None}
    several = sum(label == "part" for label in labels.values()) > 1
    later = (
        [(m.start(), int(m[1])) for m in _LATER_STEP.finditer(response, phrases[0].end())] if phrases else []
    )
    for m in reversed(phrases):
        label = labels.get(m.start(), "final")
        if label == "none" or (label == "part" and several):
            continue
        if next((step for at, step in later if at >= m.end()), 1) > 1:
            continue
        found = _stated_number(_scope(response, m.end()))
        if found:
            return found
    return None


def _label(response: str, m: re.Match[str]) -> str:
    """Return "final", "part" or "none" for an "answer:" by what stands before it on its line."""
    lead = response[max(0, m.start() - 48) : m.start()].rpartition("\n")[2]
    if not _LABEL_LEAD.fullmatch(lead):
        return "none"
    return "final" if any(c.isalpha() for c in lead) else "part"


def _scope(response: str, begin: int) -> str:
    """Return the sentence from `begin` on; after a colon that ends its line, the next line."""
    line, _, rest = response[begin : begin + _SCOPE].partition("\n")
    if not line.strip(_BLANK):
        line = next((other for other in rest.split("\n") if other.strip(_BLANK)), "")
        if _LIST_ITEM.match(line):
            return ""
    end = _SENTENCE_END.search(line)
    return line[: end.start()] if end else line


def _stated_number(scope: str) -> Number | None:
    """Return the number meant in "12 apples (3 x 4)", "3 + 4 = 7" or "Tom has 12 apples"."""
    bare = _PARENTHESIS.sub(lambda m: " " * len(m.group()), scope)
    found = _readable(bare)
    if not found and bare != scope:
        bare, found = scope, _readable(scope)
    if not found:
        return None
    first, number = found[0]
    opening = _OPENING.match(bare)
    direct = opening is not None and opening.end() >= first.start()
    aside = _ASIDE.search(bare, first.end()) if direct else None
    region = aside.start() if aside else len(bare)
    equals = bare.rfind("=", 0, region)
    for m, result in found:
        if 0 <= equals < m.start() < region:
            return result
    return found[-1][1] if direct and _OPERATOR.match(bare, first.end()) else number


def _readable(line: str) -> list[tuple[re.Match[str], Number]]:
    """Return the numbers of a line, only those of the best rank there is."""
    found = [(m, number) for m in _NUMBER.finditer(line) if (number := _read(line, m))]
    best = min((number.rank for _, number in found), default=0)
    return [(m, number) for m, number in found if number.rank == best]


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
    boxed = _CHOICE_GOLD.fullmatch(_LATEX_TEXT.sub(r"\1", _last_boxed(response) or ""))
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
    if (correct is None or isinstance(correct, (bool, np.bool_))) and isinstance(
        extracted, (str, type(None))
    ):
        return Verdict(None if correct is None else bool(correct), extracted)
    module, name = getattr(checker, "__module__", None), getattr(checker, "__qualname__", None)
    raise ConfigError(
        f"checker {f'{module}:{name}' if name else repr(checker)} returned {reprlib.repr(returned)}, of type "
        f"{type(returned).__name__}; allowed: True, False, None, or a pair of one of them and the extracted text"
    )
