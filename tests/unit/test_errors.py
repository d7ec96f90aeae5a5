"""Errors carry their fix and end with their exit code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from flashrl_cli.cli import app
from flashrl_cli.errors import (
    BelowThreshold,
    EnvironmentNotReady,
    ExitCode,
    FlashrlError,
    InputError,
    Location,
    NothingMatched,
    Problem,
    RunFailed,
    exit_code_of,
)
from flashrl_cli.signals import Interrupted

CODES = {FlashrlError: 1, RunFailed: 1, InputError: 2, EnvironmentNotReady: 3, NothingMatched: 4, BelowThreshold: 5}
DISK_HINT = "hint: correct the disk, the path or its permissions; FLASHRL_DEBUG=1 shows what was done with it\n"
README = Path(__file__).parents[2] / "README.md"


def test_exit_codes_are_what_scripts_rely_on() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "ENVIRONMENT": 3,
        "NO_MATCH": 4,
        "THRESHOLD": 5,
        "INTERNAL": 70,
        "INTERRUPTED": 130,
        "TERMINATED": 143,
    }


@pytest.mark.parametrize("kind", CODES)
def test_error_ends_the_command_with_its_code(
    kind: type[FlashrlError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_words: list[str]) -> None:
        raise kind("what", hint="fix", problems=[Problem("one", "a:1")])

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == CODES[kind]
    assert capsys.readouterr().err == "error: what\n  a:1: one\nhint: fix\n"
    monkeypatch.setenv("FLASHRL_DEBUG", "1")
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == CODES[kind], "a traceback changes no exit code"
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith(f"{kind.__name__}: what\n")


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError: division by zero\n"),
        (OSError(28, "No space left on device", "/x"), 3, "FLASHRL_DEBUG=1 shows what was done with it\n"),
        (OSError(28, "No space left on device"), 3, f"error: No space left on device\n{DISK_HINT}"),
        (OSError(39, "Directory not empty", ".a/tmp", None, "a"), 3, f"error: a: Directory not empty\n{DISK_HINT}"),
        (ConnectionError("refused"), 70, "ConnectionError: refused\n"),
    ],
)
def test_other_exceptions(
    error: BaseException,
    code: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C is silent, a disk's error has a hint, and a bug stays visible."""

    def fail(_words: list[str]) -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback") is (code == 70)
    assert err.endswith(printed)
    assert bool(err) is bool(printed)


@pytest.mark.parametrize(
    ("location", "text"),
    [
        (Location("p.yaml"), "p.yaml"),
        (Location("p.yaml", 3), "p.yaml:3"),
        (Location("p.yaml", 3).at(None), "p.yaml"),
        (Location("a.parquet", 3, unit="row"), "a.parquet:row 3"),
        (Location("--tis"), "--tis"),
        (Location("--set", key="rollout.n"), "--set rollout.n"),
    ],
)
def test_a_location_as_text(location: Location, text: str) -> None:
    assert str(location) == text
    assert Problem("m", location, "h").document() == {"message": "m", "where": text, "hint": "h"}


def test_the_readme_lists_every_exit_code() -> None:
    text = README.read_text(encoding="utf-8").partition("Exit codes: ")[2].partition("\n\n")[0]
    listed = {
        int(code)
        for codes in re.findall(r"(?:^|· )(\d+(?:/\d+)*)", text.replace("\n", " "))
        for code in codes.split("/")
    }
    assert listed == set(map(int, ExitCode))


def test_every_exit_code_has_an_error_or_an_end() -> None:
    """No code is documented that nothing raises."""
    raised = {kind.exit_code for kind in CODES}
    ended = [KeyboardInterrupt(), Interrupted(15, "fix"), OSError(2, "gone", "/x"), ZeroDivisionError()]
    assert {ExitCode.OK, *raised, *map(exit_code_of, ended)} == set(ExitCode)


@pytest.mark.parametrize("words", [["--version"], ["-h"]])
def test_plain_use_ends_with_0(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["flashrl", *words])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert not caught.value.code
