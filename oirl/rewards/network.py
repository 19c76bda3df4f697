"""Training of a small network on rows of features, dense or sparse, with early stopping on held-out groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from oirl.rewards.embedders import Matrix
from oirl.rewards.learners import Comparisons, Target, Verdicts
from oirl.rewards.objectives import bradley_terry_loss

if TYPE_CHECKING:
    import torch

_HELD_OUT = 0.1
_FEWEST_GROUPS = 10


def train_network(
    rows: Matrix,
    target: Target,
    groups: np.ndarray,
    rng: np.random.Generator,
    *,
    hidden: Sequence[int],
    learning_rate: float,
    weight_decay: float,
    dropout: float,
    epochs: int,
    patience: int,
    batch: int,
    centring: float,
) -> list[np.ndarray]:
    """Return weights and biases, layer after layer, of the pass with the best held-out loss.

    A tenth of the groups is held out; with fewer than ten groups nothing is, and all passes are made.

    Args:
        rows: Features, (n, d).
        target: Verdicts on the rows, or comparisons of them.
        groups: Group of each row, int (n,).
        rng: For the order of rows and for what is held out; torch's own generator draws weights and dropout.
        hidden: Units of each hidden layer.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        dropout: Share of hidden units left out.
        epochs: Passes at most.
        patience: Passes without a better held-out loss after which training ends.
        batch: Rows or pairs of a step.
        centring: Weight of (s₊ + s₋)² beside the loss of each pair.
    """
    import torch

    network = _make(rows.shape[1], hidden, dropout)
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    items, held_out = _divide(target, groups, rng)
    best, kept, worse = np.inf, _weights(network), 0
    for _ in range(epochs):
        network.train()
        order = rng.permutation(items)
        for start in range(0, len(order), batch):
            loss = _loss(network, rows, target, order[start : start + batch], centring)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if not len(held_out):
            kept = _weights(network)
            continue
        network.eval()
        with torch.no_grad():
            parts = [held_out[i : i + 1024] for i in range(0, len(held_out), 1024)]
            now = sum(float(_loss(network, rows, target, p, centring)) * len(p) for p in parts) / len(held_out)
        if now < best:
            best, kept, worse = now, _weights(network), 0
        else:
            worse += 1
            if worse == patience:
                break
    return kept


def _make(width: int, hidden: Sequence[int], dropout: float) -> torch.nn.Module:
    from torch import nn

    layers: list[nn.Module] = []
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(dropout)]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, 1))


def _divide(target: Target, groups: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the items (rows or pairs) to learn from and those held out."""
    of_item = groups if isinstance(target, Verdicts) else groups[target.chosen]
    found = np.unique(of_item)
    if len(found) < _FEWEST_GROUPS:
        return np.arange(len(of_item)), np.arange(0)
    out = np.isin(of_item, rng.choice(found, max(1, round(_HELD_OUT * len(found))), replace=False))
    return np.flatnonzero(~out), np.flatnonzero(out)


def _loss(
    network: torch.nn.Module, rows: Matrix, target: Target, items: np.ndarray, centring: float = 0.0
) -> torch.Tensor:
    import torch

    if isinstance(target, Comparisons):
        chosen = network(_tensor(rows, target.chosen[items]))[:, 0]
        rejected = network(_tensor(rows, target.rejected[items]))[:, 0]
        margin = None if target.margin is None else torch.as_tensor(target.margin[items], dtype=torch.float32)
        return bradley_terry_loss(chosen, rejected, margin=margin, centring=centring)[0]
    score = network(_tensor(rows, items))[:, 0]
    runs = torch.as_tensor(target.runs[items], dtype=torch.float32)
    right = torch.as_tensor(target.successes[items], dtype=torch.float32)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(score, right / runs, weight=runs, reduction="sum")
    return loss / runs.sum()


def _tensor(rows: Matrix, index: np.ndarray) -> torch.Tensor:
    import torch

    part = rows[index]
    return torch.from_numpy(np.ascontiguousarray(part.toarray() if sp.issparse(part) else part, dtype=np.float32))


def _weights(network: torch.nn.Module) -> list[np.ndarray]:
    from torch import nn

    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    return [a for m in layers for a in (m.weight.detach().numpy().T.copy(), m.bias.detach().numpy().copy())]
