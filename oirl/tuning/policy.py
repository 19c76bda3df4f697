"""The policy: the language model that is tuned, with its tokenizer, its adapters and the engine that shares it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from oirl.engines.base import Engine, Probe
from oirl.engines.opening import open_engine
from oirl.engines.parity import THRESHOLDS
from oirl.engines.transformers_engine import TransformersEngine
from oirl.errors import ConfigError, require
from oirl.language_models import (
    Rendered,
    check_vocabulary,
    end_tokens,
    load_text_model,
    load_tokenizer,
    prompt_tokens,
    source_tokens,
    start_token,
    token_limit,
)
from oirl.tuning.online_settings import Online
from oirl.tuning.settings import Settings

SHARED = "transformers"
_SHARED_PARAMS = {"batch_size", "static_cache"}


class Policy:
    """A causal or encoder-decoder language model to be tuned; weights are float32, whatever they are computed in.

    Args:
        settings: Names the model and its adapters.

    Attributes:
        model: The model, on its device; with LoRA, PEFT's around it.
        tokenizer: Its tokenizer.
        ends: Tokens at which it ends a response.
        start: The token that a response starts after in the decoder of an encoder-decoder model; None of a causal one.
        limit: The most tokens of an example.

    Raises:
        ConfigError: If it cannot be loaded.
        MissingPackageError: If a package is missing.
    """

    def __init__(self, settings: Settings) -> None:
        require("accelerate", "tune", "tuning a language model")
        from accelerate import PartialState

        self._name = settings.model
        if (Path(settings.model) / "adapter_config.json").is_file():
            raise ConfigError(
                f"{settings.model} holds adapters, not a model; merge them into their base first (PEFT: "
                "merge_and_unload, save_pretrained), or tune the base"
            )
        if settings.bf16 and not torch.cuda.is_available():
            raise ConfigError("bf16 needs a GPU, and there is none; leave it out")
        self.tokenizer = load_tokenizer(settings.model)
        torch.manual_seed(settings.seed)
        model = load_text_model(settings.model, dtype="float32")
        check_vocabulary(model, self.tokenizer, settings.model)
        self.start = start_token(model)
        if self.start is None and "logits_to_keep" not in _forward_parameters(model):
            raise ConfigError(f"models of the kind {type(model).__name__} cannot be tuned: they take no logits_to_keep")
        self.ends = end_tokens(model, self.tokenizer)
        if not self.ends:
            raise ConfigError(f"{settings.model} has no token that ends a response (eos_token_id): it would never stop")
        self.limit = token_limit(model, self.tokenizer, settings.max_length)
        self.lora = bool(settings.lora_rank)
        if self.lora:
            model = with_adapters(model, settings)
        if isinstance(settings, Online) and settings.train_layers:
            train_last_layers(model, settings.train_layers)
        self._initial: Any = None
        halved = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self._halved = halved if settings.bf16 is None else settings.bf16
        self._device = PartialState().device
        self.model = model.to(self._device)

    def tokens(self, rendered: Rendered) -> list[int]:
        """Return the tokens that the model reads of a rendered text before it responds."""
        return (prompt_tokens if self.start is None else source_tokens)(self.tokenizer, rendered)

    def engine(self) -> TransformersEngine:
        """Return an engine that draws from the policy as it is at the time."""
        return TransformersEngine(self.model, self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def number_type(self) -> str:
        """What it is computed in: a key of `parity.THRESHOLDS`."""
        return "bfloat16" if self._halved else "float32"

    @contextmanager
    def reference(self) -> Iterator[TransformersEngine]:
        """Give an engine of the initial model; see `reference_model`."""
        with self.reference_model() as model:
            yield TransformersEngine(model, self.tokenizer)

    @contextmanager
    def reference_model(self) -> Iterator[Any]:
        """Give the initial model: with LoRA the adapters are off meanwhile, else it is a copy that is then kept."""
        if self.lora:
            with self.model.disable_adapter():
                yield self.model
            return
        if self._initial is None:
            self._initial = load_text_model(self._name, dtype="float32").to(self._device).requires_grad_(False).eval()
        yield self._initial

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which the policy is to be run outside of training: bfloat16 if it is trained so."""
        return torch.autocast(self._device.type, torch.bfloat16) if self._halved else nullcontext()

    def save(self, folder: Path) -> None:
        """Write weights (of LoRA the adapters) and tokenizer to a folder."""
        self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # a card that peft writes

    def load(self, folder: Path) -> None:
        """Take the weights that `save` has written."""
        if self.lora:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device="cpu"))
            return
        other = load_text_model(str(folder), dtype="float32")
        self.model.load_state_dict(other.state_dict())

    def send(self, engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
        """Send the weights to an engine of its own, and prove that they arrived."""
        probe = self._probe(prompts)
        model = self.model
        base = [(w, w.detach().clone()) for name, w in model.named_parameters() if ".base_layer." in name]
        if self.lora:
            model.merge_adapter()
        try:
            engine.update_weights(_plain_weights(model), probe)
        finally:
            if self.lora:
                model.unmerge_adapter()
                with torch.no_grad():  # taking off again what was added rounds, and the reference would drift
                    for weight, before in base:
                        weight.copy_(before)

    def _probe(self, prompts: Sequence[Sequence[int]]) -> Probe:
        with self.computing():
            drawn = self.engine()
            tokens = [list(prompt[-8:]) for prompt in prompts]
            logprobs = drawn.score(prompts, tokens)
        return Probe(prompts, tokens, logprobs, THRESHOLDS[self.number_type])


def train_last_layers(model: Any, count: int) -> None:
    """Freeze all of a model but its last layers, what follows them, and a head that is not tied to the embeddings.

    Raises:
        ConfigError: If it has no such layers, or fewer.
    """
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    stacks = [m for m in inner.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = list(max(stacks, key=len, default=()))
    if len(layers) < count:
        raise ConfigError(f"train_layers = {count}, and the model has {len(layers)} layers")
    model.requires_grad_(False)
    trained = [*layers[-count:], *(m for name, m in inner.named_children() if "norm" in name or name == "ln_f")]
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        trained.append(head)
    for module in trained:
        module.requires_grad_(True)


def open_sampler(
    policy: Policy, name: str, model: str, params: dict[str, Any], *, updated: bool, logprobs_mode: str | None = None
) -> Engine:
    """Return the engine that rollouts are drawn with: one that shares the policy's weights, or one of its own.

    Args:
        policy: What is tuned.
        name: Of the engine.
        model: What the engine calls the initial model.
        params: Of the engine.
        updated: Whether it will be sent new weights.
        logprobs_mode: Which log-probs it tells, where an engine can choose and `params` does not; None for its default.

    Raises:
        ConfigError: If it does not know a parameter, or cannot take new weights.
    """
    if name == SHARED:
        if strange := set(params) - _SHARED_PARAMS:
            raise ConfigError(
                f"engine_params: {min(strange)!r} is not for the engine that shares the policy; allowed: "
                f"{', '.join(sorted(_SHARED_PARAMS))}"
            )
        return TransformersEngine(policy.model, policy.tokenizer, logprobs_mode=logprobs_mode or "raw", **params)
    if logprobs_mode and name == "vllm":
        params = {"logprobs_mode": logprobs_mode} | params
    known = {k: v for k, v in params.items() if k != "model"}
    engine = open_engine(name, str(params.get("model", model)), known)
    if updated and not engine.takes_weights:
        engine.close()
        hint = "; of a vLLM server, name weights_folder under engine_params" if name == "openai" else ""
        raise ConfigError(
            f"the engine {name!r} cannot take new weights, which every iteration after the first needs{hint}"
        )
    return engine


def _plain_weights(model: Any) -> Iterable[tuple[str, Any]]:
    for name, weight in model.state_dict().items():
        if "lora_" not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), weight


def _forward_parameters(model: Any) -> Any:
    from inspect import signature

    return signature(model.forward).parameters


def with_adapters(model: Any, settings: Settings) -> Any:
    """Return a model with LoRA adapters on all linear layers; only they are trained."""
    require("peft", "tune", "lora_rank above 0")
    from peft import LoraConfig, get_peft_model

    kind = "CAUSAL_LM" if start_token(model) is None else "SEQ_2_SEQ_LM"
    alpha = settings.lora_alpha or 2 * settings.lora_rank
    config = LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type=kind)
    return get_peft_model(model, config)
