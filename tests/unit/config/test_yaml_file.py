"""YAML text to data: what PyYAML gets wrong, and what presets refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.config import yaml_file

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("é→€"), max_size=12)
NUMBERS = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("+7", 7),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("off", "off"),
        ("yes", "yes"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("NULL", None),
        ("'1e-6'", "1e-6"),
        ("2024-01-01", "2024-01-01"),
        ("[console, file]", ["console", "file"]),
        ("e5", "e5"),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    document = yaml_file.parse(text, "x")
    assert (document.data, type(document.data)) == (value, type(value))
    assert document.problems == []


@given(st.dictionaries(TEXT, VALUES, max_size=3))
def test_json_is_yaml(data):
    assert yaml_file.parse(json.dumps(data, ensure_ascii=False), "x").data == data


def test_lines_of_all_keys():
    document = yaml_file.parse("a: 1\n\nb:\n  c: 2  # two\n  d: {e: 3}\n", "x")
    assert document.lines == {"a": 1, "b": 3, "b.c": 4, "b.d": 5, "b.d.e": 5}


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a: 1\nb: 2\na: 3", 3, "'a' is given twice (first in line 1)"),
        ("x:\n  lr: 1\n  lr: 2", 3, "'x.lr' is given twice (first in line 2)"),
        ("a:\n\tb: 1", 2, "not YAML"),
        ("a: [1, 2", 1, "not YAML"),
        ("a: !!python/object:os.system x", 1, "is not supported"),
        ("a: !!python/tuple [1]", 1, "is not supported"),
        ("a: &x 1\nb: *x", 1, "aliases"),
        ("a: &x [*x]", 1, "aliases"),
        ("1: a", 1, "is not text"),
        ("? [a]\n: b", 1, "is not text"),
        ("a: !!int many", 1, "is no int"),
        ("a: 1\n---\nb: 2", 2, "not YAML"),
    ],
)
def test_refusals_say_the_line(text, line, part):
    (problem,) = yaml_file.parse(text, "p.yaml").problems
    assert part in problem.message
    assert problem.where == f"p.yaml:{line}"


def test_a_tab_is_named():
    (problem,) = yaml_file.parse("a:\n\tb: 1", "x").problems
    assert problem.hint == "indent with spaces, not with tabs"


def test_all_refusals_at_once():
    assert len(yaml_file.parse("a: 1\na: 2\nb: !!set {x}\n3: c", "x").problems) == 3


def test_control_characters_and_deep_nesting_are_problems():
    assert "not YAML" in yaml_file.parse("a: \x00", "x").problems[0].message
    assert "not YAML" in yaml_file.parse("[" * 3_000, "x").problems[0].message


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfa: 1\nb: 2\n", b"a: 1\r\nb: 2\r\n"], ids=["BOM", "CRLF"])
def test_files_of_other_editors(tmp_path, raw):
    (tmp_path / "p.yaml").write_bytes(raw)
    document = yaml_file.read(tmp_path / "p.yaml", "p")
    assert (document.data, document.problems) == ({"a": 1, "b": 2}, [])


def test_an_empty_file_is_an_empty_map(tmp_path):
    (tmp_path / "p.yaml").write_text("# nothing yet\n")
    assert yaml_file.read(tmp_path / "p.yaml", "p").data == {}


def _write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def test_files_that_are_no_presets(tmp_path):
    cases = {
        tmp_path: "folder",
        tmp_path / "absent.yaml": "cannot be read",
        _write(tmp_path / "big.yaml", b"#" * 1_000_001): "larger than",
        _write(tmp_path / "latin.yaml", b"a: \xe9\n"): "not UTF-8",
        _write(tmp_path / "list.yaml", b"- a\n"): "a preset is a map of keys, this is a list",
        _write(tmp_path / "text.yaml", b"hello\n"): "this is a str",
    }
    for path, part in cases.items():
        document = yaml_file.read(path, path.name)
        assert document.data == {}
        assert part in document.problems[0].message
        assert (document.problems[0].where or "").startswith(path.name)
