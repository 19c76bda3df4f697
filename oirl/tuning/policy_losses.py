"""Losses of online updates: APA, AWR, PPO, REINFORCE, values. Pure functions of tensors.

Equations are those of Zhu et al. 2023, "Fine-Tuning Language Models with Advantage-Induced Policy Alignment"
(2306.02231). Each loss is given token by token, 0 outside of the mask, in which 1 = a token of a response, and with it
metrics token by token, without gradient. The caller averages, by weights that sum to 1 over all that an update learns
from: `token_weights` or `sequence_weights`. As these are of the whole update, neither micro-batches nor devices change
what is learned.

Four policies are told apart: π_θ, the current one (`logprobs`); π_old, as it was when the responses were drawn, by the
trainer's own forward pass (`old_logprobs`); π_init, the reference (`ref_logprobs`); and what the engine said it drew
with (`engine_logprobs`). Shapes are (n, t) or (m,), the same for all arguments of a call.
"""

from __future__ import annotations

import math

import torch

Metrics = dict[str, torch.Tensor]
_LARGEST = 80.0


def token_weights(mask: torch.Tensor) -> torch.Tensor:
    """Return weights by which all tokens count alike, long responses so more than short ones, (n, t)."""
    kept = mask.bool()
    return kept / kept.sum().clamp(min=1)


def sequence_weights(mask: torch.Tensor) -> torch.Tensor:
    """Return weights by which all responses count alike, and the tokens within one, (n, t); empty rows count 0."""
    kept = mask.bool()
    lengths = kept.sum(dim=1, keepdim=True)
    return kept / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


WEIGHTS = {"token": token_weights, "sequence": sequence_weights}


def apa_loss(
    logprobs: torch.Tensor,
    anchor_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
) -> tuple[torch.Tensor, Metrics]:
    """Return (log π_θ(a|s) − Adv(s, a)/λ − log π_init(a|s))², equation (9): advantage-induced policy alignment.

    It is 0 where π_θ = π_init exp(Adv/λ): the target of equation (3) with Z(s) taken for 1 (appendix A). With
    advantages less λ log Z(s) the target is exactly that of (3).

    Args:
        logprobs: log π_θ.
        anchor_logprobs: log π_init; log π_old makes each step a proximal one instead.
        advantages: Adv.
        mask: 1 = a token of a response.
        kl_coef: λ, the only knob: the smaller, the farther the policy goes.

    Returns:
        The loss, and `target_gap`: log π_θ less its target, in nats.
    """
    logprobs, anchor_logprobs, advantages = _masked(mask, logprobs, anchor_logprobs, advantages)
    gap = logprobs - advantages.detach() / kl_coef - anchor_logprobs
    return gap.square(), {"target_gap": gap.detach().abs()}


def awr_loss(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, kl_coef: float, max_weight: float
) -> tuple[torch.Tensor, Metrics]:
    """Return −min(exp(Adv/λ), w) log π_θ(a|s), equation (6) with capped weights: advantage-weighted regression.

    As λ grows, it becomes behaviour cloning. Without a cap the loss explodes (section 4).

    Args:
        logprobs: log π_θ.
        advantages: Adv.
        mask: 1 = a token of a response.
        kl_coef: λ.
        max_weight: w.

    Returns:
        The loss, and `weight`, `capped`: the weights, and where they were capped.
    """
    logprobs, advantages = _masked(mask, logprobs, advantages)
    raw, most = (advantages / kl_coef).detach(), math.log(max_weight)
    weight = raw.clamp(max=most).exp().masked_fill(~mask.bool(), 0.0)
    capped = mask.bool() & (raw > most)
    return -weight * logprobs, {"weight": weight, "capped": capped.to(weight.dtype)}


def ppo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
) -> tuple[torch.Tensor, Metrics]:
    """Return −min(ρ Adv, clip(ρ, 1 − ε, 1 + ε) Adv) with ρ = π_θ/π_old: PPO's clipped loss (section 3.1; 1707.06347).

    Args:
        logprobs: log π_θ.
        old_logprobs: log π_old.
        advantages: Adv, of rewards from which the KL penalty is taken off already.
        mask: 1 = a token of a response.
        clip_range: ε.

    Returns:
        The loss, and `ratio`, `clipped` (where the clipped term is the lesser), `kl_old`: KL(π_old‖π_θ) by k3.
    """
    logprobs, old_logprobs, advantages = _masked(mask, logprobs, old_logprobs, advantages.detach())
    log_ratio = (logprobs - old_logprobs).clamp(max=_LARGEST)  # e^88.7 is infinite, and 0 · ∞ no gradient
    ratio, told = log_ratio.exp(), log_ratio.detach()
    free, bounded = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(free, bounded), {
        "ratio": ratio.detach().masked_fill(~mask.bool(), 0.0),
        "clipped": (bounded > free).to(told.dtype),
        "kl_old": torch.expm1(told) - told,
    }


def reinforce_loss(
    logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, Metrics]:
    """Return −Adv(s, a) log π_θ(a|s): REINFORCE with a baseline, Adv being reward less baseline.

    Its gradient under π_θ is that of the expected reward, whatever baseline of the state is taken off.

    Args:
        logprobs: log π_θ of responses that π_θ itself has drawn.
        advantages: Adv.
        mask: 1 = a token of a response.
    """
    logprobs, advantages = _masked(mask, logprobs, advantages)
    return -advantages.detach() * logprobs, {}


def interpolated_loss(
    sampled_loss: torch.Tensor, reference_logprobs: torch.Tensor, reference_weights: torch.Tensor, *, mle_coef: float
) -> torch.Tensor:
    """Return −J − α Σ w log π_θ(reference): reward interpolated with likelihood, a scalar.

    Args:
        sampled_loss: −J of sampled responses, averaged already, such as Σ w · `reinforce_loss`; a scalar.
        reference_logprobs: log π_θ of the tokens of reference responses, any shape.
        reference_weights: Their weights, which sum to 1, the same shape.
        mle_coef: α.
    """
    counted = reference_logprobs.masked_fill(reference_weights == 0, 0.0)
    return sampled_loss - mle_coef * (reference_weights * counted).sum()


def value_loss(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
    """Return ½ (V_θ(s) − R)²: the squared loss of the value network (section 4).

    Args:
        values: V_θ.
        returns: R.
        mask: 1 = a token of a response.
    """
    values, returns = _masked(mask, values, returns)
    return (values - returns).square() / 2, {}


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, *, clip_range: float
) -> tuple[torch.Tensor, Metrics]:
    """Return ½ max((V_θ − R)², (clip(V_θ, V_old ± ε) − R)²): values move by at most ε for a set of rollouts.

    Args:
        values: V_θ.
        old_values: V when the responses were drawn.
        returns: R.
        mask: 1 = a token of a response.
        clip_range: ε, in units of the reward.

    Returns:
        The loss, and `value_clipped`: where the clipped term is the greater.
    """
    values, old_values, returns = _masked(mask, values, old_values, returns)
    bounded = torch.maximum(torch.minimum(values, old_values + clip_range), old_values - clip_range)
    free, clipped = (values - returns).square(), (bounded - returns).square()
    return torch.maximum(free, clipped) / 2, {"value_clipped": (clipped > free).to(values.dtype)}


def importance_weights(
    old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, mask: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """Return min(π_old/π_engine, C) of each token, 0 outside of the mask: truncated importance sampling.

    What the engine draws from is not quite π_old, as kernels and number types differ; a loss times these weights is
    one under π_old, up to the cap.

    Args:
        old_logprobs: log π_old by the trainer's forward pass.
        engine_logprobs: What the engine told.
        mask: 1 = a token of a response.
        cap: C, at least 1.
    """
    old_logprobs, engine_logprobs = _masked(mask, old_logprobs, engine_logprobs)
    return (old_logprobs - engine_logprobs).exp().clamp(max=cap).masked_fill(~mask.bool(), 0.0)


def _masked(mask: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return values with 0 outside of the mask, so that not even a NaN there reaches a gradient."""
    return tuple(value.masked_fill(~mask.bool(), 0.0) for value in values)
