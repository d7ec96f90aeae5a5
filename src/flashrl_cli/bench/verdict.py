"""What the measured speeds say in sentences, no more exactly than repeats of the same measurement agree.

A speed-up lies between the slowest repeat over the fastest of bf16 and the other way round; where that includes 1, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from flashrl_cli.text import counted


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """Median over median, and the least and greatest that repeats allow."""

    value: float
    least: float
    greatest: float

    @property
    def told(self) -> str:
        """As `1.45x`, with its bounds where these round to something else."""
        bounds = f"{self.least:.2f} to {self.greatest:.2f}"
        return f"{self.value:.2f}x" + ("" if f"{self.least:.2f}" == f"{self.greatest:.2f}" else f" ({bounds})")

    @property
    def sure(self) -> bool:
        """Whether the repeats tell faster from slower."""
        return not self.least <= 1 <= self.greatest


Speeds = Mapping[int, Sequence[float]]
"""Tokens a second of each repeat, by batch."""


def speed_up(values: Sequence[float], base: Sequence[float]) -> SpeedUp:
    """Of repeats over those of the base."""
    return SpeedUp(median(values) / median(base), min(values) / max(base), max(values) / min(base))


def sentences(speeds: Mapping[str, Speeds], base: str | None) -> Iterator[str]:
    """What the speeds of variants say against those of `base`; nothing where there is nothing to compare with."""
    against = speeds.get(base or "", {})
    others = {name: by_batch for name, by_batch in speeds.items() if name != base}
    for batch in sorted(against):
        found = {name: speed_up(by[batch], against[batch]) for name, by in others.items() if batch in by}
        if found:
            yield _sentence(batch, found, base or "", single=len(against[batch]) < 2)


def _sentence(batch: int, found: Mapping[str, SpeedUp], base: str, *, single: bool) -> str:
    where = f"at {counted(batch, 'sequence')}" if batch else "with as many sequences as fit"
    if single:
        told = ", ".join(f"{name} {one.value:.2f}x" for name, one in found.items())
        return f"{where}: {told}, measured once each, so that small differences mean nothing"
    faster = {name: one for name, one in found.items() if one.least > 1}
    best, fastest = max((faster or found).items(), key=lambda one: one[1].value)
    same = [name for name, one in found.items() if not one.sure]
    if same and not faster:
        slower = [f"{name} is slower, {one.told}" for name, one in found.items() if one.sure]
        lies = f"what lies between {base} and {', '.join(same)} is within the spread of the repeats"
        return f"{where}: {'; '.join([lies, *slower])}: take {base}"
    if not faster:
        return f"{where}: take {base}; the closest is {best}, {fastest.told}"
    rivals = [name for name, one in found.items() if name != best and one.greatest >= fastest.least]
    close = f"; {', '.join(rivals)} as fast within the spread of the repeats" if rivals else ""
    return f"{where}: {best} gives {fastest.told} of {base}{close}"
