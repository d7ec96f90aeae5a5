"""Keeps a run's record true while its attempt goes on: a display that writes down what it is told and passes it on."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from flashrl_cli.runs import record
from flashrl_cli.runs.record import Phase

if TYPE_CHECKING:
    from flashrl_cli.contract import Handshake
    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.runs.display import Display
    from flashrl_cli.verl.metrics import StepMetrics


class Recording:
    """Writes each event of one attempt into the record, then tells `display`.

    A reader that went away (a closed pipe or terminal) does not end a run by itself: what ends it is a signal.
    """

    def __init__(self, display: Display, plan: LaunchPlan) -> None:
        self.display, self.plan = display, plan
        self._phases: tuple[Phase, ...] = ()

    def expect(self, total: int) -> None:
        """The run will have `total` steps."""
        self._renew(total_steps=total)
        with contextlib.suppress(OSError):
            self.display.expect(total)

    def phase(self, text: str) -> None:
        """Something else is being done now."""
        self._phases = (*self._phases, Phase(name=text, began=record.now()))
        self._renew(phases=self._phases)
        with contextlib.suppress(OSError):
            self.display.phase(text)

    def proven(self, shakes: list[Handshake]) -> None:
        """The rollout workers proved their precision."""
        self._renew(proof=tuple(dataclasses.asdict(shake) for shake in shakes))
        with contextlib.suppress(OSError):
            self.display.proven(shakes)

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""
        if metrics.trained:
            self._renew(last_step=metrics.step)
        with contextlib.suppress(OSError):
            self.display.step(metrics)

    def tick(self) -> None:
        """Time passes."""
        with contextlib.suppress(OSError):
            self.display.tick()

    def _renew(self, **changes: Any) -> None:
        # a full disk must not end a run that could go on: what is missing here is in the log and the metrics
        with contextlib.suppress(OSError):
            record.renew(self.plan.paths, self.plan.attempt, **changes)
