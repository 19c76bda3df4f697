"""Query and response as the tokens that a causal language model reads; shared by all that run one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from oirl.language_models import prompt_tokens


class Encoded(NamedTuple):
    """The tokens of a query and a response.

    Attributes:
        ids: Token ids of both, the end-of-text token last if the tokenizer has one.
        context: How many of them come before the response.
    """

    ids: list[int]
    context: int


def encode(tokenizer: Any, query: str, response: str, limit: int) -> Encoded:
    """Return the tokens of a query and a response to it.

    A tokenizer with a chat template gets the query as the user's message; without one, query and response are joined by
    an empty line. What is too long loses the beginning of the query first, then the end of the response.
    """
    asked = prompt_tokens(
        tokenizer, [{"role": "user", "content": query}] if tokenizer.chat_template else query + "\n\n"
    )
    said = tokenizer(response, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        said = [*said, tokenizer.eos_token_id]
    said = said[:limit] or asked[-1:]
    kept = max(limit - len(said), 0)
    asked = asked[-kept:] if kept else []
    return Encoded([*asked, *said], len(asked))


def by_length(rows: Sequence[Encoded], size: int) -> list[list[int]]:
    """Return batches of positions, longest rows first, so that little is padding and memory fails early."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    return [order[i : i + size] for i in range(0, len(order), size)]


def pad(rows: Sequence[Encoded], fill: int) -> tuple[Any, Any, Any]:
    """Return (ids, mask, response mask) as int64 tensors (n, t), padded on the right; 1 = a token that counts."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), fill, dtype=torch.long)
    mask, response = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        response[i, row.context : len(row.ids)] = 1
    return ids, mask, response
