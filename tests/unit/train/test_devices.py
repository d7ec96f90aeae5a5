"""GPUs, precision and attention of a run, against what the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import ResourceSpec
from flashrl_cli.machine import ray_state, system
from flashrl_cli.machine.gpus import Gpu
from flashrl_cli.train import preflight
from flashrl_cli.verl import environment

GPU_STACK = {"vllm": "0.24.0", "torch": "2.11.0"}


@pytest.mark.parametrize(
    ("nodes", "wanted", "found", "level"),
    [(1, 4, 4, "ok"), (1, 4, 8, "ok"), (1, 4, 3, "fail"), (1, 1, 0, "fail"), (2, 1, 8, "fail")],
)
def test_enough(nodes: int, wanted: int, found: int, level: str) -> None:
    (finding,) = preflight.enough(ResourceSpec(nodes=nodes, gpus_per_node=wanted), found)
    assert finding.level == level
    assert f"{nodes} x {wanted} CUDA GPUs" in finding.text


def test_attention_with_flash_attention() -> None:
    spec = load_spec("gsm8k-0.5b").spec
    assert preflight.attention(spec, GPU_STACK | {"flash-attn": "2.8.3"}).level == "ok"
    assert preflight.attention(spec, GPU_STACK | {"kernels": "0.12"}).level == "warn"


def test_attention_without_it() -> None:
    critic = preflight.attention(load_spec("gsm8k-0.5b").spec, GPU_STACK)
    assert critic.level == "fail"
    assert "sdpa" not in str(critic.fix)
    alone = load_spec("dapo-32b", sets=[f"verl.{environment.SEQUENCE_PARALLEL}=1"]).spec
    finding = preflight.attention(alone, GPU_STACK)
    assert finding.level == "fail"
    assert str(finding.fix).endswith(environment.WITHOUT_FLASH)
    told = load_spec(
        "dapo-32b", sets=[f"verl.{environment.SEQUENCE_PARALLEL}=1", f"verl.+{environment.ATTENTION}=sdpa"]
    ).spec
    assert preflight.attention(told, GPU_STACK).level == "ok"


def test_the_cache_in_8_bits_needs_an_able_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_spec("tiny", sets=["rollout.kv_cache=fp8"]).spec
    monkeypatch.setattr(system, "has_avx512", lambda: False)
    (finding,) = (found for found in preflight.device_findings(asked, {}) if found.level == "fail")
    assert (finding.name, finding.fix) == ("rollout.kv_cache", "--set rollout.kv_cache=auto")
    monkeypatch.setattr(system, "has_avx512", lambda: True)
    assert all(found.level != "fail" for found in preflight.device_findings(asked, {}))
    on_gpu = load_spec("tiny-gpu", rollout="bf16", sets=["rollout.kv_cache=fp8"]).spec
    ampere, hopper = Gpu("A100", (8, 0), "580", 1), Gpu("H200", (9, 0), "580", 1)
    (finding,) = preflight._gpu_precision(on_gpu, [hopper, ampere])
    assert finding.name == "rollout.kv_cache"
    assert "A100 has 8.0" in finding.text
    assert not list(preflight._gpu_precision(on_gpu, [hopper]))
    for other in (Gpu("L40S", (8, 9), "580", 1), Gpu("B200", (10, 0), "580", 1)):
        (finding,) = preflight._gpu_precision(on_gpu, [other])
        assert (finding.level, finding.fix) == ("fail", "--set rollout.kv_cache=auto")


def failures(preset: str, *sets: str) -> dict[str, str | None]:
    found = preflight.device_findings(load_spec(preset, sets=list(sets)).spec, {})
    return {finding.name: finding.fix for finding in found if finding.level == "fail"}


def test_the_environment_of_a_preset_counts_as_the_shells_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried by `env.`, by Ray's variables for workers, and by the arguments of `ray.init` that a preset sets."""
    for name in ("RAY_ADDRESS", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    long = "/tmp/" + "x" * 90
    init = "verl.+ray_kwargs.ray_init"
    assert "Ray's folder" not in failures("tiny", "env.RAY_TMPDIR=/tmp")
    assert failures("tiny", f"env.RAY_TMPDIR={long}").keys() == {"Ray's folder"}
    assert failures("tiny", "env.RAY_TMPDIR=/tmp", f"{init}._temp_dir={long}").keys() == {"Ray's folder"}
    assert failures("tiny", "env.RAY_TMPDIR=/tmp", "env.VLLM_RPC_BASE_PATH=" + long).keys() == {"sockets"}
    rocr = "take env.ROCR_VISIBLE_DEVICES out of the preset"
    assert failures("tiny", "env.RAY_TMPDIR=/tmp", "env.ROCR_VISIBLE_DEVICES=0") == {"ROCR_VISIBLE_DEVICES": rocr}
    set_for_workers = f"{init}.runtime_env.env_vars.ROCR_VISIBLE_DEVICES=0"
    assert failures("tiny", "env.RAY_TMPDIR=/tmp", set_for_workers).keys() == {"ROCR_VISIBLE_DEVICES"}
    assert failures("tiny", "env.RAY_ADDRESS=127.0.0.1:9") == {"Ray": "take env.RAY_ADDRESS out of the preset"}
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert failures("tiny") == {"Ray": "unset RAY_ADDRESS"}
    assert failures("tiny", "env.RAY_ADDRESS=local", "env.RAY_TMPDIR=/tmp") == {}


def test_a_cluster_that_refuses_arguments_of_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` raises ValueError on a cluster that answers, if it is given the number of its CPUs, as presets for CPUs do."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(ray_state, "probe_answers", lambda _: True)
    assert "--executor ray" in str(failures("tiny")["Ray"])
    assert "Ray" not in failures("dapo-32b")
