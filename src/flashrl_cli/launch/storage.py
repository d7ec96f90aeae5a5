"""Is there what a run reads, and room for what it writes?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.doctor import network, space
from flashrl_cli.doctor.finding import Finding, fail, ok
from flashrl_cli.doctor.system import existing
from flashrl_cli.launch import smoothing
from flashrl_cli.launch.inputs import PROFILE, local_inputs
from flashrl_cli.paths import checkpoints_root
from flashrl_cli.verl import needs

if TYPE_CHECKING:
    from flashrl_cli.config.spec import RunSpec


def findings(spec: RunSpec, data_root: Path) -> Iterator[Finding]:
    """Yield how data, models and the disk for checkpoints stand to what `spec` asks for."""
    yield from _inputs(spec, data_root)
    yield from _models(spec, data_root)
    yield from _checkpoints(spec, data_root)


def _inputs(spec: RunSpec, data_root: Path) -> Iterator[Finding]:
    for key, path in local_inputs(spec, data_root).items():
        if key == PROFILE:
            yield smoothing.judge(path, local_inputs(spec, data_root).get("model.path"))
        elif path.exists():
            yield ok(key, str(path))
        else:
            yield fail(key, f"{path} does not exist", _how_to_make(path, data_root))


def _how_to_make(path: Path, data_root: Path) -> str:
    if path.is_relative_to(data_root):
        return f"`flashrl prepare {path.relative_to(data_root).parts[0]}`"
    return "check the path"


def _models(spec: RunSpec, data_root: Path) -> Iterator[Finding]:
    """Models that come from the hub: in its cache, or to be downloaded."""
    cache, switch = network.hub_cache(os.environ, Path.home()), network.offline(os.environ)
    for key, model in hub_models(spec, data_root).items():
        if network.is_cached(model, cache):
            yield ok(key, f"{model}, from {cache}")
        elif switch:
            yield fail(
                key, f"{model} is not in {cache}, and {switch} is set", f"unset {switch}, or copy the model there"
            )
        else:
            size = parameters(model, data_root)
            free = shutil.disk_usage(existing(cache)).free
            yield space.download(key, model, size and 2 * size, free, str(cache))


def hub_models(spec: RunSpec, data_root: Path) -> dict[str, str]:
    """Spec keys to the models that they name on the hub."""
    named = {"model.path": spec.model.path}
    if spec.algorithm.advantage == "gae" and spec.critic.path:
        named["critic.path"] = spec.critic.path
    here = local_inputs(spec, data_root)
    return {key: model for key, model in named.items() if key not in here}


def parameters(model: str, data_root: Path) -> int | None:
    """Parameter count of a model, as far as this machine knows its shape."""
    from flashrl_cli.fit import known, shape

    try:
        found = known.shape_of(model, data_root)
    except ValueError:
        return None
    return shape.parameters(found).total if found else None


def _checkpoints(spec: RunSpec, data_root: Path) -> Iterator[Finding]:
    size = parameters(spec.model.path, data_root)
    if size is not None and not os.environ.get("RAY_ADDRESS"):
        root = checkpoints_root()
        yield space.checkpoints(
            needs.checkpoint_bytes(spec, size),
            needs.checkpoints_kept(spec),
            shutil.disk_usage(existing(root)).free,
            nodes=spec.resources.nodes,
            folder=str(root),
            keep_fewer=needs.KEEP_ONE,
        )
