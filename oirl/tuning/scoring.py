"""The reward of responses: verdicts, a reward model, a function, or a server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np

from oirl.errors import ConfigError, DataError
from oirl.logs.rendering import render
from oirl.registry import load_attribute
from oirl.tuning.rollouts import Rollout

Scorer = Callable[[Sequence[Rollout]], np.ndarray]
RESPONSE_MODELS = ("response-reward-model", "preference-reward-model", "language-model-reward-model")
_SPREADS = 2.0
_TIMEOUT_S, _TRIES, _FIRST_WAIT_S = 60.0, 5, 0.5


def open_reward(name: str) -> Scorer:
    """Return what gives responses their rewards, float64 (n,); NaN where there is none.

    Args:
        name: "verdict", "score", the folder of a reward model of responses, `package.module:function` of TRL's form:
            f(prompts, completions, **columns) -> a number each, or an address (http://…) that is sent
            {"queries", "prompts", "responses", "answers"} and replies {"rewards"}, lists of equal length. Columns are
            `query`, `answer`, `correct` and `completion_ids`. A function may also give each response a list of numbers,
            one for each of its tokens: the array is then of objects.

    Raises:
        ConfigError: If it is none of these.
        ModelFileError: If the model is damaged.
    """
    if name == "verdict":
        return lambda rollouts: np.array([np.nan if r.correct is None else float(r.correct) for r in rollouts])
    if name == "score":
        return lambda rollouts: np.array([np.nan if r.score is None else r.score for r in rollouts])
    if name.startswith(("http://", "https://")):
        return lambda rollouts: _by_server(name, rollouts)
    if ":" in name:
        function = load_attribute(name)
        if not callable(function):
            raise ConfigError(f"the reward {name!r} is a {type(function).__name__}, not a function")
        return lambda rollouts: _by_function(name, function, rollouts)
    return by_model(open_reward_model(name))


def open_gold(name: str, reward: str) -> Scorer:
    """Return what a policy is held to: `open_reward`'s, or "spread", the reward model's cautious word.

    That is reward − 2 · spread: it falls where a policy goes beyond what the reward model has seen, though the reward
    rises.

    Raises:
        ConfigError: If "spread" is asked of something that has none.
    """
    if name != "spread":
        return open_reward(name)
    if reward in ("verdict", "score") or ":" in reward:
        raise ConfigError(f'gold = "spread" needs a reward model under `reward`, and that is {reward!r}')
    return cautious(open_reward_model(reward))


def cautious(model: Any) -> Scorer:
    """Return the scorer that takes twice the spread off a reward model's word."""

    def score(rollouts: Sequence[Rollout]) -> np.ndarray:
        found = model.estimate([r.query for r in rollouts], [r.response for r in rollouts])
        return np.asarray(found.reward - _SPREADS * found.spread, dtype=np.float64)

    return score


def open_reward_model(folder: str | Path) -> Any:
    """Return a saved reward model of responses.

    Raises:
        ConfigError: If it is another model.
    """
    from oirl.rewards.saving import load

    model = load(folder)
    if getattr(model, "kind", None) not in RESPONSE_MODELS:
        raise ConfigError(f"{folder} is no reward model of responses; fit one with `oirl fit LOG --target response`")
    return model


def by_model(model: Any) -> Scorer:
    """Return the scorer that asks a reward model."""
    return lambda rollouts: np.asarray(
        model.estimate([r.query for r in rollouts], [r.response for r in rollouts]).reward, dtype=np.float64
    )


def whole_rewards(rewards: np.ndarray) -> np.ndarray:
    """Return the rewards of whole responses, float64 (n,): of those by token their sums."""
    if rewards.dtype != object:
        return rewards
    return np.array([float(values.sum()) for values in rewards], dtype=np.float64)


def _by_function(name: str, function: Callable[..., Any], rollouts: Sequence[Rollout]) -> np.ndarray:
    columns: dict[str, Any] = {field: [getattr(r, field) for r in rollouts] for field in ("query", "answer", "correct")}
    columns["completion_ids"] = [None if r.token_ids is None else list(r.token_ids) for r in rollouts]
    try:
        found = function(prompts=_prompts(rollouts), completions=[r.response for r in rollouts], **columns)
    except Exception as e:  # a function of the user's raises what it likes
        raise DataError(f"the reward {name!r} failed: {type(e).__name__}: {e}") from e
    return _checked(name, found, rollouts)


def _by_server(url: str, rollouts: Sequence[Rollout]) -> np.ndarray:
    """Ask a server, again while it is unwell.

    Raises:
        DataError: If it refuses, does not answer, or answers something else.
    """
    body = {
        "queries": [r.query for r in rollouts],
        "prompts": _prompts(rollouts),
        "responses": [r.response for r in rollouts],
        "answers": [r.answer for r in rollouts],
    }
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for attempt in range(_TRIES):
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as reply:
                found = json.loads(reply.read())
            break
        except (HTTPError, URLError, OSError, ValueError) as e:
            told = isinstance(e, HTTPError) and e.code < 500 and e.code != 429
            if told or attempt + 1 == _TRIES:
                raise DataError(f"the reward server {url} failed ({attempt + 1} tries): {e}") from e
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    if not isinstance(found, dict) or "rewards" not in found:
        raise DataError(f'the reward server {url} must reply {{"rewards": [a number each]}}')
    return _checked(url, found["rewards"], rollouts)


def _prompts(rollouts: Sequence[Rollout]) -> list[str]:
    return [render(r.prompt, r.query) or r.query for r in rollouts]


def _checked(name: str, found: Any, rollouts: Sequence[Rollout]) -> np.ndarray:
    try:
        values = list(found)
        if any(isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) == 1 for value in values):
            rewards = _by_token(name, values, rollouts)
        else:
            rewards = np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"the reward {name!r} must give a number for each response: {e}") from e
    infinite = rewards.dtype != object and np.isinf(rewards).any()
    if len(rewards) != len(rollouts) or infinite:
        raise DataError(
            f"the reward {name!r} gave {len(rewards)} rewards for {len(rollouts)} responses; a finite number each is "
            "needed, or None"
        )
    return rewards


def _by_token(name: str, values: list[Any], rollouts: Sequence[Rollout]) -> np.ndarray:
    """Return rewards of tokens, an array of objects, each float64 (tokens,)."""
    rewards = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        rewards[i] = np.asarray(value, dtype=np.float64)
        tokens = rollouts[i].token_ids if i < len(rollouts) else None
        if tokens is None or rewards[i].shape != (len(tokens),) or not np.isfinite(rewards[i]).all():
            raise DataError(
                f"the reward {name!r} must give each response a number, or a finite one for each of its tokens "
                f"(response {i} has {len(tokens or ())})"
            )
    return rewards
