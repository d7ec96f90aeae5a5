"""The command line's part of the configuration: `--rollout`, `--tis` and `--set`, as layers over a preset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashrl_cli.config import yaml_file
from flashrl_cli.config.merge import Layer, nested
from flashrl_cli.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FLAG_OF = {"rollout.precision": "--rollout", "correction.cap": "--tis"}
"""Keys that have a flag of their own."""


def option_layers(
    rollout: str | None, tis: str | None, sets: Sequence[str], problems: list[Problem]
) -> Iterator[Layer]:
    """Yield a layer for each option given, `--set` last and in order; bad texts are appended to `problems`."""
    if rollout is not None:
        yield _flag("rollout.precision", rollout)
    if tis is not None:
        yield _flag("correction.cap", _cap(tis))
    for text in sets:
        layer = _assignment(text, problems)
        if layer:
            yield layer


def _flag(key: str, value: Any) -> Layer:
    return Layer(kind="option", label=FLAG_OF[key], data=nested(key, value))


def _cap(text: str) -> Any:
    """Number of a `--tis` text, None for `off`; anything else as it is, for the spec to refuse."""
    number = yaml_file.parse(text, "--tis").data
    if isinstance(number, int | float) and not isinstance(number, bool):
        return number
    return None if text == "off" else text


def _assignment(text: str, problems: list[Problem]) -> Layer | None:
    key, equals, value_text = text.partition("=")
    label = f"--set {key}"
    if not equals or not all(key.split(".")):
        problems.append(Problem("not of the form key=value", f"--set {text}", "--set algorithm.lr=1e-6"))
        return None
    document = yaml_file.parse(value_text, label)
    if isinstance(document.data, dict):
        problems.append(
            Problem("a map cannot be set as a whole", label, f"--set {key}.NAME=VALUE for each of its keys")
        )
        return None
    if document.problems:
        problems.append(Problem(f"{value_text!r} is not a value", label, f"quote it: '{key}=\"{value_text}\"'"))
        return None
    return Layer(kind="set", label=label, data=nested(key, document.data))
