"""What was asked for, looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.evals.job import EngineSettings, Sampling
from flashrl_cli.evals.request import Request, plan


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "?"}],
        "reward_model": {"ground_truth": "2"},
    }
    pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / "test.parquet")
    return tmp_path / "test.parquet"


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def ask(data: Path, *patterns: Path, **options: Any) -> Request:
    defaults = {
        "base": None,
        "baseline": None,
        "limit": None,
        "sampling": Sampling(),
        "engine": EngineSettings(rollout="int8"),
        "out": None,
    }
    return plan([str(p) for p in patterns], dataset=str(data), **{**defaults, **options})


def test_base_comes_first_and_once(tmp_path: Path, data: Path) -> None:
    start, step = model(tmp_path / "start"), model(tmp_path / "p" / "a" / "global_step_1" / "actor" / "huggingface")
    for patterns in ([step], [step, start]):
        asked = ask(data, *patterns, base=str(start))
        assert [c.hf for c in asked.checkpoints] == [start, step]
        assert asked.base == asked.checkpoints[0]
    assert asked.prompts == 6


def test_results_lie_with_the_run_or_the_project(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b, c = (
        model(tmp_path / project / run / "global_step_1" / "actor" / "huggingface").parents[2]
        for project, run in (("p", "a"), ("p", "b"), ("q", "c"))
    )
    assert ask(data, a).folder == a / "eval"
    assert ask(data, a, b).folder == tmp_path / "p" / "eval"
    assert ask(data, a, c).folder == tmp_path / "eval"
    assert ask(data, model(tmp_path / "hf")).folder == tmp_path / "eval"
    assert ask(data, a, out=Path("there")).folder == tmp_path / "there"


def test_base_and_baseline_are_evaluated_once(tmp_path: Path, data: Path) -> None:
    step = model(tmp_path / "p" / "a" / "global_step_1" / "actor" / "huggingface")
    other = model(tmp_path / "other")
    asked = ask(data, step, base=str(other), baseline=str(other))
    assert [c.hf for c in asked.checkpoints] == [other, step]
    assert asked.base == asked.baseline == asked.checkpoints[0]
    assert ask(data, step, baseline=str(step)).checkpoints[0].hf == step


def test_looking_again_finds_what_is_new(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "p" / "a"
    first = model(run / "global_step_1" / "actor" / "huggingface")
    base = model(tmp_path / "start")
    asked = ask(data, run / "*", base=str(base))
    second = model(run / "global_step_2" / "actor" / "huggingface")
    assert [c.hf for c in asked.again().checkpoints] == [base, first, second]
    assert asked.again().folder == asked.folder


def test_settings_as_data(tmp_path: Path, data: Path) -> None:
    found = ask(data, model(tmp_path / "hf"), limit=2).settings()
    assert found["rollout"] == "int8"
    assert found["sampling"]["temperature"] == 0.0
