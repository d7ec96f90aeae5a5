"""Room for checkpoints and downloads."""

from __future__ import annotations

from typing import Any

import pytest

from flashrl_cli.machine import system


def checkpoints(one: int, kept: int | None, free: int, nodes: int = 1) -> Any:
    return system.checkpoints(one, kept, free, nodes=nodes, folder="/c", keep_fewer="--keep")


@pytest.mark.parametrize(
    ("one", "kept", "free", "nodes", "level"),
    [
        (100, 0, 0, 1, "ok"),
        (100, 3, 300, 1, "ok"),
        (100, 3, 299, 1, "warn"),
        (100, 3, 99, 1, "fail"),
        (100, None, 100, 1, "ok"),
        (100, None, 99, 1, "fail"),
        (100, 1, 50, 4, "warn"),  # if each node has a disk of its own, a quarter fits
        (100, 1, 24, 4, "fail"),
    ],
)
def test_checkpoints(one: int, kept: int | None, free: int, nodes: int, level: str) -> None:
    assert checkpoints(one, kept, free, nodes).level == level


def test_how_many_fit_is_told_where_all_are_kept() -> None:
    assert "room for 7; all are kept" in checkpoints(100, None, 750).text


def test_fewer_can_be_kept() -> None:
    assert str(checkpoints(100, 3, 150).fix).startswith("--keep, or FLASHRL_CHECKPOINTS")


@pytest.mark.parametrize(("needed", "free", "level"), [(None, 0, "ok"), (100, 100, "ok"), (100, 99, "fail")])
def test_download(needed: int | None, free: int, level: str) -> None:
    finding = system.download("model.path", "a/b", needed, free, "/hub")
    assert (finding.name, finding.level) == ("model.path", level)


@pytest.mark.parametrize(
    ("count", "text"),
    [(393_000_000_000, "393 GB"), (4_400_000, "4.4 MB"), (1_500_000_000_000, "1.5 TB"), (900, "0.9 kB"), (0, "0 kB")],
)
def test_size(count: int, text: str) -> None:
    assert system.size(count) == text
