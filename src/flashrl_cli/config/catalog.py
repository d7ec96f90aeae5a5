"""The presets at a glance.

A preset as a file of one's own, to edit: comments kept, only the name and relative `extends` rewritten.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from flashrl_cli import __version__, files, paths
from flashrl_cli.config import presets, yaml_file
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import FOLDER_NAME
from flashrl_cli.config.yaml_file import text_of
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flashrl_cli.config.spec import ResourceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One runnable preset in a line; `error` is set (and most else empty) for one that does not load.

    `tis` is the cap of truncated importance sampling, `gpus` the number of GPUs in all (0 on CPU), `devices` the same as
    text: machines × GPUs on each.
    """

    name: str
    description: str = ""
    model: str = ""
    advantage: str = ""
    rollout: str = ""
    tis: float | None = None
    gpus: int = 0
    devices: str = ""
    error: str | None = None


def catalog() -> Iterator[Summary]:
    """Yield a summary of every preset on the search path, by name."""
    for name in presets.names():
        try:
            yield _summary(name)
        except InputError as error:
            yield Summary(name=name, error=error.message)


def _summary(name: str) -> Summary:
    spec = load_spec(name).spec
    return Summary(
        name=name,
        description=spec.description,
        model=spec.model.path,
        advantage=spec.algorithm.advantage,
        rollout=spec.rollout.precision,
        tis=spec.correction.cap,
        gpus=_gpus(spec.resources),
        devices=_devices(spec.resources),
    )


def _gpus(resources: ResourceSpec) -> int:
    return 0 if resources.platform == "cpu" else resources.devices


def _devices(resources: ResourceSpec) -> str:
    if resources.platform == "cpu":
        return "CPU"
    return f"{resources.nodes} × {resources.gpus_per_node}" if resources.nodes > 1 else str(resources.gpus_per_node)


class Edit(NamedTuple):
    """Text from offset `start` to `end` replaced by another."""

    start: int
    end: int
    text: str


def copy_preset(reference: str, destination: str, *, force: bool = False) -> Path:
    """Write an editable copy of a preset; returns its path, absolute.

    `destination` is a file (`.yaml` is added to a name without it) or a folder, in which the preset keeps its name.
    Raises InputError when the source cannot be read, the file exists and `force` is off, or it cannot be written.
    """
    source = presets.locate(reference)
    target = _target(source, destination)
    if target.exists() and not force:
        raise InputError(f"{destination}: {target} exists", hint="--force replaces it, or give another name")
    document = yaml_file.read(source, reference)
    if document.problems:
        raise InputError(f"preset {reference} cannot be read", problems=document.problems)
    text = source.read_text(encoding="utf-8-sig")
    header = f"# Copied from {reference} (flashrl {__version__}).\n"
    try:
        files.write_text(target, header + _edited(text, source, target))
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error.strerror}", hint="give another FILE") from None
    return target


def shortest(path: Path) -> str:
    """`path` as one would type it: relative below the working folder, absolute elsewhere."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _target(source: Path, destination: str) -> Path:
    target = paths.absolute(destination)
    if target.is_dir() or destination.endswith(os.sep):
        target /= source.name
    elif target.suffix not in (".yaml", ".yml"):
        target = target.with_name(f"{target.name}.yaml")
    if not re.match(FOLDER_NAME, target.stem):
        raise InputError(f"{destination}: {target.name} cannot name a preset", hint="no dot at its start")
    return target


def _edited(text: str, source: Path, target: Path) -> str:
    for edit in sorted(_edits(text, source, target), reverse=True):
        text = f"{text[: edit.start]}{edit.text}{text[edit.end :]}"
    return text


def _edits(text: str, source: Path, target: Path) -> Iterator[Edit]:
    """Yield the changes that a file needs under its new name and in its new folder."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in root.value if root else ():
        if key.value == "name":
            yield _replaced(value, target.stem)
        if key.value == "extends":
            for parent in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if presets.is_path(parent.value):
                    yield _replaced(parent, _relative(parent.value, source, target))


def _replaced(node: yaml.Node, text: str) -> Edit:
    return Edit(node.start_mark.index, node.end_mark.index, text_of(text))


def _relative(parent: str, source: Path, target: Path) -> str:
    """Path of a parent beside `source` as seen from `target`; absolute and home paths stay."""
    if parent.startswith(("/", "~")):
        return parent
    moved = os.path.relpath(paths.absolute(source.parent / parent), target.parent)
    return moved if moved.startswith(".") else f"./{moved}"
