"""Examples: rollouts as tokens to learn from, and the order in which they are learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from oirl.errors import ConfigError
from oirl.language_models import Rendered, response_tokens
from oirl.logs.rendering import messages, render
from oirl.tuning.relabelling import suboutput_starts
from oirl.tuning.rollouts import Rollout

if TYPE_CHECKING:
    from oirl.tuning.policy import Policy

_GROUPED_BATCHES = 50


@dataclass(frozen=True, slots=True)
class Example:
    """What is learned of one response.

    Attributes:
        context: Tokens that are given.
        response: Tokens of the response, not empty.
        given: How many of these are given too; the rest is learned.
        others: The tokens given under each other instruction that the response is held against.
    """

    context: list[int]
    response: list[int]
    given: int = 0
    others: tuple[list[int], ...] = ()

    def __len__(self) -> int:
        """Return how many tokens the model reads of it."""
        return len(self.context) + len(self.response)


class Encoder:
    """Turns rollouts into examples for a model; what cannot be learned from is counted, not cut.

    Args:
        policy: The model and its tokenizer.
        keep_unfinished: Whether to learn from responses that were cut off, without an end.

    Attributes:
        left_out: Reason -> rollouts that there is no example of.
    """

    def __init__(self, policy: Policy, *, keep_unfinished: bool = False) -> None:
        self.left_out: Counter[str] = Counter()
        self._policy, self._keep = policy, keep_unfinished
        self._known: dict[tuple[str, str], list[int] | None] = {}

    def example(self, rollout: Rollout, template: str, others: Sequence[str] = ()) -> Example | None:
        """Return the example of a rollout under a template, held against it under other templates.

        Returns:
            None if there is none; `left_out` says why.
        """
        if not rollout.finished and not self._keep:
            self.left_out["cut off at the limit of tokens"] += 1
            return None
        contexts = [self.context(text, rollout.query) for text in (template, *others)]
        if any(context is None for context in contexts):
            self.left_out["a prompt that cannot be filled with the query alone"] += 1
            return None
        known = [context for context in contexts if context is not None]
        response = self.response(rollout)
        if not response or not all(known):
            self.left_out["no tokens"] += 1
            return None
        asked, limit = max(map(len, known)), self._policy.limit
        together = asked + len(response) if self._policy.start is None else max(asked, len(response))
        if together > limit:
            self.left_out[f"more than {limit:,} tokens"] += 1
            return None
        return Example(known[0], response, others=tuple(known[1:]))

    def drawn(self, rollout: Rollout) -> Example | None:
        """Return a rollout as it is, token by token, whether it was ended or cut off; None if there are no tokens."""
        if rollout.prompt_ids is not None:
            context: list[int] | None = list(rollout.prompt_ids)
        else:
            context = self.context(rollout.prompt, rollout.query)
        response, limit = self.response(rollout), self._policy.limit
        if not context or not response:
            self.left_out["no tokens"] += 1
            return None
        read = len(context) + len(response) if self._policy.start is None else max(len(context), len(response))
        if read > limit:
            self.left_out[f"more than {limit:,} tokens"] += 1
            return None
        return Example(context, response)

    def context(self, template: str, query: str) -> list[int] | None:
        """Return the tokens of a rendered query, None if the template cannot be filled."""
        key = (template, query)
        if key not in self._known:
            fill = messages if self._policy.tokenizer.chat_template else render
            rendered: Rendered | None = fill(template, query)
            self._known[key] = None if rendered is None else self._policy.tokens(rendered)
        return self._known[key]

    def response(self, rollout: Rollout) -> list[int]:
        """Return the tokens of a response: those that were drawn, or those of its text."""
        if rollout.token_ids is not None:
            return list(rollout.token_ids)
        return response_tokens(self._policy.tokenizer, self._policy.ends, rollout.response, ended=rollout.finished)

    def check_apart(self, templates: Sequence[str]) -> None:
        """Refuse templates that the tokenizer reads as the same tokens: nothing could be learned of their difference.

        Raises:
            ConfigError: If so.
        """
        read: dict[tuple[int, ...], str] = {}
        for template in templates:
            tokens = tuple(self.context(template, "A?") or ())
            if tokens in read:
                raise ConfigError(
                    f"the model's tokenizer reads {read[tokens]!r} and {template!r} as the same tokens; use words that "
                    "it knows"
                )
            read[tokens] = template


def batches_of(
    lengths: Sequence[int], batch: int, micro_batch: int, epochs: int, seed: int, devices: int = 1
) -> list[list[int]]:
    """Return micro-batches of positions for some epochs: like lengths together, otherwise in random order.

    Each epoch goes over all positions once; what is left of it when whole batches are cut goes first in the next. Only
    the micro-batches of the last update may be short. What an update learns from does not depend on the devices.

    Args:
        lengths: Tokens of each example.
        batch: Examples of an update.
        micro_batch: Examples at a time; divides `batch`.
        epochs: How many.
        seed: For the order.
        devices: Among which the micro-batches are dealt out in turn.
    """
    rng = np.random.default_rng(seed)
    size = np.asarray(lengths)
    found: list[list[int]] = []
    rest = np.array([], dtype=np.int64)
    for epoch in range(epochs):
        order = np.concatenate([rest, rng.permutation(len(size))])
        end = len(order) if epoch + 1 == epochs else len(order) // batch * batch
        order, rest = order[:end], order[end:]
        for start in range(0, len(order), _GROUPED_BATCHES * batch):
            group = order[start : start + _GROUPED_BATCHES * batch]
            group = group[np.argsort(-size[group], kind="stable")]
            whole = len(group) // batch * batch
            parts = [group[i : i + micro_batch].tolist() for i in range(0, whole, micro_batch)]
            found += [parts[i] for i in rng.permutation(len(parts))]
            if left := group[whole:].tolist():
                found += _dealt(left, micro_batch, devices)
    return found


def _dealt(rows: list[int], micro_batch: int, devices: int) -> list[list[int]]:
    """Return the micro-batches of a last, smaller update: as many for each device, none empty."""
    each = -(-len(rows) // (micro_batch * devices))
    rows = rows if len(rows) >= each * devices else np.resize(rows, each * devices).tolist()  # a few count twice
    return [rows[i :: each * devices] for i in range(each * devices)]


def suboutput_examples(example: Example, count: int, rng: np.random.Generator) -> list[Example]:
    """Return an example cut at some uniformly drawn steps: what comes before a step is given, not learned."""
    return [replace(example, given=i) for i in suboutput_starts(len(example.response), count, rng)]
