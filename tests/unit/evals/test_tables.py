"""The table of an evaluation, as it is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from flashrl_cli.evals.accuracy import Report
from flashrl_cli.evals.results import Evaluated
from flashrl_cli.render.tables import table as rich_table
from tests.graded import checkpoint, evaluated, single

SETS = ("gsm8k", "math500", "aime24", "amc23", "olympiad", "minerva", "hellaswag")


def table(*results: Evaluated) -> tuple[list[str], list[list[object]]]:
    return Report.of(results, base=None, baseline=None, skipped=(), settings={}, seconds=1).table()


def on(datasets: Sequence[str], run: str = "grpo-int8-tis8") -> list[Evaluated]:
    return [evaluated(checkpoint(run, step), single(5, 5), name) for step in (20, 120) for name in datasets]


def drawn(columns: list[str], cells: list[list[object]]) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=300).print(rich_table(columns, cells))
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]


def test_one_data_set() -> None:
    columns, cells = table(evaluated(checkpoint("a", 4), single(1, 0)))
    assert columns == ["run", "step", "accuracy", "95 % interval", "mean length", "cut"]
    assert cells == [["a", 4, "1.000", "0.207 – 1.000", 2.0, "0%"]]


def test_extractors_are_shown_where_they_differ_from_the_scorer() -> None:
    same = evaluated(checkpoint("a", 4), single(1, 0), flexible=True)
    columns, cells = table(same, evaluated(checkpoint("a", 5), single(0, 1), flexible=True, boxed=False))
    assert columns[4:-2] == ["flexible"]
    assert [row[4] for row in cells] == ["1.000", "1.000"]
    assert table(same)[0][4:-2] == []


def test_an_extractor_that_a_row_lacks() -> None:
    _, cells = table(
        evaluated(checkpoint("a", 4), single(1, 0)), evaluated(checkpoint("a", 5), single(0, 1), flexible=True)
    )
    assert [row[4] for row in cells] == [None, "1.000"]


def test_several_samples() -> None:
    columns, cells = table(evaluated(checkpoint("a", 4), [[True, False, False]] * 2))
    assert columns[4:-2] == ["pass@3", "maj@3"]
    assert cells[0][4:-2] == ["1.000", "0.000"]


def test_a_wide_table_does_without_the_name_of_its_only_run() -> None:
    wide = [evaluated(checkpoint("grpo-int8-tis8", step), [[True, False]], flexible=True) for step in (1, 2)]
    columns, cells = table(*wide)
    assert columns[0] == "step"
    assert max(map(len, drawn(columns, cells))) <= 80
    assert table(*wide, evaluated(checkpoint("b", 1), [[True, False]], flexible=True))[0][0] == "run"


def test_several_data_sets_stand_beside_each_other() -> None:
    columns, cells = table(*on(SETS[:2]), evaluated(checkpoint("b", 20), single(5, 5), "math500"))
    assert columns == ["run", "step", "gsm8k", "math500"]
    assert cells[0] == ["b", 20, None, "0.500 (0.237–0.763)"]
    assert len(cells) == 3


@pytest.mark.parametrize("count", range(1, len(SETS) + 1))
@pytest.mark.parametrize("run", ["a", "grpo-int8-tis8", "dapo-32b-int8-tis8"])
def test_it_is_at_most_100_wide(count: int, run: str) -> None:
    lines = drawn(*table(*on(SETS[:count], run)))
    assert max(map(len, lines)) <= 100
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("count", "cell"),
    [(3, "0.500 (0.237–0.763)"), (4, "0.500 ±0.263"), (6, "0.500")],
)
def test_the_fullest_style_that_fits(count: int, cell: str) -> None:
    assert table(*on(SETS[:count]))[1][0][2] == cell
