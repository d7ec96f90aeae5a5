"""verl's names on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli.verl import checkpoints as layout


def actor(folder: Path, *names: str, recorded: object = None) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    if recorded is not None:
        (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": recorded}))
    return folder


@pytest.mark.parametrize(("name", "step"), [("global_step_20", 20), ("global_step_", None), ("step_20", None)])
def test_step_number(name: str, step: int | None) -> None:
    assert layout.step_number(name) == step


@pytest.mark.parametrize(("text", "step"), [("20\n", 20), ("", None), ("twenty", None)])
def test_tracked_step(tmp_path: Path, text: str, step: int | None) -> None:
    assert layout.tracked_step(tmp_path) is None
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert layout.tracked_step(tmp_path) == step


def test_shards_are_in_order_of_rank(tmp_path: Path) -> None:
    names = [f"model_world_size_11_rank_{rank}.pt" for rank in range(11)]
    found = layout.shards(actor(tmp_path, *reversed(names)))
    assert found is not None
    assert [file.name for file in found.files] == names
    assert not found.missing


def test_absent_and_empty_shards_are_named(tmp_path: Path) -> None:
    actor(tmp_path, "model_world_size_3_rank_0.pt")
    (tmp_path / "model_world_size_3_rank_2.pt").touch()
    found = layout.shards(tmp_path)
    assert found is not None
    assert found.missing == ("model_world_size_3_rank_1.pt", "model_world_size_3_rank_2.pt")


def test_recorded_world_size_decides_between_leftovers(tmp_path: Path) -> None:
    names = ["model_world_size_1_rank_0.pt", "model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]
    found = layout.shards(actor(tmp_path, *names, recorded=1))
    assert found is not None
    assert [file.name for file in found.files] == names[:1]


@pytest.mark.parametrize("recorded", [None, "many"])
def test_world_size_from_names_without_a_readable_record(tmp_path: Path, recorded: object) -> None:
    found = layout.shards(actor(tmp_path, "model_world_size_2_rank_0.pt", recorded=recorded))
    assert found is not None
    assert len(found.files) == 2


def test_no_shards(tmp_path: Path) -> None:
    assert layout.shards(actor(tmp_path, "optim_world_size_1_rank_0.pt")) is None


@pytest.mark.parametrize(
    ("override", "files"),
    [
        ("data.val_files=/a/test.parquet", ["/a/test.parquet"]),
        ("data.val_files='/a b/test.parquet'", ["/a b/test.parquet"]),
        ("data.val_files=[/a.parquet,'/b c.parquet']", ["/a.parquet", "/b c.parquet"]),
        ("data.train_files=/a/train.parquet", []),
    ],
)
def test_val_files(override: str, files: list[str]) -> None:
    assert layout.val_files(["trainer.nnodes=1", override]) == [Path(file) for file in files]


ACTOR_KEY = "actor_rollout_ref.actor.checkpoint"


@pytest.mark.parametrize(
    ("overrides", "actor", "critic"),
    [
        ([], "model optimizer extra", "model optimizer extra"),
        ([f"{ACTOR_KEY}.save_contents=[model,hf_model]"], "model", "model optimizer extra"),
        ([f"{ACTOR_KEY}.save_contents=[model,optimizer]", f"{ACTOR_KEY}.load_contents=['model']"], "model", None),
        ([f"+{ACTOR_KEY}.load_contents=[model,extra]"], "model extra", None),
        ([f"{ACTOR_KEY}.save_contents=[model]", f"{ACTOR_KEY}.load_contents=${{.save_contents}}"], "model", None),
        (["critic.checkpoint.save_contents=[model]"], "model optimizer extra", "model"),
    ],
)
def test_loaded(overrides: list[str], actor: str, critic: str | None) -> None:
    found = layout.loaded(["trainer.nnodes=1", *overrides])
    assert found.actor == set(actor.split())
    assert found.critic == set((critic or "model optimizer extra").split())


def test_what_was_sampled_ahead_is_loaded_in_asynchronous_modes() -> None:
    mode = "trainer.v1.trainer_mode"
    read = [layout.loaded(given).queue for given in ([], [f"{mode}=sync"], [f"{mode}=colocate_async"])]
    assert read == [False, False, True]
    assert [layout.loaded_by({}, mode).queue for mode in ("sync", "separate_async")] == [False, True]


@pytest.mark.parametrize("recorded", [0, -1])
def test_a_world_of_nobody_is_not_believed(tmp_path: Path, recorded: int) -> None:
    found = layout.shards(actor(tmp_path, "model_world_size_2_rank_0.pt", recorded=recorded))
    assert found is not None
    assert len(found.files) == 2
