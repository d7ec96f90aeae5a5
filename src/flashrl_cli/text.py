"""Counts, sizes and units as text, for messages and tables."""

from __future__ import annotations

GIB = 2**30
"""Bytes in a GiB, the unit of memory sizes; file sizes use powers of ten (see `size`)."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: `1 checkpoint`, `1,200 rows`; `many` is the plural if it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def size(count: int) -> str:
    """A number of bytes with its unit: `393 GB`, `4.4 MB`."""
    for unit, step in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count / 1000:.3g} kB"


def binary_size(count: float) -> str:
    """A number of bytes with its binary unit: `512 B`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float | None) -> str:
    """A duration, more exact the shorter it is: `45 s`, `12 min`, `3 h 20 min`, `5 d`; "–" for None."""
    if seconds is None:
        return "–"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days >= 2:
        return f"{days} d"
    if hours:
        return f"{hours} h {minutes % 60} min" if minutes % 60 else f"{hours} h"
    return f"{minutes} min" if minutes >= 3 else f"{seconds:.0f} s"


def age(seconds: float) -> str:
    """An age in the largest unit of which it has at least two: `119 s`, `2 min`, `47 h`, `2 d`; the future is `0 s`."""
    seconds = max(seconds, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
