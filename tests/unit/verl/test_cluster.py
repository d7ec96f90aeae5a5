"""What verl is told, and not told, where it joins a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.config.layers import Origin
from flashrl_cli.config.resolve import Resolved, load_spec
from flashrl_cli.errors import Location
from flashrl_cli.verl.environment import VERL_VARIABLES, driver_only, on_cluster, without_shared_folder
from flashrl_cli.verl.overrides import Override, Places, Value, overrides

WHY = Origin("option", Location("--set"))
PLACES = Places(name="r", data=Path("/data"), checkpoints=Path("/c"))


def override(key: str, value: Value) -> Override:
    return Override(key, value, WHY, added=True)


def keys(resolved: Resolved) -> set[str]:
    return {override.key for override in overrides(resolved, PLACES)}


def test_the_cpu_platform_brings_no_ray_of_its_own() -> None:
    before, after = load_spec("tiny"), on_cluster(load_spec("tiny"))
    dropped = {
        "ray_kwargs.ray_init.num_gpus",
        "ray_kwargs.ray_init.num_cpus",
        "ray_kwargs.ray_init.include_dashboard",
    }
    assert keys(before) - keys(after) == dropped
    assert keys(after) < keys(before)
    assert not [key for key in after.origins if "ray_init" in key]


def test_a_gpu_preset_stays_as_it_is() -> None:
    found = load_spec("dapo-32b")
    assert on_cluster(found).spec == found.spec
    assert on_cluster(found).origins == found.origins


@pytest.mark.parametrize(
    ("key", "stays"),
    [
        ("+ray_kwargs.ray_init.runtime_env.env_vars.A", True),
        ("+ray_kwargs.ray_init.log_to_driver", True),
        ("ray_kwargs.timeline_json_file", True),
        ("+ray_kwargs.ray_init.resources.big", False),
        ("+ray_kwargs.ray_init.address", False),
        ("ray_kwargs.ray_init.num_cpus", False),
        ("+data.num_cpus", True),
    ],
)
def test_which_keys_make_a_ray_of_ones_own(key: str, stays: bool) -> None:
    kept = on_cluster(load_spec("dapo-32b", sets=[f"verl.{key}=1"])).spec.verl
    assert (key in kept) is stays


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ray_kwargs.ray_init.runtime_env.env_vars.MINE", "1"),
        ("ray_kwargs.ray_init.runtime_env.env_vars", {"MINE": "1"}),
        ("ray_kwargs.ray_init.runtime_env", {"env_vars": {"MINE": "1"}}),
        ("ray_kwargs.ray_init", {"runtime_env": {"env_vars": {"MINE": "1"}}}),
    ],
)
def test_variables_that_verl_hands_on_are_the_drivers_alone(key: str, value: Value) -> None:
    assert driver_only([override(key, value)]) == VERL_VARIABLES | {"MINE"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ray_kwargs.ray_init.runtime_env", {"working_dir": "/x"}),
        ("ray_kwargs.ray_init.runtime_env", None),
        ("ray_kwargs.ray_init.runtime_env.env_vars_of_mine.A", 1),
        ("data.env_vars.A", 1),
    ],
)
def test_other_keys_name_none(key: str, value: Value) -> None:
    assert driver_only([override(key, value)]) == VERL_VARIABLES


def test_metrics_lie_below_a_root_that_verl_makes_itself() -> None:
    env = {"VERL_FILE_LOGGER_PATH": "/runs/r/attempt_1/metrics.jsonl", "A": "1"}
    assert without_shared_folder(env, Path("/runs/r/attempt_1")) == {
        "A": "1",
        "VERL_FILE_LOGGER_ROOT": "/runs/r/attempt_1/node",
    }
