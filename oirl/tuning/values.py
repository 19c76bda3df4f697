"""What foretells the reward: a network of its own, or a head on the policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from oirl.language_models import load_text_model
from oirl.tuning.heads import head_is_all, hidden_size, token_states
from oirl.tuning.online_settings import Online
from oirl.tuning.policy import Policy, train_last_layers, with_adapters

_FILE = "value.safetensors"


class ValueHead(nn.Module):
    """V(s) = w · h + b with h the hidden state before a token; w = b = 0 at first, so that nothing is promised.

    Args:
        size: Of h.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return V, float32 (m,), of states (m, hidden)."""
        return self.linear(states.float())[:, 0]


class ValueNetwork(nn.Module):
    """A language model of its own, at first the initial policy, with a value head (2306.02231, section 4).

    Args:
        settings: Names the model, its adapters or trained layers.
    """

    def __init__(self, settings: Online) -> None:
        super().__init__()
        body = load_text_model(settings.model, dtype="float32")
        self._whole = not head_is_all(body)
        size = hidden_size(body)
        if settings.lora_rank:
            body = with_adapters(body, settings)
        elif settings.train_layers:
            train_last_layers(body, settings.train_layers)
        head, embeddings = body.get_output_embeddings(), body.get_input_embeddings()
        if head is not None and head.weight is not embeddings.weight:
            head.requires_grad_(False)  # what it says of words is not asked for
        self.body, self.head = body, ValueHead(size)

    def forward(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return V(s_t) before each predicted token of a micro-batch of `trainer.collate`, float32 (m,)."""
        return self.head(token_states(self.body, inputs, whole=self._whole))


def open_value(settings: Online, policy: Policy) -> nn.Module | None:
    """Return what foretells the reward, on the policy's device; None where other responses do it."""
    if settings.baseline == "value_network":
        return ValueNetwork(settings).to(policy.device)
    if settings.baseline == "value_head":
        return ValueHead(hidden_size(policy.model)).to(policy.device)
    return None


def save_value(value: nn.Module, folder: Path) -> None:
    """Write what is trained of it."""
    trained = {name: p.detach().contiguous() for name, p in value.named_parameters() if p.requires_grad}
    save_file(trained, str(folder / _FILE))


def load_value(value: nn.Module, folder: Path) -> None:
    """Take what `save_value` has written."""
    known = load_file(str(folder / _FILE))
    with torch.no_grad():
        for name, parameter in value.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(known[name])
