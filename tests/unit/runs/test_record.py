"""A run's record survives what happens to runs: later attempts, two writers, a dead process, a damaged file."""

from __future__ import annotations

import dataclasses
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from flashrl_cli.errors import InputError
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.store import Attempt, Phase, RunRecord


def attempt(number: int = 1, **fields: object) -> Attempt:
    given = {"status": "running", "started": store.now(), "updated": "then", **store.own_process(), **fields}
    return Attempt(number=number, **given)


def a_record(*attempts: Attempt) -> RunRecord:
    return RunRecord(name="r", project="p", preset="tiny", created="now", checkpoints="/c/p/r", attempts=attempts)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths("r", tmp_path / "runs" / "r", tmp_path / "checkpoints" / "p" / "r")


def test_what_is_written_is_read(run: RunPaths) -> None:
    whole = a_record(
        attempt(
            phases=(Phase(name="starting Ray", began="t"),),
            proof=({"precision": "int8"},),
            argv=("flashrl", "train"),
            set_aside=("global_step_3",),
            git={"commit": "abc", "dirty": True},
            last_step=3,
        )
    )
    store.change(run, lambda _: whole)
    assert store.load(run.record) == whole
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700


def test_no_record_is_none(run: RunPaths) -> None:
    assert store.load(run.record) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 2}', "\x00"])
def test_a_damaged_or_newer_record_is_an_error_that_names_it(text: str, run: RunPaths) -> None:
    run.root.mkdir(parents=True)
    run.record.write_text(text)
    with pytest.raises(InputError, match=r"run\.json"):
        store.load(run.record)


def test_renewing_one_attempt_leaves_the_others(run: RunPaths) -> None:
    store.change(run, lambda _: a_record(attempt(1, status="failed"), attempt(2)))
    store.renew(run, 2, last_step=7)
    found = store.load(run.record)
    assert found
    first, second = found.attempts
    assert (first.status, first.last_step, first.updated) == ("failed", None, "then")
    assert (second.last_step, found.last) == (7, second)
    assert second.updated != "then"


def test_a_lost_record_is_told(run: RunPaths) -> None:
    with pytest.raises(InputError, match="gone"):
        store.renew(run, 1, last_step=1)


def test_changes_at_once_lose_nothing(run: RunPaths) -> None:
    store.change(run, lambda _: a_record())

    def add(number: int) -> None:
        def edit(found: RunRecord | None) -> RunRecord:
            assert found
            return dataclasses.replace(found, attempts=(*found.attempts, attempt(number)))

        store.change(run, edit)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.load(run.record)
    assert found
    assert sorted(one.number for one in found.attempts) == list(range(8))


def test_running_is_believed_only_while_the_process_lives() -> None:
    assert store.state(attempt()) == "running"
    assert store.state(attempt(pid_started=1.0)) == "lost", "another process has that pid now"
    assert store.state(attempt(pid=2**22 + 1)) == "lost"
    assert store.state(attempt(status="done", pid=2**22 + 1)) == "done"


def test_another_machine_is_believed() -> None:
    assert store.state(attempt(host=f"not-{socket.gethostname()}", pid=os.getpid(), pid_started=1.0)) == "running"
