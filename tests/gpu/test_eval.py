"""`flashrl eval` on CUDA GPUs: stop texts, prompts without a chat template, and an engine on each GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.evals import responses
from flashrl_cli.machine import gpus
from tests import sample_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a CUDA GPU and the GPU stack"),
]
STOP = " #"


def evaluate(policy: Path, out: Path, *options: object) -> tuple[list[dict[str, Any]], str]:
    """Responses in the order of the questions, and what the command said."""
    words = ["eval", policy, "--max-tokens", 16, "--out", out, "--json", *options]
    env = {**os.environ, "FLASHRL_DATA": str(policy.parents[1]), "CI": "1"}
    command = [sys.executable, "-m", "flashrl_cli", *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["results"]
    return responses.read(out / responses.FILE), done.stderr


def alike(ours: list[str], others: list[str]) -> None:
    """Nearly all are the same: another batch rounds otherwise, and may turn a few near ties."""
    same = sum(a == b for a, b in zip(ours, others, strict=True))
    assert same > 0.8 * len(ours), f"{same} of {len(ours)}"


@pytest.fixture(scope="module")
def usual(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return evaluate(policy, tmp_path_factory.mktemp("usual"), "--dataset", "tiny")[0]


def test_a_stop_text_after_prompts_that_hold_the_chat(
    policy: Path, usual: list[dict[str, Any]], tmp_path: Path
) -> None:
    chats = [
        sample_rows.row(
            prompt=[{"role": "user", "content": f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant"}],
            **sample_rows.truth(row["ground_truth"]),
        )
        for row in usual
    ]
    file = sample_rows.write(tmp_path / "chats.parquet", chats)
    found, _ = evaluate(policy, tmp_path / "out", "--dataset", file, "--chat-template", "none", "--stop", STOP)
    alike([row["response"] for row in found], [row["response"].split(STOP)[0] for row in usual])
    assert all(STOP not in row["response"] for row in found)
    assert sum(row["tokens"] for row in found) < sum(row["tokens"] for row in usual), "nothing is generated after it"


def test_an_engine_on_each_gpu(policy: Path, usual: list[dict[str, Any]], tmp_path: Path) -> None:
    if len(gpus.seen()) < 2:
        pytest.skip("needs two GPUs")
    found, said = evaluate(policy, tmp_path, "--dataset", "tiny", "--gpus", "all")
    assert said.count("starting the vLLM engine") == len(gpus.seen())
    alike([row["response"] for row in found], [row["response"] for row in usual])
