"""A causal language model with linear scalar heads at the last token, and its training on pairs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from oirl.errors import ConfigError
from oirl.rewards.encoding import Encoded, pad
from oirl.rewards.objectives import bradley_terry_loss, imitation_loss

_log = logging.getLogger(__name__)
_STATE = "progress.json"


class Pairs(NamedTuple):
    """Encoded preference pairs.

    Attributes:
        chosen: Length m.
        rejected: Length m.
        margin: Float (m,), or None.
        weights: Weight of each pair in the loss of each head, float (m, heads).
    """

    chosen: Sequence[Encoded]
    rejected: Sequence[Encoded]
    margin: np.ndarray | None
    weights: np.ndarray


class Training(NamedTuple):
    """How to train; the fields of `LanguageModelRewardModel` of the same names."""

    ranking: float
    imitation: float
    centring: float
    epochs: int
    batch: int
    micro_batch: int
    learning_rate: float
    save_every: int
    seed: int


class ScalarHeads(nn.Module):
    """Rewards r_h(x, y) = w_h · s, with s the last hidden state at the last token, of several heads h.

    Args:
        causal: A causal language model of transformers.
        heads: Number of heads; each starts at 0, so that all rewards do.
    """

    def __init__(self, causal: Any, heads: int) -> None:
        super().__init__()
        self.causal = causal
        self.head = nn.Linear(causal.config.hidden_size, heads, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)

    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states, (n, t, hidden)."""
        return self.causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def rewards(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the reward of each row by each head, (n, heads), read at its last token."""
        last = states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
        return self.head(last.float())

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        response: torch.Tensor,
        margin: torch.Tensor | None,
        weights: torch.Tensor,
        how: Training,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return λ · ranking + β · imitation of a batch, and metrics.

        Args:
            ids: Token ids, (2n, t): the chosen rows, then the rejected ones.
            mask: 1 = a token, (2n, t).
            response: 1 = a token of the response, (2n, t).
            margin: (n,), or None.
            weights: (n, heads).
            how: `ranking` is λ, `imitation` β.
        """
        n = len(ids) // 2
        states = self.states(ids, mask)
        rewards = self.rewards(states, mask)
        wide = None if margin is None else margin[:, None]
        loss, metrics = bradley_terry_loss(
            rewards[:n], rewards[n:], margin=wide, centring=how.centring, weights=weights
        )
        loss = how.ranking * loss
        if how.imitation:
            imitation = imitation_loss(*self._logprobs(states[:n], ids[:n], response[:n]))
            metrics["imitation"] = float(imitation.detach())
            loss = loss + how.imitation * imitation
        return loss, metrics

    def _logprobs(
        self, states: torch.Tensor, ids: torch.Tensor, response: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log P of each token given those before it, and the mask of those that belong to the response."""
        logits = self.causal.get_output_embeddings()(states[:, :-1]).float()
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        return logprobs, response[:, 1:].to(logprobs.dtype)


def train(
    model: ScalarHeads, pairs: Pairs, how: Training, fill: int, checkpoints: Path | None, key: str
) -> tuple[ScalarHeads, bool]:
    """Train by AdamW with a warm-up of a twentieth of the steps and linear decay, on as many devices as there are.

    Started by `accelerate launch`, every process takes its share of each batch. A run that was stopped goes on from its
    last checkpoint and ends with the same weights as one that was not.

    Args:
        model: What to train.
        pairs: Encoded pairs.
        how: Settings.
        fill: Id to pad with.
        checkpoints: Folder for checkpoints; none are written when None.
        key: Names the run: checkpoints of another one are refused.

    Returns:
        The trained model, and whether this is the first, or only, process.

    Raises:
        ConfigError: If `checkpoints` holds those of another run.
    """
    from accelerate import Accelerator

    halved = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(mixed_precision="bf16" if halved else "no")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=how.learning_rate, weight_decay=0.0)
    batches = _batches(len(pairs.chosen), how)
    steps, warm = len(batches), max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, max(0.0, (steps - s) / max(1, steps - warm)))
    )
    prepared, optimiser = accelerator.prepare(model, optimiser)
    done = _resume(accelerator, checkpoints, key, schedule)
    prepared.train()
    for step in range(done, steps):
        # With several processes, each takes every k-th pair of a batch.
        own = batches[step][accelerator.process_index :: accelerator.num_processes]
        metrics = _step(accelerator, prepared, pairs, own if len(own) else batches[step][:1], how, fill)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            _log.info("step %d of %d: %s", step + 1, steps, shown)
        if checkpoints is not None and (step + 1) % how.save_every == 0 and step + 1 < steps:
            _save(accelerator, checkpoints, key, step + 1, schedule)
    trained_model: ScalarHeads = accelerator.unwrap_model(prepared)
    return trained_model.eval(), bool(accelerator.is_main_process)


def _step(accelerator: Any, prepared: Any, pairs: Pairs, own: np.ndarray, how: Training, fill: int) -> dict[str, float]:
    """Add up the gradients of a batch, part by part, and return the metrics of its last part."""
    parts = [own[i : i + how.micro_batch] for i in range(0, len(own), how.micro_batch)]
    metrics: dict[str, float] = {}
    for i, part in enumerate(parts):
        with nullcontext() if i + 1 == len(parts) else accelerator.no_sync(prepared):
            loss, metrics = prepared(*_tensors(pairs, part, fill, accelerator.device), how)
            accelerator.backward(loss * (len(part) / len(own)))
    return metrics


def _batches(count: int, how: Training) -> list[np.ndarray]:
    rng = np.random.default_rng(how.seed)
    found: list[np.ndarray] = []
    for _ in range(how.epochs):
        order = rng.permutation(count)
        found += [order[i : i + how.batch] for i in range(0, count, how.batch)]
    return found


def _tensors(pairs: Pairs, index: np.ndarray, fill: int, device: torch.device) -> tuple[torch.Tensor | None, ...]:
    rows = [pairs.chosen[i] for i in index] + [pairs.rejected[i] for i in index]
    ids, mask, response = (t.to(device) for t in pad(rows, fill))
    margin = None if pairs.margin is None else torch.as_tensor(pairs.margin[index], dtype=torch.float32, device=device)
    return ids, mask, response, margin, torch.as_tensor(pairs.weights[index], dtype=torch.float32, device=device)


def _resume(accelerator: Any, checkpoints: Path | None, key: str, schedule: Any) -> int:
    """Load the last checkpoint, if there is one, and return how many batches are done."""
    if checkpoints is None or not checkpoints.is_dir():
        return 0
    found = sorted(checkpoints.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    whole = [p for p in found if (p / _STATE).is_file()]
    if not whole:
        return 0
    state = json.loads((whole[-1] / _STATE).read_text(encoding="utf-8"))
    if state["key"] != key:
        raise ConfigError(
            f"{checkpoints} holds checkpoints of another run (other pairs, base model or settings); remove that "
            "folder, or repeat the command that made them"
        )
    accelerator.load_state(str(whole[-1]))
    schedule.load_state_dict(state["schedule"])
    _log.info("going on after step %d", state["step"])
    return int(state["step"])


def _save(accelerator: Any, checkpoints: Path, key: str, step: int, schedule: Any) -> None:
    target = checkpoints / f"step-{step}"
    accelerator.save_state(str(target))
    if accelerator.is_main_process:
        # Written last: a checkpoint without it is not whole.
        state = {"key": key, "step": step, "schedule": schedule.state_dict()}
        partial = target / f".{_STATE}"
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(target / _STATE)
        for old in checkpoints.glob("step-*"):
            if old != target:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
