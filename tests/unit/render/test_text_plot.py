"""Panels of curves as text."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.render.figure import Panel, Series, around, even_ticks, text_panels

RISING = Series(label="int8", xs=[1, 2, 3, 4], ys=[0.1, 0.2, 0.3, 0.4], raw=[0.0, 0.3, 0.2, 0.5], starts=[2])
OTHER = Series(label="bf16", xs=[1, 2], ys=[0.3, 0.1])


def panel(*series: Series, title: str = "reward") -> Panel:
    return Panel(title=title, series=series, limits=around(series))


def test_one_panel_below_the_other_in_a_narrow_terminal() -> None:
    lines = text_panels([panel(RISING), panel(OTHER, title="kl")], width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines if line.strip() in {"reward", "kl"}] == ["reward", "kl"]


def test_panels_beside_each_other_in_a_wide_one() -> None:
    lines = text_panels([panel(RISING), panel(OTHER, title="kl")], width=160).splitlines()
    assert max(map(len, lines)) <= 160
    assert [line.split() for line in lines if "reward" in line] == [["reward", "kl"]]


def test_a_terminal_narrower_than_a_panel_is_not_overflown() -> None:
    assert max(map(len, text_panels([panel(RISING)], width=50).splitlines())) <= 50


def test_a_curve_looks_alike_in_every_panel_though_another_is_missing() -> None:
    text = text_panels([panel(RISING, OTHER), panel(OTHER, title="kl")], width=80)
    assert text.splitlines()[0] == "● int8   ○ bf16"
    _, _, second = text.partition("kl")
    assert "○" in second
    assert "●" not in second


def test_one_curve_needs_no_legend() -> None:
    assert "int8" not in text_panels([panel(RISING)], width=80)


def test_raw_values_are_dots_and_later_attempts_a_line() -> None:
    text = text_panels([panel(RISING)], width=80)
    assert "·" in text
    assert "┊" in text
    assert not {"·", "┊"} & set(text_panels([panel(OTHER)], width=80))


def test_colour_is_an_escape_sequence_only_if_asked_for() -> None:
    assert "\x1b[" not in text_panels([panel(RISING, OTHER)], width=80)
    assert "\x1b[" in text_panels([panel(RISING, OTHER)], width=80, colour=True)


@pytest.mark.parametrize(
    "series",
    [
        Series(label="a", xs=[7], ys=[0.5]),
        Series(label="a", xs=[0], ys=[0.0], raw=[0.0]),
        Series(label="a", xs=[1, 2, 3], ys=[1.0, None, 3.0], raw=[1.0, None, 3.0]),
        Series(label="a", xs=[1, 2], ys=[None, 3.0]),
        Series(label="a", xs=[1, 2, 3], ys=[5.0, 5.0, 5.0]),
        Series(label="a", xs=range(1, 5001), ys=[math.sin(x / 99) for x in range(1, 5001)]),
        Series(label="a", xs=[1, 2], ys=[1e-12, 2e-12]),
        Series(label="a", xs=[1, 2], ys=[-1e9, 1e12]),
        Series(label="a", xs=[100000, 100001], ys=[1.0, 2.0]),
    ],
    ids=["one step", "step 0", "a break", "starts broken", "flat", "long", "tiny", "huge", "late"],
)
def test_every_shape_of_a_curve_is_drawn(series: Series, capfd: pytest.CaptureFixture[str]) -> None:
    lines = text_panels([panel(series)], width=80).splitlines()
    assert any("●" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert capfd.readouterr() == ("", ""), "plotext complains by printing"


def test_all_of_few_points_are_marked_and_some_of_many() -> None:
    many = Series(label="a", xs=range(100), ys=[float(x) for x in range(100)])
    assert 10 <= text_panels([panel(many)], width=80).count("●") <= 13
    assert text_panels([panel(RISING)], width=80).count("●") == 4


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(1, 20))
def test_ticks_are_few_even_and_within(first: float, height: float, count: int) -> None:
    last = first + height
    found = even_ticks(first, last, count)
    assert len(found) <= count + 1
    distances = {round((b - a) / height, 6) for a, b in pairwise(found)}
    assert len(distances) <= 1
    slack = 1e-6 * height + 1e-6
    assert all(first - slack <= tick <= last + slack for tick in found)


def test_ticks_of_steps_are_whole() -> None:
    assert even_ticks(1, 3, 7, least=1) == [1, 2, 3]
    assert even_ticks(1, 100, 7, least=1) == [20, 40, 60, 80, 100]
