"""Counts with their nouns."""

from __future__ import annotations

import pytest

from flashrl_cli.text import counted


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (1, ("checkpoint",), "1 checkpoint"),
        (0, ("checkpoint",), "0 checkpoints"),
        (2, ("checkpoint",), "2 checkpoints"),
        (1200, ("row",), "1,200 rows"),
        (1, ("matrix", "matrices"), "1 matrix"),
        (3, ("matrix", "matrices"), "3 matrices"),
    ],
)
def test_one_is_singular(count: int, words: tuple[str, ...], text: str) -> None:
    assert counted(count, *words) == text
