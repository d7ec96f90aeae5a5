"""The presets at a glance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli.config import presets
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flashrl_cli.config.spec import ResourceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One runnable preset in a line; `error` is set (and most else empty) for one that does not load.

    `tis` is the cap of truncated importance sampling, `gpus` the number of GPUs in all (0 on CPU), `devices` the same as
    text: machines × GPUs on each.
    """

    name: str
    description: str = ""
    model: str = ""
    advantage: str = ""
    rollout: str = ""
    tis: float | None = None
    gpus: int = 0
    devices: str = ""
    error: str | None = None


def catalog() -> Iterator[Summary]:
    """Yield a summary of every preset on the search path, by name."""
    for name in presets.names():
        try:
            yield _summary(name)
        except InputError as error:
            yield Summary(name=name, error=error.message)


def _summary(name: str) -> Summary:
    spec = load_spec(name).spec
    return Summary(
        name=name,
        description=spec.description,
        model=spec.model.path,
        advantage=spec.algorithm.advantage,
        rollout=spec.rollout.precision,
        tis=spec.correction.cap,
        gpus=_gpus(spec.resources),
        devices=_devices(spec.resources),
    )


def _gpus(resources: ResourceSpec) -> int:
    return 0 if resources.platform == "cpu" else resources.nodes * resources.gpus_per_node


def _devices(resources: ResourceSpec) -> str:
    if resources.platform == "cpu":
        return "CPU"
    return f"{resources.nodes} × {resources.gpus_per_node}" if resources.nodes > 1 else str(resources.gpus_per_node)
