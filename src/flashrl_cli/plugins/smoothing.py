"""A smoothing profile applied to every weight update, before anything is quantized.

Tensors come in memory that verl uses again or that other processes share: what is smoothed is new, one tensor at a time, and the rest
passes as it is. The scales are moved to the device once and stay there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import contract
from flashrl_cli.weights import Unreadable
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    import torch

    Bucket = Iterable[tuple[str, torch.Tensor]]


class Smoothing:
    """One weight update under a profile, or under none."""

    def __init__(self, profile: Profile | None, device: torch.device) -> None:
        self._profile, self._device = profile, device
        self._changed: set[str] = set()

    def bucket(self, weights: Bucket) -> Bucket:
        """The bucket, smoothed on the engine's device while it is read."""
        return weights if self._profile is None else self._smoothed(weights, self._profile)

    def _smoothed(self, weights: Bucket, profile: Profile) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name not in profile.lengths:
                yield name, tensor
                continue
            self._changed.add(name)
            yield name, profile.apply(name, tensor.to(self._device))

    def finish(self) -> int:
        """How many tensors were smoothed. Raises Unreadable if the profile names more: the engine then holds no policy at all."""
        lacking = sorted(self._profile.names - self._changed) if self._profile else []
        if lacking:
            what = f"the weight update lacked {len(lacking)} tensors that the profile smooths, {lacking[0]} among them"
            raise Unreadable(what)
        return len(self._changed)


def profile_here() -> Profile | None:
    """The profile of this process's engine. Raises Unreadable."""
    path = contract.RolloutOptions.here().profile
    return None if path is None else _read(Path(path))


@cache
def _read(path: Path) -> Profile:
    return Profile.read(path)
