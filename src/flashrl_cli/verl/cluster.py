"""What verl 0.9.1 and Ray take where a run joins a Ray cluster as a job, and not a Ray of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from flashrl_cli.verl.platform import METRICS_PATH

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.verl.overrides import Override

RAY_INIT = "ray_kwargs.ray_init"
ENV_VARS = f"{RAY_INIT}.runtime_env.env_vars"
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


def driver_only(overrides: Iterable[Override]) -> frozenset[str]:
    """Variables that must be in the driver's environment alone: verl hands them on, and Ray refuses to be told twice."""
    return VERL_VARIABLES.union(*(_variables(o.key, o.value) for o in overrides))


def without_shared_folder(env: Mapping[str, str], attempt: Path) -> dict[str, str]:
    """The environment where the attempt's folder is on no cluster node: verl makes folders below a root, not above a file."""
    return {key: value for key, value in env.items() if key != METRICS_PATH} | {LOGGER_ROOT: str(attempt / "node")}


def _makes_own_ray(key: str) -> bool:
    prefix = f"{RAY_INIT}."
    return key.startswith(prefix) and key.removeprefix(prefix).partition(".")[0] in OWN_RAY


def _variables(key: str, value: object) -> Iterator[str]:
    """Names of the variables that an override of `ray_kwargs` sets for the workers, however deep it is written."""
    if key.startswith(f"{ENV_VARS}."):
        yield key.removeprefix(f"{ENV_VARS}.")
    elif key == ENV_VARS and isinstance(value, Mapping):
        yield from value
    elif ENV_VARS.startswith(f"{key}.") and isinstance(value, Mapping):
        name = ENV_VARS.removeprefix(f"{key}.").partition(".")[0]
        yield from _variables(f"{key}.{name}", value.get(name))
