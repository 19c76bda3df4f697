"""Which responses are learned from, held against brute force, and measures of their variety by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oirl.tuning.choosing import best_per_query, first_of_equals, top_fraction, variety

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
NAN = math.nan
REWARD = st.one_of(st.just(NAN), st.integers(-3, 3).map(float))
LEAST = st.one_of(st.none(), st.integers(-3, 3).map(float))


def is_allowed(reward: float, least: float | None) -> bool:
    return reward == reward and (least is None or reward >= least)


# the best of each query -------------------------------------------------------------------------------------


def test_the_best_of_each_query_by_hand() -> None:
    rewards = np.array([0.1, 0.9, 0.5, 0.2, 0.3])
    assert best_per_query(rewards, ["a", "a", "b", "b", "c"]).tolist() == [1, 2, 4]


def test_of_equals_the_first_is_the_best() -> None:
    assert best_per_query(np.array([1.0, 2.0, 2.0, 2.0]), ["a"] * 4).tolist() == [1]


def test_a_query_whose_responses_have_no_reward_gives_none() -> None:
    assert best_per_query(np.array([NAN, NAN, -5.0, NAN]), ["a", "a", "b", "b"]).tolist() == [2]
    assert best_per_query(np.array([]), []).tolist() == []


def test_a_best_that_is_too_low_is_not_chosen() -> None:
    rewards = np.array([0.2, 0.4, 1.0, 0.5])
    assert best_per_query(rewards, ["a", "a", "b", "c"], least=0.5).tolist() == [2, 3]


def test_infinite_rewards_are_the_lowest_and_the_highest() -> None:
    rewards = np.array([-math.inf, 1e300, math.inf, -math.inf])
    assert best_per_query(rewards, ["a", "a", "a", "b"]).tolist() == [2, 3]
    assert best_per_query(rewards, ["a", "a", "a", "b"], least=-1e300).tolist() == [2]


@given(st.lists(st.tuples(REWARD, st.integers(0, 4)), max_size=20), LEAST)
@QUICK
def test_the_best_of_each_query_equals_brute_force(rows: list[tuple[float, int]], least: float | None) -> None:
    expected = []
    for i, (reward, query) in enumerate(rows):
        if not is_allowed(reward, least):
            continue
        rivals = [(r, j) for j, (r, q) in enumerate(rows) if q == query and j != i and is_allowed(r, least)]
        if all(r < reward or (r == reward and j > i) for r, j in rivals):
            expected.append(i)
    found = best_per_query(np.array([r for r, _ in rows]), [q for _, q in rows], least=least)
    assert found.tolist() == expected


# the top fraction -------------------------------------------------------------------------------------------


def test_the_top_fraction_by_hand() -> None:
    rewards = np.array([0.1, 0.9, 0.5, 0.7, 0.3])
    assert top_fraction(rewards, 0.4).tolist() == [1, 3]
    assert top_fraction(rewards, 0.41).tolist() == [1, 2, 3]  # rounded up
    assert top_fraction(rewards, 0.001).tolist() == [1]
    assert top_fraction(rewards, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_a_fraction_that_is_no_binary_number_is_not_rounded_up_for_it() -> None:
    assert 0.07 * 100 > 7
    assert top_fraction(np.arange(100.0), 0.07).tolist() == list(range(93, 100))


def test_of_equals_the_first_are_in_the_top_fraction() -> None:
    assert top_fraction(np.array([1.0, 0.0, 1.0, 1.0, 1.0]), 0.6).tolist() == [0, 2, 3]
    many = np.arange(1000) % 2.0  # so many that a sort may well shuffle equals
    assert top_fraction(many, 0.25).tolist() == list(range(1, 500, 2))


def test_the_fraction_is_of_all_responses_also_of_those_without_a_reward() -> None:
    assert top_fraction(np.array([NAN, 1.0, NAN, 2.0, 3.0, NAN]), 0.5).tolist() == [1, 3, 4]
    assert top_fraction(np.array([NAN, 1.0, NAN, NAN]), 0.75).tolist() == [1]
    assert top_fraction(np.array([NAN, NAN]), 1.0).tolist() == []


def test_no_part_of_the_top_fraction_is_too_low() -> None:
    assert top_fraction(np.array([0.1, 0.9, 0.5, 0.7]), 0.75, least=0.7).tolist() == [1, 3]
    assert top_fraction(np.array([0.1, 0.9, 0.5, 0.7]), 0.25, least=0.1).tolist() == [1]


@given(st.lists(REWARD, max_size=20), st.integers(1, 20), LEAST)
@QUICK
def test_the_top_fraction_equals_brute_force(rewards: list[float], twentieths: int, least: float | None) -> None:
    share = Fraction(twentieths, 20)
    allowed = [i for i, r in enumerate(rewards) if is_allowed(r, least)]
    ranked = sorted(allowed, key=lambda i: (-rewards[i], i))
    expected = sorted(ranked[: math.ceil(share * len(rewards))])
    assert top_fraction(np.array(rewards, dtype=float), float(share), least=least).tolist() == expected


# equals -----------------------------------------------------------------------------------------------------


def test_the_first_of_each_query_and_response_stays() -> None:
    queries, responses = ["q", "q", "r", "q", "r"], ["1", "2", "1", "1", "1"]
    assert first_of_equals(queries, responses).tolist() == [0, 1, 2]
    assert first_of_equals([], []).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab")), max_size=20))
@QUICK
def test_first_of_equals_is_all_that_did_not_come_before(rows: list[tuple[int, str]]) -> None:
    expected = [i for i, row in enumerate(rows) if row not in rows[:i]]
    assert first_of_equals([q for q, _ in rows], [r for _, r in rows]).tolist() == expected


# variety ----------------------------------------------------------------------------------------------------


def test_variety_by_hand() -> None:
    # a ×3, b ×2, c ×1; pairs: ab, ba, then ab, and none that crosses responses
    found = variety(["a b a", "a b", "c"])
    assert found["distinct_1"] == pytest.approx(3 / 6)
    assert found["distinct_2"] == pytest.approx(2 / 3)
    assert found["words"] == pytest.approx(2)
    assert found["distinct_responses"] == 1
    by_hand = -(math.log(1 / 2) / 2 + math.log(1 / 3) / 3 + math.log(1 / 6) / 6)
    assert found["word_entropy"] == pytest.approx(by_hand)


def test_variety_of_a_collapse() -> None:
    found = variety(["no no no no"] * 4)
    assert found["distinct_1"] == pytest.approx(1 / 16)
    assert found["distinct_2"] == pytest.approx(1 / 12)
    assert found["word_entropy"] == pytest.approx(0)
    assert found["distinct_responses"] == 1 / 4


def test_variety_where_each_word_is_new_is_full() -> None:
    found = variety(["a b", "c d"])
    assert found["distinct_1"] == found["distinct_2"] == found["distinct_responses"] == 1
    assert found["word_entropy"] == pytest.approx(math.log(4))


def test_words_stand_between_any_spaces() -> None:
    assert variety(["a  b\n c\t"]) == variety(["a b c"])


def test_where_nothing_can_be_counted_variety_is_not_a_number() -> None:
    empty = variety([""])
    assert {name for name, value in empty.items() if math.isnan(value)} == {"distinct_1", "distinct_2", "word_entropy"}
    assert (empty["words"], empty["distinct_responses"]) == (0, 1)
    assert all(math.isnan(value) for value in variety([]).values())
    assert math.isnan(variety(["a", "b"])["distinct_2"])


@given(st.lists(st.text(alphabet="ab ", max_size=8), min_size=1, max_size=8))
@QUICK
def test_variety_does_not_depend_on_order_and_is_lowered_by_repeats(responses: list[str]) -> None:
    found, turned, twice = variety(responses), variety(responses[::-1]), variety(responses * 2)
    assert turned == pytest.approx(found, nan_ok=True)
    for name in ("distinct_1", "distinct_2", "distinct_responses"):
        assert twice[name] == pytest.approx(found[name] / 2, nan_ok=True)
    for name in ("word_entropy", "words"):
        assert twice[name] == pytest.approx(found[name], nan_ok=True)
