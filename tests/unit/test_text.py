"""Counts with their nouns."""

from __future__ import annotations

import pytest

from flashrl_cli.text import counted, size


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


@pytest.mark.parametrize(
    ("count", "text"),
    [(393_000_000_000, "393 GB"), (4_400_000, "4.4 MB"), (1_500_000_000_000, "1.5 TB"), (900, "0.9 kB"), (0, "0 kB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text
