"""The loop of the engine process, without vLLM: what ends an order, and what ends the process."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.errors import ExitCode
from flashrl_cli.evals import engine, generate, results
from flashrl_cli.evals.job import Job, Order
from flashrl_cli.evals.results import Response
from flashrl_cli.weights import Unreadable, Weights
from tests.unit.evals.lab import ENGINE, SAMPLING, data, response

Events = list[dict[str, Any]]


class Ended(Exception):
    """In the place of the process's end."""


class Generator:
    """Answers all prompts; weights called `torn`, `spoilt` or `longer` cannot be taken, nor can a start called `bad`."""

    started = 0

    def __init__(self, job: Job, prompts: list[Any]) -> None:
        Generator.started += 1
        if job.start.name == "bad":
            raise Unreadable("no tokenizer")
        assert len(prompts) == 3

    def load(self, weights: Weights) -> dict[str, Any]:
        if weights.hf.name == "torn":
            raise Unreadable("torn")
        if weights.hf.name == "spoilt":
            raise generate.Spoilt("half of it is in the engine")
        if weights.hf.name == "longer":
            raise generate.Outgrown
        return {"precision": "bf16"}

    def answer(self, prompts: dict[int, Any]) -> Iterator[list[Response]]:
        yield from ([response(number)] for number in prompts)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`serve(start, *orders)`: events until the process ends or would wait for another order, and how it ended."""

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(generate, "Generator", Generator)
    monkeypatch.setattr(Generator, "started", 0)
    monkeypatch.setattr(os, "_exit", end)

    def run(start: str, *orders: Order) -> tuple[Events, int | None]:
        job = Job(start=Path(start), quantized=None, work=tmp_path, data_sets=1, sampling=SAMPLING, engine=ENGINE)
        job.write_questions(0, data().questions)
        events: Events = []
        waiting: queue.Queue[str] = queue.Queue()
        for one in orders:
            waiting.put(one.line())
        later = SimpleNamespace(get=waiting.get_nowait)
        try:
            engine._serve(job, later, lambda event, **more: events.append({"event": event, **more}))  # type: ignore[arg-type]
        except Ended as ended:
            return events, ended.args[0]
        except queue.Empty:
            return events, None
        raise AssertionError

    return run


def order(name: str, folder: Path, *answered: int) -> Order:
    return Order(weights=Weights(hf=Path(name)), data=0, answers=folder / "answers.jsonl", answered=answered)


def kinds(events: Events) -> list[str]:
    return [event["event"] for event in events]


def test_answers_are_written_as_they_come(serve: Any, tmp_path: Path) -> None:
    events, code = serve("good", order("a", tmp_path, 1))
    assert kinds(events) == ["stage", "loaded", "advance", "advance", "done"]
    assert sorted(results.read_answers(tmp_path / "answers.jsonl")) == [0, 2]
    assert code is None


def test_what_cannot_be_read_does_not_end_the_process(serve: Any, tmp_path: Path) -> None:
    events, code = serve("good", order("torn", tmp_path), order("a", tmp_path))
    assert events[1] == {"event": "skipped", "reason": "torn", "ends": False}
    assert kinds(events)[-1] == "done"
    assert Generator.started == 1
    assert code is None


def test_what_spoils_the_engine_ends_it(serve: Any, tmp_path: Path) -> None:
    events, code = serve("good", order("spoilt", tmp_path), order("a", tmp_path))
    assert events[-1] == {"event": "skipped", "reason": "half of it is in the engine", "ends": True}
    assert code == ExitCode.OK


def test_a_start_that_cannot_be_read_is_skipped_and_ends_it(serve: Any, tmp_path: Path) -> None:
    events, code = serve("bad", order("a", tmp_path))
    assert events[-1] == {"event": "skipped", "reason": "no tokenizer", "ends": True}
    assert code == ExitCode.OK


def test_what_needs_an_engine_of_its_own_ends_it(serve: Any, tmp_path: Path) -> None:
    events, code = serve("good", order("longer", tmp_path), order("a", tmp_path))
    assert events[-1] == {"event": "restart"}
    assert code == ExitCode.OK
