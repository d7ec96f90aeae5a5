"""Errors carry their fix and end with their exit code."""

from __future__ import annotations

import sys

import pytest

from flashrl_cli.cli import app
from flashrl_cli.errors import (
    EnvironmentNotReady,
    ExitCode,
    FlashrlError,
    InputError,
    NothingMatched,
    Problem,
    RunFailed,
)

CODES = {FlashrlError: 1, RunFailed: 1, InputError: 2, EnvironmentNotReady: 3, NothingMatched: 4}


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
    with pytest.raises(kind):
        app.main()


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "app", interrupt)
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 130


def test_other_exceptions_are_bugs_and_stay_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "app", lambda words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        app.main()


@pytest.mark.parametrize("words", [["--version"], ["-h"]])
def test_plain_use_ends_with_0(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["flashrl", *words])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert not caught.value.code


def test_problems_are_kept_in_order_and_frozen() -> None:
    error = InputError("what", problems=[Problem("b"), Problem("a", "x:1", "fix")])
    assert [problem.message for problem in error.problems] == ["b", "a"]
    assert (str(error), error.hint) == ("what", None)
    with pytest.raises(AttributeError):
        error.problems[0].message = "c"  # type: ignore[misc]
