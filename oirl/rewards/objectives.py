"""Losses of reward models, and the reward less its KL penalty. Pure functions of tensors or arrays.

Sources: Bradley and Terry (1952); Stiennon et al. (2020), eq. 1; Askell et al. (2021) for the imitation term; Touvron
et al. (2023), eq. 2 for the margin; Eisenstein et al. (2023) for centring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy.special import expit, log_expit

if TYPE_CHECKING:
    import torch

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, "torch.Tensor")


def bradley_terry_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    centring: float = 0.0,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return −mean log σ(r₊ − r₋ − m) + c · mean((r₊ + r₋)²), averaged over pairs (and heads).

    Args:
        chosen: Rewards r₊ of the preferred responses, (n,), or of several heads, (n, heads).
        rejected: Rewards r₋ of the others, of the same shape.
        margin: By how much r₊ should be ahead, m, (n,) or (n, 1); 0 when None.
        centring: c ≥ 0; draws rewards, which are free up to a constant per query, towards 0.
        weights: Weight of each term of the means, of the shape of `chosen` and about 1 on average; 1 when None.

    Returns:
        The loss, and {"ranking": its first term, "pair_accuracy": ties ½, "difference": mean of r₊ − r₋}.
    """
    from torch.nn.functional import logsigmoid

    def mean(terms: torch.Tensor) -> torch.Tensor:
        # Not divided by the weights: means of parts of a batch then add up to that of the whole.
        return terms.mean() if weights is None else (terms * weights).mean()

    difference = chosen - rejected
    ranking = mean(-logsigmoid(difference if margin is None else difference - margin))
    loss = ranking + centring * mean((chosen + rejected) ** 2)
    ahead = difference.detach()
    metrics = {
        "ranking": float(ranking.detach()),
        "pair_accuracy": float(((ahead > 0).float() + 0.5 * (ahead == 0).float()).mean()),
        "difference": float(ahead.mean()),
    }
    return loss, metrics


def bradley_terry_gradient(
    chosen: np.ndarray, rejected: np.ndarray, *, margin: np.ndarray | None = None, centring: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gradients and curvature of n times the loss of `bradley_terry_loss`, for learners that ask for them.

    Returns:
        (d/dr₊, d/dr₋, d²/dr₊²) of each pair, float (n,); the curvature in r₋ is that in r₊.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    missing = expit(-difference)
    pull = 2 * centring * (chosen + rejected)
    return -missing + pull, missing + pull, missing * (1 - missing) + 2 * centring


def preference_log_loss(difference: np.ndarray) -> float:
    """Return the mean −log σ(r₊ − r₋) over pairs, in nats."""
    return float(-log_expit(difference).mean())


def imitation_loss(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return −Σ_t log P(y₊_t | x, y₊_<t) over the tokens of each chosen response, averaged over responses.

    Args:
        logprobs: Of each token, (n, t).
        mask: 1 = a token of the response, 0 = query or padding, (n, t).
    """
    return -(logprobs * mask).sum(dim=-1).mean()


def total_reward(
    reward: ArrayOrTensor,
    logprobs: ArrayOrTensor,
    ref_logprobs: ArrayOrTensor,
    mask: ArrayOrTensor,
    *,
    kl_coef: float,
) -> ArrayOrTensor:
    """Return R(x, y) = r(x, y) − η · Σ_t (log π(y_t) − log π_ref(y_t)), the reward less the KL penalty.

    The sum is the one-sample estimate (k1) of KL(π‖π_ref) of the response; it may be negative.

    Args:
        reward: r of each response, (n,).
        logprobs: Of its tokens under the policy, (n, t).
        ref_logprobs: Of its tokens under the reference policy, (n, t).
        mask: 1 = a token of the response, (n, t).
        kl_coef: η ≥ 0.
    """
    return reward - kl_coef * ((logprobs - ref_logprobs) * mask).sum(-1)
