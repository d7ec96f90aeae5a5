"""`flashrl eval` on checkpoints that verl itself wrote, through the real vLLM."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashrl_cli.errors import RunFailed
from flashrl_cli.evals.export import export
from flashrl_cli.evals.merge import Unreadable, check, merge
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs.saved import inspect
from flashrl_cli.runs.stock import Stock

BY_VERL = Path(__file__).with_name("checkpoints_by_verl.py")
STEPS = (2, 4, 10)
PROMPTS = 24
PREAMBLE = "Think step by step and end with the number after four hashes. " * 4
"""Longer than a block of vLLM's prefix cache, which must not outlive the weights that filled it."""


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def start_ranks(out: Path, world_size: int) -> list[subprocess.Popen[bytes]]:
    out.mkdir()
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world_size)}
    argv = [sys.executable, str(BY_VERL), "make", str(out), *map(str, STEPS)]
    return [
        subprocess.Popen(argv, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(world_size)
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders `model` and `run` of a world of one and of two ranks."""
    root = tmp_path_factory.mktemp("saved")
    ranks = {world_size: start_ranks(root / f"w{world_size}", world_size) for world_size in (1, 2)}
    for process in (p for processes in ranks.values() for p in processes):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    return {world_size: root / f"w{world_size}" for world_size in ranks}


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


@pytest.mark.parametrize("world_size", [1, 2])
def test_merged_weights_are_those_of_verls_merger(saved: dict[int, Path], tmp_path: Path, world_size: int) -> None:
    import torch
    from safetensors.torch import load_file

    actor = saved[world_size] / "run" / "global_step_4" / "actor"
    argv = [sys.executable, str(BY_VERL), "merge", str(actor), str(tmp_path / "verl")]
    subprocess.run(argv, check=True, capture_output=True, timeout=240)
    shards = [actor / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
    merge(actor / "huggingface", shards, tmp_path / "flashrl")
    theirs = load_file(tmp_path / "verl" / "model.safetensors")
    ours = load_file(tmp_path / "flashrl" / "model-00001.safetensors")
    assert ours.keys() == theirs.keys()
    assert "lm_head.weight" not in ours
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_exported_step_is_a_model_of_its_own(saved: dict[int, Path], tmp_path: Path) -> None:
    """Loaded by transformers it has the step's weights in bf16; from torn shards nothing is exported."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunPaths("run", tmp_path / "run", saved[2] / "run")
    step = inspect(run.checkpoints / "global_step_4", critic=False)
    assert step.has_weights
    made = export(Stock(run=run, saved=(step,), set_aside=(), scores=None), step, tmp_path / "model")
    assert made.compared == "compared with the config"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == made.parameters
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    merged = merge(step.path / "actor" / "huggingface", shards(step.path), tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    torn = tmp_path / "global_step_4"
    shutil.copytree(step.path, torn)
    shards(torn)[1].write_bytes(shards(torn)[1].read_bytes()[:-1])
    assert not inspect(torn, critic=False).has_weights
    with pytest.raises(RunFailed, match=f"step 4 cannot be exported: {shards(torn)[1]} is torn"):
        export(Stock(run=run, saved=(), set_aside=(), scores=None), replace(step, path=torn), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def shards(step: Path) -> list[Path]:
    return [step / "actor" / f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1)]


def test_plain_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are not sharded: one copy is taken; copies that differ are no checkpoint."""
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr("flashrl_cli.evals.merge.FILE_BYTES", 16)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    for file in files:
        torch.save({"a": torch.arange(8.0), "b": torch.tensor(2.0)}, file)
    target = merge(hf, files, tmp_path / "merged")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
    assert torch.equal(load_file(target / "model-00001.safetensors")["a"], torch.arange(8.0, dtype=torch.bfloat16))
    torch.save({"a": torch.zeros(8), "b": torch.tensor(2.0)}, files[1])
    with pytest.raises(Unreadable, match="a is not sharded, yet it differs"):
        merge(hf, files, tmp_path / "again")
    torch.save({"b": torch.tensor(2.0)}, files[1])
    with pytest.raises(Unreadable, match="not hold the same parameters"):
        merge(hf, files, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_torn_hf_folder(saved: dict[int, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((saved[1] / "model" / file.name).read_bytes())
    assert check(tmp_path) == tmp_path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Unreadable, match=r"model\.safetensors is torn"):
        check(tmp_path)


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
