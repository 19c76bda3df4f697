"""The prompts of the demo, and the replies that the small model is taught to give to each of them.

What a prompt is good for is set here, on purpose, in `WORKED_SHARE`: how often a taught reply to that kind of
problem writes the calculation out. The other taught replies give only the answer, which a model of this size
often guesses wrongly. Every taught reply ends in the right answer: all wrong replies in the log are the
model's own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from oirl_data.problems import Problem

PROMPTS: dict[str, str] = {
    "steps": "{query} Work step by step.",
    "answer": "{query} Answer only.",
    "table": "{query} Draw a table first.",
    "units": "{query} Check the units.",
    "backwards": "{query} Work backwards from the end.",
    "equation": "Write one equation and solve it. {query}",
    "known": "List what is known, then solve it. {query}",
    "known_steps": "List what is known, then solve it. {query} Work step by step.",
    "table_answer": "{query} Draw a table first. Answer only.",
    "plain": "{query}",
}

# In the order of: add, take, groups, share, bulk, compare, price, before.
_KIND_ORDER = ("add", "take", "groups", "share", "bulk", "compare", "price", "before")
_SHARES: dict[str, tuple[float, ...]] = {
    "steps": (1.0, 0.8, 0.8, 0.7, 1.0, 0.4, 1.0, 0.4),
    "answer": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "table": (0.0, 0.0, 1.0, 1.0, 0.6, 0.4, 0.4, 0.0),
    "units": (0.6, 0.5, 0.8, 0.0, 0.4, 0.0, 0.8, 0.0),
    "backwards": (0.0, 1.0, 0.0, 0.8, 0.4, 0.4, 0.4, 1.0),
    "equation": (0.8, 0.8, 0.7, 0.7, 0.0, 0.6, 0.0, 0.4),
    "known": (0.6, 0.4, 0.4, 0.4, 0.0, 1.0, 0.4, 0.7),
}
WORKED_SHARE: dict[str, dict[str, float]] = {
    prompt_id: dict(zip(_KIND_ORDER, shares, strict=True)) for prompt_id, shares in _SHARES.items()
}
TAUGHT = tuple(WORKED_SHARE)
UNTAUGHT = tuple(prompt_id for prompt_id in PROMPTS if prompt_id not in WORKED_SHARE)


def render(prompt_id: str, query: str) -> str:
    """Return the rendered text: the prompt with the query in its place."""
    return PROMPTS[prompt_id].format(query=query)


def _equations(problem: Problem) -> list[str]:
    """Write the calculations of a problem."""
    return [f"{step.left} {step.op} {step.right} = {step.result}" for step in problem.steps]


def _worked(problem: Problem, prompt_id: str) -> str:
    """Write the reply that works the problem out, in the manner of a prompt."""
    lines = _equations(problem)
    numbers = re.findall(r"\d+", problem.query)
    answer, unit = problem.answer, problem.unit
    if prompt_id == "steps":
        steps = " ".join(f"Step {number}: {line}." for number, line in enumerate(lines, start=1))
        return f"{steps} The answer is {answer}."
    if prompt_id == "table":
        return f"| {' | '.join(numbers)} | gives {' | '.join(lines)} | The answer is {answer}."
    if prompt_id == "units":
        return f"We count {unit}. {', '.join(lines)} {unit}. The answer is {answer} {unit}."
    if prompt_id == "backwards":
        return f"From the end: {', then '.join(lines)}. So it was {answer}."
    if prompt_id == "equation":
        return f"{' ; '.join(lines)} #### {answer}"
    return f"Known: {' and '.join(numbers)}. So {', '.join(lines)}. The answer is {answer}."


def _short(problem: Problem, prompt_id: str) -> str:
    """Write the reply that gives only the answer, in the manner of a prompt."""
    if prompt_id == "answer":
        return f"{problem.answer}"
    if prompt_id == "units":
        return f"The answer is {problem.answer} {problem.unit}."
    if prompt_id == "equation":
        return f"#### {problem.answer}"
    return f"The answer is {problem.answer}."


def write_reply(problem: Problem, prompt_id: str, rng: random.Random) -> str:
    """Write a reply to teach: worked out with the probability in `WORKED_SHARE`, else the answer only."""
    if rng.random() < WORKED_SHARE[prompt_id][problem.kind]:
        return _worked(problem, prompt_id)
    return _short(problem, prompt_id)
