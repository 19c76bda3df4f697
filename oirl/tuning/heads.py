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
        states: The last hidden states before the tokens, (m, hidden), of the model's type.
    """

    logprobs: torch.Tensor
    supervised: torch.Tensor
    negative_entropy: torch.Tensor
    states: torch.Tensor


def token_terms(
    model: Any,
    inputs: Mapping[str, Any],
    label_smoothing: float,
    entropy: bool,
    *,
    temperature: float = 1.0,
    whole: bool = False,
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
        temperature: Logits are divided by it.
        whole: Whether to take the model's logits as they come out of it, all at once (see `head_is_all`).
    """
    places, given = _places(inputs)
    target = inputs["target"]

    def of_logits(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = logits if temperature == 1 else logits / temperature
        told = token_logprobs(logits, wanted)
        supervised = supervised_loss(logits, wanted, label_smoothing=label_smoothing) if label_smoothing else -told
        broad = negative_entropy(logits) if entropy else torch.zeros_like(told)
        return torch.stack([told, supervised, broad])

    if whole:
        states, logits = _states_and_logits(model, given)
        logprobs, supervised, broad = of_logits(logits[places], target)
        return Terms(logprobs, supervised, broad, states[places])
    kept: list[torch.Tensor] = []

    def of_states(head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        picked = states[places]
        kept.append(picked)
        size = max(_CHUNK // _vocabulary(model), 1)
        if len(picked) <= size:
            return of_logits(head(picked), target)

        def part(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return of_logits(head(some), wanted)

        parts = zip(picked.split(size), target.split(size), strict=True)
        return torch.cat([checkpoint(part, some, wanted, use_reentrant=False) for some, wanted in parts], dim=1)

    with _head_replaced(_causal(model), of_states):
        logprobs, supervised, broad = model(**given, use_cache=False).logits
    return Terms(logprobs, supervised, broad, kept[0])


def token_states(model: Any, inputs: Mapping[str, Any], *, whole: bool = False) -> torch.Tensor:
    """Return the last hidden states before the predicted tokens, (m, hidden), without any logits; see `token_terms`."""
    places, given = _places(inputs)
    if whole:
        return _states_and_logits(model, given)[0][places]
    kept: list[torch.Tensor] = []

    def keep(_: Any, states: torch.Tensor) -> torch.Tensor:
        kept.append(states[places])
        return states[..., :1]

    with _head_replaced(_causal(model), keep):
        model(**given, use_cache=False)
    return kept[0]


def hidden_size(model: Any) -> int:
    """Return the size of a model's last hidden states."""
    return int(_causal(model).config.get_text_config().hidden_size)


def _places(inputs: Mapping[str, Any]) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Return where, among the logits that are asked for, the predicted tokens stand, and what to ask with."""
    row, column = inputs["row"], inputs["column"]
    given = {name: inputs[name] for name in _READ if name in inputs}
    if "decoder_input_ids" in inputs:
        return (row, column), given
    given["logits_to_keep"] = inputs["input_ids"].shape[1] - inputs["first"]
    return (row, column - inputs["first"]), given


def _states_and_logits(model: Any, given: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(**given, use_cache=False, output_hidden_states=True)
    states = out.decoder_hidden_states if "decoder_input_ids" in given else out.hidden_states
    return states[-1][:, -out.logits.shape[1] :], out.logits


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
