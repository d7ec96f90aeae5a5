"""Values as text: read back, they are the same."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.config.yaml_file import parse, text_of

TEXTS = st.text(alphabet=string.ascii_letters + string.digits + string.punctuation + " \n\té", max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS


@settings(deadline=None)
@given(SCALARS | st.lists(SCALARS, max_size=4))
def test_read_back_it_is_equal_and_of_the_same_type(value):
    document = parse(text_of(value), "")
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
