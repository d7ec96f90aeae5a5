"""What patterns name: every form, in order, once; and a reason for everything passed over."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest

from flashrl_cli import files, paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs.checkpoints import Checkpoint, find, hf_folder
from flashrl_cli.weights import Weights
from tests.saved_files import cached_model, saved_tensors


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


@pytest.mark.parametrize("suffix", ["", "/", "/actor", "/actor/", "/actor/huggingface"])
def test_every_name_of_a_step(tmp_path: Path, suffix: str) -> None:
    folder = step(tmp_path / "a", 5)
    assert steps(f"{folder}{suffix}") == [("a", 5)]


@pytest.mark.parametrize(
    "pattern",
    [
        "{0}",
        "{0}/*",
        "{0}/project",
        "{0}/project/*",
        "{0}/project/b/*",
        "{0}/**/global_step_*/actor",
        "~/project/b",
        "pro*",
    ],
)
def test_every_level_above(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "project" / "b", 1, 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert steps(pattern.format(tmp_path)) == [("b", 1), ("b", 2)]


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


def test_models_have_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "models" / "Qwen")
    assert steps(folder) == steps(tmp_path / "models") == [("Qwen", None)]
    assert hf_folder(str(folder)).hf == folder
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path))
    prepared = model(tmp_path / "tiny" / "model")
    assert hf_folder("prepared:tiny").hf == prepared
    with pytest.raises(InputError, match=r"prepared:none names nothing: no .*/none/model") as caught:
        hf_folder("prepared:none")
    assert caught.value.hint == "flashrl prepare none"


def test_what_cannot_be_evaluated_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 1, 2, 3, 4, 5, 6, 7)
    (folder / "latest_checkpointed_iteration.txt").write_text("6")
    (folder / "global_step_1" / "actor").rename(folder / "global_step_1" / "critic")
    (folder / "global_step_2" / "actor" / "model_world_size_2_rank_1.pt").unlink()
    (folder / "global_step_3" / "actor" / "huggingface" / "config.json").unlink()
    (folder / "global_step_4" / "actor" / "huggingface" / "tokenizer.json").unlink()
    for file in (folder / "global_step_5" / "actor").glob("*.pt"):
        file.unlink()
    (folder / "train.log").write_text("")
    assert steps(folder / "*") == [("a", 6)]
    assert reasons(folder / "*") == {
        "global_step_1": "no actor/ in it (pruned)",
        "global_step_2": "incomplete shards, missing or empty: model_world_size_2_rank_1.pt",
        "global_step_3": "no config.json in actor/huggingface/",
        "global_step_4": "no tokenizer in actor/huggingface/",
        "global_step_5": "no weights in actor/",
        "global_step_7": "newer than latest_checkpointed_iteration.txt (6): its save did not finish",
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


def test_one_model_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    folder = run(tmp_path / "a", 1, 2)
    assert hf_folder(str(folder / "global_step_2")) == find([str(folder / "global_step_2")]).checkpoints[0]
    for name, what in (
        ("notes", "notes is no model: no checkpoint in it, only nothing"),
        ("missing", "missing names nothing"),
        ("a", "names 2 checkpoints, and one is wanted"),
    ):
        with pytest.raises(InputError, match=what):
            hf_folder(str(tmp_path / name))


def test_the_forks_layout(tmp_path: Path) -> None:
    """Config and tokenizer straight in actor/, no fsdp_config.json; merged weights beside it count more than shards."""
    folder = step(tmp_path / "a", 1)
    for file in (folder / "actor" / "huggingface").iterdir():
        file.rename(folder / "actor" / file.name)
    (folder / "actor" / "huggingface").rmdir()
    (found,) = find([str(folder)]).checkpoints
    assert found.weights == Weights(hf=folder / "actor", shards=found.shards)
    assert len(found.shards) == 2
    merged = model(folder / "actor_huggingface")
    for named in (folder, merged, folder / "actor"):
        assert find([str(named)]).checkpoints == (Checkpoint(source=tmp_path / "a", step=1, hf=merged, run="a"),)


def lora_step(run: Path, number: int, *, alone: bool) -> Path:
    folder = step(run, number)
    names = [*([] if alone else ["base_model.model.q.base_layer.weight"]), "base_model.model.q.lora_A.default.weight"]
    for file in (folder / "actor").glob("*.pt"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/data.pkl", pickle.dumps(dict.fromkeys(names)))
    (folder / "actor" / "lora_train_meta.json").write_text('{"r": 8, "lora_alpha": 16}')
    return folder


def test_adapters_of_verl(tmp_path: Path) -> None:
    """The base lies in the shards, or is the model that the run's newest plan names."""
    whole, alone = lora_step(tmp_path / "r", 1, alone=False), lora_step(tmp_path / "r", 2, alone=True)
    # what verl saves of an adapter in Hugging Face's form has the wrapped model's names
    (whole / "actor" / "huggingface" / "model.safetensors").write_bytes(b"x")
    (first,) = find([str(tmp_path / "r")]).checkpoints
    assert (first.adapter, first.base, len(first.shards)) == (whole / "actor", None, 2)
    assert reasons(tmp_path / "r") == {
        "global_step_2": "a LoRA adapter alone, and no run record names the model that it was trained on"
    }
    attempt = paths.RunPaths("r", paths.runs_root() / "r", tmp_path / "r").attempt(1)
    overrides = [f"actor_rollout_ref.model.path={tmp_path / 'start'}"]
    files.write_json(attempt.plan, {"schema_version": 1, "overrides": overrides, "env": {}, "files": {}})
    assert reasons(tmp_path / "r") == {
        "global_step_2": f"a LoRA adapter that cannot be read: {tmp_path / 'start'} is no HF model: no config.json"
    }
    base = model(tmp_path / "start")
    second = find([str(tmp_path / "r")]).checkpoints[1]
    assert second.weights == Weights(
        hf=alone / "actor" / "huggingface", shards=second.shards, adapter=alone / "actor", base=base
    )
    shard = second.shards[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "is torn" in reasons(tmp_path / "r")["global_step_2"]


def adapter(folder: Path, base: object) -> Path:
    saved_tensors(folder / "adapter_model.safetensors", a=b"1")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_adapters_of_peft(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    folders = [adapter(tmp_path / "adapters" / name, str(base)) for name in ("a", "b")]
    found = find([str(tmp_path / "adapters")]).checkpoints
    assert [(c.path, c.hf, c.base, c.run) for c in found] == [(folder, base, base, folder.name) for folder in folders]
    assert found[0].weights == Weights(hf=base, adapter=folders[0], base=base)
    assert hf_folder(str(folders[1])) == found[1]


def test_adapters_without_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    adapter(tmp_path / "adapters" / "moved", "/gone/model")
    adapter(tmp_path / "adapters" / "hub", "nobody/nothing")
    adapter(tmp_path / "adapters" / "none", None)
    adapter(tmp_path / "adapters" / "bare", str(tmp_path / "bare"))
    (adapter(tmp_path / "adapters" / "empty", "a/b") / "adapter_model.safetensors").unlink()
    (adapter(tmp_path / "adapters" / "damaged", "a/b") / "adapter_config.json").write_text("{")
    model(tmp_path / "adapters" / "good")
    found = reasons(tmp_path / "adapters")
    assert "/gone/model is no HF model: no config.json" in found["moved"]
    assert "nobody/nothing is no folder here and no model in the hub's cache" in found["hub"]
    assert found["none"] == "an adapter whose adapter_config.json names no base model"
    assert found["bare"] == f"no tokenizer in its base {tmp_path / 'bare'}"
    assert found["empty"] == "an adapter without adapter_model.safetensors"
    assert "adapter_config.json is damaged" in found["damaged"]


def test_quantized_models_and_damaged_ones(tmp_path: Path) -> None:
    quantized, bare, damaged = (model(tmp_path / name) for name in ("quantized", "bare", "damaged"))
    (quantized / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    (bare / "tokenizer.json").unlink()
    (damaged / "config.json").write_text("{")
    (found,) = find([str(tmp_path)]).checkpoints
    assert (found.hf, found.quantized) == (quantized, "compressed-tensors")
    assert reasons(tmp_path) == {"bare": "no tokenizer", "damaged": "config.json is damaged"}


def test_models_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    folder = cached_model(tmp_path / "hf" / "hub", "Qwen/Qwen2.5-0.5B")
    assert steps("Qwen/Qwen2.5-0.5B") == [("Qwen/Qwen2.5-0.5B", None)]
    assert hf_folder("Qwen/Qwen2.5-0.5B").hf == folder
    with pytest.raises(InputError, match="nobody/nothing is no folder here and no model in the hub's cache"):
        find(["nobody/nothing"])
    run(tmp_path / "checkpoints" / "a", 1)
    with pytest.raises(NothingMatched, match="checkpoints holds a"):
        find(["checkpoints/mistyped"])


def test_several_patterns_as_a_shell_expands_them(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 10, 2, 1)
    (folder / "train.log").touch()
    expanded = sorted(map(str, folder.iterdir()))
    assert steps(*expanded) == steps(f"{folder}/*") == [("a", 1), ("a", 2), ("a", 10)], "in numeric order"
    assert steps(folder / "global_step_1", f"{folder}/global_step_?0/") == [("a", 1), ("a", 10)]
