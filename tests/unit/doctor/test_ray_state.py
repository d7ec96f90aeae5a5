"""Which Ray a run uses, and what others left."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flashrl_cli.doctor import ray_state


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_own_ray(tmp_path: Path) -> None:
    assert ray_state.probe_cluster({"RAY_TMPDIR": str(tmp_path)}) is None
    finding = ray_state.cluster(None, answers=None)
    assert (finding.level, finding.text) == ("ok", "a run starts its own")


def test_a_cluster_by_its_variable(tmp_path: Path) -> None:
    assert ray_state.probe_cluster({"RAY_ADDRESS": "10.0.0.1:6379"}) == ("10.0.0.1:6379", "RAY_ADDRESS")
    assert ray_state.probe_cluster({"RAY_ADDRESS": "local", "RAY_TMPDIR": str(tmp_path)}) is None


def test_a_cluster_that_ray_start_noted(tmp_path: Path) -> None:
    note = tmp_path / "ray/ray_current_cluster"
    note.parent.mkdir()
    note.write_text("")
    assert ray_state.probe_cluster({"RAY_TMPDIR": str(tmp_path)}) is None
    note.write_text("10.0.0.1:6379\n")
    assert ray_state.probe_cluster({"RAY_TMPDIR": str(tmp_path)}) == ("10.0.0.1:6379", str(note))


@pytest.mark.parametrize(
    ("source", "answers", "level", "fix"),
    [
        ("RAY_ADDRESS", True, "warn", "`train --executor ray` submits it as a job"),
        ("RAY_ADDRESS", None, "warn", "`train --executor ray` submits it as a job"),
        ("RAY_ADDRESS", False, "fail", "unset RAY_ADDRESS"),
        ("/tmp/ray/ray_current_cluster", True, "warn", "`ray stop` to have its own"),
        ("/tmp/ray/ray_current_cluster", False, "fail", "rm /tmp/ray/ray_current_cluster"),
    ],
)
def test_joining(source: str, answers: bool | None, level: str, fix: str | None) -> None:
    finding = ray_state.cluster(("10.0.0.1:6379", source), answers=answers)
    assert (finding.level, finding.fix) == (level, fix)
    assert "10.0.0.1:6379" in finding.text


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_a_port_that_answers(form: str, listening: int) -> None:
    assert ray_state.probe_answers(form.format(listening)) is True


def test_a_port_that_does_not(listening: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert closed != listening
    assert ray_state.probe_answers(f"127.0.0.1:{closed}") is False


@pytest.mark.parametrize("address", ["auto", "", "host", "host:port", "host:99999999"])
def test_an_address_without_a_port_is_not_judged(address: str) -> None:
    assert ray_state.probe_answers(address) is None


def test_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(pid: int, name: str, user: int) -> SimpleNamespace:
        return SimpleNamespace(pid=pid, info={"name": name, "uids": SimpleNamespace(real=user)})

    me = os.getuid()
    running = [
        process(1, "raylet", me),
        process(2, "raylet", me + 1),
        process(3, "python", me),
        process(4, "raylet", me),
    ]
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: running)
    pids = ray_state.probe_daemons()
    assert pids == [1, 4]
    (finding,) = ray_state.daemons(pids)
    assert finding.level == "warn"
    assert "pid 1, 4" in finding.text
    assert not list(ray_state.daemons([]))


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_state, "probe_answers", lambda address: address.endswith(":8265"))
    assert ray_state.probe_ports() == [8265]
    assert ray_state.ports([]).level == "ok"
    finding = ray_state.ports([8265])
    assert finding.level == "warn"
    assert "8265 (Ray's dashboard)" in finding.text
