"""Checks of responses by hand, and what holds for any text."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, log, log1p

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oirl.rewards.response_checks import CHECKS, check_response

QUERY = "Tom has 16 eggs. He eats three and sells the other 13 for $2 each. How many dollars does he make?"
RIGHT = "Tom sells 16 - 3 = 13 eggs.\nHe makes 13 * 2 = 26 dollars. The answer is 26."


def checker(query: str, response: str) -> Callable[[str], float]:
    found = check_response(query, response)
    return lambda name: found[CHECKS.index(name)]


def expect(query: str, response: str, **values: float) -> None:
    check = checker(query, response)
    assert {name: check(name) for name in values} == pytest.approx(values)


def test_names_are_unique() -> None:
    assert len(set(CHECKS)) == len(CHECKS)
    assert len(check_response(QUERY, RIGHT)) == len(CHECKS)


TEXT = st.text() | st.lists(
    st.sampled_from("1 2.5 1e400 -3 1/0 1/3 % = + * / ( ) a? B! \n - $ ½ ٣ million".split(" "))
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT)
def test_any_text_has_one_finite_value_per_check(query: str, response: str) -> None:
    found = check_response(query, response)
    assert len(found) == len(CHECKS)
    assert all(isinstance(x, (int, float)) and isfinite(x) for x in found)


@pytest.mark.parametrize("text", ["9" * 100_000, "1+1=" * 25_000, "a b " * 25_000, "?" * 100_000, " \n" * 50_000])
def test_long_hostile_texts_have_finite_values(text: str) -> None:
    assert all(map(isfinite, check_response(QUERY, text)))
    assert all(map(isfinite, check_response(text, RIGHT)))


def test_form_by_hand() -> None:
    response = "We assume three eggs, so wait.\nWe assume three eggs, so wait!\n- an item\n2) How many dollars?"
    expect(
        QUERY,
        response,
        length=log1p(len(response)),
        words=log1p(6 + 6 + 2 + 3),
        sentences=log1p(3),
        lines=log1p(4),
        words_per_line=17 / 4,
        distinct_words=11 / 17,
        repeated_lines=0.0,
        # 13 phrases of five words; "we assume three eggs so" and "assume three eggs so wait" stand twice.
        repeated_phrases=2 / 13,
        ends_in_letter=0.0,
        ends_in_question=1.0,
        questions=log(2),
        exclamations=log(2),
        items=log(3),
        hedges=log(3),
        corrects=log(3),
        concludes=log(3),
        offers=0.0,
        declines=0.0,
    )


def test_phrases_by_hand() -> None:
    expect("", "Sorry, I cannot say; please let me know.", corrects=log(2), declines=log(2), offers=log(3))


def test_lines_that_repeat() -> None:
    expect("", "so\nso\nso\nno", repeated_lines=0.5, concludes=log1p(3), ends_in_letter=1.0)


def test_words_of_the_query_by_hand() -> None:
    """Words of more than three letters: eggs, eats, three, sells, other, each, many, dollars, does, make."""
    expect(
        QUERY,
        "Tom sells eggs at market. He makes many dollars.",
        query_words_used=4 / 10,
        new_words=2 / 6,  # market, makes
        asked_words_at_end=2 / 4,  # of many, dollars, does, make
        length_to_query=log1p(9) - log1p(18),
    )


def test_a_right_reply_by_hand() -> None:
    expect(
        QUERY,
        RIGHT,
        no_number=0.0,
        numbers=log1p(7),
        distinct_numbers=log1p(5),  # 16, 3, 13, 2, 26
        query_numbers=3.0,
        query_numbers_used=1.0,
        query_numbers_unused=0.0,
        answer_size=log(27),
        answer_whole=1.0,
        answer_negative=0.0,
        answer_zero=0.0,
        answer_in_query=0.0,
        answer_to_largest=log(27) - log(17),
        answer_to_sum=log(27) - log(32),
        answer_above_all=1.0,
        answer_below_all=0.0,
        part_of_a_count=0.0,
        answer_times=log(3),
        one_step_answer=1.0,  # 13 * 2
        equations=log(3),
        true_share=1.0,
        false=0.0,
        any_false=0.0,
        all_true=1.0,
        last_true=1.0,
        unknown_inputs=0.0,  # "three" is written out
        unknown_input_share=0.0,
        unexplained_share=0.0,
        unexplained=0.0,
        answer_is_last_result=1.0,
        answer_is_result=1.0,
        answer_unexplained=0.0,
        answer_true=1.0,
        repeated_equations=0.0,
        differences=log(2),
        products=log(2),
        sums=0.0,
        quotients=0.0,
        part_results=0.0,
        equations_to_query=-1.0,
    )


def test_the_trace_goes_back_from_the_answer_and_stops_at_numbers_of_the_query() -> None:
    """26 = 13 * 2; 13 and 2 stand in the query, so 16 - 3 is not behind the answer."""
    expect(
        QUERY,
        RIGHT,
        steps=1.0,
        reached=2 / 3,
        unreached=1.0,
        false_steps=0.0,
        unknown_steps=0.0,
        multiplied=1.0,
        divided=0.0,
        added=0.0,
        subtracted=0.0,
        steps_to_query=-2.0,
        unused_results=0.0,
    )


def test_an_answer_that_stands_in_the_query_is_still_traced() -> None:
    expect("Ann has 5 pens and gets 3. Is it 8?", "5 + 3 = 8. The answer is 8.", steps=1.0, reached=2 / 3, added=1.0)


def test_the_trace_counts_false_steps_and_unknown_numbers() -> None:
    """30 = 20 + 10 (true), 20 = 5 * 3 (false), 10 = 7 + 3 with 7 from nowhere; 8 / 2 = 4 lies beside the way."""
    query = "Ann buys 5 bags of 3 pens and 8 cups. What is the sum?"
    reply = "5 * 3 = 20. 7 + 3 = 10. 8 / 2 = 4. 20 + 10 = 30. The answer is 30."
    expect(
        query,
        reply,
        steps=3.0,
        reached=2 / 3,
        unreached=1.0,
        false_steps=1.0,
        unknown_steps=1.0,
        multiplied=1.0,
        added=2.0,
        divided=0.0,
        subtracted=0.0,
        steps_to_query=0.0,
        equations_to_query=1.0,
        unused_results=log(2),
        true_share=0.75,
        false=1.0,
        any_false=1.0,
        all_true=0.0,
        unknown_inputs=2.0,  # 7, and the 2 of 8 / 2
        unknown_input_share=2 / 8,
        unexplained=log(3),
        unexplained_share=2 / 13,
        answer_true=1.0,
        sums=log(3),
        quotients=log(2),
    )


def test_a_trace_that_runs_in_a_circle_ends() -> None:
    expect("", "5 = 4 + 1. 4 = 5 - 1. The answer is 4.", steps=2.0, answer_is_result=1.0)


def test_what_is_after_an_answer_that_no_step_explains() -> None:
    expect(
        QUERY,
        "16 + 2 = 18. The answer is 40.",
        answer_is_result=0.0,
        answer_is_last_result=0.0,
        answer_unexplained=1.0,
        answer_true=0.5,
        steps=0.0,
        unknown_steps=1.0,
        unused_results=log(2),
        one_step_answer=0.0,
    )


def test_a_reply_without_a_number() -> None:
    expect(
        QUERY,
        "I cannot tell.",
        no_number=1.0,
        numbers=0.0,
        answer_size=0.0,
        equations=0.0,
        true_share=0.8,
        all_true=0.0,
        any_false=0.0,
        last_true=0.5,
        unknown_input_share=0.0,
        query_numbers_used=0.0,
        query_numbers_unused=3.0,
    )


def test_answers_that_look_wrong() -> None:
    expect(QUERY, "The answer is -4.", answer_negative=1.0, answer_below_all=0.0, answer_size=log(5))
    expect(QUERY, "The answer is 2.5.", answer_whole=0.0, part_of_a_count=1.0)
    expect("What share?", "The answer is 2.5.", answer_whole=0.0, part_of_a_count=0.0)
    expect(QUERY, "The answer is 0.", answer_zero=1.0, answer_below_all=1.0)
    expect(QUERY, "The answer is 13.", answer_in_query=1.0, answer_unexplained=0.0)
    expect(QUERY, "The answer is 2 million.", answer_size=log1p(2e6), answer_above_all=1.0)


def test_percents_and_words_of_the_query_are_known() -> None:
    query = "Half of 40 pens, less 20%, by the dozen."
    expect(query, "40 * 0.5 = 20. 20 * 0.2 = 4. 4 + 12 = 16.", unknown_inputs=0.0, equations=log(4))
    expect("40 pens.", "40 * 0.5 = 20. 20 * 0.2 = 4. 4 + 12 = 16.", unknown_inputs=3.0)


def test_equations_that_repeat_and_results_in_parts() -> None:
    expect("", "5 / 2 = 2.5. 5 / 2 = 2.5. 1 + 1 = 2.", repeated_equations=1.0, part_results=2.0, quotients=log(3))


def test_negative_results_are_noticed() -> None:
    expect("", "3 - 5 = -2. 4 + 4 = 8.", negative_results=1.0)


def test_how_the_answer_is_written_does_not_matter_to_what_is_made_of_it() -> None:
    """The rule by which verdicts were given is not to be learned."""
    plain, boxed = (checker(QUERY, f"16 + 2 = 18 {end}") for end in ("The answer is 18.", "\\boxed{18}"))
    names = CHECKS[CHECKS.index("no_number") :]
    assert {n: plain(n) for n in names} == {n: boxed(n) for n in names}
