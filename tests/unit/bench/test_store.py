"""Points are kept one by one under what they depend on; a budget and an ETA are told from those that are done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.bench import job
from flashrl_cli.bench.job import Point, count, points
from flashrl_cli.bench.request import Machine
from flashrl_cli.bench.run import Pace, Store
from tests.unit.bench.lab import HF, MISMATCH, OPTIONS, request

POINT = Point(variant="int8", kind="speed", asked={"batch": 4}, key="abc")


def keys(folder: Path, **changed: Any) -> set[str]:
    asked = request(folder, "int8", **changed)
    return {point.key for point in points(asked, asked.variants[0])}


def test_points_come_in_their_order_and_refits_last(tmp_path: Path) -> None:
    asked = request(tmp_path, "int8,fp8-block", model=HF, refit=True, mismatch=MISMATCH)
    kinds = [[point.kind for point in points(asked, one)] for one in asked.variants]
    assert kinds == [["start", "speed", "speed", "sample", "score", "refit"]] * 2
    assert count(asked) == 12
    assert next(points(asked, asked.variants[0])).label == "int8, start"
    assert [point.label for point in points(asked, asked.variants[0])][1] == "int8, 4 sequences"


@pytest.mark.parametrize(
    "changed",
    [
        {"model": HF},
        {"variants": job.parse("int8+kv8", None)},
        {"options": dataclasses.replace(OPTIONS, max_num_seqs=17)},
        {"versions": {"vllm": "0.24.0"}},
        {"machine": Machine("cuda", "H100")},
    ],
)
def test_a_point_is_another_if_anything_that_it_depends_on_is(changed: dict[str, Any], tmp_path: Path) -> None:
    assert not keys(tmp_path) & keys(tmp_path, **changed)


def test_sizes_change_the_points_that_they_belong_to(tmp_path: Path) -> None:
    assert len(keys(tmp_path) & keys(tmp_path, batches=(4, 32))) == 2
    assert len(keys(tmp_path) & keys(tmp_path, prompt=9)) == 1
    assert len(keys(tmp_path) & keys(tmp_path, repeats=1)) == 1


def test_the_memory_that_happens_to_be_free_changes_no_point(tmp_path: Path) -> None:
    assert keys(tmp_path) == keys(tmp_path, engine=dataclasses.replace(OPTIONS, gpu_memory_utilization=0.8))


def test_the_trainers_dtype_changes_the_score_alone(tmp_path: Path) -> None:
    asked = {"model": HF, "mismatch": MISMATCH}
    other = {"model": HF, "mismatch": dataclasses.replace(MISMATCH, dtype="float32")}
    assert len(keys(tmp_path, **asked) - keys(tmp_path, **other)) == 1


def test_a_result_is_read_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load(POINT) is None
    store.save(POINT, {"tokens_s": 5.0})
    assert Store(tmp_path).load(POINT) == {"tokens_s": 5.0}


def test_fresh_passes_over_what_was_there_and_not_what_it_measured(tmp_path: Path) -> None:
    Store(tmp_path).save(POINT, {"tokens_s": 5.0})
    fresh = Store(tmp_path, fresh=True)
    assert fresh.load(POINT) is None
    fresh.save(POINT, {"tokens_s": 6.0})
    assert fresh.load(POINT) == {"tokens_s": 6.0}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 0, "result": {}}'])
def test_what_cannot_be_read_counts_for_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "abc.json").write_text(text)
    assert Store(tmp_path).load(POINT) is None


def test_what_was_asked_stands_beside_the_result(tmp_path: Path) -> None:
    Store(tmp_path).save(POINT, {"tokens_s": 5.0})
    assert json.loads((tmp_path / "abc.json").read_text())["asked"] == {"batch": 4}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_budget_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (list(points(request(tmp_path), one)) for one in request(tmp_path).variants)
    pace = Pace(100.0, clock)
    assert pace.fits(first), "nothing is known yet"
    pace.note(first[0], 60.0)
    clock.now = 30.0
    assert pace.fits([first[1]])
    assert pace.fits([second[0]])
    clock.now = 50.0
    assert not pace.fits([second[0]])
    assert Pace(None, clock).fits(second)


def test_a_larger_batch_takes_no_more_a_sequence(tmp_path: Path) -> None:
    pace = Pace(None, Clock())
    _, few, many = points(request(tmp_path), request(tmp_path).variants[0])
    assert pace.expected(many) is None
    pace.note(few, 10.0)
    assert pace.expected(many) == 40.0
    pace.note(many, 12.0)
    assert pace.expected(many) == 12.0


def test_the_time_that_is_left_is_told_once_it_is_known(tmp_path: Path) -> None:
    pace = Pace(None, Clock())
    start, few, many = points(request(tmp_path), request(tmp_path).variants[0])
    pace.note(start, 60.0)
    assert pace.left([few]) == ""
    assert pace.left([start, few]) == "more than 60 s left"
    pace.note(few, 10.0)
    assert pace.left([start, few]) == "about 70 s left"
    assert pace.left([start, few, many]) == "about 2 min left"
    assert pace.left([]) == ""
