"""Processes as forks of a server that imported their modules, and as usual where a fork would differ."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from flashrl_cli import contract
from flashrl_cli.plugins import forked, forked_engine, forkserver
from flashrl_cli.train import guardian
from flashrl_cli.train.process import Tree

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="sockets of the abstract namespace are Linux'"),
]

TELL = """
import json, os, sys
json.dump({"pid": os.getpid(), "parent": os.getppid(), "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(),
           "word": os.environ.get("FLASHRL_WORD"), "imported": "colorsys" in sys.modules, "main": __name__},
          open("told.new", "w"))
os.rename("told.new", "told")
print("said", flush=True)
print("warned", file=sys.stderr)
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A server that imported `colorsys`, which this process's own programs do not."""
    monkeypatch.setenv(contract.ENV_SERVER, "")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    server = guardian.start_fork_server("colorsys")
    yield server
    server.kill()
    server.communicate()


def ask(argv: list[str], fds: tuple[int, int] = (1, 2)) -> tuple[socket.socket, int]:
    os.environ.pop("PYTEST_CURRENT_TEST", None)  # it changes from the fixture to the test
    return forked.connect(argv, fds)


def told(folder: Path) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not (folder / "told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found: dict[str, Any] = json.loads((folder / "told").read_text(encoding="utf-8"))
    return found


def script(folder: Path, text: str = TELL) -> str:
    (folder / "worker.py").write_text(text, encoding="utf-8")
    return str(folder / "worker.py")


def test_a_script_runs_in_a_fork_as_in_a_new_process(
    server: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHRL_WORD", "yes")
    path = script(tmp_path)
    with Path("output").open("wb") as out, Path("errors").open("wb") as err:
        connection, pid = ask([path, "--flag"], (out.fileno(), err.fileno()))
    found = told(tmp_path)
    assert found == {
        "pid": pid,
        "parent": server.pid,
        "argv": [path, "--flag"],
        "path": str(tmp_path),
        "cwd": str(tmp_path),
        "word": "yes",
        "imported": True,
        "main": "__main__",
    }
    with connection:
        assert forked.read_answer(connection.recv) == {"exit": 0}
    assert Path("output").read_text(encoding="utf-8") == "said\n"
    assert Path("errors").read_text(encoding="utf-8") == "warned\n"


def test_the_exit_of_each_fork_is_reported(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    leaves, _ = ask([script(tmp_path, "import sys; sys.exit(7)")])
    with leaves:
        assert forked.read_answer(leaves.recv) == {"exit": 7}
    waits, pid = ask([script(tmp_path, "import time; time.sleep(60)")])
    os.kill(pid, signal.SIGKILL)
    with waits:
        assert forked.read_answer(waits.recv) == {"exit": -signal.SIGKILL}
    assert not psutil.pid_exists(pid), "not even as a zombie"


def test_another_environment_is_refused(
    server: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    with pytest.raises(forked.NotForked, match="VLLM_LOGGING_LEVEL in its environment"):
        ask([script(tmp_path)])


def test_without_a_server_nothing_is_forked(server: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    server.kill()
    server.wait()
    with pytest.raises(forked.NotForked, match="does not answer"):
        ask(["worker.py"])
    monkeypatch.delenv(contract.ENV_SERVER)
    with pytest.raises(forked.NotForked, match="no server"):
        ask(["worker.py"])


def test_the_server_ends_with_its_guardian(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    assert server.wait(60) == 0


def test_a_command_finds_the_server_that_its_guardian_starts_and_ends(tmp_path: Path) -> None:
    text = f"import os, sys; print(os.environ['{contract.ENV_SERVER}']); sys.exit(3)"
    env = {**os.environ, contract.ENV_FORK: "1", contract.ENV_PLATFORM: "cpu"}
    tree = Tree([sys.executable, script(tmp_path, text)], env=env, cwd=tmp_path, log=tmp_path / "log")
    while (code := tree.poll()) is None:
        time.sleep(0.02)
    assert code == 3
    assert "flashrl-" in (tmp_path / "log").read_text(encoding="utf-8")
    assert tree.processes() == []
    tree.kill()


def test_a_client_that_sends_nothing_sensible_harms_nobody(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(b"\0" + os.environ[contract.ENV_SERVER].encode())
        stranger.sendall(b"\0\0\0\2{}")
        assert stranger.recv(100) == b""
    connection, _ = ask([script(tmp_path, "")])
    with connection:
        assert forked.read_answer(connection.recv) == {"exit": 0}


RESPOND = """
import os, sys
def respond(pipe, lock):
    with lock:
        pipe.send((os.getpid(), os.getppid(), "colorsys" in sys.modules))
    sys.exit(pipe.recv())
"""


@pytest.fixture
def respond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that both processes can import: it sends what it is, and exits with the code that it receives."""
    (tmp_path / "responding.py").write_text(RESPOND, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("responding").respond


def in_a_process(respond: Any) -> tuple[Any, Any]:
    """The process, and what it says of itself."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    context = forked_engine.Context()
    ours, theirs = context.Pipe()
    lock = context.Lock()
    process = context.Process(target=respond, args=(theirs, lock), daemon=True)
    process.start()
    theirs.close()
    found = ours.recv()
    assert process.is_alive()
    ours.send(3)
    process.join(60)
    assert process.exitcode == 3
    return process, found


def test_processes_of_multiprocessing_are_forks(server: subprocess.Popen[bytes], respond: Any) -> None:
    process, found = in_a_process(respond)
    assert found == (process.pid, server.pid, True)


def test_processes_of_multiprocessing_start_without_a_server(respond: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(contract.ENV_SERVER, raising=False)
    process, found = in_a_process(respond)
    assert found == (process.pid, os.getpid(), False)


def test_what_a_raylet_calls() -> None:
    context = json.dumps({"env_vars": {"A": "1"}, "py_executable": sys.executable})
    words = ["default_worker.py", "--node-id=1", f"--serialized-runtime-env-context={context}", "--language=PYTHON"]
    assert forked.ray_command(words) == (["default_worker.py", "--node-id=1"], {"A": "1"})
    assert forked.ray_command([*words[:-1], "--language=JAVA"]) is None
    assert forked.ray_command(["-S", *words]) is None
    profiled = json.dumps({"command_prefix": ["nsys", "profile"]})
    assert forked.ray_command(["w.py", f"--serialized-runtime-env-context={profiled}", "--language=PYTHON"]) is None


def test_variables_that_differ_at_run_time_only_are_allowed() -> None:
    before = {"PATH": "/bin", "VLLM_A": "1"}
    imports = forkserver.Imports(before, before | {"SET": "1", "VLLM_A": "3"})
    assert imports.added() == {"SET": "1"}
    assert imports.refusal(before | {"RANK": "0", "RAY_JOB_ID": "1", "SET": "1"}) is None
    assert imports.refusal(before | {"VLLM_A": "3"}) is None, "as the import left it"
    assert imports.refusal(before | {"VLLM_A": "2", "SET": "2"}) == "SET, VLLM_A in its environment"
    assert imports.refusal(before | {"OMP_NUM_THREADS": "2"}) is None, "set again in the fork"
    assert imports.refusal(before | {"OMP_PLACES": "2"}) == "OMP_PLACES in its environment"
    assert imports.refusal({"PATH": "/bin"}) == "VLLM_A in its environment"


@pytest.mark.parametrize(("answer", "initialized"), [(forkserver.NOT_INITIALIZED, False), (0, True), (100, True)])
def test_a_module_that_initializes_cuda_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, answer: int, initialized: bool
) -> None:
    driver = SimpleNamespace(cuDeviceGetCount=lambda _count: answer)
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver if name == forkserver.CUDA_DRIVER else None)
    monkeypatch.setattr(forkserver, "ray_is_seeded", lambda: False)  # another test may have drawn from Ray here
    assert forkserver.cuda_is_initialized() is initialized
    if initialized:
        with pytest.raises(SystemExit, match="importing colorsys initializes CUDA"):
            forkserver.preload(("colorsys",))
    else:
        forkserver.preload(("colorsys",))


def test_without_a_driver_cuda_is_not_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "CUDA_DRIVER", "libabsent.so.1")
    assert not forkserver.cuda_is_initialized()
