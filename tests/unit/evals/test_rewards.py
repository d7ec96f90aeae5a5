"""A reward function of the user's grades: the run's own on its data, and any other that `--reward` names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import contract, paths
from flashrl_cli.data.prepare import prepare_dataset, requests
from flashrl_cli.errors import InputError, Location
from flashrl_cli.evals import accuracy, grade, questions, rewards
from flashrl_cli.evals.questions import DataSet, Question
from flashrl_cli.evals.results import Entry, Evaluated
from flashrl_cli.render.output import Output
from flashrl_cli.reward_function import Shipped
from flashrl_cli.runs.store import PLAN_VERSION
from tests import sample_rows
from tests.unit.evals import lab

SOURCE = "def score(solution_str, ground_truth, half=0.5):\n    return 1 if solution_str == ground_truth else half\n"
OWN = Shipped(copy="", file="/r.py", name="score", source=SOURCE)
ROW = sample_rows.row(1) | {"data_source": "mine"}


def record(name: str, *data: Path, source: str | None = SOURCE, **options: Any) -> Path:
    """A run that was trained on the first and validated on the last file, with this reward function."""
    attempt = paths.runs_root() / name / "attempt_1"
    attempt.mkdir(parents=True)
    shipped = Shipped(copy=str(attempt / "reward.py"), file="/r.py", name="score", **options)
    if source is not None:
        (attempt / "reward.py").write_text(source)
    plan = {
        "schema_version": PLAN_VERSION,
        "attempt": 1,
        "overrides": [f"data.train_files={data[0]}", f"data.val_files={data[-1]}"],
        "env": {contract.ENV_REWARD: shipped.text()},
        "files": {},
    }
    (attempt / "plan.json").write_text(json.dumps(plan))
    return Path("/checkpoints/project") / name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return sample_rows.write(tmp_path / "mine" / "test.parquet", [ROW, ROW])


def test_a_runs_own_function_grades_its_data(file: Path) -> None:
    run = record("a", file, arguments={"half": 0.25}, threshold=0.2)
    (data,) = questions.choose_questions(None, [run], None, own=rewards.chosen(None, None, [run]))
    (own,) = {question.reward.text() for question in data.questions if question.reward}
    assert json.loads(own) | {"copy": ""} == {
        "copy": "", "file": "/r.py", "name": "score", "arguments": {"half": 0.25}, "timeout_s": 60.0, "threshold": 0.2,
        "source": SOURCE,
    }  # fmt: skip


def test_other_data_keep_verls_scorer(file: Path, tmp_path: Path) -> None:
    other = sample_rows.write(tmp_path / "other.parquet", [sample_rows.row(1)])
    find = rewards.chosen(None, None, [record("a", file)])
    assert find(other) is None
    (data,) = questions.choose_questions(str(other), [], None, own=find)
    assert data.questions[0].reward is None


def test_rows_of_other_sources_keep_verls_scorer(tmp_path: Path) -> None:
    file = sample_rows.write(tmp_path / "mixed.parquet", [ROW, sample_rows.row(2)])
    run = record("a", file, sources=["mine"])
    (data,) = questions.choose_questions(None, [run], None, own=rewards.chosen(None, None, [run]))
    assert [question.reward is not None for question in data.questions] == [True, False]


def test_an_option_names_the_function_for_all_data(file: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(SOURCE)
    own = rewards.chosen(f"{tmp_path}/reward.py:score", 0.7, [record("a", file, source="")])(file)
    assert own is not None
    assert (own.source, own.label, own.threshold) == (SOURCE, f"{tmp_path}/reward.py:score", 0.7)


def test_the_threshold_may_be_another_than_the_runs(file: Path) -> None:
    own = rewards.chosen(None, 0.9, [record("a", file, threshold=0.2)])(file)
    assert own is not None
    assert own.threshold == 0.9


def test_solved_examples_are_answered_by_their_truth(file: Path) -> None:
    sample_rows.write(file.with_name("train.parquet"), [sample_rows.row(7) | {"data_source": "mine"}])
    run = record("a", file)
    (data,) = questions.choose_questions(
        None, [run], None, prompting=questions.Prompting(shots=1), own=rewards.chosen(None, None, [run])
    )
    truth = sample_rows.row(7)["reward_model"]["ground_truth"]
    assert data.questions[0].prompt[1] == {"role": "assistant", "content": truth}


def test_runs_with_different_functions_need_a_choice(file: Path) -> None:
    runs = [record("a", file), record("b", file, source=SOURCE + "\n")]
    with pytest.raises(InputError, match="different reward functions") as caught:
        rewards.chosen(None, None, runs)(file)
    assert "--reward FILE.py:NAME" in str(caught.value.hint)
    same = [record("c", file), record("d", file)]
    assert rewards.chosen(None, None, same)(file) is not None


def test_a_copy_that_is_gone_needs_a_choice(file: Path) -> None:
    with pytest.raises(InputError, match=r"was trained with a reward function, and .*attempt_1/reward.py is gone"):
        rewards.chosen(None, None, [record("a", file, source=None)])(file)


def test_the_function_is_a_part_of_what_was_asked() -> None:
    """Results of another function, or of another threshold, are not reused; those of verl's scorers are as before."""
    plain = Question([], "mine", "5", None)
    assert "reward" not in json.loads(plain.line())
    changed = [
        OWN,
        dataclasses.replace(OWN, source=SOURCE + "\n"),
        dataclasses.replace(OWN, threshold=0.4),
        dataclasses.replace(OWN, arguments={"half": 0.1}),
    ]
    lines = {dataclasses.replace(plain, reward=one).line() for one in changed}
    assert len(lines) == len(changed)
    moved = dataclasses.replace(OWN, file="/elsewhere/r.py")
    assert dataclasses.replace(plain, reward=moved).line() == dataclasses.replace(plain, reward=OWN).line()
    assert SOURCE not in dataclasses.replace(plain, reward=OWN).line()


@pytest.mark.parametrize(
    ("threshold", "response", "score", "correct"),
    [(0.5, "5", 1.0, True), (0.5, "4", 0.5, False), (0.4, "4", 0.5, True)],
)
def test_a_response_is_right_above_the_threshold(threshold: float, response: str, score: float, correct: bool) -> None:
    asked = Question([], "mine", "5", None, dataclasses.replace(OWN, threshold=threshold))
    verdict = grade.judge(asked, response)
    assert (verdict.score, verdict.correct, verdict.problem) == (score, correct, None)


def test_a_call_that_fails_is_no_verdict() -> None:
    source = "def score(solution_str):\n    return float(solution_str)\n"
    asked = Question([], "mine", "5", None, dataclasses.replace(OWN, source=source))
    verdict = grade.judge(asked, "x")
    assert not verdict.correct
    assert verdict.problem == "the reward function raises ValueError: could not convert string to float: 'x'"


@pytest.mark.processes
def test_a_function_is_tried_before_an_engine_starts(file: Path) -> None:
    source = "def score(solution_str):\n    return float(solution_str)\n"
    asked = [Question([], "mine", "5", None, dataclasses.replace(OWN, source=source))] * 9
    data = DataSet(name="mine", file=file, questions=tuple(asked))
    with pytest.raises(InputError, match="nothing was generated") as caught:
        rewards.check([data])
    assert {problem.where for problem in caught.value.problems} == {Location("/r.py", 2)}
    assert f"for {file}:row 1 and the response 'I do not know.'" in caught.value.problems[-1].message
    rewards.check([dataclasses.replace(data, questions=(dataclasses.replace(asked[0], reward=OWN),))])
    rewards.check([lab.data()])


def test_the_report_has_the_mean_reward(tmp_path: Path) -> None:
    """Accuracy and pass@k count responses above the threshold, whatever their reward."""
    data = lab.data(questions=2)
    own = dataclasses.replace(data, questions=tuple(dataclasses.replace(one, reward=OWN) for one in data.questions))
    one = lab.checkpoint(tmp_path, 1)
    responses = tuple(lab.response(question, sample=sample) for question in range(2) for sample in range(2))
    grades = tuple(
        grade.joined(grade.Verdict(score=score, correct=score > 0.5), grade.Reading())
        for score in (0.75, 0.25, 0.1, 0.5)
    )
    result = Evaluated(checkpoint=one, data=own, responses=responses, grades=grades, holds=lab.HOLDS, seconds=1.0)
    row = accuracy.Row.of(Entry("a", 1, result))
    assert row.reward == pytest.approx(0.4)
    assert (row.accuracy, row.pass_at[1], row.pass_at[2]) == (0.25, 0.25, 0.5)
    assert accuracy.Row.of(Entry("a", 1, dataclasses.replace(result, data=data))).reward is None
    headings, cells = accuracy._of_one([row])
    assert cells[0][headings.index("reward")] == "0.400"


def test_other_rows_are_graded_as_they_were_prepared_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path / "data"))
    (tmp_path / "mine.py").write_text("def score(solution_str, ground_truth):\n    return 1.0\n")
    (tmp_path / "q.jsonl").write_text("".join(f'{{"prompt": "q {n}", "answer": "{n}"}}\n' for n in range(4)))
    words = {"reward": f"{tmp_path}/mine.py:score", "split": 0.5}
    (request,) = requests(["mine"], source=str(tmp_path / "q.jsonl"), words=words)
    prepare_dataset(request, Output(json_mode=True))

    (data,) = questions.choose_questions("mine", [], None, own=rewards.chosen(None, 0.8, []))
    [own] = {question.reward.label for question in data.questions if question.reward}
    assert own == f"{tmp_path}/mine.py:score"
    assert {question.reward.threshold for question in data.questions if question.reward} == {0.8}
    (tmp_path / "mine.py").unlink()
    with pytest.raises(InputError, match="reward function"):
        rewards.chosen(None, None, [])(data.file)
