"""Everything that a command starts is found and ended, wherever it hides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flashrl_cli.train.process import Tree

pytestmark = pytest.mark.processes

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


def test_environment_folder_and_both_outputs(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    script = (
        'print(os.environ["WORD"], os.getcwd(), flush=True); print("oh", file=sys.stderr); print(sys.stdin.read())\n'
    )
    tree = start(tmp_path, script + "sys.exit(3)", WORD="yes")
    assert ended(tree) == 3
    assert (tmp_path / "log").read_text().split("\n")[:3] == ["before", f"yes {tmp_path}", "oh"]
    tree.kill()


def test_a_daemon_of_its_own_session_is_found_and_ended(tmp_path: Path) -> None:
    tree = start(tmp_path, DAEMON)
    pid = int(appears(tmp_path / "daemon"))
    assert ended(tree) == 0
    assert pid in [process.pid for process in tree.processes()]
    assert os.getsid(pid) != os.getsid(0)
    tree.kill()
    assert not psutil.pid_exists(pid), "not even as a zombie"
    assert tree.processes() == []


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


@pytest.mark.parametrize("grace_s", [0.0, 0.2])
def test_kill_ends_what_ignores_sigterm(grace_s: float, tmp_path: Path) -> None:
    tree = start(tmp_path, 'signal.signal(signal.SIGTERM, signal.SIG_IGN); open("ready", "w").close(); time.sleep(120)')
    appears(tmp_path / "ready")
    tree.kill(grace_s=grace_s)
    assert tree.poll() == -9
    assert not psutil.pid_exists(tree.pid)


def test_what_ran_before_is_spared(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "120"]) as other:
        try:
            tree = start(tmp_path, "time.sleep(120)")
            assert other.pid not in [process.pid for process in tree.processes()]
            tree.kill()
            assert other.poll() is None
        finally:
            other.kill()


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


@LINUX
def test_everything_is_ended_when_the_guardian_is_killed(tmp_path: Path) -> None:
    tree = start(tmp_path, DAEMON + "time.sleep(120)")
    daemon = int(appears(tmp_path / "daemon"))
    psutil.Process(tree.pid).kill()
    assert ended(tree) == -9
    tree.kill()
    assert gone(daemon)
    assert tree.processes() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_command_ended_by_a_signal_says_so(number: signal.Signals, tmp_path: Path) -> None:
    tree = start(tmp_path, f"os.kill(os.getpid(), {int(number)})")
    assert ended(tree) == -number
    tree.kill()


def test_no_pipe_is_left_open(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    tree = start(tmp_path, "")
    ended(tree)
    tree.kill()
    tree.kill()
    assert psutil.Process().num_fds() == before
