"""The axes of a sweep: keys and values of `--sweep` from options and files, their combinations and run names."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.config import yaml_file
from flashrl_cli.config.layers import leaves
from flashrl_cli.config.resolve import SWEPT, is_text
from flashrl_cli.config.yaml_file import text_of
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Options

EXAMPLE = "--sweep rollout=bf16,int8, or --sweep FILE.yaml"
SAME = {key: name for name, key in SWEPT.items()}
"""Keys that have a separate option, with the name of each in a sweep."""
PLACES = ("name", "description", "trainer.project")
"""Keys that name a run or the folder of its checkpoints."""
PARTS = ("grid", "zip")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Keys that vary together; each row has a value for each key, in the syntax of `--set`, `--rollout` or `--tis`."""

    keys: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    where: Location


def read_axes(texts: Sequence[str], given: Options) -> list[Axis]:
    """Axes of all `--sweep` texts, in order; `given` are the options that apply to every run. Reads the named files.

    Raises InputError with every problem, except those that can be found only with the preset.
    """
    problems: list[Problem] = []
    axes: list[Axis] = []
    for text in texts:
        axes += _of_file(text, problems) if is_file(text) else _of_option(text, problems)
    problems += _misplaced(axes, given)
    if problems:
        raise InputError(f"--sweep: {counted(len(problems), 'problem')}", problems=problems)
    return axes


def is_file(text: str) -> bool:
    """Whether a `--sweep` text names a file; keys never start with `.`, `/` or `~`."""
    return text.startswith((".", "/", "~")) or (text.endswith((".yaml", ".yml")) and "=" not in text)


def _of_option(text: str, problems: list[Problem]) -> Iterator[Axis]:
    written, equals, values = text.partition("=")
    key = written.strip()
    if not equals or not key:
        problems.append(Problem("not of the form key=value,value", _option(text), EXAMPLE))
        return
    texts, wrong = yaml_file.items(values, _option(key))
    hint = "write a value between two commas; quote text that holds a comma, a bracket or #"
    problems += [Problem(problem.message, problem.where, hint) for problem in wrong]
    if texts:
        yield Axis(keys=(key,), rows=tuple((value,) for value in texts), where=_option(key))
    elif not wrong:
        problems.append(Problem("no value", _option(key), f"--sweep {key}=value,value"))


def _option(text: str) -> Location:
    return Location("--sweep", key=text if text.isprintable() else ascii(text))


def _of_file(text: str, problems: list[Problem]) -> Iterator[Axis]:
    path = paths.absolute(text)
    document = yaml_file.read(path, text, kind="sweep")
    problems += document.problems
    if document.problems:
        return
    as_written = yaml_file.read(path, text, verbatim=PARTS, kind="sweep").data
    yield from _of_parts(document, as_written, problems)


def _of_parts(document: yaml_file.Document, as_written: Mapping[str, Any], problems: list[Problem]) -> Iterator[Axis]:
    """Yield axes of a file: each key of `grid` separately, the keys of each map in the list `zip` together."""
    unknown = [part for part in document.data if part not in PARTS]
    hint = "a sweep's keys are grid and zip"
    problems += [Problem(f"unknown key {part}", document.line_of(part), hint) for part in unknown]
    grid, zipped = document.data.get("grid") or {}, document.data.get("zip") or []
    if not isinstance(grid, dict):
        problems.append(Problem("grid should be a map of keys", document.line_of("grid"), "rollout: [bf16, int8]"))
    else:
        for key, values in leaves(grid):
            where = document.line_of(f"grid.{key}")
            yield from _axis({key: values}, dict(leaves(as_written["grid"])), where, problems)
    if not isinstance(zipped, list) or not all(isinstance(group, dict) for group in zipped):
        problems.append(
            Problem("zip should be a list of maps", document.line_of("zip"), "zip: [{a: [1, 2], b: [3, 4]}]")
        )
        return
    for number, group in enumerate(zipped):
        where = document.line_of("zip")
        yield from _axis(dict(leaves(group)), dict(leaves(as_written["zip"][number])), where, problems)
    if not problems and not (grid or zipped):
        problems.append(Problem("nothing varies", document.where, "grid: {rollout: [bf16, int8]}"))


def _axis(
    columns: Mapping[str, Any], as_written: Mapping[str, Any], where: Location, problems: list[Problem]
) -> Iterator[Axis]:
    wrong = [key for key, values in columns.items() if not isinstance(values, list) or not values]
    problems += [Problem(f"{key} should be a list of values", where, f"{key}: [value, value]") for key in wrong]
    if wrong or not columns:
        return
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        problems.append(Problem(f"keys that go together need as many values each: {listed}", where))
        return
    texts = [
        [_quoted(str(value)) for value in as_written[key]] if is_text(key) else list(map(text_of, values))
        for key, values in columns.items()
    ]
    yield Axis(keys=tuple(columns), rows=tuple(zip(*texts, strict=True)), where=where)


def _quoted(text: str) -> str:
    """A variable's value in a form that `--set` reads back unchanged."""
    return text if yaml_file.value(text, is_text=True).data == text else json.dumps(text, ensure_ascii=False)


def _misplaced(axes: Sequence[Axis], given: Options) -> Iterator[Problem]:
    """Yield problems with keys: given twice, also given by another option, or naming a run's folder."""
    taken = {SAME.get(key, key): f"--set {key}" for key in (text.partition("=")[0].strip() for text in given.sets)}
    taken |= {"rollout": "--rollout"} if given.rollout is not None else {}
    taken |= {"tis": "--tis"} if given.tis is not None else {}
    for axis in axes:
        for key in axis.keys:
            name = SAME.get(key, key)
            if name in taken:
                yield Problem(f"{key} is given by {taken[name]}, too", axis.where, "a key varies in one place")
            if name in PLACES:
                yield Problem(f"{key} names a run's place, not what it trains", axis.where, "--name names the runs")
            taken.setdefault(name, str(axis.where))


MANY, MOST = 64, 1000
"""Number of runs above which `many` is required, and the largest number of runs in a sweep."""
LONGEST_WORD = 40
LONGEST_NAME = 190


@dataclass(frozen=True, slots=True)
class Point:
    """One combination: a value text for each key that varies, in the order of the axes."""

    values: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return " ".join(f"{key}={text}" for key, text in self.values)

    def texts(self) -> list[str]:
        """The values as they were written."""
        return [text for _, text in self.values]

    def data(self) -> dict[str, Any]:
        """The values as plain data."""
        return {key: _value(key, text) for key, text in self.values}

    def options(self, given: Options) -> Options:
        """The options of the point's run; `given` are the options that all points share."""
        return replace(given, point=self.values)


def points(axes: Sequence[Axis], *, many: bool = False) -> list[Point]:
    """Every combination of the axes' rows, the last axis varying fastest.

    Raises InputError for more than 64 unless `many`, and for more than 1000.
    """
    count = math.prod(len(axis.rows) for axis in axes)
    if count > MOST:
        raise InputError(f"a sweep of {count:,} runs", hint=f"{MOST:,} at most; keys that go together belong in zip")
    if count > MANY and not many:
        raise InputError(f"a sweep of {count:,} runs", hint=f"--yes starts more than {MANY}")
    return [
        Point(tuple(pair for axis, row in zip(axes, rows, strict=True) for pair in zip(axis.keys, row, strict=True)))
        for rows in itertools.product(*(axis.rows for axis in axes))
    ]


def run_names(bases: Sequence[str], found: Sequence[Point], *, in_bases: Sequence[str] = ()) -> list[str]:
    """A name for the run of each point: its base and a word for each value, except for keys in `in_bases`.

    If two points get the same words (paths with equal ends), a hash of their values is added; names depend on nothing
    else.
    """
    keys = [key for key, _ in found[0].values if key not in in_bases]
    heads = _heads(keys)
    plain = ["-".join([base, *_words(point, heads)]) for base, point in zip(bases, found, strict=True)]
    often = Counter(plain)
    return [
        name if often[name] == 1 and len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{_hash(point)}"
        for name, point in zip(plain, found, strict=True)
    ]


def _heads(keys: Sequence[str]) -> dict[str, str]:
    """Each key as it is written in names: with as few of its last parts as distinguish it from the other keys."""
    parts = {key: re.sub(r"[^\w.-]+", "", key, flags=re.ASCII).split(".") for key in keys}
    heads = {}
    for key in keys:
        tails = (".".join(parts[key][-count:]) for count in range(1, len(parts[key])))
        others = [".".join(parts[other]) for other in keys if other != key]
        unique = (tail for tail in tails if not any(f".{other}".endswith(f".{tail}") for other in others))
        heads[key] = next(unique, ".".join(parts[key]))
    return heads


def _words(point: Point, heads: dict[str, str]) -> list[str]:
    return [_word(heads[key], key, text) for key, text in point.values if key in heads]


def _word(head: str, key: str, text: str) -> str:
    word = _short(_value(key, text))
    if key == "rollout":
        return word
    return f"{head}{word}" if key == "tis" or not word[:1].isalpha() else f"{head}_{word}"


def _short(value: Any) -> str:
    """A value as part of a name: the shorter form of a number, the last part of a path, letters and digits only."""
    text = value if isinstance(value, str) else text_of(value)
    if isinstance(value, float) and math.isfinite(value):
        scientific = f"{Decimal(repr(value)).normalize():e}".replace("e+", "e")
        text = min(text.removesuffix(".0"), scientific, key=len)
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", last).lstrip(".")[:LONGEST_WORD].rstrip("-.")


def _hash(point: Point) -> str:
    return hashlib.sha256(str(point.values).encode()).hexdigest()[:6]


def _value(key: str, text: str) -> Any:
    """The value that `--set` makes of a text (some keys keep it as it is), or the text itself if it is not a value."""
    document = yaml_file.value(text, is_text=is_text(key))
    return text if document.problems else document.data
