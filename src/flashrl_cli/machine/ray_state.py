"""State of Ray on this machine: the cluster that a run would join, Ray's folder, leftover daemons, ports in use.

`ray.init()` without an address, as verl calls it, joins the cluster of `RAY_ADDRESS`, or else the one that `ray start`
recorded in `ray_current_cluster` of Ray's folder, even if it no longer runs (ray/_private/services.py:413). That folder
is the argument `_temp_dir`, or `ray` below RAY_TMPDIR, else below TMPDIR, else below /tmp (ray/_common/utils.py:327).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from flashrl_cli import paths
from flashrl_cli.machine.finding import Finding, fail, ok, warn
from flashrl_cli.machine.system import SOCKET_BYTES, TMP

NOTHING: Mapping[str, object] = MappingProxyType({})
FOLDER_VARIABLES = ("RAY_TMPDIR", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Folder:
    """Folder in which a run's own Ray keeps its sessions, and the variable or key that sets it."""

    path: str
    source: str


def folder(environment: Mapping[str, str], arguments: Mapping[str, object] = NOTHING) -> Folder:
    """Ray's folder in an environment; `arguments` are those of `ray.init`. An empty variable counts as set."""
    if given := arguments.get("_temp_dir"):
        return Folder(str(given), "_temp_dir")
    name = next((name for name in FOLDER_VARIABLES if name in environment), None)
    return Folder(os.path.join(environment[name] if name else TMP, "ray"), name or TMP)


def probe_cluster(environment: Mapping[str, str], arguments: Mapping[str, object] = NOTHING) -> tuple[str, str] | None:
    """Address of the cluster that a run here joins, and where it was configured; None if the run starts its own Ray."""
    address, source = str(arguments.get("address") or "auto"), "verl.ray_kwargs.ray_init.address"
    if address == "auto":
        address, source = environment.get("RAY_ADDRESS") or "auto", "RAY_ADDRESS"
    if address != "auto":
        return None if address == "local" else (address, source)
    note = Path(folder(environment, arguments).path) / "ray_current_cluster"
    try:
        noted = note.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        noted = ""
    if not noted and environment.get("RAY_ADDRESS") == "auto":
        return "auto", "RAY_ADDRESS"
    return (noted, str(note)) if noted else None


def folder_findings(environment: Mapping[str, str], arguments: Mapping[str, object] = NOTHING) -> Iterator[Finding]:
    """Yield failures if a run's own Ray, or vLLM, cannot create its sockets in Ray's folder."""
    found = folder(environment, arguments)
    fix = (
        "--set verl.+ray_kwargs.ray_init._temp_dir=/tmp/ray"
        if found.source == "_temp_dir"
        else "export RAY_TMPDIR=/tmp"
    )
    longest = len(os.fsencode(found.path)) + len(
        f"/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    )
    if not found.path.startswith("/"):
        yield fail("Ray's folder", f"{found.path} ({found.source}) is not an absolute path", fix)
    elif longest > SOCKET_BYTES:
        yield fail(
            "Ray's folder",
            f"{found.path} ({found.source}) is {longest - SOCKET_BYTES} bytes too long: the sockets "
            f"that Ray makes there would have paths of {longest} bytes, and the system takes {SOCKET_BYTES}",
            f"{fix}, or a shorter {found.source}",
        )
    elif not os.access(paths.existing(Path(found.path)), os.W_OK | os.X_OK):
        yield fail("Ray's folder", f"{found.path} ({found.source}) cannot be written", fix)
    else:
        yield ok("Ray's folder", f"{found.path} ({found.source})")


def probe_answers(address: str) -> bool | None:
    """Whether something listens at `host:port`; None for an address without a port."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or not port:
        return None
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def cluster(joined: tuple[str, str] | None, *, answers: bool | None) -> Finding:
    """The finding on the Ray cluster that a run uses."""
    if joined is None:
        return ok("Ray", "a run starts its own")
    address, source = joined
    if answers is False:
        fix = f"rm {source}" if source.startswith("/") else unset(source)
        return fail("Ray", f"a run joins {address} ({source}), and nothing answers there", fix)
    if source.startswith("/"):
        return warn("Ray", f"a run joins {address}, which `ray start` left running", "`ray stop` to have its own")
    text = f"a local run joins {address} ({source}), whose other nodes do not get flashrl's environment"
    return warn("Ray", text, "`train --executor ray` submits it as a job")


def unset(source: str) -> str:
    """How to remove a shell variable, or a key of the preset (which has a dot)."""
    return f"take {source} out of the preset" if "." in source else f"unset {source}"
