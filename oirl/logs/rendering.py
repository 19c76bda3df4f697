"""From a prompt template and a query to what a model is given, by one rule for all of oirl.

A template marks the query with `{query}`, or, as evaluation tools write it, with one placeholder `{{name}}`. A prompt
without a mark is an instruction: it stands before the query in plain text, and is the system message of a chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

PROMPTFOO_TEXT = '{% set _ = 0 -%}\n{{ "" }}'
"""Renders to nothing; before a prompt of one line it keeps promptfoo from taking that for a path."""
TEMPLATE_FIELDS = "template_fields"
"""Key of the metadata under which importers keep what a template was filled with, where that is not the query alone."""
_MARK = re.compile(r"(?<!\{)\{query\}(?!\})|\{\{-?\s*(\w+)\s*-?\}\}")
_ANY_MARK = re.compile(r"(?<!\{)\{query\}(?!\})|\{\{([^{}]*)\}\}")
_UNKNOWN = re.compile(r"\{(?:\d+ )?examples\}|\{…\}|\{%|\{#")


def split_at_query(prompt: str) -> list[str] | None:
    """Return the literals around the query's marks: one text if there is no mark.

    Returns:
        None if the prompt cannot be filled with a query alone: it has placeholders of several names, examples that
        differ from query to query, or statements of a template language.
    """
    names = {match[1] or "query" for match in _MARK.finditer(prompt)}
    rest = _MARK.sub("", prompt)
    if len(names) > 1 or _UNKNOWN.search(rest) or "{{" in rest:
        return None
    literals: list[str] = []
    at = 0
    for match in _MARK.finditer(prompt):
        literals.append(prompt[at : match.start()])
        at = match.end()
    return [*literals, prompt[at:]]


def render(prompt: str, query: str) -> str | None:
    """Return the text given to a model, or None if the prompt cannot be filled with a query alone."""
    literals = split_at_query(prompt)
    if literals is None:
        return None
    if len(literals) == 1:
        return f"{prompt}\n\n{query}" if prompt.strip() else query
    return query.join(literals)


def fields_of(prompt: str, metadata: str | None) -> Mapping[str, str] | None:
    """Return what an importer has kept of the fields that a template was filled with, None if the query is all.

    Args:
        prompt: The template; one without a mark is not filled.
        metadata: The column of that name.
    """
    if not metadata or TEMPLATE_FIELDS not in metadata or "{" not in prompt:
        return None
    try:
        kept: Any = json.loads(metadata).get(TEMPLATE_FIELDS)
    except (ValueError, AttributeError, RecursionError):
        return None
    whole = isinstance(kept, dict) and all(isinstance(text, str) for text in kept.values())
    return kept if whole else None


def messages(prompt: str, query: str, fields: Mapping[str, str] | None = None) -> list[dict[str, str]] | None:
    """Return the messages given to a chat model, or None if the prompt cannot be filled with what is known.

    Args:
        prompt: The template.
        query: The query.
        fields: Name -> text, where the template is filled with other fields than the query (`fields_of`).
    """
    if fields is not None:
        names = [_name(match) for match in _ANY_MARK.finditer(prompt)]
        if _UNKNOWN.search(_ANY_MARK.sub("", prompt)) or not names or not set(names) <= set(fields):
            return None
        return [{"role": "user", "content": _ANY_MARK.sub(lambda match: fields[_name(match)], prompt)}]
    literals = split_at_query(prompt)
    if literals is None:
        return None
    if len(literals) > 1:
        return [{"role": "user", "content": query.join(literals)}]
    system = [{"role": "system", "content": prompt}] if prompt.strip() else []
    return [*system, {"role": "user", "content": query}]


def _name(mark: re.Match[str]) -> str:
    return "query" if mark[1] is None else mark[1].strip().strip("-").strip()


def jinja(prompt: str, name: str = "query") -> str | None:
    """Return the prompt as a Jinja or Nunjucks template of one variable, or None as `render`."""
    literals = split_at_query(prompt)
    if literals is None:
        return None
    if len(literals) == 1:
        literals = [f"{prompt}\n\n" if prompt.strip() else "", ""]
    return ("{{" + name + "}}").join(raw_jinja(text) for text in literals)


def raw_jinja(text: str) -> str:
    """Return a text so that a template engine leaves it as it is."""
    if not any(mark in text for mark in ("{{", "{%", "{#")):
        return text
    return "{% raw %}" + text.replace("{% endraw %}", "{% endraw %}{{ '{% endraw %}' }}{% raw %}") + "{% endraw %}"
