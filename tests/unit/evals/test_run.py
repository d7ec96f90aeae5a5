"""From units to results, without an engine."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.evals import job as child
from flashrl_cli.evals import results, run
from flashrl_cli.evals.job import Job, Order
from flashrl_cli.evals.results import DataSet
from flashrl_cli.evals.run import Evaluation, Speed
from flashrl_cli.evals.store import Store, Unit, units
from flashrl_cli.runs.checkpoints import Checkpoint
from tests.unit.evals.lab import ENGINE, SAMPLING, AllRight, Engines, Told, answer, checkpoint, data, response


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    found = Engines()
    monkeypatch.setattr(child, "engine", found)
    return found


def asked(checkpoints: list[Checkpoint], sets: list[DataSet]) -> list[Unit]:
    found = list(units(checkpoints, sets, sampling=SAMPLING, engine=ENGINE))
    assert all(isinstance(one, Unit) for one in found)
    return [one for one in found if isinstance(one, Unit)]


def evaluation(folder: Path, sets: list[DataSet], told: Told) -> Evaluation:
    return Evaluation(
        store=Store(folder / "kept"),
        data=tuple(sets),
        sampling=SAMPLING,
        engine=ENGINE,
        log=folder / "log",
        graders=AllRight,
        telling=told.telling,
    )


def work(folder: Path, checkpoints: list[Checkpoint], sets: list[DataSet]) -> tuple[Evaluation, list[Unit], Told]:
    told, wanted = Told(), asked(checkpoints, sets)
    with evaluation(folder, sets, told) as one:
        one.work(wanted)
    return one, wanted, told


def test_one_engine_for_each_architecture(tmp_path: Path, engines: Engines) -> None:
    checkpoints = [checkpoint(tmp_path, 1), checkpoint(tmp_path, 2), checkpoint(tmp_path, 3, hidden_size=16)]
    sets = [data("sums", 3), data("products", 2)]
    done, wanted, told = work(tmp_path, checkpoints, sets)
    assert len(engines.jobs) == 2
    assert engines.up == 0
    assert set(done.results) == {one.key for one in wanted}
    assert [o.weights.hf.name for o in engines.orders] == ["1", "1", "2", "2", "3", "3"], "weights are loaded once"
    texts = [[r.response for r in done.results[one.key].responses] for one in wanted]
    assert texts[0] == ["1: 0", "1: 1", "1: 2"]
    assert texts[5] == ["3: 0", "3: 1"]
    assert told.prompts == 3 * 5
    assert told.tokens == 3 * 15


def test_nothing_is_generated_twice(tmp_path: Path, engines: Engines) -> None:
    checkpoints, sets = [checkpoint(tmp_path, 1)], [data()]
    first, _, _ = work(tmp_path, checkpoints, sets)
    again, wanted, told = work(tmp_path, [*checkpoints, checkpoint(tmp_path, 2)], sets)
    assert [order.weights.hf.name for order in engines.orders] == ["1", "2"]
    assert again.results[wanted[0].key] == first.results[wanted[0].key]
    assert told.prompts == 6
    work(tmp_path, checkpoints, sets)
    assert len(engines.jobs) == 2, "without anything new no engine starts"


def test_killed_in_the_middle_it_goes_on(tmp_path: Path, engines: Engines) -> None:
    one, sets = checkpoint(tmp_path, 1), [data()]
    (unit,) = asked([one], sets)
    file = Store(tmp_path / "kept").answers(unit)
    file.parent.mkdir()
    results.append(file, [response(1, "before")])
    file.write_text(file.read_text() + '[{"question": 2, "sam')
    done, _, told = work(tmp_path, [one], sets)
    assert engines.orders[0].answered == (1,)
    assert [r.response for r in done.results[unit.key].responses] == ["1: 0", "before", "1: 2"]
    assert told.prompts == 3
    assert told.tokens == 6


def test_what_cannot_be_read_is_skipped_with_all_its_data_sets(tmp_path: Path, engines: Engines) -> None:
    def refuse_first(job: Job, order: Order) -> Any:
        if order.weights.hf.name == "1":
            yield {"event": "skipped", "reason": "torn", "ends": order.weights.hf.parent.name == "spoilt"}
        else:
            yield from answer(job, order)

    engines.script = refuse_first
    for name in ("intact", "spoilt"):
        folder = tmp_path / name
        checkpoints = [checkpoint(folder, 1), checkpoint(folder, 2)]
        done, wanted, told = work(folder, checkpoints, [data("sums", 3), data("products", 2)])
        assert [(s.reason, s.refused) for s in done.skipped.values()] == [("torn", True)]
        assert set(done.results) == {one.key for one in wanted[2:]}
        assert told.prompts == 10
    assert len(engines.jobs) == 1 + 2, "an engine that was spoilt is replaced"


def test_an_engine_that_a_checkpoint_has_outgrown_is_replaced(tmp_path: Path, engines: Engines) -> None:
    def only_at_the_start(job: Job, order: Order) -> Any:
        if order.weights.hf.name == "2" and job.start.name != "2":
            yield {"event": "restart"}
        else:
            yield from answer(job, order)

    engines.script = only_at_the_start
    checkpoints = [checkpoint(tmp_path, step) for step in (1, 2, 3)]
    done, wanted, told = work(tmp_path, checkpoints, [data("sums", 3), data("products", 2)])
    assert [job.start.name for job in engines.jobs] == ["1", "2"]
    assert set(done.results) == {one.key for one in wanted}
    assert not done.skipped
    assert told.prompts == 15


def test_what_training_removed_meanwhile_is_skipped(tmp_path: Path, engines: Engines) -> None:
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    told, wanted = Told(), asked([first, second], [data()])
    shutil.rmtree(first.hf)
    with evaluation(tmp_path, [data()], told) as one:
        one.work(wanted)
    assert list(one.skipped) == [first.path]
    assert not one.skipped[first.path].refused
    assert set(one.results) == {wanted[1].key}
    assert told.prompts == 6
    lock = Store(tmp_path / "kept").claim(wanted[0])
    assert lock
    lock.release()


def test_a_quantized_checkpoint_has_an_engine_of_its_own(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path, 1)
    first, second = (
        Checkpoint(source=tmp_path, step=step, hf=checkpoint(tmp_path / "q", step).hf, quantized="compressed-tensors")
        for step in (1, 2)
    )
    assert len({run.architecture(one) for one in (plain, first, second)}) == 3


def test_saving_again_does_not_make_another_architecture(tmp_path: Path) -> None:
    first = checkpoint(tmp_path, 1, dtype="bfloat16", transformers_version="5.9", eos_token_id=2)
    again = checkpoint(tmp_path, 2, dtype="float32", transformers_version="5.10", eos_token_id=[2, 3])
    other = checkpoint(tmp_path, 3, num_hidden_layers=3)
    assert run.architecture(first) == run.architecture(again) != run.architecture(other)


def test_two_at_once_share_the_work(tmp_path: Path, engines: Engines) -> None:
    """What another evaluation holds comes last, and is taken from it when it is finished."""
    checkpoints, sets = [checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)], [data()]
    held, _ = asked(checkpoints, sets)
    told, claimed = Told(), threading.Event()

    def finish_elsewhere() -> None:
        lock = Store(tmp_path / "kept").claim(held)
        claimed.set()
        while not any("waiting for another evaluation: a step 1, sums" in text for text in told.said):
            time.sleep(0.01)
        with evaluation(tmp_path, sets, Told()) as other:
            other._do(held, lock)
            other.work([])

    thread = threading.Thread(target=finish_elsewhere)
    thread.start()
    assert claimed.wait(60)
    with evaluation(tmp_path, sets, told) as one:
        one.work(asked(checkpoints, sets))
    thread.join()
    assert [order.weights.hf.name for order in engines.orders] == ["2", "1"]
    assert len(one.results) == 2


def test_the_same_weights_twice_are_one_unit(tmp_path: Path, engines: Engines) -> None:
    one, sets = checkpoint(tmp_path, 1), [data()]
    done, _, _ = work(tmp_path, [one, one], sets)
    assert len(engines.orders) == len(done.results) == 1


def test_what_was_claimed_is_let_go(tmp_path: Path, engines: Engines) -> None:
    def break_down(job: Job, order: Order) -> Any:
        raise KeyboardInterrupt
        yield

    engines.script = break_down
    one, sets = checkpoint(tmp_path, 1), [data()]
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, [one], sets)
    assert engines.up == 0
    lock = Store(tmp_path / "kept").claim(asked([one], sets)[0])
    assert lock
    lock.release()


def test_a_grader_that_fails_is_heard(tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no grade")

    monkeypatch.setattr(AllRight, "grade", fail)
    with pytest.raises(ValueError, match="no grade"):
        work(tmp_path, [checkpoint(tmp_path, 1)], [data()])


def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    speed = Speed()
    assert speed.after(0) == ""
    assert speed.after(50) == "", "from when the first ones came"
    assert speed.after(2000) == "1,000 tokens/s"
    assert speed.after(6000) == "2,000 tokens/s"
