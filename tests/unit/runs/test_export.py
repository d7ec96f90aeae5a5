"""An exported model is complete and checked, its card names no folder, and an upload shows no token."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashrl_cli import hub
from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched, RunFailed
from flashrl_cli.runs.export import STALE, Facts, Repository, choose, export, repository, text
from flashrl_cli.runs.saved import CheckpointList, list_checkpoints
from flashrl_cli.weights import accounting
from tests.run_lab import Lab

SHAPES = {"a.weight": (2, 3), "b.weight": (4,)}
EXPECTED = accounting.Expected(
    forms=({**SHAPES, "tied.weight": (2, 3)},), optional=frozenset({"tied.weight"}), ignored=(), integers=frozenset()
)
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "float32",
    "attn_implementation": "flash_attention_2",
}


def safetensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of bf16 zeros in safetensors' format: length of the header, header, data."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    file.chmod(0o600)


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_of_config", lambda text: EXPECTED)


@pytest.fixture
def listed(lab: Lab) -> CheckpointList:
    """Steps 1 to 3, all with weights in Hugging Face's form; 3 lacks what a resume needs."""
    lab.recorded(versions={"verl": "0.9.1"})
    lab.save(1, 2, 3)
    lab.log({1: {"critic/score/mean": 0.9}, 2: {"critic/score/mean": 0.1}})
    for step in (1, 2, 3):
        safetensors(lab.hf(step) / "model.safetensors", SHAPES)
        (lab.hf(step) / "config.json").write_text(json.dumps(CONFIG))
    (lab.run.checkpoints / "global_step_3" / "actor" / "optim_world_size_2_rank_0.pt").unlink()
    return list_checkpoints(lab.run)


def test_a_step_by_every_name(listed: CheckpointList) -> None:
    assert [choose(listed, step).step for step in ("2", "latest", "best")] == [2, 3, 1]


@pytest.mark.parametrize("step", ["newest", "-1", "1.0", "", "²"])
def test_what_names_no_step(step: str, listed: CheckpointList) -> None:
    with pytest.raises(InputError, match="neither a number") as caught:
        choose(listed, step)
    assert caught.value.hint == "steps with weights: 1, 2, 3"


def test_a_step_that_is_not_there(listed: CheckpointList, lab: Lab) -> None:
    with pytest.raises(NothingMatched, match="run r: no weights of step 7"):
        choose(listed, "7")
    shutil.rmtree(lab.run.checkpoints)
    with pytest.raises(NothingMatched, match="no weights of step latest") as caught:
        choose(list_checkpoints(lab.run), "latest")
    assert caught.value.hint == "steps with weights: none"


def test_best_needs_scores_or_a_single_step(listed: CheckpointList, lab: Lab) -> None:
    lab.run.attempt(1).metrics.unlink()
    with pytest.raises(NothingMatched, match="no scores"):
        choose(list_checkpoints(lab.run), "best")
    for step in (1, 2):
        shutil.rmtree(lab.run.checkpoints / f"global_step_{step}")
    assert choose(list_checkpoints(lab.run), "best").step == 3


def test_an_export(listed: CheckpointList, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    made = export(listed, choose(listed, "1"), target)
    assert (made.step, made.tensors, made.parameters, made.compared) == (1, 2, 10, "compared with the config")
    names = {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == names
    assert made.bytes == sum(path.stat().st_size for path in target.iterdir())
    config = json.loads((target / "config.json").read_text())
    assert config == {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"}
    assert (target / "model.safetensors").stat().st_mode == (target / "config.json").stat().st_mode
    card = (target / "README.md").read_text()
    assert "| mean reward of the step's own training batch (nothing was held out) | 0.9 |" in card
    assert "| versions | verl 0.9.1 |" in card
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        ({"a.weight": (2, 3)}, "missing 1 tensor: b.weight"),
        ({**SHAPES, "a.weight": (3, 2)}, r"other shapes .*: a.weight \(in model.safetensors\) \[3, 2\], not \[2, 3\]"),
        ({**SHAPES, "c.weight": (1,)}, "1 tensor that the architecture does not have: c.weight"),
        (
            {str(n): (1,) for n in range(6)},
            "missing 2 tensors: a.weight, b.weight; 6 tensors .*: 0 .*, 3 .* and 2 more",
        ),
    ],
)
def test_weights_that_do_not_fit_are_not_exported(
    shapes: dict[str, tuple[int, ...]], names: str, listed: CheckpointList, lab: Lab, tmp_path: Path
) -> None:
    safetensors(lab.hf(1) / "model.safetensors", shapes)
    with pytest.raises(RunFailed, match=f"step 1 cannot be exported: .*{names}"):
        export(listed, choose(listed, "1"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_that_lies(listed: CheckpointList, lab: Lab, tmp_path: Path) -> None:
    index = {"weight_map": {"a.weight": "model.safetensors"}}
    (lab.hf(1) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RunFailed, match=r"holds what model\.safetensors\.index\.json does not place in it: b\.weight"):
        export(listed, choose(listed, "1"), tmp_path / "out")


def test_an_architecture_that_is_unknown(
    listed: CheckpointList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "_of_config", lambda text: None)
    assert "index" in export(listed, choose(listed, "1"), tmp_path / "out").compared


def test_a_place_that_cannot_be_written(listed: CheckpointList, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentNotReady, match="cannot be written"):
        export(listed, choose(listed, "1"), tmp_path / "file" / "out")


def test_an_adapter_is_no_model(listed: CheckpointList, lab: Lab, tmp_path: Path) -> None:
    (lab.hf(1) / "model.safetensors").unlink()
    (lab.hf(1).parent / "lora_train_meta.json").write_text("{}")
    with pytest.raises(InputError, match="step 1 is a LoRA adapter"):
        export(list_checkpoints(lab.run), choose(list_checkpoints(lab.run), "1"), tmp_path / "out")


def plan(**model: str) -> dict[str, Any]:
    return {
        "preset": "dapo",
        "spec": {
            "name": "dapo",
            "model": {"path": "Qwen/Qwen2.5-32B", **model},
            "data": {"train": "/srv/me/secret/train.parquet"},
            "algorithm": {"advantage": "grpo"},
            "rollout": {"precision": "int8"},
            "correction": {"cap": 8.0},
        },
    }


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return found


def test_a_card_of_everything() -> None:
    facts = Facts(run="r", step=20, plan=plan(), versions={"verl": "0.9.1"}, score=("validation", 0.61234))
    card = text(facts)
    assert front(card)["base_model"] == "Qwen/Qwen2.5-32B"
    for row in (
        "# r, step 20",
        "| preset | dapo |",
        "| rollout precision | int8 |",
        "| correction | truncated importance sampling at 8 |",
        "| training data | train.parquet |",
        "| versions | verl 0.9.1 |",
        "| accuracy on the run's own validation data, by the rollout engine | 0.6123 |",
    ):
        assert row in card
    assert "/home" not in card


def test_a_card_of_nothing() -> None:
    card = text(Facts(run="a|b", step=1, plan={}))
    assert "base_model" not in front(card)
    assert "| run | a\\|b |" in card
    assert "Nothing is recorded of how good this step is." in card


def test_only_the_hub_has_base_models() -> None:
    for path, shown in {"/models/me/Qwen": "Qwen", "prepared:tiny": "prepared:tiny", "./a/b": "b"}.items():
        card = text(Facts(run="r", step=1, plan=plan(path=path)))
        assert "base_model" not in front(card)
        assert f"| base model | {shown} |" in card


def test_a_card_without_correction() -> None:
    spec = plan()
    spec["spec"]["correction"]["cap"] = None
    assert "| correction | no importance sampling |" in text(Facts(run="r", step=1, plan=spec))


def test_a_card_of_another_kind_of_weights() -> None:
    spec = plan()
    spec["spec"]["correction"] |= {"kind": "icepop", "cap": 5.0, "lower": 0.5}
    assert "| correction | IcePop from 0.5 to 5 |" in text(Facts(run="r", step=1, plan=spec))


TOKEN = "hf_" + "x" * 20


class Api:
    """As much of `huggingface_hub.HfApi` as is used."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **how: Any) -> str:
        self.calls.append((name, how))
        return f"hub/{name}"

    def upload_folder(self, **how: Any) -> None:
        if self.failure:
            raise self.failure
        self.calls.append(("upload", how))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hub.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "resolves", lambda environment: True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)


def test_upload(online: None, tmp_path: Path) -> None:
    api = Api()
    assert Repository("me/m", api).upload(tmp_path, private=True, message="r, step 3") == "hub/me/m"
    assert api.calls == [
        ("me/m", {"private": True, "exist_ok": True}),
        (
            "upload",
            {"repo_id": "me/m", "folder_path": tmp_path, "commit_message": "r, step 3", "delete_patterns": STALE},
        ),
    ]


def test_a_refusal_keeps_the_token_to_itself(online: None, tmp_path: Path) -> None:
    api = Api(OSError(f"403 Forbidden for {TOKEN}"))
    with pytest.raises(EnvironmentNotReady, match="me/m was not uploaded: 403 Forbidden for …") as caught:
        Repository("me/m", api).upload(tmp_path, private=True, message="x")
    assert TOKEN not in f"{caught.value.message}{caught.value.hint}{caught.value.__cause__}"
    assert f"hf upload me/m {tmp_path}" in str(caught.value.hint)


def test_a_repository_that_can_be_written(online: None) -> None:
    found = repository("me/m")
    assert (found.name, type(found.api).__name__) == ("me/m", "HfApi")


@pytest.mark.parametrize("name", ["", "a/b/c", "me/../m", "me/m m", "-m"])
def test_a_name_that_is_none(name: str, online: None) -> None:
    with pytest.raises(InputError, match="not the name of a repository"):
        repository(name)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", None])
def test_an_upload_without_a_network(online: None, variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    else:
        monkeypatch.setattr(hub, "resolves", lambda environment: False)
    with pytest.raises(EnvironmentNotReady, match="cannot be reached"):
        repository("me/m")


def test_an_upload_without_a_token(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(EnvironmentNotReady, match="no token") as caught:
        repository("me/m")
    assert "HF_TOKEN" in str(caught.value.hint)
