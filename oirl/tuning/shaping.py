"""What becomes of rewards before advantages are taken from them. Pure functions; in masks 1 = a token of a response."""

from __future__ import annotations

from typing import Any

import torch

from oirl.tuning.kl import kl_k1


def penalised_rewards(
    rewards: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, *, kl_coef: float
) -> torch.Tensor:
    """Return r_t − β (log π − log π_ref)_t, (n, t), 0 outside of the mask: PPO's reward (Ziegler et al. 2019).

    Summed over a response it is R(x, y) − β log(π(y|x)/π_ref(y|x)).

    Args:
        rewards: r_t, (n, t); of a reward of whole responses all at the last token (`at_last_token`).
        logprobs: log π of the tokens by the policy that drew them, (n, t).
        ref_logprobs: log π_ref, (n, t).
        mask: 1 = a token of the response, (n, t).
        kl_coef: β.
    """
    return (rewards - kl_coef * kl_k1(logprobs, ref_logprobs)).masked_fill(~mask.bool(), 0.0)


def at_last_token(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return r_t, (n, t), that is the reward of the whole response at its last token and 0 elsewhere.

    Args:
        rewards: Of whole responses, (n,).
        mask: 1 = a token of the response, (n, t); a row without tokens has no reward.
    """
    kept = mask.bool()
    after = kept.flip(1).cumsum(1).flip(1)  # tokens from here on
    return torch.where(kept & (after == 1), rewards[:, None], torch.zeros_like(rewards[:, None]))


class RunningMoments:
    """Mean and variance of all rewards so far (Chan et al.'s way of joining two samples); its state is three numbers.

    Attributes:
        count: How many there were.
        mean: Their mean.
        squares: Sum of the squared distances from it.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: torch.Tensor) -> None:
        """Take more rewards in, (n,)."""
        n = values.numel()
        if not n:
            return
        mean, squares = float(values.mean()), float((values - values.mean()).square().sum())
        total, shift = self.count + n, mean - self.mean
        self.squares += squares + shift * shift * self.count * n / total
        self.mean += shift * n / total
        self.count = total

    def joined(self, values: torch.Tensor) -> RunningMoments:
        """Return the moments with more rewards taken in, (n,); these stay as they are."""
        found = RunningMoments()
        found.restore(self.state())
        found.add(values)
        return found

    @property
    def deviation(self) -> float:
        """The standard deviation so far; 1 where there is none."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return variance**0.5 if variance > 0 else 1.0

    def state(self) -> dict[str, Any]:
        """Return the state, for JSON."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state of `state`."""
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])
