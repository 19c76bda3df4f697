from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oirl.logs.rendering import jinja, messages, raw_jinja, render, split_at_query

USER = {"role": "user", "content": "Q?"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "Q?"),
        ("Think.", "Think.\n\nQ?"),
        ("Say {query} now", "Say Q? now"),
        ("{{question}}\nThe answer is:", "Q?\nThe answer is:"),
        ("{{ question }} and again {{question}}", "Q? and again Q?"),
        ('Reply as {"answer": 1}. {query}', 'Reply as {"answer": 1}. Q?'),
        ("{{passage}}\n{{question}}", None),
        ("{query} {{question}}", None),
        ("{2 examples}\n\nQ: {{question}}", None),
        ("{examples}Q: {query}", None),
        ("The topic is {…}. {query}", None),
        ("{% if x %}{{question}}{% endif %}", None),
        ("{{choices[0]}}", None),
    ],
)
def test_render(prompt: str, expected: str | None) -> None:
    assert render(prompt, "Q?") == expected
    assert (messages(prompt, "Q?") is None) == (expected is None)
    assert (jinja(prompt) is None) == (expected is None)


def test_messages_put_an_instruction_into_the_system_message_and_a_template_into_the_users() -> None:
    assert messages("Think.", "Q?") == [{"role": "system", "content": "Think."}, USER]
    assert messages("", "Q?") == [USER]
    assert messages("Say {query}", "Q?") == [{"role": "user", "content": "Say Q?"}]


def test_a_query_that_looks_like_a_mark_is_not_filled_again() -> None:
    assert render("a {query} b {query}", "{query}") == "a {query} b {query}"
    assert messages("a {query}", "{{x}}") == [{"role": "user", "content": "a {{x}}"}]


def test_jinja_writes_one_variable_and_protects_the_rest() -> None:
    assert jinja("Q: {query}\nA:") == "Q: {{query}}\nA:"
    assert jinja("Q: {{question}}", "query") == "Q: {{query}}"
    assert jinja("Think.") == "Think.\n\n{{query}}"
    assert split_at_query("plain") == ["plain"]


@given(st.text(alphabet="a{}%# endrawq\n", max_size=60), st.text(alphabet="ab{}%", max_size=10))
def test_jinja_renders_what_render_does(prompt: str, query: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja(prompt)
    rendered = render(prompt, query)
    assert (template is None) == (rendered is None)
    if template is not None:
        environment = jinja2.Environment(keep_trailing_newline=True)
        assert environment.from_string(template).render(query=query) == rendered


@given(st.text(max_size=60))
def test_raw_text_is_left_as_it_is_by_a_template_engine(text: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(keep_trailing_newline=True)
    normal = text.replace("\r\n", "\n").replace("\r", "\n")  # as Jinja reads line breaks
    assert environment.from_string(raw_jinja(normal)).render() == normal
