"""All checks of a machine, in the order in which they are shown, and the report as plain data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashrl_cli import paths
from flashrl_cli.doctor import conflicts, gpus, network, plugins, ray_state, software, system
from flashrl_cli.doctor.finding import Finding, Level
from flashrl_cli.doctor.stacks import Stack, installed_stack

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
        *plugins.findings(os.environ),
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
    scripts = list(conflicts.probe_scripts(os.environ.get("PATH", "")))
    yield from conflicts.scripts(scripts, conflicts.probe_claims())
    yield from conflicts.leftovers(
        conflicts.probe_startup_files(),
        importable=find_spec(conflicts.PATCH) is not None,
        variables=conflicts.original_variables(os.environ),
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
        "the hub's cache": paths.absolute(network.hub_cache(os.environ, Path.home())),
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
    yield network.hub(
        network.hub_cache(os.environ, home),
        network.offline(os.environ),
        token=network.probe_token(os.environ, home),
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    yield from network.proxies(os.environ)
