"""Find the checkpoints and models that patterns name, and say why others cannot be evaluated.

`find` and `hf_folder` start from a pattern: `_meant` (paths on disk, else a model on the hub) → `_inside` (the steps,
models and adapters of a folder) → `_step`, `_model` or `_adapter` (the weights of one of them).
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli import hub, paths
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.runs import store
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.weights import PEFT_CONFIG, PEFT_WEIGHTS, Unreadable, Weights, holds_adapter_alone, read_json

EVAL_FOLDER = "eval"
"""Folder of a run that holds its evaluation; a glob over the run's steps matches it as well."""
_DEPTH = 3  # checkpoints/<project>/<run>/global_step_N
_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights that can be evaluated.

    `hf` is an HF folder, or config and tokenizer alone with the weights elsewhere (see `Weights`). `source` is the
    run's folder, or the model's own folder if it is not a step of a run (`step` is None then). `run` is the shortest
    name that distinguishes the sources. `quantized` is the quantization method of the HF folder's weights.
    """

    source: Path
    step: int | None
    hf: Path
    shards: tuple[Path, ...] = ()
    adapter: Path | None = None
    base: Path | None = None
    run: str = ""
    quantized: str | None = None

    @property
    def weights(self) -> Weights:
        """Where the checkpoint's weights are on disk."""
        return Weights(hf=self.hf, shards=self.shards, adapter=self.adapter, base=self.base)

    @property
    def path(self) -> Path:
        """The folder that belongs to this checkpoint alone: two adapters can share the `hf` of their base."""
        return self.adapter if self.adapter and not self.shards else self.hf


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that a pattern names but that cannot be evaluated, with the reason.

    `refused` marks a checkpoint whose weights are wrong.
    """

    path: Path
    reason: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """All that patterns name: checkpoints by run and numeric step, without duplicates, and what was skipped."""

    checkpoints: tuple[Checkpoint, ...]
    skipped: tuple[Skipped, ...]


def find(patterns: Sequence[str]) -> Found:
    """Look up globs, paths, and ids of models on the hub.

    A path may be that of a project, a run, a step, `actor`, an HF folder or an adapter folder. Raises NothingMatched,
    which names what is there instead, if nothing can be evaluated; InputError for a hub model that is not available.
    """
    found: dict[str, Checkpoint | Skipped] = {}
    for item in (item for pattern in patterns for item in _meant(pattern)):
        found.setdefault(os.path.realpath(item.path), item)
    checkpoints = _labelled([c for c in found.values() if isinstance(c, Checkpoint)])
    skipped = tuple(s for s in found.values() if isinstance(s, Skipped))
    if not checkpoints:
        raise nothing(patterns, skipped)
    return Found(checkpoints, skipped)


def nothing(patterns: Sequence[str], skipped: Iterable[Skipped]) -> NothingMatched:
    """The error for patterns that match nothing that can be evaluated; it names what was skipped or what is there."""
    lines = [f"  {s.path}: {s.reason}" for s in skipped] or [f"  {_there(p)}" for p in patterns]
    what = " ".join(patterns)
    hint = "name a run folder, global_step_N folders, an HF folder with safetensors, or a model on the hub"
    return NothingMatched("\n".join([f"no checkpoint to evaluate in: {what}", *lines]), hint=hint)


def model_or_step(path: Path) -> tuple[Path, int | None] | None:
    """The run's folder and step of a skipped path, or a model's folder and None.

    Returns None for neither, such as a step's critic or other files in its folder beside the policy.
    """
    policy = {layout.ACTOR, layout.HUGGINGFACE, layout.STEP_HUGGINGFACE}
    for folder in (path, *path.parents):
        if (step := layout.step_number(folder.name)) is not None:
            return (folder.parent, step) if policy.issuperset(path.relative_to(folder).parts) else None
    return (path, None) if (path / "config.json").is_file() or (path / PEFT_CONFIG).is_file() else None


def hf_folder(path: str) -> Checkpoint:
    """The one model that `path` names: an HF or adapter folder, a step, or an id on the hub.

    Raises InputError if `path` names no model.
    """
    hint = "name a folder with config.json and safetensors, a global_step_N, or a model on the hub"
    items = list(_meant(path))
    for item in items:
        if isinstance(item, Skipped):
            raise InputError(f"{item.path} is no model: {item.reason}", hint=hint)
    if len(items) != 1:
        what = f"{len(items)} checkpoints, and one is wanted" if items else "nothing"
        if not items and (missing := paths.prepared_model(path)):
            what, hint = f"{what}: no {missing}", f"flashrl prepare {path.removeprefix('prepared:')}"
        raise InputError(f"{path} names {what}", hint=hint)
    return _labelled([item for item in items if isinstance(item, Checkpoint)])[0]


def _meant(pattern: str) -> Iterator[Checkpoint | Skipped]:
    """What a pattern names: paths that exist, else a model on the hub."""
    found = _expand(pattern)
    if not found and hub.is_hub_id(pattern) and not paths.absolute(pattern).parent.is_dir():
        for item in _inside(hub.from_hub(pattern), 0):
            yield dataclasses.replace(item, run=pattern) if isinstance(item, Checkpoint) else item
    for path in found:
        yield from _named(path)


def _expand(pattern: str) -> list[Path]:
    path = paths.prepared_model(pattern) or paths.absolute(pattern)
    return [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207


def _named(path: Path) -> Iterator[Checkpoint | Skipped]:
    """Yield what one existing path names; a path that the user named explicitly is never skipped silently."""
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
    """Yield the checkpoints that `folder` is, is part of, or holds."""
    if folder.name == layout.HUGGINGFACE and folder.parent.name == layout.ACTOR:
        folder = folder.parent
    if folder.name in {layout.ACTOR, layout.STEP_HUGGINGFACE}:
        folder = folder.parent
    if layout.step_number(folder.name) is None and layout.step_number(folder.resolve().name) is not None:
        folder = folder.resolve()  # a link such as `latest` is replaced by the step that it points to
    if layout.step_number(folder.name) is not None or (folder / layout.ACTOR).is_dir():
        yield _step(folder)
    elif (folder / "config.json").is_file():
        yield _model(folder)
    elif (folder / PEFT_CONFIG).is_file():
        yield _adapter(folder)
    elif depth:
        for child in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield from _inside(child, depth - 1)


def _model(folder: Path) -> Checkpoint | Skipped:
    if problem := hub.hf_problem(folder):
        return _adapter(folder) if (folder / PEFT_CONFIG).is_file() else Skipped(folder, problem)
    if problem := hub.tokenizer_problem(folder):
        return Skipped(folder, problem)
    return Checkpoint(source=folder, step=None, hf=folder, quantized=hub.quantization(folder))


def _adapter(folder: Path) -> Checkpoint | Skipped:
    """An adapter as PEFT saves it, on the base that its config names."""
    if not (folder / PEFT_WEIGHTS).is_file():
        return Skipped(folder, f"an adapter without {PEFT_WEIGHTS}")
    try:
        name = read_json(folder / PEFT_CONFIG).get("base_model_name_or_path")
        if not name:
            return Skipped(folder, f"an adapter whose {PEFT_CONFIG} names no base model")
        base = hub.model_folder(str(name))
    except (Unreadable, InputError) as error:
        return Skipped(folder, f"an adapter whose base cannot be read: {error}")
    if problem := hub.tokenizer_problem(base):
        return Skipped(folder, f"{problem} in its base {base}")
    return Checkpoint(source=folder, step=None, hf=base, adapter=folder, base=base)


def _step(folder: Path) -> Checkpoint | Skipped:
    step = layout.step_number(folder.name)
    tracked = layout.tracked_step(folder.parent)
    actor = folder / layout.ACTOR
    if step is not None and tracked is not None and step > tracked:
        return Skipped(folder, f"newer than {layout.TRACKER} ({tracked}): its save did not finish")
    if not actor.is_dir():
        return Skipped(folder, f"no {layout.ACTOR}/ in it (pruned)")
    found = _weights(folder, actor)
    if isinstance(found, str):
        return Skipped(folder, found)
    if problem := hub.tokenizer_problem(found.hf):
        return Skipped(folder, f"{problem} in {found.hf.relative_to(folder)}/")
    return dataclasses.replace(found, source=folder if step is None else folder.parent, step=step)


def _weights(folder: Path, actor: Path) -> Checkpoint | str:
    """The weights of the step `folder`, or why they cannot be read."""
    own = actor / layout.HUGGINGFACE
    lora = (actor / layout.LORA).is_file()
    shards = layout.shards(actor)
    if not (lora and shards):  # the adapter that verl saves in Hugging Face's format has the names of the wrapped model
        for hf in (own, folder / layout.STEP_HUGGINGFACE, actor):
            if hub.hf_problem(hf) is None:
                return Checkpoint(source=folder, step=None, hf=hf, quantized=hub.quantization(hf))
    # in checkpoints of the original project's fork, config and tokenizer are beside the shards
    hf = actor if not (own / "config.json").is_file() and (actor / "config.json").is_file() else own
    if shards is None:
        return f"no weights in {layout.ACTOR}/"
    if shards.missing:
        return f"incomplete shards, missing or empty: {', '.join(shards.missing)}"
    if problem := hub.config_problem(hf):
        return f"{problem} in {hf.relative_to(folder)}/"
    found = Checkpoint(source=folder, step=None, hf=hf, shards=shards.files)
    return _lora(folder, found, actor) if lora else found


def _lora(folder: Path, found: Checkpoint, actor: Path) -> Checkpoint | str:
    try:
        alone = holds_adapter_alone(found.shards[0])
        base = _base_of_run(folder.parent) if alone else None
    except (Unreadable, InputError) as error:
        return f"a LoRA adapter that cannot be read: {error}"
    if alone and base is None:
        return "a LoRA adapter alone, and no run record names the model that it was trained on"
    return dataclasses.replace(found, adapter=actor, base=base)


def _base_of_run(run_folder: Path) -> Path | None:
    """The model that a run started from, according to the plan of its newest attempt.

    Raises InputError if the model is not available.
    """
    run = store.read_run(paths.runs_root() / run_folder.name).paths
    name = layout.model_path(store.newest_plan(run).get("overrides", []))
    return hub.model_folder(name) if name else None


def _labelled(found: list[Checkpoint]) -> tuple[Checkpoint, ...]:
    names = Counter(source.name for source in {c.source for c in found})
    labels = {s: s.name if names[s.name] == 1 else "/".join(s.parts[-2:]) for s in {c.source for c in found}}
    labelled = (dataclasses.replace(c, run=c.run or labels[c.source]) for c in found)
    return tuple(sorted(labelled, key=lambda c: (c.run, -1 if c.step is None else c.step)))


def _there(pattern: str) -> str:
    """`FOLDER holds a, b, …` for the nearest folder of a pattern that exists."""
    folder = next(p for p in paths.absolute(pattern).parents if p.is_dir())
    return f"{pattern}: {folder} holds {_names(folder)}"


def _names(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join([*names[:_LISTED], *(["…"] if len(names) > _LISTED else [])]) or "nothing"
