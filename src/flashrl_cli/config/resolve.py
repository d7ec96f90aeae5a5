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

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Resolved:
    """A checked spec and the origin of each of its dotted leaf keys."""

    spec: RunSpec
    origins: Mapping[str, Origin]

    def value(self, key: str) -> Any:
        """Value at a dotted key of typed fields (not under `verl` or `env`); None below a part that is null."""
        value: Any = self.spec
        for name in key.split("."):
            value = getattr(value, name) if value is not None else None
        return value

    def is_set(self, key: str) -> bool:
        """Whether someone wrote the value, or it was derived: whether it is more than a default."""
        return self.origins.get(key, DEFAULT).layer != "default"


def load_spec(preset: str, *, rollout: str | None = None, tis: str | None = None, sets: Sequence[str] = ()) -> Resolved:
    """Read a preset (name or file), apply the options, validate.

    `rollout` is a precision, `tis` the text of a cap or `off`, `sets` are texts `key=value`.
    Reads preset files and the working folder. Raises InputError with every problem, each with file:line or its option.
    """
    problems: list[Problem] = []
    layers = [*presets.read_layers(preset, problems), *option_layers(rollout, tis, sets, problems)]
    data, origins = merge(layers)
    spec = _validate(data, origins, problems)
    if spec is None or problems:
        raise _refusal(preset, problems)
    layers += [Layer(kind="derived", label=d.reason, data=nested(d.key, d.value)) for d in derived_values(spec)]
    data, origins = merge(layers)
    spec = RunSpec.model_validate(data)
    broken = [Problem(f"{f.key}: {f.message}", complaints.where(f.key, origins), f.hint) for f in findings(spec)]
    if broken:
        raise _refusal(preset, broken)
    return Resolved(spec, {key: origins.get(key, DEFAULT) for key, _ in leaves(spec.model_dump())})


def _validate(data: Mapping[str, Any], origins: Mapping[str, Origin], problems: list[Problem]) -> RunSpec | None:
    """The spec, or None with its problems appended, less those that follow from a problem of reading."""
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        known = {problem.where for problem in problems}
        if problems:
            known.add(None)  # what is missing may stand where it could not be read
        found = complaints.problems_of(error.errors(include_url=False), origins)
        problems += [problem for problem in found if problem.where not in known]
        return None


def _refusal(preset: str, problems: Sequence[Problem]) -> InputError:
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return InputError(f"preset {preset}: {count}", problems=problems)
