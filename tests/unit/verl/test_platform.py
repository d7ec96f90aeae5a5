"""Environment by platform."""

from __future__ import annotations

import json
from pathlib import Path

from flashrl_cli import contract
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.verl.environment import run_environment
from tests.specs import load_spec

ATTEMPT = AttemptPaths(Path("/runs/x/attempt_1"))


def test_cuda():
    assert run_environment(load_spec("dapo-32b").spec, ATTEMPT) == {
        "FLASHRL_PLATFORM": "cuda",
        "FLASHRL_PLUGIN_DIR": "/runs/x/attempt_1/plugins",
        "HYDRA_FULL_ERROR": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VERL_FILE_LOGGER_PATH": "/runs/x/attempt_1/metrics.jsonl",
    }


def test_cpu_adds_verls_switches():
    found = run_environment(load_spec("tiny").spec, ATTEMPT)
    cpu = {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VLLM_CPU_KVCACHE_SPACE": "1"}
    assert found["FLASHRL_PLATFORM"] == "cpu"
    assert cpu.items() <= found.items()


def test_a_mixed_run_counts_its_replicas_and_compiles_for_each():
    """Replicas of two precisions have one configuration, by which vLLM would find the other's compiled model."""
    sets = ["rollout.precision=int8", "rollout.mix=0.25", "resources.nodes=2", "resources.gpus_per_node=8"]
    found = run_environment(load_spec("gsm8k-0.5b", sets=sets).spec, ATTEMPT)
    options = contract.RolloutOptions(**json.loads(found[contract.ENV_ROLLOUT]))
    assert options == contract.RolloutOptions(bf16_replicas=4, bf16_transfer=True)
    assert found["VLLM_DISABLE_COMPILE_CACHE"] == "1"
    plain = run_environment(load_spec("gsm8k-0.5b", sets=["rollout.lm_head_fp32=true"]).spec, ATTEMPT)
    assert json.loads(plain[contract.ENV_ROLLOUT])["lm_head_fp32"]
    assert "VLLM_DISABLE_COMPILE_CACHE" not in plain


def test_weights_go_in_bf16_to_engines_that_hold_bf16():
    def sent(*sets: str) -> bool:
        text = run_environment(load_spec("tiny", sets=sets).spec, ATTEMPT).get(contract.ENV_ROLLOUT, "{}")
        return contract.RolloutOptions(**json.loads(text)).bf16_transfer

    dtype = "verl.actor_rollout_ref.rollout.dtype"
    assert sent()
    assert sent(f"{dtype}=bfloat16")
    assert not sent(f"{dtype}=float16"), "bf16 has three bits less"
    assert not sent("rollout.precision=bf16")


def test_the_plugins_level_is_passed_on_and_a_preset_may_say_another():
    assert run_environment(load_spec("tiny").spec, ATTEMPT, logging="INFO")[contract.ENV_LOGGING] == "INFO"
    spec = load_spec("tiny", sets=["env.FLASHRL_LOGGING_LEVEL=DEBUG"]).spec
    assert run_environment(spec, ATTEMPT, logging="INFO")[contract.ENV_LOGGING] == "DEBUG"
    assert contract.ENV_LOGGING not in run_environment(load_spec("tiny").spec, ATTEMPT)


def test_a_preset_can_change_settings_but_not_the_attempts_files():
    spec = load_spec("tiny", sets=["env.VLLM_CPU_KVCACHE_SPACE=4", "env.FLASHRL_PLUGIN_DIR=/x", "env.MINE=1"]).spec
    found = run_environment(spec, ATTEMPT)
    assert (found["VLLM_CPU_KVCACHE_SPACE"], found["MINE"]) == ("4", "1")
    assert found["FLASHRL_PLUGIN_DIR"] == "/runs/x/attempt_1/plugins"
