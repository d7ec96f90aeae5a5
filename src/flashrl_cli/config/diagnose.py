"""Turns errors in a configuration into problems: what is wrong, where it was written, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError

from flashrl_cli.config import yaml_file
from flashrl_cli.config.layers import DEFAULT, Layer, Origin, leaves, nested, option
from flashrl_cli.config.spec import Part, RunSpec
from flashrl_cli.config.yaml_file import text_of
from flashrl_cli.errors import Problem

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


class Suggestion(NamedTuple):
    """A hint for an unknown key, and the keys of the spec that the hint names."""

    hint: str
    keys: Sequence[str] = ()


class Violation(NamedTuple):
    """A broken rule: the key, what is wrong, and the fix as text (`hint`) or as alternative values of keys (`fix`)."""

    key: str
    message: str
    hint: str = ""
    fix: Mapping[str, Any] = {}


Rule = Callable[[RunSpec], Iterator[Violation]]
Translate = Callable[[str], Suggestion | None]
"""Function from a key that the spec lacks to a hint from another program (verl); None if that lacks the key, too."""

KINDS = {
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "the name of a folder, without / or a dot in front",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}
HINTS = {"correction.cap": "--tis takes a cap above 0, or off; --set correction.kind=… another kind of weights"}
"""Hints for wrong values of keys that have a command-line option besides `--set`."""
_BY_SEQUENCE = "a rejection beside the weights: --set correction.reject.by={} --set correction.reject.upper=…"
_V1_LACKS = "verl's V1 trainer does not give it {}; --set algorithm.advantage={} works there"
_ASYNCHRONOUS = "separate_async samples on GPUs of its own, colocate_async on the trainer's"
ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "rollout.rotation": {"false": "off", "none": "off", "no": "off", "0": "off", "true": "auto", "on": "auto"},
    "correction.kind": {
        # verl
        "token": "tis",
        "sequence": "seq-tis",
        "geometric": _BY_SEQUENCE.format("seq-mean"),
        # TRL's vllm_importance_sampling_mode
        "token-truncate": "tis",
        "token-mask": "icepop",
        "sequence-truncate": "seq-tis",
        "sequence-mask": _BY_SEQUENCE.format("seq-sum"),
        # NeMo-RL's truncated_importance_sampling_type and OpenRLHF's is_correction_type have tis and icepop, too
        "seq-mask-tis": _BY_SEQUENCE.format("seq-mean"),
        # slime, AReaL and papers
        "truncate": "tis",
        "truncated": "tis",
        "clip": "tis",
        "clipped": "tis",
        "is": "tis",
        "mask": "icepop",
        "masked": "icepop",
        "mis": "icepop",
        "ice-pop": "icepop",
        "sequence-tis": "seq-tis",
        "seq": "seq-tis",
        "off": "none",
        "false": "none",
    },
    "trainer.mode": {
        # NeMo-RL, AReaL and slime; verl's recipes and trainers before V1
        "async": _ASYNCHRONOUS,
        "asynchronous": _ASYNCHRONOUS,
        "fully-async": "separate_async",
        "fully-async-policy": "separate_async",
        "one-step-off": "separate_async",
        "one-step-off-policy": "separate_async",
        "disaggregated": "separate_async",
        "colocated": "colocate_async",
    },
    "algorithm.loss": {"vanilla": "ppo", "grpo": "ppo", "dapo": "ppo", "geo-mean": "gmpo", "dppo": "dppo-tv"},
    "algorithm.advantage": {
        "reinforce++": "reinforce-plus-plus",
        "reinforce++-baseline": "reinforce-plus-plus-baseline",
        "reinforce-baseline": "reinforce-plus-plus-baseline",
        "group-norm": "grpo",
        "ppo": "gae",
        "passk": "grpo-passk",
        "dr-grpo": "--set algorithm.advantage=grpo --set algorithm.normalize_by_std=false",
        "remax": _V1_LACKS.format("the reward of a greedy response, its baseline", "rloo"),
        "optimal-token-baseline": _V1_LACKS.format("the sum of squared probabilities of each token", "opo"),
        "tir-optimal-token-baseline": _V1_LACKS.format("the sum of squared probabilities of each token", "opo"),
        "gdpo": _V1_LACKS.format("the components of the reward", "grpo"),
    },
}
"""What other frameworks call a value, with hyphens: its name here, or a hint on what takes its place."""
IN_FILES = ("extends",)
"""Keys of a preset file that the spec lacks."""
SHOWN = 60
"""Characters of a value that a message shows."""


def well_shaped(layer: Layer, problems: list[Problem]) -> Layer:
    """The layer without values that should be maps, each of which is added to `problems`.

    Such a value would replace the maps of other layers.
    """
    return replace(layer, data=_shaped(layer.data, RunSpec, "", layer, problems))


def problems_of(
    errors: Sequence[ErrorDetails], origins: Mapping[str, Origin], translate: Translate = lambda _: None
) -> list[Problem]:
    """pydantic's errors as problems, one for each key of an unknown map.

    All missing keys together are one problem. It leaves out keys that the hint for an unknown key names, because these
    were probably misspelled.
    """
    found: list[Problem] = []
    missing: list[str] = []
    misspelled: set[str] = set()
    refused: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        key = _key(error)
        if error["type"] == "missing":
            missing += _required(key)
        elif error["type"] == "extra_forbidden":
            for name in [name for name, _ in leaves({key: error["input"]})] or [key]:
                meant = _instead(name, translate)
                misspelled.update(meant.keys)
                found.append(Problem(f"unknown key {name}", origin_of(name, origins).where, meant.hint))
        else:
            refused.setdefault(key, []).append(error)
    found += [
        _bad_value(key, of_it, origin_of(key, origins))
        for key, of_it in refused.items()
        if not any(item.startswith(f"{key}.") for item in refused)
    ]
    return [*found, *_missing([key for key in missing if key not in misspelled])]


def origin_of(key: str, origins: Mapping[str, Origin]) -> Origin:
    """Origin of a key: its own, that of the first key in a map, or that of the key which contains an item."""
    inside = (origin for other, origin in origins.items() if other == key or other.startswith(f"{key}."))
    outside = (origins[other] for other in _ancestors(key) if other in origins)
    return next(inside, None) or next(outside, DEFAULT)


def keys_of(part: type[Part], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a part of the spec, including those of its sub-parts."""
    for name, info in part.model_fields.items():
        sub = _part_in(info.annotation)
        if sub:
            yield from keys_of(sub, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _ancestors(key: str) -> Iterator[str]:
    while key := key.rpartition(".")[0]:
        yield key


def _part_in(annotation: Any) -> type[Part] | None:
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Part)), None)


def _field(key: str) -> FieldInfo | None:
    """pydantic's field of a dotted key; None for an item in a list or a map."""
    part: type[Part] | None = RunSpec
    info = None
    for name in key.split("."):
        info = part.model_fields.get(name) if part else None
        part = _part_in(info.annotation) if info else None
    return info


def _key(error: ErrorDetails) -> str:
    """The dotted key of an error, without the name of an alternative: pydantic puts that of a union behind a field."""
    steps = [str(step) for step in error["loc"]]
    for end in range(1, len(steps)):
        info = _field(".".join(steps[:end]))
        if info and _is_union(info):
            return ".".join(steps[:end] + steps[end + 1 :])
    return ".".join(steps)


def _is_union(info: FieldInfo) -> bool:
    """Whether a field may have values of several types besides null."""
    alternatives = set(get_args(info.annotation)) - {type(None)}
    return get_origin(info.annotation) in (Union, UnionType) and len(alternatives) > 1


def _shaped(
    data: Mapping[str, Any], part: type[Part], prefix: str, layer: Layer, problems: list[Problem]
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in data.items():
        info = part.model_fields.get(name)
        sub = _part_in(info.annotation) if info else None
        if sub and isinstance(value, Mapping):
            kept[name] = _shaped(value, sub, f"{prefix}{name}.", layer, problems)
        elif info and _is_map(info) and not _may_be(value, info):
            problems.append(_no_map(f"{prefix}{name}", value, layer.origin_of(f"{prefix}{name}")))
        else:
            kept[name] = value
    return kept


def _is_map(info: FieldInfo) -> bool:
    return _part_in(info.annotation) is not None or get_origin(info.annotation) is dict


def _may_be(value: Any, info: FieldInfo) -> bool:
    return isinstance(value, Mapping) or (value is None and type(None) in get_args(info.annotation))


def _no_map(key: str, value: Any, origin: Origin) -> Problem:
    info = _field(key)
    sub = _part_in(info.annotation) if info else None
    names = f": {', '.join(sub.model_fields)}" if sub else ""
    if isinstance(value, str) and (run_together := re.match(r"([\w.]+)\s*[:=]\s*(\S+)$", value)):
        hint = f"a colon and a space: `{run_together[1]}: {run_together[2]}`"
    elif origin.layer == "set":
        hint = f"--set {key}.KEY=… takes one of its keys{names}"
    else:
        hint = f"{'drop the line, or ' if value is None else ''}write its keys below it{names}"
    return Problem(f"{_assigned(key, value)}: should be a map of keys", origin.where, hint)


def _required(key: str) -> list[str]:
    """The keys that must be set for `key`: the key itself, or the required keys of its part."""
    info = _field(key)
    sub = _part_in(info.annotation) if info else None
    if sub is None:
        return [key]
    inside = [name for name, field in sub.model_fields.items() if field.is_required()]
    return [leaf for name in inside for leaf in _required(f"{key}.{name}")]


def _missing(keys: Sequence[str]) -> Iterator[Problem]:
    if len(keys) == 1:
        yield Problem(f"{keys[0]} is not set", None, f"set it in the preset, or --set {keys[0]}=…")
    elif keys:
        yield Problem(f"not set: {', '.join(keys)}", None, "set them in the preset, or extend one that does")


def _instead(key: str, translate: Translate) -> Suggestion:
    """Hint for an unknown key: a translation of another program's key, the nearest keys, or the keys of its part."""
    known = [*keys_of(RunSpec), *IN_FILES]
    same = yaml_file.same_key(key, known)
    if same == key:
        head, _, name = key.rpartition(".")
        hint = f"write `{name}:` below `{head}:`" if head else f"{key} belongs at the top of a preset's file"
        return Suggestion(hint, [key])
    if not same and (translated := translate(key)):
        return translated
    if near := [same] if same else yaml_file.nearest_keys(key, known):
        return Suggestion(f"did you mean {' or '.join(near)}?", near)
    for parent in _ancestors(key):
        info = _field(parent)
        if info and (part := _part_in(info.annotation)):
            return Suggestion(f"keys of {parent} are {', '.join(part.model_fields)}")
    return Suggestion(f"keys of a preset are {', '.join(RunSpec.model_fields)} (keys of verl's own go under the last)")


def _bad_value(key: str, errors: Sequence[ErrorDetails], origin: Origin) -> Problem:
    """The problem of a value that none of the types of its key allows; `errors` has one for each."""
    value = errors[0]["input"]
    texts = [_expected(error) for error in errors]
    first, *others = dict.fromkeys(texts)
    text = " or ".join([first, *(other.removeprefix("should be ") for other in others)])
    return Problem(f"{_assigned(key, value)}: {text}", origin.where, HINTS.get(key) or _fix(key, value, origin))


def _expected(error: ErrorDetails) -> str:
    expected = KINDS.get(error["type"])
    if error["type"] == "literal_error":
        choices: str = error["ctx"]["expected"]
        expected = f"one of {choices}" if " or " in choices else choices
    return f"should be {expected}" if expected else error["msg"].removeprefix("Value error, ").removeprefix("Input ")


def _fix(key: str, value: Any, origin: Origin) -> str | None:
    if isinstance(value, Mapping):
        dotted = [f"`{name}: {text_of(inner)}`" for name, inner in leaves(value, f"{key.partition('.')[2]}.")]
        return f"write {', '.join(dotted)}" if key.startswith("verl.") and dotted else None
    info = _field(key)
    if info is None:
        return None
    meant = ELSEWHERE.get(key, {}).get(str(value).lower().replace("_", "-"))
    if meant is not None:
        return f"did you mean {_written(key, meant, origin)}?" if _fits(key, meant) else meant
    fitting = [reading for reading in _readings(value, info) if _fits(key, reading)]
    return f"did you mean {_written(key, fitting[0], origin)}?" if fitting else None


def _readings(value: Any, info: FieldInfo) -> Iterator[Any]:
    if get_origin(info.annotation) is Literal:
        choices = {str(choice): choice for choice in get_args(info.annotation)}
        yield from (choices[name] for name in yaml_file.nearest(str(value), list(choices), 1))
    yield from yaml_file.readings(value, info.default)


def _fits(key: str, value: Any) -> bool:
    path = tuple(key.split("."))
    try:
        RunSpec.model_validate(nested(key, value))
    except ValidationError as error:
        return not any(refused["loc"][: len(path)] == path for refused in error.errors(include_url=False))
    return True


def _written(key: str, value: Any, origin: Origin) -> str:
    """A value in the syntax of the place in which the refused one was written: an option or a line of YAML."""
    if origin.layer in ("option", "set"):
        return option(key, text_of(value), origin.where)
    return f"{key.rpartition('.')[2]}: {text_of(value)}"


def _assigned(key: str, value: Any) -> str:
    text = text_of(value)
    return f"{key} = {text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'}"
