"""YAML text to plain data, with the line of every key.

PyYAML reads YAML 1.1, where `1e-6` is text, `off` is false and `1:30` is ninety, and lets the last of two equal keys
win. Here scalars follow the YAML 1.2 core schema, equal keys are refused, and so are tags and aliases: presets compose
by `extends`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from flashrl_cli.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_BYTES = 1_000_000
"""A preset is a page of text; anything near this size is some other file."""


class _Scalar(NamedTuple):
    """One type of YAML 1.2's core schema: what its text looks like, how it can start, what it becomes."""

    pattern: str
    starts: str
    convert: Callable[[str], Any]


_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": _Scalar(r"~|null|Null|NULL|", "~nN", lambda _: None),
    "bool": _Scalar(r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": _Scalar(
        r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "-+0123456789",
        lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10),
    ),
    "float": _Scalar(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML copies it before changing it


for _name, _scalar in _SCALARS.items():
    _starts = [*_scalar.starts, *([""] if _name == "null" else [])]
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_scalar.pattern})$"), _starts)


@dataclass(slots=True)
class Document:
    """One YAML text: its data, the line (from 1) of every dotted key, and what is wrong with it."""

    label: str
    data: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(text: str, label: str) -> Document:
    """Parse one YAML document; never raises, see `Document.problems` (each with `label:line`)."""
    document = Document(label)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        document.problems.append(_syntax_problem(error, text, label))
        return document
    if node is not None:
        document.data = _Builder(document).build(node, "")
    return document


def read(path: Path, label: str) -> Document:
    """Read a YAML file that holds a map (an empty file is an empty map); problems are told in the document."""
    text = _read_text(path)
    if isinstance(text, Problem):
        return Document(label, {}, problems=[Problem(text.message, label, text.hint)])
    document = parse(text, label)
    if document.data is None:
        document.data = {}
    elif not isinstance(document.data, dict):
        found = type(document.data).__name__
        document.problems.append(Problem(f"a preset is a map of keys, this is a {found}", f"{label}:1"))
        document.data = {}
    return document


def _read_text(path: Path) -> str | Problem:
    if path.is_dir():
        return Problem("this is a folder, not a preset file")
    try:
        if path.stat().st_size > MAX_BYTES:
            return Problem(f"larger than {MAX_BYTES:,} bytes: not a preset")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem(f"not UTF-8 text (byte {error.start})")
    except OSError as error:
        return Problem(f"cannot be read: {error.strerror}")


def _syntax_problem(error: Exception, text: str, label: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return Problem(f"not YAML: {str(error).splitlines()[0]}", label)
    line = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    tab = "\t" in line[: len(line) - len(line.lstrip())] or "\\t" in str(getattr(error, "problem", ""))
    what = ", ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    return Problem(
        f"not YAML: {what}", f"{label}:{mark.line + 1}", "indent with spaces, not with tabs" if tab else None
    )


class _Builder:
    """Turns PyYAML's nodes into data, noting lines and problems in a document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.seen: set[int] = set()

    def build(self, node: yaml.Node, key: str) -> Any:
        if id(node) in self.seen:
            return self.refuse(node, "aliases (*name) are not supported", "write the value out, or use extends")
        self.seen.add(id(node))
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self.mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self.build(item, key) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        return self.refuse(node, f"tag {node.tag!r} is not supported", "presets hold plain text, numbers and lists")

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                shown = getattr(key_node, "value", "?")
                self.refuse(key_node, f"key {shown!r} is not text", "quote it")
                continue
            name = key_node.value
            key = f"{prefix}.{name}" if prefix else name
            if name in data:
                self.refuse(
                    key_node, f"key {key!r} is given twice (first in line {self.document.lines[key]})", "keep one"
                )
                continue
            self.document.lines[key] = key_node.start_mark.line + 1
            data[name] = self.build(value_node, key)
        return data

    def scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return node.value
        if kind not in _SCALARS:
            return self.refuse(node, f"tag {node.tag!r} is not supported", "presets hold plain text, numbers and lists")
        try:
            return _SCALARS[kind].convert(node.value)
        except ValueError:
            return self.refuse(node, f"{node.value[:40]!r} is no {kind}", None)

    def refuse(self, node: yaml.Node, message: str, hint: str | None) -> None:
        self.document.problems.append(Problem(message, f"{self.document.label}:{node.start_mark.line + 1}", hint))
