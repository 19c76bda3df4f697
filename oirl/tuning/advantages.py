"""Advantages and returns out of rewards and values. Pure functions of tensors; in masks 1 = a token of a response.

The tokens of a row stand together; padding may stand on either side, and what stands there does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages by generalised advantage estimation, and returns, each (n, t), 0 outside of the mask.

    Â_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V(s_{t+1}) − V(s_t), and R_t = Â_t + V(s_t) (Schulman et al. 2016,
    1506.02438; section 4 of 2306.02231). After the last token of a response the value is 0: the episode ends there,
    whether the model has ended it or the limit of tokens.

    Args:
        rewards: r_t, given for token t, (n, t).
        values: V(s_t) of the state before token t, (n, t).
        mask: 1 = a token of the response, (n, t).
        gamma: Discount γ in [0, 1].
        gae_lambda: λ in [0, 1]: 1 takes all rewards that follow, 0 the next value's word for them.
    """
    kept = mask.bool()
    rewards, values = rewards.masked_fill(~kept, 0.0), values.masked_fill(~kept, 0.0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_values = torch.zeros_like(following)
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        following = (delta + gamma * gae_lambda * following).masked_fill(~kept[:, t], 0.0)
        advantages[:, t] = following
        next_values = values[:, t]
    return advantages, advantages + values


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0) -> torch.Tensor:
    """Return G_t = Σ_{l ≥ 0} γ^l r_{t+l}, (n, t), 0 outside of the mask: the returns of GAE at λ = 1."""
    nothing = torch.zeros_like(rewards)
    return generalised_advantages(rewards, nothing, mask, gamma=gamma, gae_lambda=1.0)[1]


def group_advantages(rewards: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """Return R_i − mean R of the responses to the same query, (n,): the baseline of GRPO, without its scaling.

    Args:
        rewards: R_i of whole responses, (n,).
        groups: The query of each response, length n.
    """
    index = torch.as_tensor(groups, dtype=torch.long, device=rewards.device)
    exact = rewards.double()  # equal rewards are to leave nothing, not rounding
    size = int(index.max()) + 1 if len(index) else 0
    sums = torch.zeros(size, dtype=exact.dtype, device=rewards.device).index_add(0, index, exact)
    counts = torch.bincount(index, minlength=size)
    return (exact - (sums / counts.clamp(min=1))[index]).to(rewards.dtype)


def leave_one_out_advantages(rewards: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """Return R_i − mean R of the *other* responses to the same query, (n,): RLOO (Ahmadian et al. 2024, 2402.14740).

    It is n/(n − 1) times `group_advantages`; 0 where a query has one response.

    Args:
        rewards: R_i of whole responses, (n,).
        groups: The query of each response, length n.
    """
    index = torch.as_tensor(groups, dtype=torch.long, device=rewards.device)
    counts = torch.bincount(index)[index].to(rewards.dtype)
    return group_advantages(rewards, groups) * counts / (counts - 1).clamp(min=1)


def unchanged(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the advantages as they are, 0 outside of the mask."""
    return advantages.masked_fill(~mask.bool(), 0.0)


def centred(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the advantages less their mean over the mask, 0 outside of it."""
    kept = mask.bool()
    mean = advantages.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)
    return (advantages - mean).masked_fill(~kept, 0.0)


def standardised(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the advantages with mean 0 and variance 1 over the mask ("whitened"), 0 outside of it.

    What counts them, such as λ of APA, then counts standard deviations. Differences that are no more than rounding,
    below a millionth of the largest advantage or 1e-8, count as none, and all are 0.
    """
    kept = mask.bool()
    exact = advantages.masked_fill(~kept, 0.0).double()
    around = centred(exact, mask)
    deviation = (around.square().sum() / kept.sum().clamp(min=1)).sqrt()
    largest = float(exact.detach().abs().max()) if exact.numel() else 0.0
    told = deviation > max(1e-6 * largest, 1e-8)
    return (around / deviation if told else around * 0).to(advantages.dtype)


WHITENING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "none": unchanged,
    "centre": centred,
    "standardise": standardised,
}
BASELINES: dict[str, Callable[[torch.Tensor, Sequence[int]], torch.Tensor]] = {
    "group": group_advantages,
    "leave_one_out": leave_one_out_advantages,
}


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """Return 1 − Var(R − V) / Var(R) over the mask: 1 = foreseen, 0 = no better than a constant; NaN if R is constant.

    Args:
        values: V, (n, t).
        returns: R, (n, t).
        mask: 1 = a token of the response, (n, t).
    """
    kept = mask.bool()
    told, known = values[kept].double(), returns[kept].double()
    spread = known.var(correction=0) if len(known) else known.new_tensor(0.0)
    return float(1 - (known - told).var(correction=0) / spread) if spread > 0 else float("nan")
