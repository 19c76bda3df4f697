"""How good a policy is on queries that nothing is learned from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from oirl.engines.base import Sampling
from oirl.language_models import Rendered, padding_id
from oirl.logs.checkers import apply_checker
from oirl.logs.rendering import messages, render
from oirl.records import Query
from oirl.statistics.intervals import success_interval
from oirl.tuning.examples import Example
from oirl.tuning.heads import head_is_all
from oirl.tuning.policy import Policy
from oirl.tuning.rollouts import Rollout
from oirl.tuning.scoring import Scorer, whole_rewards
from oirl.tuning.trainer import Objective, collate, loss_sums

_AT_A_TIME = 16
_SAMPLES = 3


class Validation:
    """Measures a policy on held-out queries: always the same ones, by the same draws.

    Args:
        policy: What is measured.
        queries: Held-out queries.
        templates: Name -> template under which they are asked; the first is what counts.
        initial: The same of the model before it is tuned: it knows the prompt, not what it will be trained on.
        groups: Query id -> group of near duplicates, for intervals.
        checker: Grades responses; None if none are drawn.
        sampling: How they are drawn.
        examples: Held-out examples, for their loss.
        rewards: Name -> what else is asked of the responses: "reward", what is trained for, and "gold", what counts.

    Attributes:
        labels: What is told with each measurement beside its figures.
    """

    def __init__(
        self,
        policy: Policy,
        queries: Sequence[Query],
        templates: Mapping[str, str],
        initial: Mapping[str, str],
        groups: Mapping[str, int],
        checker: Callable[[str, str], Any] | None,
        sampling: Sampling,
        examples: Sequence[Example],
        rewards: Mapping[str, Scorer] | None = None,
    ) -> None:
        self._policy, self._templates, self._checker, self._sampling = policy, templates, checker, sampling
        self._rewards = dict(rewards or {})
        self._queries = list(queries) if checker is not None or self._rewards else []
        self._initial, self._groups = initial, np.array([groups[q.query_id] for q in self._queries], dtype=np.int64)
        self._examples = examples
        self.labels: dict[str, Any] = {}

    def ask(self, templates: Mapping[str, str]) -> None:
        """Ask under other templates from now on."""
        self._templates = dict(templates)

    @property
    def measures(self) -> str | None:
        """What tells the better policy: "gold", "success", "reward", "loss", or None if nothing is measured."""
        if self._queries:
            return "gold" if "gold" in self._rewards else "success" if self._checker is not None else "reward"
        return "loss" if self._examples else None

    def measure(self, *, initial: bool = False) -> dict[str, Any]:
        """Return what is measured now.

        Returns:
            `success` under the first template with `ci_low` and `ci_high`, with `right` the verdicts of all queries as
            0 and 1, and of the initial model their `groups`; a few `samples`; of each template `success_NAME`; the mean
            of each of the rewards, and under `by_query` those of all queries; `loss`, nats a token, of held-out
            examples. What cannot be measured is not there.
        """
        found: dict[str, Any] = dict(self.labels)
        if self._queries:
            templates = {**self._initial, **self._templates} if initial else self._templates
            for i, (name, template) in enumerate(templates.items()):
                drawn = self._draw(template)
                if i == 0:
                    found["samples"] = [
                        {"query": r.query, "response": r.response, "correct": r.correct} for r in drawn[:_SAMPLES]
                    ]
                if i == 0 and self._rewards:
                    found |= self._rewarded(drawn)
                if self._checker is None:
                    break
                right = np.array([rollout.correct is True for rollout in drawn], dtype=np.float64)
                if i == 0:
                    mean, low, high = success_interval(right, self._groups)
                    found |= {"success": mean, "ci_low": low, "ci_high": high, "right": right.astype(int).tolist()}
                found[f"success_{name}"] = float(right.mean())
            if initial:
                found["groups"] = self._groups.tolist()
        if self._examples:
            found["loss"] = self._loss()
        return found

    def value(self, measured: Mapping[str, Any]) -> float:
        """Return the number that is higher of better policies; NaN where no response had a reward."""
        name = self.measures or "loss"
        value = math.nan if measured[name] is None else float(measured[name])
        return -value if name == "loss" else value

    def _draw(self, template: str) -> list[Rollout]:
        """Return a response to each query, with its verdict; one that failed is empty."""
        engine = self._policy.engine()
        fill = messages if engine.chat else render
        rendered: list[Rendered] = [fill(template, q.query) for q in self._queries]  # type: ignore[misc]
        with self._policy.computing():
            completions = engine.generate(rendered, self._sampling)
        return [
            Rollout(
                q.query_id,
                q.query,
                template,
                c.text or "",
                q.answer,
                self._verdict(c.text, q.answer),
                finished=c.finish_reason != "length",
                token_ids=c.token_ids,
            )
            for (c,), q in zip(completions, self._queries, strict=True)
        ]

    def _verdict(self, text: str | None, answer: str | None) -> bool | None:
        return (
            None if text is None or self._checker is None else apply_checker(self._checker, text, answer or "").correct
        )

    def _rewarded(self, drawn: Sequence[Rollout]) -> dict[str, Any]:
        found: dict[str, Any] = {"by_query": {}}
        for name, scorer in self._rewards.items():
            values = whole_rewards(scorer(drawn))
            known = values[~np.isnan(values)]
            found[name] = float(known.mean()) if len(known) else None
            found["by_query"][name] = [None if math.isnan(v) else v for v in values.tolist()]
        return found

    def _loss(self) -> float:
        order = sorted(range(len(self._examples)), key=lambda i: -len(self._examples[i]))
        fill, total, tokens = padding_id(self._policy.tokenizer), 0.0, 0.0
        model, whole = self._policy.model, not head_is_all(self._policy.model)
        with torch.no_grad(), _evaluating(model), self._policy.computing():
            for start in range(0, len(order), _AT_A_TIME):
                rows = [self._examples[i] for i in order[start : start + _AT_A_TIME]]
                batch = collate(rows, fill, "none", self._policy.start)
                moved = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
                sums = loss_sums(model, moved, Objective(), whole_logits=whole)
                total, tokens = total + float(sums.supervised), tokens + float(sums.tokens)
        return total / tokens if tokens else math.nan


@contextmanager
def _evaluating(model: Any) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
