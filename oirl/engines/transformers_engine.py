"""The engine `transformers`: any causal language model, on CPU or GPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from oirl.engines.base import LOGPROBS_MODES, Completion, Engine, EngineError, Request, Sampling, derive_seed, refused
from oirl.engines.draws import RowDraws, StopTexts, sampling_logprobs
from oirl.errors import ConfigError, OirlError, require
from oirl.language_models import (
    Rendered,
    check_vocabulary,
    end_tokens,
    finish_text,
    folder_fingerprint,
    load_text_model,
    load_tokenizer,
    padding_id,
    prompt_tokens,
    response_tokens,
    source_tokens,
    start_token,
    token_limit,
)

_BATCHES_AHEAD = 16


class _Row(NamedTuple):
    position: int
    sample: int
    ids: list[int]
    seed: int
    room: int  # tokens that may follow


class TransformersEngine(Engine):
    """Generate with transformers: causal and encoder-decoder models, in batches of like length.

    A response depends on its request and its seed, not on what else stands in the batch, but for the rounding of
    floating-point sums. The model's own generation settings (top-k, penalties, …) are not used: what is drawn from is
    the model's distribution, after the settings of `Sampling`.

    Args:
        model: A local folder, a name on the hub, or a causal language model itself, which is then shared, not copied:
            what trains it trains the engine's.
        tokenizer: Its tokenizer, where `model` is not a name.
        adapter: Folder of a LoRA adapter (PEFT) to put on the model.
        batch_size: Responses at a time; halved where a GPU's memory does not suffice.
        device: "cpu", "cuda", "cuda:1", …; by default the GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the saved model.
        chat: Whether to give the model messages; by default if its tokenizer has a chat template.
        logprobs_mode: "raw" or "processed", see `Completion`.
        static_cache: Whether to use transformers' static key-value cache, which is compiled on GPUs.

    Raises:
        MissingPackageError: If transformers is not installed.
        ConfigError: If the model or the adapter cannot be loaded, or a parameter is not allowed.
    """

    name = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        adapter: str | None = None,
        batch_size: int = 64,
        device: str | None = None,
        dtype: str = "auto",
        chat: bool | None = None,
        logprobs_mode: str = "raw",
        static_cache: bool = False,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}; allowed: a whole number, 1 or more")
        if logprobs_mode not in LOGPROBS_MODES:
            raise ConfigError(f"logprobs_mode = {logprobs_mode!r}; allowed: {', '.join(LOGPROBS_MODES)}")
        if isinstance(model, (str, Path)):
            self.model = str(model) if adapter is None else f"{model}+{adapter}"
            self._model, self._tokenizer = _load(str(model), adapter, device, dtype)
            self._fingerprint = _fingerprint(self._model, str(model), adapter)
        elif tokenizer is None:
            raise ConfigError("a model that is not a name needs its tokenizer")
        else:
            self.model = getattr(model.config, "name_or_path", "") or type(model).__name__
            self._model, self._tokenizer = model, tokenizer
        self.chat = bool(self._tokenizer.chat_template) if chat is None else chat
        self._batch_size = batch_size
        self._logprobs_mode = logprobs_mode
        self._static = static_cache
        self._limit = token_limit(self._model, self._tokenizer)
        self._ends = end_tokens(self._model, self._tokenizer)
        self._start = start_token(self._model)

    def describe(self) -> dict[str, Any]:
        """Return engine, version, model, type of numbers and device, and a hash of the weights of a local folder."""
        import transformers

        return {
            "engine": self.name,
            "engine_version": transformers.__version__,
            "model": self.model,
            "model_fingerprint": self._fingerprint,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": self._model.device.type,
            "chat": self.chat,
            "logprobs_mode": self._logprobs_mode,
        }

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self._model.get_input_embeddings().num_embeddings)

    def tokens(self, rendered: Rendered) -> list[int]:
        """Return the tokens that the model reads of a rendered text."""
        return (prompt_tokens if self._start is None else source_tokens)(self._tokenizer, rendered)

    def response_tokens(self, text: str, *, ended: bool) -> list[int]:
        """Return the tokens of a response's text, with the end-of-text token if the model has ended it."""
        return response_tokens(self._tokenizer, self._ends, text, ended=ended)

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Yield completions batch by batch; see `Engine.stream`."""
        self.check_not_paused()
        pending = enumerate(requests)
        ahead = max(self._batch_size * _BATCHES_AHEAD // sampling.n, 1)
        while block := list(islice(pending, ahead)):
            rows: list[_Row] = []
            for position, request in block:
                found = self._rows(position, request, sampling)
                if isinstance(found, str):
                    yield position, refused(found, sampling.n)
                else:
                    rows += found
            got: dict[int, dict[int, Completion]] = {}
            for batch in self._batches(rows, sampling.max_tokens):
                self.check_not_paused()
                for row, completion in zip(batch, self._complete(batch, sampling), strict=True):
                    of_request = got.setdefault(row.position, {})
                    of_request[row.sample] = completion
                    if len(of_request) == sampling.n:
                        yield row.position, [of_request[j] for j in range(sampling.n)]

    def score(self, prompt_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the raw log-probs of tokens after a prompt by plain forward passes; see `Engine.score`."""
        return self.score_drawn(prompt_ids, token_ids, Sampling())

    def score_drawn(
        self, prompt_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[float]]:
        """Return the log-probs of tokens after a prompt as they would be drawn: after temperature, top-k and top-p."""
        pairs = list(zip(prompt_ids, token_ids, strict=True))
        if not all(prompt for prompt, _ in pairs):
            raise EngineError("tokens can only be scored after at least one token of a prompt")
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        found: list[list[float]] = [[] for _ in pairs]
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for i, logprobs in zip(batch, self._forward([pairs[i] for i in batch], sampling), strict=True):
                found[i] = logprobs
        return found

    def _load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        given = dict(weights)
        here = self._model.state_dict()
        sent = {weight.data_ptr() for name, weight in here.items() if name in given}
        # What is tied to a weight that was sent comes with it.
        missing = [name for name, weight in here.items() if name not in given and weight.data_ptr() not in sent]
        if strange := [name for name in given if name not in here] + missing:
            raise EngineError(f"the weights do not fit the model: {strange[0]!r} stands on one side only")
        self._model.load_state_dict(given, strict=False)

    def close(self) -> None:
        """Let go of the model; the memory of a GPU is given back."""
        import torch

        self._model = self._tokenizer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _rows(self, position: int, request: Request, sampling: Sampling) -> list[_Row] | str:
        try:
            ids = self.tokens(request.rendered)
        except OirlError as e:
            return str(e)
        room = min(self._limit - len(ids), sampling.max_tokens)
        if self._start is not None and room >= 0:  # the response has a decoder to itself
            room = min(self._limit, sampling.max_tokens)
        if not ids:
            return "the rendered text has no tokens"
        if room < 1:
            return f"the rendered text has {len(ids):,} tokens, and the model reads {self._limit:,} with its response"
        seeds = [request.seed, *(derive_seed(request.seed, j) for j in range(1, sampling.n))]
        return [_Row(position, j, ids, seed, room) for j, seed in enumerate(seeds)]

    def _batches(self, rows: list[_Row], max_tokens: int) -> Iterator[list[_Row]]:
        """Yield batches of like length, longest first; all rows of a batch have the same room."""
        rows = sorted(rows, key=lambda row: (-len(row.ids), row.position))
        batch: list[_Row] = []
        for row in rows:
            # Where the model's limit ends a response, the tokens left depend on the length of its own prompt.
            if len(batch) == self._batch_size or (batch and batch[0].room != row.room):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _complete(self, batch: list[_Row], sampling: Sampling) -> list[Completion]:
        import torch

        try:
            return self._run(batch, sampling)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                return refused("the memory of the GPU does not suffice")
            middle = len(batch) // 2
            self._batch_size = max(min(self._batch_size, middle), 1)
        return self._complete(batch[:middle], sampling) + self._complete(batch[middle:], sampling)

    def _run(self, batch: list[_Row], sampling: Sampling) -> list[Completion]:
        import torch
        from transformers import GenerationConfig

        began = time.perf_counter()
        fill, room, width = padding_id(self._tokenizer), batch[0].room, len(batch[0].ids)
        gaps = [width - len(row.ids) for row in batch]
        texts, ones = [row.ids for row in batch], [[1] * len(row.ids) for row in batch]
        if self._start is None:
            padded = [[fill] * gap + text for gap, text in zip(gaps, texts, strict=True)]
            marks = [[0] * gap + one for gap, one in zip(gaps, ones, strict=True)]
        else:  # the encoder may count positions from the left, and its decoder starts with one token
            padded = [text + [fill] * gap for gap, text in zip(gaps, texts, strict=True)]
            marks, width = [one + [0] * gap for gap, one in zip(gaps, ones, strict=True)], 1
        ids, mask = (torch.tensor(rows, device=self._model.device) for rows in (padded, marks))
        draws = RowDraws(
            [row.seed for row in batch],
            room,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            raw=self._logprobs_mode == "raw",
        )
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=self._ends or None,
            pad_token_id=fill,
            decoder_start_token_id=self._start,
            cache_implementation="static" if self._static else None,
        )
        stops = [StopTexts(self._tokenizer, sampling.stop, width)] if sampling.stop else []
        with torch.inference_mode(), _own_settings(self._model):
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=[draws],
                stopping_criteria=stops,
            )
        new, logprobs = out[:, width:].tolist(), draws.logprobs().tolist()
        seconds = time.perf_counter() - began
        return [
            self._completion(row, tokens, chances, sampling, seconds)
            for row, tokens, chances in zip(batch, new, logprobs, strict=True)
        ]

    def _completion(
        self, row: _Row, tokens: list[int], logprobs: list[float], sampling: Sampling, seconds: float
    ) -> Completion:
        length = next((i + 1 for i, token in enumerate(tokens) if token in self._ends), None)
        finish = "length" if length is None else "stop"
        kept, ended = tokens[:length], length is not None
        text = finish_text(self._tokenizer, kept, sampling.stop, ended=ended)
        if sampling.stop and text != finish_text(self._tokenizer, kept, ended=ended):
            finish, kept = "stop", self._until(kept, sampling.stop)
        return Completion(
            text,
            finish,
            tuple(kept),
            tuple(logprobs[: len(kept)]) if sampling.logprobs else None,
            tuple(row.ids),
            len(row.ids),
            len(kept),
            seconds,
        )

    def _until(self, tokens: list[int], stops: Sequence[str]) -> list[int]:
        """Return the tokens up to the one that completes a stop string: in a batch, padding follows it."""
        low, high = 1, len(tokens)
        while low < high:  # once the text holds a stop string, more tokens do not take it away
            middle = (low + high) // 2
            text = self._tokenizer.decode(tokens[:middle], skip_special_tokens=True)
            low, high = (low, middle) if any(stop in text for stop in stops) else (middle + 1, high)
        return tokens[:low]

    def _forward(self, pairs: list[tuple[Sequence[int], Sequence[int]]], sampling: Sampling) -> list[list[float]]:
        import torch

        rows = [[*prompt, *tokens] if self._start is None else [self._start, *tokens] for prompt, tokens in pairs]
        before = [len(prompt) if self._start is None else 1 for prompt, _ in pairs]
        ids, mask = self._padded(rows)
        given = {"input_ids": ids, "attention_mask": mask}
        if self._start is not None:
            sources, marks = self._padded([list(prompt) for prompt, _ in pairs])
            given = {"input_ids": sources, "attention_mask": marks, "decoder_input_ids": ids}
        with torch.inference_mode(), _own_settings(self._model):
            logits = self._model(**given).logits[:, :-1].float()
            if sampling.temperature:  # greedy tokens are told as those of the model
                how = sampling.temperature, sampling.top_p, sampling.top_k
                logits = sampling_logprobs(logits.flatten(0, 1), *how).view(logits.shape)
            found = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(dim=-1)
        return [
            found[i, start - 1 : start - 1 + len(tokens)].tolist()
            for i, (start, (_, tokens)) in enumerate(zip(before, pairs, strict=True))
        ]

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Any, Any]:
        """Return (ids, mask), padded on the right; 1 = a token."""
        import torch

        width, fill = max(map(len, rows)), padding_id(self._tokenizer)
        ids = [row + [fill] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return torch.tensor(ids, device=self._model.device), torch.tensor(mask, device=self._model.device)


def _load(name: str, adapter: str | None, device: str | None, dtype: str) -> tuple[Any, Any]:
    require("transformers", "tune", "the engine `transformers`")
    import torch

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype = {dtype!r}; allowed: auto, float32, bfloat16, float16")
    model, tokenizer = load_text_model(name, dtype=dtype), load_tokenizer(name)
    check_vocabulary(model, tokenizer, name)
    if adapter is not None:
        model = _put_on(model, adapter)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(place), tokenizer
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device = {place!r}: {str(e).strip().splitlines()[0]}") from e


def _put_on(model: Any, adapter: str) -> Any:
    require("peft", "tune", "a LoRA adapter")
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    try:
        adapted = PeftModel.from_pretrained(model, adapter)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        missing = wanted - set(load_peft_weights(adapter, device="cpu"))
    except Exception as e:  # PEFT and safetensors raise many kinds
        raise ConfigError(f"cannot load the adapter {adapter!r}: {str(e).strip().splitlines()[0]}") from e
    if missing:  # PEFT would leave it at a warning
        raise ConfigError(f"cannot load the adapter {adapter!r}: not one of this model, it lacks {min(missing)}")
    return adapted


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Evaluate a model without the generation settings saved with it, which transformers would fill ours up with."""
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    places = [(place, place.generation_config) for place in {id(m): m for m in (model, inner)}.values()]
    for place, _ in places:
        place.generation_config = GenerationConfig()
    modes = [(module, module.training) for module in model.modules()]  # parts of a model may be frozen
    model.eval()
    try:
        yield
    finally:
        for place, settings in places:
            place.generation_config = settings
        for module, mode in modes:
            module.training = mode


def _fingerprint(model: Any, name: str, adapter: str | None) -> str | None:
    base = folder_fingerprint(name) if Path(name).is_dir() else getattr(model.config, "_commit_hash", None)
    return base if adapter is None or not Path(adapter).is_dir() else f"{base}+{folder_fingerprint(adapter)}"
