"""What is known of each kind of rollout, as it grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashrl_cli.bench.points import Point
    from flashrl_cli.bench.variants import Variant


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a variant, or the rest of it, has no figures. `left_out` says that the budget had no room, which is no failure."""

    message: str
    hint: str | None = None
    left_out: bool = False


@dataclass(slots=True)
class Measured:
    """What is known of a variant: results by point, and what went wrong."""

    variant: Variant
    points: tuple[Point, ...]
    results: dict[Point, dict[str, Any]] = field(default_factory=dict)
    failure: Failure | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[Point]:
        """Points without a result."""
        return [point for point in self.points if point not in self.results]

    def of(self, kind: str) -> list[tuple[Point, dict[str, Any]]]:
        """Points of a kind that have a result."""
        return [(point, result) for point, result in self.results.items() if point.kind == kind]
