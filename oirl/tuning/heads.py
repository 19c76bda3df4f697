"""What a loss needs of a model's predictions, without the logits of all tokens in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from oirl.language_models import is_encoder_decoder
from oirl.tuning.losses import negative_entropy, supervised_loss, token_logprobs

_CHUNK = 1 << 25
_TOLERANCE = 1e-3
_READ = ("input_ids", "attention_mask", "decoder_input_ids")


class Terms(NamedTuple):
    """Of each predicted token, float32 (m,).

    Attributes:
        logprobs: log P of the target.
        supervised: `losses.supervised_loss`.
        negative_entropy: `losses.negative_entropy`; 0 where it is not wanted.
    """

    logprobs: torch.Tensor
    supervised: torch.Tensor
    negative_entropy: torch.Tensor


def token_terms(
    model: Any, inputs: Mapping[str, Any], label_smoothing: float, entropy: bool, *, whole: bool = False
) -> Terms:
    """Return the terms of the predicted tokens of a micro-batch by one forward pass.

    The model's head sees the predicted positions only, some at a time; their logits are computed again for the
    gradient. Padding stands on the right, where a causal model does not look, so that no attention mask is needed.

    Args:
        model: A language model, wrapped for several devices or not.
        inputs: `input_ids` (r, t), of an encoder-decoder model with `attention_mask` and `decoder_input_ids`; `row`,
            `column` and `target` (m,); `first`, the least column.
        label_smoothing: ε of the supervised loss.
        entropy: Whether the entropy is wanted.
        whole: Whether to take the model's logits as they come out of it, all at once (see `head_is_all`).
    """
    row, column, target = (inputs[name] for name in ("row", "column", "target"))
    given = {name: inputs[name] for name in _READ if name in inputs}
    places = row, column
    if "decoder_input_ids" not in inputs:
        given["logits_to_keep"] = inputs["input_ids"].shape[1] - inputs["first"]
        places = row, column - inputs["first"]

    def of_logits(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        told = token_logprobs(logits, wanted)
        supervised = supervised_loss(logits, wanted, label_smoothing=label_smoothing) if label_smoothing else -told
        broad = negative_entropy(logits) if entropy else torch.zeros_like(told)
        return torch.stack([told, supervised, broad])

    if whole:
        logits = model(**given, use_cache=False).logits
        return Terms(*of_logits(logits[places], target))

    def of_states(head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        picked = states[places]
        size = max(_CHUNK // _vocabulary(model), 1)
        if len(picked) <= size:
            return of_logits(head(picked), target)

        def part(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return of_logits(head(some), wanted)

        parts = zip(picked.split(size), target.split(size), strict=True)
        return torch.cat([checkpoint(part, some, wanted, use_reentrant=False) for some, wanted in parts], dim=1)

    with _head_replaced(_causal(model), of_states):
        return Terms(*model(**given, use_cache=False).logits)


def head_is_all(model: Any) -> bool:
    """Return whether a model's logits are those of its head: some scale or cap them afterwards."""
    causal = _causal(model)
    if causal.get_output_embeddings() is None:
        return False
    device = next(causal.parameters()).device
    ids = torch.arange(1, 9, device=device)[None] % causal.config.get_text_config().vocab_size
    place = {"row": torch.zeros(7, dtype=torch.long, device=device), "column": torch.arange(7, device=device)}
    inputs = {"input_ids": ids, **place, "target": ids[0, 1:], "first": 0}
    if is_encoder_decoder(causal.config):
        inputs |= {"attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    modes = [(module, module.training) for module in causal.modules()]
    causal.eval()
    try:
        with torch.no_grad():
            ours, theirs = (token_terms(causal, inputs, 0.0, False, whole=whole).logprobs for whole in (False, True))
    except (RuntimeError, IndexError, TypeError, ValueError):  # it does something with logits that these are not
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    return bool((ours - theirs).abs().max() < _TOLERANCE)


def _causal(model: Any) -> Any:
    """Return the causal language model within PEFT's and the wrappers for several devices."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _vocabulary(model: Any) -> int:
    return int(_causal(model).config.get_text_config().vocab_size)


@contextmanager
def _head_replaced(
    causal: Any, function: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Let a function of the head and the last hidden states stand where the head is."""
    head = causal.get_output_embeddings()
    before, own = head.__dict__.get("forward"), head.forward  # hooks may stand in the instance already
    head.forward = lambda states: function(own, states)
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before
