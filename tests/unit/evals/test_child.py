"""The engine process is heard, its failure told, and its end certain; a small script stands in for it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashrl_cli import contract
from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.evals import job as child
from flashrl_cli.evals.job import EngineSettings, Job, Order, Sampling
from flashrl_cli.weights import Weights

pytestmark = pytest.mark.processes


@pytest.fixture
def job(tmp_path: Path) -> Job:
    engine = EngineSettings(rollout="int8")
    return Job(start=Path("/hf"), quantized=None, work=tmp_path, data_sets=1, sampling=Sampling(), engine=engine)


ORDER = Order(weights=Weights(hf=Path("/hf"), shards=(Path("/a.pt"),)), data=0, answers=Path("/x.jsonl"), answered=(3,))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(child, "ENGINE", "fake_engine")
    return tmp_path / "fake_engine.py"


def write(engine: Path, script: str) -> None:
    engine.write_text("import json, os, sys, time\n" + textwrap.dedent(script), encoding="utf-8")


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_job_and_order_come_back_as_they_were_written(job: Job) -> None:
    job.write(job.work / "job.json")
    assert Job.read(job.work / "job.json") == job
    adapted = Weights(hf=Path("/hf"), adapter=Path("/lora"), base=Path("/base"))
    for order in (ORDER, replace(ORDER, weights=adapted, answered=())):
        assert Order.parse(order.line()) == order


def fulfil(job: Job, *, devices: str | None = None) -> list[dict[str, Any]]:
    with child.engine(job, job.work / "log", devices) as running:
        return list(running.fulfil(ORDER))


def test_orders_go_in_and_events_come_out(engine: Path, job: Job) -> None:
    write(
        engine,
        f"""
        job = json.load(open(sys.argv[1]))
        for line in sys.stdin:
            order = json.loads(line)
            names = ("{contract.ENV_PLUGIN_DIR}", "CUDA_VISIBLE_DEVICES")
            print(json.dumps({{"event": "stage", "order": order, "env": [os.environ.get(n) for n in names]}}), flush=True)
            print(json.dumps({{"event": "done", "seconds": 1}}), flush=True)
        """,
    )
    with child.engine(job, job.work / "log", "2,3") as running:
        for _ in range(2):
            first, last = running.fulfil(ORDER)
            assert first["order"] == json.loads(ORDER.line())
            assert first["env"] == [str(job.work), "2,3"]
            assert last == {"event": "done", "seconds": 1}


def test_error_of_the_engine_is_raised_here(engine: Path, job: Job) -> None:
    event = {"event": "error", "kind": "EnvironmentNotReady", "message": "no", "hint": "yes"}
    write(engine, f"print(json.dumps({event}), flush=True)")
    with pytest.raises(EnvironmentNotReady, match="no") as caught:
        fulfil(job)
    assert caught.value.hint == "yes"


def test_crash_tells_why(engine: Path, job: Job) -> None:
    write(engine, 'raise ValueError("no such thing")')
    with pytest.raises(RunFailed, match="ValueError: no such thing") as caught:
        fulfil(job)
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
    with child.engine(job, job.work / "log") as running:
        pids = next(running.fulfil(ORDER))["pids"]
    assert all(gone(pid) for pid in pids)


def test_killed_command_line_takes_the_engine_along(engine: Path, job: Job) -> None:
    write(
        engine,
        """
        import queue, threading
        from flashrl_cli.worker.server import _listen
        threading.Thread(target=_listen, args=(queue.SimpleQueue(),), daemon=True).start()
        print(json.dumps({"event": "stage", "pid": os.getpid()}), flush=True)
        time.sleep(60)
        """,
    )
    job.write(job.work / "given.json")
    parent = f"""
        from pathlib import Path
        from flashrl_cli.evals import job
        from flashrl_cli.evals.job import Job, Order
        job.ENGINE = "fake_engine"
        with job.engine(Job.read(Path({str(job.work / "given.json")!r})), Path({str(job.work / "log")!r})) as running:
            for event in running.fulfil(Order.parse({ORDER.line()!r})):
                print(event["pid"], flush=True)
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.kill()
    assert gone(pid)
