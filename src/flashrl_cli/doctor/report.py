"""All checks of a machine, in the order in which they are shown, and the report as plain data.

What another FlashRL left behind: a console script of the same name, and a patch that runs at every start of Python.

The original system (distribution `flash-llm-rl`) installs a command `flashrl` too, and appends `import flash_rl` to
`usercustomize.py` in site-packages (its setup.py and flash_rl/commands.py), which changes vLLM in every process.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashrl_cli import hub, paths
from flashrl_cli.machine import gpus, ray_state, software, system
from flashrl_cli.machine.finding import Finding, Level, fail, ok, warn
from flashrl_cli.machine.software import Stack, installed_stack

COMMAND = "flashrl"
PACKAGE = "flashrl_cli"
SHIMS = ("pyenv", "asdf", "mise")
"""Version managers whose scripts of any name call the right one."""
PATCH = "flash_rl"
STARTUP = ("usercustomize.py", "sitecustomize.py")
UNINSTALL = "pip uninstall flash-llm-rl"


@dataclass(frozen=True, slots=True)
class Script:
    """A file on the PATH with flashrl's name, whether it calls this package, and whether it is this environment's."""

    path: str
    ours: bool
    here: bool


def probe_scripts(search: str) -> Iterator[Script]:
    """Yield the scripts named flashrl along a PATH, first found first."""
    for folder in dict.fromkeys(filter(None, search.split(os.pathsep))):
        path = Path(folder) / COMMAND
        if path.is_file() and os.access(path, os.X_OK):
            text = path.read_bytes()[:4096].decode("utf-8", errors="replace")
            if not any(shim in text for shim in SHIMS):
                here = Path(folder).resolve() == (Path(sys.prefix) / "bin").resolve()
                yield Script(str(path), PACKAGE in text, here)


def probe_claims() -> dict[str, str]:
    """Other distributions that announce a console script of flashrl's name, and what it calls."""
    points = metadata.entry_points(group="console_scripts", name=COMMAND)
    found = {point.dist.name if point.dist else "unknown": point.value for point in points}
    return {name: value for name, value in found.items() if not value.startswith(PACKAGE)}


def probe_startup_files() -> Iterator[str]:
    """Yield the files that Python reads when it starts and that mention the original's patch outside of comments."""
    folders = dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), *filter(None, sys.path)])
    for folder in map(Path, folders):
        for path in (*(folder / name for name in STARTUP), *sorted(folder.glob("*.pth"))):
            if path.is_file() and mentions_patch(path.read_text(encoding="utf-8", errors="replace")):
                yield str(path)


def mentions_patch(text: str) -> bool:
    """Whether a startup file does something with the original's package."""
    return any(PATCH in line for line in text.splitlines() if not line.lstrip().startswith("#"))


def other_scripts(found: Sequence[Script], claims: Mapping[str, str]) -> Iterator[Finding]:
    """Yield which command a person gets who types `flashrl`."""
    for name in claims:
        yield fail("command", f"the package {name} installs a command {COMMAND} too", f"pip uninstall {name}")
    if not found:
        yield warn("command", f"{COMMAND} is not on the PATH", f"export PATH={sys.prefix}/bin:$PATH")
        return
    first, *others = found
    if not first.ours:
        yield fail("command", f"{first.path} comes first on the PATH and is another program", f"remove {first.path}")
    elif not first.here:
        yield warn(
            "command", f"{first.path} comes first on the PATH: another environment's", f"{sys.prefix}/bin/{COMMAND}"
        )
    else:
        yield ok("command", first.path)
    for script in others:
        if not script.ours:
            yield warn("command", f"{script.path} is another program of that name", f"remove {script.path}")


def leftovers(files: Iterable[str], *, importable: bool, variables: Iterable[str]) -> Iterator[Finding]:
    """Yield what is left of the original; with its package `importable`, a startup file changes vLLM in every process."""
    for file in files:
        fix = f"delete the line with {PATCH} in {file}"
        if importable:
            yield fail("flash-llm-rl", f"{file} patches vLLM at every start of Python", f"{fix}, and {UNINSTALL}")
        else:
            yield warn("flash-llm-rl", f"{file} still asks for its patch", fix)
    for name in variables:
        yield warn("flash-llm-rl", f"{name} is set, which only the original reads", f"unset {name}")


def original_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that the original system reads and flashrl does not."""
    return [name for name in ("FLASHRL_CONFIG", "FLASHRL_LMHEAD_FP32") if name in environment]


SCHEMA_VERSION = 1
WITHOUT_FLASH = "sdpa: `flashrl doctor --preset NAME` says how"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found; `stack` is `gpu`, `cpu`, or None where neither is installed."""

    stack: str | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing keeps a run from starting."""
        return all(finding.level is not Level.FAIL for finding in self.findings)

    def with_preset(self, needed: Sequence[Finding]) -> Report:
        """The report with what a preset needs; where both speak of the same thing, the preset's word counts."""
        names = {finding.name for finding in needed}
        kept = [finding for finding in self.findings if finding.name not in names or finding in needed]
        return Report(self.stack, (*kept, *(finding for finding in needed if finding not in kept)))


def machine() -> Report:
    """Check this machine, whatever is to run on it. Reads much, changes nothing, uses no network but its own ports."""
    versions = software.probe_versions()
    stack = installed_stack(versions)
    listing = gpus.probe()
    found = gpus.visible(gpus.parse(listing), os.environ.get("CUDA_VISIBLE_DEVICES"))
    kind = stack.name if stack else "gpu" if found else "cpu"
    joined = ray_state.probe_cluster(os.environ)
    checks = (
        *_software(versions, stack),
        *_conflicts(),
        *software.findings(os.environ),
        gpus.devices(found, listing, stack=kind, joined=joined is not None),
        *(_gpus(found, versions) if kind == "gpu" else ()),
        *gpus.vendors(os.environ, None),
        *_system(kind),
        *_ray(joined),
        *_network(),
    )
    return Report(stack.name if stack else None, checks)


def document(report: Report, preset: str | None) -> dict[str, Any]:
    """The report as one JSON document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "stack": report.stack,
        "preset": preset,
        "checks": [asdict(finding) for finding in report.findings],
        "ok": report.ok,
    }


def _software(versions: Mapping[str, str], stack: Stack | None) -> Iterator[Finding]:
    yield software.python(sys.version_info[:3])
    yield from software.missing(find_spec)
    yield from software.one_vllm(versions)
    yield from software.verl_version(versions)
    if stack:
        yield from software.packages(versions, stack)


def _conflicts() -> Iterator[Finding]:
    scripts = list(probe_scripts(os.environ.get("PATH", "")))
    yield from other_scripts(scripts, probe_claims())
    yield from leftovers(
        probe_startup_files(),
        importable=find_spec(PATCH) is not None,
        variables=original_variables(os.environ),
    )


def _gpus(found: Sequence[gpus.Gpu], versions: Mapping[str, str]) -> Iterator[Finding]:
    cuda = gpus.cuda_of(versions.get("torch", ""))
    yield from gpus.driver(found, cuda, compatible=gpus.COMPATIBLE.is_dir())
    yield from gpus.precisions(found)
    yield software.flash_attention(versions, WITHOUT_FLASH)


def _system(kind: str) -> Iterator[Finding]:
    places = {
        "runs": paths.runs_root(),
        "checkpoints": paths.checkpoints_root(),
        "data": paths.data_root(),
        "the hub's cache": paths.absolute(hub.hub_cache(os.environ, Path.home())),
    }
    total = system.probe_memory()
    yield from system.disks(system.probe_disks(places), kind)
    yield system.shared_memory(system.probe_shm(), total, kind)
    yield system.memory(total)
    yield from system.limits(*system.probe_limits(), kind)


def _ray(joined: tuple[str, str] | None) -> Iterator[Finding]:
    yield ray_state.cluster(joined, answers=ray_state.probe_answers(joined[0]) if joined else None)
    if joined is None:
        yield from ray_state.folder_findings(os.environ)
    yield from system.sockets(os.environ)
    yield from ray_state.daemons(ray_state.probe_daemons())
    yield ray_state.ports(ray_state.probe_ports())


def _network() -> Iterator[Finding]:
    home = Path.home()
    yield hub.hub(
        hub.hub_cache(os.environ, home),
        hub.offline(os.environ),
        token=hub.probe_token(os.environ, home),
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    yield from hub.proxies(os.environ)
