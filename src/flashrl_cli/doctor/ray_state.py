"""Ray on this machine: a cluster that a run would join, daemons left behind, ports in use.

`ray.init()` without an address, as verl calls it, joins the cluster of `RAY_ADDRESS`, else the one that `ray start` noted in
/tmp/ray/ray_current_cluster, whether it still runs or not (ray/_private/services.py:413).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from flashrl_cli.doctor.finding import Finding, fail, ok, warn

DAEMON = "raylet"
PORTS = {6379: "Ray's head", 8265: "Ray's dashboard"}


def probe_cluster(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Address of the cluster that a run here joins, and where that is written; None if it starts its own Ray."""
    if address := environment.get("RAY_ADDRESS"):
        return None if address == "local" else (address, "RAY_ADDRESS")
    note = Path(environment.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"  # noqa: S108 - Ray's own place
    try:
        noted = note.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return (noted, str(note)) if noted else None


def probe_answers(address: str) -> bool | None:
    """Whether something listens at `host:port`; None for an address that names no port here."""
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


def probe_daemons() -> list[int]:
    """Process ids of this user's Ray daemons."""
    import psutil

    processes = psutil.process_iter(["name", "uids"])
    return [
        p.pid for p in processes if p.info["name"] == DAEMON and p.info["uids"] and p.info["uids"].real == os.getuid()
    ]


def probe_ports() -> list[int]:
    """Those of Ray's ports that something listens on."""
    return [port for port in PORTS if probe_answers(f"127.0.0.1:{port}")]


def cluster(joined: tuple[str, str] | None, *, answers: bool | None) -> Finding:
    """Which Ray a run uses."""
    if joined is None:
        return ok("Ray", "a run starts its own")
    address, source = joined
    if answers is False:
        fix = "unset RAY_ADDRESS" if source == "RAY_ADDRESS" else f"rm {source}"
        return fail("Ray", f"a run joins {address} ({source}), and nothing answers there", fix)
    if source == "RAY_ADDRESS":
        text = f"a local run joins {address} ({source}), whose other nodes do not get flashrl's environment"
        return warn("Ray", text, "`train --executor ray` submits it as a job")
    return warn("Ray", f"a run joins {address}, which `ray start` left running", "`ray stop` to have its own")


def daemons(pids: Sequence[int]) -> Iterator[Finding]:
    """Yield a warning for daemons of this user's: another run, or what a killed one left."""
    if pids:
        listed = ", ".join(map(str, pids))
        yield warn(
            "Ray daemons",
            f"{len(pids)} running (pid {listed}): another run, or one that was killed",
            "`ray stop` ends them all",
        )


def ports(used: Sequence[int]) -> Finding:
    """Whether Ray's ports are free; Ray takes others where it can."""
    if not used:
        return ok("ports", f"{', '.join(map(str, PORTS))} are free")
    return warn("ports", f"in use: {', '.join(f'{port} ({PORTS[port]})' for port in used)}: another Ray?", "`ray stop`")
