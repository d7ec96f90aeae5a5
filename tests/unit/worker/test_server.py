"""The worker's side: lines of stdin become orders, nothing but events is on stdout, and it ends with its parent or an
error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashrl_cli.worker import protocol

pytestmark = pytest.mark.processes

IMPORTS = "import io, multiprocessing, sys, time\nfrom flashrl_cli.worker import server\n"
BEGIN = f"{IMPORTS}orders, emit = server.begin()\n"
ENOUGH_S = 120
"""For an end that comes at once; what must not be waited for takes twice as long."""


@contextlib.contextmanager
def process(script: str, errors: Path, *, begin: str = BEGIN) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs `script` after its beginning, in a group of its own that ends with the test."""
    command = [sys.executable, "-c", begin + script]
    pipe = subprocess.PIPE
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, start_new_session=True) as running,
    ):
        try:
            yield running
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def test_orders_come_line_by_line_and_the_end_of_stdin_ends_the_process(tmp_path: Path) -> None:
    script = (
        "print('words of a library', flush=True)\nfor _ in '12': emit('got', size=len(next(orders)['a']))\n"
        "time.sleep(60)"
    )
    with process(script, tmp_path / "log") as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b'{"a": "first"}\n{"a": "' + b"long" * 50_000 + b'"}\n')
        running.stdin.flush()
        assert running.stdout.readline() == b'{"event": "got", "size": 5}\n'
        assert running.stdout.readline() == b'{"event": "got", "size": 200000}\n'
        running.stdin.close()
        assert running.wait(ENOUGH_S) == -signal.SIGKILL
        assert (tmp_path / "log").read_text() == "words of a library\n"


@pytest.mark.parametrize(
    ("ending", "events", "code"),
    [
        ("return", [], 0),
        (
            "raise InputError('no', hint='yes')",
            [{"event": "error", "kind": "InputError", "message": "no", "hint": "yes"}],
            1,
        ),
        ("raise Unreadable('torn')", [{"event": "error", "kind": "RunFailed", "message": "torn", "hint": None}], 1),
    ],
)
def test_a_job_is_served_and_an_error_of_the_users_is_an_event(
    tmp_path: Path, ending: str, events: list[dict[str, str]], code: int
) -> None:
    job = protocol.write_job(tmp_path, {"a": 1})
    script = (
        "from flashrl_cli.errors import InputError\n"
        "from flashrl_cli.weights import Unreadable\n"
        f"sys.argv = ['', {str(job)!r}]\n"
        "def serve(job, orders, emit):\n"
        "    emit('got', job=job, order=next(orders))\n"
        f"    {ending}\n"
        "server.run(serve)\n"
        "emit('never')\n"
    )
    with process(script, tmp_path / "log", begin=IMPORTS) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b'{"b": 2}\n')
        running.stdin.flush()
        found = [json.loads(line) for line in running.stdout]
        assert found == [{"event": "got", "job": {"a": 1}, "order": {"b": 2}}, *events]
        assert running.wait(ENOUGH_S) == code


def test_the_end_is_heard_though_a_forked_process_lives_on(tmp_path: Path) -> None:
    script = (
        "fork = multiprocessing.get_context('fork')\n"
        "fork.Process(target=time.sleep, args=(600,), daemon=True).start()\n"
        "emit('begun')\n"
        "raise ValueError"
    )
    with process(script, tmp_path / "log") as running:
        began = time.monotonic()
        assert running.stdout is not None
        assert running.stdout.read() == b'{"event": "begun"}\n'
        assert time.monotonic() - began < ENOUGH_S


def test_a_traceback_is_logged_though_a_library_has_replaced_stderr(tmp_path: Path) -> None:
    """As torch.distributed does once a process group is there (torch/distributed/distributed_c10d.py,
    `_distributed_excepthook`)."""
    script = (
        "ours = sys.excepthook\n"
        "def hook(*error):\n"
        "    sys.stderr = io.StringIO()\n"
        "    ours(*error)\n"
        "sys.excepthook = hook\n"
        "raise ValueError('what happened')"
    )
    with process(script, tmp_path / "log") as running:
        assert running.wait(ENOUGH_S) == 1
    assert "ValueError: what happened" in (tmp_path / "log").read_text()
