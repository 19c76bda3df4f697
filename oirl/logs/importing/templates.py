"""The prompt template behind rendered prompts: found by aligning them with the values that were filled in.

Evaluation tools often keep only the rendered text. What stays the same from row to row is the template; what changes
is the query, and sometimes examples before it. A template is written with `{query}` for the query and `{{name}}` for
the other values that a tool names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

EXAMPLES = "{examples}"
_MAJORITY = 0.8
_PATH = r"""\w+(?:\.\w+(?:\(\))?|\[(?:\d+|"\w+"|'\w+')\])*(?:\s*\|\s*\w+)*"""
_PLACEHOLDER = re.compile(r"\{\{-?\s*(" + _PATH + r")\s*-?\}\}")
_STEP = re.compile(r"""\.(\w+)\(\)|\.(\w+)|\[(\d+)\]|\[["'](\w+)["']\]|\s*\|\s*(\w+)""")
_METHODS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "trim": str.strip,
    "lstrip": str.lstrip,
    "rstrip": str.rstrip,
    "lower": str.lower,
    "upper": str.upper,
    "title": str.title,
    "capitalize": str.capitalize,
    "string": str,
    "safe": str,
}
"""Methods and filters of a template language that are followed; no other code of a template is run."""

S = TypeVar("S", str, "list[str]")
Parts = tuple[str, ...]
"""Literal, name, literal, name, …, literal: an odd number of texts."""


@dataclass(frozen=True, slots=True)
class Template:
    """A template that was given or recovered, and can be compared with rendered prompts.

    Attributes:
        text: As it stands in a log.
        lead: What stands before `parts` in every rendered prompt; None where that differs from row to row.
        start: What all leads begin with.
        end: What all leads end with.
        parts: Literals and names in turn.
        comparable: False for a template with statements or expressions that are not followed here, so that nobody can
            say which rendered prompts it fits.
    """

    text: str
    lead: str | None
    start: str
    end: str
    parts: Parts
    comparable: bool = True

    def fits(self, rendered: str, values: Mapping[str, str]) -> bool:
        """Say whether `rendered` is this template filled with `values`."""
        filled = _fill(self.parts, values)
        if filled is None or not self.comparable:
            return False
        if self.lead is not None:
            return rendered == self.lead + filled
        rest = len(rendered) - len(filled)
        if rest < len(self.start) + len(self.end) or not rendered.endswith(filled):
            return False
        return rendered.startswith(self.start) and rendered.endswith(self.end, 0, rest)


def recover(
    rows: Sequence[tuple[str, Mapping[str, str]]], given: str | None = None, examples: str = EXAMPLES
) -> Template | None:
    """Return the template of rendered prompts, or None if they share none.

    Args:
        rows: Rendered prompt and the values filled in (name -> text) of each row.
        given: The template as the tool keeps it, without what the tool puts before it (such as examples).
        examples: What to write for a part before it that differs from row to row.
    """
    split: list[tuple[str, Parts, str]] = []
    for rendered, values in rows:
        found = _split(rendered, values) if given is None else _split_given(rendered, values, given)
        if found:
            split.append(found)
    if not split:
        return None if given is None else _kept(given, [rendered for rendered, _ in rows])
    most = (len(rows) if given is None else len(split)) // 2
    cores = Counter((core, tail) for _, core, tail in split)
    (core, tail), count = cores.most_common(1)[0]
    if count <= most:
        tails = [t for _, c, t in split if c == core]
        if len(tails) <= most:
            return None
        tail = shared_start(tails)
    leads = [lead for lead, c, t in split if c == core and t.startswith(tail)]
    parts = (*core[:-1], core[-1] + tail)
    (lead, count), *_ = Counter(leads).most_common(1)
    shown = f"{given}{tail}" if given is not None else "".join(_marker(p) if i % 2 else p for i, p in enumerate(parts))
    if count >= max(_MAJORITY * len(leads), 1):
        return Template(lead + shown, lead, "", "", parts)
    start = _to_last_line(shared_start(leads))
    end = _from_first_line(shared_start([lead[len(start) :][::-1] for lead in leads])[::-1])
    label = (end + parts[0]).rpartition("\n")[2]  # examples begin as the query does
    start = start.removesuffix(label) if label else start
    return Template(start + examples + end + shown, None, start, end, parts)


def _kept(given: str, rendered: Sequence[str]) -> Template:
    """Return the template that a tool keeps, though it cannot be compared, after the lines that stand before it."""
    start = shared_start(list(dict.fromkeys(rendered)))
    label = re.split(r"\{[{%#]", given, maxsplit=1)[0]
    if label.strip() and label in start:
        lead = start[: start.rfind(label)]
    else:
        lead = start[: start.rfind("\n") + 1] if len(set(rendered)) > 1 else ""
    return Template(lead + given, lead, "", "", ("",), comparable=False)


def value_of(expression: str, values: Mapping[str, Any]) -> str | None:
    """Return what a placeholder stands for, such as `choices[0]` or `question.strip()`, as text.

    Returns:
        None if there is no such value, or the expression has a step that is not followed here.
    """
    name = re.match(r"\w+", expression)
    value = values.get(name[0]) if name else None
    for method, attribute, place, key, filter_ in _STEP.findall(expression, name.end() if name else 0):
        if method or filter_:
            function = _METHODS.get(method or filter_)
            value = function(value) if function and isinstance(value, str) else None
        elif place:
            value = value[int(place)] if isinstance(value, list) and int(place) < len(value) else None
        else:
            value = value.get(attribute or key) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, str):
        return value
    try:
        return str(value)  # as the template languages show numbers and lists
    except RecursionError:
        return None


def shared_start(texts: Sequence[S]) -> S:
    """Return what all of `texts`, one or more texts or lists, begin with."""
    low, high = min(texts), max(texts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))]


def shared_affixes(texts: Iterable[str]) -> tuple[str, str]:
    """Return what all texts begin and end with, up to the end of a line or of a label such as `Question: `.

    Instructions around a query are lines or labels of their own; words that queries happen to share are not cut off.
    """
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        return "", ""
    start = shared_start(distinct)
    start = start[: max(start.rfind("\n") + 1, start.rfind(": ") + 2 if ": " in start else 0)]
    end = shared_start([t[len(start) :][::-1] for t in distinct])[::-1]
    at = end.find("\n")
    return start, end[at:] if at >= 0 else ""


def system_template(texts: Iterable[str]) -> str:
    """Return what system messages share: their text, or its beginning and end around what differs."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        return distinct[0] if distinct else ""
    start, end = shared_affixes(distinct)
    return f"{start}{{…}}{end}"


def names_in(template: str) -> list[str]:
    """Return the expressions of a template's placeholders, such as `name` or `name[0]`, in order and once each."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(template)))


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return a plain template with its placeholders filled; unknown ones stay."""
    return _PLACEHOLDER.sub(lambda m: values.get(m[1], m[0]), template)


def is_plain(template: str) -> bool:
    """Say whether a template holds nothing but text and placeholders that are followed here."""
    rest = _PLACEHOLDER.sub("", template)
    return not any(mark in rest for mark in ("{{", "{%", "{#"))


def _marker(name: str) -> str:
    return "{query}" if name == "query" else "{{" + name + "}}"


def _split_given(rendered: str, values: Mapping[str, str], given: str) -> tuple[str, Parts, str] | None:
    pieces: Parts = tuple(_PLACEHOLDER.split(given))
    if not is_plain(given) or any(name not in values for name in pieces[1::2]):
        return None
    filled = "".join(values[p] if i % 2 else p for i, p in enumerate(pieces))
    at = rendered.rfind(filled)
    if at < 0 or not filled:
        return None
    return rendered[:at], pieces, rendered[at + len(filled) :]


def _split(rendered: str, values: Mapping[str, str]) -> tuple[str, Parts, str] | None:
    """Cut a rendered prompt at the last occurrence of each value: lead, core from first to last value, tail."""
    spans: list[tuple[int, int, str]] = []
    for name, value in sorted(values.items(), key=lambda item: -len(item[1])):
        if not value:
            continue
        at = rendered.rfind(value)
        while at >= 0 and any(at < end and start < at + len(value) for start, end, _ in spans):
            at = rendered.rfind(value, 0, at + len(value) - 1)
        if at >= 0:
            spans.append((at, at + len(value), name))
    if not spans:
        return None
    spans.sort()
    core: list[str] = [""]
    for i, (_, end, name) in enumerate(spans):
        core.append(name)
        core.append(rendered[end : spans[i + 1][0]] if i + 1 < len(spans) else "")
    return rendered[: spans[0][0]], tuple(core), rendered[spans[-1][1] :]


def _fill(parts: Parts, values: Mapping[str, str]) -> str | None:
    try:
        return "".join([values[p] if i % 2 else p for i, p in enumerate(parts)])
    except KeyError:
        return None


def _to_last_line(text: str) -> str:
    """Return what stands before words that examples only happen to share."""
    return text[: (text.rfind("\n") if "\n" in text else text.rfind(" ")) + 1]


def _from_first_line(text: str) -> str:
    at = text.find("\n")
    return text[at:] if at >= 0 else text


def varying(names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the fields that make a query: what is the same in every row is part of the instruction."""
    found = [name for name in names if len({str(row.get(name)) for row in rows}) > 1]
    return found or list(names)


def shown(rows: Sequence[tuple[str, Mapping[str, str]]], share: float = 0.9) -> list[str]:
    """Return the names of the values that stand in at least `share` of the rendered prompts that they belong to."""
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for rendered, values in rows:
        for name, value in values.items():
            total[name] += 1
            # Texts of a few letters stand in anything.
            counts[name] += len(value) > 3 and value in rendered
    return [name for name in total if counts[name] >= share * total[name]]
