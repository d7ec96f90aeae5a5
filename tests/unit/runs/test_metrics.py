"""Metrics arrive while they are written, attempts merge into one history, and metrics become curves of one or several
runs.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.files import last_lines
from flashrl_cli.runs import curves
from flashrl_cli.runs.curves import curve, gather, smoothed
from flashrl_cli.runs.metrics import (
    LOOK_BACK,
    MetricsTail,
    Tail,
    history,
    holes,
    last_values,
    merge,
    read_last,
    read_metrics,
    read_run_metrics,
)
from flashrl_cli.verl.metrics import NAMES, StepMetrics, read_step
from tests.unit.runs.on_disk import a_run, attempt, log, training, validation, write_record

FINITE = st.floats(-1e6, 1e6)
STREAMS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12), max_size=8).map(
    lambda lines: "".join(f"{line}\n" for line in lines).encode()
) | st.lists(st.sampled_from([b"a", b"\n", b"\xff", "é".encode(), b"{}"]), max_size=20).map(b"".join)


# files that grow


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 120), max_size=8))
def test_any_chunking_gives_the_same_lines_once(stream: bytes, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        tail, found, start = Tail(path), [], 0
        assert tail.poll() == []
        for end in ends:
            with path.open("ab") as file:
                file.write(stream[start:end])
            found += tail.poll()
            start = end
        assert tail.poll() == []
        assert found == Tail(path).poll()
    complete = stream[: stream.rfind(b"\n") + 1].decode(errors="replace")
    assert "".join(found) == "".join(complete.splitlines())


def test_last_lines_include_one_without_an_end(tmp_path: Path) -> None:
    """A program that was killed leaves its last words without a line end."""
    path = tmp_path / "log"
    assert last_lines(path, 2) == []
    path.write_text("a\nb\nlast words")
    assert last_lines(path, 2) == ["b", "last words"]
    assert last_lines(path, 9) == ["a", "b", "last words"]


def test_steps_arrive_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert list(tail.poll()) == read_metrics(path) == []
    first, second = (json.dumps({"step": n, "data": {"rollout_corr/kl": n / 10}}) + "\n" for n in (1, 2))
    path.write_text(first + second[:20])
    assert [(step.step, step["kl"]) for step in tail.poll()] == [(1, 0.1)]
    assert list(tail.poll()) == []
    with path.open("a") as stream:
        stream.write(second[20:])
    assert [(step.step, step["kl"]) for step in tail.poll()] == [(2, 0.2)]
    assert [step.step for step in read_metrics(path)] == [1, 2]


def test_lines_that_are_no_step_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    other = ["", "{", "null", "[]", "7", '{"step": 1}', '{"step": null, "data": {}}']
    path.write_text("\n".join(other) + '\n{"step": 3, "data": {}}\n')
    assert [step.step for step in read_metrics(path)] == [3]


def test_the_end_of_a_long_file_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, "data": {"critic/score/mean": 0.1, "filler": "x" * 5000}})
    file.write_text("\n".join([line] * (LOOK_BACK // 5000 + 50)) + "\n")
    with file.open("a") as stream:
        stream.write('{"step": 998, "data": {"critic/score/mean": 0.5, "val-core/tiny/acc/mean@1": 0.25}}\n')
        stream.write('{"step": 999, "data": {"critic/score/mean": 0.75}}\n')
        stream.write('{"step": 999, "data": {"val-core/tiny/acc/mean@1": 0.5}}\n')
        stream.write('{"step": 1000, "data": {"crit')
    step, accuracy = read_last(file)
    assert step
    assert (step.step, step["reward"], accuracy) == (999, 0.75, 0.5)
    assert last_values(read_metrics(file)) == (step, accuracy)


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe", b'{"step": "x"}\n', b'[1, "step"]\n'])
def test_a_file_without_steps(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_last(file) == (None, None)
    file.write_bytes(data)
    assert read_last(file) == last_values(read_metrics(file)) == (None, None)


# attempts


def steps(number: int, *numbers: int) -> list[StepMetrics]:
    return [read_step(n, {"critic/score/mean": float(number), "timing_s/step": 1.0}) for n in numbers]


@pytest.mark.parametrize(
    ("first", "second", "resumed", "rewards"),
    [
        ([1, 2, 3], [3, 4], {1: 0, 2: 2}, {1: 1, 2: 1, 3: 2, 4: 2}),
        ([1, 2, 3, 4, 5], [2, 3], {1: 0, 2: 2}, {1: 1, 2: 2, 3: 2}),
        ([1, 2, 3, 4, 5], [3], {1: 0, 2: 2}, {1: 1, 2: 1, 3: 2}),
        ([1, 2], [], {1: 0, 2: 0}, {1: 1, 2: 1}),
        ([1, 2, 3], [2], {}, {1: 1, 2: 2, 3: 1}),
    ],
    ids=["later wins", "later wins twice", "a resume undoes later steps", "no step undoes nothing", "no record"],
)
def test_attempts_merge(
    first: list[int], second: list[int], resumed: dict[int, int], rewards: dict[int, float]
) -> None:
    merged = merge({1: steps(1, *first), 2: steps(2, *second)}, resumed)
    assert {metrics.step: metrics["reward"] for metrics in merged} == rewards


def test_a_validation_on_resume_keeps_the_training_of_its_step() -> None:
    (first, second) = merge({1: steps(1, 1, 2), 2: [read_step(2, validation(0.75))]}, {2: 2})
    assert (first.accuracy, second.accuracy, second["reward"]) == (None, 0.75, 1.0)


def test_holes_are_training_steps_only() -> None:
    assert holes([read_step(0, validation(0.1)), *steps(1, 1, 2, 5)]) == [3, 4]
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


def test_history_reads_the_attempts_on_disk() -> None:
    run = a_run()
    write_record(run, [attempt(1), attempt(2, resumed_from=1)])
    log(run, 1, {1: training(0.1), 2: training(0.1), 3: training(0.1)})
    log(run, 2, {2: training(0.2)})
    with run.attempt(2).metrics.open("a") as stream:
        stream.write('{"step": 3, "da')
    assert [(step.step, step["reward"]) for step in history(run)] == [(1, 0.1), (2, 0.2)]


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([], ()),
        ([[1, 2, 3]], ()),
        ([[1, 2, 3], [3, 4]], (2,)),
        ([[1, 2, 3], [], [4]], (3,)),
        ([[1, 2, 3], [4, 5], [3, 4]], (2,)),
        ([[1, 2, 3], [4], [4, 5]], (3,)),
        ([[1, 2], [3], [4]], (2, 3)),
        ([[1, 2], [1, 2, 3]], ()),
        ([[101], [102]], (101,)),
    ],
)
def test_later_attempts_resumed_after_steps_that_count(attempts: list[list[int]], expected: tuple[int, ...]) -> None:
    run = a_run()
    for number, numbers in enumerate(attempts, 1):
        # a validation alone is no start
        log(run, number, {0: validation(0.1)} | {step: training() for step in numbers})
    assert read_run_metrics(run, None).resumed_after == expected


# curves


def rewarded(*rewards: float | None) -> list[StepMetrics]:
    return [read_step(step, training(reward)) for step, reward in enumerate(rewards, 1)]


@pytest.mark.parametrize("name", ["reward", NAMES["reward"]])
def test_a_curve_has_a_point_a_step_by_flashrls_name_and_by_verls(name: str) -> None:
    found = curve("r", rewarded(0.1, 0.2), name)
    assert found
    assert (found.run, found.metric, found.steps, found.values) == ("r", name, (1, 2), (0.1, 0.2))
    assert found.every_step
    phase = curve("r", [read_step(1, training(seconds_actor=2.5))], "seconds.actor")
    assert phase
    assert phase.values == (2.5,)


def test_nan_infinity_and_lost_steps_break_the_line() -> None:
    found = curve(
        "r", [read_step(n, training(value)) for n, value in ((1, 0.1), (2, None), (3, math.inf), (6, 0.6))], "reward"
    )
    assert found
    assert found.steps == (1, 2, 3, 4, 5, 6)
    assert found.values == (0.1, None, None, None, None, 0.6)
    late = curve("r", [read_step(n, training(0.1)) for n in (3, 4)], "reward")
    assert late
    assert late.steps == (3, 4), "no line is broken before its start"


def test_what_is_measured_now_and_then_has_only_those_points_and_is_not_smoothed() -> None:
    logged = {
        0: validation(0.1),
        1: training(),
        2: {**training(), **validation(0.5)},
        4: {**training(), **validation(0.9)},
    }
    found = curve("r", [read_step(step, data) for step, data in logged.items()], "accuracy")
    assert found
    assert (found.steps, found.values) == ((0, 2, 4), (0.1, 0.5, 0.9))
    assert found.smoothed(0.9) == [0.1, 0.5, 0.9]


def test_no_value_is_no_curve() -> None:
    assert curve("r", rewarded(None, None), "reward") is None
    assert curve("r", rewarded(0.1), "accuracy") is None
    assert curve("r", [], "reward") is None


def test_smoothing_is_adams_and_none_counts_not() -> None:
    assert smoothed([1.0, 0.0, 4.0], 0.5) == pytest.approx([1, (0.5 * 1) / 1.5, (0.25 * 1 + 4) / 1.75])
    without = smoothed([1.0, 3.0, 5.0], 0.6)
    assert smoothed([1.0, None, 3.0, 5.0], 0.6) == [without[0], None, *without[1:]]


@given(st.lists(FINITE, min_size=1, max_size=50), st.floats(0, 0.999))
def test_smoothed_values_are_within_what_was_seen(values: list[float], weight: float) -> None:
    for index, value in enumerate(smoothed(values, weight), 1):
        seen = values[:index]
        assert value is not None
        assert min(seen) - 1e-6 <= value <= max(seen) + 1e-6
    assert smoothed(values, 0) == values


def test_titles() -> None:
    assert curves.title("kl") == ("KL of rollout against trainer", "nats a token")
    assert curves.title("chi2") == ("chi2", "")
    assert curves.title("seconds.actor") == ("actor", "s")
    assert curves.title("critic/score/max") == ("critic/score/max", "")


def test_a_resumes_first_validation_does_not_hide_what_the_step_logged() -> None:
    run = a_run()
    log(run, 1, {1: training(0.1), 2: training(0.2)})
    log(run, 2, {2: validation(0.7), 3: training(0.3)})
    write_record(run, [attempt(1), attempt(2, resumed_from=2)])
    found = gather([run], f"reward,accuracy,{next(iter(validation(1)))}").panels
    assert [one.values for one in found["reward"]] == [(0.1, 0.2, 0.3)]
    assert [(one.steps, one.values) for one in found["accuracy"]] == [((2,), (0.7,))]
    assert found["reward"][0].starts == (2,)


def test_metrics_are_those_that_are_asked_for_or_defaults_that_there_are() -> None:
    run = a_run()
    log(run, 1, {1: training(entropy=None)})
    found = gather([run], None)
    assert list(found.panels) == ["reward", "response_length", "kl", "truncated", "step_s"]
    assert found.missing == ()
    assert list(gather([run], " kl, reward,kl,").panels) == ["kl", "reward"]


def test_several_runs_share_panels_and_what_one_lacks_is_missing() -> None:
    a, b, silent = a_run("a"), a_run("b"), a_run("silent")
    log(a, 1, {1: training(0.1), 2: training(0.2)})
    log(b, 1, {1: training(0.3, kl=None)})
    found = gather([a, b, silent], "reward,kl")
    assert {metric: [one.run for one in listed] for metric, listed in found.panels.items()} == {
        "reward": ["a", "b"],
        "kl": ["a"],
    }
    assert found.missing == ("no step yet in silent", "no kl in b")
    with pytest.raises(NothingMatched, match="no step yet in c, silent"):
        gather([a_run("c"), silent], None)


@pytest.mark.parametrize(
    ("asked", "match", "hint"),
    [
        ("reward,rewrd", "rewrd", "did you mean reward"),
        ("length", "length", "response_length"),
        ("critic/score/meen", "meen", "critic/score/mean"),
        ("second.actor", "second.actor", "seconds.actor"),
        ("qqqqqqqq", "qqqqqqqq", "flashrl's names: reward"),
        ("", "--metric", "--metric reward"),
        (" , ", "--metric", "--metric reward"),
    ],
)
def test_an_unknown_metric_is_an_error_with_near_names(asked: str, match: str, hint: str) -> None:
    run = a_run()
    log(run, 1, {1: training()})
    with pytest.raises(InputError, match=match) as caught:
        gather([run], asked)
    assert hint in (caught.value.hint or "")


def test_a_known_metric_that_nobody_logged_is_an_error_with_what_there_is() -> None:
    run = a_run()
    log(run, 1, {1: training(reward=None)})
    with pytest.raises(NothingMatched, match="no value of reward, accuracy in r") as caught:
        gather([run], "reward,accuracy")
    assert "response_length" in (caught.value.hint or "")
    assert not {"reward", "accuracy"} & set((caught.value.hint or "").replace(",", " ").split())


def test_the_document_of_curves_is_json_without_nan() -> None:
    run = a_run()
    log(run, 1, {1: training(0.0), 2: training(math.nan), 3: training(1.0)})
    document = json.loads(json.dumps(gather([run], "reward").document(0.5), allow_nan=False))
    assert (document["schema_version"], document["smoothing"]) == (1, 0.5)
    (one,) = document["curves"]
    assert (one["run"], one["metric"], one["steps"], one["values"]) == ("r", "reward", [1, 2, 3], [0, None, 1])
    assert one["smoothed"] == pytest.approx([0, None, 2 / 3])
