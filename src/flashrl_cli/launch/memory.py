"""Will a plan fit on the GPUs that it is meant for?"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.fit import estimate, known, report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.fit.shape import ModelShape
    from flashrl_cli.verl.compose import Tree

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is known of a run's memory: an estimate on GPUs of some size, or why there is none."""

    gpu: str = ""
    """Where the GPU's size is from."""
    estimate: estimate.Estimate | None = None
    unknown: str = ""

    @property
    def lines(self) -> list[str]:
        """For people."""
        if self.estimate is None:
            return [f"memory: not estimated, {self.unknown}"]
        return [f"memory of each GPU ({self.gpu}), estimated:", *report.block(self.estimate)]

    @property
    def warning(self) -> str | None:
        """What deserves attention before a launch."""
        if self.estimate is None or self.estimate.verdict == "fits":
            return None
        return "; ".join(report.summary(self.estimate))

    def document(self) -> dict[str, Any]:
        """For programs."""
        if self.estimate is None:
            return {"unknown": self.unknown}
        return {"gpu": self.gpu, **estimate.document(self.estimate)}


def shape(model: str) -> ModelShape | None:
    """Shape of a model, from what is on this machine; None where that tells nothing, or of something else than a decoder."""
    with contextlib.suppress(ValueError):
        return known.shape_of(model, paths.data_root())
    return None


def of_plan(resolved: Resolved, tree: Tree, gpus: Sequence[int] = ()) -> Memory:
    """Memory of a run on this machine's `gpus` (bytes of each), or as `resources.gpu_memory_gib` says, or on 80 GB GPUs."""
    spec = resolved.spec
    if spec.resources.platform == "cpu":
        return Memory(unknown="it is estimated for GPUs only")
    try:
        policy = known.shape_of(spec.model.path, paths.data_root())
        critic = known.shape_of(spec.critic.path, paths.data_root()) if spec.critic.path else None
        if policy is None:
            return Memory(unknown=f"no config.json of {spec.model.path} on this machine")
        size, source = _gpu(spec, gpus)
        return Memory(gpu=source, estimate=estimate.estimate(resolved, tree, policy, critic, size))
    except ValueError as error:
        return Memory(unknown=str(error))


def _gpu(spec: RunSpec, gpus: Sequence[int]) -> tuple[int, str]:
    given = spec.resources.gpu_memory_gib
    if given is not None:
        return round(given * GIB), "resources.gpu_memory_gib"
    if gpus:
        return min(gpus), "this machine's"
    return estimate.H100_BYTES, "80 GB assumed"
