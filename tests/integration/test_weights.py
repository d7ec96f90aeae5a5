"""Weights in every form that verl 0.9.1 and PEFT write them, tensor by tensor against what their own tools make of
them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.errors import RunFailed
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import merge
from flashrl_cli.runs.checkpoints import Checkpoint, find
from flashrl_cli.runs.export import export
from flashrl_cli.runs.saved import CheckpointList, inspect
from flashrl_cli.weights import Unreadable, Weights, holds_adapter_alone, stored_in_float32
from tests.integration.conftest import BY_VERL, PATIENCE_S

Tensors = dict[str, Any]


def of_step(step: Path, **more: Path) -> Weights:
    actor = step / "actor"
    return Weights(hf=actor / "huggingface", shards=tuple(sorted(actor.glob("model_world_size_*.pt"))), **more)


def read(folder: Path) -> Tensors:
    return dict(Weights(hf=folder).tensors())


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    import torch

    assert sorted(ours) == sorted(theirs)
    assert "lm_head.weight" not in ours
    assert all(tensor.dtype == torch.bfloat16 for tensor in ours.values())
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not different


@pytest.fixture(scope="module")
def by_verl(saved: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Step folders, and what verl's merger makes of each."""
    steps = [saved[world_size] / "run" / "global_step_4" for world_size in saved]
    steps.append(saved[2] / "fsdp1" / "global_step_1")
    target = tmp_path_factory.mktemp("by_verl")
    argv = [sys.executable, str(BY_VERL), "merge", str(target), *(str(step / "actor") for step in steps)]
    subprocess.run(argv, check=True, capture_output=True, timeout=PATIENCE_S)
    return {step: target / str(number) for number, step in enumerate(steps)}


def test_tensors_are_those_of_verls_merger(by_verl: dict[Path, Path]) -> None:
    """Shards of one and of two ranks, of FSDP2 and of FSDP1."""
    for step, merged in by_verl.items():
        weights = of_step(step)
        weights.check()
        assert_same(dict(weights.tensors()), read(merged))
    assert len({of_step(step).fingerprint() for step in by_verl}) == len(by_verl)


def test_a_merge_writes_the_same_tensors(by_verl: dict[Path, Path], tmp_path: Path) -> None:
    checkpoints = [Checkpoint(source=s, step=n, hf=s, shards=of_step(s).shards, run="r") for n, s in enumerate(by_verl)]
    checkpoints = [replace(c, hf=c.hf / "actor" / "huggingface") for c in checkpoints]
    folders = merge.merged(checkpoints, tmp_path / "out", lambda _: None)
    for folder, theirs in zip(folders, by_verl.values(), strict=True):
        assert_same(read(folder), read(theirs))


def by_peft(base: Path, adapter: Path) -> Tensors:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged = model.merge_and_unload().bfloat16().state_dict()
    return {name: tensor for name, tensor in merged.items() if name != "lm_head.weight"}


def test_adapters_are_merged_as_peft_merges_them(saved: dict[int, Path], tmp_path: Path) -> None:
    """As PEFT saves one, with either scale, and as verl does: with the base in the shards, or without."""
    base, adapter, run = saved[2] / "model", saved[2] / "peft", saved[2] / "lora"
    theirs = by_peft(base, adapter)
    before = read(base)
    assert any(not (theirs[name] == before[name]).all() for name in theirs)
    assert_same(dict(Weights(hf=base, adapter=adapter, base=base).tensors()), theirs)
    whole, alone = (run / f"global_step_{step}" for step in (1, 2))
    assert [holds_adapter_alone(of_step(step).shards[0]) for step in (whole, alone)] == [False, True]
    assert stored_in_float32(of_step(whole).shards[0])
    assert_same(dict(of_step(whole, adapter=whole / "actor").tensors()), theirs)
    assert_same(dict(of_step(alone, adapter=alone / "actor", base=base).tensors()), theirs)

    rslora = shutil.copytree(adapter, tmp_path / "rslora")
    config = json.loads((rslora / "adapter_config.json").read_text())
    (rslora / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert_same(dict(Weights(hf=base, adapter=rslora, base=base).tensors()), by_peft(base, rslora))


def test_adapters_that_do_not_fit(saved: dict[int, Path], tmp_path: Path) -> None:
    base, step = saved[2] / "model", saved[2] / "lora" / "global_step_2"
    with pytest.raises(Unreadable, match="holds an adapter alone, and its base model is unknown"):
        dict(of_step(step, adapter=step / "actor").tensors())
    with pytest.raises(Unreadable, match=r"no lora_train_meta\.json says its alpha"):
        dict(of_step(step).tensors())
    adapter = shutil.copytree(saved[2] / "peft", tmp_path / "peft")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(Unreadable, match=r"\(128, 4\) by \(128, 4\)|of rank 5 does not fit model\.layers"):
        dict(Weights(hf=base, adapter=adapter, base=base).tensors())
    quantized = shutil.copytree(base, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(Unreadable, match="is quantized: no adapter"):
        dict(Weights(hf=base, adapter=saved[2] / "peft", base=quantized).tensors())


def world(rank: int, mesh_shape: tuple[int, ...], file: Path) -> Tensors:
    """Save to `file` one rank's shard of a small model, sharded by FSDP2 without other ranks; returns the model."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world_size = int(torch.tensor(mesh_shape).prod())
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3, bias=False))
        whole = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        names = ("ddp", "fsdp")[-len(mesh_shape) :]
        torch.save(
            fully_shard(model, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)).state_dict(), file
        )
    finally:
        torch.distributed.destroy_process_group()
    return whole


@pytest.mark.parametrize("mesh_shape", [(3,), (8,), (2, 2), (2, 3)])
def test_worlds_of_any_size(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    """Uneven parts, ranks without any, and copies on other ranks; too few shards are no checkpoint."""
    ranks = range(mesh_shape[0] * (mesh_shape[1] if mesh_shape[1:] else 1))
    files = [tmp_path / f"{rank}.pt" for rank in ranks]
    (tmp_path / "config.json").write_text("{}")
    *_, whole = (world(rank, mesh_shape, file) for rank, file in enumerate(files))
    assert_same(dict(Weights(hf=tmp_path, shards=tuple(files)).tensors()), whole)
    with pytest.raises(Unreadable, match="is spread over"):
        dict(Weights(hf=tmp_path, shards=tuple(files[:1])).tensors())


def test_an_exported_step_is_a_model_of_its_own(saved: dict[int, Path], tmp_path: Path) -> None:
    """Loaded by transformers it has the step's weights in bf16; from torn shards nothing is exported."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunPaths("run", tmp_path / "run", saved[2] / "run")
    step = inspect(run.checkpoints / "global_step_4", critic=False)
    assert step.has_weights
    made = export(CheckpointList(run=run, saved=(step,), set_aside=(), scores=None), step, tmp_path / "model")
    assert made.compared == "compared with the config"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == made.parameters
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    (merged,) = merge.merged(find([str(step.path)]).checkpoints, tmp_path / "merged", lambda _: None)
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    torn = tmp_path / "global_step_4"
    shutil.copytree(step.path, torn)
    shards(torn)[1].write_bytes(shards(torn)[1].read_bytes()[:-1])
    assert not inspect(torn, critic=False).has_weights
    with pytest.raises(RunFailed, match=f"step 4 cannot be exported: {shards(torn)[1]} is torn"):
        export(
            CheckpointList(run=run, saved=(), set_aside=(), scores=None), replace(step, path=torn), tmp_path / "none"
        )
    assert not (tmp_path / "none").exists()


def shards(step: Path) -> list[Path]:
    return [step / "actor" / f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1)]


def test_plain_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are not sharded: one copy is taken; copies that differ are no checkpoint."""
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr("flashrl_cli.runs.merge.FILE_BYTES", 16)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    for file in files:
        torch.save({"a": torch.arange(8.0), "b": torch.tensor(2.0)}, file)
    weights = Weights(hf=hf, shards=tuple(files))
    target = tmp_path / "merged"
    merge.write(weights, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
    assert torch.equal(load_file(target / "model-00001.safetensors")["a"], torch.arange(8.0, dtype=torch.bfloat16))
    before = weights.fingerprint()
    torch.save({"a": torch.zeros(8), "b": torch.tensor(2.0)}, files[1])
    assert weights.fingerprint() != before
    with pytest.raises(Unreadable, match="a is not sharded, yet it differs"):
        merge.write(weights, tmp_path / "again")
    torch.save({"b": torch.tensor(2.0)}, files[1])
    with pytest.raises(Unreadable, match="not hold the same parameters"):
        merge.write(weights, tmp_path / "third")


def test_torn_hf_folder(saved: dict[int, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((saved[1] / "model" / file.name).read_bytes())
    Weights(hf=tmp_path).check()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Unreadable, match=r"model\.safetensors is torn"):
        Weights(hf=tmp_path).check()
