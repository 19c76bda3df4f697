"""Templates found behind rendered prompts: exact in simple cases, and for any template and values."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from oirl.logs.importing.templates import (
    Template,
    is_plain,
    names_in,
    recover,
    shared_affixes,
    shared_start,
    shown,
    value_of,
    varying,
)

QUERIES = ["Two hens?", "Nine nuts?", "Six beans?", "One egg?", "Five pins?"]


def rows_of(render: str, queries: list[str] = QUERIES) -> list[tuple[str, dict[str, str]]]:
    return [(render.replace("{query}", q), {"query": q}) for q in queries]


def fits(template: Template, rows: list[tuple[str, dict[str, str]]]) -> int:
    return sum(template.fits(rendered, values) for rendered, values in rows)


@pytest.mark.parametrize("text", ["{query}", "Q: {query}\nA:", "{query}\n\nThink.", "Say {x} and {{y}}.\n{query}"])
def test_one_value(text: str) -> None:
    rows = rows_of(text)
    template = recover(rows)
    assert template is not None
    assert template.text == text
    assert fits(template, rows) == len(rows)
    assert not template.fits(rows[0][0] + "!", rows[0][1])
    assert not template.fits(rows[0][0], rows[1][1])


def test_several_values_are_named() -> None:
    values = [{"query": "Two hens?", "A": "owl", "B": "cow"}, {"query": "Nine nuts?", "A": "eel", "B": "fox"}]
    rows = [(f"{v['query']}\nA. {v['A']}\nB. {v['B']}\nAnswer:", v) for v in values]
    template = recover(rows)
    assert template is not None
    assert template.text == "{query}\nA. {{A}}\nB. {{B}}\nAnswer:"
    assert fits(template, rows) == 2


def test_a_given_template_is_kept_as_it_is() -> None:
    values = [{"q": "Two hens?", "unit": "hens"}, {"q": "Nine nuts?", "unit": "nuts"}]
    given = "Count {{unit}}: {{q}} In {{unit}}."
    rows = [(f"Count {v['unit']}: {v['q']} In {v['unit']}.", v) for v in values]
    template = recover(rows, given)
    assert template is not None
    assert (template.text, fits(template, rows)) == (given, 2)
    led = [(f"Be brief.\n\n{rendered}", v) for rendered, v in rows]
    template = recover(led, given)
    assert template is not None
    assert (template.text, fits(template, led)) == ("Be brief.\n\n" + given, 2)


def test_examples_that_differ_are_marked() -> None:
    examples = ["Q: One egg?\nA: 1", "Q: Ten pins?\nA: 10", "Q: Four cups?\nA: 4", "Q: Five tins?\nA: 5"]
    rows = [(f"Count.\n\n{example}\n\nQ: {q}\nA:", {"query": q}) for q, example in zip(QUERIES, examples, strict=False)]
    template = recover(rows)
    assert template is not None
    assert template.text == "Count.\n\n{examples}\n\nQ: {query}\nA:"
    assert fits(template, rows) == 4
    assert not template.fits(rows[0][0].replace("Count.", "Add."), rows[0][1])
    marked = recover(rows, examples="<shots>")
    assert marked is not None
    assert marked.text == "Count.\n\n<shots>\n\nQ: {query}\nA:"


def test_examples_that_are_the_same_belong_to_the_template() -> None:
    text = "Q: One egg?\nA: 1\n\nQ: {query}\nA:"
    template = recover(rows_of(text, QUERIES[:3]))
    assert template is not None
    assert template.text == text


@pytest.mark.parametrize("noise", [1, 2])
def test_rows_of_another_kind_lower_the_fit_only(noise: int) -> None:
    rows = rows_of("Q: {query}\nA:", [f"Number {i} of all?" for i in range(10)])
    rows[:noise] = [(f"Other text {i}", values) for i, (_, values) in enumerate(rows[:noise])]
    template = recover(rows)
    assert template is not None
    assert template.text == "Q: {query}\nA:"
    assert fits(template, rows) == 10 - noise


def test_no_template_is_better_than_a_wrong_one() -> None:
    assert recover([]) is None
    assert recover([("something", {"query": "else"}), ("other", {"query": "thing"})]) is None
    assert recover([("a", {"query": ""})]) is None
    mostly = [("Q: " + q, {"query": q}) for q in QUERIES[:2]] + [(f"text {i}", {"query": "lost"}) for i in range(3)]
    assert recover(mostly) is None


LITERAL = st.text("pqrs \n:.", max_size=12)
VALUE = st.text("ABCDEFGH0123", min_size=3, max_size=12)


@st.composite
def filled(draw: st.DrawFn) -> tuple[str, list[tuple[str, dict[str, str]]]]:
    """Return a template and its renderings; values share no letter with literals, nor contain each other."""
    names = ["query", *draw(st.lists(st.sampled_from("xyz"), unique=True, max_size=2))]
    literals = draw(st.lists(LITERAL, min_size=len(names) + 1, max_size=len(names) + 1))
    literals[1:-1] = [text or "." for text in literals[1:-1]]
    n = draw(st.integers(2, 6))
    rows = []
    for _ in range(n):
        values = {name: draw(VALUE) for name in names}
        texts = list(values.values())
        assume(not any(a in b for i, a in enumerate(texts) for k, b in enumerate(texts) if i != k))
        body = "".join(values[name] + literal for name, literal in zip(names, literals[1:], strict=True))
        rows.append((literals[0] + body, values))
    marks = ["{query}" if name == "query" else "{{" + name + "}}" for name in names]
    text = literals[0] + "".join(m + literal for m, literal in zip(marks, literals[1:], strict=True))
    return text, rows


@given(filled())
def test_any_template_is_found_again(case: tuple[str, list[tuple[str, dict[str, str]]]]) -> None:
    text, rows = case
    template = recover(rows)
    assert template is not None
    assert template.text == text
    assert fits(template, rows) == len(rows)


@given(filled())
def test_a_given_template_fits_what_was_made_of_it(case: tuple[str, list[tuple[str, dict[str, str]]]]) -> None:
    text, rows = case
    given_text = text.replace("{query}", "{{query}}")
    template = recover(rows, given_text)
    assert template is not None
    assert template.text == given_text
    assert fits(template, rows) == len(rows)


@given(filled(), st.integers(0, 5), st.sampled_from(["!", "\n", "T"]))
def test_a_changed_text_fits_no_longer(case: tuple[str, list[tuple[str, dict[str, str]]]], at: int, more: str) -> None:
    _, rows = case
    template = recover(rows)
    assert template is not None
    rendered, values = rows[at % len(rows)]
    assert not template.fits(rendered + more, values)
    assert not template.fits(more + rendered, values)


@given(st.lists(st.text("ab:\n ", max_size=12), min_size=1, max_size=5))
def test_affixes_are_shared_and_do_not_overlap(texts: list[str]) -> None:
    start, end = shared_affixes(texts)
    for text in texts:
        assert text.startswith(start)
        assert text.endswith(end)
        assert len(text) >= len(start) + len(end)
    prefix = shared_start(texts)
    assert all(text.startswith(prefix) for text in texts)
    assert not all(text[: len(prefix) + 1] == texts[0][: len(prefix) + 1] for text in texts) or prefix == texts[0]


@pytest.mark.parametrize(
    ("texts", "affixes"),
    [
        (["Question: Two?\nEnd.", "Question: Five?\nEnd."], ("Question: ", "\nEnd.")),
        (["Count.\nHow many hens?", "Count.\nHow many nuts?"], ("Count.\n", "")),
        (["How many hens?", "How many nuts?"], ("", "")),
        (["same", "same"], ("", "")),
        ([], ("", "")),
    ],
)
def test_affixes_are_lines_and_labels(texts: list[str], affixes: tuple[str, str]) -> None:
    assert shared_affixes(texts) == affixes


def test_shared_start_of_lists() -> None:
    assert shared_start([["a", "bc"], ["a", "bd"], ["a"]]) == ["a"]
    assert shared_start(["abc"]) == "abc"


def test_names_and_plain_templates() -> None:
    assert names_in("{{b}} {{ a }} {{- c -}} {{b}} {d}") == ["b", "a", "c"]
    assert is_plain("Say {x}: {{a}} {{ b }} {{-c-}}")
    for text in ("{{a + b}}", "{{f(a)}}", "{% if a %}x{% endif %}", "{# no #}", "{{ a.b(c) }}"):
        assert not is_plain(text), text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("q", " Ann? "),
        ("q.strip()", "Ann?"),
        ("q | trim | upper", "ANN?"),
        ("c[1]", "cow"),
        ("c[1].title()", "Cow"),
        ("o.names[0]", "eel"),
        ('o["names"][0]', "eel"),
        ("n", "3"),
        ("c", "['owl', 'cow']"),
        ("c[2]", None),
        ("o.none", None),
        ("none", None),
        ("q.split()", None),
        ("q | length", None),
        ("n.strip()", None),
        ("q.__class__", None),
    ],
)
def test_what_a_placeholder_stands_for(expression: str, value: str | None) -> None:
    values = {"q": " Ann? ", "c": ["owl", "cow"], "o": {"names": ["eel"]}, "n": 3}
    assert names_in("{{ " + expression + " }}") == [expression]
    assert value_of(expression, values) == value


def test_fields_that_vary_and_values_that_are_shown() -> None:
    rows: list[dict[str, object]] = [{"q": "a", "unit": "hens", "n": 1}, {"q": "b", "unit": "hens", "n": "1"}]
    assert varying(["q", "unit", "n"], rows) == ["q"]
    assert varying(["unit"], rows) == ["unit"], "one test under one prompt still has a query"
    assert varying(["q", "r"], [{"q": "a"}, {"q": "a", "r": 1}]) == ["r"]
    rendered = [(f"Ask: {q}", {"q": q, "answer": "twelve", "short": "Ask"}) for q in QUERIES]
    assert shown(rendered) == ["q"]
    assert shown([*rendered[:4], ("cut", {"q": "Five pins?"})], share=0.8) == ["q"]
    assert shown([*rendered[:4], ("cut", {"q": "Five pins?"})], share=0.9) == []


def test_what_is_left_out_of_a_filled_template_is_not_guessed() -> None:
    template = recover(rows_of("Q: {query}"))
    assert template is not None
    assert not template.fits("Q: Two hens?", {})
    assert re.sub(r"\W", "", template.text) == "Qquery"
