"""The report: all checks together, and with what a preset needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flashrl_cli.doctor import checks, report
from flashrl_cli.doctor.report import Report
from flashrl_cli.machine import software
from flashrl_cli.machine.finding import fail, ok, warn


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs and without Ray."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/no-ray-is-here")  # a path of pytest is too long for sockets
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(checks, "probe_daemons", list)
    monkeypatch.setattr(checks, "probe_ports", list)


def names(found: Report) -> list[str]:
    return [finding.name for finding in found.findings]


def test_a_cpu_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.9.1", "torch": "2.13.0+cpu"})
    monkeypatch.setattr(report, "find_spec", lambda name: name)
    found = report.machine()
    assert found.stack == "cpu"
    assert {"python", "verl", "torch", "command", "verl.plugins", "GPUs", "disk", "memory", "Ray", "hub"} <= set(
        names(found)
    )
    assert not {"driver", "flash-attn", "precisions", "locked memory"} & set(names(found))


def test_a_gpu_stack_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0"})
    found = report.machine()
    assert found.stack == "gpu"
    assert {"flash-attn", "locked memory"} <= set(names(found))
    assert not found.ok
    (gpus,) = (finding for finding in found.findings if finding.name == "GPUs")
    assert gpus.level == "fail"


def test_a_bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "probe_versions", dict)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    found = report.machine()
    assert found.stack is None
    assert not found.ok
    assert set(software.MODULES) <= set(names(found))


def test_a_preset_s_word_counts() -> None:
    machine = Report(
        "gpu", (ok("verl", "0.9.1"), warn("flash-attn", "not installed"), ok("disk", "a"), ok("disk", "b"))
    )
    assert machine.ok
    both = machine.with_preset([ok("verl", "0.9.1"), fail("flash-attn", "verl asks for it"), ok("data.train", "/x")])
    assert [(finding.name, finding.level) for finding in both.findings] == [
        ("verl", "ok"),
        ("disk", "ok"),
        ("disk", "ok"),
        ("flash-attn", "fail"),
        ("data.train", "ok"),
    ]
    assert not both.ok


def test_document() -> None:
    document = report.document(Report("cpu", (fail("a", "b", "c"),)), "tiny")
    assert document == {
        "schema_version": 1,
        "stack": "cpu",
        "preset": "tiny",
        "checks": [{"name": "a", "level": "fail", "text": "b", "fix": "c"}],
        "ok": False,
    }
