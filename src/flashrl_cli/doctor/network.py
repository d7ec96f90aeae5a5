"""The Hugging Face hub as it is set up here, and proxies. Only `resolves` uses the network."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from flashrl_cli.doctor.finding import Finding, ok, warn
from flashrl_cli.fit import known

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE = {"1", "on", "yes", "true"}
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOCAL = {"localhost", "127.0.0.1"}
hub_cache = known.hub_cache


def offline(environment: Mapping[str, str]) -> str | None:
    """The variable that keeps this machine off the hub, if one does."""
    return next((name for name in OFFLINE if environment.get(name, "").lower() in TRUE), None)


def resolves(environment: Mapping[str, str]) -> bool:
    """Whether the hub can be named, here or by a proxy; without that its libraries would try for half a minute."""
    if urllib.request.getproxies():
        return True
    host = urlsplit(environment.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def is_cached(model: str, cache: Path) -> bool:
    """Whether some revision of a hub model lies in the cache, as far as its config.json tells."""
    return any((cache / f"models--{model.replace('/', '--')}").glob("snapshots/*/config.json"))


def probe_token(environment: Mapping[str, str], home: Path) -> bool:
    """Whether there is a token for the hub: in the environment, or from `hf auth login`."""
    file = Path(environment.get("HF_TOKEN_PATH") or known.hub_home(environment, home) / "token").expanduser()
    return bool(environment.get("HF_TOKEN")) or file.is_file()


def hub(cache: Path, switch: str | None, *, token: bool, endpoint: str | None) -> Finding:
    """How models and data sets come from the hub; `switch` is the variable that keeps this machine off it."""
    where = f"cache {cache}"
    if switch:
        return ok("hub", f"switched off by {switch}; {where}")
    place = f" at {endpoint}" if endpoint else ""
    return ok("hub", f"switched on{place}, {'with a' if token else 'without'} token; {where}")


def proxies(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield how proxies stand, if any is set: gRPC and HTTP between a run's own processes must not go through one."""
    lowered = {name.lower(): value for name, value in environment.items()}
    used = [name for name in PROXIES if lowered.get(name)]
    if not used:
        return
    spared = {host.strip() for host in lowered.get("no_proxy", "").split(",")}
    if "*" in spared or spared >= LOCAL:
        yield ok("proxy", f"{', '.join(used)}, not for this machine itself")
    else:
        text = f"{', '.join(used)} would carry traffic between the run's own processes"
        yield warn("proxy", text, f"export no_proxy={','.join(sorted(LOCAL))}")
