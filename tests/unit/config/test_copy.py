"""Presets copied to files of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli import __version__, paths
from flashrl_cli.config.catalog import copy_preset
from flashrl_cli.config.presets import names
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(preset: str) -> dict[str, object]:
    return load_spec(preset).spec.model_dump() | {"name": ""}


@pytest.mark.parametrize("name", names())
def test_a_copy_says_the_same_under_its_own_name(name):
    target = copy_preset(name, "sub/mine.yaml")
    assert load_spec(str(target)).spec.name == "mine"
    assert values(str(target)) == values(name)


def test_everything_but_the_name_is_kept_below_a_header(folder):
    (folder / "a.yaml").write_text("# why\nname: 'a'  # so\n\ndescription: d # e\nverl: {x: 1}\n")
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
def test_where_it_goes(destination, written, folder):
    (folder / "there").mkdir()
    assert copy_preset("tiny", destination) == folder / written
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == [folder / written]


def test_a_name_that_looks_like_a_number_stays_text(folder):
    assert load_spec(str(copy_preset("tiny", "12.yaml"))).spec.name == "12"


def test_an_existing_file_is_replaced_by_force_alone(folder):
    (folder / "mine.yaml").write_text("precious")
    with pytest.raises(InputError, match=r"mine\.yaml exists") as caught:
        copy_preset("tiny", "mine.yaml")
    assert "--force" in str(caught.value.hint)
    assert (folder / "mine.yaml").read_text() == "precious"
    copy_preset("tiny", "mine.yaml", force=True)
    assert values("./mine.yaml") == values("tiny")


def test_relative_parents_are_found_from_the_new_folder(folder):
    (folder / "presets").mkdir()
    (folder / "presets" / "part.yaml").write_text("rollout: {n: 3}\n")
    (folder / "one.yaml").write_text("rollout: {n: 4}\n")
    absolute = folder / "one.yaml"
    (folder / "presets" / "a.yaml").write_text(
        f'extends: [tiny, ./part.yaml, "../one.yaml", part.yaml, {absolute}]  # order counts\n'
    )
    target = copy_preset("a", "deep/er/b")
    line = target.read_text().splitlines()[1]
    assert line == (
        f"extends: [tiny, ../../presets/part.yaml, ../../one.yaml, ../../presets/part.yaml, {absolute}]  # order counts"
    )
    assert values(str(target)) == values("a")


def test_a_single_parent_and_a_list_in_lines(folder):
    (folder / "part.yaml").write_text("rollout: {n: 3}\n")
    (folder / "a.yaml").write_text("extends: ./part.yaml\n")
    (folder / "b.yaml").write_text("extends:\n  - tiny  # first\n  - part.yaml\n")
    assert copy_preset("a.yaml", "x/").read_text().splitlines()[1:] == ["extends: ../part.yaml"]
    lines = copy_preset("b.yaml", "x/").read_text().splitlines()[1:]
    assert lines == ["extends:", "  - tiny  # first", "  - ../part.yaml"]


def test_windows_line_ends_and_byte_order_marks_are_left_behind(folder):
    (folder / "a.yaml").write_bytes(b"\xef\xbb\xbfname: a\r\nextends: tiny\r\n")
    assert copy_preset("a.yaml", "b").read_bytes().endswith(b").\nname: b\nextends: tiny\n")


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "- a\n", "a: [\n", "a: !!python/object 1\n"])
def test_what_cannot_be_read_is_not_copied(text, folder):
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        copy_preset("bad.yaml", "mine")
    assert caught.value.problems[0].where is not None
    assert not (folder / "mine.yaml").exists()


def test_an_empty_file_is_copied(folder):
    (folder / "empty.yaml").write_text("")
    assert copy_preset("empty.yaml", "mine").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("preset", "destination", "match"),
    [("dapo32b", "mine", "no preset named"), ("tiny", ".hidden", "cannot name"), ("tiny", "file/mine", "be written")],
)
def test_refusals(preset, destination, match, folder):
    (folder / "file").write_text("")
    with pytest.raises(InputError, match=match):
        copy_preset(preset, destination)


def test_parts_can_be_copied():
    target = copy_preset("base/cpu", "presets/base/")
    assert target == Path("presets/base/cpu.yaml").absolute()
    assert target.read_text().endswith((paths.presets_root() / "base" / "cpu.yaml").read_text())
