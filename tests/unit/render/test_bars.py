"""Groups of bars as a PNG."""

from __future__ import annotations

from pathlib import Path

from flashrl_cli.render.figure import write_bars_png


def test_bars_of_any_shape_are_drawn(tmp_path: Path) -> None:
    speeds = {"bf16": {64: [1.0, 2.0, 3.0], 256: [9.0]}, "int8": {256: [12.0, 13.0]}, "fp8": {}}
    write_bars_png(speeds, tmp_path / "deep" / "a.png", about="tiny, a CPU")
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]
