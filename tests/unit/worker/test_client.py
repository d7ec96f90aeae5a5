"""A worker gets its job and orders, its events and failures come back, and its end is certain; small scripts stand in
for engines."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from flashrl_cli import contract
from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.worker import client
from flashrl_cli.worker.client import Worker

JOB = {"start": "/hf"}
ORDER = {"data": 0}
Start = Callable[..., AbstractContextManager[Worker]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`start(script, devices)`: a worker that is this script."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(script: str, devices: str | None = None) -> AbstractContextManager[Worker]:
        (tmp_path / "fake.py").write_text("import json, os, sys, time\n" + textwrap.dedent(script), encoding="utf-8")
        env = client.environment(tmp_path, devices, {"FIXED": "1"}, {"USUAL": "1", "PYTHONPATH": "not this"})
        return client.worker("fake", JOB, tmp_path, tmp_path / "log", env, who="the engine", hints={})

    return start


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.processes
def test_job_and_orders_go_in_and_events_come_out(start: Start, tmp_path: Path) -> None:
    names = [contract.ENV_PLUGIN_DIR, "CUDA_VISIBLE_DEVICES", "FIXED", "USUAL", "HF_HUB_OFFLINE"]
    script = f"""
        job = json.load(open(sys.argv[1]))
        for line in sys.stdin:
            seen = {{"job": job, "order": json.loads(line), "env": [os.environ.get(n) for n in {names}]}}
            print(json.dumps({{"event": "stage", **seen}}), flush=True)
            print(json.dumps({{"event": "done", "seconds": 1}}), flush=True)
        """
    with start(script, "2,3") as running:
        for _ in range(2):
            first, last = running.ask(ORDER)
            assert (first["job"], first["order"]) == (JOB, ORDER)
            assert first["env"] == [str(tmp_path), "2,3", "1", "1", "1"]
            assert last == {"event": "done", "seconds": 1}


@pytest.mark.processes
def test_files_of_the_working_folder_are_no_modules(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "colorsys.py").write_text("raise SystemExit('not this one')", encoding="utf-8")
    monkeypatch.chdir(folder)
    script = """
        import colorsys
        for line in sys.stdin:
            print(json.dumps({"event": "done", "black": colorsys.rgb_to_hls(0, 0, 0)}), flush=True)
        """
    with start(script) as running:
        assert list(running.ask(ORDER)) == [{"event": "done", "black": [0.0, 0.0, 0.0]}]


@pytest.mark.processes
def test_an_error_of_the_worker_is_raised_here(start: Start) -> None:
    event = {"event": "error", "kind": "EnvironmentNotReady", "message": "no", "hint": "yes"}
    with start(f"print(json.dumps({event}), flush=True)") as running, pytest.raises(EnvironmentNotReady) as caught:
        list(running.ask(ORDER))
    assert (caught.value.message, caught.value.hint) == ("no", "yes")


@pytest.mark.processes
def test_a_crash_is_raised_with_its_cause(start: Start, tmp_path: Path) -> None:
    with start('raise ValueError("no such thing")') as running, pytest.raises(RunFailed) as caught:
        list(running.ask(ORDER))
    assert "the engine ended with code 1: ValueError: no such thing" in caught.value.message
    assert str(tmp_path / "log") in str(caught.value.hint)


BUSY = """
    import subprocess
    helper = subprocess.Popen(["sleep", "60"])
    print(json.dumps({"event": "stage", "pids": [os.getpid(), helper.pid]}), flush=True)
    time.sleep(60)
    """


@pytest.mark.processes
def test_leaving_ends_the_worker_and_what_it_started(start: Start) -> None:
    with start(BUSY) as running:
        pids = next(running.ask(ORDER))["pids"]
    assert all(gone(pid) for pid in pids)


@pytest.mark.processes
def test_an_order_may_have_a_limit_of_time(start: Start) -> None:
    with start(BUSY) as running:
        events: Iterator[dict[str, list[int]]] = running.ask(ORDER, limit_s=5)
        pids = next(events)["pids"]
        with pytest.raises(RunFailed, match="the engine was not done within 5 s"):
            next(events)
        assert all(gone(pid) for pid in pids)


@pytest.mark.processes
def test_a_killed_command_line_takes_the_worker_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = (
        "from flashrl_cli.worker import server\norders, emit = server.begin()\n"
        "emit('stage', pid=__import__('os').getpid())\n"
    )
    (tmp_path / "fake.py").write_text(f"{script}next(orders)\nnext(orders)\n")
    parent = f"""
        import os
        from pathlib import Path
        from flashrl_cli.worker import client
        work = Path({str(tmp_path)!r})
        with client.worker("fake", {{}}, work, work / "log", dict(os.environ), who="", hints={{}}) as running:
            for event in running.ask({{}}):
                print(event["pid"], flush=True)
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
    assert gone(pid)


OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"
TRACEBACK = """Traceback (most recent call last):
  File "/x/site-packages/flashrl_cli/evals/engine.py", line 7, in load
    raise ValueError("so and so")
ValueError: so and so
"""


@pytest.mark.parametrize(
    ("log", "hints", "message", "hint"),
    [
        (
            f"starting\n{OUT_OF_MEMORY}",
            {"gpu-memory": "less"},
            "E died: a GPU ran out of memory",
            "less; ",
        ),
        (OUT_OF_MEMORY, {}, "E ended with code -9", "its whole log: "),
        (TRACEBACK, {}, "E ended with code -9: ValueError: so and so (flashrl_cli/evals/engine.py:7)", ""),
        ("last words\n", {}, "E ended with code -9:\n  last words", ""),
        ("", {}, "E ended with code -9, its log is empty", ""),
        (None, {}, "E ended with code -9, its log is empty", ""),
    ],
)
def test_the_end_of_a_log_says_why_a_worker_died(
    tmp_path: Path, log: str | None, hints: dict[str, str], message: str, hint: str
) -> None:
    file = tmp_path / "engine.log"
    if log is not None:
        file.write_text(log)
    error = client.died(-9, file, who="E", hints=hints)
    assert error.message.startswith(message)
    assert str(error.hint).startswith(hint)
    assert str(error.hint).endswith(str(file))
