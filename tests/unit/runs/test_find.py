"""Runs by name."""

from __future__ import annotations

import pytest

from flashrl_cli.errors import NothingMatched
from flashrl_cli.runs.find import find
from tests.unit.runs.on_disk import a_run


def test_a_run_is_found_by_its_name() -> None:
    assert a_run("r") == find("r")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tiny-int", "tiny-int8"), ("zzz", "tiny-int8"), ("", "tiny-int8"), ("../runs/tiny-int8", ""), ("..", "")],
)
def test_near_names_are_told(name: str, hint: str) -> None:
    a_run("tiny-int8")
    with pytest.raises(NothingMatched, match="no run") as caught:
        find(name)
    assert hint in (caught.value.hint or "")


def test_no_runs_at_all() -> None:
    with pytest.raises(NothingMatched) as caught:
        find("r")
    assert caught.value.hint == "runs there: none"
