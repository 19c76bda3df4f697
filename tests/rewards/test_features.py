"""Hashed n-grams against the true strings, and the parser by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from conftest import make_queries
from hypothesis import given
from hypothesis import strategies as st

from oirl.rewards.features import CUES, Grams, char_grams, parse, word_grams

N_COUNTS = 24
WORDS = st.sampled_from(["a", "b", "cat", "dog", "0", "?", "é", "水"])
DOCUMENTS = st.lists(st.lists(WORDS, max_size=7), max_size=6)


def true_word_grams(document: list[str], longest: int = 3) -> list[tuple[str, ...]]:
    return [tuple(document[i : i + n]) for n in range(1, longest + 1) for i in range(len(document) - n + 1)]


def true_char_grams(document: list[str]) -> list[str]:
    text = f" {' '.join(document)} "
    return [text[i : i + n] for n in (3, 4) for i in range(len(text) - n + 1)]


def split_grams(grams: Grams) -> list[list[int]]:
    return [part.tolist() for part in np.split(grams.hashes, grams.ends[:-1])] if len(grams) else []


def test_parse_by_hand() -> None:
    parsed = parse("Tom has 3 apples, and 1,200.5 pears. How many more?")
    assert parsed.tokens == ["tom", "has", "0", "apples", "and", "0", "pears", "how", "many", "more", "?"]
    assert parsed.last == ["how", "many", "more"]
    sizes = [math.log1p(3), math.log1p(1200.5)]
    mean = sum(sizes) / 2
    by_hand = [
        2,  # numbers
        math.log1p(2),
        sizes[1],
        sizes[0],
        mean,
        sum(sizes),
        math.sqrt(sum((s - mean) ** 2 for s in sizes) / 2),
        1,  # of 10 or more
        1,  # of 100 or more
        1,  # of 1000 or more
        1,  # not whole
        2,  # distinct
        0,  # no number twice
        math.log1p(11),
        0.11,
        2,  # sentences
        5.5,
        2,  # commas, the one inside the number too
        34 / 11,  # letters per token
        sizes[1] - sizes[0],
        0,  # the first number is below the last
        0,  # number words
        10 / 11,  # distinct tokens
        3,
    ]
    assert parsed.counts[:N_COUNTS] == pytest.approx(by_hand)
    cues = {cue: value for cue, value in zip(CUES, parsed.counts[N_COUNTS:], strict=True) if value}
    assert cues == {cue: pytest.approx(math.log(2)) for cue in ("and", "how", "many", "more", "?")}


def test_numbers_are_masked_in_tokens_but_counted() -> None:
    small, large = parse("He buys 2 hens for 7."), parse("He buys 905 hens for 88,000.")
    assert small.tokens == large.tokens
    assert small.counts != large.counts


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("One cat sits. Two dogs run", ["two", "dogs", "run"]),
        ("How many cats? Thanks!", ["how", "many", "cats"]),  # a last sentence of one word asks nothing
        ("Cats!!! ...", ["cats"]),
        ("", []),
    ],
)
def test_the_last_sentence(text: str, last: list[str]) -> None:
    assert parse(text).last == last


@pytest.mark.parametrize(
    "text",
    ["", " \n\t", "???", "水は好き？", "٣ قطط و ٤", "½ ² Ⅷ", "\ud800", "\x00", "9" * 5000, "1,,,2,,3", "A" * 10**6],
)
def test_any_text_gives_finite_counts(text: str) -> None:
    parsed = parse(text)
    assert len(parsed.counts) == N_COUNTS + len(CUES)
    assert np.isfinite(parsed.counts).all()
    assert len(word_grams([parsed.tokens])) == len(char_grams([parsed.tokens])) == 1


@given(st.text())
def test_parse_never_fails(text: str) -> None:
    parsed = parse(text)
    assert np.isfinite(parsed.counts).all()
    assert not any(c.isdecimal() and c != "0" for token in parsed.tokens for c in token)


def test_a_megabyte_takes_seconds_not_minutes() -> None:
    text = " ".join(make_queries(1000)) * 10
    assert len(text) > 10**6 / 2
    start = time.perf_counter()
    parsed = parse(text)
    grams = word_grams([parsed.tokens])
    char_grams([parsed.tokens])
    assert time.perf_counter() - start < 10
    assert len(grams.hashes) == 3 * len(parsed.tokens) - 3


@given(DOCUMENTS)
def test_word_grams_stand_for_the_true_ones(documents: list[list[str]]) -> None:
    for hashes, document in zip(split_grams(word_grams(documents)), documents, strict=True):
        true = true_word_grams(document)
        assert len(hashes) == len(true)
        assert len(set(hashes)) == len(set(true)) == len(set(zip(hashes, true, strict=True)))


def test_no_collisions_among_many_grams() -> None:
    documents = [parse(q).tokens for q in make_queries(2500, seed=4)]
    for made, true_of in ((word_grams(documents), true_word_grams), (char_grams(documents), true_char_grams)):
        true = [gram for document in documents for gram in true_of(document)]
        assert len(made.hashes) == len(true)
        pairs = set(zip(made.hashes.tolist(), true, strict=True))
        # One hash per string and one string per hash.
        assert len(pairs) == len(set(true)) == len(set(made.hashes.tolist()))
    assert len(set(true)) > 1000


def test_order_matters_in_a_gram() -> None:
    assert set(word_grams([["a", "b"]]).hashes.tolist()) != set(word_grams([["b", "a"]]).hashes.tolist())


def test_character_grams_mark_the_ends() -> None:
    grams = char_grams([["cat"], ["cats"], []])
    assert np.diff(grams.ends, prepend=0).tolist() == [5, 7, 0]
    cat, cats = set(grams.hashes[:5].tolist()), set(grams.hashes[5:].tolist())
    assert len(cat & cats) == 3  # " ca", "cat", " cat"; "at " and "cat " stand in one of the two only
