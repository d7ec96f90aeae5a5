"""What verl 0.9.1 and Ray take where a run joins a Ray cluster as a job, and not a Ray of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flashrl_cli.verl.platform import METRICS_PATH

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.verl.overrides import Override

RAY_INIT = "ray_kwargs.ray_init"
ENV_VARS = f"{RAY_INIT}.runtime_env.env_vars"
REFUSED_ON_A_CLUSTER = (
    *("num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "_system_config"),
    *("_enable_object_reconstruction", "_node_name"),
)
"""Arguments with which `ray.init` raises ValueError where it finds a cluster to join (ray/_private/worker.py:1936)."""
OWN_RAY = frozenset(
    {
        "num_cpus",
        "num_gpus",
        "resources",
        "labels",
        "object_store_memory",
        "_system_config",
        "_enable_object_reconstruction",
        "include_dashboard",
        "dashboard_host",
        "dashboard_port",
        "address",
        "_node_ip_address",
        "_temp_dir",
        "_redis_password",
        "_plasma_directory",
    }
)
"""Arguments of `ray.init` that make a Ray of one's own; it refuses most of them on a cluster (ray/_private/worker.py:1936)."""
VERL_VARIABLES = frozenset(
    {
        "VERL_FULL_DETERMINISM",
        "VLLM_BATCH_INVARIANT",
        "VERL_RL_INSIGHT_ENABLE",
        "PYTHONHASHSEED",
        "CUBLAS_WORKSPACE_CONFIG",
        "FLASH_ATTENTION_DETERMINISTIC",
        "NCCL_DETERMINISTIC",
        "NCCL_ALGO",
        "TRANSFER_QUEUE_ENABLE",
    }
)
"""Variables that verl hands to its workers itself, from the driver's environment or of its own accord
(verl/trainer/constants_ppo.py:141, verl/trainer/main_ppo.py:69); Ray refuses a job that sets them, too."""
CPUS_A_DEVICE = 3
"""Ray CPUs that verl takes with each GPU, on the GPU's node (verl/single_controller/ray/base.py:146 and 192)."""
LOGGER_ROOT = "VERL_FILE_LOGGER_ROOT"


def on_cluster(resolved: Resolved) -> Resolved:
    """The preset without the keys of verl's that make a Ray of one's own (a CPU preset has some)."""
    kept = {key: value for key, value in resolved.spec.verl.items() if not _makes_own_ray(key.removeprefix("+"))}
    dropped = {f"verl.{key}" for key in resolved.spec.verl.keys() - kept.keys()}
    return dataclasses.replace(
        resolved,
        spec=resolved.spec.model_copy(update={"verl": kept}),
        origins={key: origin for key, origin in resolved.origins.items() if key not in dropped},
    )


def ray_arguments(verl: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that `ray.init` gets of a preset's keys of verl, however deep they are written; null is none."""
    found: dict[str, Any] = {}
    for key, value in verl.items():
        found.update(_below(RAY_INIT, key.removeprefix("+"), value))
    return {name: value for name, value in found.items() if value is not None}


def worker_variables(verl: Mapping[str, Any]) -> dict[str, str]:
    """Variables that a preset's keys of verl set for Ray's workers alone."""
    found: dict[str, str] = {}
    for key, value in verl.items():
        found.update({name: str(text) for name, text in _below(ENV_VARS, key.removeprefix("+"), value).items()})
    return found


def driver_only(overrides: Iterable[Override]) -> frozenset[str]:
    """Variables that must be in the driver's environment alone: verl hands them on, and Ray refuses to be told twice."""
    return VERL_VARIABLES.union(*(_below(ENV_VARS, o.key, o.value) for o in overrides))


def without_shared_folder(env: Mapping[str, str], attempt: Path) -> dict[str, str]:
    """The environment where the attempt's folder is on no cluster node: verl makes folders below a root, not above a file."""
    return {key: value for key, value in env.items() if key != METRICS_PATH} | {LOGGER_ROOT: str(attempt / "node")}


def _makes_own_ray(key: str) -> bool:
    prefix = f"{RAY_INIT}."
    return key.startswith(prefix) and key.removeprefix(prefix).partition(".")[0] in OWN_RAY


def _below(parent: str, key: str, value: object) -> dict[str, Any]:
    """What a key and its value set directly below `parent`, which is written as a path of names or as maps."""
    if key.startswith(f"{parent}."):
        return {key.removeprefix(f"{parent}."): value}
    if isinstance(value, Mapping):
        if key == parent:
            return dict(value)
        if parent.startswith(f"{key}."):
            name = parent.removeprefix(f"{key}.").partition(".")[0]
            return _below(parent, f"{key}.{name}", value.get(name))
    return {}
