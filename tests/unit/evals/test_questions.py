"""Where questions come from, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli import paths
from flashrl_cli.data.rows import Scoring
from flashrl_cli.errors import InputError
from flashrl_cli.evals import questions
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
