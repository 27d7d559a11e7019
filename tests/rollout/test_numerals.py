"""The numbers of texts: every way to write one is read back exactly, what is none is none, and no text takes long."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.rollout.rewards.numerals import DIGITS, EXPONENT, number

BLANKS = [" ", "\u00a0", "\u2009", "\u202f", r"\,", "~"]
SENTENCES = ["{}", "The answer is {}.", "7 of them, so it is\n{}", "8 + 1 = {}", "#### {}\nor 7", r"\boxed{{{}}}"]
SENTENCES += [
    r"1 or 2. $$\fbox{{$x = {}$}}$$ and 7",
    "**{}**",
    r"\({}\)",
    r"\boxed{{{}\text{{ cm}}^2}}",
    "${}$",
    "{} apples",
]


def grouped(digits, separator):
    """The digits by threes from the right."""
    first = len(digits) % 3 or 3
    return separator.join([digits[:first], *(digits[at : at + 3] for at in range(first, len(digits), 3))])


@st.composite
def decimals(draw):
    """(a decimal that is not negative, its text)"""
    whole, places = draw(st.integers(0, 10**20)), draw(st.integers(0, 12))
    part = draw(st.integers(0, 10**places - 1))
    text = grouped(str(whole), draw(st.sampled_from(["", ",", r",\!", "{,}", *BLANKS])))
    if places:
        text = ("" if whole == 0 and draw(st.booleans()) else text) + f".{part:0{places}d}"
    return whole + Fraction(part, 10**places), text


def tens(exponent):
    """The ways to write a power of ten."""
    superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return st.sampled_from([f"10^{exponent}", f"10^{{{exponent}}}", f"10**{exponent}", f"10{superscript}"])


@st.composite
def values(draw):
    """(a number that is not negative, its text)"""
    kind = draw(st.sampled_from(["decimal", "e", "power", "ten", "slash", "frac", "mixed", "digit"]))
    value, text = draw(decimals())
    exponent = draw(st.integers(-30, 30))
    if kind == "decimal":
        return value, text
    if kind == "e":
        return value * Fraction(10) ** exponent, text + draw(st.sampled_from("eE")) + str(exponent)
    if kind == "power":
        times = draw(st.sampled_from(["×", "*", "x", r" \times ", r"\cdot ", " · ", " × "]))
        return value * Fraction(10) ** exponent, text + times + draw(tens(exponent))
    if kind == "ten":
        return Fraction(10) ** exponent, draw(tens(exponent))
    command = draw(st.sampled_from([r"\frac", r"\dfrac", r"\tfrac"]))
    if kind == "digit":
        a, b = draw(st.integers(0, 9)), draw(st.integers(1, 9))
        return Fraction(a, b), command + draw(
            st.sampled_from([f"{a}{b}", f"{{{a}}}{b}", f" {a}{{{b}}}", f"{{{a}}} {{{b}}}"])
        )
    if kind == "mixed":
        whole, b = draw(st.integers(0, 10**6)), draw(st.integers(2, 100))
        a = draw(st.integers(1, b - 1))
        return whole + Fraction(a, b), str(whole) + draw(st.sampled_from([f" {a}/{b}", rf"{command}{{{a}}}{{{b}}}"]))
    below, below_text = draw(decimals().filter(lambda pair: pair[0] > 0))
    if kind == "slash":
        return value / below, text + draw(st.sampled_from(["/", " / ", "⁄"])) + below_text
    return value / below, f"{command}{{{text}}}{{{below_text}}}"


@st.composite
def numbers(draw):
    """(a number, its text)"""
    value, text = draw(values())
    text = draw(st.sampled_from(["", "$", r"\$", "€", "£ ", "US$"])) + text
    minus = draw(st.sampled_from(["", "", "+", "-", "−", "–"]))
    return (-value if minus not in ("", "+") else value), minus + text + draw(st.sampled_from(["", "%", r"\%", "°"]))


@given(numbers(), st.sampled_from(SENTENCES))
@settings(max_examples=400, deadline=None)
def test_a_number_is_read_back_exactly_however_it_is_written(written, sentence):
    value, text = written
    assert number(sentence.format(text)) == value
    assert number(text, alone=True) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9007199254740993", 9007199254740993),
        ("50% of them", 50),
        ("2½", "5/2"),
        ("-½", "-1/2"),
        ("5 million", 5_000_000),
        ("$1.5 billion", 1_500_000_000),
        ("5km", 5),
        ("the 1st", 1),
        ("USD5 or Rs500", 500),
        ("答案是5。", 5),
        ("５", 5),
        ("١٢", 12),
        ("3-5", 5),
        ("page No.5", 5),
        ("...5", 5),
        ("12 cm^2", 12),
        ("5 m/s", 5),
        ("a 5-year-old", 5),
        ("5 of H2O in x_1", 5),
        (r"90^\circ", 90),
        (r"\boxed{3}, then \boxed{4}", 4),
        (r"\boxed{- 5}", -5),
        (r"\frac{-3}{4}", "-3/4"),
        (r"-\left(\frac{3}{4}\right) = -0.75", "-3/4"),
        ("0.1", "1/10"),
        ("-0", 0),
        ("the sum is negative 5", -5),
        (r"negative \frac{1}{2}", "-1/2"),
        ("it is minus 5", -5),
        ("10 minus 5", 5),
        ("x = - 5", -5),
        ("(- 5)", -5),
        (r"\frac{- 1}{2}", "-1/2"),
        ("Answer:\n- 5", 5),
        ("5 hundred", 500),
        ("5 hundred thousand", 500_000),
        ("2 lakh", 200_000),
        (r"so \boxed 12$ and 7", 12),
        ("$5 men", 5),
        ("2024-10-24 = 1990", 1990),
    ],
)
def test_what_a_number_is_in_a_text(text, value):
    assert number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "n/a",
            "none",
            "-",
            "H2O",
            "x_1",
            "#### n/a",
            "2^{10}",
            "2x",
            r"2\pi",
            "2π",
            r"2\sqrt{3}",
            r"\sqrt{2}",
            "√2",
        ),
        *(r"\frac{\sqrt{3}}{2}", r"\frac{\pi}{2}", r"\pi/2", "±5", r"\pm\frac12", "1,2,3", "12,34", "1.2.3", "10:30"),
        *("1/2/2024", "3/0", r"\frac{1}{0}", r"2\frac{7}{3}", "1e999999999", "10^999999999", "2*10^{-999999999}"),
        *(r"\boxed{3, 4}", r"\boxed{(3,4)}", r"\boxed{2\cdot 3}", r"\boxed{x > }", r"\boxed{\text{(B)}}", r"\boxed{12"),
        *(r"5 but \boxed{5!}", r"\boxed{5x + 1}", r"\boxed{-(5)}", r"\boxed{5 \text{ or } 6}", "9" * (DIGITS + 1)),
        *("-(5)", "it is -($5)", "101_2", "101_{2}", "0x1F", "1_000", "1'234", "5'6\"", "2024-01-05", "XII", "Ⅳ"),
        *(r"0.\overline{3}", r"0.1\bar6", "0.(3)", "0.1(6)", "$5M", "$5 M", "$5m", "€2 bn", "$3 mil", "2(3)"),
    ],
)
def test_what_is_no_number(text):
    assert number(text) is None


@pytest.mark.parametrize("text", ["(3, 4)", "5 or 6", "x^2 + 1", "3 + 4 of 7", "about"])
def test_an_answer_must_be_one_number_where_a_response_may_hold_several(text):
    assert number(text, alone=True) is None


def test_the_limits_are_numbers_still():
    assert number("9" * DIGITS) == 10**DIGITS - 1
    assert number(f"1e-{EXPONENT}") == Fraction(1, 10**EXPONENT)


HOSTILE = [
    "9",
    "1 ",
    "1,",
    "1/",
    "1 1/",
    "1e",
    "10^",
    "1.",
    ".1",
    "1,234",
    " 000",
    "$",
    "-",
    "=1",
    "½",
    "⁵",
    "é",
    "x",
    "{",
]
HOSTILE += [
    r"\frac{",
    r"\frac1",
    r"\boxed{",
    r"\sqrt[",
    r"\text{",
    "^{",
    "_{",
    "/ ",
    "####",
    "\\",
    "negative ",
    "is - ",
    "1_",
    "1'",
    "-(",
    r"1.\bar{",
    r"\boxed 1",
]


def test_no_text_takes_long():
    for alone in (False, True):
        began = time.process_time()
        for part in HOSTILE:
            number(part * (5_000 // len(part)), alone=alone)
        assert time.process_time() - began < 5  # about a tenth; what grows with the square would take minutes
