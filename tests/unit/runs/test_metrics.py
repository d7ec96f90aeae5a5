"""Steps arrive once, when their line is complete."""

from __future__ import annotations

import json
from pathlib import Path

from flashrl_cli.runs.metrics import MetricsTail, read_metrics


def line(step: int, **data: float | None) -> str:
    return json.dumps({"step": step, "data": {key.replace("__", "/"): value for key, value in data.items()}}) + "\n"


def test_steps_arrive_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert list(tail.poll()) == []
    second = line(2, rollout_corr__kl=0.2)
    path.write_text(line(1, rollout_corr__kl=0.1) + second[:20])
    assert [(step.step, step["kl"]) for step in tail.poll()] == [(1, 0.1)]
    assert list(tail.poll()) == []
    with path.open("a") as stream:
        stream.write(second[20:])
    assert [(step.step, step["kl"]) for step in tail.poll()] == [(2, 0.2)]
    assert [step.step for step in read_metrics(path)] == [1, 2]


def test_lines_that_are_no_step_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    other = ["", "{", "null", "[]", "7", '{"step": 1}', '{"step": null, "data": {}}']
    path.write_text("\n".join(other) + "\n" + line(3))
    assert [step.step for step in read_metrics(path)] == [3]


def test_no_file(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []
