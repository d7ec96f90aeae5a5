"""`flashrl runs`, as people and programs call it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from flashrl_cli.cli.app import app
from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched
from flashrl_cli.runs.control import Follower
from tests.unit.runs import disk, sampled

RUNNER = CliRunner()


def call(*arguments: str, **options: Any) -> Result:
    return RUNNER.invoke(app, ["runs", *arguments], catch_exceptions=False, **options)


def document(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(*arguments, "--json").stdout)
    assert found["schema_version"] == 1
    return found


def test_ls() -> None:
    run = disk.make("demo", disk.attempt(last_step=2, total_steps=4))
    disk.log(run, 1, {"critic/score/mean": 0.5})
    disk.make("broken", disk.attempt()).record.write_text("{")
    result = call("ls")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["name", "broken", "demo"]
    assert "warning: " in result.stderr
    assert "is no run record" in result.stderr
    broken, demo = document("ls")["runs"]
    assert (demo["name"], demo["state"], demo["step"], demo["total_steps"], demo["reward"]) == (
        "demo",
        "done",
        2,
        4,
        0.5,
    )
    assert (broken["state"], "run.json" in broken["problem"]) == (None, True)


def test_ls_without_runs() -> None:
    result = call("ls")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no runs in" in result.stderr
    assert document("ls")["runs"] == []


def test_show() -> None:
    run = disk.make("demo", disk.attempt())
    disk.planned(run, 1, correction={"cap": 2.0})
    disk.log(run, 1, sampled.logged(sampled.sample(0.15), 2))
    assert "The cap fits" in call("show", "demo").stdout
    found = document("show", "demo")
    assert (found["run"]["name"], found["record"]["preset"], found["mismatch"]["verdict"]) == ("demo", "demo", "keep")


@pytest.mark.parametrize("command", ["show", "watch", "stop", "rm"])
def test_an_unknown_run(command: str) -> None:
    disk.make("demo", disk.attempt())
    with pytest.raises(NothingMatched) as caught:
        call(command, "dmo")
    assert caught.value.hint == "did you mean demo?"
    with pytest.raises(InputError, match="not the name of a run"):
        call(command, "../demo")


def test_watch_ends_as_the_run_did() -> None:
    run = disk.make(
        "demo", disk.attempt(status="failed", exit_code=3, error="no proof", hint="take bf16", total_steps=9)
    )
    disk.log(run, 1, {"critic/score/mean": 0.5})
    result = call("watch", "demo")
    assert result.exit_code == 3
    assert result.stdout == "step 1/9  reward 0.500\n"
    assert result.stderr == "failed (exit code 3): no proof\nhint: take bf16\n"
    events = [json.loads(line) for line in call("watch", "demo", "--json").stdout.splitlines()]
    assert [event["event"] for event in events] == ["step", "end"]


def test_watching_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Follower) -> None:
        raise KeyboardInterrupt

    disk.make("demo", disk.attempt(status="running"))
    monkeypatch.setattr(Follower, "follow", interrupt)
    monkeypatch.setattr(psutil.Process, "send_signal", lambda *_: pytest.fail("signalled"))
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signalled"))
    result = call("watch", "demo")
    assert result.exit_code == 130
    assert "demo goes on" in result.stderr


def test_nothing_to_watch_without_a_record() -> None:
    disk.make("old")
    with pytest.raises(InputError) as caught:
        call("watch", "old")
    assert caught.value.hint == "`flashrl runs show old` shows what its folders hold"


def test_stop_of_what_is_over() -> None:
    disk.make("demo", disk.attempt())
    result = call("stop", "demo")
    assert (result.exit_code, result.stdout) == (0, "demo is not running: attempt 1 is done\n")
    found = document("stop", "demo")
    assert (found["stopped"], found["state"]) == (False, "done")


def test_stop_elsewhere() -> None:
    disk.make("demo", disk.attempt(status="running", host="node7"))
    with pytest.raises(EnvironmentNotReady, match="node7"):
        call("stop", "demo")


def test_rm() -> None:
    one, two = disk.make("one", disk.attempt(), checkpoints=5000), disk.make("two", disk.attempt())
    result = call("rm", "one", "two", "one", "--yes")
    assert result.stdout == "removed one\nremoved two\n"
    assert str(one.checkpoints) in result.stderr
    assert "together" in result.stderr
    assert not one.root.exists()
    assert not one.checkpoints.exists()
    assert not two.root.exists()


def test_rm_as_json() -> None:
    run = disk.make("one", disk.attempt(), checkpoints=5000)
    (removed,) = document("rm", "one", "--yes", "--keep-checkpoints")["removed"]
    assert (removed["name"], removed["run"], removed["checkpoints"]) == ("one", str(run.root), None)
    assert run.checkpoints.exists()


def test_rm_asks_a_person_and_takes_no_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    run = disk.make("one", disk.attempt())
    monkeypatch.setattr("flashrl_cli.cli.runs._interactive", lambda: True)
    result = call("rm", "one", input="n\n")
    assert result.exit_code == 1
    assert run.root.exists()
    assert call("rm", "one", input="y\n").exit_code == 0
    assert not run.root.exists()


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_rm_removes_nothing_unasked(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    run = disk.make("one", disk.attempt())
    if options:
        monkeypatch.setattr("flashrl_cli.cli.runs._interactive", lambda: True)
    with pytest.raises(InputError) as caught:
        call("rm", "one", *options)
    assert "--yes" in str(caught.value.hint)
    assert run.root.exists()


def test_rm_checks_all_before_it_removes_one() -> None:
    run = disk.make("one", disk.attempt())
    disk.make("two", disk.attempt(status="running"))
    with pytest.raises(InputError, match="two is running"):
        call("rm", "one", "two", "--yes")
    assert run.root.exists()


def test_names_are_completed() -> None:
    disk.make("demo", disk.attempt())
    environment = {"_FLASHRL_COMPLETE": "complete_bash"}
    for command in ("show", "watch", "stop", "rm"):
        words = {"COMP_WORDS": f"flashrl runs {command} de", "COMP_CWORD": "3"}
        result = RUNNER.invoke(app, [], env=environment | words, prog_name="flashrl")
        assert result.stdout.split() == ["demo"], (command, sys.argv)
