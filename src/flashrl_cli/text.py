"""Counts, sizes and units as text, for messages and tables."""

from __future__ import annotations

GIB = 2**30
"""Bytes in a GiB, the unit of memory; files are counted in powers of ten (see `size`)."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: `1 checkpoint`, `1,200 rows`; `many` is the plural where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def size(count: int) -> str:
    """A number of bytes with its unit: `393 GB`, `4.4 MB`."""
    for unit, step in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count / 1000:.3g} kB"
