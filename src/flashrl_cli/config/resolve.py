"""From a preset and the command line to a checked RunSpec that knows where each value came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from flashrl_cli.config import complaints, presets
from flashrl_cli.config.derive import derived_values
from flashrl_cli.config.merge import DEFAULT, Layer, Origin, leaves, merge, nested
from flashrl_cli.config.options import option_layers
from flashrl_cli.config.rules import findings
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashrl_cli.config.complaints import Translate

UNKNOWN = "extra_forbidden"
"""pydantic's name for a key that a model lacks."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A valid spec, the origin of each of its dotted leaf keys, and what was wrong nevertheless.

    `broken` holds what could be left out (unknown keys, unreadable lines) or, where nothing was, the rules that values break.
    """

    spec: RunSpec
    origins: Mapping[str, Origin]
    preset: str = ""
    """As it was asked for: a name or a file."""
    layers: Sequence[Layer] = ()
    broken: tuple[Problem, ...] = ()

    def refusal(self, problems: Sequence[Problem]) -> InputError:
        """The error that tells `problems`, in the order of the files and options that they lie in."""
        return _refusal(self.preset, problems, self.layers)

    def value(self, key: str) -> Any:
        """Value at a dotted key of typed fields (not under `verl` or `env`); None below a part that is null."""
        value: Any = self.spec
        for name in key.split("."):
            value = getattr(value, name) if value is not None else None
        return value

    def is_set(self, key: str) -> bool:
        """Whether someone wrote the value, or it was derived: whether it is more than a default."""
        return self.origins.get(key, DEFAULT).layer != "default"


def load_spec(
    preset: str,
    *,
    rollout: str | None = None,
    tis: str | None = None,
    sets: Sequence[str] = (),
    translate: Translate = lambda _: None,
) -> Resolved:
    """Read a preset as `read_spec` does; raises InputError over what it tells in the result, too."""
    resolved = read_spec(preset, rollout=rollout, tis=tis, sets=sets, translate=translate)
    if resolved.broken:
        raise resolved.refusal(resolved.broken)
    return resolved


def read_spec(
    preset: str,
    *,
    rollout: str | None = None,
    tis: str | None = None,
    sets: Sequence[str] = (),
    translate: Translate = lambda _: None,
) -> Resolved:
    """Read a preset (name or file), apply the options, validate; what leaves a valid spec is told in the result.

    `rollout` is a precision, `tis` the text of a cap or `off`, `sets` are texts `key=value`; `translate` gives the hint
    to a key that the spec lacks and another program has. Reads preset files and the working folder.
    Raises InputError with every problem, each with file:line or its option, in the order of the files and options.
    """
    problems: list[Problem] = []
    read = [*presets.read_layers(preset, problems), *option_layers(rollout, tis, sets, problems)]
    layers = [complaints.well_shaped(layer, problems) for layer in read]
    data, origins = merge(layers)
    spec = _validate(data, origins, problems, translate)
    if spec is None:
        raise _refusal(preset, problems, layers)
    layers += [Layer(kind="derived", label=d.reason, data=nested(d.key, d.value)) for d in derived_values(spec)]
    data, origins = merge(layers)
    spec = RunSpec.model_validate(_known(data) if problems else data)
    # rules may be broken only because something was left out
    broken = problems or [
        Problem(f"{f.key}: {f.message}", complaints.where(f.key, origins), f.hint) for f in findings(spec)
    ]
    told = {key: origins.get(key, DEFAULT) for key, _ in leaves(spec.model_dump())}
    return Resolved(spec, told, preset, tuple(layers), tuple(broken))


def _validate(
    data: Mapping[str, Any], origins: Mapping[str, Origin], problems: list[Problem], translate: Translate
) -> RunSpec | None:
    """The spec without its unknown keys, or None, with problems appended; what is missing may stand where it could not be read."""
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        found = complaints.problems_of(errors, origins, translate)
        problems += [problem for problem in found if problem.where or not problems]
        return RunSpec.model_validate(_known(data)) if all(e["type"] == UNKNOWN for e in errors) else None


def _known(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without the keys that the spec does not know."""
    try:
        RunSpec.model_validate(data)
    except ValidationError as error:
        unknown = [e["loc"] for e in error.errors(include_url=False) if e["type"] == UNKNOWN]
        return _without(data, unknown)
    return dict(data)


def _without(data: Mapping[str, Any], keys: Sequence[tuple[int | str, ...]]) -> dict[str, Any]:
    dropped = {key[0] for key in keys if len(key) == 1}
    return {
        name: _without(value, [key[1:] for key in keys if key[0] == name]) if isinstance(value, dict) else value
        for name, value in data.items()
        if name not in dropped
    }


def _refusal(preset: str, problems: Sequence[Problem], layers: Sequence[Layer]) -> InputError:
    told = list(dict.fromkeys(sorted(problems, key=lambda problem: _position(problem.where, layers))))
    return InputError(f"preset {preset}: {counted(len(told), 'problem')}", problems=told)


def _position(where: str | None, layers: Sequence[Layer]) -> tuple[int, int]:
    """Place of `label` or `label:line` among the layers; what has none comes last."""
    order = {layer.label: number for number, layer in enumerate(layers)}
    label, _, line = (where or "").rpartition(":")
    if where not in order and line.isdecimal():
        return order.get(label, len(order)), int(line)
    return order.get(where or "", len(order)), 0
