"""A Ray job that prints the resources of each node: `python -m flashrl_cli.train.executors.ray_nodes REQUEST`.

The task for each node is sent by value, as functions of `__main__` are, so that it also runs on nodes without flashrl.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

MARK = "FLASHRL_NODES "
"""Marks the beginning of the answer among Ray's own lines."""
ANSWER_S = 90.0
"""Seconds that all nodes together may take to answer; each starts a worker for it."""


def examine(request: dict[str, Any]) -> dict[str, Any]:
    """Run on a node: versions of `distributions`, which `paths` exist, what `tokens` contain, where the plugins are.

    `variables` are environment variables of the node that its workers would inherit.
    """
    import contextlib  # the function is sent by value and has only the names in its own body
    import os
    import platform
    import subprocess
    from importlib import metadata
    from pathlib import Path

    versions = {"python": platform.python_version()}
    for name in request["distributions"]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    tokens = {}
    for name, path in request["tokens"].items():
        with contextlib.suppress(OSError):
            tokens[name] = Path(path).read_text(encoding="utf-8")
    gpus = ""
    if request["gpu_query"]:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = subprocess.run(request["gpu_query"], capture_output=True, timeout=20, check=False)
            gpus = query.stdout.decode("utf-8", "replace")
    return {
        "versions": versions,
        "missing": [key for key, path in request["paths"].items() if not Path(path).exists()],
        "tokens": tokens,
        "plugins": [group for group in request["plugins"] if metadata.entry_points(group=group, name="flashrl")],
        "gpus": gpus,
        "variables": {name: os.environ[name] for name in request["variables"] if name in os.environ},
    }


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Every live node with its resources, and its answer or the reason why there is none; call it within a Ray job.

    `made` are files that this node creates so that the other nodes can look for them.
    """
    import ray
    from ray._private.state import available_resources_per_node  # the function that verl uses
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False, logging_level="ERROR")
    alive = (node for node in ray.nodes() if node["Alive"])
    nodes = sorted(alive, key=lambda node: str(node["NodeManagerAddress"]))  # Ray lists them in any order
    free = available_resources_per_node()
    refused = _make(request["made"], request["secret"])
    task = ray.remote(num_cpus=0, max_retries=0)(examine)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            request
        ): node
        for node in nodes
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    answers = [_answer(ray, ref, node, free.get(node["NodeID"], {})) for ref, node in asked.items()]
    for path in request["made"].values():
        with contextlib.suppress(OSError):
            Path(path).unlink()
    return {"nodes": answers, "refused": refused}


def _make(files: dict[str, str], text: str) -> dict[str, str]:
    refused = {}
    for name, path in files.items():
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            refused[name] = str(error)
    return refused


def _answer(ray: Any, ref: Any, node: dict[str, Any], free: dict[str, float]) -> dict[str, Any]:
    known = {
        "id": node["NodeID"],
        "address": node["NodeManagerAddress"],
        "devices": node["Resources"].get("GPU", 0.0),
        "free_devices": free.get("GPU", 0.0),
        "free_cpus": free.get("CPU", 0.0),
    }
    try:
        return {**known, **ray.get(ref, timeout=0.1), "error": None}
    except Exception as error:  # noqa: BLE001 - whatever keeps a node from answering is its answer
        return known | {"error": str(error).strip().splitlines()[-1][:300] or type(error).__name__}


if __name__ == "__main__":
    print(MARK + json.dumps(ask(json.loads(sys.argv[1]))), flush=True)
