"""When watching looks, and what it takes for a run of the patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli import paths
from flashrl_cli.evals import run as watch
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Run as RunOnDisk


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("checkpoints/*", True),
        ("checkpoints", True),
        ("checkpoints/", True),
        ("checkpoints/p/run", True),
        ("checkpoints/p/run/", True),
        ("checkpoints/p/run/*", True),
        ("checkpoints/p/run/global_step_*", True),
        ("checkpoints/p/run/global_step_40/actor", True),
        ("checkpoints/*/r*", True),
        ("checkpoints/p/other", False),
        ("checkpoints/p/run2/*", False),
        ("elsewhere/*", False),
    ],
)
def test_patterns_name_runs_that_have_saved_nothing_yet(
    pattern: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = str(paths.absolute(pattern))
    assert watch._names_checkpoints(wanted, tmp_path / "checkpoints" / "p" / "run") is named


def test_looks_go_on_until_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        name = "a"
        state: str | None = "running"

    run = Run()
    monkeypatch.setattr(watch, "behind", lambda patterns: [run])
    said: list[str] = []
    looks = watch.looks(["x"], said.append, poll_s=0)
    assert next(looks)
    assert next(looks)
    assert [text.partition(":")[0] for text in said] == ["watching a"]
    run.state = "done"
    assert list(looks) == [False]


def test_no_run_is_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "all_runs", list[RunOnDisk])
    assert list(watch.looks(["x"], lambda text: None, poll_s=0)) == [False]
