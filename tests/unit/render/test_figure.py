"""Panels as PNG and as SVG for a page."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from flashrl_cli.render import figure
from flashrl_cli.render.figure import CURVES, VARIABLES, Panel, Series, around, inline_svgs, styles, thinned, write_png

RISING = Series(label="int8", xs=[1, 2, 3, 4], ys=[0.1, 0.2, None, 0.4], raw=[0.0, 0.3, None, 0.5], starts=[2])
OTHER = Series(label="bf16", xs=[1, 2], ys=[0.3, 0.1])


def panel(*series: Series, title: str = "reward") -> Panel:
    return Panel(title=title, series=series, limits=around(series))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_png_of_any_number_of_panels(count: int, tmp_path: Path) -> None:
    write_png([panel(RISING, OTHER)] * count, tmp_path / "deep" / "a.png")
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_a_label_looks_the_same_in_all_panels_and_unlike_others() -> None:
    many = [Series(label=f"run {n}", xs=[1], ys=[1.0]) for n in range(20)]
    looks = styles([panel(many[3]), panel(*many)])
    assert looks["run 3"] == (CURVES[0], "-")
    assert len(set(looks.values())) == 20


def svgs(*panels: Panel, prefix: str = "c") -> list[str]:
    return list(inline_svgs(panels, prefix))


def test_ids_of_all_svgs_differ_and_references_meet_them() -> None:
    found = [*svgs(panel(RISING), panel(OTHER)), *svgs(panel(RISING), prefix="d")]
    ids = [one for svg in found for one in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    references = [one for svg in found for one in re.findall(r'(?:href="|url\()#([^")]+)', svg)]
    assert references
    assert set(references) <= set(ids)


def test_an_svg_is_an_element_without_addresses_styles_or_scripts() -> None:
    (svg,) = svgs(panel(RISING))
    assert svg.startswith('<svg viewBox="0 0 ')
    assert not re.search(r"https?:|<style|<script|<!|<\?|xmlns", svg)
    ET.fromstring(svg.replace("xlink:href", "href"))


def test_text_stays_text_in_the_pages_font_and_colours() -> None:
    (svg,) = svgs(panel(RISING))
    assert ">step</text>" in svg
    assert "font-family" not in svg
    assert "var(--curve-1)" in svg
    assert not re.search("|".join(VARIABLES), svg)
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set()


def test_the_title_is_the_label_of_the_picture_and_escaped() -> None:
    (svg,) = svgs(panel(RISING, title='<script>"x"'))
    assert 'aria-label="&lt;script&gt;&quot;x&quot;"' in svg


def test_the_same_curves_give_the_same_svg() -> None:
    assert svgs(panel(RISING)) == svgs(panel(RISING))


def test_many_steps_stay_small_and_keep_their_extremes() -> None:
    xs = list(range(1, 20001))
    ys: list[float | None] = [math.sin(x / 500) for x in xs]
    ys[7777] = 9.0
    ys[9999] = None
    thin_xs, thin_ys = thinned(xs, ys)
    assert len(thin_xs) < 2 * figure._MOST
    assert thin_xs == sorted(thin_xs)
    assert 9.0 in thin_ys
    assert sum(math.isnan(y) for y in thin_ys) == 1
    (svg,) = svgs(panel(Series(label="a", xs=xs, ys=ys, raw=ys)))
    assert len(svg) < 60_000


def test_few_steps_are_all_drawn() -> None:
    assert thinned([1, 2], [0.5, 0.25]) == ([1, 2], [0.5, 0.25])


def test_a_point_between_breaks_is_seen() -> None:
    assert figure._isolated([1.0, math.nan, 2.0, math.nan, 3.0, 4.0]) == [0, 2]
    assert figure._isolated([5.0]) == [0]


def test_a_flat_curve_and_a_lone_point_are_drawn_without_a_warning(tmp_path: Path) -> None:
    flat, lone = Series(label="a", xs=[1, 2], ys=[0.0, 0.0]), Series(label="b", xs=[5], ys=[1.0])
    write_png([panel(flat), panel(lone)], tmp_path / "a.png")
    assert len(svgs(panel(flat), panel(lone))) == 2
