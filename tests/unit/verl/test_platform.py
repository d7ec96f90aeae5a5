"""Environment by platform."""

from __future__ import annotations

from pathlib import Path

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.verl.platform import environment

ATTEMPT = AttemptPaths(Path("/runs/x/attempt_1"))


def test_cuda():
    assert environment(load_spec("dapo-32b").spec, ATTEMPT) == {
        "FLASHRL_PLATFORM": "cuda",
        "FLASHRL_PLUGIN_DIR": "/runs/x/attempt_1/plugins",
        "HYDRA_FULL_ERROR": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VERL_FILE_LOGGER_PATH": "/runs/x/attempt_1/metrics.jsonl",
    }


def test_cpu_adds_verls_switches():
    found = environment(load_spec("tiny").spec, ATTEMPT)
    cpu = {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VLLM_CPU_KVCACHE_SPACE": "1"}
    assert found["FLASHRL_PLATFORM"] == "cpu"
    assert cpu.items() <= found.items()


def test_a_preset_can_change_settings_but_not_the_attempts_files():
    spec = load_spec("tiny", sets=["env.VLLM_CPU_KVCACHE_SPACE=4", "env.FLASHRL_PLUGIN_DIR=/x", "env.MINE=1"]).spec
    found = environment(spec, ATTEMPT)
    assert (found["VLLM_CPU_KVCACHE_SPACE"], found["MINE"]) == ("4", "1")
    assert found["FLASHRL_PLUGIN_DIR"] == "/runs/x/attempt_1/plugins"
