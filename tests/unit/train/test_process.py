"""Everything that a command starts is found and ended, wherever it hides; signals end a command in order, unless ignored."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flashrl_cli.errors import ExitCode
from flashrl_cli.train.process import Interrupted, Tree, collected, raised, say_if_ignored
from tests.conftest import starting_with

WAIT = "import os, signal, sys, time\n"
DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("daemon.new", "w").write(str(os.getpid()))
        os.rename("daemon.new", "daemon")
        time.sleep(120)
    os._exit(0)
os.wait()
"""


def start(folder: Path, script: str, **env: str) -> Tree:
    file = folder / "command.py"
    file.write_text(WAIT + script)
    return Tree([sys.executable, str(file)], env={**os.environ, **env}, cwd=folder, log=folder / "log")


def appears(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)
    return path.read_text(encoding="utf-8")


def ended(tree: Tree) -> int:
    while (code := tree.poll()) is None:
        time.sleep(0.02)
    return code


@pytest.mark.processes
def test_environment_folder_and_both_outputs(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    script = (
        'print(os.environ["WORD"], os.getcwd(), flush=True); print("oh", file=sys.stderr); print(sys.stdin.read())\n'
    )
    tree = start(tmp_path, script + "sys.exit(3)", WORD="yes")
    assert ended(tree) == 3
    assert (tmp_path / "log").read_text().split("\n")[:3] == ["before", f"yes {tmp_path}", "oh"]
    tree.kill()


@pytest.mark.processes
def test_a_daemon_of_its_own_session_is_found_and_ended(tmp_path: Path) -> None:
    tree = start(tmp_path, DAEMON)
    pid = int(appears(tmp_path / "daemon"))
    assert ended(tree) == 0
    assert pid in [process.pid for process in tree.processes()]
    assert os.getsid(pid) != os.getsid(0)
    tree.kill()
    assert not psutil.pid_exists(pid), "not even as a zombie"
    assert tree.processes() == []


@pytest.mark.processes
def test_kill_is_gentle_first_when_there_is_time(tmp_path: Path) -> None:
    script = """
def bye(*_):
    open("asked", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, bye)
open("ready", "w").close()
time.sleep(120)
"""
    tree = start(tmp_path, script)
    appears(tmp_path / "ready")
    tree.kill(grace_s=60)
    assert (tmp_path / "asked").exists()
    assert tree.poll() == 0


@pytest.mark.processes
@pytest.mark.parametrize("grace_s", [0.0, 0.2])
def test_kill_ends_what_ignores_sigterm(grace_s: float, tmp_path: Path) -> None:
    tree = start(tmp_path, 'signal.signal(signal.SIGTERM, signal.SIG_IGN); open("ready", "w").close(); time.sleep(120)')
    appears(tmp_path / "ready")
    tree.kill(grace_s=grace_s)
    assert tree.poll() == -9
    assert not psutil.pid_exists(tree.pid)


@pytest.mark.processes
def test_what_ran_before_is_spared(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "120"]) as other:
        try:
            tree = start(tmp_path, "time.sleep(120)")
            assert other.pid not in [process.pid for process in tree.processes()]
            tree.kill()
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.processes
def test_terminating_what_has_ended_is_no_error(tmp_path: Path) -> None:
    tree = start(tmp_path, "")
    ended(tree)
    tree.terminate()
    tree.kill()
    assert tree.poll() == 0


LAUNCHER = """
import os, sys, time
from pathlib import Path
from flashrl_cli.train.process import Tree
tree = Tree([sys.executable, "command.py"], env=os.environ, cwd=Path.cwd(), log=Path("log"))
open("guardian.new", "w").write(str(tree.pid))
os.rename("guardian.new", "guardian")
time.sleep(120)
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux")


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.processes
@LINUX
@pytest.mark.parametrize("stubborn", [False, True], ids=["gentle", "ignores-TERM"])
def test_everything_ends_with_a_launcher_that_is_killed(stubborn: bool, tmp_path: Path) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    (tmp_path / "command.py").write_text(f"{WAIT}{ignore}{DAEMON}time.sleep(120)")
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=tmp_path) as launcher:
        daemon, guardian = int(appears(tmp_path / "daemon")), int(appears(tmp_path / "guardian"))
        launcher.kill()
    assert gone(guardian)
    assert gone(daemon)


@pytest.mark.processes
@LINUX
def test_everything_is_ended_when_the_guardian_is_killed(tmp_path: Path) -> None:
    tree = start(tmp_path, DAEMON + "time.sleep(120)")
    daemon = int(appears(tmp_path / "daemon"))
    psutil.Process(tree.pid).kill()
    assert ended(tree) == -9
    tree.kill()
    assert gone(daemon)
    assert tree.processes() == []


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_command_ended_by_a_signal_says_so(number: signal.Signals, tmp_path: Path) -> None:
    tree = start(tmp_path, f"os.kill(os.getpid(), {int(number)})")
    assert ended(tree) == -number
    tree.kill()


@pytest.mark.processes
def test_no_pipe_is_left_open(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    tree = start(tmp_path, "")
    ended(tree)
    tree.kill()
    tree.kill()
    assert psutil.Process().num_fds() == before


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
IGNORED = [(), (INT,), (HUP,), (INT, HUP), (INT, TERM, HUP)]
"""By an interactive shell, in the background of a script, by nohup, by both, and by whoever ignores what nobody should."""


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
    """Each fails right after it, for want of its input. A dry run, a listing and help are over at once, and say nothing."""
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
