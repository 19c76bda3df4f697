"""Folders of language models that do not fit together are refused in one line, wherever one is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pyarrow as pa
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import oirl  # noqa: E402
from oirl.errors import ConfigError  # noqa: E402
from oirl.language_models import load_language_model, load_model_body, load_text_model  # noqa: E402
from oirl.rewards.hidden_states import HiddenStateEmbedder  # noqa: E402
from oirl.rewards.language_model import LanguageModelRewardModel  # noqa: E402
from oirl_data import small_lm_path  # noqa: E402

TINY = {"vocab_size": 250, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


def changed(folder: Path, **changes: Any) -> str:
    """Return a copy of the small model whose config.json says something else."""
    copytree(small_lm_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def with_few_embeddings(folder: Path) -> str:
    copytree(small_lm_path(), folder)
    model = load_language_model(str(folder))
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)
    return str(folder)


def encoder(folder: Path, kind: str = "BertForMaskedLM") -> str:
    import transformers

    copytree(small_lm_path(), folder)
    getattr(transformers, kind)(transformers.BertConfig(**TINY)).save_pretrained(folder)
    return str(folder)


def broken(name: str, folder: Path) -> str:
    made: dict[str, Callable[[], str]] = {
        "one layer more": lambda: changed(folder, num_hidden_layers=4),
        "another width": lambda: changed(folder, intermediate_size=32),
        "few embeddings": lambda: with_few_embeddings(folder),
        "an encoder": lambda: encoder(folder),
        "an encoder without a head": lambda: encoder(folder, "BertModel"),
    }
    return made[name]()


WORDS = {
    "one layer more": "9 weights that the files",
    "another width": "other shapes",
    "few embeddings": "tokens up to 249, and the model has embeddings for 100",
    "an encoder": "encoder",
    "an encoder without a head": "weights that the files",
}


@pytest.mark.parametrize("name", WORDS)
def test_an_engine_refuses_a_model_that_does_not_fit(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = broken(name, tmp_path / "model")
    capfd.readouterr()
    with pytest.raises(ConfigError, match=WORDS[name]) as raised:
        oirl.open_engine("transformers", model)
    assert model in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", WORDS)
def test_tuning_refuses_a_model_that_does_not_fit(name: str, tmp_path: Path) -> None:
    rows = [{"query": f"How many are {i} ?", "prompt": "{query}", "response": "1"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    oirl.import_log(tmp_path / "rows.jsonl", tmp_path / "log.parquet")
    told: list[dict[str, Any]] = []
    settings = {"model": broken(name, tmp_path / "model"), "log": str(tmp_path / "log.parquet")}
    with pytest.raises(ConfigError, match=WORDS[name]):
        oirl.tune("sft", settings | {"out": str(tmp_path / "run")}, progress=told.append)
    assert not told


@pytest.mark.parametrize("name", ["one layer more", "few embeddings"])
def test_embeddings_and_rewards_refuse_a_model_that_does_not_fit(name: str, tmp_path: Path) -> None:
    model = broken(name, tmp_path / "model")
    with pytest.raises(ConfigError, match=WORDS[name]):
        HiddenStateEmbedder(model).prepare_responses(["How many ?"], ["5"])
    pairs = pa.Table.from_pylist(
        [{"pair_id": str(i), "query": f"q{i} is {'a' * i} ?", "chosen": "1", "rejected": "2"} for i in range(20)]
    )
    with pytest.raises(ConfigError, match=WORDS[name]):
        LanguageModelRewardModel(model).fit(pairs)


def test_weights_that_are_left_over_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_language_model(changed(tmp_path / "model", num_hidden_layers=2))
    assert "9 weights are no part of the model, such as model.layers.2" in caplog.text


def test_hidden_states_need_no_head(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    encoder(tmp_path / "bert", "BertModel")
    LlamaModel(LlamaConfig(**TINY)).save_pretrained(tmp_path / "llama")
    for folder in ("bert", "llama"):
        assert load_model_body(str(tmp_path / folder)) is not None
        with pytest.raises(ConfigError, match="weights that the files"):
            load_language_model(str(tmp_path / folder))


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "T5", "Bart", "Bert"])
def test_tied_weights_are_not_missing(kind: str, tmp_path: Path) -> None:
    import transformers as t

    made: dict[str, Callable[[], Any]] = {
        "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TINY, tie_word_embeddings=True)),
        "GPT2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)),
        "T5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=50, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=1)
        ),
        "Bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(vocab_size=50, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                         decoder_ffn_dim=8, encoder_attention_heads=1, decoder_attention_heads=1)
        ),
        "Bert": lambda: t.BertLMHeadModel(t.BertConfig(**TINY, is_decoder=True)),
    }  # fmt: skip
    made[kind]().save_pretrained(tmp_path)
    assert load_text_model(str(tmp_path)) is not None
