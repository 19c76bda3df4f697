"""Best-of-N: rank the candidate responses of each query by a reward model, and choose one, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import expit

from oirl.errors import ConfigError, DataError
from oirl.logs.checkers import response_kind, stated_answer
from oirl.logs.text import text_id
from oirl.rewards.base import Estimates

METHODS = ("reward", "majority", "weighted_majority")


class RewardModel(Protocol):
    """What is needed of a reward model of responses."""

    kind: str
    data_: dict[str, Any]

    def estimate(self, queries: Sequence[str], responses: Sequence[str]) -> Estimates:
        """Return reward and spread of each response."""
        ...


@dataclass(frozen=True, slots=True)
class RankedResponse:
    """A candidate and what the model says of it.

    Attributes:
        response: The text.
        position: Where it stood among the candidates of its query, from 0.
        reward: Its reward.
        spread: Standard error of the reward.
        probability: σ(reward): of being right, or, by a preference model, of being preferred to a mean response.
        answer: The answer that it votes for; None where it gives none, or nothing is voted on.
    """

    response: str
    position: int
    reward: float
    spread: float
    probability: float
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """The candidates of one query, best first.

    Attributes:
        query_id: Name of the query.
        query: Its text.
        chosen: The chosen response, None where the model abstains.
        score: How sure the choice is, in [0, 1]: by `reward` the probability that the best of so many is right, or, by
            a preference model, that it is preferred to the runner-up (taken as any two: of many it is less); by a vote
            the answer's share of the votes.
        abstained: Whether the score is under the threshold.
        method: One of `METHODS`.
        ranked: All candidates, by reward.
    """

    query_id: str
    query: str
    chosen: str | None
    score: float
    abstained: bool
    method: str
    ranked: list[RankedResponse]

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking as a dictionary for JSON."""
        return asdict(self)


def rank(
    model: RewardModel,
    queries: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    query_ids: Sequence[str] | None = None,
    method: str = "reward",
    threshold: float = 0.0,
    penalties: Sequence[Sequence[float]] | None = None,
) -> list[Ranking]:
    """Rank the candidate responses of each query and choose one.

    Args:
        model: A fitted or loaded reward model of responses.
        queries: One text per query.
        responses: The candidates of each query, at least one.
        query_ids: Names of the queries; hashes of their texts when None.
        method: "reward": the highest reward. "majority": the answer that most candidates give (self-consistency), ties
            to the earlier one, and of these responses the first: the reward has no say. "weighted_majority": each vote
            is weighted by the model's probability, ties and the response go by reward. Candidates without an answer do
            not vote; where none has one, the reward decides.
        threshold: Below this score the model abstains, in [0, 1].
        penalties: What is taken off each candidate's reward first, such as η · KL
            (`oirl.rewards.objectives.total_reward`).

    Raises:
        ConfigError: If the method is not known, the threshold not in [0, 1], or lengths differ.
        DataError: If a query has no candidate.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r}; allowed: {', '.join(METHODS)}")
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold {threshold}; a number from 0 to 1 is needed")
    names = [text_id(q) for q in queries] if query_ids is None else list(query_ids)
    if not len(queries) == len(responses) == len(names):
        raise ConfigError(f"{len(queries)} queries, {len(responses)} lists of responses, {len(names)} ids: not alike")
    for name, candidates in zip(names, responses, strict=True):
        if isinstance(candidates, str):
            raise ConfigError("responses: a list of candidates per query is needed, not one text")
        if not candidates:
            raise DataError(f"the query {name!r} has no response to rank")
    flat = [r for candidates in responses for r in candidates]
    asked = [q for q, candidates in zip(queries, responses, strict=True) for _ in candidates]
    estimates = model.estimate(asked, flat)
    reward = np.asarray(estimates.reward, dtype=np.float64)
    if penalties is not None:
        reward = reward - _flat_penalties(penalties, responses)
    answers: list[str | None] = [None] * len(flat)
    if method != "reward":
        kind = str(model.data_.get("answers") or response_kind(flat))
        answers = [stated_answer(r, kind) for r in flat]
    rankings, at = [], 0
    for name, query, candidates in zip(names, queries, responses, strict=True):
        here = range(at, at + len(candidates))
        at += len(candidates)
        ranked = [
            RankedResponse(
                flat[i], i - here[0], float(reward[i]), float(estimates.spread[i]), float(expit(reward[i])), answers[i]
            )
            for i in here
        ]
        ranked.sort(key=lambda r: -r.reward)  # stable: of equals the first candidate leads
        best, score = _choose(ranked, method, _sureness(model))
        abstained = bool(score < threshold)
        rankings.append(Ranking(name, query, None if abstained else best.response, score, abstained, method, ranked))
    return rankings


class RewardFunction:
    """A reward model as a function of TRL's form: f(prompts, completions, **columns) -> rewards.

    Pass it as `reward_funcs` to TRL's GRPO or RLOO trainer. A column `query` of the data set, if there is one, is what
    the model is asked about; otherwise the prompt is, of a chat its messages other than the system's.

    Args:
        model: A fitted or loaded reward model of responses.
        name: Under which TRL logs the rewards.
    """

    def __init__(self, model: RewardModel, name: str = "oirl_reward") -> None:
        self.model = model
        self.__name__ = name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Return the reward of each completion."""
        queries = columns.get("query") or [_text(p, skip="system") for p in prompts]
        estimates = self.model.estimate(list(queries), [_text(c) for c in completions])
        return [float(r) for r in estimates.reward]


def _choose(
    ranked: Sequence[RankedResponse], method: str, sure: Callable[[Sequence[RankedResponse]], float]
) -> tuple[RankedResponse, float]:
    """Return the chosen response of some that are ranked by reward, and the score of the choice."""
    if method == "reward" or all(r.answer is None for r in ranked):
        return ranked[0], sure(ranked)
    # Of equal votes the answer that is counted first wins.
    counted = sorted(ranked, key=lambda r: r.position) if method == "majority" else ranked
    votes: dict[str, float] = {}
    for r in counted:
        if r.answer is not None:
            votes[r.answer] = votes.get(r.answer, 0.0) + (1.0 if method == "majority" else r.probability)
    winner = max(votes, key=lambda answer: votes[answer])
    total = sum(votes.values())
    return next(r for r in counted if r.answer == winner), votes[winner] / total if total else 0.0


def _sureness(model: RewardModel) -> Callable[[Sequence[RankedResponse]], float]:
    """Return what says how sure the response with the highest reward is."""
    if model.kind == "response-reward-model":
        chosen = getattr(model, "chosen_probability", lambda reward, _: expit(reward))
        return lambda ranked: float(chosen(np.array([ranked[0].reward]), len(ranked))[0])

    def preferred(ranked: Sequence[RankedResponse]) -> float:
        # The same text again is no other response.
        others = [r for r in ranked if r.response.strip() != ranked[0].response.strip()]
        return float(expit(ranked[0].reward - others[0].reward)) if others else ranked[0].probability

    return preferred


def _flat_penalties(penalties: Sequence[Sequence[float]], responses: Sequence[Sequence[str]]) -> np.ndarray:
    if [len(p) for p in penalties] != [len(r) for r in responses]:
        raise ConfigError("penalties must be one number per candidate, in the same lists as the responses")
    return np.array([value for of_query in penalties for value in of_query], dtype=np.float64)


def _text(value: Any, skip: str = "") -> str:
    """Return a text, or the messages of a chat as one, those of one role left out."""
    if value is None or isinstance(value, str):
        return value or ""
    turns: list[Mapping[str, Any]] = [m for m in value if m.get("role") != skip]
    if len(turns) == 1:
        return str(turns[0].get("content") or "")
    return "\n\n".join(f"{str(m.get('role') or 'user').capitalize()}: {m.get('content') or ''}" for m in turns)
