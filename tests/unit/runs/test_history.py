"""Attempts merge into one curve: later wins, what a resume undid is gone, a validation overwrites no training."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import metrics as history
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import holes, merge
from flashrl_cli.verl.metrics import StepMetrics, read_step
from tests.unit.runs.test_record import a_record, attempt, run  # noqa: F401


def steps(attempt: int, *numbers: int) -> list[StepMetrics]:
    return [read_step(n, {"critic/score/mean": float(attempt), "timing_s/step": 1.0}) for n in numbers]


def validation(step: int, accuracy: float) -> StepMetrics:
    return read_step(step, {"val-core/tiny/acc/mean@1": accuracy})


def rewards(merged: list[StepMetrics]) -> dict[int, float | None]:
    return {metrics.step: metrics["reward"] for metrics in merged}


def test_later_attempts_win() -> None:
    merged = merge({1: steps(1, 1, 2, 3), 2: steps(2, 3, 4)}, {1: 0, 2: 2})
    assert rewards(merged) == {1: 1, 2: 1, 3: 2, 4: 2}


def test_what_a_resume_undid_is_gone() -> None:
    merged = merge({1: steps(1, 1, 2, 3, 4, 5), 2: steps(2, 3)}, {1: 0, 2: 2})
    assert rewards(merged) == {1: 1, 2: 1, 3: 2}


def test_an_attempt_that_never_trained_undoes_nothing() -> None:
    assert rewards(merge({1: steps(1, 1, 2), 2: []}, {1: 0, 2: 0})) == {1: 1, 2: 1}


def test_without_a_record_later_wins_and_nothing_is_undone() -> None:
    assert rewards(merge({1: steps(1, 1, 2, 3), 2: steps(2, 2)}, {})) == {1: 1, 2: 2, 3: 1}


def test_a_validation_on_resume_keeps_the_training_of_its_step() -> None:
    (first, second) = merge({1: steps(1, 1, 2), 2: [validation(2, 0.75)]}, {2: 2})
    assert (first.accuracy, second.accuracy, second["reward"]) == (None, 0.75, 1.0)
    assert validation(0, 0.5).trained is False


def test_holes_are_training_steps_only() -> None:
    assert holes([validation(0, 0.1), *steps(1, 1, 2, 5)]) == [3, 4]
    assert holes([]) == []


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), max_size=6))
def test_any_chain_of_resumes_gives_each_step_once_in_order(lengths: list[tuple[int, int]]) -> None:
    attempts, resumed, reached = {}, {}, 0
    for number, (back, done) in enumerate(lengths, start=1):
        resumed[number] = max(0, reached - back)
        attempts[number] = steps(number, *range(resumed[number] + 1, resumed[number] + 1 + done))
        reached = resumed[number] + done if done else reached
    merged = merge(attempts, resumed)
    assert [metrics.step for metrics in merged] == list(range(1, reached + 1))


def test_history_reads_the_attempts_on_disk(run: RunPaths) -> None:  # noqa: F811
    store.change(run, lambda _: a_record(attempt(1), attempt(2, resumed_from=1)))
    for number, logged in ((1, "12"), (2, "2")):
        folder = run.attempt(number)
        folder.root.mkdir()
        lines = [json.dumps({"step": int(n), "data": {"critic/score/mean": number}}) for n in logged]
        folder.metrics.write_text("\n".join([*lines, '{"step": 3, "da']))
    assert rewards(history.history(run)) == {1: 1, 2: 2}
