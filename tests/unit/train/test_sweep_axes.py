"""What `--sweep` is given, and everything wrong with it at once; every combination has a name of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.config.resolve import Options, option_layers
from flashrl_cli.config.yaml_file import text_of
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.paths import FOLDER_NAME
from flashrl_cli.train.sweep_axes import LONGEST_NAME, Axis, Point, is_file, points, read_axes, run_names

NOTHING = Options()


def refused(*texts: str, given: Options = NOTHING) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        read_axes(texts, given)
    return list(caught.value.problems)


def rows(axis: Axis) -> dict[str, tuple[str, ...]]:
    return dict(zip(axis.keys, zip(*axis.rows, strict=True), strict=True))


def write(folder: Path, text: str) -> str:
    (folder / "s.yaml").write_text(text)
    return str(folder / "s.yaml")


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("rollout=bf16,int8,fp8", "rollout", ("bf16", "int8", "fp8")),
        ("tis=off,2", "tis", ("off", "2")),
        (" algorithm.lr =1e-5, 1e-4", "algorithm.lr", ("1e-5", "1e-4")),
        ("trainer.logger=[console, file],[file]", "trainer.logger", ("[console, file]", "[file]")),
        ('model.path="a,b",./c', "model.path", ('"a,b"', "./c")),
        ("verl.+a.b=1", "verl.+a.b", ("1",)),
        ("model.path=a.yaml,b.yaml", "model.path", ("a.yaml", "b.yaml")),
    ],
)
def test_option(text: str, key: str, values: tuple[str, ...]) -> None:
    (axis,) = read_axes([text], NOTHING)
    assert rows(axis) == {key: values}
    assert axis.where == Location("--sweep", key=key)


def test_options_keep_their_order() -> None:
    assert [axis.keys for axis in read_axes(["tis=1", "rollout=int8", "a.b=1"], NOTHING)] == [
        ("tis",),
        ("rollout",),
        ("a.b",),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollout", "not of the form key=value,value"),
        ("=1,2", "not of the form key=value,value"),
        ("", "not of the form key=value,value"),
        ("tis=", "no value"),
        ("tis= ", "no value"),
        ("tis=1,,2", "is no list of values"),
        ("tis=1,", "is no list of values"),
        ("tis=[1,2", "is no list of values"),
    ],
)
def test_bad_option(text: str, message: str) -> None:
    (problem,) = refused(text)
    assert message in problem.message
    assert problem.hint
    assert str(problem.where).startswith("--sweep ")


def test_everything_wrong_is_reported_at_once() -> None:
    assert len(refused("a", "tis=", "trainer.project=p,q", "rollout=int8", "rollout=bf16")) == 4


@pytest.mark.parametrize(
    ("texts", "given", "message"),
    [
        (["rollout=int8", "rollout=bf16"], NOTHING, "rollout is given by --sweep rollout, too"),
        (["rollout=int8", "rollout.precision=bf16"], NOTHING, "rollout.precision is given by --sweep rollout, too"),
        (["tis=1", "correction.cap=2"], NOTHING, "correction.cap is given by --sweep tis, too"),
        (["rollout=int8"], Options(rollout="bf16"), "rollout is given by --rollout, too"),
        (["correction.cap=2"], Options(tis="1"), "correction.cap is given by --tis, too"),
        (["tis=2"], Options(sets=["correction.cap=1"]), "tis is given by --set correction.cap, too"),
        (["rollout.n=2,4"], Options(sets=["x=1", " rollout.n =8"]), "rollout.n is given by --set rollout.n, too"),
        (["name=a,b"], NOTHING, "name names a run's place"),
        (["trainer.project=a,b"], NOTHING, "trainer.project names a run's place"),
    ],
)
def test_misplaced_key(texts: list[str], given: Options, message: str) -> None:
    (problem,) = refused(*texts, given=given)
    assert message in problem.message


def test_files_are_recognized_by_their_names() -> None:
    assert all(map(is_file, ["s.yaml", "./s", "~/x", "/tmp/s.yml", "dir/s.yml"]))
    assert not any(map(is_file, ["a=s.yaml", "rollout=int8", "s", ""]))


def test_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
grid:
  rollout: [bf16, int8]
  algorithm: {lr: [1e-4, 0.00002]}
  verl.data.seed: [1]
zip:
  - tis: [off, 2, "2"]
    rollout.n: [4, 8, 16]
  - env.A: [010, "x y"]
""",
    )
    axes = read_axes([path, "trainer.steps=3"], NOTHING)
    assert [rows(axis) for axis in axes] == [
        {"rollout": ("bf16", "int8")},
        {"algorithm.lr": ("0.0001", "2e-5")},
        {"verl.data.seed": ("1",)},
        {"tis": ("off", "2", '"2"'), "rollout.n": ("4", "8", "16")},
        {"env.A": ("010", "x y")},
        {"trainer.steps": ("3",)},
    ]
    assert axes[1].where == Location(path, 3)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "nothing varies", ""),
        ("grid:", "nothing varies", ""),
        ("a: 1", "unknown key a", ":1"),
        ("grid: [1]", "grid should be a map of keys", ":1"),
        ("grid:\n  tis: 2", "tis should be a list of values", ":2"),
        ("grid:\n  tis: []", "tis should be a list of values", ":2"),
        ("zip: {tis: [1]}", "zip should be a list of maps", ":1"),
        ("zip: [1]", "zip should be a list of maps", ":1"),
        ("zip:\n- {tis: [1, 2], a.b: [1]}", "need as many values each: tis 2, a.b 1", ":1"),
        ("grid: {tis: [1]}\ngrid: {tis: [2]}", "key 'grid' is given twice", ":2"),
        ("- 1", "a sweep is a map of keys, this is a list", ":1"),
        ("grid: [", "not YAML", ":1"),
    ],
)
def test_bad_file(text: str, message: str, line: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    (problem,) = refused(path)
    assert message in problem.message
    assert str(problem.where) == f"{path}{line}"


def test_what_is_no_file(tmp_path: Path) -> None:
    messages = [refused(path)[0].message for path in (f"{tmp_path}/none.yaml", str(tmp_path))]
    assert "cannot be read" in messages[0]
    assert messages[1] == "this is a folder, not a sweep file"


@pytest.mark.parametrize("text", ["try #1,try #2", "a #1\n,b", "a,#b", "a,b #c"])
def test_a_comment_in_a_list_of_values_is_refused(text):
    with pytest.raises(InputError) as caught:
        read_axes([f"env.NOTE={text}"], NOTHING)
    assert "quote text that holds a comma, a bracket or #" in str(caught.value.problems[0].hint)


def test_quoted_values_and_those_of_a_file_are_what_set_takes(tmp_path):
    (axis,) = read_axes(["env.NOTE=\"try #1\",'#2',c: d,&e"], NOTHING)
    assert axis.rows == (('"try #1"',), ("'#2'",), ("c: d",), ("&e",))
    file = tmp_path / "sweep.yaml"
    file.write_text("""grid: {env.NOTE: ['try #1', '"q"', ' x ', 007]}\n""", encoding="utf-8")
    (axis,) = read_axes([str(file)], NOTHING)
    values = [value for (text,) in axis.rows for value in (option_value("env.NOTE", text),)]
    assert values == ["try #1", '"q"', " x ", "007"]


def option_value(key: str, text: str) -> object:
    problems: list[Problem] = []
    (layer,) = option_layers(Options(point=[(key, text)]), problems)
    assert not problems
    return layer.data["env"]["NOTE"]


def axis(*columns: tuple[str, list[str]]) -> Axis:
    keys, values = zip(*columns, strict=True)
    return Axis(keys=tuple(keys), rows=tuple(zip(*values, strict=True)), where=Location(""))


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
    assert point.options(Options(sets=["a=1"])) == Options(sets=["a=1"], point=point.values)
    assert point.data() == {"rollout": "int8", "algorithm.lr": 1e-4, "tis": "off"}
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


def test_keys_that_end_alike_differ_in_names() -> None:
    both = (("algorithm.lr", "1e-5"), ("critic.lr", "1e-4"))
    assert names(both) == ["b-algorithm.lr1e-5-critic.lr1e-4"]
    assert names((("lr", "1"), ("critic.lr", "2"))) == ["b-lr1-critic.lr2"]


def test_values_in_the_base_are_not_repeated() -> None:
    found = [Point((("rollout", "int8"), ("tis", cap), ("rollout.n", "8"))) for cap in ("off", "2")]
    assert run_names(["tiny-int8", "tiny-int8-tis2"], found, in_bases=("rollout", "tis")) == [
        "tiny-int8-n8",
        "tiny-int8-tis2-n8",
    ]


def test_points_of_the_same_words_get_a_hash() -> None:
    first, second, third = names((("model.path", "/a/x"),), (("model.path", "/b/x"),), (("model.path", "/b/y"),))
    assert re.fullmatch(r"b-path_x-[0-9a-f]{6}", first)
    assert re.fullmatch(r"b-path_x-[0-9a-f]{6}", second)
    assert first != second
    assert third == "b-path_y"
    (long,) = names(tuple((f"env.A{number}", "x" * 40) for number in range(9)))
    assert len(long) == LONGEST_NAME + len("-123456")


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
