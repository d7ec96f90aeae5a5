"""An export appears whole and checked, or not at all."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched, RunFailed
from flashrl_cli.evals.export import choose, export
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
def stock(lab: Lab) -> CheckpointList:
    """Steps 1 to 3, all with weights in Hugging Face's form; 3 lacks what a resume needs."""
    lab.recorded(versions={"verl": "0.9.1"})
    lab.save(1, 2, 3)
    lab.log({1: {"critic/score/mean": 0.9}, 2: {"critic/score/mean": 0.1}})
    for step in (1, 2, 3):
        safetensors(lab.hf(step) / "model.safetensors", SHAPES)
        (lab.hf(step) / "config.json").write_text(json.dumps(CONFIG))
    (lab.run.checkpoints / "global_step_3" / "actor" / "optim_world_size_2_rank_0.pt").unlink()
    return list_checkpoints(lab.run)


def test_a_step_by_every_name(stock: CheckpointList) -> None:
    assert [choose(stock, step).step for step in ("2", "latest", "best")] == [2, 3, 1]


@pytest.mark.parametrize("step", ["newest", "-1", "1.0", "", "²"])
def test_what_names_no_step(step: str, stock: CheckpointList) -> None:
    with pytest.raises(InputError, match="neither a number") as caught:
        choose(stock, step)
    assert caught.value.hint == "steps with weights: 1, 2, 3"


def test_a_step_that_is_not_there(stock: CheckpointList, lab: Lab) -> None:
    with pytest.raises(NothingMatched, match="run r: no weights of step 7"):
        choose(stock, "7")
    shutil.rmtree(lab.run.checkpoints)
    with pytest.raises(NothingMatched, match="no weights of step latest") as caught:
        choose(list_checkpoints(lab.run), "latest")
    assert caught.value.hint == "steps with weights: none"


def test_best_needs_scores_or_a_single_step(stock: CheckpointList, lab: Lab) -> None:
    lab.run.attempt(1).metrics.unlink()
    with pytest.raises(NothingMatched, match="no scores"):
        choose(list_checkpoints(lab.run), "best")
    for step in (1, 2):
        shutil.rmtree(lab.run.checkpoints / f"global_step_{step}")
    assert choose(list_checkpoints(lab.run), "best").step == 3


def test_an_export(stock: CheckpointList, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    made = export(stock, choose(stock, "1"), target)
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
    shapes: dict[str, tuple[int, ...]], names: str, stock: CheckpointList, lab: Lab, tmp_path: Path
) -> None:
    safetensors(lab.hf(1) / "model.safetensors", shapes)
    with pytest.raises(RunFailed, match=f"step 1 cannot be exported: .*{names}"):
        export(stock, choose(stock, "1"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_that_lies(stock: CheckpointList, lab: Lab, tmp_path: Path) -> None:
    index = {"weight_map": {"a.weight": "model.safetensors"}}
    (lab.hf(1) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RunFailed, match=r"holds what model\.safetensors\.index\.json does not place in it: b\.weight"):
        export(stock, choose(stock, "1"), tmp_path / "out")


def test_an_architecture_that_is_unknown(
    stock: CheckpointList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "_of_config", lambda text: None)
    assert "index" in export(stock, choose(stock, "1"), tmp_path / "out").compared


def test_a_place_that_cannot_be_written(stock: CheckpointList, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentNotReady, match="cannot be written"):
        export(stock, choose(stock, "1"), tmp_path / "file" / "out")


def test_an_adapter_is_no_model(stock: CheckpointList, lab: Lab, tmp_path: Path) -> None:
    (lab.hf(1) / "model.safetensors").unlink()
    (lab.hf(1).parent / "lora_train_meta.json").write_text("{}")
    with pytest.raises(InputError, match="step 1 is a LoRA adapter"):
        export(list_checkpoints(lab.run), choose(list_checkpoints(lab.run), "1"), tmp_path / "out")
