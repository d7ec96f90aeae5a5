"""Signals end a command in order, but for those that whoever started it had ignored."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashrl_cli.errors import ExitCode
from flashrl_cli.signals import Interrupted, collected, raised, say_if_ignored
from tests.conftest import starting_with

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
IGNORED = [(), (INT,), (HUP,), (INT, HUP), (INT, TERM, HUP)]
"""By an interactive shell, a script's background, nohup, both, and by whoever ignores what nobody should."""


@pytest.mark.parametrize("ignored", IGNORED)
def test_int_and_hup_stay_ignored_and_term_never_is(ignored: tuple[signal.Signals, ...]) -> None:
    with starting_with(signal.SIG_DFL, INT, HUP), starting_with(signal.SIG_IGN, *ignored):
        before = {number: signal.getsignal(number) for number in (INT, TERM, HUP)}
        with collected() as received:
            for number in (INT, HUP, TERM):
                os.kill(os.getpid(), number)
        assert received == [number for number in (INT, HUP, TERM) if number == TERM or number not in ignored]
        assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143), (HUP, 143)])
def test_each_raises_with_its_exit_code(number: signal.Signals, code: int) -> None:
    with starting_with(signal.SIG_DFL, INT, HUP), pytest.raises(Interrupted) as caught, raised("go on", pytest.fail):
        os.kill(os.getpid(), number)
    assert (caught.value.exit_code, caught.value.hint) == (ExitCode(code), "go on")


@pytest.mark.parametrize("number", [INT, HUP])
def test_an_ignored_one_raises_nothing(number: signal.Signals) -> None:
    said: list[str] = []
    with starting_with(signal.SIG_IGN, number), raised("go on", said.append):
        os.kill(os.getpid(), number)
    assert len(said) == (number == INT)


@pytest.mark.parametrize("ignored", IGNORED)
def test_it_is_said_that_ctrl_c_has_no_effect(ignored: tuple[signal.Signals, ...]) -> None:
    said: list[str] = []
    with starting_with(signal.SIG_DFL, INT, HUP), starting_with(signal.SIG_IGN, *ignored):
        say_if_ignored(said.append)
    assert len(said) == (INT in ignored)
    assert all(f"Ctrl-C will not stop it, `kill {os.getpid()}` will" in line for line in said)


@pytest.mark.processes
@pytest.mark.parametrize("background", [False, True])
def test_long_commands_say_it_in_the_background_of_a_script(background: bool, tmp_path: Path) -> None:
    """Each fails right after it, for want of its input. A dry run, a listing and help are over at once: no word."""
    long = [
        "train --preset nothing", "eval nothing", "bench --model nothing", "quantize nothing --scheme int8",
        "prepare gsm8k --source nothing", "runs watch nothing", "doctor --quant --docker",
    ]  # fmt: skip
    commands = [*long, "train --preset nothing --dry-run", "runs ls", "eval --help"]
    flashrl = f"{shlex.quote(sys.executable)} -m flashrl_cli"
    lines = [
        f"{flashrl} {words} {f'2> {number} &' * background or f'2> {number}'}" for number, words in enumerate(commands)
    ]
    (tmp_path / "script").write_text("\n".join([*lines, "wait", ""]))
    with starting_with(signal.SIG_DFL, INT, HUP):
        subprocess.run(["sh", "script"], cwd=tmp_path, stdout=subprocess.DEVNULL, check=True, timeout=300)
    said = [(tmp_path / str(number)).read_text() for number in range(len(commands))]
    warned = ["Ctrl-C will not stop it" in text for text in said]
    assert warned == [background and words in long for words in commands], said
    assert all("error:" in text and "Traceback" not in text for text in said[: len(long)]), said
