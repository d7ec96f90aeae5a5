"""Added keys (`+key`) against verl's dataclasses, read from its source without importing it.

Hydra cannot check a key that it is told to add. But verl turns most nodes of its tree into the dataclass that their
`_target_` names (verl/utils/config.py, omega_conf_to_dataclass): an unknown name ends the run in a worker, minutes
after the start. Maps (`dict`, `Any`, nodes without a class) take any name, here as there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING

from flashrl_cli.errors import Problem
from flashrl_cli.verl import compose

if TYPE_CHECKING:
    from pathlib import Path

    from flashrl_cli.verl.overrides import Override

MAPS = frozenset({"reward", "global_profiler", "global_profiler.global_tool_config.nsys"})
"""Nodes with a `_target_` that V1 reads as maps, with names that the class lacks (reward_loop/reward_manager/dapo.py:33)."""


@dataclass(frozen=True, slots=True)
class Dataclass:
    """One of verl's dataclasses: its fields, inherited ones included, and its `file:line`."""

    name: str
    place: str
    fields: dict[str, tuple[str, ast.expr]]
    """Name to the module that declares the field, and its annotation."""


def problems(overrides: Sequence[Override], tree: compose.Tree) -> list[Problem]:
    """Added keys that the dataclass of their node lacks. `tree` may hold the overrides already."""
    return [problem for override in overrides if override.added and (problem := _problem(override, tree))]


def _problem(override: Override, tree: compose.Tree) -> Problem | None:
    parts = override.key.split(".")
    owner: Dataclass | None = None
    for index, name in enumerate(parts):
        if owner and name not in owner.fields:
            return Problem(f"verl's {owner.name} has no {name}", override.origin.where, _hint(parts, index, owner))
        owner = _owner(".".join(parts[: index + 1]), name, owner, tree)
    return None


def _owner(key: str, name: str, parent: Dataclass | None, tree: compose.Tree) -> Dataclass | None:
    """The dataclass of the node at `key`: by its own `_target_`, else by its field's type in `parent`."""
    if key in MAPS:
        return None
    target = tree.get(f"{key}._target_")
    if isinstance(target, str):
        module, _, class_name = target.rpartition(".")
        return find(module, class_name)
    return _typed(*parent.fields[name]) if parent else None


def _hint(parts: Sequence[str], index: int, owner: Dataclass) -> str:
    near = get_close_matches(parts[index], sorted(owner.fields), n=2)
    names = " or ".join(".".join([*parts[:index], name]) for name in near)
    return f"did you mean {names}? (its fields: {owner.place})" if near else f"its fields: {owner.place}"


def _typed(module: str, annotation: ast.expr) -> Dataclass | None:
    """The dataclass that an annotation is, alone, as `Optional[X]` or as `X | None`; None for anything else."""
    match annotation:
        case ast.Name(id=name):
            return find(module, name)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _typed(module, inner)
        case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None)):
            return _typed(module, inner)
    return None


@cache
def find(module: str, name: str) -> Dataclass | None:
    """The dataclass `name` as verl's `module` knows it, also by import; None if it is none or is not verl's."""
    for node in _body(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _dataclass(module, node)
    imports = (node for node in _body(module) if isinstance(node, ast.ImportFrom))
    found = (find(*source) for node in imports for source in _sources(module, node, name))
    return next(filter(None, found), None)


def _dataclass(module: str, node: ast.ClassDef) -> Dataclass | None:
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    fields: dict[str, tuple[str, ast.expr]] = {}
    for base in reversed(node.bases):
        inherited = find(module, base.id) if isinstance(base, ast.Name) else None
        fields |= inherited.fields if inherited else {}
    own = (item for item in node.body if isinstance(item, ast.AnnAssign))
    fields |= {item.target.id: (module, item.annotation) for item in own if isinstance(item.target, ast.Name)}
    return Dataclass(node.name, f"{_file(module)}:{node.lineno}", fields)


def _sources(module: str, node: ast.ImportFrom, name: str) -> Iterator[tuple[str, str]]:
    """Where an import may have `name` from: (module, name there)."""
    source = node.module or ""
    if node.level:
        file = _file(module)
        package = module.split(".") if file and file.name == "__init__.py" else module.split(".")[:-1]
        source = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
    for alias in node.names:
        if name == (alias.asname or alias.name):
            yield source, alias.name
        elif alias.name == "*" and f"class {name}" in _text(source):
            yield source, name


@cache
def _body(module: str) -> list[ast.stmt]:
    return ast.parse(_text(module)).body


@cache
def _text(module: str) -> str:
    """Source of a module of verl's; empty for any other."""
    file = _file(module)
    return (_root() / file).read_text(encoding="utf-8") if file else ""


@cache
def _file(module: str) -> Path | None:
    """File of a module of verl's, from the folder that verl is installed in; None for any other module."""
    path = _root().joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((f.relative_to(_root()) for f in files if module.startswith("verl.") and f.is_file()), None)


@cache
def _root() -> Path:
    return compose.config_folder().parents[2]
