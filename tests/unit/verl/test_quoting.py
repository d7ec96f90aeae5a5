"""Whatever is quoted, Hydra reads back: the same value, of the same type."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashrl_cli.verl.overrides import quote

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.text("'\\\"=,[]{}$: \n~", max_size=6)
)


def parsed(text: str) -> object:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(f"key={text}").value()


@given(SCALARS | st.lists(SCALARS, max_size=4))
@example("\\")
@example("\\'")
@example("a'b\\\\'")
@example("1_2")
@example("nan")
@example("/path with space/x,y=z'q")
@example("${a.b}")
@example(["a]b", "", None])
def test_hydra_reads_it_back(value):
    found = parsed(quote(value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-6, "1e-6"),
        (1e-10, "1e-10"),
        (2.0, "2.0"),
        (1e22, "1e+22"),
        (True, "True"),
        (None, "null"),
        (["console", "file"], "[console,file]"),
        (("a b",), "['a b']"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("/a/b.parquet", "/a/b.parquet"),
        ("token-mean", "token-mean"),
        ("~/x", "'~/x'"),
        ("NULL", "'NULL'"),
        ("", "''"),
        ("it's", "'it\\'s'"),
    ],
)
def test_texts_that_people_read(value, text):
    assert quote(value) == text
