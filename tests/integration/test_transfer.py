"""Weights sent in bf16: what verl's own gathering yields of a sharded float32 module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing verl warns of much that is not ours."""

if TYPE_CHECKING:
    import torch


def gathered(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights as verl's engine gathers them for the rollout, from the class in a process as a plugin of verl's
    leaves it.
    """
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    engine: Any = object.__new__(FSDPEngine)
    engine.module = module
    engine._uses_fsdp2_cpu_offload_policy = engine._qat_enabled = False
    engine._is_offload_param = False
    engine.model_config = SimpleNamespace(lora={}, hf_config=SimpleNamespace(model_type="qwen2"))
    weights, _ = engine.get_per_tensor_param()
    return dict(weights)


def test_shards_are_gathered_in_bf16(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import torch
    import torch.distributed as dist
    import verl.utils.device
    import verl.utils.model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from verl.workers.engine.fsdp import transformer_impl

    from flashrl_cli.plugins import transfer

    for module in (verl.utils.model, transformer_impl):
        monkeypatch.setattr(module, "convert_weight_keys", verl.utils.model.convert_weight_keys)
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    for name in ("log_gpu_memory_usage", "load_fsdp_model_to_gpu"):
        monkeypatch.setattr(transformer_impl, name, lambda *_, **__: None)
    monkeypatch.setattr(verl.utils.device, "get_device_id", lambda: "cpu")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        plain = {name: value.clone() for name, value in sharded.state_dict().items()}
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        assert gathered(sharded)["0.weight"].dtype == torch.float32
        transfer.send_bf16()
        transfer.send_bf16()
        found = gathered(sharded)
    finally:
        dist.destroy_process_group()
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(found[name], value.to(torch.bfloat16) if value.is_floating_point() else value), name
    assert found["0.weight"].dtype == torch.bfloat16
    assert not isinstance(found["0.weight"], DTensor)


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashrl_cli.plugins import transfer

    monkeypatch.setattr(transfer, "VERL", "0.9.2")
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.2 only"):
        transfer.send_bf16()
