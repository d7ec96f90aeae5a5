"""Every combination once, under a name of its own that is the same each time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.config.spec import FOLDER_NAME
from flashrl_cli.config.yaml_file import text_of
from flashrl_cli.errors import InputError
from flashrl_cli.train.review import Options
from flashrl_cli.train.sweep_axes import Axis, Point, points, run_names


def axis(*columns: tuple[str, list[str]]) -> Axis:
    keys, values = zip(*columns, strict=True)
    return Axis(keys=tuple(keys), rows=tuple(zip(*values, strict=True)), where="")


def names(*values: tuple[tuple[str, str], ...]) -> list[str]:
    found = [Point(pairs) for pairs in values]
    return run_names(["b"] * len(found), found)


def test_product_in_order_with_groups_in_step() -> None:
    axes = [axis(("a", ["1", "2"])), axis(("b", ["x", "y"]), ("c", ["p", "q"]))]
    assert [str(point) for point in points(axes)] == ["a=1 b=x c=p", "a=1 b=y c=q", "a=2 b=x c=p", "a=2 b=y c=q"]


def test_many_are_refused_unless_meant() -> None:
    def axes(count: int) -> list[Axis]:
        return [axis(("a", list(map(str, range(count)))))]

    assert len(points(axes(64))) == 64
    with pytest.raises(InputError, match="a sweep of 65 runs") as caught:
        points(axes(65))
    assert "--yes" in (caught.value.hint or "")
    assert len(points(axes(65), many=True)) == 65


def test_a_product_without_end_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="1,000,000,000,000 runs"):
        points([axis((str(n), ["x"] * 1000)) for n in range(4)], many=True)


def test_options_of_a_point() -> None:
    point = Point((("rollout", "'int8'"), ("algorithm.lr", "1e-4"), ("tis", "off")))
    assert point.options(Options(sets=["a=1"])) == Options(rollout="int8", tis="off", sets=("a=1", "algorithm.lr=1e-4"))
    assert point.data() == {"rollout": "int8", "algorithm.lr": 1e-4, "tis": "off"}
    assert Point((("tis", "2"),)).options(Options(rollout="bf16")) == Options(rollout="bf16", tis="2")
    assert Point((("env.A", "010"),)).data() == {"env.A": "010"}


@pytest.mark.parametrize(
    ("key", "text", "word"),
    [
        ("rollout", "int8", "int8"),
        ("tis", "2", "tis2"),
        ("tis", "off", "tisoff"),
        ("algorithm.lr", "1e-4", "lr1e-4"),
        ("algorithm.lr", "0.0001", "lr1e-4"),
        ("algorithm.lr", "0.0003", "lr3e-4"),
        ("algorithm.clip_low", "0.25", "clip_low0.25"),
        ("algorithm.lr", "1.0", "lr1"),
        ("rollout.n", "16", "n16"),
        ("rollout.top_k", "-1", "top_k-1"),
        ("rollout.enforce_eager", "true", "enforce_eager_true"),
        ("critic.path", "null", "path_null"),
        ("model.path", "Qwen/Qwen2.5-0.5B", "path_Qwen2.5-0.5B"),
        ("model.path", "/models/mine/", "path_mine"),
        ("trainer.logger", "[console, file]", "logger-console-file"),
        ("verl.+actor.x.weight_decay", "0.1", "weight_decay0.1"),
        ("env.A", "a*b ü", "A_a-b"),
        ("env.A", "x" * 300, "A_" + "x" * 40),
    ],
)
def test_words(key: str, text: str, word: str) -> None:
    assert names(((key, text),)) == [f"b-{word}"]


def test_keys_that_end_alike_are_told_apart() -> None:
    both = (("algorithm.lr", "1e-5"), ("critic.lr", "1e-4"))
    assert names(both) == ["b-algorithm.lr1e-5-critic.lr1e-4"]
    assert names((("lr", "1"), ("critic.lr", "2"))) == ["b-lr1-critic.lr2"]


def test_what_the_base_says_is_not_said_again() -> None:
    found = [Point((("rollout", "int8"), ("tis", cap), ("rollout.n", "8"))) for cap in ("off", "2")]
    assert run_names(["tiny-int8", "tiny-int8-tis2"], found, said=("rollout", "tis")) == [
        "tiny-int8-n8",
        "tiny-int8-tis2-n8",
    ]


def test_points_of_the_same_words_get_a_hash() -> None:
    first, second, third = names((("model.path", "/a/x"),), (("model.path", "/b/x"),), (("model.path", "/b/y"),))
    assert re.fullmatch(r"b-path_x-[0-9a-f]{6}", first)
    assert re.fullmatch(r"b-path_x-[0-9a-f]{6}", second)
    assert first != second
    assert third == "b-path_y"


KEYS = st.sampled_from(["rollout", "tis", "algorithm.lr", "critic.lr", "model.path", "rollout.n", "env.A", "verl.+x.n"])
VALUES = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.booleans() | st.none()


@settings(deadline=None, max_examples=50)
@given(st.lists(KEYS, min_size=1, max_size=4, unique=True), st.data())
def test_names_are_unique_folders_and_the_same_each_time(keys: list[str], data: st.DataObject) -> None:
    combination = st.tuples(*(st.tuples(st.just(key), VALUES.map(text_of)) for key in keys))
    found = [Point(values) for values in data.draw(st.lists(combination, min_size=1, max_size=8, unique=True))]
    made = run_names(["base"] * len(found), found)
    assert len(set(made)) == len(made)
    assert all(re.match(FOLDER_NAME, name) for name in made)
    assert made == run_names(["base"] * len(found), found)
    assert dict(zip(found, made, strict=True)) == dict(
        zip(reversed(found), run_names(["base"] * len(found), found[::-1]), strict=True)
    )
