"""Hindsight relabelling: which instruction a response did follow. Pure functions.

φ of HIR (2302.05206, section 4.2) as classes: each is made with its instructions and maps outcomes to them. An
instruction is a prompt template (see `oirl.logs.rendering`); `{prompt}` in it stands for the prompt that was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from oirl.errors import ConfigError

CORRECT = "Give a correct answer.\n\n{prompt}"
WRONG = "Give a wrong answer.\n\n{prompt}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a response came to.

    Attributes:
        prompt: The template that was given.
        query: The query.
        response: The response.
        correct: Its verdict, None where it is not known.
        reward: Its reward, None where it is not known.
    """

    prompt: str
    query: str
    response: str
    correct: bool | None = None
    reward: float | None = None


class Relabelling(Protocol):
    """φ: outcomes to instructions.

    Attributes:
        instructions: All that it can give.
        wanted: The one to ask for when responses are drawn.
    """

    instructions: tuple[str, ...]
    wanted: str

    def relabel(self, outcomes: Sequence[Outcome]) -> list[str | None]:
        """Return the instruction that each response did follow; None where that is not known."""
        ...


class Correctness:
    """What is right was asked for as right, what is wrong as wrong: φ of the paper.

    Args:
        correct: Instruction of right responses; the one to ask for.
        wrong: Instruction of wrong ones.
    """

    def __init__(self, correct: str = CORRECT, wrong: str = WRONG) -> None:
        self.instructions = (correct, wrong)
        self.wanted = correct

    def relabel(self, outcomes: Sequence[Outcome]) -> list[str | None]:
        """Return the instruction of each response; None without a verdict."""
        return [None if o.correct is None else self.instructions[0 if o.correct else 1] for o in outcomes]


class Ranks:
    """ "Ranks about 75%": the share of all responses that a reward exceeds, in bins; asked for is the highest.

    A response ranks at (below + equal / 2) / n, and the bin's upper end is named. Equal rewards share a rank.

    Args:
        text: The instruction, with `{share}` for the percentage.
        bins: How many; 2 or more.
    """

    def __init__(self, text: str = "Give an answer that ranks about {share}%.\n\n{prompt}", bins: int = 4) -> None:
        if type(bins) is not int or not 2 <= bins <= 100:
            raise ConfigError(f"bins = {bins!r}; allowed: a whole number from 2 to 100")
        if "{share}" not in text:
            raise ConfigError(f"the instruction {text!r} needs {{share}}, where the percentage goes")
        self.instructions = tuple(text.replace("{share}", str(round(100 * (b + 1) / bins))) for b in range(bins))
        self.wanted = self.instructions[-1]

    def relabel(self, outcomes: Sequence[Outcome]) -> list[str | None]:
        """Return the instruction of each response, ranked among those given; None without a reward."""
        rewards = np.array([np.nan if o.reward is None else o.reward for o in outcomes], dtype=np.float64)
        known = np.sort(rewards[~np.isnan(rewards)])
        middle = (np.searchsorted(known, rewards, "left") + np.searchsorted(known, rewards, "right")) / 2
        bins = len(self.instructions)
        which = np.minimum(middle * bins / max(len(known), 1), bins - 1).astype(int)
        return [None if np.isnan(r) else self.instructions[b] for r, b in zip(rewards, which, strict=True)]


class Length:
    """How many words a response has: up to each of some limits, or more.

    Args:
        limits: Ascending; a response belongs to the first limit that it keeps.
        text: The instruction of those, with `{limit}`; asked for is the first.
        longer: The instruction of what is longer than all limits.
    """

    def __init__(
        self,
        limits: Sequence[int] = (20, 80),
        text: str = "Answer in at most {limit} words.\n\n{prompt}",
        longer: str = "Answer at length.\n\n{prompt}",
    ) -> None:
        numbers = isinstance(limits, (list, tuple)) and all(type(n) is int and n > 0 for n in limits)
        if not numbers or not limits or list(limits) != sorted(set(limits)):
            raise ConfigError(f"limits = {limits!r}; allowed: whole numbers of words, ascending")
        self._limits = list(limits)
        if "{limit}" not in text:
            raise ConfigError(f"the instruction {text!r} needs {{limit}}, where the number of words goes")
        self.instructions = (*(text.replace("{limit}", str(n)) for n in self._limits), longer)
        self.wanted = self.instructions[0]

    def relabel(self, outcomes: Sequence[Outcome]) -> list[str | None]:
        """Return the instruction of each response."""
        which = np.searchsorted(self._limits, [len(o.response.split()) for o in outcomes], "left")
        return [self.instructions[i] for i in which]


class Format:
    """Whether a response has a form.

    Args:
        pattern: A regular expression that responses of the form contain.
        matching: Their instruction; the one to ask for.
        other: The instruction of all others.
    """

    def __init__(self, pattern: str, matching: str, other: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"pattern = {pattern!r} is no regular expression: {e}") from e
        self.instructions = (matching, other)
        self.wanted = matching

    def relabel(self, outcomes: Sequence[Outcome]) -> list[str | None]:
        """Return the instruction of each response."""
        return [self.instructions[0 if self._pattern.search(o.response) else 1] for o in outcomes]


class ByFunction:
    """A function of the user's, outcome -> instruction or None.

    Args:
        function: Called with an `Outcome`.
        instructions: All that it can give; the first is the one to ask for.
    """

    def __init__(self, function: Callable[[Outcome], str | None], instructions: Sequence[str]) -> None:
        self._function = function
        self.instructions = tuple(instructions)
        self.wanted = self.instructions[0]

    def relabel(self, outcomes: Sequence[Outcome]) -> list[str | None]:
        """Return what the function says of each outcome.

        Raises:
            ConfigError: If it gives an instruction that is not one of those named.
        """
        try:
            found = [self._function(outcome) for outcome in outcomes]
        except Exception as e:  # a function of the user's raises what it likes
            raise ConfigError(f"the relabelling function failed: {type(e).__name__}: {e}") from e
        for text in found:
            if text is not None and text not in self.instructions:
                raise ConfigError(f"the relabelling gave {text!r}, which is none of its instructions")
        return found


def check_instructions(relabelling: Relabelling) -> None:
    """Refuse instructions that cannot be told apart, or a wanted one that nothing is trained on.

    Raises:
        ConfigError: If so.
    """
    texts = relabelling.instructions
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"a relabelling needs two instructions or more, each a text; got {list(texts)!r}")
    if len(set(texts)) < len(texts):
        raise ConfigError(f"two instructions are equal: {max(texts, key=texts.count)!r}; nothing could be told apart")
    if relabelling.wanted not in texts:
        raise ConfigError(
            f"the instruction to ask for, {relabelling.wanted!r}, is none of those trained on: "
            f"{', '.join(map(repr, texts))}"
        )


def preferred(relabelling: Relabelling) -> list[str]:
    """Return the instructions that may be asked for, the best first: of ranks the highest that was given will do."""
    if not isinstance(relabelling, Ranks):
        return [relabelling.wanted]
    return list(reversed(relabelling.instructions))


def instruct(instruction: str, prompt: str) -> str:
    """Return the template of an instruction for a prompt: `{prompt}` is filled in, the query's mark is not."""
    return instruction.replace("{prompt}", prompt)


def suboutput_starts(length: int, count: int, rng: np.random.Generator) -> list[int]:
    """Return uniformly drawn steps at which a response is cut into what is given and what is learned.

    Sub-output relabelling (2302.05206, section 4.3): tokens before step i count as context, those from i on as target.

    Args:
        length: Tokens of the response, 1 or more.
        count: How many steps; each in [1, length − 1], as step 0 is the whole response. None if length is 1.
        rng: Source of chance.
    """
    return rng.integers(1, length, size=count).tolist() if length > 1 else []
