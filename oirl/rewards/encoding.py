"""Query and response as the tokens that a causal language model reads; shared by all that run one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oirl.errors import ConfigError, require

_LONGEST = 4096
_UNSET = 1 << 24  # tokenizers without a limit give an absurdly large one


class Encoded(NamedTuple):
    """The tokens of a query and a response.

    Attributes:
        ids: Token ids of both, the end-of-text token last if the tokenizer has one.
        context: How many of them come before the response.
    """

    ids: list[int]
    context: int


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model: a name on the hub, or a local folder; no code of the folder is run.

    Raises:
        MissingPackageError: If transformers is not installed.
        ConfigError: If it cannot be loaded.
    """
    require("transformers", "tune", "a language model")
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name)


def load_language_model(name: str, **options: Any) -> Any:
    """Return a causal language model, as `load_tokenizer` does a tokenizer; weights are read from safetensors only."""
    require("transformers", "tune", "a language model")
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, use_safetensors=True, **options)


def _load(factory: Any, name: str, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for each file of weights is noise
    try:
        return factory.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as e:  # transformers and the hub client raise many kinds, none of them ours
        hint = "" if Path(name).is_dir() else "; name a local folder where no hub can be reached"
        raise ConfigError(f"cannot load the language model {name!r}: {str(e).strip().splitlines()[0]}{hint}") from e


def token_limit(model: Any, tokenizer: Any, wanted: int | None = None) -> int:
    """Return how many tokens a text may have: the least of what is wanted and what model and tokenizer allow."""
    known = [wanted, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min([n for n in known if n and n < _UNSET], default=_LONGEST)


def encode(tokenizer: Any, query: str, response: str, limit: int) -> Encoded:
    """Return the tokens of a query and a response to it.

    A tokenizer with a chat template gets the query as the user's message; without one, query and response are joined by
    an empty line. What is too long loses the beginning of the query first, then the end of the response.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": query}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        asked = tokenizer(query + "\n\n")["input_ids"]
        if tokenizer.eos_token_id is not None and asked and asked[-1] == tokenizer.eos_token_id:
            asked = asked[:-1]
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


def padding_id(tokenizer: Any) -> int:
    """Return the id to pad with: masked, so that any will do where a tokenizer has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
