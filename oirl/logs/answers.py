"""Where a response states its answer: marks, boxes, "the answer is", concluding sentences. Pure functions.

The order is: `#### n`, the last `\\boxed{...}`, the last "answer is" or "answer:" that a number follows, the result
of the last equation if the last sentence repeats it ("= 36. So Annie pays $36 for 12 kg"), the last number.
"""

from __future__ import annotations

import re

from oirl.logs.numbers import NUMBER, PARENTHESIS, Number, last_hit, read_number, tail

SCOPE = 600
"""How many characters after a mark may hold the answer."""
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
_ASIDE = re.compile(r"[;]|,(?![0-9])|\b(?:because|since|as|which|so)\b")
_OPERATOR = re.compile(r" ?(?:[-+*/×÷·]|x\b|\\times|\\cdot|\\div)[ $]*[0-9]")
_LIST_ITEM = re.compile(r"[ \t*_#>]{0,8}[0-9]{1,2}[.)] +\S")
_BLANK = " \t\r*_:$\\[("
_SUMS_UP = re.compile(r"\b(?:total (?:of|is)|resulting|which (?:is|means)|so|together|altogether)\b", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox) ?\{")


def extract_number(response: str) -> Number | None:
    """Return the number that a response gives as its answer, or None (see the module docstring for the order)."""
    found = None
    if "####" in response:
        found = _leading_number(response[response.rfind("####") :][:SCOPE])
    if found is None and "\\" in response:
        found = _stated_number(last_boxed(response) or "")
    return found or _after_answer_phrase(response) or _concluded_number(response)


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}`, braces matched, or None."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    m = _BOX.match(text, at) if at >= 0 else None
    if m is None:
        return None
    depth, begin = 1, m.end()
    for i, character in enumerate(text[begin : begin + SCOPE], begin):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[begin:i]
    return None


def _concluded_number(response: str) -> Number | None:
    """Return the result of the last equation where the last sentence repeats it, else the last number.

    "= 36. So Annie pays $36 for 12 kg" answers 36. Replies often end in a condition of the question, which
    the last number alone would take for the answer.
    """
    text = tail(response)
    hit = last_hit(text)
    if hit is None or hit.number.rank:
        return hit.number if hit else None
    window = max(0, hit.at - SCOPE)
    start = max((m.end() for m in _SENTENCE_END.finditer(hit.line, window, hit.at)), default=window)
    others = list(NUMBER.finditer(hit.line, start, hit.at))
    if not others or "=" in hit.line[start : hit.at]:  # nothing to choose from, or its own equation
        return hit.number
    equals = text.rfind("=", 0, hit.begin + start)
    result = _leading_number(text[equals + 1 : equals + 100]) if equals >= 0 else None
    if result is None:
        return hit.number
    same = (result.value, -result.value)
    for m in others if hit.number.value not in same else ():
        number = read_number(hit.line, m)
        if number and number.rank == 0 and number.value in same:
            return hit.number if _SUMS_UP.search(hit.line, m.end(), hit.at) else number
    return hit.number


def _leading_number(text: str) -> Number | None:
    """Return the number that directly follows a `####` or `=`; a heading has words or a label there."""
    line = text.lstrip("#").split("\n", 1)[0]
    for m in NUMBER.finditer(line):
        number = read_number(line, m)
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
    later = [(m.start(), int(m[1])) for m in _LATER_STEP.finditer(response, phrases[0].end())] if phrases else []
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
    line, _, rest = response[begin : begin + SCOPE].partition("\n")
    if not line.strip(_BLANK):
        line = next((other for other in rest.split("\n") if other.strip(_BLANK)), "")
        if _LIST_ITEM.match(line):
            return ""
    end = _SENTENCE_END.search(line)
    return line[: end.start()] if end else line


def _stated_number(scope: str) -> Number | None:
    """Return the number meant in "12 apples (3 x 4)", "3 + 4 = 7" or "Tom has 12 apples"."""
    bare = PARENTHESIS.sub(lambda m: " " * len(m.group()), scope)
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
    found = [(m, number) for m in NUMBER.finditer(line) if (number := read_number(line, m))]
    best = min((number.rank for _, number in found), default=0)
    return [(m, number) for m, number in found if number.rank == best]
