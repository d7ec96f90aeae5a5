"""Commands of the same name, and leftovers of the original system."""

from __future__ import annotations

import os
import site
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashrl_cli.doctor import report
from flashrl_cli.doctor.report import Script

OURS = "#!/usr/bin/python\nfrom flashrl_cli.cli.app import main\n"
THEIRS = "#!/usr/bin/python\nfrom flash_rl.commands import run\n"


def install(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "flashrl"
    script.write_text(text)
    script.chmod(0o755)
    return script


def test_scripts_are_found_along_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    here, there, foreign = (
        install(tmp_path / name, text) for name, text in [("venv/bin", OURS), ("other/bin", OURS), ("usr", THEIRS)]
    )
    install(tmp_path / "shims", "#!/bin/sh\nexec pyenv exec flashrl\n")
    (install(tmp_path / "plain", OURS)).chmod(0o644)
    search = os.pathsep.join(
        str(tmp_path / name) for name in ("plain", "shims", "none", "usr", "venv/bin", "other/bin")
    )
    assert list(report.probe_scripts(search + os.pathsep)) == [
        Script(str(foreign), ours=False, here=False),
        Script(str(here), ours=True, here=True),
        Script(str(there), ours=True, here=False),
    ]


@pytest.mark.parametrize(
    ("scripts", "levels"),
    [
        ([], ["warn"]),
        ([Script("/v/flashrl", ours=True, here=True)], ["ok"]),
        ([Script("/v/flashrl", ours=True, here=True), Script("/w/flashrl", ours=True, here=False)], ["ok"]),
        ([Script("/v/flashrl", ours=True, here=True), Script("/u/flashrl", ours=False, here=False)], ["ok", "warn"]),
        ([Script("/u/flashrl", ours=False, here=False), Script("/v/flashrl", ours=True, here=True)], ["fail"]),
        ([Script("/w/flashrl", ours=True, here=False)], ["warn"]),
    ],
)
def test_which_command_comes_first(scripts: list[Script], levels: list[str]) -> None:
    assert [finding.level for finding in report.other_scripts(scripts, {})] == levels


def test_another_package_that_claims_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        SimpleNamespace(dist=SimpleNamespace(name="flashrl-cli"), value="flashrl_cli.cli.app:main"),
        SimpleNamespace(dist=SimpleNamespace(name="flash-llm-rl"), value="flash_rl.commands:run"),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: points)
    claims = report.probe_claims()
    assert claims == {"flash-llm-rl": "flash_rl.commands:run"}
    first, _ = report.other_scripts([Script("/v/flashrl", ours=True, here=True)], claims)
    assert (first.level, first.fix) == ("fail", "pip uninstall flash-llm-rl")


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("try: import flash_rl\nexcept ImportError: pass\n", True),
        ("import os\n  import flash_rl\n", True),
        ("# import flash_rl\n", False),
        ("import flashrl_cli\n", False),
        ("", False),
    ],
)
def test_mentions_patch(text: str, mentions: bool) -> None:
    assert report.mentions_patch(text) is mentions


def test_startup_files_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, user = tmp_path / "site-packages", tmp_path / "user"
    for folder in (packages, user):
        folder.mkdir()
    (packages / "usercustomize.py").write_text("try: import flash_rl\nexcept ImportError: pass\n")
    (packages / "harmless.pth").write_text("/somewhere\n")
    (packages / "patch.pth").write_text("import flash_rl\n")
    (user / "sitecustomize.py").write_text("# import flash_rl\n")
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(packages)])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(user))
    monkeypatch.setattr(sys, "path", ["", str(packages)])
    assert list(report.probe_startup_files()) == [str(packages / "usercustomize.py"), str(packages / "patch.pth")]


@pytest.mark.parametrize(("importable", "level"), [(True, "fail"), (False, "warn")])
def test_a_leftover_patch_matters_where_its_package_is(importable: bool, level: str) -> None:
    (finding,) = report.leftovers(["/s/usercustomize.py"], importable=importable, variables=[])
    assert finding.level == level
    assert "/s/usercustomize.py" in str(finding.fix)
    assert (report.UNINSTALL in str(finding.fix)) is importable


def test_variables_of_the_original() -> None:
    names = report.original_variables({"FLASHRL_CONFIG": "x", "FLASHRL_DATA": "y"})
    assert names == ["FLASHRL_CONFIG"]
    (finding,) = report.leftovers([], importable=False, variables=names)
    assert (finding.level, finding.fix) == ("warn", "unset FLASHRL_CONFIG")


def test_nothing_is_left() -> None:
    assert not list(report.leftovers([], importable=True, variables=[]))
