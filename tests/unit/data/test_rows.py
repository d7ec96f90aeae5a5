"""Texts out of raw rows, and the account of those that cannot be used."""

from __future__ import annotations

import pytest

from flashrl_cli.data.rows import BadRow, BadRows, text
from flashrl_cli.errors import InputError


def test_the_first_column_that_is_there_is_taken() -> None:
    assert text({"Problem": "p", "x": 1}, "problem", "Problem") == "p"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"q": "x"}, r"no column 'question' \(the row has: q\)"),
        ({}, "the row has: nothing"),
        ({"question": None}, "'question' is NoneType, not text"),
        ({"question": 3}, "'question' is int, not text"),
        ({"question": " \n"}, "'question' is empty"),
    ],
)
def test_what_is_no_text_is_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        text(raw, "question")


def test_no_bad_row_is_no_error() -> None:
    BadRows().check("gsm8k")


def test_all_bad_rows_are_counted_and_the_first_five_listed() -> None:
    bad = BadRows()
    for number in range(1, 1235):
        bad.add(f"train.jsonl:{number}", "not JSON")
    with pytest.raises(InputError, match=r"gsm8k: 1,234 rows cannot be used .*nothing was written") as caught:
        bad.check("gsm8k")
    assert [problem.where for problem in caught.value.problems] == [f"train.jsonl:{n}" for n in range(1, 6)]


def test_one_bad_row_reads_well() -> None:
    bad = BadRows()
    bad.add("train.jsonl:7", "not JSON")
    with pytest.raises(InputError, match="gsm8k: 1 row cannot be used; nothing was written"):
        bad.check("gsm8k")
