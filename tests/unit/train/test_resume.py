"""A run goes on from the newest step that can be loaded, and what is in the way is named and set aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import InputError
from flashrl_cli.paths import RunPaths
from flashrl_cli.train.resume import FROM_NOTHING, WORTH_REDOING_S, choose
from flashrl_cli.verl import checkpoints
from tests.saved_files import saved_step


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs/r", tmp_path / "checkpoints/p/r")


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return load_spec("gsm8k-grpo-0.5b", sets=["resources.gpus_per_node=2"]).spec


def logged(run: RunPaths, *steps: int, pace: float = 1.0) -> None:
    run.attempt(1).root.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "data": {"timing_s/step": pace}}) for step in steps]
    run.attempt(1).metrics.write_text("\n".join([*lines, ""]))


def torn(run: RunPaths, step: int) -> Path:
    folder = saved_step(run.checkpoints, step)
    shard = folder / "actor/model_world_size_2_rank_1.pt"
    shard.write_bytes(shard.read_bytes()[:-30])
    return folder


def test_never_and_no_checkpoints_start_from_nothing(run: RunPaths, spec: RunSpec) -> None:
    saved_step(run.checkpoints, 5)
    assert choose(spec, run, "never") is FROM_NOTHING
    assert choose(spec, RunPaths("s", run.root, run.checkpoints / "s"), "auto") == FROM_NOTHING


def test_newest_complete_step_is_gone_on_from(run: RunPaths, spec: RunSpec) -> None:
    for step in (5, 10, 9):
        saved_step(run.checkpoints, step)
    found = choose(spec, run, "auto")
    assert (found.step, found.folder, found.superseded) == (10, run.checkpoints / "global_step_10", ())


def test_a_half_written_step_is_set_aside_and_named(run: RunPaths, spec: RunSpec) -> None:
    saved_step(run.checkpoints, 5)
    half = torn(run, 10)
    (run.checkpoints / checkpoints.TRACKER).write_text("10")
    found = choose(spec, run, "auto")
    assert found.step == 5
    ((path, why),) = found.superseded
    assert path == half
    assert "incomplete: actor/model_world_size_2_rank_1.pt: truncated or damaged" in why
    assert half.exists(), "choosing changes nothing: a dry run does it, too"
    found.prepare()
    assert not half.exists()
    assert checkpoints.tracked_step(run.checkpoints) == 5
    assert choose(spec, run, "auto").step == 5


def test_with_no_complete_step_verl_must_start_anew(run: RunPaths, spec: RunSpec) -> None:
    torn(run, 5)
    (run.checkpoints / checkpoints.TRACKER).write_text("5")
    found = choose(spec, run, "auto")
    assert (found.folder, len(found.superseded)) == (None, 1)
    found.prepare()
    assert checkpoints.tracked_step(run.checkpoints) is None


def test_an_older_damaged_step_is_in_nobodys_way(run: RunPaths, spec: RunSpec) -> None:
    torn(run, 5)
    saved_step(run.checkpoints, 10)
    assert choose(spec, run, "auto").superseded == ()


def test_a_complete_step_that_the_tracker_does_not_name_yet_is_taken(run: RunPaths, spec: RunSpec) -> None:
    saved_step(run.checkpoints, 5)
    saved_step(run.checkpoints, 10)
    (run.checkpoints / checkpoints.TRACKER).write_text("5")
    assert choose(spec, run, "auto").step == 10


def test_a_named_step_supersedes_later_ones(run: RunPaths, spec: RunSpec) -> None:
    for step in (5, 10, 15):
        saved_step(run.checkpoints, step)
    found = choose(spec, run, str(run.checkpoints / "global_step_5"))
    assert [path.name for path, _ in found.superseded] == ["global_step_10", "global_step_15"]
    assert all("goes on from step 5" in why for _, why in found.superseded)
    found.prepare()
    assert checkpoints.tracked_step(run.checkpoints) == 5


def test_another_runs_step_can_be_named(run: RunPaths, spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    other = saved_step(run.checkpoints.parent / "other", 7)
    monkeypatch.chdir(other.parent)
    found = choose(spec, run, "global_step_7/")
    assert (found.folder, found.superseded) == (other, ())
    found.prepare()
    assert not run.checkpoints.exists()


@pytest.mark.parametrize("name", ["global_step_6", "other", "global_step_7", "alway"])
def test_resume_from_nothing_is_refused(name: str, tmp_path: Path, run: RunPaths, spec: RunSpec) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "global_step_7").write_text("a file")
    with pytest.raises(InputError, match="no folder global_step_N") as caught:
        choose(spec, run, str(tmp_path / name))
    assert caught.value.hint == "--resume takes auto|never|PATH"


def test_resume_from_a_damaged_step_is_refused(run: RunPaths, spec: RunSpec) -> None:
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        choose(spec, run, str(torn(run, 5)))
    assert "rank_1.pt: truncated or damaged" in caught.value.problems[0].message


def test_another_world_size_is_refused(run: RunPaths) -> None:
    saved_step(run.checkpoints, 5, world_size=4)
    with pytest.raises(InputError, match="was saved by 4 trainer processes, this run has 8") as caught:
        choose(load_spec("gsm8k-grpo-0.5b", sets=["resources.gpus_per_node=8"]).spec, run, "auto")
    assert "--set resources.gpus_per_node=4" in str(caught.value.hint)


def test_a_critic_is_part_of_a_step_where_one_is_trained(run: RunPaths) -> None:
    gae = load_spec("gsm8k-0.5b", sets=["resources.gpus_per_node=2"]).spec
    saved_step(run.checkpoints, 5)
    assert choose(gae, run, "auto").folder is None
    saved_step(run.checkpoints, 10, critic=True)
    assert choose(gae, run, "auto").step == 10


def test_a_step_without_its_metrics_is_made_again_where_that_is_cheap(run: RunPaths, spec: RunSpec) -> None:
    for step in (5, 10):
        saved_step(run.checkpoints, step)
    logged(run, *range(1, 10))
    found = choose(spec, run, "auto")
    assert found.step == 5
    assert [(path.name, why) for path, why in found.superseded] == [
        ("global_step_10", "its metrics were not written: the run goes on from step 5")
    ]


def test_a_step_without_its_metrics_is_kept_where_it_was_dear(run: RunPaths, spec: RunSpec) -> None:
    for step in (5, 10):
        saved_step(run.checkpoints, step)
    logged(run, *range(1, 10), pace=WORTH_REDOING_S / 5 + 1)
    assert choose(spec, run, "auto").step == 10


def test_the_first_step_without_its_metrics_starts_anew(run: RunPaths, spec: RunSpec) -> None:
    saved_step(run.checkpoints, 2)
    logged(run, 1)
    found = choose(spec, run, "auto")
    assert (found.folder, len(found.superseded)) == (None, 1)


def test_without_any_metrics_the_newest_is_taken(run: RunPaths, spec: RunSpec) -> None:
    saved_step(run.checkpoints, 2)
    assert choose(spec, run, "auto").step == 2


def test_what_happens_is_said(run: RunPaths, spec: RunSpec) -> None:
    saved_step(run.checkpoints, 5)
    torn(run, 10)
    first, second = choose(spec, run, "auto").lines()
    assert first == f"going on from step 5: {run.checkpoints}/global_step_5"
    assert second.startswith("setting global_step_10 aside: incomplete")
