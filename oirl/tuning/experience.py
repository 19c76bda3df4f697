"""What an iteration of online updates learns from: tokens, log-probs, rewards, values, advantages; and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from oirl.tuning.advantages import BASELINES, WHITENING, explained_variance, generalised_advantages
from oirl.tuning.examples import Example
from oirl.tuning.kl import kl_k1, kl_k3
from oirl.tuning.online_settings import Online, Ppo
from oirl.tuning.shaping import at_last_token, penalised_rewards


@dataclass(frozen=True, slots=True)
class Measured:
    """What forward passes say of the tokens of responses, each float32 (n, t) on the CPU, 0 after a response.

    Attributes:
        mask: 1 = a token of a response, bool.
        old_logprobs: log π_old, of the policy as it is before it is updated.
        ref_logprobs: log π_init.
        entropy: Of the policy's distribution of each token, in nats.
        values: V before each token; None without a value network or head.
        engine_logprobs: What the engine told, NaN where it told nothing.
    """

    mask: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None
    engine_logprobs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Experience:
    """What is learned from.

    Attributes:
        examples: Tokens, length n.
        measured: Of their tokens.
        advantages: (n, t), whitened as the settings say.
        returns: What values are fitted to, (n, t); None where there are none.
    """

    examples: list[Example]
    measured: Measured
    advantages: torch.Tensor
    returns: torch.Tensor | None


def response_mask(lengths: Sequence[int]) -> torch.Tensor:
    """Return which places are tokens of responses, bool (n, longest), the responses standing on the left."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def by_token(values: Sequence[Sequence[float] | None], mask: torch.Tensor) -> torch.Tensor:
    """Return numbers of tokens as float32 (n, t); NaN for a response that has none, 0 after a response."""
    found = torch.zeros(mask.shape)
    for row, some in enumerate(values):
        length = int(mask[row].sum())
        found[row, :length] = torch.tensor(some) if some is not None and len(some) == length else torch.nan
    return found


def token_rewards(
    rewards: np.ndarray, finished: Sequence[bool], mask: torch.Tensor, how: Online, deviation: float
) -> torch.Tensor:
    """Return r_t, float32 (n, t): scaled, cut, less the penalty of responses that were cut off.

    A reward of a whole response stands at its last token. Scale and cut apply to each number that is given.

    Args:
        rewards: Float (n,), or objects with the rewards of tokens.
        finished: Whether a response was ended by the model, length n.
        mask: 1 = a token of a response.
        how: Says how.
        deviation: The standard deviation of all rewards so far.
    """
    parted = rewards.dtype == object
    given = by_token([list(row) for row in rewards], mask) if parted else torch.tensor(rewards, dtype=torch.float64)
    if how.reward_scale == "running":
        given = given / deviation
    if how.reward_clip is not None:
        given = given.clamp(-how.reward_clip, how.reward_clip)
    placed = given.float() if parted else at_last_token(given.float(), mask)
    cut = torch.tensor([how.missing_eos_penalty * (not done) for done in finished])
    return placed - at_last_token(cut, mask)


def make_experience(
    examples: list[Example],
    measured: Measured,
    rewards: torch.Tensor,
    queries: Sequence[int],
    how: Online,
    kl_coef: float,
) -> Experience:
    """Return what is learned from.

    Args:
        examples: Length n.
        measured: Of their tokens.
        rewards: Of `token_rewards`, (n, t).
        queries: The query of each, length n.
        how: Says how.
        kl_coef: The KL coefficient now; PPO takes it off the rewards.
    """
    mask = measured.mask
    if isinstance(how, Ppo):
        rewards = penalised_rewards(rewards, measured.old_logprobs, measured.ref_logprobs, mask, kl_coef=kl_coef)
    if measured.values is None:
        whole = BASELINES[how.baseline](rewards.sum(dim=1), queries)
        advantages, returns = (whole[:, None] * mask), None
    else:
        advantages, returns = generalised_advantages(
            rewards, measured.values, mask, gamma=how.gamma, gae_lambda=how.gae_lambda
        )
    return Experience(examples, measured, WHITENING[how.whiten](advantages, mask), returns)


def experience_figures(experience: Experience, rewards: torch.Tensor) -> dict[str, Any]:
    """Return metrics of an iteration's experience under stable names.

    Returns:
        `kl`, `kl_k3`: KL of a response from the reference, in nats, by two estimators; `kl_token`, `kl_k3_token`: of a
        token. `entropy` of a token, in nats. `tokens_mean`: length of a response. `shaped_reward`: mean of what
        advantages are made from. `advantage_deviation`. With values `value_mean`, `explained_variance`. Of what an
        engine told `engine_gap` (mean |log π_old − log π_engine|), `engine_ratio_max`.
    """
    m = experience.measured
    mask, tokens = m.mask, int(m.mask.sum())
    k1, k3 = kl_k1(m.old_logprobs, m.ref_logprobs), kl_k3(m.old_logprobs, m.ref_logprobs)
    found: dict[str, float | None] = {
        "kl": float(k1.sum(dim=1).mean()),
        "kl_k3": float(k3.sum(dim=1).mean()),
        "kl_token": float(k1.sum() / tokens),
        "kl_k3_token": float(k3.sum() / tokens),
        "entropy": float(m.entropy.sum() / tokens),
        "tokens_mean": tokens / len(mask),
        "shaped_reward": float(rewards.sum(dim=1).mean()),
        "advantage_deviation": float(experience.advantages[mask].std(correction=0)),
    }
    if m.values is not None and experience.returns is not None:
        told = explained_variance(m.values, experience.returns, mask)
        found["value_mean"] = float(m.values[mask].mean())
        found |= {"explained_variance": None if np.isnan(told) else told}
    known = mask & ~m.engine_logprobs.isnan()
    if known.any():
        gap = (m.old_logprobs - m.engine_logprobs)[known]
        found |= {"engine_gap": float(gap.abs().mean()), "engine_ratio_max": float(gap.exp().max())}
    return found


def experience_hash(examples: Sequence[Example], rewards: torch.Tensor) -> str:
    """Return a hash of what an iteration learns from: tokens and rewards."""
    digest = blake2b(digest_size=16)
    for example in examples:
        digest.update(repr((example.context, example.response)).encode())
    digest.update(rewards.numpy().tobytes())
    return digest.hexdigest()
