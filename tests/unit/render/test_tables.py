"""Plain data as a table."""

from __future__ import annotations

import io

from rich.console import Console

from flashrl_cli.render.tables import table


def drawn(columns: list[str], rows: list[list[object]], width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table(columns, rows, title="Title"))
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]


def test_cells() -> None:
    lines = drawn(["a", "b", "c", "d", "e"], [[None, 1234567, 0.123456, True, "x"], ["text", 5, 12345.678, False, "y"]])
    assert lines[0].strip() == "Title"
    assert lines[-2].split() == ["–", "1,234,567", "0.1235", "yes", "x"]
    assert lines[-1].split() == ["text", "5", "1.235e+04", "no", "y"]


def test_numbers_are_aligned_to_the_right_and_text_to_the_left() -> None:
    lines = drawn(["number", "text"], [[1, "a"], [None, "bbb"], [1000, "c"]])
    body = lines[-3:]
    assert len({line.index(word) + len(word) for line, word in zip(body, ["1", "–", "1,000"], strict=True)}) == 1
    assert len({line.index(word) for line, word in zip(body, ["a", "bbb", "c"], strict=True)}) == 1


def test_no_rows() -> None:
    assert drawn(["name"], [])[1].strip() == "name"


def test_long_cells_are_folded_not_cut() -> None:
    lines = drawn(["path"], [["x" * 50]], width=30)
    assert "".join("".join(lines).split()).count("x") == 50


def test_brackets_are_text_not_markup() -> None:
    assert drawn(["list"], [["[console, file]"]])[-1].strip() == "[console, file]"
