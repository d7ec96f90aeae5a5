"""What `--sweep` is given: keys, values and files, and everything wrong with them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.config.resolve import option_layers
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.train.review import Options
from flashrl_cli.train.sweep_axes import Axis, is_file, read_axes

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
    assert axis.where == f"--sweep {key}"


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
    assert (problem.where or "").startswith("--sweep ")


def test_everything_wrong_is_told_at_once() -> None:
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
        (["name=a,b"], NOTHING, "name says where a run lies"),
        (["trainer.project=a,b"], NOTHING, "trainer.project says where a run lies"),
    ],
)
def test_misplaced_key(texts: list[str], given: Options, message: str) -> None:
    (problem,) = refused(*texts, given=given)
    assert message in problem.message


@pytest.mark.parametrize("text", ["s.yaml", "./s", "~/x", "/tmp/s.yml", "dir/s.yml"])
def test_files_by_their_looks(text: str) -> None:
    assert is_file(text)


@pytest.mark.parametrize("text", ["a=s.yaml", "rollout=int8", "s", ""])
def test_no_files(text: str) -> None:
    assert not is_file(text)


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
    assert axes[1].where == f"{path}:3"


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
    assert problem.where == f"{path}{line}"


def test_missing_file(tmp_path: Path) -> None:
    (problem,) = refused(f"{tmp_path}/none.yaml")
    assert "cannot be read" in problem.message


def test_a_folder(tmp_path: Path) -> None:
    (problem,) = refused(str(tmp_path))
    assert problem.message == "this is a folder, not a sweep file"


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
    (layer,) = option_layers(None, None, [f"{key}={text}"], problems)
    assert not problems
    return layer.data["env"]["NOTE"]
