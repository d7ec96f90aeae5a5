"""The command line's part of the configuration: `--rollout`, `--tis` and `--set`, as layers over a preset."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

from flashrl_cli.config import yaml_file
from flashrl_cli.config.merge import Layer, nested
from flashrl_cli.config.presets import VERBATIM
from flashrl_cli.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FLAG_OF = {"rollout.precision": "--rollout", "correction.cap": "--tis"}
"""Keys that have a flag of their own."""
EXAMPLE = "--set algorithm.lr=1e-6"


def option_layers(
    rollout: str | None, tis: str | None, sets: Sequence[str], problems: list[Problem]
) -> Iterator[Layer]:
    """Yield a layer for each option given, `--set` last and in order; a bad text's is empty, and told in `problems`."""
    if rollout is not None:
        yield _flag("rollout.precision", rollout)
    if tis is not None:
        yield _flag("correction.cap", _cap(tis))
    for text in sets:
        yield _assignment(text, problems)


def is_text(key: str) -> bool:
    """Whether a key's value is a text whatever it looks like: that of a variable, `env.NAME`."""
    head, dot, _ = key.partition(".")
    return bool(dot) and head in VERBATIM


def _flag(key: str, value: Any) -> Layer:
    return Layer(kind="option", label=FLAG_OF[key], data=nested(key, value))


def _cap(text: str) -> Any:
    """Number of a `--tis` text, None for `off`; anything else as it is, for the spec to refuse."""
    number = yaml_file.value(text, "--tis").data
    if isinstance(number, int | float) and not isinstance(number, bool):
        return number
    return None if text == "off" else text


def _assignment(text: str, problems: list[Problem]) -> Layer:
    written, equals, value_text = text.partition("=")
    key = written.strip()
    shown = key if equals and all(key.split(".")) else text
    label = f"--set {shown if shown.isprintable() else ascii(shown)}"
    problem, value = _bad_key(text, key, equals), None
    if problem is None:
        document = yaml_file.value(value_text, label, is_text=is_text(key))
        value = document.data
        problem = _bad_value(key, value_text, document.problems)
    if problem:
        problems.append(Problem(problem.message, label, problem.hint))
    return Layer(kind="set", label=label, data={} if problem else nested(key, value))


def _bad_key(text: str, key: str, equals: str) -> Problem | None:
    if not equals or not key:
        near = re.fullmatch(r"([\w+-]+(?:\.[\w+-]+)+)[:\s]*(\S*)", text)
        hint = f"--set {near[1]}={near[2] or '…'}" if near else EXAMPLE
        return Problem("not of the form key=value", hint=hint)
    if not key.isprintable():
        return Problem("the key holds a character that nobody sees", hint="type it anew")
    if not all(key.split(".")):
        names = ".".join(name for name in key.split(".") if name)
        hint = f"--set {names}=…" if "." in names else EXAMPLE
        return Problem(f"{key!r} is no key: a dot stands between two names", hint=hint)
    return None


def _bad_value(key: str, text: str, found: Sequence[Problem]) -> Problem | None:
    if not found:
        return None
    if re.search("[\udc80-\udcff]", text):
        return Problem(f"{text!a} is no text in this shell's encoding", hint="export LC_ALL=C.UTF-8")
    quoted = shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")
    hints = (found[0].hint, f"if that text is meant: --set {quoted}")
    return Problem(f"{text!r} is no value: {found[0].message}", hint="; ".join(filter(None, hints)))
