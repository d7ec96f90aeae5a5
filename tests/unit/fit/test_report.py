from __future__ import annotations

from flashrl_cli.fit.estimate import of_settings
from flashrl_cli.fit.items import GIB
from flashrl_cli.fit.report import COLUMNS, rows, summary
from flashrl_cli.fit.shape import ModelShape
from flashrl_cli.verl.memory_keys import TrainerSettings


def test_rows_of_phases_and_their_largest_items(settings: TrainerSettings, shape: ModelShape) -> None:
    found = of_settings(settings, shape, None, 80 * GIB)
    table = rows(found)
    assert all(len(row) == len(COLUMNS) for row in table)
    assert [row[0] for row in table if row[0]] == [phase.name for phase in found.phases]
    first = table[: [bool(row[0]) for row in table[1:]].index(True) + 1]
    assert [row[1] for row in first[1:]] == sorted((row[1] for row in first[1:]), reverse=True)


def test_summaries(settings: TrainerSettings, shape: ModelShape) -> None:
    fits = summary(of_settings(settings, shape, None, 80 * GIB))
    assert fits[0].startswith("✓ fits: ")
    assert "of 80.0 GiB a GPU" in fits[0]
    assert len(fits) == 2
    over = summary(of_settings(settings, shape, None, 16 * GIB))
    assert over[0].startswith("✗ over: ")
    assert "vLLM would not start" in over[2]
    assert over[3].startswith("most would help: --set ")
