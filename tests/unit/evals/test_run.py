"""From events to an outcome, without an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.errors import NothingMatched, RunFailed
from flashrl_cli.evals import child, run
from flashrl_cli.evals.job import Job, Sampling
from flashrl_cli.evals.questions import Question
from flashrl_cli.evals.request import Request
from flashrl_cli.runs.checkpoints import Checkpoint

Script = Callable[[Job], Iterator[dict[str, Any]]]
RESPONSE = {
    "question": 0,
    "sample": 0,
    "response": "a\u2028b\x85c",
    "tokens": 3,
    "cut": False,
    "score": 1.0,
    "correct": True,
}


def checkpoint(folder: Path, step: int | None, **config: Any) -> Checkpoint:
    hf = folder / str(step)
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 8, **config}))
    return Checkpoint(source=folder, step=step, hf=hf, run="a")


def request(folder: Path, *checkpoints: Checkpoint) -> Request:
    question = Question([{"role": "user", "content": "1 + 1?"}], "openai/gsm8k", "2", None)
    return Request(
        checkpoints=checkpoints,
        base=None,
        skipped=(),
        data=(folder / "test.parquet",),
        questions=(question,),
        sampling=Sampling(),
        rollout="bf16",
        max_model_len=None,
        folder=folder / "eval",
    )


def answer_all(job: Job) -> Iterator[dict[str, Any]]:
    yield {"event": "stage", "text": "starting"}
    for target in job.targets:
        yield {"event": "loaded", "index": target.index, "holds": {"precision": job.rollout}}
        yield {"event": "advance", "prompts": 1}
        job.responses(target.index).write_text(json.dumps(RESPONSE, ensure_ascii=False) + "\n", encoding="utf-8")
        yield {"event": "done", "index": target.index, "seconds": 1.0}


def refuse_all(job: Job) -> Iterator[dict[str, Any]]:
    for target in job.targets:
        yield {"event": "skipped", "index": target.index, "reason": "torn"}


def evaluate(monkeypatch: pytest.MonkeyPatch, asked: Request, script: Script) -> tuple[run.Outcome, list[str], int]:
    monkeypatch.setattr(child, "events", lambda job, log: script(job))
    said: list[str] = []
    advanced: list[int] = []
    outcome = run.evaluate(asked, say=said.append, advance=advanced.append)
    return outcome, said, sum(advanced)


def test_results_are_in_the_order_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = checkpoint(tmp_path, 1, hidden_size=16)
    asked = request(tmp_path, checkpoint(tmp_path, None), wide, checkpoint(tmp_path, 2))
    outcome, said, advanced = evaluate(monkeypatch, asked, answer_all)
    assert [e.checkpoint.step for e in outcome.evaluated] == [None, 1, 2]
    assert outcome.evaluated[0].responses == [RESPONSE]
    assert outcome.evaluated[0].holds == {"precision": "bf16"}
    assert advanced == asked.prompts
    assert said.count("starting") == 2, "one engine for each architecture"
    assert [p.name for p in asked.folder.iterdir()] == [], "no work files are left"


def test_saving_again_does_not_make_another_architecture(tmp_path: Path) -> None:
    first = checkpoint(tmp_path, 1, dtype="bfloat16", transformers_version="5.9", eos_token_id=2)
    again = checkpoint(tmp_path, 2, dtype="float32", transformers_version="5.10", eos_token_id=[2, 3])
    other = checkpoint(tmp_path, 3, num_hidden_layers=3)
    assert run.architecture(first.hf) == run.architecture(again.hf) != run.architecture(other.hf)


def test_unreadable_ones_are_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path, checkpoint(tmp_path, 1), checkpoint(tmp_path, 2, hidden_size=16))

    def refuse_second(job: Job) -> Iterator[dict[str, Any]]:
        return answer_all(job) if job.targets[0].index == 0 else refuse_all(job)

    outcome, _, advanced = evaluate(monkeypatch, asked, refuse_second)
    assert [e.checkpoint.step for e in outcome.evaluated] == [1]
    assert [(s.path, s.reason) for s in outcome.skipped] == [(tmp_path / "2", "torn")]
    assert advanced == asked.prompts


def test_nothing_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NothingMatched, match="torn"):
        evaluate(monkeypatch, request(tmp_path, checkpoint(tmp_path, 1)), refuse_all)


def test_engine_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match="before its work was done"):
        evaluate(monkeypatch, request(tmp_path, checkpoint(tmp_path, 1)), lambda job: iter(()))
