"""The front of speed against KL: which variants no other one beats in both, and which of them to take.

A variant beats another if it is no slower and no farther from the trainer, and faster or nearer. Speeds differ if the
repeats of one are all faster than those of the other, KLs if they are two standard errors apart. Of the variants that
none beats, the one to take has the most effective tokens a second: its speed times the effective sample size of its
importance weights, which is what the variance of the correction leaves of the tokens (bench/scorer.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from flashrl_cli.precision import joined
from flashrl_cli.text import counted

_ERRORS = 2.0
"""Standard errors by which two KLs that count as different are apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A variant at one batch: tokens per second of each repeat, and its mismatch.

    `kl` is in nats a token with its standard error `kl_error`, `effective` the effective sample size as a fraction.
    """

    name: str
    values: Sequence[float]
    kl: float
    kl_error: float
    effective: float

    @classmethod
    def of(cls, name: str, values: Sequence[float], mismatch: Mapping[str, Any]) -> Point:
        """The point of a variant with these speeds and the `mismatch` of a benchmark's document."""
        kl = mismatch["kl"]
        # documents of earlier versions have no error
        error = kl.get("k3_error", 0.0)
        effective = mismatch["token_weights"]["effective"]
        return cls(name=name, values=values, kl=kl["k3"], kl_error=error, effective=effective)

    @property
    def speed(self) -> float:
        """Median of the repeats."""
        return median(self.values)

    def faster(self, other: Point) -> bool:
        """Whether all its repeats are faster than those of the other."""
        return min(self.values) > max(other.values)

    def nearer(self, other: Point) -> bool:
        """Whether it is nearer to the trainer by more than the errors of both."""
        return other.kl - self.kl > _ERRORS * math.hypot(self.kl_error, other.kl_error)

    def beats(self, other: Point) -> bool:
        """Whether it is better in speed or KL, and worse in neither."""
        worse = other.faster(self) or other.nearer(self)
        return not worse and (self.faster(other) or self.nearer(other))


@dataclass(frozen=True)
class Front:
    """The points of one batch, in the order of the variants."""

    batch: int
    points: Sequence[Point]

    @property
    def title(self) -> str:
        """Its batch in words."""
        return counted(self.batch, "sequence") if self.batch else "as many sequences as fit"

    @cached_property
    def best(self) -> list[Point]:
        """The points that no other one beats, the nearest to the trainer first."""
        found = [one for one in self.points if not any(other.beats(one) for other in self.points)]
        # where one point's KL is hardly known, each may be beaten by another one
        return sorted(found or self.points, key=lambda one: one.kl)

    @property
    def taken(self) -> Point:
        """The one of `best` with the most effective tokens a second."""
        return max(self.best, key=lambda one: one.speed * one.effective)

    def beaten(self) -> Iterator[tuple[Point, Point]]:
        """Each beaten point with the one that beats it: the one to take if it does, otherwise the nearest."""
        for one in self.points:
            if one not in self.best:
                yield one, next(other for other in (self.taken, *self.best, *self.points) if other.beats(one))

    def sentence(self, base: str | None) -> str:
        """What to take and why, with speeds relative to those of `base` if it was measured."""
        reference = next((one for one in self.points if one.name == base), None)
        where = f"{'at' if self.batch else 'with'} {self.title}"
        once = " (measured once)" if min(len(one.values) for one in self.points) < 2 else ""
        parts = [f"{where}, by speed{once} and KL: take {self.taken.name}, {_place(self.taken, reference)}"]
        if others := [f"{one.name} ({_place(one, reference)})" for one in self.best if one is not self.taken]:
            parts.append(f"not beaten either: {joined(others, 'and')}")
        parts += [_comparison(winner, one) for one, winner in self.beaten()]
        return "; ".join(parts)

    def document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        beaten = {one.name: winner.name for one, winner in self.beaten()}
        return {
            "batch": self.batch,
            "take": self.taken.name,
            "points": [
                {
                    "rollout": one.name,
                    "tokens_s": one.speed,
                    "values": list(one.values),
                    "kl": one.kl,
                    "kl_error": one.kl_error,
                    "effective": one.effective,
                    "beaten_by": beaten.get(one.name),
                }
                for one in self.points
            ],
        }


def fronts(speeds: Mapping[str, Mapping[int, Sequence[float]]], mismatches: Mapping[str, Any]) -> list[Front]:
    """The front of each batch at which two or more variants have a speed and a mismatch.

    `speeds` has the tokens per second of each repeat by variant and batch, `mismatches` the scorer's statistics by
    variant.
    """
    found = []
    for batch in sorted({batch for by_batch in speeds.values() for batch in by_batch}):
        points = [
            Point.of(name, by_batch[batch], mismatches[name])
            for name, by_batch in speeds.items()
            if batch in by_batch and name in mismatches
        ]
        if len(points) > 1:
            found.append(Front(batch, points))
    return found


def _place(one: Point, reference: Point | None) -> str:
    speed = f"{one.speed / reference.speed:.2f}x of {reference.name}" if reference else f"{one.speed:,.0f} tokens/s"
    return f"KL {one.kl:.2g}" if one is reference else f"{speed}, KL {one.kl:.2g}"


def _comparison(winner: Point, loser: Point) -> str:
    ratio = f"{winner.speed / loser.speed:.2f}"
    speed = f"{ratio}x as fast as" if winner.faster(loser) and ratio != "1.00" else "as fast as"
    times = f"{loser.kl / winner.kl:.1f} times nearer" if winner.kl > 0 else "nearer"
    near = times if winner.nearer(loser) else "as near"
    return f"{winner.name} is {speed} {loser.name} and {near}"
