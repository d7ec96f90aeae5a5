"""`flashrl eval` on checkpoints that verl itself wrote, through the real vLLM."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.conftest import STEPS

PROMPTS = 24
PREAMBLE = "Think step by step and end with the number after four hashes. " * 4
"""Longer than a block of vLLM's prefix cache, which must not outlive the weights that filled it."""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path_factory.mktemp("data") / "test.parquet"
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{PREAMBLE}What is {i} plus {i * 7 % 13}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(i + i * 7 % 13)},
            "extra_info": {"split": "test", "index": i},
        }
        for i in range(PROMPTS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "flashrl_cli", "eval", *map(str, args)]


def evaluate(*args: object) -> tuple[dict[str, Any], str]:
    """The JSON document of `flashrl eval …`, and what it said."""
    argv = command(*args, "--max-tokens", 12, "--json")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def responses(folder: Path, step: int | None) -> list[str]:
    lines = (folder / "responses.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [line["response"] for line in map(json.loads, lines) if line["step"] == step]


def with_broken_steps(run: Path) -> None:
    """Beside the good ones: a step with code in its weights, a torn one, a pruned one, one half-saved."""
    import torch

    for step in (5, 6, 11):
        shutil.copytree(run / "global_step_4", run / f"global_step_{step}")
    (run / "global_step_3" / "critic").mkdir(parents=True)

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {run / 'code-was-run'}",)

    torch.save({"x": Code()}, run / "global_step_5" / "actor" / "model_world_size_2_rank_1.pt")
    torn = run / "global_step_6" / "actor" / "model_world_size_2_rank_0.pt"
    torn.write_bytes(torn.read_bytes()[:5000])


@pytest.mark.parametrize("rollout", ["bf16", "int8"])
def test_one_engine_answers_as_fresh_ones_do(
    saved: dict[int, Path], questions: Path, tmp_path: Path, rollout: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved[2] / "run", run)
    with_broken_steps(run)
    options = ("--data", questions, "--rollout", rollout)
    document, said = evaluate(f"{run}/*", "--base", saved[2] / "model", *options, "--out", tmp_path / "all")
    assert [row["step"] for row in document["results"]] == [0, *STEPS]
    assert all(row["n"] == PROMPTS and 0 <= row["lo"] <= row["accuracy"] <= row["hi"] for row in document["results"])
    assert document["engine"]["precision"] == rollout
    assert document["engine"]["quantized_layers"] == (8 if rollout == "int8" else 0)
    rows = list(csv.DictReader((tmp_path / "all" / "eval.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [0, *STEPS]

    answers = {step: responses(tmp_path / "all", step) for step in (None, *STEPS)}
    assert len(set(map(tuple, answers.values()))) == 1 + len(STEPS), "every step has weights of its own"
    evaluate(run / "global_step_10", *options, "--out", tmp_path / "one")
    assert responses(tmp_path / "one", 10) == answers[10]

    reasons = {Path(s["path"]): s["reason"] for s in document["skipped"]}
    assert "pruned" in reasons[run / "global_step_3"]
    assert "refused" in reasons[run / "global_step_5" / "actor" / "huggingface"]
    assert "torn" in reasons[run / "global_step_6" / "actor" / "huggingface"]
    assert "did not finish" in reasons[run / "global_step_11"]
    assert "model_world_size_2_rank_1.pt" in said
    assert not (run / "code-was-run").exists()


def test_sampling_is_reproducible(saved: dict[int, Path], questions: Path, tmp_path: Path) -> None:
    """The same seed gives the same samples whatever else is evaluated; samples of one prompt differ."""
    run = saved[1] / "run"
    options = ("--data", questions, "--limit", 8, "--n", 2, "--temperature", 1)
    done = subprocess.run(
        command(run, *options, "--max-tokens", 12, "--out", tmp_path / "a", "--png"),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "95 % interval" in done.stdout
    assert "●" in done.stdout
    assert (tmp_path / "a" / "eval.png").stat().st_size > 1000
    document, _ = evaluate(run / "global_step_10", *options, "--out", tmp_path / "b")
    assert document["results"][0]["n"] == 16
    first = responses(tmp_path / "a", 10)
    assert first == responses(tmp_path / "b", 10)
    assert first[0] != first[1]


def test_interrupt_leaves_nothing_behind(saved: dict[int, Path], questions: Path, tmp_path: Path) -> None:
    argv = command(saved[1] / "run", "--data", questions, "--out", tmp_path / "out")
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "starting the vLLM engine" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert children
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["engine.log"]
