"""An estimate as sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashrl_cli.fit.items import GIB

if TYPE_CHECKING:
    from flashrl_cli.fit.estimate import Estimate
    from flashrl_cli.fit.phases import Phase

MARKS = {"fits": "✓", "tight": "!", "over": "✗"}


def summary(found: Estimate) -> list[str]:
    """The verdict, the KV cache and the advice, a line each."""
    peak = found.peak
    padding = f" ({_gib(found.least)} without padding)" if found.least < peak.bytes else ""
    size = f"{_gib(peak.bytes)}{padding} of {_gib(found.gpu_bytes)} GiB"
    lines = [
        f"{MARKS[found.verdict]} {found.verdict}: {size} a GPU, most in {peak.name}",
        f"KV cache of an engine: {found.kv_tokens:,} tokens; its batch at full length: {found.wanted_tokens:,}",
    ]
    if not found.starts:
        lines.append("the KV cache does not hold one sequence of the longest length: vLLM would not start")
    if found.advice:
        lines.append(f"{'to fit' if found.advice.fits else 'most would help'}: {found.advice}")
    return lines


def block(found: Estimate) -> list[str]:
    """An estimate as at most ten lines of plain text: the summary, with the three largest items of each phase after its verdict."""
    verdict, *others = summary(found)
    return [verdict, *(_phase(phase) for phase in found.phases), *others]


def _phase(phase: Phase) -> str:
    largest = sorted(phase.items, key=lambda part: -part.bytes)[:3]
    parts = ", ".join(f"{part.name} {_gib(part.bytes)}" for part in largest)
    return f"  {phase.name:<13} {_gib(phase.bytes):>6} GiB: {parts}"


def _gib(size: int) -> float:
    return round(size / GIB, 1)
