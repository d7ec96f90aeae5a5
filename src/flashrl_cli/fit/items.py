"""One share of a GPU's memory, with the formula that it came from."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
MARGIN = 0.1
"""Share by which an item may be larger than estimated."""
FRAGMENTS = 0.3
"""The same for what a pass allocates and frees: the caching allocator held 30 to 33 % more than that, see docs/memory.md."""


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes on one GPU; `margin` is the share that may come on top, 0 for a budget that the engine keeps to."""

    name: str
    bytes: int
    formula: str
    margin: float = MARGIN


def item(name: str, size: float, formula: str, *, margin: float = MARGIN) -> Item:
    """An item of `size` bytes, rounded."""
    return Item(name, round(size), formula, margin)


def total(items: tuple[Item, ...]) -> int:
    """Bytes of all items together."""
    return sum(part.bytes for part in items)
