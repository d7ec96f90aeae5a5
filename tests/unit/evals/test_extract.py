"""Where a response says its answer."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.evals import grade

NUMBERS = {
    "": None,
    "none here": None,
    "...": None,
    "72": "72",
    "so 5 + 67 = 72.": "72",
    "12 07 #### 72": "72",
    "It costs $1,234.50.": "1234.50",
    "1,000,000 in all": "1000000",
    "1{,}000": "1000",
    r"1\,000": "1000",
    r"12,\!345": "12345",
    "either 1,2 or 3,4": "4",
    "10,00": "0",
    "x = -3": "-3",
    "x = \N{MINUS SIGN}3": "-3",
    "-$5": "-5",
    "$-5$": "-5",
    "8-3": "3",
    "(2)-3": "3",
    "pages 10-12": "12",
    "50%": "50",
    r"50\%": "50",
    ".5": "0.5",
    "0.": "0",
    "1/2": "2",
    "72 then ...": "72",
    "007": "7",
    "the 3rd": "3",
    r"\boxed{42}": "42",
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_last_number(text: str, number: str | None) -> None:
    assert grade.last_number(text) == (None if number is None else Decimal(number))


@given(
    number=st.decimals(-(10**12), 10**12, places=2),
    before=st.text(),
    after=st.sampled_from(["", ".", " clips", "%", "\n"]),
)
def test_the_last_number_is_found_in_any_dress(number: Decimal, before: str, after: str) -> None:
    for written in (f"{number:f}", f"{number:,f}", f"{number:f}".replace("-", "\N{MINUS SIGN}")):
        assert grade.last_number(f"{before}\n= {written}{after}") == number


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    grade.last_number(text)
    grade.prediction(text)


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("", None),
        ("I do not know", None),
        ("so it is 7, no, 8.", "8"),
        ("Answer: 3 apples.\nBye", "3 apples"),
        ("**Answer:** 3", "3"),
        ("Answer: 3\n#### 4", "4"),
        ("#### 4\nAnswer: 3", "4"),
        ("#### 1\n#### 2 left", "2 left"),
        ("####", None),
        ("#### \n5", "5"),
        (r"\boxed{1} #### 2", "1"),
        (r"\boxed{1}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{} so 3", "3"),
        (r"\boxed{3", "3"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{1{,}000.}", "1,000"),
        ("-1,000", "-1000"),
    ],
)
def test_prediction(text: str, prediction: str | None) -> None:
    assert grade.prediction(text) == prediction


@pytest.mark.parametrize(
    ("answer", "bare"),
    [("72 clips", "72"), ("72", "72"), ("18 dollars a day", "18"), ("2x", "2x"), ("5 + 67", "5 + 67")],
)
def test_without_unit(answer: str, bare: str) -> None:
    assert grade.without_unit(answer) == bare


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-1,000", "-1000"),
        (r"\$5", "5"),
        (".5", "0.5"),
        ("", None),
        ("5 + 67", None),
        ("x = 72", None),
        ("1,2", None),
        ("3!", None),
    ],
)
def test_a_text_that_is_a_number(text: str, number: str | None) -> None:
    assert grade.number(text) == (None if number is None else Decimal(number))
