"""Hidden states as features: the vectors of transformers itself, whatever stands beside them, and the saved form."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from conftest import make_log, make_queries

from oirl import BradleyTerryRewardModel, PromptRewardModel, load
from oirl.errors import ConfigError, ModelFileError, OirlError
from oirl.language_models import load_language_model, load_tokenizer
from oirl.records import PREFERENCE_SCHEMA
from oirl.rewards import hidden_states
from oirl.rewards.embedders import make_embedder
from oirl.rewards.hidden_states import HiddenStateEmbedder
from oirl_data import small_lm_path

BASE = str(small_lm_path())
QUERIES = ["How many apples are left ?", "Anna has 12 books and buys 3 more . How many books has Anna ?", "How ?"]
RESPONSES = ["There are 5 .", "The answer is 15 .", "Step 1: 6 x 4 = 24. Step 2: 34 - 24 = 10. The answer is 10."]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OIRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_hand(query: str, response: str, layer: int = -1, pooling: str = "last") -> np.ndarray:
    """Return the vector of one text, unpadded, straight from transformers."""
    tokenizer, model = load_tokenizer(BASE), load_language_model(BASE).eval()
    asked = tokenizer(query + "\n\n")["input_ids"]
    said = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([asked + said]), output_hidden_states=True).hidden_states[layer][0]
    return (states[-1] if pooling == "last" else states[len(asked) :].mean(dim=0)).numpy()


def vectors(spec: str, queries: list[str] = QUERIES, responses: list[str] = RESPONSES) -> np.ndarray:
    embedder = HiddenStateEmbedder(spec)
    return embedder.embed(embedder.prepare_responses(queries, responses))


@pytest.mark.parametrize(
    ("options", "layer", "pooling"),
    [
        ("", -1, "last"),
        (",layer=-1", -1, "last"),
        (",layer=0", 0, "last"),
        (",layer=2", 2, "last"),
        (",layer=3", -1, "last"),  # of three blocks the last
        (",pooling=mean", -1, "mean"),
        (", pooling=mean, layer=-2", -2, "mean"),
    ],
)
def test_vectors_are_those_of_one_text_alone(options: str, layer: int, pooling: str) -> None:
    expected = [by_hand(q, r, layer, pooling) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    found = vectors(BASE + options)
    assert found.dtype == np.float32
    assert found == pytest.approx(np.stack(expected), abs=1e-5)


def test_layers_and_poolings_differ() -> None:
    kinds = ["", ",layer=0", ",layer=1", ",layer=2", ",pooling=mean", ",layer=1,pooling=mean"]
    found = [vectors(BASE + kind)[1] for kind in kinds]
    for i, one in enumerate(found):
        assert all(np.abs(one - other).max() > 1e-3 for other in found[:i])


def test_the_mean_is_over_the_tokens_of_the_response() -> None:
    """At layer 0 a token's state is its own embedding, so that the query cannot matter."""
    said = ["There are 5 ."] * 2
    mean = vectors(f"{BASE},layer=0,pooling=mean", ["How many ?", "Anna has 12 books ."], said)
    assert mean[0] == pytest.approx(mean[1], abs=1e-6)
    higher = vectors(f"{BASE},layer=1,pooling=mean", ["How many ?", "Anna has 12 books ."], said)
    assert np.abs(higher[0] - higher[1]).max() > 1e-3


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_batches_and_order_do_not_matter(pooling: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    queries, responses = QUERIES * 12, [f"{r} {'5 ' * i}" for i, r in enumerate(RESPONSES * 12)]
    whole = vectors(f"{BASE},pooling={pooling}", queries, responses)
    monkeypatch.setenv("OIRL_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(hidden_states, "_BATCH", 5)
    turned = vectors(f"{BASE},pooling={pooling}", queries[::-1], responses[::-1])
    assert turned[::-1] == pytest.approx(whole, abs=1e-5)


def test_an_empty_response_and_a_long_one_have_finite_vectors() -> None:
    for pooling in ("last", "mean"):
        found = vectors(f"{BASE},pooling={pooling}", ["q", "", "How " * 500], ["", "5", "There " * 500])
        assert np.isfinite(found).all()


def test_texts_without_a_query_have_vectors() -> None:
    embedder = HiddenStateEmbedder(BASE)
    texts = embedder.embed(embedder.prepare(["How many ?", "Anna has 12 books ."]))
    assert texts == pytest.approx(np.stack([by_hand("", t) for t in ["How many ?", "Anna has 12 books ."]]), abs=1e-5)
    assert embedder.prepare([]).matrix.shape == (0, 128)


def test_query_and_response_are_told_apart() -> None:
    """The same words, cut elsewhere, are another question."""
    found = vectors(f"{BASE},pooling=mean", ["How many books ?", "How many"], ["5", "books ? 5"])
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_a_query_may_hold_any_character() -> None:
    query, response = "How many\x1e apples ?", "There are 5 ."
    assert vectors(BASE, [query], [response])[0] == pytest.approx(by_hand(query, response), abs=1e-5)


def test_what_stands_in_the_cache_is_not_computed_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = vectors(BASE)
    (file,) = cache.glob("*.sqlite")
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*) FROM vectors").fetchone() == (3,)

    def refuse(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(HiddenStateEmbedder, "_of_texts", refuse)
    assert (vectors(BASE) == first).all()
    assert (vectors(BASE, QUERIES[::-1], RESPONSES[::-1]) == first[::-1]).all()
    for other in (",layer=1", ",pooling=mean"):
        with pytest.raises(AssertionError, match="computed again"):
            vectors(BASE + other)


def test_another_content_of_the_folder_is_another_cache(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(BASE, folder)
    before = vectors(str(folder))
    model = load_language_model(str(folder))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(folder)
    assert np.abs(vectors(str(folder)) - before).max() > 1e-3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "name a model"),
        (",layer=1", "name a model"),
        (f"{BASE},layer=x", "the form is"),
        (f"{BASE},layer=", "the form is"),
        (f"{BASE},layer=--1", "the form is"),
        (f"{BASE},pooling=max", "the form is"),
        (f"{BASE},polling=mean", "the form is"),
        (f"{BASE},3", "the form is"),
    ],
)
def test_wrong_specs_are_refused_at_once(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HiddenStateEmbedder(spec)


@pytest.mark.parametrize("layer", [4, -5, 99])
def test_a_layer_that_is_not_there_is_named(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer={layer}.* -4 to 3"):
        vectors(f"{BASE},layer={layer}")


def test_the_outermost_layers_are_there() -> None:
    assert vectors(f"{BASE},layer=-4") == pytest.approx(vectors(f"{BASE},layer=0"))


def test_a_folder_that_is_missing_or_no_model_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="cannot load the language model") as e:
            vectors(str(folder))
        assert "\n" not in str(e.value)
        assert str(folder) in str(e.value)


def test_the_name_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden-states:MODEL"):
        make_embedder("hidden-states")
    assert isinstance(make_embedder(f"hidden-states:{BASE},layer=1"), HiddenStateEmbedder)


def numbered_pairs(n: int, seed: int = 0) -> pa.Table:
    """Return pairs whose chosen response says `blue` and whose rejected one says `red`."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, query in enumerate(make_queries(n, seed)):
        k = rng.integers(1, 60)
        texts = [f"There are {k} {c} apples ." for c in ("blue", "red")]
        rows.append({"pair_id": str(i), "query": query, "chosen": texts[0], "rejected": texts[1]})
    return pa.Table.from_pylist(rows, PREFERENCE_SCHEMA)


@pytest.mark.parametrize("options", ["", ",layer=1,pooling=mean"])
def test_a_model_on_hidden_states_learns_and_is_saved(options: str, tmp_path: Path) -> None:
    model = BradleyTerryRewardModel(embedder=f"hidden-states:{BASE}{options}").fit(numbered_pairs(60))
    new = numbered_pairs(40, seed=1)
    queries, chosen, rejected = (new[name].to_pylist() for name in ("query", "chosen", "rejected"))
    assert (model.predict_reward(queries, chosen) > model.predict_reward(queries, rejected)).mean() > 0.9
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.predict_reward(queries, chosen) == pytest.approx(model.predict_reward(queries, chosen), abs=1e-6)
    assert sorted(p.suffix for p in (tmp_path / "m").iterdir()) == [".json", ".npz"]
    with pytest.raises(ModelFileError, match="other vectors"):
        load(tmp_path / "m", embedder=f"hidden-states:{BASE},layer=0")


def test_a_saved_model_whose_language_model_has_changed_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "lm")
    BradleyTerryRewardModel(embedder=f"hidden-states:{tmp_path / 'lm'}").fit(numbered_pairs(20)).save(tmp_path / "m")
    model = load_language_model(BASE)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelFileError, match="other vectors"):
        load(tmp_path / "m")
    shutil.rmtree(tmp_path / "lm")
    with pytest.raises(OirlError, match="lm"):
        load(tmp_path / "m")


def test_prompts_can_be_scored_on_hidden_states() -> None:
    model = PromptRewardModel(embedder=f"hidden-states:{BASE},layer=0,pooling=mean").fit(make_log(40))
    assert np.isfinite(model.predict_proba(QUERIES)).all()
