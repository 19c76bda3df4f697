"""What a run learns from and what it holds out, read and checked before a model is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from oirl.errors import ConfigError, DataError
from oirl.logs.grading import open_checker
from oirl.logs.groups import group_queries
from oirl.logs.queries import read_query_records
from oirl.logs.splits import assign_test, train_rows
from oirl.logs.store import read_log, table_fingerprint
from oirl.records import Query
from oirl.tuning.lessons import Chosen, Method
from oirl.tuning.online_settings import Online
from oirl.tuning.rollouts import Rollout, rollouts_of_log
from oirl.tuning.scoring import Scorer, open_gold, open_reward
from oirl.tuning.settings import Hir, Sampled, Settings

_ALL_TEST = "{}: all rows are marked `test`, and from these nothing is learned; give others, or mark some `train`"


class Data:
    """What is learned from and what is held out, read and checked before a model is loaded."""

    def __init__(self, how: Settings) -> None:
        self.scorer: Scorer | None = open_reward(how.reward) if isinstance(how, Sampled) else None
        self.method = Method(how, self.scorer)
        self.checker = open_checker(how.grade) if how.grade else None
        self.validation_rewards = self._validation_rewards(how)
        self.rollouts: list[Rollout] = []
        self.held_out_rollouts: list[Rollout] = []
        self.chosen: tuple[Chosen, dict[str, Any]] | None = None
        self.warnings: list[str] = []
        self.groups: dict[str, int] = {}
        if how.log:
            table = train_rows(read_log(list(how.log)))
            if len(table) and set(table["split"].to_pylist()) == {"test"}:
                raise DataError(_ALL_TEST.format(", ".join(how.log)))
            self.fingerprint = table_fingerprint(table)
            rollouts = rollouts_of_log(table)
            queries = list({r.query_id: Query(r.query_id, r.query, r.answer) for r in rollouts}.values())
        else:
            assert how.queries is not None
            found = read_query_records(how.queries)
            queries = list({q.query_id: q for q in found if q.split != "test"}.values())
            if found and not queries:
                raise DataError(_ALL_TEST.format(how.queries))
            self.fingerprint = _digest([[q.query_id, q.query, q.answer] for q in queries])
            rollouts = []
        if not queries:
            raise DataError(f"{', '.join(how.log) or how.queries}: no response, or no query, to learn from")
        self._check_answers(how, queries)
        out = self._held_out(how, queries)
        self.queries = [q for q in queries if q.query_id not in out]
        self.validation = [q for q in queries if q.query_id in out]
        if how.log:
            self.rollouts = [r for r in rollouts if r.query_id not in out]
            self.held_out_rollouts = [r for r in rollouts if r.query_id in out]
            if not isinstance(how, Online):
                self.chosen = self.method.choose(self.rollouts)
        learned = self.chosen[0].rollouts if self.chosen else self.rollouts
        counts = Counter(r.prompt for r in learned) if how.log else Counter([how.prompt])
        self.prompts = [prompt for prompt, _ in counts.most_common()]

    @property
    def validation_groups(self) -> list[int]:
        """Of each held-out query the number of its near duplicates."""
        return [self.groups[q.query_id] for q in self.validation]

    def _validation_rewards(self, how: Settings) -> dict[str, Scorer]:
        """Return name -> what an online method is measured by on held-out queries, beside verdicts."""
        if not isinstance(how, Online):
            return {}
        found: dict[str, Scorer] = {}
        if how.reward not in ("verdict", "score"):
            found["reward"] = lambda rollouts: self.scorer(rollouts) if self.scorer else np.full(len(rollouts), np.nan)
        if how.gold_reward not in (None, "verdict"):
            self.gold = open_gold(str(how.gold_reward), how.reward)
            found["gold"] = lambda rollouts: self.gold(rollouts)
        return found

    def _check_answers(self, how: Settings, queries: Sequence[Query]) -> None:
        if how.queries and how.grade and all(q.answer is None for q in queries):
            told = f"{how.queries}: no query has an `answer`, so {how.grade} grades nothing"
            if isinstance(how, Sampled) and how.reward == "verdict":
                raise DataError(f"{told}, and no response gets a reward; give the queries answers")
            if isinstance(how, Hir) and how.relabel["name"] == "correctness":
                raise DataError(f"{told}, and no response can be relabelled; give the queries answers")
            self.warnings.append(told)

    def _held_out(self, how: Settings, queries: Sequence[Query]) -> set[str]:
        if not how.held_out:
            return set()
        grouping = group_queries([q.query for q in queries])
        try:
            mask = assign_test([q.query_id for q in queries], grouping.labels, how.held_out, how.seed)
        except DataError as e:
            raise DataError(f"{', '.join(how.log) or how.queries}: {e}; or hold none out (held_out = 0)") from e
        self.warnings += [text for text in [grouping.warning()] if text]
        self.groups = dict(zip((q.query_id for q in queries), grouping.labels.tolist(), strict=True))
        return {q.query_id for q, held in zip(queries, mask, strict=True) if held}


def asked_prompt(how: Settings, trained: Sequence[str]) -> str:
    """Return the prompt under which the policy is measured: it must be one that is learned, to the byte."""
    if "prompt" not in how.model_fields_set:
        return trained[0]
    if how.prompt not in trained:
        raise ConfigError(
            f"prompt = {how.prompt!r} is none of the {len(trained)} prompts that are learned from, such as "
            f"{trained[0]!r}; a model does what it was trained to under the very same text only"
        )
    return how.prompt


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
