"""YAML text to data and back: what PyYAML gets wrong, what presets refuse, and guesses at what was meant."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.config import yaml_file
from flashrl_cli.config.yaml_file import parse, text_of
from flashrl_cli.errors import Location

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("é→€"), max_size=12)
NAMES = TEXT.filter(lambda text: text != "<<")
"""Keys of JSON that presets do not refuse: `<<` merges mappings in YAML, and is refused with a hint."""
NUMBERS = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
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
    document = yaml_file.parse(text)
    assert (document.data, type(document.data)) == (value, type(value))
    assert document.problems == []


@given(st.dictionaries(NAMES, VALUES, max_size=3))
def test_json_is_yaml(data):
    assert yaml_file.parse(json.dumps(data, ensure_ascii=False)).data == data


def test_lines_of_all_keys():
    document = yaml_file.parse("a: 1\n\nb:\n  c: 2  # two\n  d: {e: 3}\n")
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
        ("a: 1\nb: *x", 2, "aliases (*x)"),
        ("a: 1\nb: &x 1", 2, "anchors (&x)"),
        ("a: &x [*x]", 1, "anchors"),
        ("1: a", 1, "is not text"),
        ("? [a]\n: b", 1, "a key in brackets"),
        ("a: {{ b }}", 1, "a key in brackets"),
        ("a:\n  <<: {b: 1}", 2, "merge keys"),
        ("a: *nowhere", 1, "aliases (*nowhere)"),
        ("a: None", 1, "None is Python's"),
        ("a: “b”", 1, "typographic quotes"),
        ("a: 1\n\u00a0b: 2", 2, "a character that nobody sees"),
        ('"\\e[31mred": 1', 1, "a character that nobody sees"),
        ('a: "\\0"', 1, "is no character"),
        ('a: "\\ud800"', 1, "is no character"),
        ("a: 1\nb: {c: 1\nd: 2", 3, "a flow mapping that starts in line 2"),
        ("a: !!int many", 1, "is no int"),
        ("a: 1\n---\nb: 2", 2, "not YAML"),
    ],
)
def test_refusals_say_the_line(text, line, part):
    (problem,) = yaml_file.parse(text, Location("p.yaml")).problems
    assert part in problem.message
    assert problem.where == Location("p.yaml", line)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a:\n\tb: 1", "indent with spaces, not with tabs"),
        ("a: {b:\t1}", "indent with spaces, not with tabs"),
        ("a: @b", "quote it"),
        ("a: it's: b", "quote text that holds a colon; keys of one map start in one column"),
        ("a: 1\nb", "write a colon and a space between a key and its value"),
        ("a:\n  b: 1\n c: 2", "keys of one map start in one column"),
        ("a: [b\nc: d", "close the bracket; quote text that holds brackets"),
        ("a: {b: ${c}}", "close the bracket; quote text that holds brackets"),
        ("a: 'b", "close the quote"),
        ("a: 1\n---\nb: 2", "one preset a file: drop what follows `---`"),
    ],
)
def test_what_to_do_about_syntax(text, hint):
    (problem,) = yaml_file.parse(text).problems
    assert problem.hint == hint


def test_what_is_refused_is_left_out():
    document = yaml_file.parse("a: {b: *x, c: 1}\nd: [1, !t 2]\ne: 3")
    assert document.data == {"a": {"c": 1}, "e": 3}
    assert yaml_file.parse("!t x").data is None


def test_quotes_keep_what_would_be_refused():
    text = """a: "None"\nb: '“b”'\nc: "«a» and «b»"\nd: say “b”"""
    assert yaml_file.parse(text).data == {"a": "None", "b": "“b”", "c": "«a» and «b»", "d": "say “b”"}


def test_verbatim_keys_keep_their_text():
    document = yaml_file.parse("env: {A: 010, B: TRUE, C: 1e-6, D: null}\nn: 010", verbatim=("env",))
    assert document.data == {"env": {"A": "010", "B": "TRUE", "C": "1e-6", "D": None}, "n": 10}


def test_all_refusals_at_once():
    assert len(yaml_file.parse("a: 1\na: 2\nb: !!set {x}\n3: c").problems) == 3


def test_control_characters_and_deep_nesting_are_problems():
    (problem,) = yaml_file.parse("a: 1\nb: \x00", Location("x")).problems
    assert ("not YAML" in problem.message, problem.where) == (True, Location("x", 2))
    assert "nested too deeply" in yaml_file.parse("[" * 3_000).problems[0].message


def test_a_device_without_end_is_not_read_to_its_end():
    assert "larger than" in yaml_file.read(Path("/dev/zero"), "x").problems[0].message


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
        _write(tmp_path / "big.yaml", b"#" * 100_001): "larger than",
        _write(tmp_path / "latin.yaml", b"a: \xe9\n"): "not UTF-8",
        _write(tmp_path / "list.yaml", b"- a\n"): "a preset is a map of keys, this is a list",
        _write(tmp_path / "number.yaml", b"3\n"): "this is a single value",
        _write(tmp_path / "text.yaml", b"hello\n"): "this is text",
    }
    for path, part in cases.items():
        document = yaml_file.read(path, path.name)
        assert document.data == {}
        assert part in document.problems[0].message
        assert str(document.problems[0].where).startswith(path.name)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1e-5,1e-4", ["1e-5", "1e-4"]),
        (" 1, [a, b] ,{c: 2}", ["1", "[a, b]", "{c: 2}"]),
        ("\"x, y\",'z'", ['"x, y"', "'z'"]),
        ("~/a,/b/c", ["~/a", "/b/c"]),
        ("prepared:tiny,off", ["prepared:tiny", "off"]),
        ("!!str 3,*a", ["!!str 3", "*a"]),
        ("a b", ["a b"]),
        ("", []),
    ],
)
def test_items_are_the_texts_between_commas(text, found):
    assert yaml_file.items(text, Location("--x")) == (found, [])


@pytest.mark.parametrize(
    "text", ["a,", ",a", "a,,b", "a, ", "a],[b", "a] #", "a #b,c", "[a", '"a', "\0,a", "@a", "[" * 3000]
)
def test_what_is_no_list_has_no_items(text):
    found, (problem,) = yaml_file.items(text, Location("--x"))
    assert found == []
    assert problem.where == Location("--x")
    assert "is no list of values" in problem.message
    assert problem.message.isprintable()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.recursive(NUMBERS | TEXT, st.lists, max_leaves=4), min_size=1))
def test_items_written_and_read_are_the_same(values):
    texts = list(map(text_of, values))
    assert yaml_file.items(",".join(texts), Location("--x")) == (texts, [])


PRINTABLE = st.text(alphabet=string.ascii_letters + string.digits + string.punctuation + " \n\té", max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PRINTABLE


@settings(deadline=None)
@given(SCALARS | st.lists(SCALARS, max_size=4))
def test_read_back_it_is_equal_and_of_the_same_type(value):
    document = parse(text_of(value))
    assert not document.problems
    assert (document.data, repr(document.data)) == (value, repr(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-6, "1e-6"),
        (1e-5, "1e-5"),
        (2.0, "2.0"),
        (("console", "file"), "[console, file]"),
        ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-32B"),
        ("1", '"1"'),
        ("", '""'),
        ("a: b", '"a: b"'),
        (["a, b", 1], '["a, b", 1]'),
    ],
)
def test_shown(value, text):
    assert text_of(value) == text


KEYS = ["data.train", "data.train_batch_size", "algorithm.lr", "algorithm.mini_batch_size", "critic.lr", "rollout.n"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("INT8", ["int8"]),
        ("“int8”", ["int8"]),
        ("int-8", ["int8"]),
        ("int", ["int8"]),
        ("nothing like it", []),
        ("", []),
    ],
)
def test_nearest(text, names):
    assert yaml_file.nearest(text, ["bf16", "fp8", "int8"]) == names


def test_nearest_folds_before_it_compares():
    assert yaml_file.nearest("A1", ["a-1", "a-2"]) == ["a-1"]
    assert set(yaml_file.nearest("name-3", ["name-1", "name-2"])) == {"name-1", "name-2"}
    assert len(yaml_file.nearest("name-3", ["name-1", "name-2"], 1)) == 1


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("algorithm.lr", "algorithm.lr"),
        ("Algorithm.LR", "algorithm.lr"),
        ("algorithm/lr", "algorithm.lr"),
        ("--algorithm.lr", "algorithm.lr"),
        ("algorithm.lr:1e-6", "algorithm.lr"),
        ("algorithm.lr=1e-6", "algorithm.lr"),
        ("data.train batch-size", "data.train_batch_size"),
        ("lr", None),
        ("algorithm.l_r", None),
    ],
)
def test_same_key(text, key):
    assert yaml_file.same_key(text, KEYS) == key


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("lr", ["algorithm.lr", "critic.lr"]),
        ("critic.lrr", ["critic.lr"]),
        ("n", ["rollout.n"]),
        ("rollouts.n", ["rollout.n"]),
        ("data.batch_size", ["data.train_batch_size"]),
        ("batch_size", ["data.train_batch_size", "algorithm.mini_batch_size"]),
        ("data.trian", ["data.train"]),
        ("data.quite_else", []),
        ("nothing.at.all", []),
    ],
)
def test_nearest_keys(text, keys):
    assert yaml_file.nearest_keys(text, KEYS) == keys


@pytest.mark.parametrize(
    ("value", "readings"),
    [
        (8.0, [8, "8.0"]),
        (8.5, ["8.5"]),
        (1, [True, "1"]),
        (True, [True, "true"]),
        (None, [None]),
        ([7], [7]),
        ([7, 8], []),
        ("off", [None, False]),
        ("yes", [True]),
        ("", [None]),
        ("1e-6,", [1e-6]),
        ("“2”", [2]),
        ("1,024", [1024]),
        ("1_024_000", [1024000]),
        ("0,5", [0.5]),
        ("50%", [0.5]),
        ("1k", []),
        ("x", []),
    ],
)
def test_readings(value, readings):
    assert list(yaml_file.readings(value)) == readings


def test_a_name_where_a_list_belongs_is_added_to_its_usual_items():
    assert next(yaml_file.readings("wandb", ("console", "file"))) == ["console", "file", "wandb"]
    assert next(yaml_file.readings("file, wandb", ("console", "file"))) == ["console", "file", "wandb"]
