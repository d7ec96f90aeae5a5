"""Shipped presets in miniature: their algorithm on the tiny policy, one step on the CPU stack.

One of them runs in the tests. All are run by hand:

    python tests/integration/test_presets.py [PRESET ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.integration.conftest import Workshop

PRESETS = (
    "gsm8k-qwen3-0.6b", "gsm8k-qwen3-1.7b", "gsm8k-qwen3-4b", "gsm8k-qwen3-8b",
    "gsm8k-llama3.2-1b", "gsm8k-llama3.2-3b", "gsm8k-gspo-qwen3-8b", "gsm8k-rloo-qwen3-8b",
    "gsm8k-lora-qwen3-8b", "own-data",
)  # fmt: skip
IN_THE_TESTS = "gsm8k-rloo-qwen3-8b"
SMALL = """
model:
  path: prepared:tiny
data:
  train: tiny
  val: tiny
  train_batch_size: 8
  max_prompt_length: 64
  max_response_length: 16
algorithm:
  mini_batch_size: 4
rollout:
  n: 4
trainer:
  steps: 1
  save_every: -1
  validate_before: false
"""
"""What a preset is made small by, after base/cpu; its own advantage, loss, penalties and adapters stay."""


def miniature(folder: Path, preset: str) -> Path:
    """A preset file that makes `preset` small."""
    file = folder / "small.yaml"
    # on a CPU an engine takes an adapter only within the weights
    adapter = "verl:\n  actor_rollout_ref.model.lora.merge: true\n" if "lora" in preset else ""
    head = f"name: small\ndescription: {preset} in miniature\nextends: [{preset}, base/cpu]\n"
    file.write_text(f"{head}{SMALL}{adapter}")
    return file


def check(preset: str, attempt: Path) -> None:
    """The policy was updated in the only step, with the penalties of the preset."""
    (line,) = (attempt / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, float] = json.loads(line)["data"]
    assert found["actor/grad_norm"] > 0
    assert 0 < found["critic/score/mean"] < 1, "a policy that knows something is right sometimes"
    assert ("actor/kl_loss" in found) is not ("rloo" in preset or "gspo" in preset)
    assert ("actor/reward_kl_penalty" in found) is ("rloo" in preset)


def test_a_preset_in_miniature(workshop: Workshop) -> None:
    workshop.run("train", "--preset", miniature(workshop.root, IN_THE_TESTS), "--name", "preset")
    check(IN_THE_TESTS, workshop.root / "runs" / "preset" / "attempt_1")


def run_all(presets: list[str]) -> int:
    """Run presets one after another, with the prepared `tiny` of the data folder; return how many failed."""
    failed = 0
    with TemporaryDirectory(prefix="presets-") as folder:
        env = {"CI": "1", **os.environ, "FLASHRL_RUNS": folder, "FLASHRL_CHECKPOINTS": f"{folder}/checkpoints"}
        for preset in presets:
            command = [sys.executable, "-m", "flashrl_cli", "train", "--name", preset]
            command += ["--preset", str(miniature(Path(folder), preset))]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            said = "ran"
            try:
                assert done.returncode == 0, done.stderr[-2000:]
                check(preset, Path(folder, preset, "attempt_1"))
            except (AssertionError, KeyError) as error:
                said, failed = f"FAILED: {error}", failed + 1
            print(f"{preset}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:] or list(PRESETS)) > 0)
