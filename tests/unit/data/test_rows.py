"""Texts out of raw rows, the judge of rows in verl's schema, and the account of those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flashrl_cli.data import readers
from flashrl_cli.data.prepare import Request, prepare_dataset
from flashrl_cli.data.rows import BadRow, BadRows, Fault, Needs, Scoring, judge, text
from flashrl_cli.errors import InputError, Location
from flashrl_cli.evals import questions
from flashrl_cli.paths import DatasetPaths
from flashrl_cli.render.output import Output
from flashrl_cli.verl import rewards
from tests.sample_rows import row, truth


def found(*rows: dict[str, Any], needs: Needs | None = None) -> list[tuple[str | None, str]]:
    """Where and what is wrong with rows that are numbered from 1."""
    bad = BadRows()
    located = ((Location("a.parquet", number, unit="row"), one) for number, one in enumerate(rows, start=1))
    judge(located, needs or Needs(), bad)
    assert all(problem.hint for problem in bad.problems() if "number" not in problem.message), "every fault has a fix"
    return [(str(problem.where), problem.message) for problem in bad.problems()]


def prompt(*turns: Any) -> dict[str, Any]:
    return {"prompt": list(turns)}


def user(content: Any = "?", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def test_the_first_column_that_is_there_is_taken() -> None:
    assert text({"Problem": "p", "x": 1}, "problem", "Problem") == "p"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"q": "x"}, r"no column 'question' \(the row has: q\)"),
        ({"\ud800": "x"}, r"\(the row has: '\\ud800'\)"),
        ({}, "the row has: nothing"),
        ({"question": None}, "'question' is null, not text"),
        ({"question": 3}, "'question' is a whole number, not text"),
        ({"question": " \n"}, "'question' is empty"),
    ],
)
def test_what_is_no_text_is_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        text(raw, "question")


@pytest.mark.parametrize(
    "good",
    [
        row(),
        {key: value for key, value in row().items() if key in {"data_source", "prompt", "reward_model"}},
        row(extra_info=None),
        row(**prompt({"role": "system", "content": ""}, user())),  # turns off a template's own system message
        row(**prompt(user("1?"), {"role": "assistant", "content": "1"}, user("2?"))),
        row(
            **prompt(
                user(), {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": ""}
            )
        ),
        row(**prompt(user(name=None))),
        row(**truth("-5")),
        row(**truth("0.25")),
        row(**truth(r"\frac{1}{2}", "HuggingFaceH4/MATH-500")),
        row(**truth("34", "aime_2031")),
        row(**truth({"target": ["Paris", "the city of Paris"]}, "searchR1_nq")),
        row(**truth('{"inputs": ["1"], "outputs": ["2"]}', "apps")),
    ],
)
def test_rows_that_can_be_paid_for(good: dict[str, Any]) -> None:
    assert found(good) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2, "is a whole number, not text"),
        (2.0, "is a number, not text"),
        (float("nan"), "is a number, not text"),
        (True, "is true or false, not text"),
        (["2"], "is a list, not text"),
        ({"answer": "2"}, "is an object, not text"),
        (None, "is null, not text"),
        ("", "is empty"),
        (" \n", "is empty"),
        (..., "reward_model has no ground_truth"),
        ("2 ", "is not paid in full"),
        ("1,080", "is not paid in full"),
        ("$5", "is not paid in full"),
        ("#### 2", "is not paid in full"),
        ("x" * 301, "is longer than the 300 characters"),
        ("\ud800", "is not paid in full"),
    ],
)
def test_truths_that_no_answer_can_be_paid_for(value: Any, message: str) -> None:
    [(where, what)] = found(row(), row(**truth(value)))
    assert where == "a.parquet:row 2"
    assert message in what


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (truth("}", "lighteval/MATH"), "is not paid in full"),
        (truth(r"\boxed{5}", "lighteval/MATH"), "is not paid in full"),
        (truth(5, "lighteval/MATH"), "is a whole number, not text"),
        (truth("5" * 300, "math_dapo"), "is longer than the 300 characters"),
        (truth("x\ny", "math_dapo"), "is not paid in full"),
        (truth("Paris", "searchR1_nq"), "holds no golden answers"),
        (truth({"target": []}, "searchR1_nq"), "holds no golden answers"),
        (truth({"target": [3]}, "searchR1_nq"), "holds no golden answers"),
        (truth("print(1)", "apps"), "holds no test cases"),
        (truth('{"inputs": ["1"], "outputs": []}', "apps"), "holds no test cases"),
        (truth('{"inputs": [], "outputs": []}', "apps"), "holds no test cases"),
        (truth("2", "my/own"), "verl has no scorer for data_source 'my/own'"),
        ({"data_source": None}, "data_source is null"),
        ({"data_source": " "}, "data_source is empty"),
        ({"data_source": 3}, "data_source is a whole number"),
        ({"reward_model": None}, "reward_model is null"),
        ({"reward_model": "2"}, "reward_model is text"),
        ({"extra_info": "x"}, "extra_info is text, not an object"),
        ({"prompt": "2 + 2?"}, "prompt is text, not a list of messages"),
        ({"prompt": None}, "prompt is null"),
        (prompt(), "prompt has no messages"),
        (prompt("2 + 2?"), "a message of prompt is text, not an object"),
        (prompt(None), "a message of prompt is null"),
        (prompt(""), "a message of prompt is text"),
        (prompt({"from": "human", "value": "?"}), "ShareGPT"),
        (prompt({"from": "human", "value": "?", "role": None, "content": None}), "ShareGPT"),
        (prompt({"content": "?"}), "has no role"),
        (prompt({"role": "human", "content": "?"}), "has the role 'human'"),
        (prompt({"role": "User", "content": "?"}), "has the role 'User'"),
        (prompt({"role": ["user"], "content": "?"}), "has the role ['user']"),
        (prompt({"role": "user"}), "the content of the user message is missing"),
        (prompt(user(None)), "the content of the user message is null"),
        (prompt(user(3)), "the content of the user message is a whole number"),
        (prompt(user([{"type": "text", "text": "?"}])), "the content of the user message is a list of parts"),
        (prompt(user(" \n")), "the content of the user message is empty"),
        (prompt({"role": "assistant", "content": None}, user()), "the content of the assistant message is null"),
        (prompt(user(), {"role": "assistant", "content": "4"}), "the last message of prompt is of role assistant"),
        (prompt({"role": "system", "content": "Add."}), "the last message of prompt is of role system"),
    ],
)
def test_rows_that_teach_nothing_or_end_a_run(columns: dict[str, Any], message: str) -> None:
    [(where, what)] = found(row(), row(), row(**columns))
    assert where == "a.parquet:row 3"
    assert message in what


@pytest.mark.parametrize("column", ["data_source", "prompt", "reward_model"])
def test_a_column_that_is_missing(column: str) -> None:
    [(_, what)] = found({key: value for key, value in row().items() if key != column})
    assert what == f"no column {column}"


def test_a_reward_of_ones_own_takes_any_source_and_truth() -> None:
    needs = Needs(scoring=Scoring.OWN)
    assert found(row(**truth(["2"], "my/own")), row(**truth(None)), needs=needs) == []
    [(_, what)] = found(row(**truth(...)), needs=needs)
    assert what == "reward_model has no ground_truth"


def test_without_scoring_the_prompt_alone_counts() -> None:
    needs = Needs(scoring=Scoring.NONE, text_only=True)
    assert found(prompt(user()), needs=needs) == []
    [(_, what)] = found(prompt(user()) | {"images": [b"png"]}, needs=needs)
    assert what == "images are not shown to the model here"


def test_another_column_of_prompts() -> None:
    one = {**row(), "question": [user()]}
    del one["prompt"]
    assert found(one, needs=Needs(prompt="question")) == []


def test_no_bad_row_is_no_error() -> None:
    BadRows().check("gsm8k")


def test_all_bad_rows_are_counted_and_the_first_five_of_each_kind_listed() -> None:
    bad = BadRows()
    for number in range(1, 1235):
        bad.add(Location("train.jsonl", number), Fault("not JSON", "mend it", f"v{number}"))
        if number in {2, 3}:
            bad.add(Location("train.jsonl", number), Fault("no prompt"))
    bad.add(Location("test.parquet", 7, unit="row"), Fault("not JSON", "mend it"))
    with pytest.raises(InputError, match=r"^gsm8k: 1,235 rows cannot be used; nothing was written$") as caught:
        bad.check("gsm8k", "; nothing was written")
    assert [(str(problem.where), problem.message, problem.hint) for problem in caught.value.problems] == [
        ("train.jsonl:1", "not JSON; 1,234 rows: 1 (v1), 2 (v2), 3 (v3), 4 (v4), 5 (v5), …", "mend it"),
        ("train.jsonl:2", "no prompt; 2 rows: 2, 3", None),
        ("test.parquet:row 7", "not JSON", "mend it"),
    ]


def test_one_bad_row_reads_well() -> None:
    bad = BadRows()
    bad.add(Location("train.jsonl", 7), Fault("not JSON", value="Extra data"))
    with pytest.raises(InputError, match=r"^gsm8k: 1 row cannot be used$") as caught:
        bad.check("gsm8k")
    assert caught.value.problems[0].message == "not JSON: Extra data"


def test_many_kinds_are_cut_and_counted() -> None:
    bad = BadRows()
    for number in range(1, 31):
        bad.add(Location("a", number), Fault(f"kind {number}"))
    assert len(bad.problems()) == 13
    assert bad.problems()[-1].message == "and 18 more kinds of faults"


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
    assert {str(problem.where) for problem in error.problems} <= {*places, "None"}
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
