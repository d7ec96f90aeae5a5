"""Data on stdout, talk on stderr, and nothing but data for a program."""

from __future__ import annotations

import io
import json

import pytest

from flashrl_cli.errors import InputError, Problem
from flashrl_cli.render.output import Output, is_live, print_error


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("switch", ["CI", "FLASHRL_NO_PROGRESS"])
def test_is_live(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_live(Terminal())
    assert not is_live(io.StringIO())
    monkeypatch.setenv(switch, "1")
    assert not is_live(Terminal())


def test_a_program_gets_no_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    assert Output().live
    assert not Output(json_mode=True).live


def test_document_and_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    Output().document({"a": "é", "b": [1]})
    Output().json_line({"a": "é\n", "b": None})
    out, err = capsys.readouterr()
    assert err == ""
    *document, line = out.splitlines()
    assert json.loads("\n".join(document)) == {"a": "é", "b": [1]}
    assert line == '{"a": "é\\n", "b": null}'


def test_talk_goes_to_stderr_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.say("[bold]" + "long " * 60 + "1.5")
    output.warn("look")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["[bold]" + "long " * 60 + "1.5", "warning: look"]


def test_text_and_table_go_to_stdout_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.text("[red]as it is")
    output.table(["name", "rows"], [["a", 1234]], title="T")
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert out.startswith("[red]as it is\n")
    assert "1,234" in out


def test_progress_off_a_terminal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress("counting", 10) as advance:
        advance(5)
    assert capsys.readouterr() == ("", "counting …\n")


def test_error_with_every_problem_and_hint(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [Problem("no", "a.yaml:3", "yes"), Problem("bad")]
    print_error(InputError("2 problems", hint="read on", problems=problems))
    print_error(InputError("alone"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: 2 problems\n  a.yaml:3: no\n    hint: yes\n  bad\nhint: read on\nerror: alone\n"
