"""Losses of supervised updates: pure functions of tensors. What to sum and divide by is the caller's choice."""

from __future__ import annotations

import torch


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log P of each target token, float32 (m,), in nats.

    Args:
        logits: Of the positions before the targets, (m, vocabulary).
        targets: Token ids, (m,).
    """
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def supervised_loss(logits: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return −[(1 − ε) log P(y_t) + ε · mean_v log P(v)] of each token, float32 (m,): behaviour cloning.

    Args:
        logits: Of the positions before the targets, (m, vocabulary).
        targets: Tokens of the responses, (m,).
        label_smoothing: ε in [0, 1).
    """
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)


def sequence_logprobs(logprobs: torch.Tensor, rows: torch.Tensor, n: int) -> torch.Tensor:
    """Return the sum of the log-probs of each row's tokens, (n,); a row without tokens has 0.

    Args:
        logprobs: Of tokens, (m,).
        rows: The row that each token belongs to, int64 (m,), in [0, n).
        n: Number of rows.
    """
    return torch.zeros(n, dtype=logprobs.dtype, device=logprobs.device).index_add(0, rows, logprobs)


def contrastive_loss(logprobs: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return −Σ_i log( exp P_i,own(i) / Σ_k exp P_ik ), the contrastive loss of HIR (2302.05206, section 4.3).

    It is the cross-entropy of guessing, by an output's likelihood, which of some instructions it followed. Over a
    batch (the paper), k are the instructions and queries of all rows, so P is square and `own` is 0, 1, …; over
    opposite instructions (the released code), k are the instructions that a query can have.

    Args:
        logprobs: P_ik, log-prob of output i under instruction k, summed over its tokens, (n, k). −∞ leaves one out.
        own: The instruction of each output, int64 (n,).
    """
    return torch.nn.functional.cross_entropy(logprobs.float(), own, reduction="sum")


def negative_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return Σ_v P_t(v) log P_t(v) of each position, ≤ 0, float32 (m,): added to a loss, it keeps the policy broad.

    The entropy regularisation of HIR (2302.05206, section 4.3) over whole distributions of next tokens.

    Args:
        logits: (m, vocabulary).
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return (logprobs.exp() * logprobs).sum(dim=-1)
