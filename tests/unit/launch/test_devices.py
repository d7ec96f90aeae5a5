"""GPUs, precision and attention of a run, against what the machine has."""

from __future__ import annotations

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import ResourceSpec
from flashrl_cli.doctor import system
from flashrl_cli.doctor.gpus import Gpu
from flashrl_cli.launch import devices
from flashrl_cli.verl import needs

GPU_STACK = {"vllm": "0.24.0", "torch": "2.11.0"}


@pytest.mark.parametrize(
    ("nodes", "wanted", "found", "level"),
    [(1, 4, 4, "ok"), (1, 4, 8, "ok"), (1, 4, 3, "fail"), (1, 1, 0, "fail"), (2, 1, 8, "fail")],
)
def test_enough(nodes: int, wanted: int, found: int, level: str) -> None:
    (finding,) = devices.enough(ResourceSpec(nodes=nodes, gpus_per_node=wanted), found)
    assert finding.level == level
    assert f"{nodes} x {wanted} CUDA GPUs" in finding.text


def test_attention_with_flash_attention() -> None:
    spec = load_spec("gsm8k-0.5b").spec
    assert devices.attention(spec, GPU_STACK | {"flash-attn": "2.8.3"}).level == "ok"
    assert devices.attention(spec, GPU_STACK | {"kernels": "0.12"}).level == "warn"


def test_attention_without_it() -> None:
    critic = devices.attention(load_spec("gsm8k-0.5b").spec, GPU_STACK)
    assert critic.level == "fail"
    assert "sdpa" not in str(critic.fix)
    alone = load_spec("dapo-32b", sets=[f"verl.{needs.SEQUENCE_PARALLEL}=1"]).spec
    finding = devices.attention(alone, GPU_STACK)
    assert finding.level == "fail"
    assert str(finding.fix).endswith(needs.WITHOUT_FLASH)
    told = load_spec("dapo-32b", sets=[f"verl.{needs.SEQUENCE_PARALLEL}=1", f"verl.+{needs.ATTENTION}=sdpa"]).spec
    assert devices.attention(told, GPU_STACK).level == "ok"


def test_the_cache_in_8_bits_needs_an_able_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_spec("tiny", sets=["rollout.kv_cache=fp8"]).spec
    monkeypatch.setattr(system, "has_avx512", lambda: False)
    (finding,) = (found for found in devices.findings(asked, {}) if found.level == "fail")
    assert (finding.name, finding.fix) == ("rollout.kv_cache", "--set rollout.kv_cache=auto")
    monkeypatch.setattr(system, "has_avx512", lambda: True)
    assert all(found.level != "fail" for found in devices.findings(asked, {}))
    on_gpu = load_spec("tiny-gpu", rollout="bf16", sets=["rollout.kv_cache=fp8"]).spec
    ampere, hopper = Gpu("A100", (8, 0), "580", 1), Gpu("H200", (9, 0), "580", 1)
    (finding,) = devices._gpu_precision(on_gpu, [hopper, ampere])
    assert finding.name == "rollout.kv_cache"
    assert "A100 has 8.0" in finding.text
    assert not list(devices._gpu_precision(on_gpu, [hopper]))
    for other in (Gpu("L40S", (8, 9), "580", 1), Gpu("B200", (10, 0), "580", 1)):
        (finding,) = devices._gpu_precision(on_gpu, [other])
        assert (finding.level, finding.fix) == ("fail", "--set rollout.kv_cache=auto")
