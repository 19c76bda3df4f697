"""Language models and their tokenizers, from a local folder or a hub; for all that runs or trains one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from logging import getLogger
from pathlib import Path
from typing import Any, TypeAlias

from oirl.errors import ConfigError, require

Rendered: TypeAlias = str | Sequence[dict[str, str]]
"""Text that a model reads as it stands, or the messages of a chat, to which its chat template is applied."""

TRAINED_PROMPTS = "trained_prompts.jsonl"
"""File in a tuned model's folder: the prompts that it was trained to be asked under; a prompt file as any other."""
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
    """Return a causal language model, as `load_tokenizer` does a tokenizer; weights are read from safetensors only.

    Raises:
        ConfigError: If it cannot be loaded, is an encoder, or has weights that its files do not hold.
    """
    require("transformers", "tune", "a language model")
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    model = _load_model(AutoModelForCausalLM, name, **options)
    kind, decodes = model.config.model_type, getattr(model.config, "is_decoder", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes and not getattr(model.config, "causal", False):
        raise ConfigError(f"{name} is an encoder ({kind}), which writes no text; name a model that does")
    return model


def load_model_body(name: str, **options: Any) -> Any:
    """Return a language model of whose hidden states use is made: an encoder will do, and one without a head."""
    require("transformers", "tune", "a language model")
    from transformers import AutoModelForCausalLM

    return _load_model(AutoModelForCausalLM, name, headless=True, **options)


def load_text_model(name: str, **options: Any) -> Any:
    """Return a causal language model, or an encoder-decoder model (T5 and the like) where its configuration says so."""
    require("transformers", "tune", "a language model")
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception:  # a folder of adapters has none; what else is wrong is told below
        config = None
    if not is_encoder_decoder(config):
        return load_language_model(name, **options)
    return _load_model(AutoModelForSeq2SeqLM, name, **options)


def is_encoder_decoder(config: Any) -> bool:
    """Return whether a model's configuration is that of an encoder with a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def start_token(model: Any) -> int | None:
    """Return the token that an encoder-decoder model's response starts after; None of a causal model."""
    if not is_encoder_decoder(model.config):
        return None
    found = getattr(model.generation_config, "decoder_start_token_id", None)
    return int(model.config.decoder_start_token_id if found is None else found)


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer with words that a model has no embeddings for.

    Tokens that were added to its vocabulary do not count: no text is read as them unless it names them.

    Raises:
        ConfigError: If so.
    """
    known = int(model.get_input_embeddings().weight.shape[0])
    added = set(tokenizer.get_added_vocab().values()) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    highest = max((i for i in tokenizer.get_vocab().values() if i not in added), default=0)
    if highest >= known:
        raise ConfigError(
            f"{name}: the tokenizer gives tokens up to {highest:,}, and the model has embeddings for {known:,} only; "
            "take both from one model"
        )


def _load_model(factory: Any, name: str, *, headless: bool = False, **options: Any) -> Any:
    """Return a model all of whose weights were in its files; what they lack would be random."""
    model, told = _load(factory, name, use_safetensors=True, output_loading_info=True, **options)
    lacking = sorted({key for key, _ in model.named_parameters()} & set(told["missing_keys"]))  # tied ones are there
    if headless:
        lacking = [key for key in lacking if key.startswith(f"{model.base_model_prefix}.")]
    if lacking:
        raise ConfigError(
            f"{name}: config.json describes {len(lacking)} weights that the files of weights do not hold, such as "
            f"{lacking[0]}; they would be random"
        )
    if spare := sorted(told["unexpected_keys"]):
        getLogger(__name__).warning("%s: %d weights are no part of the model, such as %s", name, len(spare), spare[0])
    return model


def _load(factory: Any, name: str, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for each file of weights is noise
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of the weights that do not fit is one, too; it is told of below
    try:
        return factory.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as e:  # transformers and the hub client raise many kinds, none of them ours
        hint = "" if Path(name).is_dir() else "; name a local folder where no hub can be reached"
        told = str(e).strip().splitlines()[0]
        if "ignore_mismatched_sizes" in told:  # what it points to is the table above
            told = "its weights have other shapes than config.json says"
        raise ConfigError(f"cannot load the language model {name!r}: {told}{hint}") from e
    finally:
        logging.set_verbosity(verbosity)


def token_limit(model: Any, tokenizer: Any, wanted: int | None = None) -> int:
    """Return how many tokens a text may have: the least of what is wanted and what model and tokenizer allow."""
    known = [wanted, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min([n for n in known if n and n < _UNSET], default=_LONGEST)


def padding_id(tokenizer: Any) -> int:
    """Return the id to pad with: masked, so that any will do where a tokenizer has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def prompt_tokens(tokenizer: Any, rendered: Rendered) -> list[int]:
    """Return the tokens that a model reads before it responds.

    Plain text gets the tokens that the tokenizer puts before a text, but no end-of-text token after it. Where a chat
    template knows no system message, the system message stands at the head of the user's.

    Raises:
        ConfigError: If messages are given and the tokenizer has no chat template, or the template refuses them.
    """
    if isinstance(rendered, str):
        ids = _text_tokens(tokenizer, rendered)
        return ids[:-1] if ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id else ids
    if not tokenizer.chat_template:
        raise ConfigError(
            "messages need a chat template, and this model's tokenizer has none; give it plain text (--set chat=false)"
        )
    turns = list(rendered)
    try:
        return _apply_template(tokenizer, turns)
    except Exception as e:  # templates raise what they like
        if len(turns) < 2 or turns[0]["role"] != "system":
            raise ConfigError(f"the chat template refuses the messages: {e}") from e
    merged = {"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    try:
        return _apply_template(tokenizer, [merged, *turns[2:]])
    except Exception as e:
        raise ConfigError(f"the chat template refuses the messages: {e}") from e


def source_tokens(tokenizer: Any, rendered: Rendered) -> list[int]:
    """Return the tokens that the encoder of an encoder-decoder model reads: a text with all that is put around it."""
    return _text_tokens(tokenizer, rendered) if isinstance(rendered, str) else prompt_tokens(tokenizer, rendered)


def _text_tokens(tokenizer: Any, text: str) -> list[int]:
    try:
        return list(tokenizer(text)["input_ids"])
    except (TypeError, UnicodeError) as e:  # what tokenizers raise on halves of surrogate pairs
        raise ConfigError("the text is not valid Unicode") from e


def _apply_template(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))


def finish_text(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str] = (), *, ended: bool) -> str:
    """Return the text of a response: without special tokens, cut before the first of some texts.

    Args:
        tokenizer: Decodes.
        tokens: All sampled tokens.
        stops: The texts.
        ended: Whether the last token is that at which the model has ended the response: no part of it, whatever the
            tokenizer calls it.
    """
    text = str(tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True))
    return text[: min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=len(text))]


def response_tokens(tokenizer: Any, ends: Sequence[int], text: str, *, ended: bool) -> list[int]:
    """Return the tokens of a response's text, with the end-of-text token if the response was ended there.

    Args:
        tokenizer: Encodes; the text gets no special tokens before it.
        ends: Those at which the model ends a response (`end_tokens`); the tokenizer's own is taken if it is one.
        text: The response.
        ended: Whether it was ended, rather than cut off.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id in ends else list(ends[:1])
    return ids + own if ended else ids


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens at which the model ends a response, ascending."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return sorted({found} if isinstance(found, int) else set(found or ()))


def write_trained_prompts(folder: Path, templates: Iterable[str]) -> None:
    """Write down, in a model's folder, the prompts that it was trained to be asked under, the one to use first."""
    text = "".join(json.dumps({"prompt": template}, ensure_ascii=False) + "\n" for template in templates)
    (folder / TRAINED_PROMPTS).write_text(text, encoding="utf-8")


def trained_prompts(model: str) -> list[str] | None:
    """Return the prompts that `write_trained_prompts` has written; None of a model that has none."""
    file = Path(model) / TRAINED_PROMPTS
    try:
        return [str(json.loads(line)["prompt"]) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def folder_fingerprint(folder: str | Path) -> str:
    """Return a hash of all bytes of the configuration, tokenizer and weights in the folder of a model."""
    digest = sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt", ".npz", ".ubj") and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:32]
