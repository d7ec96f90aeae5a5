"""The small table at the end."""

from __future__ import annotations

from typing import Any

from flashrl_cli.data.prepare import summary_table

PLAIN: dict[str, Any] = {
    "dataset": "gsm8k",
    "splits": {
        "train": {"rows": 3, "duplicates": 1, "longest_characters": 90},
        "test": {"rows": 2, "duplicates": 0, "longest_characters": 80},
    },
}
COUNTED: dict[str, Any] = {
    "dataset": "arith",
    "splits": {"test": {"rows": 4, "duplicates": 0, "prompt_tokens": {"p50": 5, "p99": 7, "longest": 9}}},
}


def test_without_a_tokenizer_lengths_are_in_characters() -> None:
    columns, rows = summary_table([PLAIN])
    assert columns == ["data set", "split", "rows", "duplicates dropped", "longest (characters)"]
    assert rows == [["gsm8k", "train", 3, 1, 90], ["gsm8k", "test", 2, 0, 80]]


def test_with_a_tokenizer_lengths_are_in_tokens() -> None:
    columns, rows = summary_table([COUNTED, PLAIN])
    assert columns[4:] == ["tokens p50", "tokens p99", "longest"]
    assert rows[0] == ["arith", "test", 4, 0, 5, 7, 9]
    assert rows[1] == ["gsm8k", "train", 3, 1, None, None, None]
