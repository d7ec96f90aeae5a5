"""Log-probs over the kept tokens on a CUDA GPU: there vLLM has other kernels for top-k and top-p, and a second model
runner with a sampler of its own.

Of the tiny policy's architecture vLLM 0.24 takes the first runner, and of Qwen3, Llama and Mistral the second
(vllm/config/vllm.py:68). Each test is one engine of about a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import contract
from tests.integration import test_importance_weights as weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU and the GPU stack"),
]
RUNNERS = {"0": "vllm.v1.worker.gpu_model_runner", "1": "vllm.v1.worker.gpu.model_runner"}
"""Modules of the model runners by the value of VLLM_USE_V2_MODEL_RUNNER."""


def measured(policy: Path, folder: Path, runner: str) -> dict[str, Any]:
    """Mean weights of truncated samplings by verl's own server with the overrides of a run."""
    model, job, out = folder / "model", folder / "job.json", folder / "out.json"
    shutil.copytree(policy, model)
    kept = ("rollout.top_k=20", "correction.support=kept")
    sets = (f"model.path={model}", f"verl.{weights.ROLLOUT}.load_format=safetensors", *kept)
    options = [word for text in sets for word in ("--set", text)]
    command = [sys.executable, "-m", "flashrl_cli", "train", "--preset", "tiny-gpu", "--rollout", "bf16", "--tis", "2"]
    env = {**os.environ, "FLASHRL_DATA": str(policy.parents[1]), "FLASHRL_RUNS": str(folder / "runs")}
    plan = subprocess.run(
        [*command, *options, "--dry-run", "--json"], env=env, cwd=folder, capture_output=True, text=True, check=False
    )
    assert plan.returncode == 0, plan.stderr
    planned = json.loads(plan.stdout)
    data = policy.parent / "test.parquet"
    wanted = {"model": str(model), "data": str(data), "out": str(out), "only_kept": True}
    job.write_text(json.dumps({"overrides": planned["overrides"], **wanted}))
    of_child = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_USE_V2_MODEL_RUNNER": runner, "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        code = subprocess.run(
            [sys.executable, weights.__file__, str(job)],
            cwd=folder, env={**env, **planned["env"], **of_child}, stdout=log, stderr=log, timeout=500, check=False,
        ).returncode  # fmt: skip
    assert code == 0, (folder / "log").read_text()[-6000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("runner", RUNNERS, ids=["first runner", "second runner"])
def test_over_the_kept_tokens_weights_have_mean_1(policy: Path, tmp_path: Path, runner: str) -> None:
    found = measured(policy, tmp_path, runner)
    assert found.pop("runner") == RUNNERS[runner]
    print(json.dumps(found, indent=1))
    for sampling in weights.KEPT:
        case = found[weights.label(sampling)]
        assert 0 < case["kept"]["error"] < 5e-3
        assert abs(case["kept"]["mean"] - 1) < weights.ERRORS * case["kept"]["error"] + weights.ROUNDING, sampling
        assert case["patch"]["largest"] < weights.ROUNDING
        assert 1 <= case["tokens"]["least"] <= sampling["top_k"]
        assert case["tokens"]["most"] <= contract.kept_columns(int(sampling["top_k"]))
        if sampling["top_p"] < 1:
            assert 1 - case["all"]["mean"] > 10 * case["all"]["error"] + weights.ROUNDING, "so that it could fail"
