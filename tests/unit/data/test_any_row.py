"""Any row that JSON can hold is refused with its number, or survives prepare, reading and scoring in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flashrl_cli.data import readers
from flashrl_cli.data.prepare import Request, prepare_dataset
from flashrl_cli.data.rows import BadRows, Needs, judge
from flashrl_cli.errors import InputError
from flashrl_cli.evals import questions
from flashrl_cli.paths import DatasetPaths
from flashrl_cli.render.output import Output
from flashrl_cli.verl import rewards
from tests.sample_rows import row, truth

CHARACTERS = st.characters(codec=None, categories=None) | st.sampled_from("0123456789.,-+$%½１\ud800\0{}\\ \n")
TEXTS = st.text(CHARACTERS, max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
NUMBERS = (
    st.integers().map(str) | st.decimals(-9999, 9999, places=2).map(str) | st.integers(0, 10**7).map("{:,}".format)
)
TRUTHS = NUMBERS | TEXTS | VALUES
SOURCES = st.sampled_from(["openai/gsm8k", "math_dapo", "lighteval/MATH", "searchR1_nq", "apps", "my/own"]) | VALUES
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "human"]) | SCALARS, "content": TEXTS | VALUES},
    optional={"name": VALUES, "tool_calls": VALUES},
)
VERL = st.fixed_dictionaries(
    {
        "data_source": SOURCES,
        "prompt": st.lists(TURNS, max_size=3) | VALUES,
        "reward_model": st.fixed_dictionaries({"ground_truth": TRUTHS}, optional={"style": VALUES}) | VALUES,
    },
    optional={"extra_info": VALUES, "ability": VALUES, "images": VALUES},
)
NEARLY = st.builds(
    lambda source, value, extra: row(extra_info=extra, **truth(value, source)),
    st.sampled_from(["openai/gsm8k", "math_dapo", "lighteval/MATH"]),
    NUMBERS | TEXTS,
    st.dictionaries(TEXTS, VALUES, max_size=2),
)
PROBLEMS = st.fixed_dictionaries({"problem": TEXTS | VALUES, "answer": TRUTHS})
ROWS = NEARLY | VERL | PROBLEMS | VALUES.filter(lambda value: not isinstance(value, list))
"""A file that begins with a list is an array of rows."""


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=st.lists(ROWS, min_size=1, max_size=4))
@example(rows=[row(extra_info={"a": {}, "b": [{}, {}]})])
@example(rows=[row(extra_info={"a": 2**64}), row(extra_info={"a": "\ud800", "\ud801": 1})])
@example(rows=[row(extra_info={"a": 1}), row(extra_info={"a": 1.5}), row(extra_info={"a": 2**53 + 1})])
@example(rows=[row(extra_info={"a": nested(15)})])
@example(rows=[row(extra_info={"a": nested(17)}), row(extra_info={"a": nested(400)})])
@example(rows=[row(extra_info={"a": float("nan"), "b": [[], None]}), row(extra_info=None)])
@example(rows=[{"problem": "p", "answer": float("inf")}, {"problem": "\ud800", "answer": 1}])
def test_any_row_is_refused_by_number_or_paid_in_full(
    rows: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    source = folder / "train.jsonl"
    source.write_text("".join(f"{json.dumps(one)}\n" for one in rows), encoding="utf-8")
    out = folder / "out" / "dapo-math-17k"
    request = Request(paths=DatasetPaths("dapo-math-17k", out), source=str(source), dedupe=False)
    if (error := refusal(request)) is None:
        survives(out / "train.parquet", len(rows))
        return
    places = [f"{source}:{number}" for number in range(1, len(rows) + 1)]
    assert error.problems, error.message
    assert {problem.where for problem in error.problems} <= {*places, None}
    assert not (folder / "out").exists(), "nothing is left behind"
    "".join(f"{problem.message}{problem.hint}" for problem in error.problems).encode()


def refusal(request: Request) -> InputError | None:
    try:
        prepare_dataset(request, Output(json_mode=True))
    except InputError as error:
        return error
    return None


def survives(file: Path, count: int) -> None:
    bad = BadRows()
    read = judge(readers.read_rows(file, Needs(), bad), Needs(), bad)
    assert bad.problems() == []
    assert len(read) == count == len(questions.read(file, None))
    for one in read:
        scorer = rewards.scorer(one["data_source"])
        if scorer and scorer.answer:
            assert rewards.points(one["data_source"], one["reward_model"]["ground_truth"]) == rewards.PAID_IN_FULL
