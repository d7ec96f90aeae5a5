"""Data on stdout, talk on stderr, and nothing but data for a program."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

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


class Guarded:
    """A child whose streams are guarded: what it wrote, and how it ended."""

    def __init__(self, code: str, **options: Any) -> None:
        start = "import sys; from flashrl_cli.render.output import *; guard_streams(); o = Output()\n"
        argv = [sys.executable, "-c", (start + code).encode("ascii", "backslashreplace").decode()]
        done: subprocess.CompletedProcess[Any] = subprocess.run(
            argv, check=False, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        )
        self.code = int(done.returncode)
        self.out: bytes = done.stdout or b""
        self.err: bytes = done.stderr or b""


def variables(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | changes


PROSE = (
    "o.text('… → ✓ é ж a/\\udcff'); o.say('quantized → é'); o.table(['a'], [['—'], ['x' * 300]]); "
    "o.document({'p': 'é\\udcff'})"
)
ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "utf-8"},
    {"PYTHONIOENCODING": "ascii:strict", "PYTHONUNBUFFERED": "1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.processes
@pytest.mark.parametrize("changes", ENCODINGS, ids=str)
def test_an_encoding_that_lacks_characters_ends_nothing(changes: dict[str, str]) -> None:
    """Plain lines, talk, tables and JSON; bytes of a file name that are no text stay what they are."""
    done = Guarded(PROSE, env=variables(**changes))
    assert (done.code, b"Traceback" in done.err) == (0, False)
    line = done.out.splitlines()[0]
    assert line.endswith(b" a/\xff")
    assert line.startswith(
        "… → ✓ é ж".encode() if changes.get("PYTHONIOENCODING") == "utf-8" else (b"... -> + ", b"\x85 -> + ")
    )
    assert json.loads(done.out[done.out.rindex(b"{") :]) == {"p": "é\udcff"}
    assert done.out[done.out.rindex(b"{") :].isascii()


@pytest.mark.processes
@pytest.mark.parametrize(("closed", "left"), [("1>&-", "err"), ("2>&-", "out"), ("1>&- 2>&-", "")])
def test_a_closed_stream_is_nowhere_and_never_a_file_of_ours(closed: str, left: str, tmp_path: Path) -> None:
    code = (
        f"f = open({str(tmp_path / 'f')!r}, 'w'); o.text('data'); o.say('talk'); print('more'); "
        "f.write('mine'); f.close()"
    )
    start = "from flashrl_cli.render.output import *; guard_streams(); o = Output()\n"
    words = shlex.join([sys.executable, "-c", start + code])
    done = subprocess.run(["sh", "-c", f"{words} {closed}"], check=False, capture_output=True)
    assert done.returncode == 0
    assert (tmp_path / "f").read_text(encoding="utf-8") == "mine"
    assert (bool(done.stdout), bool(done.stderr)) == (left == "out", left == "err")


@pytest.mark.processes
def test_a_reader_that_goes_away_ends_no_work(tmp_path: Path) -> None:
    """stdout and stderr into a pipe that nobody reads: prints, tables, a progress bar, an error; the work goes on to
    its end.
    """
    mark = tmp_path / "done"
    work = (
        "import time\n"
        "for n in range(3): o.json_line({'n': n}); o.say('x'); o.table(['a'], [['—']]); print('y', flush=True)\n"
        "with o.progress('work', 3) as advance: advance(1)\n"
        f"open({str(mark)!r}, 'w').write('done'); print_error(InputError('e')); "
        "raise SystemExit(lost_result() is not None)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = Guarded("from flashrl_cli.errors import InputError\n" + work, stdout=writing, stderr=writing)
    assert (done.code, mark.read_text(encoding="utf-8")) == (0, "done")
    watching = "end_when_unread()\nwhile True: o.json_line({}); o.say('x')"
    assert Guarded(watching, stdout=writing, stderr=writing, timeout=60).code == 0
    os.close(writing)


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_loses_a_result_only_with_an_error() -> None:
    """A result that is lost is an error (exit 3), after the work; talk that is lost is none; an exit code of the work's
    own stays.
    """
    program = [sys.executable, "-m", "flashrl_cli"]
    with Path("/dev/full").open("wb") as full:
        for words in (["--version"], ["--help"], ["presets", "ls"], ["presets", "show", "tiny", "--json"]):
            done = subprocess.run([*program, *words], check=False, stdout=full, stderr=subprocess.PIPE)
            assert (done.returncode, b"could not be written to stdout" in done.stderr) == (3, True)
            assert b"Traceback" not in done.stderr
            assert b"Exception ignored" not in done.stderr
        assert (
            subprocess.run([*program, "presets", "show", "no"], check=False, stdout=full, stderr=full).returncode == 2
        )
        assert (
            Guarded("o.text('data'); o.say('talk'); raise SystemExit(lost_result() is not None)", stderr=full).code == 0
        )
