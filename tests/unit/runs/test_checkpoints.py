"""What patterns name: every form, in order, once; and a reason for everything passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs.checkpoints import Checkpoint, find, hf_folder


def step(run: Path, number: int, *, world_size: int = 2) -> Path:
    folder = run / f"global_step_{number}"
    hf = folder / "actor" / "huggingface"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    (hf / "tokenizer.json").write_text("{}")
    for rank in range(world_size):
        (folder / "actor" / f"model_world_size_{world_size}_rank_{rank}.pt").write_bytes(b"x")
    return folder


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def run(root: Path, *numbers: int) -> Path:
    for number in numbers:
        step(root, number)
    (root / "latest_checkpointed_iteration.txt").write_text(str(max(numbers)))
    return root


def steps(*patterns: object) -> list[tuple[str, int | None]]:
    return [(c.run, c.step) for c in find([str(p) for p in patterns]).checkpoints]


def reasons(*patterns: object) -> dict[str, str]:
    return {s.path.name: s.reason for s in find([str(p) for p in patterns]).skipped}


def test_steps_are_in_numeric_order(tmp_path: Path) -> None:
    run(tmp_path / "project" / "a", 100, 20, 3)
    assert steps(tmp_path / "project" / "a" / "*") == [("a", 3), ("a", 20), ("a", 100)]


@pytest.mark.parametrize("suffix", ["", "/", "/actor", "/actor/", "/actor/huggingface"])
def test_every_name_of_a_step(tmp_path: Path, suffix: str) -> None:
    folder = step(tmp_path / "a", 5)
    assert steps(f"{folder}{suffix}") == [("a", 5)]


@pytest.mark.parametrize("pattern", ["", "*", "project", "project/*", "project/b/*", "**/global_step_*/actor"])
def test_every_level_above(tmp_path: Path, pattern: str) -> None:
    run(tmp_path / "project" / "b", 1, 2)
    assert steps(tmp_path / pattern) == [("b", 1), ("b", 2)]


def test_home_and_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "a", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert steps("~/a") == steps("a/glo*") == [("a", 1)]


def test_named_twice_is_there_once(tmp_path: Path) -> None:
    folder = step(tmp_path / "a", 1)
    (tmp_path / "a" / "latest").symlink_to(folder)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert steps(tmp_path / "a" / "latest", tmp_path / "a", folder, tmp_path / "link") == [("a", 1)]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    run(tmp_path / "p" / "a", 1)
    run(tmp_path / "q" / "a", 1)
    run(tmp_path / "q" / "b", 1)
    assert steps(tmp_path) == [("b", 1), ("p/a", 1), ("q/a", 1)]


def test_shards_and_merged_weights(tmp_path: Path) -> None:
    sharded, merged = step(tmp_path / "a", 1), step(tmp_path / "a", 2)
    (merged / "actor" / "huggingface" / "model.safetensors").write_bytes(b"x")
    first, second = find([str(tmp_path)]).checkpoints
    assert [file.parent for file in first.shards] == [sharded / "actor"] * 2
    assert second == Checkpoint(source=tmp_path / "a", step=2, hf=merged / "actor" / "huggingface", run="a")


def test_hf_folder_has_no_step(tmp_path: Path) -> None:
    folder = model(tmp_path / "models" / "Qwen")
    assert steps(folder) == steps(tmp_path / "models") == [("Qwen", None)]
    assert hf_folder(str(folder)).hf == folder


def test_what_cannot_be_evaluated_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 1, 2, 3, 4, 5, 6)
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    (folder / "global_step_1" / "actor").rename(folder / "global_step_1" / "critic")
    (folder / "global_step_2" / "actor" / "model_world_size_2_rank_1.pt").unlink()
    (folder / "global_step_3" / "actor" / "huggingface" / "config.json").unlink()
    (folder / "global_step_4" / "actor" / "huggingface" / "tokenizer.json").unlink()
    (folder / "train.log").write_text("")
    assert steps(folder / "*") == [("a", 5)]
    assert reasons(folder / "*") == {
        "global_step_1": "no actor/ in it (pruned)",
        "global_step_2": "incomplete shards, missing or empty: model_world_size_2_rank_1.pt",
        "global_step_3": "no config.json in actor/huggingface/",
        "global_step_4": "no tokenizer in actor/huggingface/",
        "global_step_6": "newer than latest_checkpointed_iteration.txt (5): its save did not finish",
        "train.log": "a file, not a checkpoint",
    }


def test_critic_is_no_policy(tmp_path: Path) -> None:
    folder = step(tmp_path / "a", 1)
    model(folder / "critic" / "huggingface")
    assert reasons(folder, folder / "critic") == {"critic": "a critic, not a policy"}
    assert steps(folder, folder / "critic" / "huggingface") == [("a", 1)]


def test_own_results_are_passed_over_in_silence(tmp_path: Path) -> None:
    run(tmp_path / "a", 1)
    (tmp_path / "a" / "eval").mkdir()
    assert reasons(tmp_path / "a" / "*") == {}


def test_nothing_matched_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(NothingMatched, match=r"runs/\*: .* holds notes") as caught:
        find([str(tmp_path / "runs" / "*")])
    assert caught.value.exit_code == 4
    with pytest.raises(NothingMatched, match="no checkpoint in it, only nothing"):
        find([str(tmp_path / "notes")])


def test_base_must_be_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match="notes is no model: no checkpoint in it, only nothing"):
        hf_folder(str(tmp_path / "notes"))
    with pytest.raises(InputError, match=r"missing names nothing"):
        hf_folder(str(tmp_path / "missing"))
    run(tmp_path / "a", 1, 2)
    with pytest.raises(InputError, match="names 2 checkpoints, and one is wanted"):
        hf_folder(str(tmp_path / "a"))


def test_a_step_can_be_the_base(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 1, 2) / "global_step_2"
    assert hf_folder(str(folder)) == find([str(folder)]).checkpoints[0]
