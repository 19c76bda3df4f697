"""What a proposer is told, what is read of its reply, and which candidates are left out and why."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oirl.logs.rendering import messages, render, split_at_query
from oirl.selection.meta_prompt import (
    Evidence,
    Failure,
    LoggedPrompt,
    read_candidates,
    why_not,
    write_meta_prompt,
)

BEST = LoggedPrompt("best", "Work it out. {query}", 0.6249, 40)
WORST = LoggedPrompt("worst", "Guess:\n  {query}", 0.05, 1200)
FAILURES = (
    Failure("How many legs have 3 cats?", "They have 4.\n\nSo 4.", "12"),
    Failure("Who was it?", "Nobody.", None),
)
EVIDENCE = Evidence((BEST, WORST), FAILURES)
UNFILLABLE, UNMARKED = "it cannot be filled with a query alone", "it does not say where the query goes"
KNOWN, COPIED = "it is known already", "it copies a query or a response of the log"
QUERY = "Anna has 3 red apples and gives 2 of them to Ben, how many are left?"


# The text that asks -----------------------------------------------------------------------------------------


def test_logged_prompts_stand_with_their_success_in_the_order_given() -> None:
    lines = write_meta_prompt(EVIDENCE).split("\n")
    at = lines.index("- 62% of 40 runs: Work it out. {query}")
    assert lines[at + 1] == "- 5% of 1200 runs: Guess: {query}"  # a line each, whatever breaks it has


def test_failures_stand_with_wrong_response_and_right_answer() -> None:
    text = write_meta_prompt(EVIDENCE)
    first = "Query: How many legs have 3 cats?\nWrong response: They have 4. So 4.\nRight answer: 12\n"
    assert first in text
    assert "Query: Who was it?\nWrong response: Nobody.\n\n" in text
    assert text.count("Right answer:") == 1  # the other one is not known
    empty = write_meta_prompt(Evidence((BEST,), (Failure("What?", "Something.", ""),)))
    assert "Wrong response: Something.\nRight answer: \n" in empty
    assert text.index("Work it out") < text.index("3 cats") < text.index("Who was it?")


def test_without_failures_nothing_is_said_of_them() -> None:
    text = write_meta_prompt(Evidence((BEST,), ()))
    for said in ("Query:", "Wrong response", "Right answer", "failed:", "proposed already"):
        assert said not in text


def test_what_was_proposed_already_is_named() -> None:
    text = write_meta_prompt(EVIDENCE, ["One way: {query}", "Another\nway: {query}"])
    assert "- One way: {query}\n- Another way: {query}\n" in text
    assert "proposed already" in text
    assert "proposed already" not in write_meta_prompt(EVIDENCE)


def test_it_demands_one_place_for_the_query_between_tags_and_no_copies() -> None:
    *_, task, care, form = write_meta_prompt(EVIDENCE).split("\n")
    assert "one new instruction" in task
    assert "do not quote these queries, their numbers or their answers" in care
    assert "{query} exactly once" in form
    assert "between <prompt> and </prompt>" in form
    assert not read_candidates(write_meta_prompt(Evidence((BEST,), ()))[: -len(form)])


def test_long_texts_are_clipped() -> None:
    long = "word " * 300
    evidence = Evidence((LoggedPrompt("p", long, 0.5, 2),), (Failure(long, long, long),))
    text = write_meta_prompt(evidence, [long])
    shown = ("word " * 120)[:599] + "…"
    assert len(shown) == 600
    assert text.count("…") == text.count(shown) == 5
    assert text.count("word") == 5 * 120
    exact = LoggedPrompt("p", "x" * 600, 0.5, 2)
    assert "x" * 600 in write_meta_prompt(Evidence((exact,), ()))
    assert "…" not in write_meta_prompt(Evidence((exact,), ()))


def test_equal_evidence_gives_equal_text() -> None:
    again = Evidence((LoggedPrompt("best", BEST.prompt, 0.6249, 40), WORST), tuple(FAILURES))
    assert write_meta_prompt(EVIDENCE, ["a {query}"]) == write_meta_prompt(again, ("a {query}",))
    assert write_meta_prompt(EVIDENCE, ["a {query}", "b {query}"]) != write_meta_prompt(EVIDENCE, ["a {query}"])


@given(st.text(), st.text(), st.none() | st.text(), st.lists(st.text(), max_size=3), st.floats(0, 1))
def test_any_log_can_be_told(query: str, response: str, answer: str | None, already: list[str], success: float) -> None:
    evidence = Evidence((LoggedPrompt("p", query, success, 3),), (Failure(query, response, answer),))
    assert "<prompt>" in write_meta_prompt(evidence, already)


# The reply --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("<prompt>Do it. {query}</prompt>", ["Do it. {query}"]),
        ("First I think.\n<prompt>\n  One\n\n  {query}\n</prompt>\nThat is it.", ["One\n\n  {query}"]),
        ("<prompt>A {query}</prompt> or <prompt>B {query}</prompt>", ["A {query}", "B {query}"]),
        ("<prompt>A {query}</prompt><prompt>A {query}</prompt>", ["A {query}", "A {query}"]),
        ("<prompt>no mark</prompt>", ["no mark"]),  # `why_not` says what is wrong with it
        ("<prompt></prompt>", []),
        ("<prompt> \n </prompt> {query}", []),
        ("<prompt></prompt>\n<prompt>B {query}</prompt>", ["B {query}"]),
        ("  Do it. {query} \n", ["Do it. {query}"]),
        ("Do it.", []),
        ("Do it:\n{query}", []),
        ("A {query} <prompt>B {query}</prompt>", ["B {query}"]),
        ("The last </prompt> closes nothing,\n{query}", []),
        ("<prompt>A {query}</prompt>\n<prompt>cut off {que", ["A {query}"]),
        ("", []),
        ("   \n ", []),
    ],
)
def test_what_is_read_of_a_reply(reply: str, found: list[str]) -> None:
    assert read_candidates(reply) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("<prompt>Cut off at the limit of tokens, {query}", []),
        ("{query} and nothing opened</prompt>", []),
        ("<prompt>Old {query}\nNo, better:\n<prompt>New {query}</prompt>", ["New {query}"]),
        ("<prompt><prompt>Nested {query}</prompt></prompt>", ["Nested {query}"]),
        ("It stands between <prompt> and the end: <prompt>Do it. {query}</prompt>", ["Do it. {query}"]),
    ],
)
def test_a_tag_is_never_part_of_a_candidate(reply: str, found: list[str]) -> None:
    assert read_candidates(reply) == found


REPLIES = st.lists(st.sampled_from(["<prompt>", "</prompt>", "{query}", "word", " ", "\n"]), max_size=12).map("".join)


@given(REPLIES | st.text())
def test_any_reply_can_be_read(reply: str) -> None:
    for candidate in read_candidates(reply):
        assert candidate
        assert candidate == candidate.strip()
        assert candidate in reply


@given(REPLIES)
def test_no_reply_brings_a_tag_into_a_candidate(reply: str) -> None:
    assert not any("prompt>" in candidate for candidate in read_candidates(reply))


# What is left out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "candidate",
    [
        "Do it. {query}",
        "{query}",
        "{query}\n\nDo it.",
        "Read it: {query}. Read it again: {query}. Now respond.",  # twice is a way of its own
        "{{question}} Do it.",  # as evaluation tools write the mark
        'Reply as {"answer": 5}. {query}',
        "Réponds en français : {query} 🙂",
    ],
)
def test_what_can_be_used(candidate: str) -> None:
    assert why_not(candidate, ["Do that. {query}"], [QUERY]) is None
    assert render(candidate, "What?") is not None
    assert messages(candidate, "What?") is not None


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ("Do it.", UNMARKED),
        ("", UNMARKED),
        ("{ query }", UNMARKED),
        ("{Query}", UNMARKED),
        ("{question}", UNMARKED),
        ("{query} {{context}}", UNFILLABLE),
        ("{{question}} {{context}}", UNFILLABLE),
        ("{{ question.text }}", UNFILLABLE),
        ("{% if long %}{query}{% endif %}", UNFILLABLE),
        ("{# a note #} {query}", UNFILLABLE),
        ("{5 examples} {query}", UNFILLABLE),
        ("{examples}\n{query}", UNFILLABLE),
        ("Reply {{in braces}}. {query}", UNFILLABLE),
    ],
)
def test_what_has_no_place_for_the_query_or_others_beside_it(candidate: str, reason: str) -> None:
    assert why_not(candidate, [], []) == reason


@pytest.mark.parametrize(
    "candidate",
    [
        "Work it out. {query}",
        "work IT out: {query}",
        "  Work   it\nout — {query}!",
        "Work it out.\n\n{query}\n",
        "WORK it, out? ({query})",
        "Ｗork it out. {query}",  # the same letter, in full width
    ],
)
def test_known_up_to_case_punctuation_and_space(candidate: str) -> None:
    assert why_not(candidate, ["Another. {query}", "Work it out. {query}"], []) == KNOWN


@pytest.mark.parametrize("candidate", ["{query} Work it out.", "Work it out now. {query}", "Work out it. {query}"])
def test_another_order_or_word_is_another_prompt(candidate: str) -> None:
    assert why_not(candidate, ["Work it out. {query}"], []) is None


@pytest.mark.parametrize(
    ("known", "candidate"),
    [
        ("{query} Work it out.", "{{query}} Work it out."),
        ("{{question}} Work it out.", "{query} Work it out."),
        ("Work it out.", "Work it out.\n\n{query}"),  # a prompt without a mark stands before the query
    ],
)
def test_what_gives_a_model_the_same_text_is_known(known: str, candidate: str) -> None:
    assert render(candidate, "What?") == render(known, "What?")
    assert why_not(candidate, [known], []) == KNOWN


@pytest.mark.parametrize(
    ("candidate", "text"),
    [
        (f"For example: {QUERY} Now this: {{query}}", QUERY),
        ("ANNA HAS 3 RED APPLES, AND: GIVES 2. {query}", QUERY),
        ("{query} As above, 5 - 2 is 3, so 3 apples are left.", "We take 2. 5 - 2 is 3. So 3 apples are left."),
    ],
)
def test_eight_words_of_a_query_or_response_are_a_copy(candidate: str, text: str) -> None:
    assert why_not(candidate, [], ["Something else.", text]) == COPIED


def test_seven_words_are_none() -> None:
    assert why_not("Anna has 3 red apples and gives. {query}", [], [QUERY]) is None
    assert why_not("Anna has 3 red apples and gives away. {query}", [], [QUERY]) is None
    assert why_not("Anna has 3 red apples and gives 2. {query}", [], [QUERY]) == COPIED
    assert why_not("Yes. {query}", [], ["Yes.", ""]) is None


def test_nothing_is_compared_with_other_runs_of_words() -> None:
    own = "Think about every number of the task, write each step down and then add up. {query}"
    assert why_not(own, [], [QUERY, "Think about numbers."]) is None


@given(
    st.text() | st.text(alphabet="{}query %#…\\(["),
    st.lists(st.text(), max_size=3),
    st.lists(st.text(alphabet=string.ascii_lowercase[:3] + " "), max_size=3),
)
def test_any_candidate_is_judged(candidate: str, known: list[str], texts: list[str]) -> None:
    reason = why_not(candidate, known, texts)
    assert reason in (None, UNFILLABLE, UNMARKED, KNOWN, COPIED)
    literals = split_at_query(candidate)
    if reason is None:
        assert literals is not None
        assert len(literals) > 1
        assert why_not(candidate, [*known, candidate], texts) == KNOWN


@given(st.lists(st.sampled_from("ab"), min_size=8, max_size=20).map(" ".join), st.integers(0, 12))
def test_every_run_of_eight_words_is_found(text: str, start: int) -> None:
    words = text.split()
    piece = words[start : start + 8]
    candidate = "Zero {query} " + " ".join(piece)
    assert why_not(candidate, [], [text]) == (COPIED if len(piece) == 8 else None)


def test_half_of_a_surrogate_pair_is_no_candidate() -> None:
    """A server's JSON may hold one; no log and no prompt file can."""
    assert why_not("Well done \ud83d {query}", [], []) is not None
