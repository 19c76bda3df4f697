"""Checkers: hand-checked tables, properties, and hostile texts."""

from __future__ import annotations

from fractions import Fraction
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oirl.errors import ConfigError, MissingPackageError
from oirl.logs import checkers
from oirl.logs.answers import extract_number
from oirl.logs.checkers import Verdict, apply_checker, choice, exact, numeric
from oirl.logs.numbers import last_number

needs_math = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")

NUMERIC = [
    # Plain numbers, separators, currency, units, marks
    ("12", "12", True, "12"),
    ("12.", "12", True, "12"),
    ("$5.", "5", True, "5"),
    ("120,000", "120000", True, "120,000"),
    ("120,000", "0", False, "120,000"),
    ("She earns $1,234.50.", "1234.5", True, "1,234.50"),
    ("1,000", "1000.0", True, "1,000"),
    ("1000", "1,000", True, "1000"),
    ("1,2,3", "3", True, "3"),
    ("1,2,3", "123", False, "3"),
    ("values 10, 200, 300", "300", True, "300"),
    ("1234,567", "1234567", False, "567"),
    (r"\$1{,}000", "1000", True, "1{,}000"),
    (r"1\,000", "1000", True, r"1\,000"),
    (r"$12,\!345$", "12345", True, r"12,\!345"),
    ("1\u202f234", "1234", True, "1\u202f234"),
    ("$ 5", "5", True, "5"),
    ("€5", "5", True, "5"),
    ("5$", "5", True, "5"),
    ("Rs5", "5", True, "5"),
    ("USD5", "5", True, "5"),
    ("**12**", "12", True, "12"),
    ("x = 7", "7", True, "7"),
    ("No. 3", "3", True, "3"),
    ("It is 7!", "7", True, "7"),
    ("20km", "20", True, "20"),
    ("about 0.50 litres", "1/2", True, "0.50"),
    ("$.50", "0.5", True, ".50"),
    ("wait...5", "5", True, "5"),
    ("答案是12。", "12", True, "12"),
    # Signs
    ("-5", "-5", True, "-5"),
    ("-5", "5", False, "-5"),
    ("−5", "-5", True, "-5"),
    ("-$5", "-5", True, "-5"),
    ("$-5", "-5", True, "-5"),
    ("x = - 17", "-17", True, "-17"),
    ("It fell to -3.5 degrees", "-3.5", True, "-3.5"),
    ("negative 8", "-8", True, "-8"),
    ("10-5", "5", True, "5"),
    ("10 - 5", "5", True, "5"),
    ("pages 10–15", "15", True, "15"),
    ("- 5 apples", "5", True, "5"),
    ("x - 5 = ?", "5", True, "5"),
    ("**-5**", "-5", True, "-5"),
    # Fractions, mixed numbers, rounding
    ("1/2", "0.5", True, "1/2"),
    (r"\frac{1}{2}", "0.5", True, r"\frac{1}{2}"),
    (r"$\dfrac{3}{4}$", "3/4", True, r"\dfrac{3}{4}"),
    (r"\frac{-1}{2}", "-0.5", True, r"\frac{-1}{2}"),
    (r"-\frac{1}{2}", "-1/2", True, r"-\frac{1}{2}"),
    (r"2\frac12", "2.5", True, r"2\frac12"),
    ("2 1/2", "2.5", True, "2 1/2"),
    ("4 and 3/5 stamps", "23/5", True, "4 and 3/5"),
    ("2½ cups", "2.5", True, "2½"),
    ("⅓", "1/3", True, "⅓"),
    ("3/0", "3", False, None),
    ("1/3", "0.333", True, "1/3"),
    ("0.33", "1/3", True, "0.33"),
    ("0.34", "1/3", False, "0.34"),
    ("0.3", "1/3", False, "0.3"),
    ("0.00", "1/1000", False, "0.00"),
    ("3.33", "3.3333333333333335", True, "3.33"),
    ("0.13", "0.125", False, "0.13"),
    ("0.3", "0.30000000000000004", True, "0.3"),
    ("10000000001", "10000000002", False, "10000000001"),
    # Powers and scientific notation
    ("1e3", "1000", True, "1e3"),
    ("2.5E-3", "0.0025", True, "2.5E-3"),
    ("1.5 x 10^3", "1500", True, "1.5 x 10^3"),
    ("3 × 10^4", "30000", True, "3 × 10^4"),
    (r"3 \times 10^{4}", "30000", True, r"3 \times 10^{4}"),
    ("3×10⁴", "30000", True, "3×10⁴"),
    ("2^10", "1024", True, "2^10"),
    ("1e999999999", "1", False, None),
    ("12 cm^2", "12", True, "12"),
    (r"12\text{ cm}^{2}", "12", True, "12"),
    ("x_2 is 9 and x_1", "9", True, "9"),
    (r"45^\circ", "45", True, "45"),
    # Percent and scale
    ("50%", "50", True, "50%"),
    (r"50\%", "50%", True, r"50\%"),
    ("50 percent", "0.5", True, "50 percent"),
    ("0.5", "50%", True, "0.5"),
    ("I am 100% sure", "1", False, "100%"),
    ("0.5%", "50", False, "0.5%"),
    ("1.5 million", "1,500,000", True, "1.5 million"),
    ("$2 million", "2", True, "2 million"),
    ("2 million", "2 billion", False, "2 million"),
    # What is not a number
    ("at 12:30 they had 5", "5", True, "5"),
    ("12:30", "30", False, None),
    ("He eats at 7:00 pm", "7", True, "7"),
    ("He has 5 eggs until 7:00 pm", "5", True, "5"),
    ("born 1/2/2020", "2020", False, None),
    ("version 3.2.1", "1", False, None),
    ("28 songs on her mp3 player", "28", True, "28"),
    ("41 4th graders", "41", True, "41"),
    ("on the 18th floor", "18", True, "18"),
    ("He has 60 days on Orbius-5", "60", True, "60"),
    ("It is 9.\n\nExpert 3: Agreed!", "9", True, "9"),
    ("It is 9.\nExperts 1 and 2: Agreed!", "9", True, "9"),
    ("So 15 - 6 = 9.\n5. Therefore he is", "9", True, "9"),
    ("3. Paris", "3", True, "3"),
    # Where the response states its answer
    ("7 8 9\n#### 18", "18", True, "18"),
    ("#### $1,800.00 dollars", "1800", True, "1,800.00"),
    ("#### Step 3: add\nIt is 4", "4", True, "4"),
    (r"\boxed{12} of 100", "12", True, "12"),
    (r"\boxed{1} then \boxed{\frac{3}{4}} 9", "0.75", True, r"\frac{3}{4}"),
    (r"\boxed{x = 7}", "7", True, "7"),
    (r"\boxed{\text{yes}} 5", "5", True, "5"),
    ("The answer is 3 + 4 = 7", "7", True, "7"),
    ("The answer is 12 apples. He had 20.", "12", True, "12"),
    ("the answer is 12 (3 x 4).", "12", True, "12"),
    ("Answer: $50 (budget) - $42 (cost) = $8, of 3 kinds", "8", True, "8"),
    ("answer: 5 dozen", "5", True, "5"),
    ("Final answer: **$1,000**\n\nChecked 3 times", "1000", True, "1,000"),
    ("The answer is:\n\n25\n\nfor 4 days", "25", True, "25"),
    ("The answer to the question is 5 8-point bucks", "5", True, "5"),
    ("The answer is not 5. It is 6 of 7", "7", True, "7"),
    ("The answer is correct! Tom has 4 cats", "4", True, "4"),
    ("The answer is 5. No, the answer is 6. Take 9", "6", True, "6"),
    ("Let's check our answer:\n2 + 2 = 4, so 8", "8", True, "8"),
    ("1. So the answer is 4.\n2. Double it: 8", "8", True, "8"),
    ("The answer is 12. Because:\n1. He has 3\n2. She has 4", "12", True, "12"),
    ("Answer: 25 bars\nAnswer: 40 g\nThe total is 1000 g", "1000", True, "1000"),
    ("12 x 3 = 36.\nSo Annie pays $36 for 12 kg.", "36", True, "36"),
    ("12 x 3 = 36.\nSo 36 and 4 more, for a total of 40.", "40", True, "40"),
    ("5 x 8 = 40.\nTherefore, 30 + 40 = 70", "70", True, "70"),
    ("She pays $155 ($35 + $120).", "155", True, "155"),
    ("It takes 300 minutes (or 5 hours).", "5", False, "300"),
    ("f(3) = 4 and f(5)", "5", True, "5"),
    ("The result (36)", "36", True, "36"),
    (r"Thus \(7\)", "7", True, "7"),
    # Nothing to read
    ("", "5", False, None),
    ("no idea", "5", False, None),
    ("twelve", "12", False, None),
    ("5", "", None, "5"),
    ("5", "unknown", None, "5"),
    ("", "", None, None),
    # The gold answer
    ("72", "48 + 24 = <<48+24=72>>72\n#### 72", True, "72"),
    ("1,600", "adds up\n#### 1,600", True, "1,600"),
    ("72", r"so \boxed{72} for 3", True, "72"),
    ("18", "She makes $18 every day.\nA: 18", True, "18"),
    ("3", "12 apples", False, "3"),
]


@pytest.mark.parametrize(("response", "answer", "correct", "extracted"), NUMERIC)
def test_numeric(response: str, answer: str, correct: bool | None, extracted: str | None) -> None:
    assert numeric(response, answer) == Verdict(correct, extracted)


def test_numeric_keeps_the_number_of_a_long_reply() -> None:
    assert numeric("word " * 100_000 + "so it is 1,234 eggs. " + "bye " * 1000, "1234") == (True, "1,234")


@pytest.mark.parametrize(
    ("response", "answer", "correct", "extracted"),
    [
        ("Paris", "paris", True, "paris"),
        ('  "Paris."  ', "Paris", True, "paris"),
        ("**New   York**", "new york", True, "new york"),
        ("Straße", "STRASSE", True, "strasse"),
        ("ﬁne", "fine", True, "fine"),
        ("yes!", "Yes", True, "yes"),
        ("Paris, France", "Paris", False, "paris, france"),
        (".5", "5", False, ".5"),
        ("-5", "5", False, "-5"),
        ("C++", "C", False, "c++"),
        ("", "Paris", False, None),
        ("Paris", "", None, "paris"),
        ("Paris", " .", None, "paris"),
    ],
)
def test_exact(response: str, answer: str, correct: bool | None, extracted: str | None) -> None:
    assert exact(response, answer) == Verdict(correct, extracted)


@pytest.mark.parametrize(
    ("response", "answer", "correct", "extracted"),
    [
        ("B", "B", True, "B"),
        ("(b)", "B", True, "B"),
        ("B.", "(B)", True, "B"),
        ("B) Paris", "B", True, "B"),
        ("B) Paris", "b) Paris", True, "B"),
        ("The answer is (B).", "B", True, "B"),
        ("The answer is B because A is too small.", "B", True, "B"),
        ("The answer is A because B is too small.", "A", True, "A"),
        ("Answer: b", "B", True, "B"),
        ("The correct option is **C**, not (D)", "C", True, "C"),
        ("The answer is: option D", "D", True, "D"),
        ("(A) is too small, so I take (C)", "C", True, "C"),
        (r"Thus $\boxed{\text{D}}$", "D", True, "D"),
        ("A) London\nB) Paris\nSo the answer is B", "B", True, "B"),
        ("I would go for B.", "B", True, "B"),
        ("The answer is A. Later: the answer is E.", "E", True, "E"),
        ("A dog barks", "A", False, None),
        ("The answer is a dog", "A", False, None),
        ("Answer: A dog", "A", False, None),
        ("The answer is Apple", "A", False, None),
        ("A) London\nB) Paris", "A", False, None),
        ("Bob", "B", False, None),
        ("", "B", False, None),
        ("B", "Paris", None, "B"),
        ("B", "A dog", None, "B"),
        ("B", "", None, "B"),
    ],
)
def test_choice(response: str, answer: str, correct: bool | None, extracted: str | None) -> None:
    assert choice(response, answer) == Verdict(correct, extracted)


@needs_math
@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"$\frac{1}{2}$", "0.5", True),
        (r"\sqrt{2}", r"\sqrt{2}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"so \boxed{x=3}", "3", True),
        (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", True),
        (r"\boxed{2\sqrt{3}}", r"$\sqrt{13}$", False),
        ("18", "so it is\n#### 18", True),
        ("(1,2)", "(1,2)", True),
        ("4", "5", False),
        ("", "3", False),
        ("4", "", None),
    ],
)
def test_math(response: str, answer: str, correct: bool | None) -> None:
    assert checkers.math(response, answer).correct is correct


@needs_math
def test_math_works_outside_the_main_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(checkers.math, r"\boxed{\frac{1}{2}}", "0.5").result().correct is True


def test_math_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"the math checker needs.*oirl\[math\]"):
        checkers.math("1", "1")


# Properties ------------------------------------------------------------------------------------------------

WHOLE = st.integers(-(10**40), 10**40)
TEXT = st.text(st.characters() | st.sampled_from("0123456789.,-$%/:^ \n#=\\{}()[]eExAnswer"), max_size=80)


@given(WHOLE)
def test_a_whole_number_equals_itself_only(n: int) -> None:
    assert numeric(str(n), str(n)) == (True, str(n))
    assert numeric(str(n), str(n + 1)).correct is False


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_equals_its_own_print(x: float) -> None:
    assert numeric(repr(x), repr(x)).correct is True


@given(WHOLE)
def test_thousands_separators_do_not_matter(n: int) -> None:
    assert numeric(f"It costs {n:,}.", str(n)) == (True, f"{n:,}")
    assert numeric(str(n), f"#### {n:,}").correct is True


@given(st.decimals(0, 10**6, places=2))
def test_money_is_read_to_the_cent(amount: object) -> None:
    found = extract_number(f"The answer is ${amount:,} in all.")
    assert found is not None
    assert found.value == Fraction(str(amount))


@given(st.integers(1, 10**20))
def test_the_sign_matters(n: int) -> None:
    assert numeric(f"The answer is -{n}", str(-n)).correct is True
    assert numeric(f"The answer is -{n}", str(n)).correct is False
    assert numeric(f"The answer is {n}", str(-n)).correct is False


@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_equals_its_value(top: int, low: int) -> None:
    found = last_number(f"{top}/{low}")
    assert found is not None
    assert found.value == Fraction(top, low)


@given(TEXT, TEXT)
def test_no_text_raises(response: str, answer: str) -> None:
    for checker in (numeric, exact, choice):
        verdict = apply_checker(checker, response, answer)
        assert verdict.correct in (True, False, None)
        assert verdict.extracted is not None or not verdict.correct


@given(TEXT)
def test_exact_and_choice_accept_what_they_extract(text: str) -> None:
    for checker in (exact, choice):
        said = checker(text, "x").extracted
        if said is not None:
            assert checker(text, said).correct is True
            assert checker(said, said).extracted == said


HOSTILE = [
    "1",
    "1,",
    "1,111",
    "1,0001",
    "1 ",
    "1:1",
    "1/",
    ".1",
    "1^",
    "1e9",
    "a1",
    "-",
    "(",
    "{",
    "\n",
    " \n",
    "5:30\n",
    "step 1 ",
    "= 1 so ",
    "= 1.\n",
    "answer is ",
    "answer to ",
    "answer: about ",
    "#" * 4,
    "\\boxed{",
    "\\frac{",
    "sqrt{",
    "½",
    "(A",
    "(1 ",
    "(1) ",
    "B) ",
    "option ",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_texts_take_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))  # a pattern that is quadratic in it would run for hours
    for checker in (numeric, exact, choice):
        for response, answer in ((text, "5"), (text + " 5", "5"), ("5", text)):
            checker(response, answer)


def test_numbers_of_more_than_300_digits_are_none() -> None:
    assert numeric("9" * 5000, "5") == (False, None)
    assert numeric("5", "9" * 5000) == (None, "5")
    assert numeric("1e-999 1^999999", "5") == (False, None)
    assert numeric("The answer is " + "9" * 5000, "5") == (False, None)


# A user's own checker --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "verdict"),
    [
        (True, Verdict(True, None)),
        (False, Verdict(False, None)),
        (None, Verdict(None, None)),
        (np.True_, Verdict(True, None)),
        (Verdict(True, "5"), Verdict(True, "5")),
        ((False, "x"), Verdict(False, "x")),
        ((None, None), Verdict(None, None)),
    ],
)
def test_apply_checker_normalises(returned: object, verdict: Verdict) -> None:
    found = apply_checker(lambda response, answer: returned, "5", "5")
    assert found == verdict
    assert found.correct is verdict.correct
    assert isinstance(found, Verdict)


@pytest.mark.parametrize("returned", [1, 0.5, "yes", (True,), (True, 5), ("5", True), [True, "5"], (1, "5"), {}])
def test_apply_checker_names_the_checker_that_returns_anything_else(returned: object) -> None:
    def my_checker(response: str, answer: str) -> object:
        return returned

    with pytest.raises(ConfigError, match=r"test_checkers:.*my_checker returned .*allowed: True, False, None"):
        apply_checker(my_checker, "5", "5")


def test_apply_checker_passes_the_response_first() -> None:
    assert apply_checker(lambda response, answer: (True, f"{response}|{answer}"), "r", "a").extracted == "r|a"
