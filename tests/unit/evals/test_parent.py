"""The working process's side: lines of stdin become orders, nothing but events is on stdout, and it ends with its parent or an error."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes


def run(script: str, given: str) -> subprocess.CompletedProcess[str]:
    """A process, a group of its own, whose stdin closes after `given`."""
    text = "from flashrl_cli.evals import parent\norders, emit = parent.begin()\n" + textwrap.dedent(script)
    command = [sys.executable, "-c", text]
    return subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=60, check=False, start_new_session=True
    )


def test_orders_come_line_by_line_and_the_end_of_stdin_ends_the_process() -> None:
    ended = run(
        """
        import time
        print("a library's words")
        for _ in range(2):
            emit("got", text=orders.get())
        time.sleep(60)
        """,
        "first\nsecond, " + "long " * 20_000 + "\n",
    )
    assert ended.returncode == -9
    assert ended.stdout.splitlines()[0] == '{"event": "got", "text": "first"}'
    assert len(ended.stdout.splitlines()) == 2
    assert "a library's words" in ended.stderr or not ended.stderr


def test_a_traceback_is_told_though_a_library_has_replaced_stderr(tmp_path: Path) -> None:
    """As torch.distributed does once a process group is there (torch/distributed/distributed_c10d.py, `_distributed_excepthook`)."""
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import io, sys
                from flashrl_cli.evals import parent
                parent.begin()
                ours = sys.excepthook

                def hook(*error):
                    sys.stderr = io.StringIO()
                    ours(*error)

                sys.excepthook = hook
                raise ValueError("what happened")
                """
            ),
        ],
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert "what happened" in ended.stderr
