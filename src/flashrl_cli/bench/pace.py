"""How long the points that are left will take, told from those that are done, and whether a budget of time has room for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from flashrl_cli.bench.points import SPEED
from flashrl_cli.bench.request import FIT

if TYPE_CHECKING:
    from flashrl_cli.bench.points import Point


class Pace:
    """Seconds of points by what they are like; `budget` in seconds counts from the beginning, None is no limit."""

    def __init__(self, budget: float | None, clock: Callable[[], float]) -> None:
        self._budget, self._clock = budget, clock
        self._began = clock()
        self._seconds: dict[tuple[str, int], float] = {}

    def note(self, point: Point, seconds: float) -> None:
        """A point took so long."""
        self._seconds[point.like] = seconds

    def expected(self, point: Point) -> float | None:
        """Seconds that a point will take at most; None if nothing like it was measured. A larger batch takes no more a sequence."""
        if point.like in self._seconds:
            return self._seconds[point.like]
        batch = point.asked.get("batch", FIT)
        # how many sequences fit is known to the engine alone
        speeds = ((size, seconds) for (kind, size), seconds in self._seconds.items() if kind == point.kind == SPEED)
        others = {size: seconds for size, seconds in speeds if FIT not in {size, batch}}
        nearest = min(others, key=lambda size: abs(size - batch), default=None)
        return None if nearest is None else others[nearest] * max(1.0, batch / nearest)

    def fits(self, points: Iterable[Point]) -> bool:
        """Whether the budget has room for `points`; one that nothing is known of counts as nothing."""
        if self._budget is None:
            return True
        return self._clock() - self._began + sum(self.expected(point) or 0.0 for point in points) <= self._budget

    def left(self, points: Iterable[Point]) -> str:
        """How long `points` will take, in words; empty where nothing is known of any."""
        expected = [self.expected(point) for point in points]
        known = [seconds for seconds in expected if seconds is not None]
        if not known:
            return ""
        told = f"{sum(known) / 60:.0f} min" if sum(known) >= 90 else f"{sum(known):.0f} s"
        return f"{'about' if len(known) == len(expected) else 'more than'} {told} left"
