"""Disk, shared memory, memory and limits, judged from numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.machine import system
from flashrl_cli.machine.system import GIB, Disk


@pytest.mark.parametrize(
    ("free", "total", "stack", "level"),
    [
        (500, 1000, "gpu", "ok"),
        (49, 500, "gpu", "warn"),
        (49, 500, "cpu", "ok"),
        (4.9, 50, "cpu", "warn"),
        (0.9, 50, "cpu", "fail"),
        (60, 2000, "gpu", "warn"),
    ],
)
def test_disks(free: float, total: float, stack: str, level: str) -> None:
    (finding,) = system.disks([Disk("runs, data", int(free * GIB), int(total * GIB))], stack)
    assert finding.level == level
    assert "for runs, data" in finding.text


def test_a_folder_that_cannot_be_written() -> None:
    (finding,) = system.disks([Disk("data", 100 * GIB, 200 * GIB, ("/data",))], "cpu")
    assert (finding.level, finding.text) == ("fail", "cannot write to /data")


def test_folders_of_one_disk_are_told_together(tmp_path: Path) -> None:
    (disk,) = system.probe_disks({"runs": tmp_path / "not/yet", "data": tmp_path})
    assert disk.holds == "runs, data"
    assert 0 < disk.free < disk.total
    assert not disk.unwritable


def test_unwritable_folders_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (disk,) = system.probe_disks({"runs": tmp_path / "not/yet"})
    assert disk.unwritable == (str(tmp_path),)


@pytest.mark.parametrize(
    ("free", "memory", "stack", "level"),
    [
        (24, 24, "cpu", "ok"),
        (8, 16, "cpu", "ok"),
        (0.06, 16, "cpu", "warn"),
        (9.4, 2000, "cpu", "ok"),  # 10 GB is where Ray stops asking
        (7, 16, "gpu", "warn"),
        (10, 2000, "gpu", "ok"),
    ],
)
def test_shared_memory(free: float, memory: float, stack: str, level: str) -> None:
    finding = system.shared_memory(int(free * GIB), int(memory * GIB), stack)
    assert finding.level == level
    assert (finding.fix is None) is (level == "ok")


def test_small_shared_memory_gets_the_size_that_is_wanted() -> None:
    assert "--shm-size=9g" in str(system.shared_memory(0, 2000 * GIB, "gpu").fix)


@pytest.mark.parametrize(("gib", "level"), [(24, "ok"), (8, "ok"), (7, "warn")])
def test_memory(gib: int, level: str) -> None:
    assert system.memory(gib * GIB).level == level


@pytest.mark.parametrize(
    ("open_files", "stack", "level"),
    [(20000, "cpu", "ok"), (1024, "cpu", "warn"), (20000, "gpu", "warn"), (65536, "gpu", "ok"), (-1, "gpu", "ok")],
)
def test_open_files(open_files: int, stack: str, level: str) -> None:
    first, *rest = system.limits(open_files, -1, stack)
    assert (first.name, first.level) == ("open files", level)
    assert [finding.name for finding in rest] == (["locked memory"] if stack == "gpu" else [])


def test_locked_memory_is_only_told() -> None:
    _, finding = system.limits(65536, 8 * 2**20, "gpu")
    assert (finding.level, finding.text) == ("ok", "8 MiB; InfiniBand wants no limit")


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "CGROUP_MEMORY", tmp_path / "memory.max")
    whole = system.probe_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert system.probe_memory() == whole > GIB
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert system.probe_memory() == GIB


def test_shared_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "SHM", tmp_path / "none")
    assert system.probe_shm() == 0
    monkeypatch.setattr(system, "SHM", tmp_path)
    assert system.probe_shm() > 0


def test_avx512_is_read_from_the_processors_flags(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert not system.has_avx512(cpuinfo)
    cpuinfo.write_text("flags\t\t: fpu sse avx avx2\n")
    assert not system.has_avx512(cpuinfo)
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f avx512bw\n")
    assert system.has_avx512(cpuinfo)


def test_sockets_of_engines_and_graders_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes the first of TMPDIR, TEMP and TMP that exists; vLLM takes VLLM_RPC_BASE_PATH whether it exists or not."""
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
