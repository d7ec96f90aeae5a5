"""Whether a checkpoint holds what its architecture expects, judged by names, shapes and dtypes: no tensor is read.

One rule for every command that reads weights: each tensor of the architecture is there, with its shape, in floating
point, and nothing else is. All that is wrong is reported at once, by tensor and file. Names that a wrapper has changed
are refused with the fix rather than changed back: the folder would stay unreadable for every other tool.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.text import counted
from flashrl_cli.weights.contents import INDEX, Unreadable, is_missing, read_json, table
from flashrl_cli.weights.reading import FLOATS, Stored

if TYPE_CHECKING:
    from flashrl_cli.weights.architecture import Expected, Shapes

WRAPPERS = {
    "_orig_mod.": "as torch.compile leaves them: save the model's _orig_mod",
    "module.": "as DistributedDataParallel leaves them: save the model's module",
    "base_model.model.": "as PEFT leaves them: save the model after merge_and_unload()",
}
"""Prefixes that a wrapper puts before all names, and what to do about it."""
_PART = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_LISTED = 4
Found = Mapping[str, Stored]


def account(hf: Path, found: Found, expected: Expected | None) -> None:
    """Compare the tensors that are there with those that the architecture has.

    Raises Unreadable naming all tensors that lack, are too many or empty, or have another shape or kind of number.
    Where the architecture is unknown (`expected` None), wrappers and empty tensors are looked for, and nothing else can
    be.
    """
    problems = list(_wrapped(found, expected)) or [
        *_empty(found),
        *(_compared(hf, found, expected) if expected else ()),
    ]
    if problems:
        raise Unreadable("; ".join(problems))


def index_problems(hf: Path) -> list[str]:
    """What an index and the files that it names do not agree in; nothing without an index. Raises Unreadable."""
    if not (hf / INDEX).is_file():
        return []
    try:
        named: dict[str, str] = {**read_json(hf / INDEX)["weight_map"]}
        files = sorted(set(named.values()))
        missing = [file for file in files if is_missing(hf / file)]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Unreadable(f"{hf / INDEX} is damaged") from None
    problems = [f"{file}, which {INDEX} names, is missing" for file in missing]
    parts = {match[1] for match in map(_PART.fullmatch, files) if match}
    if len(parts) == 1 and len(files) < (count := int(parts.pop())):
        problems.append(f"{INDEX} names {len(files)} of {count} files")
    for file in files:
        if file not in missing:
            problems += _index_and_file(file, {name for name in named if named[name] == file}, set(table(hf / file)[0]))
    return problems


def _index_and_file(file: str, named: set[str], there: set[str]) -> Iterator[str]:
    if absent := sorted(named - there):
        yield f"{file} lacks what {INDEX} says is in it: {some(absent)}"
    if unnamed := sorted(there - named):
        yield f"{file} holds what {INDEX} does not place in it: {some(unnamed)}"


def _wrapped(found: Found, expected: Expected | None) -> Iterator[str]:
    """A prefix that all names have, unless the architecture has it."""
    for prefix, fix in WRAPPERS.items():
        named = [name for name in found if name.startswith(prefix)]
        if named and len(named) == len(found) and not (expected and expected.form(found).keys() & found.keys()):
            yield f"all tensors are named {prefix}…, {fix}, or rename them"


def _empty(found: Found) -> Iterator[str]:
    empty = sorted(name for name, one in found.items() if not math.prod(one.shape))
    if empty:
        what = counted(len(empty), "tensor is", "tensors are")
        yield f"{what} empty, as DeepSpeed's ZeRO-3 leaves what it did not gather before saving: {_placed(empty, found)}"


def _compared(hf: Path, found: Found, expected: Expected) -> Iterator[str]:
    wanted = expected.form(found)
    missing = sorted(wanted.keys() - found.keys() - expected.optional)
    if missing:
        yield f"missing {counted(len(missing), 'tensor')}: {some(missing)}{_elsewhere(hf, missing)}"
    unknown = sorted(name for name in found.keys() - wanted.keys() if not expected.ignores(name))
    if unknown:
        yield f"{counted(len(unknown), 'tensor')} that the architecture does not have: {_placed(unknown, found)}"
    shared = sorted(wanted.keys() & found.keys())
    yield from _misshapen([name for name in shared if math.prod(found[name].shape)], found, wanted)
    integers = [name for name in shared if found[name].dtype not in FLOATS and name not in expected.integers]
    if integers:
        kinds = ", ".join(sorted({found[name].dtype for name in integers}))
        yield f"{counted(len(integers), 'tensor')} in {kinds} and not in floating point: {_placed(integers, found)}"


def _misshapen(names: Sequence[str], found: Found, wanted: Shapes) -> Iterator[str]:
    wrong = [name for name in names if found[name].shape != wanted[name]]
    shown = [f"{_in_file(name, found)} {list(found[name].shape)}, not {list(wanted[name])}" for name in wrong[:_LISTED]]
    if wrong:
        yield f"other shapes than config.json asks for: {', '.join(shown)}{_more(wrong)}"


def _elsewhere(hf: Path, missing: Sequence[str]) -> str:
    """A note on a safetensors file of the folder that holds missing tensors, and that no index names."""
    for file in sorted(hf.glob("*.safetensors")):
        try:
            if set(missing) & table(file)[0].keys():
                return f" (in {file.name}, which {INDEX} does not name)"
        except Unreadable:
            continue
    return ""


def not_finite(names: Sequence[str], files: Mapping[str, Path | None]) -> Unreadable:
    """The error for tensors that hold NaN or infinite values."""
    placed = [_named(name, files.get(name)) for name in names[:_LISTED]]
    return Unreadable(f"{counted(len(names), 'tensor')} with NaN or infinite values: {', '.join(placed)}{_more(names)}")


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:_LISTED]) + _more(names)


def _placed(names: Sequence[str], found: Found) -> str:
    return ", ".join(_in_file(name, found) for name in names[:_LISTED]) + _more(names)


def _in_file(name: str, found: Found) -> str:
    return _named(name, found[name].file)


def _named(name: str, file: Path | None) -> str:
    return f"{name} (in {file.name})" if file else name


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
