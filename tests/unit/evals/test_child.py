"""The engine process is heard, its failure told, and its end certain; a small script stands in for it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from flashrl_cli import contract
from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.evals import child
from flashrl_cli.evals.job import Job, Sampling, Target

pytestmark = pytest.mark.processes


@pytest.fixture
def job(tmp_path: Path) -> Job:
    target = Target(index=0, hf="/hf", shards=("/a.pt",))
    return Job(targets=(target,), work=tmp_path, sampling=Sampling(), rollout="int8", max_model_len=None)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(child, "ENGINE", "fake_engine")
    return tmp_path / "fake_engine.py"


def write(engine: Path, script: str) -> None:
    engine.write_text("import json, os, sys, time\n" + textwrap.dedent(script))


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_job_comes_back_as_it_was_written(job: Job) -> None:
    job.write(job.work / "job.json")
    assert Job.read(job.work / "job.json") == job


def test_events_and_environment_arrive(engine: Path, job: Job) -> None:
    write(
        engine,
        f"""
        job = json.load(open(sys.argv[1]))
        print(json.dumps({{"event": "stage", "text": job["rollout"]}}), flush=True)
        print(json.dumps({{"event": "stage", "text": os.environ["{contract.ENV_PLUGIN_DIR}"]}}), flush=True)
        """,
    )
    assert [e["text"] for e in child.events(job, job.work / "log")] == ["int8", str(job.work)]


def test_error_of_the_engine_is_raised_here(engine: Path, job: Job) -> None:
    event = {"event": "error", "kind": "EnvironmentNotReady", "message": "no", "hint": "yes"}
    write(engine, f"print(json.dumps({event}), flush=True)")
    with pytest.raises(EnvironmentNotReady, match="no") as caught:
        list(child.events(job, job.work / "log"))
    assert caught.value.hint == "yes"


def test_crash_shows_the_end_of_the_log(engine: Path, job: Job) -> None:
    write(engine, 'raise ValueError("out of memory")')
    with pytest.raises(RunFailed, match="ValueError: out of memory") as caught:
        list(child.events(job, job.work / "log"))
    assert str(job.work / "log") in str(caught.value.hint)


def test_leaving_ends_the_engine_and_what_it_started(engine: Path, job: Job) -> None:
    write(
        engine,
        """
        import subprocess
        helper = subprocess.Popen(["sleep", "60"])
        print(json.dumps({"event": "stage", "pids": [os.getpid(), helper.pid]}), flush=True)
        time.sleep(60)
        """,
    )
    events = child.events(job, job.work / "log")
    pids = next(events)["pids"]
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert all(gone(pid) for pid in pids)


def test_killed_command_line_takes_the_engine_along(engine: Path, job: Job) -> None:
    write(
        engine,
        """
        import threading
        from flashrl_cli.evals.engine import _end_with_parent
        threading.Thread(target=_end_with_parent, daemon=True).start()
        print(json.dumps({"event": "stage", "pid": os.getpid()}), flush=True)
        time.sleep(60)
        """,
    )
    job.write(job.work / "given.json")
    parent = f"""
        from pathlib import Path
        from flashrl_cli.evals import child
        from flashrl_cli.evals.job import Job
        child.ENGINE = "fake_engine"
        for event in child.events(Job.read(Path({str(job.work / "given.json")!r})), Path({str(job.work / "log")!r})):
            print(event["pid"], flush=True)
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
    assert gone(pid)
