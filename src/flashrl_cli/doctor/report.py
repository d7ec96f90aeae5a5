"""All checks of a machine, in the order in which they are shown, and the report as plain data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashrl_cli import hub, paths
from flashrl_cli.doctor import checks
from flashrl_cli.machine import gpus, ray_state, software, system
from flashrl_cli.machine.finding import Finding, Level
from flashrl_cli.machine.software import Stack, installed_stack

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
        """The report with what a preset needs; of two findings of the same name the preset's counts."""
        names = {finding.name for finding in needed}
        kept = [finding for finding in self.findings if finding.name not in names or finding in needed]
        return Report(self.stack, (*kept, *(finding for finding in needed if finding not in kept)))


def machine() -> Report:
    """Check this machine, whatever is to run on it. Reads much, changes nothing, uses no network but its own ports."""
    versions = software.probe_versions()
    stack = installed_stack(versions)
    listing = gpus.probe()
    devices = gpus.visible(gpus.parse(listing), os.environ.get("CUDA_VISIBLE_DEVICES"))
    kind = stack.name if stack else "gpu" if devices else "cpu"
    joined = ray_state.probe_cluster(os.environ)
    findings = (
        *_software(versions, stack),
        *_conflicts(),
        *software.entry_points(os.environ),
        checks.devices(devices, listing, stack=kind, joined=joined is not None),
        *(_gpus(devices, versions) if kind == "gpu" else ()),
        *gpus.vendors(os.environ, None),
        *_system(kind),
        *_ray(joined),
        *_network(),
    )
    return Report(stack.name if stack else None, findings)


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
    yield checks.python(sys.version_info[:3])
    yield from software.missing(find_spec)
    yield from software.one_vllm(versions)
    yield from software.verl_version(versions)
    if stack:
        yield from checks.packages(versions, stack)


def _conflicts() -> Iterator[Finding]:
    scripts = list(checks.probe_scripts(os.environ.get("PATH", "")))
    yield from checks.other_scripts(scripts, checks.probe_claims())
    yield from checks.leftovers(
        checks.probe_startup_files(),
        importable=find_spec(checks.PATCH) is not None,
        variables=checks.original_variables(os.environ),
    )


def _gpus(found: Sequence[gpus.Gpu], versions: Mapping[str, str]) -> Iterator[Finding]:
    cuda = gpus.cuda_of(versions.get("torch", ""))
    yield from gpus.driver(found, cuda, compatible=gpus.COMPATIBLE.is_dir())
    yield from checks.precisions(found)
    yield software.flash_attention(versions, WITHOUT_FLASH)


def _system(kind: str) -> Iterator[Finding]:
    places = {
        "runs": paths.runs_root(),
        "checkpoints": paths.checkpoints_root(),
        "data": paths.data_root(),
        "the hub's cache": paths.absolute(hub.hub_cache(os.environ, Path.home())),
    }
    total = checks.probe_memory()
    yield from checks.disks(checks.probe_disks(places), kind)
    yield checks.shared_memory(checks.probe_shm(), total, kind)
    yield checks.memory(total)
    yield from checks.limits(*checks.probe_limits(), kind)


def _ray(joined: tuple[str, str] | None) -> Iterator[Finding]:
    yield ray_state.cluster(joined, answers=ray_state.probe_answers(joined[0]) if joined else None)
    if joined is None:
        yield from ray_state.folder_findings(os.environ)
    yield from system.sockets(os.environ)
    yield from checks.daemons(checks.probe_daemons())
    yield checks.ports(checks.probe_ports())


def _network() -> Iterator[Finding]:
    home = Path.home()
    yield checks.hub_access(
        hub.hub_cache(os.environ, home),
        hub.offline(os.environ),
        token=checks.probe_token(os.environ, home),
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    yield from checks.proxies(os.environ)
