"""Plain data as a table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flashrl_cli.render.tables import parts, table


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


SPEEDS = ["rollout", "tok/s at 4", "x", "tok/s at 16", "x", "weights GiB", "KV tokens", "KL (k3)"]
MEASURED: list[list[object]] = [
    ["bf16", 368, None, 989, None, 14.19, 2089280, 2.7e-5],
    ["int8+kv8+smooth", 447, "1.21", 1194, "1.21", 8.11, 4398304, 6.6e-4],
]


def apart(width: int) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for part in parts(SPEEDS, MEASURED, console, joined="x"):
        console.print(part)
    assert all(len(line.rstrip()) <= width for line in stream.getvalue().splitlines())
    return [line.strip() for line in stream.getvalue().splitlines() if line.strip()]


def test_what_fits_is_one_table() -> None:
    assert len(apart(160)) == 2 + len(MEASURED)


@pytest.mark.parametrize("width", [60, 80])
def test_columns_that_do_not_fit_come_below_whole_and_with_the_first(width: int) -> None:
    lines = apart(width)
    heads = [line.split() for line in lines if line.startswith("rollout")]
    assert len(lines) == len(heads) * (2 + len(MEASURED))
    assert len(heads) > 1
    assert sum(head.count("x") for head in heads) == 2
    assert all(head[1] != "x" for head in heads)
    shown = [line.split() for line in lines if line.startswith("int8+kv8+smooth")]
    assert [word for words in shown for word in words[1:]] == [
        "447",
        "1.21",
        "1,194",
        "1.21",
        "8.11",
        "4,398,304",
        "0.00066",
    ]


def test_a_single_column_that_is_too_wide_is_still_shown() -> None:
    assert "368" in "".join(apart(22))
    assert len([line for line in apart(22) if line.startswith("roll")]) >= 5
