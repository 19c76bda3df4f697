"""The text that asks a language model for better prompts, and the reading of its reply. Pure functions.

In the manner of OPRO (Yang et al. 2023: logged prompts with their success) and GEPA (Agrawal et al. 2025: what went
wrong, shown), in words of our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oirl.logs.rendering import split_at_query
from oirl.logs.text import normalise

_SHOWN = 600
_TAGGED = re.compile(r"<prompt>((?:(?!</?prompt>).)*)</prompt>", re.DOTALL)
_COPIED_WORDS = 8
"""So many words in a row of a query or a response make a candidate a copy of the log."""


@dataclass(frozen=True, slots=True)
class LoggedPrompt:
    """A prompt of the log and how good it was.

    Attributes:
        prompt_id: Its name.
        prompt: The template.
        success: Share of right runs.
        n: Graded runs.
    """

    prompt_id: str
    prompt: str
    success: float
    n: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A query that the best logged prompt got wrong.

    Attributes:
        query: The query.
        response: The wrong response.
        answer: The gold answer, where there is one.
    """

    query: str
    response: str
    answer: str | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a log tells a proposer.

    Attributes:
        prompts: Logged prompts, best first.
        failures: Examples of what goes wrong.
    """

    prompts: tuple[LoggedPrompt, ...]
    failures: tuple[Failure, ...]


def write_meta_prompt(evidence: Evidence, already: Sequence[str] = ()) -> str:
    """Return the text that asks for one new prompt.

    Args:
        evidence: What the log tells.
        already: Candidates that are known, so that the next one is another.
    """
    lines = [
        "You improve the instructions that a language model is given together with each query of a task.",
        "An instruction is a template: {query} marks where the query goes.",
        "",
        "Instructions that were tried, with the share of queries that the model then got right:",
    ]
    lines += [f"- {p.success:.0%} of {p.n} runs: {_clip(p.prompt)}" for p in evidence.prompts]
    if evidence.failures:
        lines += ["", "Queries on which the best of them failed:"]
    for failure in evidence.failures:
        lines += ["", f"Query: {_clip(failure.query)}", f"Wrong response: {_clip(failure.response)}"]
        lines += [f"Right answer: {_clip(failure.answer)}"] if failure.answer is not None else []
    if already:
        lines += ["", "These were proposed already; propose something that differs from them in kind:"]
        lines += [f"- {_clip(text)}" for text in already]
    lines += [
        "",
        "Think about what the better instructions have in common, and about why the model failed on these queries. "
        "Then write one new instruction that would do better on other queries of the same kind.",
        "It must hold for every query of the task: do not quote these queries, their numbers or their answers.",
        "It must contain {query} exactly once. Write it between <prompt> and </prompt>, and nothing else there.",
    ]
    return "\n".join(lines)


def read_candidates(reply: str) -> list[str]:
    """Return the prompts between the tags of a reply; a reply of one line without tags that marks the query is one."""
    found = [text.strip() for text in _TAGGED.findall(reply)]
    lone = reply.strip()
    if not found and "{query}" in lone and "\n" not in lone and "prompt>" not in lone:
        found = [lone]
    return [text for text in found if text]


def why_not(candidate: str, known: Iterable[str], texts: Iterable[str]) -> str | None:
    """Return why a candidate is left out, None if it is not.

    Args:
        candidate: A template.
        known: Templates that stand in the log or were proposed before.
        texts: Queries and responses of the log, from which nothing may be copied.
    """
    if candidate.encode("utf-8", "replace").decode() != candidate:
        return "it is not valid Unicode"
    literals = split_at_query(candidate)
    if literals is None:
        return "it cannot be filled with a query alone"
    if len(literals) < 2:
        return "it does not say where the query goes"
    if _identity(candidate) in {_identity(text) for text in known}:
        return "it is known already"
    own = _runs_of_words(" ".join(literals))
    if any(own & _runs_of_words(text) for text in texts):
        return "it copies a query or a response of the log"
    return None


def _identity(prompt: str) -> str:
    literals = split_at_query(prompt)
    if literals is not None:  # however the query is marked; without a mark it comes last
        prompt = " {query} ".join(literals if len(literals) > 1 else [*literals, ""])
    return re.sub(r"[^\w{}]+", " ", normalise(prompt)).strip()


def _runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", normalise(text))
    return {tuple(words[i : i + _COPIED_WORDS]) for i in range(len(words) - _COPIED_WORDS + 1)}


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
