"""From a preset to the plan of a run's next attempt: its number, its name, and whether it is still the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli import paths
from flashrl_cli.config.resolve import Options
from flashrl_cli.errors import InputError
from flashrl_cli.paths import RunPaths
from flashrl_cli.train.launch import changes, next_attempt, next_plan, plan_hash, preview, read
from flashrl_cli.train.plan import plan_document
from flashrl_cli.verl.environment import on_cluster
from tests.specs import load_spec
from tests.unit.train.builders import plan_of, planned


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs/r", tmp_path / "checkpoints/p/r")


@pytest.mark.parametrize("resume", ["never", "auto", "/some/global_step_5"])
def test_a_new_name_starts_with_attempt_1(resume: str, run: RunPaths) -> None:
    assert next_attempt(run, resume=resume) == 1


def test_a_used_name_is_refused_unless_it_is_resumed(run: RunPaths) -> None:
    for number in (1, 2, 10):
        run.attempt(number).root.mkdir(parents=True)
    with pytest.raises(InputError, match=f"run r exists already: {run.root}") as caught:
        next_attempt(run, resume="never")
    assert caught.value.hint == "`--resume auto` goes on with it, `--name r-2` starts another"
    assert next_attempt(run, resume="auto") == next_attempt(run, resume="/some/global_step_5") == 11


def test_checkpoints_alone_make_a_name_used(run: RunPaths) -> None:
    run.checkpoints.mkdir(parents=True)
    with pytest.raises(InputError, match=str(run.checkpoints)):
        next_attempt(run, resume="never")
    assert next_attempt(run, resume="auto") == 1


@pytest.mark.parametrize("name", ["../x", ".", "a/b", ".hidden", ""])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not the name of a folder"):
        next_attempt(RunPaths(name, tmp_path / "runs" / name, tmp_path / "checkpoints" / name), resume="never")


def test_preview_is_the_plan_of_a_first_attempt() -> None:
    resolved, plan = preview("tiny", Options(tis="3", sets=("rollout.n=4",)))
    assert (plan.name, plan.attempt, resolved.spec.rollout.n) == ("tiny-int8-tis3", 1, 4)
    assert plan.paths.root == paths.runs_root() / "tiny-int8-tis3"


def test_the_plugins_level_of_logging_goes_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_LOGGING_LEVEL", "INFO")
    assert preview("tiny", Options())[1].env["FLASHRL_LOGGING_LEVEL"] == "INFO"
    monkeypatch.delenv("FLASHRL_LOGGING_LEVEL")
    assert "FLASHRL_LOGGING_LEVEL" not in preview("tiny", Options())[1].env


def test_a_cluster_trains_what_this_machine_trains() -> None:
    here = plan_hash(planned("tiny"))
    assert plan_hash(plan_of(on_cluster(load_spec("tiny")))) == here
    assert plan_hash(planned("tiny", "algorithm.lr=1e-5")) != here


def test_a_resumed_run_keeps_its_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the model's sizes were not known when it began, and are now."""
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path))
    first = next_plan(read("tiny", Options()), "r", resume="auto")
    assert first.spec.rollout.rotation == "auto"
    first.attempt_paths.root.mkdir(parents=True)
    first.attempt_paths.plan.write_text(json.dumps(plan_document(first)))
    known = Options(sets=("model.path=Qwen/Qwen2.5-7B",))
    again = next_plan(read("tiny", known), "r", resume="auto", force=True)
    assert (again.attempt, again.spec.rollout.rotation) == (2, "auto")
    assert next_plan(read("tiny", known), "other", resume="auto").spec.rollout.rotation == 128
    other = next_plan(read("tiny", Options(sets=("rollout.rotation=32",))), "r", resume="auto", force=True)
    assert [one.key for one in changes(other)] == ["rollout.rotation"]


def test_gpus_of_the_rollout_alone_may_change() -> None:
    def of(gpus: int, *more: str) -> str:
        sets = ("trainer.mode=separate_async", f"resources.rollout_gpus_per_node={gpus}", *more)
        return plan_hash(planned("tiny", *sets))

    assert of(1) == of(2)
    assert of(1) != of(1, "trainer.prefetch=2")
