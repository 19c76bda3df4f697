"""Hindsight relabelling: the tables of φ, which instructions can be, and where responses are cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from oirl.errors import ConfigError
from oirl.tuning.relabelling import (
    ByFunction,
    Correctness,
    Format,
    Length,
    Outcome,
    Ranks,
    Relabelling,
    check_instructions,
    instruct,
    suboutput_starts,
)

QUICK = settings(max_examples=80, deadline=None, derandomize=True)
REWARDS = st.lists(st.one_of(st.none(), st.just(math.nan), st.integers(-3, 3).map(float)), max_size=25)


def outcome(response: str = "", correct: bool | None = None, reward: float | None = None) -> Outcome:
    return Outcome("{query}", "What?", response, correct, reward)


def ranked(rewards: list[float | None], bins: int = 4) -> list[int | None]:
    """Return the bin of each reward, counted from 1."""
    ranks = Ranks("{share}", bins)
    found = ranks.relabel([outcome(reward=value) for value in rewards])
    return [None if text is None else ranks.instructions.index(text) + 1 for text in found]


# φ ----------------------------------------------------------------------------------------------------------


def test_correctness_asks_for_what_came() -> None:
    relabelling = Correctness("be right", "be wrong")
    assert relabelling.relabel([outcome(correct=c) for c in (True, False, None)]) == ["be right", "be wrong", None]
    assert relabelling.wanted == "be right"
    assert relabelling.instructions == ("be right", "be wrong")


def test_ranks_are_named_by_the_upper_end_of_their_bin() -> None:
    ranks = Ranks("top {share}", bins=4)
    assert ranks.instructions == ("top 25", "top 50", "top 75", "top 100")
    assert ranks.wanted == "top 100"
    assert Ranks("{share}", bins=3).instructions == ("33", "67", "100")


def test_distinct_rewards_fill_the_bins_evenly() -> None:
    # (k + 1/2) / 8 of the k-th of eight rewards, in quarters
    assert ranked([8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == [4, 1, 1, 2, 2, 3, 3, 4]
    assert ranked([5.0, -5.0], bins=2) == [2, 1]


@pytest.mark.parametrize(
    ("rewards", "bins", "expected"),
    [
        ([0.0, 0.0, 0.0], 4, [3, 3, 3]),  # all at 1/2, where the third quarter begins
        ([0.0, 0.0, 1.0, 1.0], 4, [2, 2, 4, 4]),  # at 1/4 and 3/4
        ([0.0, 0.0, 0.0, 1.0], 4, [2, 2, 2, 4]),  # at 3/8 and 7/8
        ([2.0, 1.0, 1.0, 1.0, 0.0], 5, [5, 3, 3, 3, 1]),  # at 9/10, 5/10 and 1/10
        ([7.0], 2, [2]),
        ([-math.inf, 0.0, math.inf], 3, [1, 2, 3]),
    ],
)
def test_ranks_by_hand(rewards: list[float | None], bins: int, expected: list[int]) -> None:
    assert ranked(rewards, bins) == expected


@given(REWARDS, st.integers(2, 7))
@QUICK
def test_a_rank_is_the_share_below_and_half_of_the_equal(rewards: list[float | None], bins: int) -> None:
    known = [r for r in rewards if r is not None and r == r]
    expected: list[int | None] = []
    for r in rewards:
        if r is None or r != r:
            expected.append(None)
            continue
        twice = 2 * sum(k < r for k in known) + sum(k == r for k in known)
        expected.append(min(twice * bins // (2 * len(known)), bins - 1) + 1)
    assert ranked(rewards, bins) == expected


def test_what_has_no_reward_has_no_rank_and_changes_no_other() -> None:
    assert ranked([None, 3.0, math.nan, 1.0, 2.0, 4.0]) == [None, 3, None, 1, 2, 4]
    assert ranked([None, math.nan]) == [None, None]
    assert ranked([]) == []


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=25))
@QUICK
def test_ranks_depend_on_the_order_of_rewards_only(rewards: list[int]) -> None:
    assert ranked([float(r) for r in rewards]) == ranked([float(2 * r**3 - 5) for r in rewards])


def test_length_counts_words_up_to_each_limit() -> None:
    relabelling = Length((2, 4), "at most {limit}", "long")
    assert relabelling.instructions == ("at most 2", "at most 4", "long")
    assert relabelling.wanted == "at most 2"
    texts = ["", "a", " a \n b ", "a b c", "a b c d", "a b c d e", "a " * 99]
    expected = ["at most 2"] * 3 + ["at most 4"] * 2 + ["long"] * 2
    assert relabelling.relabel([outcome(text) for text in texts]) == expected


def test_format_looks_for_the_pattern_anywhere() -> None:
    relabelling = Format(r"#### \d+$", "end with ####", "end as you like")
    texts = ["so #### 42", "#### 42", "#### 42 it is", "42"]
    assert relabelling.relabel([outcome(t) for t in texts]) == ["end with ####"] * 2 + ["end as you like"] * 2
    assert relabelling.wanted == "end with ####"


def test_a_function_of_the_users_says_what_was_followed() -> None:
    def loud(what: Outcome) -> str | None:
        return None if not what.response else "SHOUT" if what.response.isupper() else "whisper"

    relabelling = ByFunction(loud, ["whisper", "SHOUT"])
    assert relabelling.relabel([outcome("HEY"), outcome("hey"), outcome("")]) == ["SHOUT", "whisper", None]
    assert relabelling.wanted == "whisper"


def test_a_function_that_gives_something_else_is_refused() -> None:
    relabelling = ByFunction(lambda _: "sing", ["whisper", "shout"])
    with pytest.raises(ConfigError, match="'sing'"):
        relabelling.relabel([outcome("la")])


@pytest.mark.parametrize(
    "relabelling",
    [Correctness(), Ranks(), Length(), Format("x", "a", "b"), ByFunction(lambda o: o.response, ["a", "b"])],
)
def test_nothing_relabelled_gives_nothing(relabelling: Relabelling) -> None:
    assert relabelling.relabel([]) == []


# what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 0, -4, 101, 2.5, "4"])
def test_ranks_refuse_bins_that_cannot_be(bins: int) -> None:
    with pytest.raises(ConfigError, match="bins"):
        Ranks(bins=bins)


def test_ranks_take_as_many_bins_as_there_are_percentages() -> None:
    assert len(set(Ranks(bins=100).instructions)) == 100


@pytest.mark.parametrize("limits", [(), (5, 5), (9, 3), (0, 4)])
def test_length_refuses_limits_that_cannot_be(limits: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="limits"):
        Length(limits)


def test_instructions_need_the_place_of_their_number() -> None:
    with pytest.raises(ConfigError, match=r"\{share\}"):
        Ranks("Rank high. {prompt}")
    with pytest.raises(ConfigError, match=r"\{limit\}"):
        Length((3,), "Be short. {prompt}")


def test_format_refuses_what_is_no_regular_expression() -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        Format("(", "a", "b")


@pytest.mark.parametrize("relabelling", [Correctness(), Ranks(), Length(), Length((7,)), Format("x", "a", "b")])
def test_instructions_that_can_be_told_apart_pass(relabelling: Relabelling) -> None:
    check_instructions(relabelling)
    assert relabelling.wanted in relabelling.instructions


@pytest.mark.parametrize(
    ("relabelling", "message"),
    [
        (Correctness("do it", "do it"), "equal: 'do it'"),
        (Format("x", "", "b"), "each a text"),
        (Format("x", "a", " \n"), "each a text"),
        (Format("x", "a", None), "each a text"),  # type: ignore[arg-type]
        (ByFunction(lambda _: "a", ["a"]), "two instructions"),
        (Length((1, 2), "{limit}", "2"), "equal: '2'"),
    ],
)
def test_instructions_that_cannot_be_told_apart_are_refused(relabelling: Relabelling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_instructions(relabelling)


def test_an_instruction_to_ask_for_must_be_one_that_is_trained_on() -> None:
    relabelling = Correctness("a", "b")
    relabelling.wanted = "c"
    with pytest.raises(ConfigError, match=r"'c'.*'a', 'b'"):
        check_instructions(relabelling)


# templates --------------------------------------------------------------------------------------------------


def test_an_instruction_takes_the_prompt_in_and_leaves_the_query_open() -> None:
    assert instruct("Be right.\n{prompt}", "Think. {query}") == "Be right.\nThink. {query}"
    assert instruct("Be right: {query}", "Think. {query}") == "Be right: {query}"
    assert instruct("{prompt} / {prompt}", "a {b} {{c}}") == "a {b} {{c}} / a {b} {{c}}"


def test_a_prompt_that_speaks_of_prompts_is_filled_in_as_it_is() -> None:
    assert instruct("Now: {prompt}", "Write a {prompt}.") == "Now: Write a {prompt}."


# sub-outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 8])
def test_cuts_are_uniform_over_all_steps_within(length: int) -> None:
    starts = suboutput_starts(length, 6000, np.random.default_rng(5))
    assert len(starts) == 6000
    assert set(starts) == set(range(1, length))  # never the whole response, never nothing
    if length > 2:
        assert chisquare(np.bincount(starts)[1:]).pvalue > 1e-3


def test_cuts_are_drawn_independently_of_each_other() -> None:
    rng = np.random.default_rng(0)
    pairs = [tuple(suboutput_starts(4, 2, rng)) for _ in range(3000)]
    counts = [pairs.count((a, b)) for a in (1, 2, 3) for b in (1, 2, 3)]
    assert chisquare(counts).pvalue > 1e-3


def test_a_single_token_cannot_be_cut() -> None:
    assert suboutput_starts(1, 5, np.random.default_rng(0)) == []
    assert suboutput_starts(2, 3, np.random.default_rng(0)) == [1, 1, 1]


def test_no_cuts_are_made_unless_asked_for() -> None:
    assert suboutput_starts(9, 0, np.random.default_rng(0)) == []


@pytest.mark.parametrize("limits", [[1.5], ["20"], 3, [True], []])
def test_limits_are_whole_numbers(limits: Any) -> None:
    with pytest.raises(ConfigError, match="limits"):
        Length(limits)


def test_a_rank_on_the_edge_of_bins_belongs_to_the_upper_one() -> None:
    bins, n = 22, 11
    found = Ranks("{share}. {prompt}", bins).relabel([Outcome("p", "q", "r", None, float(i)) for i in range(n)])
    assert [str(text).split(".")[0] for text in found] == [str(round(100 * (2 * k + 2) / bins)) for k in range(n)]
