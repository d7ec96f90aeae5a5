r"""Content of the last \boxed{}; tests/contract/test_boxed.py compares with verl's own functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data.recipes import boxed_answer

plain = st.text(st.characters(exclude_characters="{}\\"), max_size=5)
balanced = st.recursive(plain, lambda inner: st.tuples(plain, inner, plain).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"))
prose = st.text(st.characters(exclude_characters="\\"), max_size=20)


@given(before=prose, answer=balanced, after=prose)
def test_the_content_comes_back_whatever_surrounds_it(before: str, answer: str, after: str) -> None:
    assert boxed_answer(f"{before}\\boxed{{{answer}}}{after}") == answer


@given(first=balanced, last=balanced)
def test_the_last_box_wins(first: str, last: str) -> None:
    assert boxed_answer(f"\\boxed{{{first}}} or rather \\boxed{{{last}}}") == last


@given(answer=balanced)
def test_a_box_that_never_closes_has_no_answer(answer: str) -> None:
    assert boxed_answer(f"\\boxed{{{{{answer}}}") is None


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\text{(A)}\ \sqrt{\frac{a}{b}}}", r"\text{(A)}\ \sqrt{\frac{a}{b}}"),
        (r"$\boxed 2$ pencils", "2"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed5", None),
        (r"\fbox{3}", None),
        ("", None),
    ],
)
def test_known_solutions(solution: str, answer: str | None) -> None:
    assert boxed_answer(solution) == answer
