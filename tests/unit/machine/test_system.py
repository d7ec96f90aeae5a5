"""Which Ray a run uses, and whether sockets, checkpoints and downloads have room."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashrl_cli.errors import EnvironmentNotReady, Problem
from flashrl_cli.machine import ray_state, system
from flashrl_cli.machine.finding import fail, ok, problems, warn


def test_only_failures_are_problems() -> None:
    found = problems([ok("a", "fine"), fail("b", "broken", "repair it"), warn("c", "odd", "look"), fail("d", "lost")])
    assert list(found) == [Problem("broken", "b", "repair it"), Problem("lost", "d", None)]


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_own_ray(tmp_path: Path) -> None:
    assert ray_state.probe_cluster({"RAY_TMPDIR": str(tmp_path)}) is None
    finding = ray_state.cluster(None, answers=None)
    assert (finding.level, finding.text) == ("ok", "a run starts its own")


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


def test_whether_a_port_answers(listening: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}"):
        assert ray_state.probe_answers(form.format(listening)) is True
    assert ray_state.probe_answers(f"127.0.0.1:{closed}") is False
    for unnamed in ("auto", "", "host", "host:port", "host:99999999"):
        assert ray_state.probe_answers(unnamed) is None


def test_a_cluster_is_found_where_ray_looks_for_its_note(tmp_path: Path) -> None:
    """Also tried: a note that is empty, one that is no UTF-8, a folder of that name, RAY_ADDRESS=auto with and without
    a note."""
    for folder in ("a", "b"):
        (tmp_path / folder / "ray").mkdir(parents=True)
        (tmp_path / folder / "ray/ray_current_cluster").write_text(f"{folder}:6379", encoding="utf-8")
    a, b, empty = (str(tmp_path / name) for name in ("a", "b", "empty"))
    note = f"{a}/ray/ray_current_cluster"
    assert ray_state.probe_cluster({"TMPDIR": a}) == ("a:6379", note)
    assert ray_state.probe_cluster({"RAY_ADDRESS": "10.0.0.1:6379"}) == ("10.0.0.1:6379", "RAY_ADDRESS")
    assert ray_state.probe_cluster({"TMPDIR": b, "RAY_TMPDIR": a}) == ("a:6379", note)
    assert ray_state.probe_cluster({"TMPDIR": a, "RAY_TMPDIR": empty}) is None
    assert ray_state.probe_cluster({"TMPDIR": b}, {"_temp_dir": f"{a}/ray"}) == ("a:6379", note)
    assert ray_state.probe_cluster({"TMPDIR": a, "RAY_ADDRESS": "auto"}) == ("a:6379", note)
    assert ray_state.probe_cluster({"TMPDIR": empty, "RAY_ADDRESS": "auto"}) == ("auto", "RAY_ADDRESS")
    assert ray_state.probe_cluster({"TMPDIR": a, "RAY_ADDRESS": "local"}) is None
    assert ray_state.probe_cluster({"TMPDIR": a}, {"address": "local"}) is None
    assert ray_state.probe_cluster({"RAY_ADDRESS": "c:1"}, {"address": "d:2"}) == (
        "d:2",
        "verl.ray_kwargs.ray_init.address",
    )
    Path(note).write_bytes(b"\xff:6379")
    assert ray_state.probe_cluster({"TMPDIR": a}) == ("\ufffd:6379", note)
    for nothing in ("", "\n"):
        Path(note).write_text(nothing, encoding="utf-8")
        assert ray_state.probe_cluster({"TMPDIR": a}) is None
    Path(note).unlink()
    Path(note).mkdir()
    assert ray_state.probe_cluster({"TMPDIR": a}) is None


@pytest.mark.parametrize(
    ("environment", "arguments", "path", "source"),
    [
        ({}, {}, "/tmp/ray", "/tmp"),
        ({"TMPDIR": "/t"}, {}, "/t/ray", "TMPDIR"),
        ({"TMPDIR": "/t", "RAY_TMPDIR": "/r"}, {}, "/r/ray", "RAY_TMPDIR"),
        ({"TMPDIR": "/t", "RAY_TMPDIR": ""}, {}, "ray", "RAY_TMPDIR"),
        ({"TEMP": "/t", "TMP": "/t"}, {}, "/tmp/ray", "/tmp"),
        ({"RAY_TMPDIR": "/r"}, {"_temp_dir": "/a"}, "/a", "_temp_dir"),
        ({"RAY_TMPDIR": "/r"}, {"_temp_dir": None}, "/r/ray", "RAY_TMPDIR"),
    ],
)
def test_the_folder_is_the_one_that_ray_takes(environment, arguments, path, source, monkeypatch) -> None:
    """`ray` is imported nowhere else in unit tests: its own function is what ours must agree with."""
    from ray._common.utils import get_default_ray_temp_dir

    for name in ("TMPDIR", "RAY_TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ray_state.folder(environment, arguments) == ray_state.Folder(path, source)
    if not arguments.get("_temp_dir"):
        assert get_default_ray_temp_dir() == path


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_is_too_long_for_rays_sockets(tmp_path: Path, variable: str) -> None:
    """The longest path that passes here also passes Ray's own check, and one byte more does not; a byte is no
    letter."""
    from ray._private.utils import validate_socket_filepath

    session = f"/ray/session_2026-11-28_09-20-00_123456_{os.getpid()}/sockets/plasma_store"
    most = 107 - len(session)
    for name in ("x" * (most - 1), "é" * ((most - 1) // 2)):
        (found,) = ray_state.folder_findings({variable: f"/{name}"})
        assert (found.level, "/" + name in found.text) == ("ok", True)
        validate_socket_filepath(f"/{name}{session}")
    for name in ("x" * most, "é" * (most // 2 + 1)):
        (found,) = ray_state.folder_findings({variable: f"/{name}"})
        assert found.level == "fail"
        assert f"({variable})" in found.text
        assert "export RAY_TMPDIR=/tmp" in str(found.fix)
        with pytest.raises(OSError, match="AF_UNIX"):
            validate_socket_filepath(f"/{name}{session}")
    (found,) = ray_state.folder_findings({"TMPDIR": "/" + "x" * 200, "RAY_TMPDIR": "/tmp"})
    assert found.level == "ok"
    (found,) = ray_state.folder_findings({"RAY_TMPDIR": "/tmp"}, {"_temp_dir": "/" + "x" * 80})
    assert (found.level, "_temp_dir=/tmp/ray" in str(found.fix)) == ("fail", True)


def test_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray makes what is missing; it times out at a relative folder (tried with Ray 2.60: TMPDIR=rel/t, RAY_TMPDIR=)."""
    (found,) = ray_state.folder_findings({"TMPDIR": "/tmp/is/not/there"})
    assert found.level == "ok"
    for value in ("rel/t", ""):
        (found,) = ray_state.folder_findings({"TMPDIR": value})
        assert (found.level, "not an absolute path" in found.text) == ("fail", True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (found,) = ray_state.folder_findings({"TMPDIR": "/tmp"})
    assert (found.level, "cannot be written" in found.text) == ("fail", True)


def test_avx512_is_read_from_the_processors_flags(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert not system.has_avx512(cpuinfo)
    cpuinfo.write_text("flags\t\t: fpu sse avx avx2\n")
    assert not system.has_avx512(cpuinfo)
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f avx512bw\n")
    assert system.has_avx512(cpuinfo)


def test_sockets_of_engines_and_graders_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes the first of TMPDIR, TEMP and TMP that exists; vLLM takes VLLM_RPC_BASE_PATH whether it exists or
    not."""
    short, long = str(tmp_path / "s"), str(tmp_path / ("x" * 90))
    for folder in (short, long):
        Path(folder).mkdir()
    fits = [{}, {"TMPDIR": "/nowhere" + "x" * 90}, {"TMPDIR": "/nowhere", "TEMP": "/tmp"}, {"TMPDIR": ""}]
    for environment in fits:
        assert list(system.sockets(environment)) == []
        system.check_sockets(environment)
    (found,) = system.sockets({"TMPDIR": long})
    assert (found.level, "(TMPDIR)" in found.text, "a shorter TMPDIR" in str(found.fix)) == ("fail", True, True)
    (found,) = system.sockets({"TMPDIR": "/nowhere", "TEMP": long, "VLLM_RPC_BASE_PATH": "/tmp"})
    assert "(TEMP)" in found.text
    (found,) = system.sockets({"VLLM_RPC_BASE_PATH": "/nowhere" + "x" * 90})
    assert "(VLLM_RPC_BASE_PATH)" in found.text
    with pytest.raises(EnvironmentNotReady, match="too long for the sockets"):
        system.check_sockets({"TMPDIR": long})
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/tmp")
    assert [found.fix for found in system.sockets({})] == ["make /tmp writable"]
    system.check_sockets({})


@pytest.mark.parametrize(
    ("one", "kept", "free", "nodes", "level", "text"),
    [
        (100, 0, 0, 1, "ok", "none are saved"),
        (100, 3, 300, 1, "ok", "3 checkpoints of 0.1 kB in /c, 0.3 kB free"),
        (100, 3, 299, 1, "warn", "--keep, or FLASHRL_CHECKPOINTS"),
        (100, 3, 99, 1, "fail", "FLASHRL_CHECKPOINTS names a folder on a larger disk"),
        (100, None, 750, 1, "ok", "room for 7; all are kept"),
        (100, None, 100, 1, "ok", "room for 1; all are kept"),
        (100, None, 99, 1, "fail", "a checkpoint of"),
        (100, 1, 50, 4, "warn", "a checkpoint of"),  # if each node has a disk of its own, a quarter fits
        (100, 1, 24, 4, "fail", "a checkpoint of"),
    ],
)
def test_room_for_checkpoints(one: int, kept: int | None, free: int, nodes: int, level: str, text: str) -> None:
    found = system.checkpoints(one, kept, free, nodes=nodes, folder="/c", keep_fewer="--keep")
    assert found.level == level
    assert text in f"{found.text} {found.fix}"


@pytest.mark.parametrize(("needed", "free", "level"), [(None, 0, "ok"), (100, 100, "ok"), (100, 99, "fail")])
def test_room_for_a_download(needed: int | None, free: int, level: str) -> None:
    finding = system.download("model.path", "a/b", needed, free, "/hub")
    assert (finding.name, finding.level) == ("model.path", level)
