"""Counts with their nouns, sizes, durations and ages."""

from __future__ import annotations

import pytest

from flashrl_cli.text import age, binary_size, counted, duration, size


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


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_binary_sizes(size: int, text: str) -> None:
    assert binary_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0 s"),
        (179, "179 s"),
        (180, "3 min"),
        (3600, "1 h"),
        (5400, "1 h 30 min"),
        (86400, "24 h"),
        (200_000, "2 d"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59, "59 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (86400 * 3, "3 d")],
)
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text
