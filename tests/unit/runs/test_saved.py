"""Which saved steps a resume can read and how good they are; what is set aside loses nothing; who may be writing is
known.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched
from flashrl_cli.runs import checkpoints, store
from flashrl_cli.runs.saved import (
    DOOMED,
    SET_ASIDE,
    Scores,
    inspect,
    list_checkpoints,
    measure,
    point_tracker,
    refuse_while_running,
    saved_steps,
    scores,
    set_aside,
    writers,
)
from flashrl_cli.verl.checkpoints import TRACKER, Loaded
from tests.run_lab import Lab
from tests.saved_files import saved_file, saved_model, saved_queue, saved_step

REWARD = "critic/score/mean"
ACCURACY = "val-core/gsm8k/acc/mean@1"
EVERY_FILE = [
    *(f"actor/{part}_world_size_2_rank_{rank}.pt" for part in ("model", "optim", "extra_state") for rank in (0, 1)),
    "actor/fsdp_config.json",
    "actor/huggingface/config.json",
    "actor/huggingface/tokenizer_config.json",
    "data.pt",
]


# one step


def problems(step: Path, *, critic: bool = False, loaded: Loaded | None = None) -> tuple[str, ...]:
    return inspect(step, critic=critic, loaded=loaded).problems


def test_a_complete_step(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 20)
    point_tracker(tmp_path, 20)
    found = inspect(step, critic=False)
    assert (found.complete, found.has_weights, found.has_hf, found.lora) == (True, True, False, False)
    assert (found.step, found.path, found.world_size, found.tracked) == (20, step, 2, True)
    assert found.bytes == sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    assert found.written == max(file.stat().st_mtime for file in step.rglob("*"))


@pytest.mark.parametrize("name", EVERY_FILE)
def test_each_file_counts(name: str, tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1)
    whole = (step / name).read_bytes()
    (step / name).write_bytes(whole[:-1])
    assert problems(step) == (f"{name}: truncated or damaged",)
    (step / name).write_bytes(b"")
    assert problems(step) == (f"{name}: empty",)
    (step / name).unlink()
    assert problems(step) == (f"{name}: missing",)
    (step / name).mkdir()
    assert problems(step)[0] == f"{name}: unreadable (Is a directory)"


@pytest.mark.parametrize("recorded", ["{}", '{"world_size": 0}', '{"world_size": "many"}', "[]"])
def test_without_a_world_size_it_is_that_of_the_files_names(recorded: str, tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1)
    (step / "actor" / "fsdp_config.json").write_text(recorded)
    (step / "actor" / "optim_world_size_2_rank_1.pt").unlink()
    assert problems(step) == (
        "actor/fsdp_config.json: names no world size",
        "actor/optim_world_size_2_rank_1.pt: missing",
    )
    assert inspect(step, critic=False).world_size is None


def test_a_save_that_just_began(tmp_path: Path) -> None:
    step = tmp_path / "global_step_3"
    step.mkdir()
    assert problems(step, critic=True) == ("actor/: missing", "critic/: missing", "data.pt: missing")
    (step / "actor").mkdir()
    assert problems(step)[:2] == ("actor/fsdp_config.json: missing", "actor/model_world_size_1_rank_0.pt: missing")


def test_only_what_the_run_loads_is_missed(tmp_path: Path) -> None:
    step = tmp_path / "global_step_1"
    saved_model(step / "actor", parts=("model", "extra"))
    saved_model(step / "critic")
    saved_file(step / "data.pt")
    assert problems(step) == tuple(f"actor/optim_world_size_2_rank_{rank}.pt: missing" for rank in (0, 1))
    loaded = Loaded(actor=frozenset({"model", "extra"}))
    assert problems(step, critic=True, loaded=loaded) == ()
    (step / "critic" / "model_world_size_2_rank_0.pt").unlink()
    assert problems(step, critic=True, loaded=loaded) == ("critic/model_world_size_2_rank_0.pt: missing",)
    assert problems(step, critic=False, loaded=loaded) == ()


def test_what_was_sampled_ahead_counts_in_asynchronous_modes(tmp_path: Path) -> None:
    step, ahead = saved_step(tmp_path, 2), Loaded(queue=True)
    assert problems(step) == ()
    assert problems(step, loaded=ahead) == ("transfer_queue/: missing",)  # its save was interrupted
    point_tracker(tmp_path, 2)
    assert problems(step, loaded=ahead) == ()  # saved in mode sync, completely
    point_tracker(tmp_path, None)
    folder = saved_queue(step)
    assert problems(step, loaded=ahead) == ()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        whole, name = file.read_bytes(), file.relative_to(step)
        for content, problem in ((whole[:-1], "truncated or damaged"), (b"", "empty")):
            file.write_bytes(content)
            assert problems(step, loaded=ahead) == (f"{name}: {problem}",)
        file.unlink()
        assert problems(step, loaded=ahead) == (f"{name}: missing",)
        file.write_bytes(whole)
    assert inspect(step, critic=False).bytes >= sum(len(file.read_bytes()) for file in files)


def test_another_world_sizes_leftovers_are_no_substitute(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1, world_size=1)
    saved_file(step / "actor" / "model_world_size_2_rank_0.pt")
    assert problems(step) == ()
    (step / "actor" / "model_world_size_1_rank_0.pt").unlink()
    assert problems(step) == ("actor/model_world_size_1_rank_0.pt: missing",)


def test_weights_are_there_in_either_form_and_adapters_are_seen(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1)
    (step / "actor" / "lora_train_meta.json").write_text("{}")
    (step / "actor" / "optim_world_size_2_rank_0.pt").unlink()
    found = inspect(step, critic=False)
    assert (found.complete, found.has_weights, found.lora) == (False, True, True)
    (step / "actor" / "model_world_size_2_rank_0.pt").unlink()
    assert not inspect(step, critic=False).has_weights
    (step / "actor" / "huggingface" / "model.safetensors").write_bytes(b"x")
    found = inspect(step, critic=False)
    assert (found.has_hf, found.has_weights) == (True, True)


def test_sizes_count_every_file_once_and_follow_no_link(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "large").write_bytes(b"x" * 100_000)
    (tmp_path / "a" / "one").write_bytes(b"x" * 10)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 5)
    assert measure(tmp_path / "a")[0] == 15
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "large").symlink_to(tmp_path / "far" / "large")
    assert measure(tmp_path / "a")[0] < 1000
    assert measure(tmp_path / "nowhere") == (0, 0)


# all steps


def test_steps_are_in_numeric_order_and_nothing_else_is_one(tmp_path: Path) -> None:
    assert saved_steps(tmp_path / "none", critic=False) == []
    for step in (100, 20, 3):
        saved_step(tmp_path, step)
    (tmp_path / "global_step_7").write_text("a file")
    for name in ("global_step_020", "global_step_x", "eval"):
        (tmp_path / name).mkdir()
    (tmp_path / "global_step_20" / "data.pt").unlink()
    point_tracker(tmp_path, 100)
    found = saved_steps(tmp_path, critic=False)
    assert [(one.step, one.complete, one.tracked) for one in found] == [
        (3, True, False),
        (20, False, False),
        (100, True, True),
    ]
    with pytest.raises(InputError, match="global_step_N"):
        inspect(tmp_path, critic=False)


def test_a_step_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = saved_step(tmp_path, 1)

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(EnvironmentNotReady, match="global_step_1 cannot be read: Permission denied"):
        inspect(step, critic=False)
    with pytest.raises(EnvironmentNotReady, match="cannot be read: Permission denied"):
        saved_steps(tmp_path, critic=False)


def test_newest_and_best_of_a_run(lab: Lab) -> None:
    found = list_checkpoints(lab.run)
    assert (found.saved, found.set_aside, found.newest, found.best) == ((), (), None, None)
    lab.save(1, 2, 3)
    lab.log({1: {REWARD: 0.9}})
    (lab.run.checkpoints / "global_step_3" / "data.pt").unlink()
    found = list_checkpoints(lab.run)
    assert ([one.step for one in found.saved], found.newest, found.best) == ([1, 2, 3], 2, 1)


def test_the_plan_says_what_counts(lab: Lab) -> None:
    lab.save(1)
    lab.plan(advantage="gae")
    assert list_checkpoints(lab.run).saved[0].problems == ("critic/: missing",)
    (lab.run.checkpoints / "global_step_1" / "actor" / "optim_world_size_2_rank_0.pt").unlink()
    lab.plan("actor_rollout_ref.actor.checkpoint.save_contents=[model]")
    assert list_checkpoints(lab.run).saved[0].complete
    lab.run.attempt(1).plan.write_text("{")
    with pytest.raises(InputError, match=r"plan\.json is not JSON"):
        list_checkpoints(lab.run)


# set aside


def test_set_aside_moves_says_why_and_overwrites_nothing(tmp_path: Path) -> None:
    saved_step(tmp_path, 5)
    moved = set_aside(tmp_path / "global_step_5", "data.pt: missing")
    assert moved == tmp_path / SET_ASIDE / "global_step_5"
    assert (moved / "reason.txt").read_text() == "data.pt: missing\n"
    assert (moved / "actor" / "model_world_size_2_rank_0.pt").is_file()
    names = []
    for _ in range(2):
        assert not (tmp_path / "global_step_5").exists()
        (tmp_path / "global_step_5").mkdir()
        names.append(set_aside(tmp_path / "global_step_5", "again").name)
    assert names == ["global_step_5-2", "global_step_5-3"]
    assert (moved / "reason.txt").read_text() == "data.pt: missing\n"


def test_what_was_set_aside_is_listed_with_its_reason(lab: Lab) -> None:
    lab.save(1, 2)
    moved = set_aside(saved_step(lab.run.checkpoints, 3), "data.pt: missing")
    silent = set_aside(saved_step(lab.run.checkpoints, 4), "x")
    (silent / "reason.txt").unlink()
    (lab.run.checkpoints / SET_ASIDE / "notes").mkdir()
    found = list_checkpoints(lab.run).set_aside
    assert [(one.path, one.reason) for one in found] == [(moved, "data.pt: missing"), (silent, "not recorded")]
    assert found[1].bytes == sum(file.stat().st_size for file in silent.rglob("*") if file.is_file())


def test_hidden_folders_are_not_followed(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "home" / "global_step_1").mkdir(parents=True)
    lab.save(1)
    (lab.run.checkpoints / SET_ASIDE).symlink_to(tmp_path / "home")
    (lab.run.checkpoints / DOOMED).mkdir()
    (lab.run.checkpoints / DOOMED / "global_step_2").symlink_to(tmp_path / "home")
    found = list_checkpoints(lab.run)
    assert (found.set_aside, found.leftovers) == ((), ())


def test_what_is_set_aside_is_found_by_no_pattern(tmp_path: Path) -> None:
    run = tmp_path / "project" / "run"
    set_aside(saved_step(run, 5), "torn")
    for pattern in (tmp_path, tmp_path / "*", tmp_path / "**", run, run / "*"):
        with pytest.raises(NothingMatched):
            checkpoints.find([str(pattern)])
    assert saved_steps(run, critic=False) == []


def test_a_step_that_cannot_be_moved_stays(tmp_path: Path) -> None:
    elsewhere = saved_step(tmp_path / "elsewhere", 5)
    (tmp_path / "global_step_5").symlink_to(elsewhere)
    with pytest.raises(EnvironmentNotReady, match="global_step_5 cannot be moved"):
        set_aside(tmp_path / "global_step_5", "torn")
    assert (tmp_path / "global_step_5").is_symlink()
    assert not list((tmp_path / SET_ASIDE).iterdir())
    with pytest.raises(EnvironmentNotReady, match="No such file"):
        set_aside(tmp_path / "global_step_6", "torn")


def test_the_tracker_points_to_steps_that_exist(tmp_path: Path) -> None:
    saved_step(tmp_path, 4)
    point_tracker(tmp_path, 4)
    assert (tmp_path / TRACKER).read_text() == "4"
    with pytest.raises(InputError, match="no global_step_9"):
        point_tracker(tmp_path, 9)
    assert (tmp_path / TRACKER).read_text() == "4"
    point_tracker(tmp_path, None)
    point_tracker(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_4"]
    (tmp_path / TRACKER).mkdir()
    (tmp_path / TRACKER / "x").write_text("")
    with pytest.raises(EnvironmentNotReady, match="cannot be written"):
        point_tracker(tmp_path, 4)


# scores


def found(lab: Lab) -> Scores | None:
    return scores(lab.run, saved_steps(lab.run.checkpoints, critic=False))


def test_an_evaluation_beats_validation_beats_reward(lab: Lab) -> None:
    lab.save(1, 2, 3)
    assert found(lab) is None
    lab.log({1: {REWARD: 0.9}, 2: {REWARD: 0.2}, 3: {REWARD: 0.3}})
    assert found(lab) == Scores("reward", {1: 0.9, 2: 0.2, 3: 0.3})
    lab.log({1: {REWARD: 0.9}, 2: {REWARD: 0.2, ACCURACY: 0.5}, 3: {REWARD: 0.3, ACCURACY: 0.4}})
    assert found(lab) == Scores("validation", {2: 0.5, 3: 0.4})
    lab.evaluate({1: 0.1, 3: 0.6}, age=3600)
    assert found(lab) == Scores("validation", {2: 0.5, 3: 0.4}), "an evaluation of earlier weights is none"
    lab.evaluate({1: 0.1, 3: 0.6})
    assert found(lab) == Scores("evaluation", {1: 0.1, 3: 0.6})


def test_of_equals_the_later_is_better() -> None:
    assert Scores("reward", {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.1}).ranked() == [3, 2, 1, 4]


def test_steps_that_are_gone_or_hold_no_weights_do_not_count(lab: Lab) -> None:
    lab.save(1, 2, 3)
    lab.log({step: {REWARD: step / 10} for step in (1, 2, 3, 4)})
    shutil.rmtree(lab.run.checkpoints / "global_step_2")
    (lab.run.checkpoints / "global_step_3" / "actor" / "model_world_size_2_rank_0.pt").unlink()
    assert found(lab) == Scores("reward", {1: 0.1})


def test_the_newest_evaluation_counts_and_of_it_the_runs_own_rows(lab: Lab, tmp_path: Path) -> None:
    lab.save(1, 2)
    lab.evaluate({1: 0.5}, age=-5)
    lab.evaluate({2: 0.4}, folder=lab.run.checkpoints.parent, age=-9)
    assert found(lab) == Scores("evaluation", {2: 0.4})
    other = Lab(type(lab.run)("q", tmp_path / "q", lab.run.checkpoints.parent / "q"))
    other.evaluate({1: 1.0, 2: 1.0}, folder=lab.run.checkpoints.parent, age=-9)
    assert found(lab) == Scores("evaluation", {1: 0.5})
    lab.run.checkpoints.rename(tmp_path / "disk")
    lab.run.checkpoints.symlink_to(tmp_path / "disk")
    assert found(lab) == Scores("evaluation", {1: 0.5}), "a folder under another path is the same"


def test_of_several_data_sets_the_first_counts(lab: Lab) -> None:
    lab.save(1, 2)
    file = lab.evaluate({1: 0.5, 2: 0.4})
    document = json.loads(file.read_text())
    document["datasets"] = [{"name": "gsm8k"}, {"name": "aime24"}]
    rows = [{**row, "dataset": "gsm8k"} for row in document["results"]]
    others = [{**row, "dataset": "aime24", "accuracy": 0.0} for row in rows]
    file.write_text(json.dumps({**document, "results": [*others, *rows, *others]}))
    assert found(lab) == Scores("evaluation", {1: 0.5, 2: 0.4})


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"results": [5]}',
        '{"results": [], "datasets": []}',
        "[]",
        "{}",
        '{"results": [{"step": 1}]}',
        '{"results": 5}',
    ],
)
def test_a_damaged_evaluation_is_named(text: str, lab: Lab) -> None:
    lab.save(1)
    lab.evaluate({}).write_text(text)
    with pytest.raises(InputError, match=r"eval\.json is no evaluation"):
        found(lab)


# who writes


def test_a_running_run_is_refused_on_any_machine(lab: Lab) -> None:
    lab.recorded(status="running", **store.own_process())
    with pytest.raises(InputError, match=r"nothing is deleted: r \(on .*\) is running"):
        refuse_while_running(lab.run, "nothing is deleted")
    lab.recorded(status="running", host="elsewhere", pid=1)
    with pytest.raises(InputError, match=r"r \(on elsewhere\) is running"):
        refuse_while_running(lab.run, "nothing is deleted")
    lab.recorded(status="done")
    refuse_while_running(lab.run, "nothing is deleted")


def test_another_run_that_writes_to_the_same_folder_counts(lab: Lab) -> None:
    lab.save(1)
    lab.recorded()
    link = paths.checkpoints_root() / "q" / "s"
    link.parent.mkdir()
    link.symlink_to(lab.run.checkpoints)
    Lab(paths.RunPaths("s", paths.runs_root() / "s", link)).recorded(status="running", host="elsewhere")
    elsewhere = paths.RunPaths("u", paths.runs_root() / "u", paths.checkpoints_root() / "p" / "u")
    Lab(elsewhere).recorded(status="running", host="elsewhere")
    damaged = paths.runs_root() / "t" / "run.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    assert list(writers(lab.run.checkpoints)) == ["s (on elsewhere)"]


def test_a_trainer_that_outlived_flashrl_counts(lab: Lab) -> None:
    argv = psutil.Process().cmdline()
    lab.recorded(status="running", **{**store.own_process(), "pid_started": 1.0})
    lab.plan(argv=tuple(argv))
    with pytest.raises(InputError, match="verl is not"):
        refuse_while_running(lab.run, "nothing is deleted")
    lab.plan(argv=(*argv, "another"))
    refuse_while_running(lab.run, "nothing is deleted")
