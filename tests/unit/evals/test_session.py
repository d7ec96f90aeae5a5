"""From a request to a report, once and as long as a run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from flashrl_cli.errors import NothingMatched
from flashrl_cli.evals import job
from flashrl_cli.evals import run as session
from flashrl_cli.evals.report import Report
from flashrl_cli.evals.request import Request
from flashrl_cli.runs.checkpoints import Checkpoint, Skipped
from tests.unit.evals.lab import ENGINE, SAMPLING, AllRight, Engines, Told, checkpoint, data


class Graders(AllRight):
    """AllRight as a context, as the real ones are; counts how often they were started."""

    started = 0

    def __init__(self, *, workers: int) -> None:
        assert workers > 0
        super().__init__()

    def __enter__(self) -> Self:
        Graders.started += 1
        return self

    def __exit__(self, *_: object) -> None:
        Graders.started -= 100


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    found = Engines()
    monkeypatch.setattr(job, "engine", found)
    monkeypatch.setattr(session, "Graders", Graders)
    monkeypatch.setattr(Graders, "started", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return found


def request(folder: Path, *checkpoints: Checkpoint, patterns: tuple[str, ...] = ("x",)) -> Request:
    return Request(
        patterns=patterns,
        checkpoints=checkpoints,
        base=None,
        baseline=None,
        skipped=(),
        data=(data(),),
        sampling=SAMPLING,
        engine=ENGINE,
        folder=folder / "eval",
    )


def test_a_report_is_written_and_everything_is_ended(tmp_path: Path, engines: Engines) -> None:
    asked = request(tmp_path, checkpoint(tmp_path, 1), checkpoint(tmp_path, 2))
    finished = session.evaluate(asked, Told().telling)
    document = json.loads((finished.folder / "eval.json").read_text())
    assert [row["step"] for row in document["results"]] == [1, 2]
    assert document["rollout"] == "bf16"
    assert (finished.folder / "eval.csv").is_file()
    assert (finished.folder / "responses.parquet").is_file()
    assert engines.up == 0
    assert Graders.started == 1 - 100


def test_again_nothing_is_started(tmp_path: Path, engines: Engines) -> None:
    asked = request(tmp_path, checkpoint(tmp_path, 1))
    first = session.evaluate(asked, Told().telling)
    again = session.evaluate(asked, Told().telling)
    assert len(engines.jobs) == 1
    assert Graders.started == 1 - 100
    assert again.report.rows == first.report.rows


def test_the_same_weights_are_shown_under_both_names(tmp_path: Path, engines: Engines) -> None:
    one = checkpoint(tmp_path, 1)
    asked = request(tmp_path, one, dataclasses.replace(one, step=None, run="b", source=one.hf))
    finished = session.evaluate(asked, Told().telling)
    assert [(row.run, row.step) for row in finished.report.rows] == [("a", 1), ("b", None)]
    assert len(engines.orders) == 1


def test_results_outlive_their_checkpoints(tmp_path: Path, engines: Engines) -> None:
    """verl removes `actor/` of old steps and leaves their folders; results of other questions or of a folder not asked for do not count."""
    run = tmp_path / "run"
    old, new = (
        dataclasses.replace(checkpoint(run / f"global_step_{step}" / "actor", step), source=run) for step in (1, 2)
    )
    session.evaluate(request(tmp_path, old), Told().telling)
    other = dataclasses.replace(request(tmp_path, old), data=(data("products"),))
    session.evaluate(other, Told().telling)
    shutil.rmtree(run / "global_step_1" / "actor")
    pruned = Skipped(run / "global_step_1", "no actor/ in it (pruned)")
    asked = request(tmp_path, dataclasses.replace(new, run="longer"))
    again = session.evaluate(dataclasses.replace(asked, skipped=(pruned,)), Told().telling)
    assert [(row.run, row.step, row.dataset) for row in again.report.rows] == [
        ("longer", 1, "sums"),
        ("longer", 2, "sums"),
    ]
    assert again.report.skipped == ()
    assert [row.step for row in session.evaluate(asked, Told().telling).report.rows] == [2]


def test_what_is_torn_is_told_and_the_rest_goes_on(tmp_path: Path, engines: Engines) -> None:
    torn = checkpoint(tmp_path, 1)
    (torn.hf / "model.safetensors").write_bytes(b"x" * 20)
    finished = session.evaluate(request(tmp_path, torn, checkpoint(tmp_path, 2)), Told().telling)
    assert [s.path for s in finished.report.skipped] == [torn.hf]
    assert [row.step for row in finished.report.rows] == [2]
    with pytest.raises(NothingMatched, match=r"model\.safetensors"):
        session.evaluate(request(tmp_path, torn), Told().telling)


def test_another_evaluation_has_a_log_of_its_own(tmp_path: Path) -> None:
    with session._log(tmp_path) as first:
        first.write_text("mine")
        with session._log(tmp_path) as second:
            assert second.name == f"engine-{os.getpid()}.log"
        assert first.read_text() == "mine"
    with session._log(tmp_path) as again:
        assert again == first
        assert not again.exists()


class Training:
    """A run that saves one more step before each look of those who watch it."""

    def __init__(self, folder: Path, looks: list[list[int]]) -> None:
        self.folder, self.looks, self.saved = folder, looks, list[Checkpoint]()

    def __call__(self, *_: Any) -> Iterator[bool]:
        for number, steps in enumerate(self.looks):
            self.saved += [checkpoint(self.folder, step) for step in steps]
            yield number < len(self.looks) - 1

    def lookup(self) -> Request:
        if not self.saved:
            raise NothingMatched("nothing yet")
        return request(self.folder, *self.saved)


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    run = Training(tmp_path, [[], [1], [], [2, 3], [4]])
    monkeypatch.setattr(session, "looks", run)
    monkeypatch.setattr(Request, "again", lambda self: dataclasses.replace(self, checkpoints=tuple(run.saved)))
    return run


def test_each_new_step_is_evaluated_by_the_same_engine(training: Training, engines: Engines) -> None:
    shown: list[list[int | None]] = []

    def show(report: Report) -> None:
        shown.append([row.step for row in report.rows])

    finished = session.watch(training.lookup, ["x"], Told().telling, show)
    assert shown == [[1], [1, 2, 3]], "not the last: that is the result"
    assert [row.step for row in finished.report.rows] == [1, 2, 3, 4]
    assert len(engines.jobs) == 1
    assert [order.weights.hf.name for order in engines.orders] == ["1", "2", "3", "4"]
    assert engines.up == 0


def test_a_look_at_nothing_new_does_nothing(
    training: Training, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.looks = [[1], [], [], [2], [], []]
    written: list[int] = []
    write = Report.write

    def noted(self: Report, folder: Path) -> None:
        written.append(len(self.rows))
        write(self, folder)

    monkeypatch.setattr(Report, "write", noted)
    session.watch(training.lookup, ["x"], Told().telling, lambda report: None)
    assert written == [1, 2, 2], "at what is new, and at the end"


def test_a_run_that_saves_nothing(training: Training, engines: Engines) -> None:
    training.looks = [[], [], []]
    with pytest.raises(NothingMatched):
        session.watch(training.lookup, ["x"], Told().telling, lambda report: None)


def test_steps_that_vanish_do_not_undo_what_was_found(training: Training, engines: Engines) -> None:
    training.looks = [[1], []]

    def vanish(report: Report) -> None:
        (training.saved[0].hf / "config.json").unlink()
        (training.saved[0].hf / "model.safetensors").unlink()

    finished = session.watch(training.lookup, ["x"], Told().telling, vanish)
    assert [row.step for row in finished.report.rows] == [1]
