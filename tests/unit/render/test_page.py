"""Pages that stand alone."""

from __future__ import annotations

import re

import pytest

from flashrl_cli.render import page as pages
from flashrl_cli.render.figure import VARIABLES, Panel, Series
from flashrl_cli.render.page import curves_page, duration, moment, number, percent, whole


def curves(label: str) -> str:
    series = [Series(label=label, xs=[1, 2], ys=[0.0, 1.0]), Series(label="other", xs=[1], ys=[1.0])]
    return curves_page([Panel(title="<b>reward", series=series, limits=(0, 1))], note="thin & bold")


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = curves("a")
    assert not re.search(r"https?://|<link|<script|@import|\bsrc=|url\((?!#)", text)
    assert "default-src 'none'" in text


def test_everything_is_escaped() -> None:
    text = curves('<script>alert("x")</script>')
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>" not in text
    assert "thin &amp; bold" in text


def test_every_colour_is_there_for_light_and_for_dark() -> None:
    text = curves("a")
    for variable in VARIABLES.values():
        assert len(re.findall(rf"{variable}: #[0-9a-f]{{6}};", text)) == 2


def test_every_curve_is_named() -> None:
    text = curves("int8")
    assert re.findall(r"</span>([^<]+)</li>", text) == ["int8", "other"]


def test_a_template_that_lacks_a_value_is_an_error() -> None:
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        pages.page("curves.html", title="a")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (0, "0 s"),
        (0.0443, "0.044 s"),
        (2.178, "2.2 s"),
        (9.96, "10 s"),
        (59.7, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3599.6, "1 h 0 min"),
        (7380, "2 h 3 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_numbers() -> None:
    assert [number(value) for value in (None, 13319, 1.0, 0.00012345)] == ["–", "13,319", "1.000", "0.0001234"]
    assert [whole(value) for value in (None, 1234.5)] == ["–", "1,234"]
    assert [percent(value) for value in (None, 0.1234)] == ["–", "12.3 %"]


def test_moments() -> None:
    found = [moment(text) for text in (None, "", "2026-01-02T03:04:05+00:00", "yesterday")]
    assert found == ["–", "–", "2026-01-02 03:04", "yesterday"]


def test_keys_break_after_dots_and_are_escaped() -> None:
    assert str(pages.breakable("a.b<c")) == "a.<wbr>b&lt;c"
