"""Finds preset files, follows their `extends` chains, and copies a preset to an editable file.

A preset's name is its path below a presets folder, without `.yaml`. Parts that cannot be run alone are below `base/`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flashrl_cli import __version__, paths
from flashrl_cli.config import yaml_file
from flashrl_cli.config.layers import Layer, Origin
from flashrl_cli.config.yaml_file import nearest, text_of
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.files import write_text

MAX_DEPTH = 4
"""Most files in one chain of `extends`; a longer chain would be hard to follow."""
OWN_KEYS = ("name", "description")
"""Keys that describe one preset and are not inherited."""
VERBATIM = ("env",)
"""Keys whose values are taken as text, exactly as written: the variable `010` is not `10`."""


def search_path() -> tuple[Path, ...]:
    """Folders in which preset names are looked up, first match wins: `./presets`, then the shipped ones."""
    folders = (paths.absolute("presets"), paths.presets_root())
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def names() -> list[str]:
    """Sorted names of the runnable presets on the search path; the files are not read."""
    return sorted(name for name in _all_names() if not name.startswith("base/"))


def is_path(reference: str) -> bool:
    """Whether a reference is a path, not a name: it ends in .yaml or .yml, or starts with `.`, `/` or `~`."""
    return reference.endswith((".yaml", ".yml")) or reference.startswith((".", "/", "~"))


def locate(reference: str, beside: Path | None = None) -> Path:
    """File of a preset, given by name or by a path (see `is_path`) relative to the folder `beside`.

    Raises InputError if there is no such file, with the nearest names as a hint.
    """
    if is_path(reference):
        path = _absolute(reference, beside)
        if not os.path.lexists(path):
            raise InputError(f"no preset file {reference}", hint=_nearest_file(reference, path))
        if path.is_dir():
            raise InputError(f"{reference} is a folder, not a preset file", hint=_listed(path))
        return path
    for folder in search_path():
        if _is_file(folder / f"{reference}.yaml"):
            return folder / f"{reference}.yaml"
    raise InputError(f"no preset named {reference!r}", hint=_nearest(reference))


def read_layers(reference: str, problems: list[Problem]) -> list[Layer]:
    """Layers of a preset in order of precedence, its own file last.

    A file that is extended twice counts once, at its first place. Raises InputError if the preset itself does not
    exist; all other problems are appended to `problems`.
    """
    found: dict[Path, Layer] = {}
    _collect(locate(reference), (), found, problems)
    return list(found.values())


def _collect(path: Path, chain: tuple[Path, ...], found: dict[Path, Layer], problems: list[Problem]) -> None:
    document = yaml_file.read(path, _shown(path), verbatim=VERBATIM)
    problems += document.problems
    data: dict[str, Any] = document.data
    where = document.line_of("extends")
    here = (*chain, path)
    for reference in _references(data.pop("extends", []), where, problems):
        try:
            parent = locate(reference, path.parent)
        except InputError as error:
            problems.append(Problem(f"extends: {error.message}", where, error.hint))
            continue
        if parent in here:
            loop = " → ".join(_shown(p) for p in (*here[here.index(parent) :], parent))
            problems.append(Problem(f"extends itself: {loop}", where, "remove one of these links"))
        elif len(here) == MAX_DEPTH:
            problems.append(
                Problem(f"extends more than {MAX_DEPTH - 1} levels deep", where, "extend fewer, larger parts")
            )
        elif parent not in found:
            _collect(parent, here, found, problems)
    is_part = bool(chain)
    own = {key: value for key, value in data.items() if key not in OWN_KEYS} if is_part else {"name": path.stem} | data
    found[path] = Layer(Origin("preset", document.where), own, document.lines)


def _references(value: Any, where: Location, problems: list[Problem]) -> list[str]:
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
        return listed
    problems.append(Problem("extends should be a list of preset names or files", where, "extends: [base/cpu]"))
    return []


def _shown(path: Path) -> str:
    """Name of a file in problems and origins: relative to a presets folder or the working folder, or absolute."""
    for root in (paths.presets_root(), Path.cwd() / "presets"):
        if path.is_relative_to(root):
            return f"presets/{path.relative_to(root)}"
    return shortest(path)


def shortest(path: Path) -> str:
    """The shortest form of a path: relative if it is below the working folder, absolute otherwise."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _absolute(reference: str, beside: Path | None) -> Path:
    """Absolute path of a file; an unknown `~user` is left in it, so the file will not be found."""
    return Path(os.path.abspath((beside or Path()) / os.path.expanduser(reference)))  # noqa: PTH111  # Path's raises


def _is_file(path: str | Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  # Path's raises for a name too long


def _all_names() -> set[str]:
    return {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in search_path()
        for path in folder.rglob("*.yaml")
    }


def _nearest(name: str) -> str:
    """Hint for an unknown preset name: a file of that name, the nearest presets, or all presets."""
    files = [name, *(f"{folder}{name}{ending}" for folder in ("", "presets/") for ending in (".yaml", ".yml"))]
    if found := next((file for file in files if _is_file(file)), None):
        return f"for the file: {found if is_path(found) else f'./{found}'}"
    known = sorted(_all_names())
    stem = _stem(name)
    parts = [part for part in known if part.endswith(f"/{stem}") and stem not in known]
    if near := parts or nearest(stem, known, 3):
        return f"did you mean {' or '.join(near)}?"
    return f"presets are: {', '.join(names())}"


def _nearest_file(reference: str, path: Path) -> str:
    """Hint for a missing file: a preset of that name, similar files in its folder, or how to list the presets."""
    stem = _stem(reference)
    if stem in _all_names():
        return f"did you mean the preset {stem}?"
    beside = {Path(name).stem: name for name in _files_in(path.parent)}
    if near := nearest(path.stem, beside):
        return f"did you mean {' or '.join(str(Path(reference).with_name(beside[name])) for name in near)}?"
    return "`flashrl presets ls` lists the shipped presets"


def _listed(folder: Path) -> str:
    found = _files_in(folder)[:5]
    return f"it holds {', '.join(found)}" if found else "`flashrl presets ls` lists the shipped presets"


def _files_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    except (OSError, ValueError):
        return []


def _stem(reference: str) -> str:
    """Preset name of a reference, without the folder `presets/` and the file extension."""
    return reference.strip().removesuffix(".yaml").removesuffix(".yml").removeprefix("./").removeprefix("presets/")


class Edit(NamedTuple):
    """Replacement of the text between the offsets `start` and `end`."""

    start: int
    end: int
    text: str


def copy_preset(reference: str, destination: str, *, force: bool = False) -> Path:
    """Write an editable copy of a preset and return its absolute path.

    `destination` is a file (`.yaml` is added to a name without it) or a folder, in which the preset keeps its name.
    Raises InputError if the source cannot be read, if the file exists and `force` is off, or if it cannot be written.
    """
    source = locate(reference)
    target = _target(source, destination)
    if target.exists() and not force:
        raise InputError(f"{destination}: {target} exists", hint="--force replaces it, or give another name")
    document = yaml_file.read(source, reference)
    if document.problems:
        raise InputError(f"preset {reference} cannot be read", problems=document.problems)
    text = source.read_text(encoding="utf-8-sig")
    header = f"# Copied from {reference} (flashrl {__version__}).\n"
    try:
        write_text(target, header + _edited(text, source, target))
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error.strerror}", hint="give another FILE") from None
    return target


def _target(source: Path, destination: str) -> Path:
    target = paths.absolute(destination)
    if target.is_dir() or destination.endswith(os.sep):
        target /= source.name
    elif target.suffix not in (".yaml", ".yml"):
        target = target.with_name(f"{target.name}.yaml")
    if not re.match(paths.FOLDER_NAME, target.stem):
        raise InputError(f"{destination}: {target.name} cannot name a preset", hint="no dot at its start")
    return target


def _edited(text: str, source: Path, target: Path) -> str:
    for edit in sorted(_edits(text, source, target), reverse=True):
        text = f"{text[: edit.start]}{edit.text}{text[edit.end :]}"
    return text


def _edits(text: str, source: Path, target: Path) -> Iterator[Edit]:
    """Yield the edits that adapt a preset to its new name and its `extends` paths to the new folder."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in root.value if root else ():
        if key.value == "name":
            yield _replaced(value, target.stem)
        if key.value == "extends":
            for parent in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if is_path(parent.value):
                    yield _replaced(parent, _relative(parent.value, source, target))


def _replaced(node: yaml.Node, text: str) -> Edit:
    return Edit(node.start_mark.index, node.end_mark.index, text_of(text))


def _relative(parent: str, source: Path, target: Path) -> str:
    """Path, relative to `target`, of a parent given relative to `source`; absolute and `~` paths are unchanged."""
    if parent.startswith(("/", "~")):
        return parent
    moved = os.path.relpath(paths.absolute(source.parent / parent), target.parent)
    return moved if moved.startswith(".") else f"./{moved}"
