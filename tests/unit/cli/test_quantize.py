"""`flashrl quantize` as it is typed, as far as it goes without torch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from flashrl_cli import files
from flashrl_cli.cli.app import main
from tests.unit.quantize.models import QWEN2, hf_model


def flashrl(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["flashrl", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ([], "nothing to do", "--scheme int8 or fp8, or --calibrate PARQUET"),
        (["--scheme", "w4"], "--scheme w4: unknown", "int8 or fp8"),
        (["--scheme", "int8", "--ignore", "up_proj"], "layers to ignore that are not there", "a layer is called "),
        (["--calibrate", "x.parquet", "--alpha", "much"], "--alpha much: neither a number nor auto", "--alpha 0.5"),
        (["--calibrate", "x.parquet"], "there is no file", "`flashrl prepare NAME` writes train.parquet"),
        (
            ["--calibrate", "x.parquet", "--ignore", "a"],
            "--ignore is for --scheme",
            "add --scheme, or leave --ignore out",
        ),
        (["--calibrate", "x.parquet", "--out", "q"], "--out is for --scheme", "add --scheme, or leave --out out"),
        (
            ["--scheme", "int8", "--samples", "4"],
            "--samples is for --calibrate",
            "add --calibrate, or leave --samples out",
        ),
        (["--scheme", "int8", "--alpha", "0.5"], "--alpha is for --calibrate", "add --calibrate, or leave --alpha out"),
        (["--calibrate", "x.parquet", "--profile", "m/config.json"], "", "--profile FILE elsewhere"),
    ],
)  # fmt: skip
def test_bad_input(
    options: list[str],
    error: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    hf_model(tmp_path / "m", QWEN2)
    assert flashrl("quantize", "m", *options, monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: {error}" in err
    assert f"hint: {hint}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "words", [("--scheme", "int8", "--out", "new"), ("--calibrate", "x.parquet", "--profile", "new")]
)
def test_a_second_command_waits_for_the_first(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it looks whether its work is done already."""
    monkeypatch.chdir(tmp_path)
    hf_model(tmp_path / "m", QWEN2)
    inside, held = threading.Event(), threading.Event()

    def first() -> None:
        with files.alone(tmp_path / "new", lambda: None):
            inside.set()
            held.wait(20)

    def waiting(path: Path, told: Callable[[], None]) -> AbstractContextManager[bool]:
        def tell() -> None:
            told()
            (tmp_path / "new").write_text("made by the first")
            held.set()

        return alone(path, tell)

    alone = files.alone
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(20)
    monkeypatch.setattr(files, "alone", waiting)
    assert flashrl("quantize", "m", *words, monkeypatch=monkeypatch) == 2
    thread.join(20)
    err = capsys.readouterr().err
    assert f"another command makes {tmp_path / 'new'}: waiting for it" in err
    assert (tmp_path / "new").read_text() == "made by the first"
