"""Where a plan runs: something that was started, is watched, and can be ended. `process.Tree` and `ray.job.RayJob` are such."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from flashrl_cli.launch.plan import LaunchPlan


class Handle(Protocol):
    """A plan under way. Its log, metrics and handshakes appear in the attempt's folder while `tend` is called."""

    def poll(self) -> int | None:
        """Exit code of the command, None while it runs; a signal's number negative."""

    def tend(self) -> None:
        """Do what keeps the handle true; called several times a second."""

    def terminate(self) -> None:
        """Ask the command to end."""

    def kill(self, *, grace_s: float = 0.0) -> None:
        """End everything that it started, at the latest after `grace_s` by force, and wait until none is left."""


Start = Callable[["LaunchPlan"], Handle]
"""Starts a plan; raises EnvironmentNotReady where it cannot."""
