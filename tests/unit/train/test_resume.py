"""A run goes on from the newest step that can be loaded, and what is in the way is named and moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import InputError
from flashrl_cli.paths import RunPaths
from flashrl_cli.train.resume import FROM_NOTHING, WORTH_REDOING_S, choose
from flashrl_cli.verl import checkpoints
from tests.saved_files import saved_queue, saved_step
from tests.specs import load_spec

ACTOR = "verl.actor_rollout_ref.actor.checkpoint"


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs/r", tmp_path / "checkpoints/p/r")


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return load_spec("gsm8k-grpo-0.5b", sets=["resources.gpus_per_node=2"]).spec


def saved(run: RunPaths, *steps: int, tracked: int | None = None) -> None:
    for step in steps:
        saved_step(run.checkpoints, step)
    if tracked is not None:
        (run.checkpoints / checkpoints.TRACKER).write_text(str(tracked))


def torn(run: RunPaths, step: int) -> Path:
    folder = saved_step(run.checkpoints, step)
    shard = folder / "actor/model_world_size_2_rank_1.pt"
    shard.write_bytes(shard.read_bytes()[:-30])
    return folder


def logged(run: RunPaths, *steps: int, pace: float = 1.0) -> None:
    run.attempt(1).root.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "data": {"timing_s/step": pace}}) for step in steps]
    run.attempt(1).metrics.write_text("\n".join([*lines, ""]))


def test_never_and_no_checkpoints_start_from_nothing(run: RunPaths, spec: RunSpec) -> None:
    saved(run, 5)
    assert choose(spec, run, "never") is FROM_NOTHING
    assert choose(spec, RunPaths("s", run.root, run.checkpoints / "s"), "auto") == FROM_NOTHING


def test_the_newest_complete_step_is_taken_whatever_the_tracker_names(run: RunPaths, spec: RunSpec) -> None:
    torn(run, 4)
    saved(run, 5, 10, 9, tracked=5)
    found = choose(spec, run, "auto")
    assert (found.step, found.folder, found.superseded) == (10, run.checkpoints / "global_step_10", ())


def test_a_half_written_step_is_named_and_moved(run: RunPaths, spec: RunSpec) -> None:
    half = torn(run, 10)
    saved(run, 5, tracked=10)
    found = choose(spec, run, "auto")
    assert found.step == 5
    ((path, why),) = found.superseded
    assert path == half
    assert "incomplete: actor/model_world_size_2_rank_1.pt: truncated or damaged" in why
    first, second = found.lines()
    assert first == f"going on from step 5: {run.checkpoints}/global_step_5"
    assert second.startswith("setting global_step_10 aside: incomplete")
    assert half.exists(), "choosing changes nothing: a dry run does it, too"
    found.prepare()
    assert not half.exists()
    assert checkpoints.tracked_step(run.checkpoints) == 5
    assert choose(spec, run, "auto").step == 5


def test_with_no_complete_step_verl_must_start_anew(run: RunPaths, spec: RunSpec) -> None:
    torn(run, 5)
    saved(run, tracked=5)
    found = choose(spec, run, "auto")
    assert (found.folder, len(found.superseded)) == (None, 1)
    found.prepare()
    assert checkpoints.tracked_step(run.checkpoints) is None


def test_only_what_a_resume_loads_must_be_complete(run: RunPaths) -> None:
    """Such as the model alone, which a preset may say for verl."""
    saved(run, 5)
    (run.checkpoints / "global_step_5/actor/optim_world_size_2_rank_0.pt").unlink()
    for contents, step in (("[model,optimizer]", None), ("[model]", 5)):
        asked = load_spec("gsm8k-grpo-0.5b", sets=["resources.gpus_per_node=2", f"{ACTOR}.load_contents={contents}"])
        assert choose(asked.spec, run, "auto").step == step


def test_a_named_step_supersedes_later_ones(run: RunPaths, spec: RunSpec) -> None:
    saved(run, 5, 10, 15)
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
    half = torn(run, 7)
    assert [path for path, _ in choose(spec, run, "global_step_7").superseded] == [half]


@pytest.mark.parametrize("name", ["global_step_6", "other", "global_step_7", "alway"])
def test_a_resume_from_what_is_no_step_is_refused(name: str, tmp_path: Path, run: RunPaths, spec: RunSpec) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "global_step_7").write_text("a file")
    with pytest.raises(InputError, match="no folder global_step_N") as caught:
        choose(spec, run, str(tmp_path / name))
    assert caught.value.hint == "--resume takes auto|never|PATH"


def test_a_resume_from_a_damaged_step_is_refused(run: RunPaths, spec: RunSpec) -> None:
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        choose(spec, run, str(torn(run, 5)))
    assert "rank_1.pt: truncated or damaged" in caught.value.problems[0].message


def test_another_world_size_is_refused(run: RunPaths) -> None:
    saved_step(run.checkpoints, 5, world_size=4)
    with pytest.raises(InputError, match="was saved by 4 trainer processes, this run has 8") as caught:
        choose(load_spec("gsm8k-grpo-0.5b", sets=["resources.gpus_per_node=8"]).spec, run, "auto")
    assert "--set resources.gpus_per_node=4" in str(caught.value.hint)
    saved_step(run.checkpoints, 10, world_size=3)
    with pytest.raises(InputError, match="was saved by 3 trainer processes, this run has 4") as caught:
        choose(load_spec("gsm8k-grpo-0.5b", sets=["resources.gpus_per_node=2", "resources.nodes=2"]).spec, run, "auto")
    assert str(caught.value.hint).startswith("the resources it was saved with")


def test_a_critic_is_part_of_a_step_where_one_is_trained(run: RunPaths) -> None:
    gae = load_spec("gsm8k-0.5b", sets=["resources.gpus_per_node=2"]).spec
    saved(run, 5)
    assert choose(gae, run, "auto").folder is None
    saved_step(run.checkpoints, 10, critic=True)
    assert choose(gae, run, "auto").step == 10


@pytest.mark.parametrize(
    ("steps", "metrics", "pace", "taken", "superseded"),
    [
        ((5, 10), range(1, 10), 1.0, 5, ["global_step_10"]),  # it is cheap to make step 10 again, with its metrics
        ((5, 10), range(1, 10), WORTH_REDOING_S / 5 + 1, 10, []),
        ((2,), [1], 1.0, None, ["global_step_2"]),
        ((2,), None, 1.0, 2, []),
    ],
)
def test_a_step_without_its_metrics_is_made_again_where_that_is_cheap(
    steps: tuple[int, ...],
    metrics: list[int] | None,
    pace: float,
    taken: int | None,
    superseded: list[str],
    run: RunPaths,
    spec: RunSpec,
) -> None:
    saved(run, *steps)
    if metrics:
        logged(run, *metrics, pace=pace)
    found = choose(spec, run, "auto")
    assert found.step == taken
    reason = f"its metrics were not written: the run goes on from step {taken or 0}"
    assert [(path.name, why) for path, why in found.superseded] == [(name, reason) for name in superseded]


def test_what_was_sampled_ahead_is_resumed_with_as_many_storage_units(run: RunPaths) -> None:
    units = f"verl.{checkpoints.STORAGE_UNITS}"
    sets = ["resources.gpus_per_node=2", "trainer.mode=colocate_async", "correction.cap=2"]
    spec = load_spec("gsm8k-grpo-0.5b", sets=[*sets, f"{units}=2"]).spec
    saved_queue(saved_step(run.checkpoints, 5))
    saved_step(run.checkpoints, 10)
    found = choose(spec, run, "auto")
    assert (found.step, found.superseded[0][1]) == (5, "incomplete: transfer_queue/: missing")
    for count in ([], [f"{units}=4"]):
        with pytest.raises(InputError, match="has a transfer queue of 2 storage units, this run has") as caught:
            choose(load_spec("gsm8k-grpo-0.5b", sets=[*sets, *count]).spec, run, "auto")
        assert f"--set {units}=2" in str(caught.value.hint)
