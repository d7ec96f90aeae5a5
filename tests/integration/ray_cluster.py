"""A Ray cluster of two nodes on one machine: two raylets with addresses of their own, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HEAD, OTHER = "127.0.0.2", "127.0.0.3"


def free_port(host: str = HEAD) -> int:
    """A port below those that the system gives to whoever asks for any: no other process takes it before its server
    does.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind((host, port))
            return port


@dataclass
class Cluster:
    """`ray start --block` of each node, by address. Everything that they started is theirs to end."""

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    known: dict[str, set[psutil.Process]] = field(default_factory=dict)
    gcs: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)

    @property
    def address(self) -> str:
        return f"http://{HEAD}:{self.dashboard}"

    @property
    def env(self) -> dict[str, str]:
        """What a user of the cluster has in the environment; Ray's client takes the token when it is asked for one."""
        return {"RAY_AUTH_TOKEN": self.token, "RAY_TMPDIR": str(self.folder)}

    def start(self) -> None:
        own = [
            "--head",
            f"--port={self.gcs}",
            f"--dashboard-port={self.dashboard}",
            f"--dashboard-host={HEAD}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.folder}",
        ]
        self._start(HEAD, own)
        self._wait(f"{self.address}/api/version", 600)
        self.add()

    def add(self) -> None:
        """Start the second node."""
        self._start(OTHER, [f"--address={HEAD}:{self.gcs}"])
        deadline = time.monotonic() + 600
        while not any("raylet" in process.name() for process in self.processes(OTHER)):
            assert time.monotonic() < deadline, "the second node does not start"
            time.sleep(0.5)

    def processes(self, node: str) -> set[psutil.Process]:
        """All that a node started so far and that still runs."""
        known = self.known.setdefault(node, set())
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.nodes[node].pid)
            known |= {process, *process.children(recursive=True)}
            for child in list(known):
                with contextlib.suppress(psutil.NoSuchProcess):
                    known.update(child.children(recursive=True))
        return {process for process in known if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}

    def lose(self, node: str) -> None:
        """Pull the plug."""
        for process in sorted(self.processes(node), key=lambda p: p.name() != "raylet"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes[node].wait(60)

    def stop(self) -> None:
        """End every node, asked first and then not."""
        left = [process for node in self.nodes for process in self.processes(node)]
        for started in self.nodes.values():
            started.terminate()
        _, left = psutil.wait_procs(left, timeout=20)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=60)
        for started in self.nodes.values():
            started.wait(60)

    def _start(self, node: str, options: list[str]) -> None:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={node}", "--num-gpus=1", "--num-cpus=8", "--object-store-memory=200000000"),
            *(f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"),
            *options,
        ]
        env = {**os.environ, **self.env, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        env.pop("RAY_ADDRESS", None)
        with (self.folder / f"{node}.log").open("wb") as log:
            self.nodes[node] = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)

    def _wait(self, url: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token}"})
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
                return
            head = (self.folder / f"{HEAD}.log").read_text(errors="replace")
            assert self.nodes[HEAD].poll() is None and time.monotonic() < deadline, head[-3000:]  # noqa: PT018
            time.sleep(0.5)


@contextlib.contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A running cluster, which is gone afterwards."""
    # pytest's own folders are too long for Ray's sockets
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="ray-")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)
