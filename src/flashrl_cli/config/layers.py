"""Merges layers of configuration, keeping the origin of every value, and compares two configurations."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from flashrl_cli.config.yaml_file import text_of

if TYPE_CHECKING:
    from flashrl_cli.errors import Location


class Origin(NamedTuple):
    """Where a value comes from: the type of its layer, and where it was written or why it was derived."""

    layer: Literal["default", "preset", "option", "set", "derived"]
    where: Location | None = None
    reason: str = ""

    def __str__(self) -> str:
        return str(self.where or (f"derived: {self.reason}" if self.layer == "derived" else "default"))


DEFAULT = Origin("default")
FLAG_OF = {"rollout.precision": "--rollout", "correction.cap": "--tis"}
"""Keys that have a command-line option besides `--set`."""


def option(key: str, value: Any, where: Location | None) -> str:
    """The command-line option that gives a key another value, with shell quoting.

    If `where` names the option that set the key, that option is used; it is `--sweep` with the sweep's own name for the
    key if a sweep varies it.
    """
    if (key, value) == ("correction.kind", "tis") and where and "tis" in (where.key, where.source.removeprefix("--")):
        key, value = "correction.cap", 2  # `--tis` takes a cap, and sets the kind with it
    text = value if isinstance(value, str) else text_of(value)
    if where and where.source == "--sweep":
        return f"--sweep {shlex.quote(f'{where.key}={text}')}"
    if key in FLAG_OF and not (where and where.source == "--set"):
        return f"{FLAG_OF[key]} {text}"
    return f"--set {shlex.quote(f'{key}={text}')}"


@dataclass(frozen=True, slots=True)
class Layer:
    """Values of one origin: a preset file (with the line of each key), an option, a `--set`, or a derivation."""

    origin: Origin
    data: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)

    def origin_of(self, key: str) -> Origin:
        """Origin of a dotted key: that of the layer, with the key's line if the layer is a file."""
        where = self.origin.where
        return self.origin._replace(where=where.at(self.lines[key])) if where and key in self.lines else self.origin


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, Origin]]:
    """Merge layers into the data and the origin of every dotted leaf.

    Maps are merged deeply; a list or a scalar of a later layer replaces what earlier layers hold.
    """
    data: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for layer in layers:
        _merge_into(data, layer.data, "", layer, origins)
    return data, origins


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value in nested maps that is not itself a map."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def nested(key: str, value: Any) -> dict[str, Any]:
    """Nested map with `value` at a dotted RunSpec key; names under `verl` and `env` may contain dots."""
    head, _, rest = key.partition(".")
    if not rest:
        return {head: value}
    return {head: {rest: value} if head in ("verl", "env") else nested(rest, value)}


def _merge_into(
    data: dict[str, Any], new: Mapping[str, Any], prefix: str, layer: Layer, origins: dict[str, Origin]
) -> None:
    for name, value in new.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            if not isinstance(data.get(name), dict):
                _forget(origins, key)
                data[name] = {}
            _merge_into(data[name], value, f"{key}.", layer, origins)
        else:
            _forget(origins, key)
            data[name] = value
            origins[key] = layer.origin_of(key)


def _forget(origins: dict[str, Origin], key: str) -> None:
    for stale in [k for k in origins if k == key or k.startswith(f"{key}.")]:
        del origins[stale]


def derived(key: str, value: Any, reason: str) -> Layer:
    """A layer with the derived value of one key."""
    return Layer(Origin("derived", reason=reason), nested(key, value))


def rank(key: str, layers: Sequence[Layer]) -> int:
    """How late a key was set: the number of its last layer, the same for all options; -1 if none set it."""
    ranks = [
        len(layers) if layer.origin.layer in ("option", "set") else number
        for number, layer in enumerate(layers)
        if key in dict(leaves(layer.data))
    ]
    return max(ranks, default=-1)


ABSENT: Final = object()
"""The value of a key in the configuration that lacks it."""


class Verbatim(str):
    """Text that is shown unchanged, because it is not a value in a preset's syntax."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """A key whose values differ; `origin` is that of the second value, empty if it is not known."""

    key: str
    a: Any
    b: Any
    origin: str = ""

    def shown(self) -> tuple[str, str]:
        """Both values as text; "–" for a configuration that lacks the key."""
        return _shown(self.a), _shown(self.b)

    def data(self) -> dict[str, Any]:
        """The difference as plain data; a value is left out if its configuration lacks the key."""
        sides = {name: value for name, value in (("a", self.a), ("b", self.b)) if value is not ABSENT}
        return {"key": self.key, **sides, "origin": self.origin}


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], origins: Mapping[str, str] | None = None
) -> Iterator[Difference]:
    """Yield the keys that differ, in `a`'s order, then those that only `b` has; `origins` are those of `b`'s values.

    Values differ if their texts do: 1, 1.0 and true are three different values to verl.
    """
    for key in {**a, **b}:
        difference = Difference(key, a.get(key, ABSENT), b.get(key, ABSENT), (origins or {}).get(key, ""))
        if len(set(difference.shown())) == 2:
            yield difference


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "–"
    return value if isinstance(value, Verbatim) else text_of(value)
