"""Sample replies from the small language model, so that each reply depends only on its own key."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A top_p of 1.0 cuts nothing off, so the sampling below has no step for it.
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 64}
BATCH_SIZE = 128


@dataclass(frozen=True)
class Reply:
    """A sampled reply: its text and the tokens in (rendered) and out (with the end token)."""

    text: str
    tokens_in: int
    tokens_out: int


def is_right(response: str, answer: int) -> bool:
    """Tell whether the last number of a response is the answer."""
    numbers = re.findall(r"\d+", response)
    return bool(numbers) and int(numbers[-1]) == answer


@torch.inference_mode()
def _sample_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rendered: Sequence[str], keys: Sequence[str]
) -> list[Reply]:
    limit = SAMPLING["max_new_tokens"]
    # One stream of draws per reply, not one per batch: a reply then does not depend on its neighbours, and
    # rounding differences between machines matter only where a draw falls on the edge between two tokens.
    streams = [random.Random(key) for key in keys]
    draws = torch.tensor([[stream.random() for _ in range(limit)] for stream in streams], dtype=torch.float64)
    inputs = tokenizer(list(rendered), padding=True, padding_side="left", return_tensors="pt")
    mask = inputs["attention_mask"]
    ids, past = inputs["input_ids"], None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    done = torch.zeros(len(keys), dtype=torch.bool)
    produced: list[torch.Tensor] = []
    for step in range(limit):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        past = out.past_key_values
        chances = torch.softmax(out.logits[:, -1].double() / SAMPLING["temperature"], dim=-1)
        total = chances.cumsum(-1)
        token = torch.searchsorted(total, draws[:, step : step + 1].contiguous(), right=True)
        token = token.clamp(max=chances.shape[-1] - 1)
        token[done] = tokenizer.pad_token_id
        produced.append(token)
        done |= token[:, 0] == tokenizer.eos_token_id
        if bool(done.all()):
            break
        ids = token
        mask = torch.cat([mask, torch.ones_like(token)], dim=-1)
        positions = positions[:, -1:] + 1
    replies = []
    rows = torch.cat(produced, dim=-1).tolist()
    for row, tokens_in in zip(rows, inputs["attention_mask"].sum(-1).tolist(), strict=True):
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        replies.append(Reply(text.strip(), tokens_in, end))
    return replies


def sample_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rendered: Sequence[str], keys: Sequence[str]
) -> list[Reply]:
    """Sample one reply to each rendered text.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: Its tokenizer.
        rendered: The rendered texts.
        keys: One key per reply, which seeds its draws.
    """
    replies: list[Reply] = []
    for start in range(0, len(rendered), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        replies += _sample_batch(model, tokenizer, rendered[part], keys[part])
    return replies
