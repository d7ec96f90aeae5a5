"""What differs between two sets of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flashrl_cli.config.text import text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ABSENT: Final = object()
"""The value of a key on the side that does not have it."""


class Verbatim(str):
    """Text that is shown as it is: a value in another language than a preset's."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """A key whose values differ; `origin` is the second one's, empty where nobody recorded it."""

    key: str
    a: Any
    b: Any
    origin: str = ""

    def shown(self) -> tuple[str, str]:
        """Both values as text; a side that lacks the key is "–"."""
        return _shown(self.a), _shown(self.b)

    def data(self) -> dict[str, Any]:
        """The same as plain data; the side that lacks the key is left out."""
        sides = {name: value for name, value in (("a", self.a), ("b", self.b)) if value is not ABSENT}
        return {"key": self.key, **sides, "origin": self.origin}


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], origins: Mapping[str, str] | None = None
) -> Iterator[Difference]:
    """Yield the keys that differ, in `a`'s order, then those that `b` alone has; `origins` are those of `b`'s values.

    Values differ when their texts do: 1, 1.0 and true are three values to verl.
    """
    for key in {**a, **b}:
        difference = Difference(key, a.get(key, ABSENT), b.get(key, ABSENT), (origins or {}).get(key, ""))
        if len(set(difference.shown())) == 2:
            yield difference


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "–"
    return value if isinstance(value, Verbatim) else text_of(value)
