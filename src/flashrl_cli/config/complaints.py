"""pydantic's errors told as problems: where the value was written, what is wrong, and what was probably meant."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from flashrl_cli.config.merge import leaves
from flashrl_cli.config.options import FLAG_OF
from flashrl_cli.config.spec import Part, RunSpec
from flashrl_cli.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic_core import ErrorDetails

    from flashrl_cli.config.merge import Origin

KINDS = {
    "model_type": "a map of keys",
    "dict_type": "a map of keys",
    "tuple_type": "a list",
    "string_type": "text",
    "string_pattern_mismatch": "the name of a folder, without / or a dot in front",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}


def problems_of(errors: Sequence[ErrorDetails], origins: Mapping[str, Origin]) -> list[Problem]:
    """The problems that pydantic's errors stand for, in its order; an unknown map is one for each of its keys."""
    return [problem for error in errors for problem in _problems(error, origins)]


def where(key: str, origins: Mapping[str, Origin]) -> str | None:
    """Where a key (or, for a map, the first key in it) was written; None for one that nobody wrote."""
    if key in origins:
        return origins[key].where or None
    inside = (origin for other, origin in origins.items() if other.startswith(f"{key}."))
    return next((origin.where for origin in inside), None)


def keys_of(part: type[Part], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a part of the spec, those of its sub-parts included."""
    for name, info in part.model_fields.items():
        sub = _part_in(info.annotation)
        if sub:
            yield from keys_of(sub, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _part_in(annotation: Any) -> type[Part] | None:
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Part)), None)


def _problems(error: ErrorDetails, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    key = ".".join(str(step) for step in error["loc"])
    if error["type"] == "missing":
        yield Problem(f"{key} is not set", None, f"set it in the preset, or --set {key}=…")
    elif error["type"] == "extra_forbidden":
        for unknown, _ in list(leaves({key: error["input"]})) or [(key, None)]:
            yield Problem(f"unknown key {unknown}", where(unknown, origins), _meant(unknown))
    else:
        yield _bad_value(key, error, where(key, origins))


def _bad_value(key: str, error: ErrorDetails, place: str | None) -> Problem:
    kind, shown = error["type"], f"{key} = {error['input']!r}"
    if kind == "literal_error":
        return Problem(f"{shown}: should be one of {error['ctx']['expected']}", place)
    expected = KINDS.get(kind)
    text = f"should be {expected}" if expected else error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Problem(f"{shown}: {text}", place, _fix(key))


def _fix(key: str) -> str | None:
    return "--tis takes a cap above 0, or off" if FLAG_OF.get(key) == "--tis" else None


def _meant(key: str) -> str:
    """The known keys whose last name is nearly this one's, the most alike in full first."""
    name_of = {known: known.rpartition(".")[2] for known in keys_of(RunSpec)}
    names = get_close_matches(key.rpartition(".")[2], set(name_of.values()), n=2)
    alike = get_close_matches(key, [known for known, name in name_of.items() if name in names], n=2, cutoff=0)
    if alike:
        return "did you mean " + " or ".join(alike) + "?"
    return f"a key of verl's own goes under verl: --set verl.{key}=…"
