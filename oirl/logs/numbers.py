"""Numbers as people and models write them: reading one from a line, and the last one of a text. Pure functions.

* A minus is a sign unless it stands between two terms (10-5, x - 5) or is a bullet.
* Not numbers: 12:30, 3:4, dates, versions, letters with digits (mp3), exponents and indices. The hour of 5:00
  and an ordinal (5th) are read when their line has no other number; labels (`3.`, `Step 3:`, Orbius-5) when
  the text has no other. As the last number, one in parentheses counts when its line has none outside.
* Out of scope: words (twelve), 1.234,56, 1 000, 1,00,000, roots and pi, more than 300 digits. A list without
  spaces such as 1,100,200 cannot be told from one number.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

# Every repeat in these patterns is bounded, or followed by what it cannot itself match, so that none takes
# more than linear time on a hostile text.

_DIGITS = r"(?:[0-9]{1,3}(?:(?:,\\!|,|\{,\}|\\,|[\u2009\u202f])[0-9]{3})+(?![0-9])|[0-9]+)"
_NUM = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![.0-9])\.[0-9]+)"
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SUPER = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def _latex_fraction(tag: str) -> str:
    braces = rf"\{{ ?(?P<sign{tag}>-?)(?P<top{tag}>{_NUM}) ?\}} ?\{{ ?(?P<low{tag}>{_NUM}) ?\}}"
    return rf"\\[dt]?frac ?(?:{braces}|(?P<top1{tag}>[0-9])(?P<low1{tag}>[0-9]))"


NUMBER = re.compile(
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
_MAX_EXPONENT = 400  # holds every float
_MAX_TAIL = 200_000
PARENTHESIS = re.compile(r"(?<![\\0-9A-Za-z])\([^()]*\)")  # an aside, not \(5\), f(5) or 3(4 + 1)


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


def last_number(text: str) -> Number | None:
    """Return the last number of a text, of the best rank that its last line with a number has."""
    hit = last_hit(tail(text))
    return hit.number if hit else None


class Hit(NamedTuple):
    """A number and where it stands.

    Attributes:
        number: The number.
        line: Its line.
        begin: Where the line begins in the text.
        at: Where the number begins in the line.
    """

    number: Number
    line: str
    begin: int
    at: int


def tail(text: str) -> str:
    """Return the end of a text, as much of it as is searched for a number."""
    # The cut may split a number, whose rest then goes too.
    return text if len(text) <= _MAX_TAIL else text[-_MAX_TAIL:].lstrip("0123456789.,/:")


def last_hit(text: str) -> Hit | None:
    """Go through the lines from the end, as most searches end soon."""
    label, end = None, len(text)
    while end >= 0:
        begin = text.rfind("\n", 0, end) + 1
        line, end = text[begin:end], begin - 1
        minor = None
        asides = [m.span() for m in PARENTHESIS.finditer(line)] if "(" in line else []
        for m in reversed(list(NUMBER.finditer(line))):
            number = read_number(line, m)
            if number is None:
                continue
            while asides and asides[-1][0] > m.start():
                asides.pop()
            hit, aside = Hit(number, line, begin, m.start()), asides and m.start() < asides[-1][1]
            if number.rank == 0 and not aside:
                return hit
            if number.rank < 2:
                minor = minor or hit
            else:
                label = label or hit
        if minor:
            return minor
    return label


def read_number(line: str, m: re.Match[str]) -> Number | None:
    """Return what a match of `NUMBER` means in its line, or None if it is no number there."""
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
    if len(text) > 4 or digits > 30 or abs(int(text)) > _MAX_EXPONENT:
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
