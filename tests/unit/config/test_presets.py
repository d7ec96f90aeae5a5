"""Finding presets, following `extends`, listing them, and copying one to a file of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import __version__, paths
from flashrl_cli.config import presets
from flashrl_cli.config.layers import Layer, merge
from flashrl_cli.config.presets import copy_preset, names
from flashrl_cli.config.resolve import catalog
from flashrl_cli.errors import InputError, Problem
from tests.specs import load_spec


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(here):
    """An empty ./presets, in front of the shipped ones."""
    (here / "presets").mkdir()
    return here / "presets"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def read(reference: str) -> tuple[dict[str, Any], list[Problem], list[Layer]]:
    problems: list[Problem] = []
    layers = presets.read_layers(reference, problems)
    return merge(layers)[0], problems, layers


def test_shipped_names_are_found_from_anywhere():
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
    assert (problem.message, str(problem.where)) == (message, where)


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
    assert (problem.message, str(problem.where)) == ("extends: ./ is a folder, not a preset file", "presets/top.yaml:1")


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


def test_the_catalog_has_shipped_presets_and_a_broken_one(folder):
    write(folder, broken="a: 1\n")
    found = {summary.name: summary for summary in catalog()}
    assert (found["dapo-32b"].devices, found["dapo-32b"].gpus, found["dapo-32b"].tis) == ("4 × 8", 32, None)
    assert (found["gsm8k-0.5b"].devices, found["gsm8k-0.5b"].gpus) == ("4", 4)
    tiny = found["tiny"]
    assert (tiny.devices, tiny.gpus, tiny.rollout, tiny.tis) == ("CPU", 0, "int8", 2)
    assert str(found["broken"].error).startswith("preset broken: ")
    assert [name for name, summary in found.items() if summary.error] == ["broken"]


def values(preset: str) -> dict[str, object]:
    return load_spec(preset).spec.model_dump() | {"name": ""}


@pytest.mark.parametrize("name", names())
def test_a_copy_says_the_same_under_its_own_name(name):
    target = copy_preset(name, "sub/mine.yaml")
    assert load_spec(str(target)).spec.name == "mine"
    assert values(str(target)) == values(name)


def test_everything_but_the_name_is_kept_below_a_header(here):
    (here / "a.yaml").write_text("# why\nname: 'a'  # so\n\ndescription: d # e\nverl: {x: 1}\n")
    text = copy_preset("./a.yaml", "b").read_text()
    assert text == (
        f"# Copied from ./a.yaml (flashrl {__version__}).\n# why\nname: b  # so\n\ndescription: d # e\nverl: {{x: 1}}\n"
    )


@pytest.mark.parametrize(
    ("destination", "written"),
    [
        ("mine.yaml", "mine.yaml"),
        ("mine.yml", "mine.yml"),
        ("mine", "mine.yaml"),
        ("my-0.5b", "my-0.5b.yaml"),
        ("new/mine", "new/mine.yaml"),
        ("new/", "new/tiny.yaml"),
        ("there", "there/tiny.yaml"),
    ],
)
def test_where_it_goes(destination, written, here):
    (here / "there").mkdir()
    assert copy_preset("tiny", destination) == here / written
    assert sorted(path for path in here.rglob("*") if path.is_file()) == [here / written]


def test_a_name_that_looks_like_a_number_stays_text(here):
    assert load_spec(str(copy_preset("tiny", "12.yaml"))).spec.name == "12"


def test_an_existing_file_is_replaced_by_force_alone(here):
    (here / "mine.yaml").write_text("precious")
    with pytest.raises(InputError, match=r"mine\.yaml exists") as caught:
        copy_preset("tiny", "mine.yaml")
    assert "--force" in str(caught.value.hint)
    assert (here / "mine.yaml").read_text() == "precious"
    copy_preset("tiny", "mine.yaml", force=True)
    assert values("./mine.yaml") == values("tiny")


def test_relative_parents_are_found_from_the_new_folder(here):
    (here / "presets").mkdir()
    (here / "presets" / "part.yaml").write_text("rollout: {n: 3}\n")
    (here / "one.yaml").write_text("rollout: {n: 4}\n")
    absolute = here / "one.yaml"
    (here / "presets" / "a.yaml").write_text(
        f'extends: [tiny, ./part.yaml, "../one.yaml", part.yaml, {absolute}]  # order counts\n'
    )
    target = copy_preset("a", "deep/er/b")
    line = target.read_text().splitlines()[1]
    assert line == (
        f"extends: [tiny, ../../presets/part.yaml, ../../one.yaml, ../../presets/part.yaml, {absolute}]  # order counts"
    )
    assert values(str(target)) == values("a")


def test_a_single_parent_and_a_list_in_lines(here):
    (here / "part.yaml").write_text("rollout: {n: 3}\n")
    (here / "a.yaml").write_text("extends: ./part.yaml\n")
    (here / "b.yaml").write_text("extends:\n  - tiny  # first\n  - part.yaml\n")
    assert copy_preset("a.yaml", "x/").read_text().splitlines()[1:] == ["extends: ../part.yaml"]
    lines = copy_preset("b.yaml", "x/").read_text().splitlines()[1:]
    assert lines == ["extends:", "  - tiny  # first", "  - ../part.yaml"]


def test_windows_line_ends_and_byte_order_marks_are_left_behind(here):
    (here / "a.yaml").write_bytes(b"\xef\xbb\xbfname: a\r\nextends: tiny\r\n")
    assert copy_preset("a.yaml", "b").read_bytes().endswith(b").\nname: b\nextends: tiny\n")


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "- a\n", "a: [\n", "a: !!python/object 1\n"])
def test_what_cannot_be_read_is_not_copied(text, here):
    (here / "bad.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        copy_preset("bad.yaml", "mine")
    assert caught.value.problems[0].where is not None
    assert not (here / "mine.yaml").exists()


def test_an_empty_file_is_copied(here):
    (here / "empty.yaml").write_text("")
    assert copy_preset("empty.yaml", "mine").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("preset", "destination", "match"),
    [("dapo32b", "mine", "no preset named"), ("tiny", ".hidden", "cannot name"), ("tiny", "file/mine", "be written")],
)
def test_refusals(preset, destination, match, here):
    (here / "file").write_text("")
    with pytest.raises(InputError, match=match):
        copy_preset(preset, destination)


def test_parts_can_be_copied():
    target = copy_preset("base/cpu", "presets/base/")
    assert target == Path("presets/base/cpu.yaml").absolute()
    assert target.read_text().endswith((paths.presets_root() / "base" / "cpu.yaml").read_text())


def test_devices_of_both_sides_are_listed():
    found = {one.name: (one.gpus, one.devices) for one in catalog()}
    assert found["gsm8k-async-0.5b"] == (2, "1 + 1")
    assert found["dapo-7b-async"] == (8, "4 + 4")
    assert (found["dapo-32b"], found["tiny"]) == ((32, "4 × 8"), (0, "CPU"))
