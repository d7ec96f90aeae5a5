"""What processes that measure are told, and what they sampled, comes back as it was written; the engine's loop, without vLLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.bench import engine, scorer
from flashrl_cli.bench.job import EngineJob, Samples, ScorerJob, order
from flashrl_cli.errors import InputError
from tests.unit.bench.lab import OPTIONS

JOB = EngineJob(
    model="/hf",
    weights=None,
    arguments={"quantization": None},
    options=OPTIONS,
    questions=None,
    response=8,
    longest=None,
)
SAMPLES = Samples(prompts=[[1, 2], [3]], responses=[[4], [5, 6, 7]], logprobs=[[-0.5], [-1.0, -2.0, -0.25]])


def test_jobs_come_back(tmp_path: Path) -> None:
    JOB.write(tmp_path / "engine.json")
    assert EngineJob.read(tmp_path / "engine.json") == JOB
    job = ScorerJob(model="/hf", dtype="float32")
    job.write(tmp_path / "scorer.json")
    assert ScorerJob.read(tmp_path / "scorer.json") == job


def test_samples_come_back(tmp_path: Path) -> None:
    SAMPLES.write(tmp_path / "a.npz")
    assert Samples.read(tmp_path / "a.npz") == SAMPLES
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_batches_hold_like_lengths_and_every_sample_once() -> None:
    lengths = [3, 9, 4, 40, 10]
    samples = Samples(prompts=[[0]] * 5, responses=[[0] * (n - 1) for n in lengths], logprobs=[])
    assert list(scorer._batches(samples, 20)) == [[3], [4, 1], [2, 0]]


class Rollout:
    """Answers each order with its own words."""

    started = 0

    def __init__(self, job: EngineJob) -> None:
        Rollout.started += 1

    def facts(self) -> dict[str, Any]:
        return {"kv_tokens": 1}

    def speed(self, *, batch: int, advance: Any) -> dict[str, Any]:
        advance("5 tokens/s")
        return {"batch": batch}

    def refit(self, *, repeats: int) -> dict[str, Any]:
        return {"repeats": repeats}

    def sample(self, *, samples: int, out: str) -> dict[str, Any]:
        return {"samples": samples, "out": out}


def test_one_engine_fulfils_all_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Rollout", Rollout)
    asked = [order("start"), order("speed", batch=4), order("refit", repeats=2), order("sample", samples=3, out="x")]
    events: list[dict[str, Any]] = []
    orders = SimpleNamespace(get=iter(asked).__next__)
    with pytest.raises(StopIteration):
        engine._serve(JOB, orders, lambda event, **more: events.append({"event": event, **more}))  # type: ignore[arg-type]
    assert Rollout.started == 1
    assert events == [
        {"event": "done", "result": {"kv_tokens": 1}},
        {"event": "advance", "note": "5 tokens/s"},
        {"event": "done", "result": {"batch": 4}},
        {"event": "done", "result": {"repeats": 2}},
        {"event": "done", "result": {"samples": 3, "out": "x"}},
    ]


def limit(prompts: list[list[int]], longest: int | None) -> int:
    """Longest sequence of an engine whose options say 112."""
    made = object.__new__(engine.Rollout)
    made._job, made._prompts = replace(JOB, response=100, longest=longest), prompts
    return made._limit()


def test_no_response_is_cut_by_the_engines_limit() -> None:
    assert limit([], 50) == 112
    assert limit([[1] * 5], 2048) == 112
    assert limit([[1] * 5, [1] * 40], None) == 140
    with pytest.raises(InputError, match="need 140 tokens, the limit is 120"):
        limit([[1] * 40], 120)


def test_decoding_has_a_speed_only_where_it_took_time() -> None:
    assert engine._decoding(60, [2.0, 3.0, 4.0]) == {"decode_tokens_s": 20.0, "decode_values": [30.0, 20.0, 15.0]}
    assert engine._decoding(0, [0.1]) == {}, "a response of one token is prefill alone"
    assert engine._decoding(60, [2.0, -0.001]) == {}
