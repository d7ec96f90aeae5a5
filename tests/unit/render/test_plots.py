"""Curves as text and as PNG."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.render import figure
from flashrl_cli.runs.curves import Curve

RISING = figure.Series(label="int8", xs=[0, 5, 10], ys=[0.2, 0.4, 0.6], los=[0.15, 0.33, 0.52], his=[0.26, 0.47, 0.68])
OTHER = figure.Series(label="bf16", xs=[0, 10], ys=[0.2, 0.5], los=[0.15, 0.42], his=[0.26, 0.58])


def test_limits_are_tenths_around_all_intervals() -> None:
    assert figure.limits([RISING, OTHER]) == pytest.approx((0.1, 0.7))
    flat = figure.Series(label="", xs=[0], ys=[0.0], los=[0.0], his=[0.0])
    assert figure.limits([flat]) == pytest.approx((0.0, 0.1))


def test_ticks_are_steps_and_few() -> None:
    assert figure.ticks([RISING, OTHER]) == [0, 5, 10]
    many = figure.Series(label="", xs=range(0, 200, 5), ys=[], los=[], his=[])
    assert figure.ticks([many]) == list(range(0, 200, 20))


def test_limits_around_curves_have_room_and_are_never_empty() -> None:
    curve = figure.Series(label="", xs=[1, 2, 3], ys=[1.0, None, 2.0], raw=[0.0, None, 4.0])
    assert figure.around([curve]) == pytest.approx((-0.24, 4.24))
    for value in (0.0, 5.0, -5.0):
        lower, upper = figure.around([figure.Series(label="", xs=[1], ys=[value])])
        assert lower < value < upper


def test_span_holds_all_steps_and_is_never_empty() -> None:
    panel = figure.Panel(title="", series=[RISING, OTHER], limits=(0, 1))
    assert figure.span([panel]) == (0, 10)
    lone = figure.Panel(title="", series=[figure.Series(label="", xs=[4], ys=[1.0])], limits=(0, 1))
    assert figure.span([lone]) == (3, 5)


def test_segments_are_what_lies_between_breaks() -> None:
    curve = figure.Series(label="", xs=[1, 2, 3, 4, 5], ys=[None, 1.0, 2.0, None, 3.0])
    assert list(curve.segments()) == [([2, 3], [1.0, 2.0]), ([5], [3.0])]


def test_panels_of_curves_hold_smoothed_values_over_their_own() -> None:
    noisy = Curve(run="r", metric="kl", steps=(1, 2), values=(0.0, 1.0), starts=(1,))
    rare = Curve(run="r", metric="accuracy", steps=(0, 5), values=(0.2, 0.4), every_step=False)
    kl, accuracy = figure.panels({"kl": [noisy], "accuracy": [rare]}, 0.5)
    assert kl.title == "KL of rollout against trainer (nats a token)"
    assert kl.series[0].ys == pytest.approx([0, 2 / 3])
    assert (kl.series[0].raw, kl.series[0].starts) == ((0.0, 1.0), (1,))
    assert accuracy.title == "accuracy"
    assert (accuracy.series[0].ys, accuracy.series[0].raw) == ([0.2, 0.4], ())


def test_unsmoothed_curves_are_drawn_once() -> None:
    (panel,) = figure.panels({"kl": [Curve(run="r", metric="kl", steps=(1, 2), values=(0.0, 1.0))]}, 0)
    assert panel.series[0].raw == ()


def test_text_curve_rises_from_left_to_right() -> None:
    lines = figure.text_curve([RISING], ylabel="accuracy").splitlines()
    assert "accuracy" in lines[0]
    assert "step" in lines[-1]
    columns = [line.index("●") for line in lines if "●" in line]
    assert len(columns) == 3
    assert columns == sorted(columns, reverse=True), "the last step is the highest"
    assert "int8" not in "".join(lines), "one curve needs no legend"
    assert "\x1b" not in "".join(lines)


def test_several_curves_have_a_legend_and_marks_of_their_own() -> None:
    text = figure.text_curve([RISING, OTHER], ylabel="accuracy")
    assert "● int8" in text
    assert "○ bf16" in text


def test_curves_without_intervals(tmp_path: Path) -> None:
    plain = figure.Series(label="reward", xs=[1, 2, 3], ys=[-0.52, 0.1, 1.31])
    assert figure.text_curve([plain], ylabel="reward").count("●") == 3
    figure.write_evaluation_png([plain], tmp_path / "reward.png", ylabel="reward")
    assert (tmp_path / "reward.png").is_file()


def test_of_a_long_curve_few_points_are_marked() -> None:
    many = figure.Series(label="", xs=range(1000), ys=[x / 1000 for x in range(1000)])
    assert 10 <= figure.text_curve([many], ylabel="reward").count("●") <= 25


def test_png(tmp_path: Path) -> None:
    figure.write_evaluation_png([RISING, OTHER], tmp_path / "eval.png", ylabel="accuracy")
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["eval.png"]


def test_missing_package_is_told() -> None:
    assert not figure.installed("no_such_plotting_package")
    with pytest.raises(EnvironmentNotReady, match="no_such_plotting_package is not installed"):
        figure.require("no_such_plotting_package")
