"""Checkpoints on disk: what a person's patterns name, what of it can be evaluated, and why the rest cannot."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli import paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.verl import checkpoints as layout

EVAL_FOLDER = "eval"
"""Folder of a run in which its evaluation lies; a glob over the run's steps meets it."""
_DEPTH = 3  # checkpoints/<project>/<run>/global_step_N
_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights that can be evaluated: an HF folder `hf`, or config and tokenizer in `hf` and the weights in `shards`.

    `source` is what it belongs to: the run's folder, or the HF folder itself when it is no step of a run (`step` None).
    `run` is the shortest name that tells the sources apart.
    """

    source: Path
    step: int | None
    hf: Path
    shards: tuple[Path, ...] = ()
    run: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that a pattern named and that cannot be evaluated, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """What patterns name: checkpoints by run and numeric step, without repetitions, and what was passed over."""

    checkpoints: tuple[Checkpoint, ...]
    skipped: tuple[Skipped, ...]


def find(patterns: Sequence[str]) -> Found:
    """Look up globs and paths of project folders, runs, steps, `actor` or HF folders.

    Raises NothingMatched if none of it can be evaluated, saying what lies there instead.
    """
    found: dict[str, Checkpoint | Skipped] = {}
    for path in (path for pattern in patterns for path in _expand(pattern)):
        for item in _named(path):
            key = item.hf if isinstance(item, Checkpoint) else item.path
            found.setdefault(os.path.realpath(key), item)
    checkpoints = _labelled([c for c in found.values() if isinstance(c, Checkpoint)])
    skipped = tuple(s for s in found.values() if isinstance(s, Skipped))
    if not checkpoints:
        raise nothing(patterns, skipped)
    return Found(checkpoints, skipped)


def nothing(patterns: Sequence[str], skipped: Iterable[Skipped]) -> NothingMatched:
    """The error for patterns of which nothing can be evaluated: each thing passed over, or what lies there."""
    lines = [f"  {s.path}: {s.reason}" for s in skipped] or [f"  {_lies_there(p)}" for p in patterns]
    what = " ".join(patterns)
    hint = "name a run folder, global_step_N folders, or an HF folder with safetensors"
    return NothingMatched("\n".join([f"no checkpoint to evaluate in: {what}", *lines]), hint=hint)


def hf_folder(path: str) -> Checkpoint:
    """The HF folder `path` (weights included) as a checkpoint without a step; raises InputError if it is none."""
    folder = paths.absolute(path)
    if problem := hf_problem(folder):
        raise InputError(f"{folder} is no HF model: {problem}", hint="name a folder with config.json and safetensors")
    return Checkpoint(source=folder, step=None, hf=folder, run=folder.name)


def hf_problem(folder: Path) -> str | None:
    """Why `folder` is no complete HF model (config, and safetensors in one file or as indexed); None if it is."""
    if problem := _config_problem(folder):
        return problem
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None if _filled(folder / "model.safetensors") else "no weights (model.safetensors)"
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{index.name} is damaged"
    missing = [name for name in names if not _filled(folder / name)]
    return f"missing or empty: {', '.join(missing)}" if missing else None


def _config_problem(folder: Path) -> str | None:
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return "no config.json"
    except ValueError:
        return "config.json is damaged"
    return None


def _filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _expand(pattern: str) -> list[Path]:
    path = paths.absolute(pattern)
    return [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207


def _named(path: Path) -> Iterator[Checkpoint | Skipped]:
    """What one existing path stands for; a path that a person named is never passed over in silence."""
    if path.name in {layout.TRACKER, EVAL_FOLDER}:
        return
    if path.is_file():
        yield Skipped(path, "a file, not a checkpoint")
    elif layout.CRITIC in {path.name, path.parent.name}:
        yield Skipped(path, "a critic, not a policy")
    else:
        inside = list(_inside(path, _DEPTH))
        yield from inside or [Skipped(path, f"no checkpoint in it, only {_names(path)}")]


def _inside(folder: Path, depth: int) -> Iterator[Checkpoint | Skipped]:
    """Checkpoints that `folder` is, is part of, or holds."""
    if folder.name == layout.HUGGINGFACE and folder.parent.name == layout.ACTOR:
        folder = folder.parent
    if folder.name == layout.ACTOR:
        folder = folder.parent
    if layout.step_number(folder.name) is None and layout.step_number(folder.resolve().name) is not None:
        folder = folder.resolve()  # a link like `latest` stands for its step
    if layout.step_number(folder.name) is not None or (folder / layout.ACTOR).is_dir():
        yield _step(folder)
    elif (folder / "config.json").is_file():
        problem = hf_problem(folder)
        yield Skipped(folder, problem) if problem else Checkpoint(source=folder, step=None, hf=folder)
    elif depth:
        for child in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield from _inside(child, depth - 1)


def _step(folder: Path) -> Checkpoint | Skipped:
    step = layout.step_number(folder.name)
    source = folder if step is None else folder.parent
    tracked = layout.tracked_step(folder.parent)
    actor = folder / layout.ACTOR
    if step is not None and tracked is not None and step > tracked:
        return Skipped(folder, f"newer than {layout.TRACKER} ({tracked}): its save did not finish")
    if not actor.is_dir():
        return Skipped(folder, f"no {layout.ACTOR}/ in it (pruned)")
    hf = actor / layout.HUGGINGFACE
    if hf_problem(hf) is None:
        return Checkpoint(source=source, step=step, hf=hf)
    found = layout.shards(actor)
    if problem := _shards_problem(actor, found):
        return Skipped(folder, problem)
    return Checkpoint(source=source, step=step, hf=hf, shards=found.files if found else ())


def _shards_problem(actor: Path, found: layout.Shards | None) -> str | None:
    if (actor / layout.LORA).is_file():
        return "a LoRA adapter, not a whole model"
    if found is None:
        return f"no weights in {layout.ACTOR}/"
    if found.missing:
        return f"incomplete shards, missing or empty: {', '.join(found.missing)}"
    problem = _config_problem(actor / layout.HUGGINGFACE)
    return f"{problem} in {layout.ACTOR}/{layout.HUGGINGFACE}/" if problem else None


def _labelled(found: list[Checkpoint]) -> tuple[Checkpoint, ...]:
    names = Counter(source.name for source in {c.source for c in found})
    labelled = [
        dataclasses.replace(c, run=c.source.name if names[c.source.name] == 1 else "/".join(c.source.parts[-2:]))
        for c in found
    ]
    return tuple(sorted(labelled, key=lambda c: (c.run, -1 if c.step is None else c.step)))


def _lies_there(pattern: str) -> str:
    """`FOLDER holds a, b, …` for the nearest folder of a pattern that exists."""
    folder = next(p for p in paths.absolute(pattern).parents if p.is_dir())
    return f"{pattern}: {folder} holds {_names(folder)}"


def _names(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join([*names[:_LISTED], *(["…"] if len(names) > _LISTED else [])]) or "nothing"
