"""Ray's workers as forks of a server (`plugins.forkserver`), or as usual if it does not answer.

Run as a script, this file replaces Ray's setup_worker.py, which raylets call to start a worker.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashrl_cli import contract

RAY_VERSIONS = ("2.56.", "2.60.")
"""Versions of Ray whose workers are known to start as forks: their setup_worker.py is the same."""
WAIT_S = 120.0
"""Seconds to wait for the server, which answers once its imports are done."""


class NotForked(Exception):
    """The server did not start the process."""


def connect(argv: Sequence[str] | None, fds: Sequence[int]) -> tuple[socket.socket, int]:
    """Ask the server for a process like this one; returns the connection and the new process's id.

    `argv` is a Python script with its arguments, None for a process of multiprocessing; `fds` are its stdout, its
    stderr and others. Raises NotForked.
    """
    name = os.environ.get(contract.ENV_SERVER)
    if not name:
        raise NotForked("there is no server")
    request = json.dumps({"argv": argv, "env": dict(os.environ), "cwd": str(Path.cwd())}).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(WAIT_S)
    try:
        connection.connect(b"\0" + name.encode())
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if int.from_bytes(credentials[4:8], sys.byteorder) != os.getuid():
            raise NotForked("the server belongs to another user")
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], list(fds))
        connection.sendall(request)
        answer = read_answer(connection.recv)
    except (OSError, ValueError) as error:
        connection.close()
        raise NotForked(f"the server does not answer: {error}") from error
    if "pid" not in answer:
        connection.close()
        raise NotForked(str(answer.get("refused")))
    connection.settimeout(None)
    return connection, int(answer["pid"])


def read_answer(receive: Callable[[int], bytes]) -> dict[str, Any]:
    """The server's next answer; `receive(n)` yields up to n bytes of the connection. Raises ValueError if it ended."""
    line = b""
    while not line.endswith(b"\n"):
        received = receive(1)
        if not received:
            raise ValueError("it ended")
        line += received
    answer: dict[str, Any] = json.loads(line)
    return answer


def start_ray_workers_by_fork() -> None:
    """Let a raylet that this process starts call this file in place of Ray's setup_worker.py (idempotent).

    Ray passes the path through its parameter `setup_worker_path`, which `ray.init` leaves unset
    (ray/_private/node.py:158 in 2.60). With another version of Ray nothing is changed.
    """
    import ray._private.parameter

    if not ray.__version__.startswith(RAY_VERSIONS):
        contract.logger().warning("workers of Ray %s start without the fork server", ray.__version__)
        return
    original = ray._private.parameter.RayParams.__init__
    if getattr(original, contract.PATCHED, False):
        return

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - replaces the method
        original(self, *args, **kwargs)
        self.setup_worker_path = self.setup_worker_path or __file__

    setattr(__init__, contract.PATCHED, True)
    ray._private.parameter.RayParams.__init__ = __init__


def ray_command(argv: Sequence[str]) -> tuple[list[str], dict[str, str]] | None:
    """Script and environment of the worker that `argv` asks setup_worker.py for; None for one that is no plain Python.

    `argv` is the script, its arguments, `--serialized-runtime-env-context=JSON` and `--language=NAME` in any order
    (ray/_private/workers/setup_worker.py).
    """
    options = {"--serialized-runtime-env-context": "{}", "--language": ""}
    rest = []
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name in options:
            options[name] = value
        else:
            rest.append(word)
    context = json.loads(options["--serialized-runtime-env-context"] or "{}")
    special = context.get("command_prefix") or context.get("override_worker_entrypoint")
    executable = context.get("py_executable") or sys.executable
    if options["--language"] != "PYTHON" or special or executable != sys.executable or not rest[0].endswith(".py"):
        return None
    return rest, context.get("env_vars") or {}


def main() -> None:
    """Start the Ray worker that the arguments describe: by the server, else as Ray does."""
    before = dict(os.environ)
    try:
        found = ray_command(sys.argv[1:])
        if found is None:
            raise NotForked("not a plain Python worker")
        command, variables = found
        # Ray expands references to other variables (ray/_private/utils.py, update_envs)
        os.environ.update({name: os.path.expandvars(value) for name, value in variables.items()})
        connection, _ = connect(command, [1, 2])
        connection.close()
    except NotForked:
        os.environ.clear()
        os.environ.update(before)
        os.execv(sys.executable, [sys.executable, "-m", "ray._private.workers.setup_worker", *sys.argv[1:]])  # noqa: S606


if __name__ == "__main__":
    sys.path.pop(0)  # this folder's modules would hide others of their names
    main()
