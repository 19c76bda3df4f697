"""Drawing tokens so that a response depends on its own seed alone. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def uniforms(seeds: Sequence[int], n: int) -> np.ndarray:
    """Return n numbers in [0, 1) of each seed, float64 (len(seeds), n); equal on every machine."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(n) for seed in seeds]
    return np.stack(rows) if rows else np.empty((0, n))


def sampling_logprobs(logits: Any, temperature: float, top_p: float, top_k: int | None) -> Any:
    """Return log-probs after temperature, then top-k, then top-p: minus infinity where a token cannot be drawn.

    Args:
        logits: (n, v).
        temperature: Above 0.
        top_p: The likeliest tokens that together have at least this probability stay; at least one does.
        top_k: So many of the likeliest tokens stay, and those as likely as the last of them; None for all.
    """
    import torch

    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = torch.log_softmax(logprobs.masked_fill(logprobs < least, -torch.inf), dim=-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        out = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logprobs = torch.log_softmax(logprobs.masked_fill(out, -torch.inf), dim=-1)
    return logprobs


def draw(logprobs: Any, uniform: Any) -> Any:
    """Return the token at which the cumulated probability passes a number in [0, 1), int64 (n, 1).

    Args:
        logprobs: (n, v).
        uniform: (n, 1), of the same type.
    """
    import torch

    total = logprobs.exp().cumsum(dim=-1)
    token = torch.searchsorted(total, uniform * total[:, -1:], right=True)
    # Rounding may leave the number at the very end, behind tokens of no probability.
    return torch.minimum(token, (total < total[:, -1:]).sum(dim=-1, keepdim=True))


class RowDraws:
    """A logits processor of transformers that draws each row by its own seed and keeps the log-probs of what it drew.

    Args:
        seeds: One of each row.
        steps: The most tokens.
        temperature: As in `Sampling`, 0 takes the likeliest token.
        top_p: As in `Sampling`.
        top_k: As in `Sampling`.
        raw: Whether the kept log-probs are the model's own; else those after temperature, top-k and top-p.
    """

    def __init__(
        self, seeds: Sequence[int], steps: int, temperature: float, top_p: float, top_k: int | None, *, raw: bool
    ) -> None:
        self._uniforms = uniforms(seeds, steps) if temperature else None
        self._how = temperature, top_p, top_k
        self._raw = raw
        self._kept: list[Any] = []
        self._on_device: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores that leave one token of each row: what transformers' greedy search then takes."""
        import torch

        wide = scores if scores.device.type == "mps" else scores.double()
        if self._uniforms is None:
            token, logprobs = scores.argmax(dim=-1, keepdim=True), torch.log_softmax(wide, dim=-1)
        else:
            if self._on_device is None:
                self._on_device = torch.as_tensor(self._uniforms, dtype=wide.dtype, device=wide.device)
            step = len(self._kept)
            logprobs = sampling_logprobs(wide, *self._how)
            token = draw(logprobs, self._on_device[:, step : step + 1])
            if self._raw:
                logprobs = torch.log_softmax(wide, dim=-1)
        self._kept.append(logprobs.gather(-1, token))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)

    def logprobs(self) -> Any:
        """Return the log-prob of every token drawn so far, float (n, steps)."""
        import torch

        return torch.cat(self._kept, dim=-1)


class StopTexts:
    """A stopping criterion of transformers: a row ends when its new text holds one of some texts.

    That of transformers itself cannot read every tokenizer.

    Args:
        tokenizer: Decodes.
        stops: The texts.
        width: Tokens of the prompts, padding included.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int) -> None:
        self._tokenizer, self._stops, self._width = tokenizer, stops, width
        # A token may be part of a character: four of them are the longest in UTF-8.
        self._reach = 4 * max(map(len, stops)) + 4

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return which rows end, bool (n,)."""
        import torch

        start = max(self._width, input_ids.shape[1] - self._reach)
        texts = self._tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)
