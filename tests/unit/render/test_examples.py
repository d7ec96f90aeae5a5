"""Responses as text: whatever is in them, it is text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.render.examples import question_lines, safe, shortened


def response(**known: Any) -> dict[str, Any]:
    return {
        "step": 20, "sample": 0, "response": "It is 4.", "prediction": "4", "score": 1.0, "correct": True,
        "flexible": None, "boxed": None, "tokens": 1234, "cut": False, "problem": None, **known,
    }  # fmt: skip


def lines(*responses: dict[str, Any], samples: int = 1, full: bool = False, **known: Any) -> list[str]:
    steps = dict.fromkeys(one["step"] for one in responses)
    question = {
        "question": 7,
        "prompt": "2 + 2?",
        "ground_truth": "4",
        "right": [{"step": step, "right": 1, "of": samples} for step in steps],
        "responses": responses,
        **known,
    }
    return list(question_lines(question, width=80, full=full))


def test_a_question_with_two_responses() -> None:
    first = response(step=0, correct=False, flexible=True, boxed=False, prediction=None, response="Two and two:\n  4\n")
    assert lines(first, response(cut=True)) == [
        "── question 7: step 0 right; step 20 right",
        "    2 + 2?",
        "truth: 4",
        "",
        "step 0: wrong · flexible right · no answer found · 1,234 tokens",
        "    Two and two:",
        "      4",
        "",
        "step 20: right · answer 4 · 1,234 tokens, cut at the limit",
        "    It is 4.",
    ]


def test_several_samples_are_numbered() -> None:
    shown = lines(response(sample=3), samples=4)
    assert shown[0] == "── question 7: step 20 1 of 4 right"
    assert shown[4] == "step 20, sample 3: right · answer 4 · 1,234 tokens"


def test_a_model_without_steps_and_a_response_without_a_verdict() -> None:
    shown = lines(response(step=None, correct=False, problem="timed\nout"))
    assert shown[4] == "the model: wrong · answer 4 · 1,234 tokens · no verdict: timed out"


def test_markup_is_text() -> None:
    assert "    [red]4[/red] [/] [link=x]" in lines(response(response="[red]4[/red] [/] [link=x]"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\rb\x07\x00\x9b2J", "a\\rb\\x07\\x00\\x9b2J"),
        ("a\r\nb", "a\nb"),
        ("a\tb", "a   b"),
        ("\u202egnp.exe\u2028x", "\\u202egnp.exe\\u2028x"),
        ("\ud800", "\\ud800"),
        ("a\u00a0b\u3000c", "a b c"),
        ("é ∑ 中 😀", "é ∑ 中 😀"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert safe(text) == shown


@given(st.text(alphabet=st.characters(codec=None), max_size=300), st.integers(20, 100))
def test_nothing_gets_through(text: str, width: int) -> None:
    question = {
        "question": 7,
        "prompt": text,
        "ground_truth": text,
        "right": [{"step": 20, "right": 1, "of": 1}],
        "responses": [response(response=text, prediction=text, problem=text or None)],
    }
    for line in question_lines(question, width=width, full=True):
        assert line.isprintable()
        assert len(line) <= width
        line.encode("utf-8")


def test_long_texts_lose_their_middle_unless_asked_for_in_full() -> None:
    long = f"start {'x' * 5000} #### 4"
    short = lines(response(response=long))
    assert any("characters; --full shows them …]" in line for line in short)
    assert short[-1].endswith("#### 4")
    assert len(short) < 20
    whole = lines(response(response=long), full=True)
    assert sum(line.count("x") for line in whole) == 5000


@given(st.text(max_size=3000))
def test_shortened_keeps_both_ends(text: str) -> None:
    short = shortened(text)
    assert len(short) <= 1000
    assert short[:400] == text[:400]
    assert short[-400:] == text[-400:]


def test_long_answers_are_cut() -> None:
    shown = lines(response(prediction="9" * 999), ground_truth="8" * 999)
    assert sum(line.count("9") for line in shown) <= 201
    assert sum(line.count("8") for line in shown) == 200
