"""Curves as text and as PNG."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.render import plots

RISING = plots.Series(label="int8", xs=[0, 5, 10], ys=[0.2, 0.4, 0.6], los=[0.15, 0.33, 0.52], his=[0.26, 0.47, 0.68])
OTHER = plots.Series(label="bf16", xs=[0, 10], ys=[0.2, 0.5], los=[0.15, 0.42], his=[0.26, 0.58])


def test_limits_are_tenths_around_all_intervals() -> None:
    assert plots.limits([RISING, OTHER]) == pytest.approx((0.1, 0.7))
    flat = plots.Series(label="", xs=[0], ys=[0.0], los=[0.0], his=[0.0])
    assert plots.limits([flat]) == pytest.approx((0.0, 0.1))


def test_ticks_are_steps_and_few() -> None:
    assert plots.ticks([RISING, OTHER]) == [0, 5, 10]
    many = plots.Series(label="", xs=range(0, 200, 5), ys=[], los=[], his=[])
    assert plots.ticks([many]) == list(range(0, 200, 20))


def test_text_curve_rises_from_left_to_right() -> None:
    lines = plots.text_curve([RISING], ylabel="accuracy").splitlines()
    assert "accuracy" in lines[0]
    assert "step" in lines[-1]
    columns = [line.index("●") for line in lines if "●" in line]
    assert len(columns) == 3
    assert columns == sorted(columns, reverse=True), "the last step is the highest"
    assert "int8" not in "".join(lines), "one curve needs no legend"
    assert "\x1b" not in "".join(lines)


def test_several_curves_have_a_legend_and_marks_of_their_own() -> None:
    text = plots.text_curve([RISING, OTHER], ylabel="accuracy")
    assert "● int8" in text
    assert "○ bf16" in text


def test_curves_without_intervals(tmp_path: Path) -> None:
    plain = plots.Series(label="reward", xs=[1, 2, 3], ys=[-0.52, 0.1, 1.31])
    assert plots.limits([plain]) == pytest.approx((-0.6, 1.4))
    assert plots.text_curve([plain], ylabel="reward").count("●") == 3
    plots.write_png([plain], tmp_path / "reward.png", ylabel="reward")
    assert (tmp_path / "reward.png").is_file()


def test_of_a_long_curve_few_points_are_marked() -> None:
    many = plots.Series(label="", xs=range(1000), ys=[x / 1000 for x in range(1000)])
    assert 10 <= plots.text_curve([many], ylabel="reward").count("●") <= 25


def test_png(tmp_path: Path) -> None:
    plots.write_png([RISING, OTHER], tmp_path / "eval.png", ylabel="accuracy")
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["eval.png"]


def test_missing_package_is_told() -> None:
    assert not plots.installed("no_such_plotting_package")
    with pytest.raises(EnvironmentNotReady, match="no_such_plotting_package is not installed"):
        plots.require("no_such_plotting_package")
