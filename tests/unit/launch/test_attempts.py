"""A used name is refused unless it is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.errors import InputError
from flashrl_cli.launch.attempts import check_resumable, next_attempt, resume_path
from flashrl_cli.paths import RunPaths


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


def test_resume_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "global_step_5"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert resume_path("auto") is None
    assert resume_path("never") is None
    assert resume_path(f"{folder}/") == resume_path("global_step_5") == folder


@pytest.mark.parametrize("name", ["global_step_6", "other", "global_step_7", "alway"])
def test_resume_from_nothing_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "global_step_7").write_text("a file")
    with pytest.raises(InputError, match="no folder global_step_N") as caught:
        resume_path(str(tmp_path / name))
    assert caught.value.hint == "--resume takes auto|never|PATH"


@pytest.mark.parametrize("name", ["../x", ".", "a/b", ".hidden", ""])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not the name of a folder"):
        next_attempt(RunPaths(name, tmp_path / "runs" / name, tmp_path / "checkpoints" / name), resume="never")


def saved(run: RunPaths, *models: str, world: int, step: int = 5) -> Path:
    folder = run.checkpoints / f"global_step_{step}"
    for model in models:
        (folder / model).mkdir(parents=True)
        for rank in range(world):
            (folder / model / f"model_world_size_{world}_rank_{rank}.pt").write_text("tensors")
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def test_a_run_without_checkpoints_is_resumable(run: RunPaths) -> None:
    check_resumable(load_spec("gsm8k-0.5b").spec, run, None)


def test_the_same_resources_are_resumable(run: RunPaths) -> None:
    saved(run, "actor", "critic", world=4)
    check_resumable(load_spec("gsm8k-0.5b").spec, run, None)


def test_another_world_size_is_refused_for_actor_and_critic(run: RunPaths) -> None:
    step = saved(run, "actor", "critic", world=4)
    for resume_from in (None, step):
        with pytest.raises(InputError, match="cannot go on from") as caught:
            check_resumable(load_spec("gsm8k-0.5b", sets=["resources.gpus_per_node=8"]).spec, run, resume_from)
        assert [problem.where for problem in caught.value.problems] == [str(step / "actor"), str(step / "critic")]
        assert "saved by 4 trainer processes, this run has 8" in caught.value.problems[0].message
        assert caught.value.problems[0].hint == "--set resources.gpus_per_node=4"


def test_missing_shards_and_a_missing_critic_are_refused(run: RunPaths) -> None:
    step = saved(run, "actor", world=4)
    (step / "actor/model_world_size_4_rank_2.pt").unlink()
    with pytest.raises(InputError) as caught:
        check_resumable(load_spec("gsm8k-0.5b").spec, run, None)
    assert [problem.message for problem in caught.value.problems] == [
        "incomplete: model_world_size_4_rank_2.pt",
        "no critic shards there",
    ]
