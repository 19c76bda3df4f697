"""Language models and their tokenizers, from a local folder or a hub; for all that runs or trains one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oirl.errors import ConfigError, require

_LONGEST = 4096
_UNSET = 1 << 24  # tokenizers without a limit give an absurdly large one


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


def padding_id(tokenizer: Any) -> int:
    """Return the id to pad with: masked, so that any will do where a tokenizer has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
