"""Which saved steps a resume can read, whatever cut them off; and moving the others away loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched
from flashrl_cli.runs import checkpoints
from flashrl_cli.runs.saved import SET_ASIDE, inspect, point_tracker, saved_steps, set_aside
from flashrl_cli.verl.checkpoints import TRACKER, Loaded
from tests.saved_files import saved_file, saved_model, saved_step

EVERY_FILE = [
    *(f"actor/{part}_world_size_2_rank_{rank}.pt" for part in ("model", "optim", "extra_state") for rank in (0, 1)),
    "actor/fsdp_config.json",
    "actor/huggingface/config.json",
    "actor/huggingface/tokenizer_config.json",
    "data.pt",
]


def problems(step: Path, *, critic: bool = False, loaded: Loaded | None = None) -> tuple[str, ...]:
    return inspect(step, critic=critic, loaded=loaded).problems


def test_a_whole_step(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 20)
    point_tracker(tmp_path, 20)
    found = inspect(step, critic=False)
    assert found.complete
    assert (found.step, found.path, found.world_size, found.tracked) == (20, step, 2, True)
    assert not found.has_hf
    assert not found.lora
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


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1)
    (step / "data.pt").unlink()
    (step / "data.pt").mkdir()
    assert problems(step) == ("data.pt: unreadable (Is a directory)",)


@pytest.mark.parametrize("recorded", ["{}", '{"world_size": 0}', '{"world_size": "many"}', "[]"])
def test_without_a_world_size_the_names_tell_it(recorded: str, tmp_path: Path) -> None:
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


def test_a_critic_counts_if_the_run_has_one(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1, critic=True)
    assert problems(step, critic=True) == ()
    (step / "critic" / "model_world_size_2_rank_0.pt").unlink()
    assert problems(step, critic=True) == ("critic/model_world_size_2_rank_0.pt: missing",)
    assert problems(step, critic=False) == ()


def test_what_is_not_loaded_is_not_missed(tmp_path: Path) -> None:
    step = tmp_path / "global_step_1"
    saved_model(step / "actor", parts=("model", "extra"))
    saved_model(step / "critic")
    saved_file(step / "data.pt")
    assert problems(step) == tuple(f"actor/optim_world_size_2_rank_{rank}.pt: missing" for rank in (0, 1))
    loaded = Loaded(actor=frozenset({"model", "extra"}))
    assert problems(step, critic=True, loaded=loaded) == ()
    assert problems(step, critic=True, loaded=Loaded(critic=frozenset({"model"})))


def test_another_world_sizes_leftovers_do_not_stand_in(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1, world_size=1)
    saved_file(step / "actor" / "model_world_size_2_rank_0.pt")
    assert problems(step) == ()
    (step / "actor" / "model_world_size_1_rank_0.pt").unlink()
    assert problems(step) == ("actor/model_world_size_1_rank_0.pt: missing",)


def test_weights_in_hf_form_and_adapters_are_seen(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1)
    (step / "actor" / "huggingface" / "model.safetensors").write_bytes(b"x")
    (step / "actor" / "lora_train_meta.json").write_text("{}")
    found = inspect(step, critic=False)
    assert found.has_hf
    assert found.lora
    (step / "actor" / "model_world_size_2_rank_0.pt").unlink()
    assert inspect(step, critic=False).has_weights, "the HF weights are enough"


def test_weights_without_an_optimizer_are_weights(tmp_path: Path) -> None:
    step = saved_step(tmp_path, 1)
    (step / "actor" / "optim_world_size_2_rank_0.pt").unlink()
    assert (inspect(step, critic=False).complete, inspect(step, critic=False).has_weights) == (False, True)
    (step / "actor" / "model_world_size_2_rank_0.pt").unlink()
    assert not inspect(step, critic=False).has_weights


def test_steps_are_in_numeric_order_and_nothing_else_is_one(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        saved_step(tmp_path, step)
    (tmp_path / "global_step_7").write_text("a file")
    (tmp_path / "global_step_020").mkdir()
    (tmp_path / "global_step_x").mkdir()
    (tmp_path / "eval").mkdir()
    (tmp_path / "global_step_20" / "data.pt").unlink()
    point_tracker(tmp_path, 100)
    found = saved_steps(tmp_path, critic=False)
    assert [(one.step, one.complete, one.tracked) for one in found] == [
        (3, True, False),
        (20, False, False),
        (100, True, True),
    ]


def test_no_checkpoints_are_no_steps(tmp_path: Path) -> None:
    assert saved_steps(tmp_path / "none", critic=False) == []
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


def test_set_aside_moves_and_says_why(tmp_path: Path) -> None:
    saved_step(tmp_path, 5)
    moved = set_aside(tmp_path / "global_step_5", "data.pt: missing")
    assert moved == tmp_path / SET_ASIDE / "global_step_5"
    assert (moved / "reason.txt").read_text() == "data.pt: missing\n"
    assert (moved / "actor" / "model_world_size_2_rank_0.pt").is_file()
    assert not (tmp_path / "global_step_5").exists()


def test_set_aside_never_overwrites(tmp_path: Path) -> None:
    names = []
    for number in range(3):
        step = tmp_path / "global_step_5"
        step.mkdir()
        (step / "mark").write_text(str(number))
        names.append(set_aside(step, "again").name)
    assert names == ["global_step_5", "global_step_5-2", "global_step_5-3"]
    assert [(tmp_path / SET_ASIDE / name / "mark").read_text() for name in names] == ["0", "1", "2"]


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


def test_a_tracker_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    saved_step(tmp_path, 4)
    (tmp_path / TRACKER).mkdir()
    (tmp_path / TRACKER / "x").write_text("")
    with pytest.raises(EnvironmentNotReady, match="cannot be written"):
        point_tracker(tmp_path, 4)
    assert json.loads((tmp_path / "global_step_4" / "actor" / "fsdp_config.json").read_text())["world_size"] == 2
