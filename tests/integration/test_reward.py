"""A reward function of ten lines trains and grades on the real stack, and its exception in mid-run names the row."""

from __future__ import annotations

import csv
import json

import pytest

from tests.integration.conftest import SMALL, Workshop

LENGTH = '''
"""The share of a response's characters that are digits, and a tenth more for the right number."""


def score(solution_str, ground_truth, bonus=0.0):
    if not solution_str:
        return 0.0
    share = sum(one.isdigit() for one in solution_str) / len(solution_str)
    return {"score": 0.9 * share + bonus * solution_str.endswith(f"#### {ground_truth}"), "share": share}
'''
FAILS = """
calls = 0


def score(solution_str, ground_truth, extra_info):
    global calls
    calls += 1
    return [0.5, 1.0][calls > 64 and ground_truth]
"""
RUN = ("train", "--preset", "tiny", *SMALL, "--set", "trainer.steps=2", "--set", "trainer.validate_every=-1")


def test_ten_lines_train_and_grade(workshop: Workshop) -> None:
    (workshop.root / "digits.py").write_text(LENGTH)
    function = ("--set", "reward.function=digits.py:score", "--set", "reward.arguments.bonus=0.1")
    workshop.run(*RUN, *function, "--set", "trainer.save_every=2", "--name", "digits")
    attempt = workshop.root / "runs" / "digits" / "attempt_1"
    assert (attempt / "reward.py").read_text() == LENGTH
    steps = [json.loads(line)["data"] for line in (attempt / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for data in steps:
        # neither 0 nor 1, as verl's scorer for these rows gives
        assert 0 < data["critic/score/mean"] < 1
        assert data["critic/score/min"] < data["critic/score/max"] <= 1
    record = json.loads((workshop.root / "runs" / "digits" / "run.json").read_text())
    assert record["attempts"][0]["reward"]["function"] == "digits.py:score"

    kept = json.loads(workshop.run("runs", "samples", "digits", "--json")[0])
    assert kept["steps"] == [2]
    assert len(kept["samples"]) == 8
    for sample in kept["samples"]:
        assert sample["prompt"].count(" plus ") == 1
        assert sample["length"] > 0
        assert sample["weight"] == pytest.approx(1, abs=0.5)
        digits = sum(one.isdigit() for one in sample["response"]) / max(len(sample["response"]), 1)
        right = sample["response"].endswith(f"#### {sample['ground_truth']}")
        assert sample["reward"] == pytest.approx(0.9 * digits + 0.1 * right, abs=1e-5)
    worst = json.loads(workshop.run("runs", "samples", "digits", "--worst", "--json")[0])["samples"]
    assert worst[0]["reward"] == min(data["critic/score/min"] for data in steps)

    (workshop.root / "digits.py").unlink()  # the run's copy grades
    sampling = ("--limit", "16", "--n", "2", "--temperature", "1", "--threshold", "0.5")
    report = json.loads(workshop.run("eval", "checkpoints/*/digits", *sampling, "--json")[0])
    (row,) = report["results"]
    assert report["rewards"] == [f"{workshop.root}/digits.py:score"]
    assert 0 < row["reward"] < 1
    assert row["problems"] == 0
    with (workshop.root / "checkpoints" / "tiny" / "digits" / "eval" / "eval.csv").open() as stream:
        assert [line["step"] for line in csv.DictReader(stream)] == ["2"]
    assert not workshop.leftovers()


def test_an_exception_in_mid_run_ends_it_with_row_and_traceback(workshop: Workshop) -> None:
    file = workshop.root / "fails.py"
    file.write_text(FAILS)
    _, err = workshop.run(*RUN, "--set", "reward.function=fails.py:score", "--name", "fails", code=1)
    message = err[err.index("error: ") :]
    assert (
        f"the reward function raises TypeError: list indices must be integers or slices, not str ({file}:8)" in message
    )
    assert f"for {workshop.root}/data/tiny/train.parquet:row " in message
    assert f'  |   File "{file}", line 8, in score' in message
    assert "site-packages" not in message
    assert "--resume auto --force --name fails" in message
    record = json.loads((workshop.root / "runs" / "fails" / "run.json").read_text())
    assert record["attempts"][0]["error"].startswith("the reward function raises TypeError")
    assert not workshop.leftovers()
