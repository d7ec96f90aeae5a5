"""Where questions come from, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import paths
from flashrl_cli.data.rows import Scoring
from flashrl_cli.errors import InputError
from flashrl_cli.evals import questions
from flashrl_cli.evals.questions import DataSet, Prompting
from flashrl_cli.reward_function import Shipped
from tests import sample_rows

ROW = sample_rows.row()


def record(run: str, attempt: int, *overrides: str) -> Path:
    plan = paths.runs_root() / run / f"attempt_{attempt}" / "plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text(json.dumps({"schema_version": 1, "overrides": overrides, "env": {}, "files": {}}))
    return paths.checkpoints_root() / "project" / run


def test_rows_become_questions(tmp_path: Path) -> None:
    file = sample_rows.write(tmp_path / "test.parquet", [ROW, ROW, ROW])
    found = questions.read(file, limit=2)
    assert len(found) == 2
    assert json.loads(found[0].line()) == {
        "prompt": ROW["prompt"],
        "data_source": "openai/gsm8k",
        "ground_truth": "2",
        "extra_info": ROW["extra_info"],
    }


def test_missing_columns_are_named(tmp_path: Path) -> None:
    file = sample_rows.write(tmp_path / "test.parquet", [{"question": "1 + 1?", "prompt": "x"}])
    with pytest.raises(InputError, match="lacks the column data_source, reward_model") as caught:
        questions.read(file, None)
    assert "question, prompt" in str(caught.value.hint)


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "prompt": []}, {**ROW, "reward_model": {"style": "rule", "ground_truth": None}}]
    file = sample_rows.write(tmp_path / "test.parquet", rows)
    with pytest.raises(InputError, match=r"test\.parquet: 2 rows cannot be used") as caught:
        questions.read(file, None)
    assert [str(p.where) for p in caught.value.problems] == [f"{file}:row 2", f"{file}:row 3"]


def test_no_parquet_and_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(InputError, match="cannot read"):
        questions.read(tmp_path / "x.parquet", None)
    with pytest.raises(InputError, match="no rows"):
        questions.read(sample_rows.write(tmp_path / "empty.jsonl", []), None)


def test_named_data_sets_and_files(tmp_path: Path) -> None:
    prepared = sample_rows.write(paths.data_root() / "gsm8k" / "test.parquet", [ROW, ROW])
    other = sample_rows.write(tmp_path / "mine.parquet", [ROW])
    found = questions.choose_questions(f"gsm8k, {other},gsm8k", [], 1)
    assert [(one.name, one.file, len(one.questions)) for one in found] == [
        ("gsm8k", prepared, 1),
        ("mine", other, 1),
    ]
    with pytest.raises(InputError) as caught:
        questions.choose_questions("gsm8k,math", [], None)
    assert caught.value.hint == "flashrl prepare math"
    with pytest.raises(InputError, match="no such file"):
        questions.choose_questions(str(tmp_path / "x.parquet"), [], None)


def test_names_that_are_alike_get_longer(tmp_path: Path) -> None:
    files = [
        sample_rows.write(tmp_path / folder / f"{name}.parquet", [ROW])
        for folder, name in (("a", "x"), ("b", "x"), ("b", "y"))
    ]
    found = questions.choose_questions(",".join(map(str, files)), [], None)
    assert [one.name for one in found] == ["a/x", "b/x", "y"]


def test_default_is_what_the_last_attempt_validated_on(tmp_path: Path) -> None:
    first, second = (sample_rows.write(tmp_path / name / "test.parquet", [ROW]) for name in ("one", "two"))
    record("a", 1, "data.val_files=/old.parquet")
    a = record("a", 10, f"data.val_files=[{first},{second}]")
    b = record("b", 1, f"data.val_files=[{first},{second}]")
    found = questions.choose_questions(None, [a, b], None)
    assert [(one.name, one.file) for one in found] == [("one", first), ("two", second)]


def test_no_record_or_different_ones_need_a_choice() -> None:
    a = record("a", 1, "data.val_files=/a.parquet")
    b = record("b", 1, "data.val_files=/b.parquet")
    with pytest.raises(InputError, match="different data"):
        questions.choose_questions(None, [a, b], None)
    for unknown in ([Path("/checkpoints/project/unknown")], []):
        with pytest.raises(InputError, match="no run record") as caught:
            questions.choose_questions(None, unknown, None)
        assert "--dataset" in str(caught.value.hint)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json"])
def test_rows_that_would_evaluate_to_zero_are_refused(form: str, tmp_path: Path) -> None:
    """By evaluation; a benchmark, which scores nothing, needs their prompts alone."""
    good = sample_rows.write(tmp_path / f"good.{form}")
    assert [one.ground_truth for one in questions.read(good, None)] == ["2", "4", "6", "8"]
    file = sample_rows.write(tmp_path / f"bad.{form}", [sample_rows.row(**sample_rows.truth(2))] * 3)
    with pytest.raises(InputError, match="3 rows cannot be used") as caught:
        questions.read(file, 1)
    assert "is a whole number, not text; 3 rows: " in caught.value.problems[0].message
    assert len(questions.read(file, None, scoring=Scoring.NONE)) == 3
    chat = [{"from": "human", "value": "?"}]
    with pytest.raises(InputError) as caught:
        questions.read(sample_rows.write(tmp_path / f"chat.{form}", [{"prompt": chat}]), None, scoring=Scoring.NONE)
    assert "ShareGPT" in caught.value.problems[0].message


SYSTEM = {"role": "system", "content": "Be brief."}


def put(file: Path, seed: int = 0, **how: Any) -> DataSet:
    (found,) = questions.choose_questions(str(file), [], None, prompting=Prompting(**how), seed=seed)
    return found


def prompts(file: Path, seed: int = 0, **how: Any) -> list[list[dict[str, str]]]:
    return [one.prompt for one in put(file, seed, **how).questions]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A test split of two sums, the first with a system message; the train split beside it has one of them, too."""
    train = [sample_rows.row(number) for number in (2, 11, 12, 13, 14)]
    train[0]["prompt"] = [dict(reversed(message.items())) for message in train[0]["prompt"]]
    for row in train[1:3]:
        row["extra_info"]["answer"] = f"It is {row['reward_model']['ground_truth']}."
    train[3]["prompt"] = [SYSTEM, *train[3]["prompt"]]
    sample_rows.write(tmp_path / "train.parquet", train)
    first = sample_rows.row(1)
    return sample_rows.write(
        tmp_path / "test.parquet", [{**first, "prompt": [SYSTEM, *first["prompt"]]}, sample_rows.row(2)]
    )


def ask(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"What is {number} plus {number}?"}


SHOWN = {11: "It is 22.", 12: "It is 24.", 13: "#### 26", 14: "#### 28"}
"""The answers of the training rows: their own, or their truth in the form of verl's scorer."""


def shown(number: int) -> list[dict[str, str]]:
    """An example, written by hand."""
    return [ask(number), {"role": "assistant", "content": SHOWN[number]}]


def test_solved_examples_come_from_the_train_split(split: Path) -> None:
    """After the system message, the same for all questions, in a random order, and none that is asked."""
    drawn = set()
    for seed in range(20):
        first, second = prompts(split, seed, shots=2)
        numbers = [number for number in SHOWN for message in second if message == ask(number)]
        a, b = sorted(numbers, key=lambda number: second.index(ask(number)))
        assert second == [*shown(a), *shown(b), ask(2)]
        assert first == [SYSTEM, *shown(a), *shown(b), ask(1)]
        assert prompts(split, seed, shots=2) == [first, second]
        drawn.add((a, b))
    assert {number for pair in drawn for number in pair} == set(SHOWN)
    assert len(drawn) > 6, "in either order"


def test_every_other_row_is_an_example_at_most(split: Path) -> None:
    found = prompts(split, shots=4)[1][:-1]
    assert sorted(m["content"] for m in found) == sorted(m["content"] for n in SHOWN for m in shown(n))
    with pytest.raises(InputError, match=r"--shots 5: .*train\.parquet has 4 other rows") as caught:
        put(split, shots=5)
    assert caught.value.hint == "--shots 4"


def test_a_system_message_replaces_those_of_the_rows(split: Path) -> None:
    other = {"role": "system", "content": "Add."}
    assert prompts(split, system="Add.") == [[other, ask(1)], [other, ask(2)]]
    assert prompts(split, system="") == [[ask(1)], [ask(2)]]
    assert prompts(split) == [[SYSTEM, ask(1)], [ask(2)]]
    assert [prompt[0] for prompt in prompts(split, system="Add.", shots=1)] == [other, other]


def test_other_examples_and_system_messages_are_other_questions(split: Path) -> None:
    """What a result is kept under has them in it."""
    ways = [{}, {"shots": 1}, {"shots": 2}, {"system": "Add."}, {"system": ""}]
    lines = ["".join(one.line() for one in put(split, **way).questions) for way in ways]  # type: ignore[arg-type]
    assert len(set(lines)) == len(ways)


def test_examples_that_cannot_be_shown(tmp_path: Path, split: Path) -> None:
    alone = sample_rows.write(tmp_path / "alone" / "mine.jsonl")
    with pytest.raises(InputError, match=rf"no training rows for {alone}: no {alone.with_name('train.jsonl')}"):
        put(alone, shots=1)
    with pytest.raises(InputError, match="no training rows"):
        put(split.with_name("train.parquet"), shots=1)
    sample_rows.write(split.with_name("train.parquet"), [sample_rows.row(11, **sample_rows.truth(22))])
    with pytest.raises(InputError, match=r"train\.parquet: 1 row cannot be used"):
        put(split, shots=1)
    tests = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    sample_rows.write(split.with_name("train.parquet"), [sample_rows.row(11, **sample_rows.truth(tests, "taco"))])
    with pytest.raises(InputError, match="have no answer that an example could show"):
        put(split, shots=1)


def test_examples_for_a_reward_function_of_the_users(tmp_path: Path, split: Path) -> None:
    """Its rows need no scorer of verl's; an example is answered by the answer that a row has."""
    rows = [sample_rows.row(number, **sample_rows.truth(number, "mine")) for number in (11, 12)]
    for row in rows:
        row["extra_info"] = {"answer": f"It is {2 * row['reward_model']['ground_truth']}."}
    file = sample_rows.write(tmp_path / "own" / "test.parquet", rows[:1])
    sample_rows.write(file.with_name("train.parquet"), rows[1:])
    own = Shipped(copy="", file="/r.py", name="score", source="def score(): ...")
    (found,) = questions.choose_questions(str(file), [], None, prompting=Prompting(shots=1), own=lambda _: own)
    assert found.questions[0].prompt == [*shown(12), ask(11)]
