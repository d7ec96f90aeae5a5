"""flashrl's entry points in verl and vLLM."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.machine import software


def announce(monkeypatch: pytest.MonkeyPatch, *points: Any) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)


def point(name: str, error: Exception | None = None) -> SimpleNamespace:
    def load() -> None:
        if error:
            raise error

    return SimpleNamespace(name=name, value=f"{name}.plugin", load=load)


def test_both_load(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, point("other", RuntimeError("not ours")), point("flashrl"))
    found = list(software.findings({}))
    assert [(finding.name, finding.level) for finding in found] == [
        ("verl.plugins", "ok"),
        ("vllm.general_plugins", "ok"),
    ]


def test_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, point("other"))
    first, second = software.findings({})
    assert first.text == "flashrl's entry point in verl.plugins is missing"
    assert (first.level, second.level) == ("fail", "fail")


def test_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, point("flashrl", ImportError("no such thing")))
    first, _ = software.findings({})
    assert first.level == "fail"
    assert "ImportError('no such thing')" in first.text


@pytest.mark.parametrize(
    ("value", "fine"), [(None, True), ("auto", True), ("a,flashrl", True), ("flashrl", True), ("a", False), ("", False)]
)
@pytest.mark.parametrize(("group", "switch"), list(software.ENTRY_POINTS.items()))
def test_switched_off(group: str, switch: str, value: str | None, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, point("flashrl"))
    found = {finding.name: finding for finding in software.findings({} if value is None else {switch: value})}
    assert found[group].level == ("ok" if fine else "fail")
    assert fine or found[group].text == f"{switch}={value} keeps flashrl's plugin out"


def test_the_real_ones_load_without_anything_heavy() -> None:
    import sys

    before = {name for name in ("torch", "vllm", "verl", "ray") if name in sys.modules}
    assert {finding.level for finding in software.findings({})} == {"ok"}
    assert {name for name in ("torch", "vllm", "verl", "ray") if name in sys.modules} == before
