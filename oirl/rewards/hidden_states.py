"""Hidden states of a causal language model as features of (query, response)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oirl.errors import ConfigError, require
from oirl.language_models import check_vocabulary, load_model_body, load_tokenizer, padding_id, token_limit
from oirl.rewards.cache import cached_rows
from oirl.rewards.embedders import DenseEmbedder, DenseRows, folder_state
from oirl.rewards.encoding import Encoded, by_length, encode, pad

POOLINGS = ("last", "mean")
_BATCH = 32
_PAIR = "\x1e\x1foirl query and response\x1f"


class HiddenStateEmbedder(DenseEmbedder):
    """Vectors of query and response read as one text by a causal language model, cached on disk.

    Args:
        spec: `MODEL[,layer=L][,pooling=last|mean]`: a name on the hub or a local folder; the layer, counted as in
            Python (0 = embeddings, −1 = the last, by default); the state at the last token (by default), or the mean
            over the tokens of the response.
    """

    def __init__(self, spec: str) -> None:
        require("transformers", "tune", "the embedder 'hidden-states'")
        self._model_name, self._layer, self._pooling = _parse(spec)
        self._loaded: tuple[Any, Any, int] | None = None
        name = f"hidden-states:{self._model_name},layer={self._layer},pooling={self._pooling}"
        super().__init__(self._of_texts, name, f"{name}-{folder_state(Path(self._model_name))}")

    def prepare_responses(self, queries: Sequence[str], responses: Sequence[str]) -> DenseRows:
        """Return one vector per (query, response), float32 (n, d)."""
        texts = [_PAIR + json.dumps([q, r]) for q, r in zip(queries, responses, strict=True)]
        return DenseRows(cached_rows(self._cache_key, texts, self._of_texts))

    def _of_texts(self, texts: list[str]) -> np.ndarray:
        """Return the vectors of texts, and of queries with responses that `prepare_responses` has made texts of."""
        import torch

        model, tokenizer, limit = self._load()
        rows = [self._encode(tokenizer, text, limit) for text in texts]
        vectors = np.empty((len(rows), model.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for batch in by_length(rows, _BATCH):
                ids, mask, response = (t.to(model.device) for t in pad([rows[i] for i in batch], padding_id(tokenizer)))
                out = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
                states = out.hidden_states[self._layer].float()
                if self._pooling == "mean":
                    weight = response[:, :, None].float()
                    vector = (states * weight).sum(dim=1) / weight.sum(dim=1)
                else:
                    vector = states[torch.arange(len(batch)), mask.sum(dim=1) - 1]
                vectors[batch] = vector.cpu().numpy()
        return vectors

    def _encode(self, tokenizer: Any, text: str, limit: int) -> Encoded:
        query, response = json.loads(text.removeprefix(_PAIR)) if text.startswith(_PAIR) else ("", text)
        return encode(tokenizer, query, response, limit)

    def _load(self) -> tuple[Any, Any, int]:
        if self._loaded is None:
            import torch

            tokenizer = load_tokenizer(self._model_name)
            model = load_model_body(self._model_name).eval()
            check_vocabulary(model, tokenizer, self._model_name)
            layers = int(model.config.num_hidden_layers)
            if not -layers - 1 <= self._layer <= layers:
                raise ConfigError(f"layer={self._layer}: {self._model_name} has layers {-layers - 1} to {layers}")
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = model, tokenizer, token_limit(model, tokenizer)
        return self._loaded


def _parse(spec: str) -> tuple[str, int, str]:
    model, *options = spec.split(",")
    layer, pooling = -1, "last"
    for option in options:
        name, _, value = option.strip().partition("=")
        if name == "layer" and re.fullmatch(r"-?\d{1,4}", value):
            layer = int(value)
        elif name == "pooling" and value in POOLINGS:
            pooling = value
        else:
            raise ConfigError(f"hidden-states:{spec}: the form is hidden-states:MODEL[,layer=-1][,pooling=last|mean]")
    if not model:
        raise ConfigError("hidden-states: name a model, as hidden-states:MODEL[,layer=-1][,pooling=last|mean]")
    return model, layer, pooling
