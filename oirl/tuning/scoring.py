"""The reward of responses: verdicts, a reward model, or a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oirl.errors import ConfigError, DataError
from oirl.logs.rendering import render
from oirl.registry import load_attribute
from oirl.tuning.rollouts import Rollout

Scorer = Callable[[Sequence[Rollout]], np.ndarray]
_RESPONSE_MODELS = ("response-reward-model", "preference-reward-model", "language-model-reward-model")


def open_reward(name: str) -> Scorer:
    """Return what gives responses their rewards, float64 (n,); NaN where there is none.

    Args:
        name: "verdict", "score", the folder of a reward model of responses, or `package.module:function` of TRL's
            form: f(prompts, completions, **columns) -> a number each. Columns are `query`, `answer` and `correct`.

    Raises:
        ConfigError: If it is none of these.
        ModelFileError: If the model is damaged.
    """
    if name == "verdict":
        return lambda rollouts: np.array([np.nan if r.correct is None else float(r.correct) for r in rollouts])
    if name == "score":
        return lambda rollouts: np.array([np.nan if r.score is None else r.score for r in rollouts])
    if ":" in name:
        function = load_attribute(name)
        if not callable(function):
            raise ConfigError(f"the reward {name!r} is a {type(function).__name__}, not a function")
        return lambda rollouts: _by_function(name, function, rollouts)
    from oirl.rewards.saving import load

    model = load(name)
    if getattr(model, "kind", None) not in _RESPONSE_MODELS:
        raise ConfigError(f"{name} is no reward model of responses; fit one with `oirl fit LOG --target response`")
    return lambda rollouts: np.asarray(
        model.estimate([r.query for r in rollouts], [r.response for r in rollouts]).reward, dtype=np.float64
    )


def _by_function(name: str, function: Callable[..., Any], rollouts: Sequence[Rollout]) -> np.ndarray:
    columns = {field: [getattr(r, field) for r in rollouts] for field in ("query", "answer", "correct")}
    prompts = [render(r.prompt, r.query) or r.query for r in rollouts]
    try:
        found = function(prompts=prompts, completions=[r.response for r in rollouts], **columns)
    except Exception as e:  # a function of the user's raises what it likes
        raise DataError(f"the reward {name!r} failed: {type(e).__name__}: {e}") from e
    try:
        rewards = np.array([np.nan if value is None else float(value) for value in found], dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise DataError(f"the reward {name!r} must give a number for each response: {e}") from e
    if len(rewards) != len(rollouts) or np.isinf(rewards).any():
        raise DataError(
            f"the reward {name!r} gave {len(rewards)} rewards for {len(rollouts)} responses; a finite number each is "
            "needed, or None"
        )
    return rewards
