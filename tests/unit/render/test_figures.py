"""Curves as panels, and panels as text, as PNG, as SVG and as pages that stand alone."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.plugins.log_ratios import Sample
from flashrl_cli.render import figure, html
from flashrl_cli.render.figure import CURVES, VARIABLES, Panel, Series, inline_svgs, styles, thinned, write_png
from flashrl_cli.render.html import curves_page, duration, moment, number, percent, whole
from flashrl_cli.render.text_plot import even_ticks, text_panel, text_panels
from flashrl_cli.runs.curves import Curve
from flashrl_cli.runs.replay import replay

RISING = Series(label="int8", xs=[1, 2, 3, 4], ys=[0.1, 0.2, None, 0.4], raw=[0.0, 0.3, None, 0.5], starts=[2])
OTHER = Series(label="bf16", xs=[1, 2], ys=[0.3, 0.1])
MEASURED = Series(label="int8", xs=[0, 5, 10], ys=[0.2, 0.4, 0.6], los=[0.15, 0.33, 0.52], his=[0.26, 0.47, 0.68])
SPARSE = Series(label="bf16", xs=[0, 10], ys=[0.2, 0.5], los=[0.15, 0.42], his=[0.26, 0.58])


def panel(*series: Series, title: str = "reward") -> Panel:
    return figure.panel(series, title)


def svgs(*panels: Panel, prefix: str = "c") -> list[str]:
    return list(inline_svgs(panels, prefix))


def test_curves_with_intervals_have_limits_of_tenths_and_few_ticks() -> None:
    found = panel(MEASURED, SPARSE)
    assert found.limits == pytest.approx((0.1, 0.7))
    assert found.ticks == [0, 5, 10]
    many = Series(label="", xs=range(0, 200, 5), ys=[0.0] * 40, los=[0.0] * 40, his=[0.0] * 40)
    assert panel(many).limits == pytest.approx((0.0, 0.1))
    assert panel(many).ticks == list(range(0, 200, 20))


def test_limits_around_other_curves_have_room_and_are_never_empty() -> None:
    curve = Series(label="", xs=[1, 2, 3], ys=[1.0, None, 2.0], raw=[0.0, None, 4.0])
    assert panel(curve).limits == pytest.approx((-0.24, 4.24))
    assert panel(curve).ticks is None
    for value in (0.0, 5.0, -5.0):
        lower, upper = panel(Series(label="", xs=[1], ys=[value])).limits
        assert lower < value < upper


def test_span_holds_all_steps_and_is_never_empty() -> None:
    assert figure.span([panel(MEASURED, SPARSE)]) == (0, 10)
    assert figure.span([panel(Series(label="", xs=[4], ys=[1.0]))]) == (3, 5)


def test_panels_of_curves_hold_smoothed_values_over_their_own() -> None:
    noisy = Curve(run="r", metric="kl", steps=(1, 2), values=(0.0, 1.0), starts=(1,))
    rare = Curve(run="r", metric="accuracy", steps=(0, 5), values=(0.2, 0.4), every_step=False)
    kl, accuracy = figure.panels({"kl": [noisy], "accuracy": [rare]}, 0.5)
    assert kl.title == "KL of rollout against trainer (nats a token)"
    assert kl.series[0].ys == pytest.approx([0, 2 / 3])
    assert (kl.series[0].raw, kl.series[0].starts) == ((0.0, 1.0), (1,))
    assert accuracy.title == "accuracy"
    assert (accuracy.series[0].ys, accuracy.series[0].raw) == ([0.2, 0.4], ())
    (unsmoothed,) = figure.panels({"kl": [noisy]}, 0)
    assert unsmoothed.series[0].raw == ()


def test_a_label_looks_the_same_in_all_panels_and_unlike_others() -> None:
    many = [Series(label=f"run {n}", xs=[1], ys=[1.0]) for n in range(20)]
    looks = styles([panel(many[3]), panel(*many)])
    assert looks["run 3"] == (CURVES[0], "-")
    assert len(set(looks.values())) == 20


def test_a_missing_package_is_an_error() -> None:
    assert not figure.installed("no_such_plotting_package")
    with pytest.raises(EnvironmentNotReady, match="no_such_plotting_package is not installed"):
        figure.require("no_such_plotting_package")


# text


def test_one_panel_as_text_rises_from_left_to_right() -> None:
    lines = text_panel(panel(MEASURED, title="accuracy")).splitlines()
    assert "accuracy" in lines[0]
    assert "step" in lines[-1]
    columns = [line.index("●") for line in lines if "●" in line]
    assert len(columns) == 3
    assert columns == sorted(columns, reverse=True), "the last step is the highest"
    assert "int8" not in "".join(lines), "one curve needs no legend"
    assert "\x1b" not in "".join(lines)
    both = text_panel(panel(MEASURED, SPARSE))
    assert "● int8" in both
    assert "○ bf16" in both


@pytest.mark.parametrize(
    ("width", "titles"), [(80, [["reward"], ["kl"]]), (160, [["reward", "kl"]]), (50, [["reward"], ["kl"]])]
)
def test_panels_are_beside_each_other_where_there_is_room(width: int, titles: list[list[str]]) -> None:
    lines = text_panels([panel(RISING), panel(OTHER, title="kl")], width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split() for line in lines if {"reward", "kl"} & set(line.split())] == titles


def test_a_curve_looks_alike_in_every_panel_though_another_is_missing() -> None:
    text = text_panels([panel(RISING, OTHER), panel(OTHER, title="kl")], width=80)
    assert text.splitlines()[0] == "● int8   ○ bf16"
    _, _, second = text.partition("kl")
    assert "○" in second
    assert "●" not in second
    assert "int8" not in text_panels([panel(RISING)], width=80), "one curve needs no legend"


def test_raw_values_are_dots_and_later_attempts_a_line() -> None:
    assert {"·", "┊"} <= set(text_panels([panel(RISING)], width=80))
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
def test_every_shape_of_a_curve_is_drawn(series: Series, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = text_panels([panel(series)], width=80).splitlines()
    assert any("●" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert capfd.readouterr() == ("", ""), "plotext complains by printing"
    write_png([panel(series)], tmp_path / "a.png")
    assert len(svgs(panel(series), panel(OTHER))) == 2


def test_all_of_few_points_are_marked_and_some_of_many() -> None:
    few = Series(label="a", xs=[1, 2, 3, 4], ys=[0.1, 0.2, 0.3, 0.4])
    many = Series(label="a", xs=range(100), ys=[float(x) for x in range(100)])
    assert text_panels([panel(few)], width=80).count("●") == 4
    assert [svg.count("<use") for svg in svgs(panel(few), panel(many))] == [4, 0]
    assert 10 <= text_panels([panel(many)], width=80).count("●") <= 13


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


# PNG and SVG


@pytest.mark.parametrize("panels", [[panel(RISING, OTHER)] * count for count in (1, 2, 3)] + [[panel(MEASURED)]])
def test_png_of_any_number_of_panels(panels: list[Panel], tmp_path: Path) -> None:
    write_png(panels, tmp_path / "deep" / "a.png")
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_bars_of_any_shape_are_drawn(tmp_path: Path) -> None:
    speeds = {"bf16": {64: [1.0, 2.0, 3.0], 256: [9.0]}, "int8": {256: [12.0, 13.0]}, "fp8": {}}
    figure.write_bars_png(speeds, tmp_path / "deep" / "a.png", about="tiny, a CPU")
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")


def spot(name: str, kl: float, beaten_by: str | None, *values: float) -> dict[str, object]:
    """A point of a front, as its document has it."""
    speed = sorted(values)[len(values) // 2]
    return {"rollout": name, "tokens_s": speed, "values": values, "kl": kl, "kl_error": kl, "beaten_by": beaten_by}


@pytest.mark.parametrize("count", [1, 4])
def test_fronts_of_any_number_are_drawn(count: int, tmp_path: Path) -> None:
    """A KL of 0 and an error as large as the KL have a place on a logarithmic axis, too."""
    points = [spot("bf16", 0.0, None, 1.0), spot("int8", 0.01, None, 2.0, 3.0, 4.0), spot("fp8", 0.02, "int8", 2.0)]
    fronts = {f"{number} sequences": {"points": points[: 2 + number % 2]} for number in range(count)}
    figure.write_fronts_png(fronts, tmp_path / "deep" / "a.png", about="tiny, a CPU")
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_ids_of_all_svgs_differ_and_references_meet_them() -> None:
    found = [*svgs(panel(RISING), panel(OTHER)), *svgs(panel(RISING), prefix="d")]
    ids = [one for svg in found for one in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    references = [one for svg in found for one in re.findall(r'(?:href="|url\()#([^")]+)', svg)]
    assert references
    assert set(references) <= set(ids)


def test_an_svg_is_an_element_in_the_pages_font_and_colours() -> None:
    (svg,) = svgs(panel(RISING, title='<script>"x"'))
    assert svg.startswith('<svg viewBox="0 0 ')
    assert not re.search(r"https?:|<style|<script|<!|<\?|xmlns|font-family", svg)
    ET.fromstring(svg.replace("xlink:href", "href"))
    assert ">step</text>" in svg
    assert "var(--curve-1)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set()
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
    assert thinned([1, 2], [0.5, 0.25]) == ([1, 2], [0.5, 0.25]), "few steps are all drawn"


def test_a_point_between_breaks_is_marked() -> None:
    assert figure._isolated([1.0, math.nan, 2.0, math.nan, 3.0, 4.0]) == [0, 2]
    assert figure._isolated([5.0]) == [0]


# pages


def page(label: str) -> str:
    series = [Series(label=label, xs=[1, 2], ys=[0.0, 1.0]), Series(label="other", xs=[1], ys=[1.0])]
    return curves_page([Panel(title="<b>reward", series=series, limits=(0, 1))], note="thin & bold")


def test_a_page_loads_nothing_and_names_every_curve_and_colour() -> None:
    text = page("int8")
    assert not re.search(r"https?://|<link|<script|@import|\bsrc=|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert re.findall(r"</span>([^<]+)</li>", text) == ["int8", "other"]
    for variable in VARIABLES.values():
        assert len(re.findall(rf"{variable}: #[0-9a-f]{{6}};", text)) == 2, "for light and for dark"


def place(rank: int, model: str, accuracy: float, behind: dict[str, object] | None) -> dict[str, object]:
    numbers = {"accuracy": accuracy, "lo": accuracy - 0.1, "hi": accuracy + 0.1, "mean_length": 14.5, "cut_share": 0.5}
    return {"rank": rank, "model": model, "pass_at": {}, **numbers, "behind": behind}


def board(*names: str) -> dict[str, object]:
    """The last model is worse by more than chance."""
    places = [
        place(
            rank,
            name,
            0.9 - 0.1 * rank,
            None if rank == 1 else {"value": 0.1, "lo": -0.1, "hi": 0.2, "adjusted": 0.04, "significant": rank > 2},
        )
        for rank, name in enumerate(names, 1)
    ]
    return {"dataset": "gsm8k", "places": places}


def test_a_page_of_several_models_marks_those_that_are_worse() -> None:
    settings = {"sampling": {"n": 1, "stop": []}, "prompting": {"system": "<b>", "arguments": {}}, "rollout": "bf16"}
    document = {"leaderboard": [board("a", "b", "<c>")], "verdicts": ["b & a"], **settings}
    text = html.leaderboard_page(document)
    assert re.findall(r'<td class="num">(\d)</td><th>([^<]+)</th>', text) == [
        ("1", "a"),
        ("2", "b"),
        ("3", "&lt;c&gt;"),
    ]
    assert re.findall(r'class="(ink-\d)" style="left: ([\d.]+)%', text) == [
        ("ink-1", "70.0"),
        ("ink-1", "60.0"),
        ("ink-0", "50.0"),
    ]
    assert text.count("p = 0.040") == 2
    assert "b &amp; a" in text
    assert "&lt;b&gt;" in text
    assert not re.search(r"https?://|<link|<script|@import|\bsrc=", text)


def test_a_picture_of_several_models(tmp_path: Path) -> None:
    file = tmp_path / "leaderboard.png"
    figure.write_ranking_png([board("a", "b", "c"), board("a", "b")], file)
    from matplotlib.image import imread

    pixels = imread(file)[..., :3]
    for colour in (CURVES[0], figure.MUTED):
        wanted = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
        assert (abs(pixels - wanted).max(axis=-1) < 0.02).sum() > 100


def test_everything_in_a_page_is_escaped() -> None:
    text = page('<script>alert("x")</script>')
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>" not in text
    assert "thin &amp; bold" in text
    assert str(html.breakable("a.b<c")) == "a.<wbr>b&lt;c"


def test_a_template_that_lacks_a_value_is_an_error() -> None:
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        html.page("curves.html", title="a")


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
def test_durations_in_a_page(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_numbers_and_times_in_a_page() -> None:
    assert [number(value) for value in (None, 13319, 1.0, 0.00012345)] == ["–", "13,319", "1.000", "0.0001234"]
    assert [whole(value) for value in (None, 1234.5)] == ["–", "1,234"]
    assert [percent(value) for value in (None, 0.1234)] == ["–", "12.3 %"]
    found = [moment(text) for text in (None, "", "2026-01-02T03:04:05+00:00", "yesterday")]
    assert found == ["–", "–", "2026-01-02 03:04", "yesterday"]


def replay_of(*responses: list[float]) -> list[Panel]:
    """Panels of kept responses with these log-ratios of their tokens."""
    sample = Sample(
        step=1,
        responses=9,
        log_ratios=np.concatenate(responses).astype(np.float16),
        lengths=np.array([len(one) for one in responses], np.int32),
        advantages=np.ones(len(responses), np.float32),
    )
    return figure.replayed(replay([sample], None))


@pytest.mark.parametrize(
    "panels",
    [
        replay_of([0.0]),
        replay_of([0.0, 0.0], [0.0]),
        replay_of([9.0, -9.0], [100.0]),
        replay_of(*([0.01 * n, -0.02, 0.0] * 30 for n in range(20))),
    ],
    ids=["one token", "no mismatch", "far apart", "many"],
)
def test_kept_log_ratios_are_drawn(panels: list[Panel], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = text_panels(panels, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert " %┤" in text
    assert {"nats", "token of the response"} <= {line.strip() for line in text.splitlines()}
    assert capfd.readouterr() == ("", ""), "plotext complains by printing"
    write_png(panels, tmp_path / "a.png")
    assert len(svgs(*panels)) == 3
