"""Who is told what happens in a run: `render.live` shows it, `launch.recording` writes it down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from flashrl_cli.contract import Handshake
    from flashrl_cli.verl.metrics import StepMetrics


class Display(Protocol):
    """Who is told what happens."""

    def expect(self, total: int) -> None:
        """The run will have `total` steps."""

    def phase(self, text: str) -> None:
        """Something else is being done now."""

    def proven(self, shakes: list[Handshake]) -> None:
        """The rollout workers proved their precision."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def tick(self) -> None:
        """Time passes."""
