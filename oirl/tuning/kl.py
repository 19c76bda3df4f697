"""KL divergence of a policy from its reference, estimated from drawn tokens, and controllers of what it costs. Pure."""

from __future__ import annotations

import torch


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return log π − log π_ref of drawn tokens: unbiased for KL(π‖π_ref) under π, of either sign, any shape."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return ½ (log π − log π_ref)²: biased, never negative, of low variance, any shape."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return ρ − 1 − log ρ with ρ = π_ref/π: unbiased for KL(π‖π_ref) under π, never negative, any shape."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


class FixedKl:
    """A KL coefficient that stays as it is.

    Args:
        kl_coef: It.
    """

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = kl_coef

    def update(self, kl: float, n: int) -> None:
        """Do nothing."""


class AdaptiveKl(FixedKl):
    """A KL coefficient that follows a target: β ← β (1 + clip(KL/target − 1, ±0.2) · n/horizon) (Ziegler et al. 2019).

    Args:
        kl_coef: β at first.
        target: KL of a response that is aimed at, in nats.
        horizon: Responses over which β may change by about a fifth.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(kl_coef)
        self._target, self._horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Take the mean KL of n responses, in nats, into account."""
        error = min(max(kl / self._target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * min(n / self._horizon, 1.0)
