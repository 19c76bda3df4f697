"""From a prompt template and a query to what a model is given, by one rule for all of oirl.

A template marks the query with `{query}`, or, as evaluation tools write it, with one placeholder `{{name}}`. A prompt
without a mark is an instruction: it stands before the query in plain text, and is the system message of a chat.
"""

from __future__ import annotations

import re

_MARK = re.compile(r"(?<!\{)\{query\}(?!\})|\{\{-?\s*(\w+)\s*-?\}\}")
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


def messages(prompt: str, query: str) -> list[dict[str, str]] | None:
    """Return the messages given to a chat model, or None if the prompt cannot be filled with a query alone."""
    literals = split_at_query(prompt)
    if literals is None:
        return None
    if len(literals) > 1:
        return [{"role": "user", "content": query.join(literals)}]
    system = [{"role": "system", "content": prompt}] if prompt.strip() else []
    return [*system, {"role": "user", "content": query}]


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
