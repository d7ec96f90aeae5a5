"""GPUs, precision and attention of a run, against what the machine has."""

from __future__ import annotations

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import ResourceSpec
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
