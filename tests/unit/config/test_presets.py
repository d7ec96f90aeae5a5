"""Finding presets and following `extends`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import paths
from flashrl_cli.config import presets
from flashrl_cli.config.layers import Layer, merge
from flashrl_cli.errors import InputError, Problem


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty ./presets as working folder's, in front of the shipped ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    return tmp_path / "presets"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def read(reference: str) -> tuple[dict[str, Any], list[Problem], list[Layer]]:
    problems: list[Problem] = []
    layers = presets.read_layers(reference, problems)
    return merge(layers)[0], problems, layers


def test_shipped_names_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"tiny", "gsm8k-0.5b", "dapo-32b", "gsm8k-tiny-cpu"} <= set(presets.names())
    assert not any(name.startswith("base") for name in presets.names())


def test_own_presets_come_first(folder):
    write(folder, tiny="a: 1", mine="b: 2")
    assert presets.locate("tiny") == folder / "tiny.yaml"
    assert "mine" in presets.names()
    assert read("tiny")[0] == {"name": "tiny", "a": 1}


def test_extends_merges_left_to_right_and_own_values_last(folder):
    write(folder, one="x: 1\ny: 1\nz: 1", two="y: 2\nz: 2", top="extends: [one, two]\nz: 3")
    data, problems, _ = read("top")
    assert (data, problems) == ({"name": "top", "x": 1, "y": 2, "z": 3}, [])


def test_a_single_parent_needs_no_list_and_paths_are_relative_to_the_file(folder):
    write(folder, parts__p="x: 1", parts__q="extends: ./p.yaml\ny: 2", top="extends: parts/q.yaml\nz: 3")
    assert read("./presets/top.yaml")[0] == {"name": "top", "x": 1, "y": 2, "z": 3}


def test_a_part_reached_twice_counts_where_it_came_first(folder):
    write(folder, root="x: root", one="extends: root\nx: one", two="extends: root\ny: two", top="extends: [one, two]")
    data, _, layers = read("top")
    assert data == {"name": "top", "x": "one", "y": "two"}
    assert len(layers) == 4


def test_name_and_description_are_not_inherited(folder):
    write(folder, parent="name: parent\ndescription: old\nx: 1", child="extends: parent")
    assert read("child")[0] == {"name": "child", "x": 1}


@pytest.mark.parametrize(
    ("files", "message", "where"),
    [
        ({"top": "extends: top"}, "extends itself: presets/top.yaml → presets/top.yaml", "presets/top.yaml:1"),
        (
            {"top": "x: 1\nextends: [a]", "a": "extends: b", "b": "extends: a"},
            "extends itself: presets/a.yaml → presets/b.yaml → presets/a.yaml",
            "presets/b.yaml:1",
        ),
        (
            {"top": "extends: a", "a": "extends: b", "b": "extends: c", "c": "extends: d", "d": "x: 1"},
            "extends more than 3 levels deep",
            "presets/c.yaml:1",
        ),
        ({"top": "\nextends: nowhere"}, "extends: no preset named 'nowhere'", "presets/top.yaml:2"),
        ({"top": "extends: ./nowhere.yaml"}, "extends: no preset file ./nowhere.yaml", "presets/top.yaml:1"),
        ({"top": "extends: 3"}, "extends should be a list of preset names or files", "presets/top.yaml:1"),
        ({"top": "extends: {a: b}"}, "extends should be a list of preset names or files", "presets/top.yaml:1"),
        ({"top": "extends: [1]"}, "extends should be a list of preset names or files", "presets/top.yaml:1"),
    ],
)
def test_bad_extends(folder, files, message, where):
    write(folder, **files)
    (problem,) = read("top")[1]
    assert (problem.message, problem.where) == (message, where)


def test_four_files_in_a_chain_are_fine(folder):
    write(folder, top="extends: a", a="extends: b", b="extends: c", c="x: 1")
    assert read("top")[:2] == ({"name": "top", "x": 1}, [])


def test_unknown_names_get_the_nearest(folder):
    write(folder, mine="x: 1")
    with pytest.raises(InputError, match="no preset named 'dapo32b'") as caught:
        presets.locate("dapo32b")
    assert caught.value.hint == "did you mean dapo-32b?"
    with pytest.raises(InputError) as caught:
        presets.locate("zzzzzz")
    assert "mine" in (caught.value.hint or "")
    with pytest.raises(InputError, match="no preset file"):
        presets.locate("./absent.yaml")


def refusal(reference: str) -> tuple[str, str | None]:
    with pytest.raises(InputError) as caught:
        presets.locate(reference)
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("DAPO_32B", "did you mean dapo-32b?"),
        ("dapo32b", "did you mean dapo-32b?"),
        (" tiny ", "did you mean tiny?"),
        ("presets/tiny", "did you mean tiny?"),
        ("tiny.YAML", "did you mean tiny?"),
        ("cpu", "did you mean base/cpu?"),
        ("bare", "for the file: ./bare"),
        ("other", "for the file: presets/other.yml"),
        ("sub/deep", "for the file: sub/deep.yaml"),
    ],
)
def test_names_that_are_nearly_one(folder, reference, hint):
    for name in ("bare", "presets/other.yml", "sub/deep.yaml"):
        (folder.parent / name).parent.mkdir(exist_ok=True)
        (folder.parent / name).write_text("")
    assert refusal(reference) == (f"no preset named {reference!r}", hint)


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("tiny.yaml", "did you mean the preset tiny?"),
        ("presets/tiny.yml", "did you mean the preset tiny?"),
        ("./presets/mime.yaml", "did you mean presets/mine.yaml?"),
        ("zzz/q.yaml", "`flashrl presets ls` lists the shipped presets"),
        ("~nobody-of-this-name/x.yaml", "`flashrl presets ls` lists the shipped presets"),
        ("./" + "x" * 300, "`flashrl presets ls` lists the shipped presets"),
        ("./x\0y", "`flashrl presets ls` lists the shipped presets"),
    ],
)
def test_files_that_are_missing(folder, reference, hint):
    write(folder, mine="x: 1")
    assert refusal(reference) == (f"no preset file {reference}", hint)


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", ""])
def test_names_that_no_file_can_have(folder, name):
    assert refusal(name)[0] == f"no preset named {name!r}"


def test_a_folder_is_no_preset(folder):
    write(folder, mine="x: 1")
    assert refusal("./presets") == ("./presets is a folder, not a preset file", "it holds mine.yaml")
    write(folder, top="extends: ./")
    (problem,) = read("top")[1]
    assert (problem.message, problem.where) == ("extends: ./ is a folder, not a preset file", "presets/top.yaml:1")


def test_links_that_lead_nowhere(folder):
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "gone.yaml").symlink_to("nowhere")
    assert "symbolic links" in read("./presets/loop.yaml")[1][0].message
    assert "cannot be read" in read("./presets/gone.yaml")[1][0].message


def test_names_equal_file_names():
    root = paths.presets_root()
    for path in root.rglob("*.yaml"):
        name = path.relative_to(root).with_suffix("").as_posix()
        own = presets.read_layers(str(path), [])[-1].data
        assert own["name"] == path.stem
        assert ("description" in own) == (not name.startswith("base/")), name
