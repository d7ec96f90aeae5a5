"""A used name is refused unless it is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.paths import RunPaths
from flashrl_cli.train.review import next_attempt


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs/r", tmp_path / "checkpoints/p/r")


@pytest.mark.parametrize("resume", ["never", "auto", "/some/global_step_5"])
def test_new_name_starts_with_attempt_1(resume: str, run: RunPaths) -> None:
    assert next_attempt(run, resume=resume) == 1


@pytest.mark.parametrize("resume", ["auto", "/some/global_step_5"])
def test_resumed_name_gets_the_next_attempt(resume: str, run: RunPaths) -> None:
    for number in (1, 2, 10):
        run.attempt(number).root.mkdir(parents=True)
    assert next_attempt(run, resume=resume) == 11


def test_used_name_is_refused(run: RunPaths) -> None:
    run.attempt(1).root.mkdir(parents=True)
    with pytest.raises(InputError, match=f"run r exists already: {run.root}") as caught:
        next_attempt(run, resume="never")
    assert "--resume auto" in str(caught.value.hint)
    assert "--name r-2" in str(caught.value.hint)


def test_checkpoints_alone_make_a_name_used(run: RunPaths) -> None:
    run.checkpoints.mkdir(parents=True)
    with pytest.raises(InputError, match=str(run.checkpoints)):
        next_attempt(run, resume="never")
    assert next_attempt(run, resume="auto") == 1


@pytest.mark.parametrize("name", ["../x", ".", "a/b", ".hidden", ""])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not the name of a folder"):
        next_attempt(RunPaths(name, tmp_path / "runs" / name, tmp_path / "checkpoints" / name), resume="never")
