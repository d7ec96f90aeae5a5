"""Sources of a data set's raw rows: local files, the Hugging Face hub, or sums drawn with a seed.

All three have the same few methods, and describe themselves in a form that is stored in the manifest and compared
later.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
import itertools
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flashrl_cli.contract import GYM_SOURCE
from flashrl_cli.data import arith, readers
from flashrl_cli.data.readers import BATCH, require
from flashrl_cli.data.rows import Fault, shown
from flashrl_cli.data.writing import Stamp, stamp, unchanged
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location, Problem
from flashrl_cli.hub import resolves
from flashrl_cli.paths import absolute
from flashrl_cli.plugins.scorers import ENTRY, compute_score
from flashrl_cli.verl import rewards

if TYPE_CHECKING:
    from flashrl_cli.data.recipes import Recipe
    from flashrl_cli.data.rows import BadRows, Located

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
NO_PROGRESS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
LOCAL = "--source PATH takes a file or folder that was fetched elsewhere"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
SPLITS = ("train", "test")


@dataclass(slots=True)
class HubSource:
    """A data set on the hub, or in the hub's local cache."""

    label: str
    config: str | None
    named: tuple[str, ...]
    """The splits that will be written; empty for those of SPLITS that the hub has."""
    loaded: Any = field(default=None, repr=False)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that will be written; the data set is downloaded first if its recipe does not name them."""
        if self.named:
            return self.named
        self._load()
        return SPLITS if "train" in self.loaded and self._test() else SPLITS[:1]

    def rows(self, split: str, bad: BadRows) -> Iterator[Located]:  # noqa: ARG002
        """Yield the rows of a split."""
        number = 0
        for table in self._split(split).with_format("arrow").iter(BATCH):
            for row in table.to_pylist():
                number += 1
                yield Location(f"{self.label}:{split}", number, unit="row"), row

    def count(self, split: str) -> int:
        """Number of rows of a split, which is downloaded first."""
        return len(self._split(split))

    def describe(self) -> dict[str, Any]:
        """Id, config, and the files in the hub's cache, whose folder is named after the commit."""
        used = {split: self._split(split).cache_files for split in self.splits}
        stamps = {split: [stamp(Path(file["filename"])) for file in cached] for split, cached in used.items()}
        return {"kind": "hub", "id": self.label, "config": self.config, "files": stamps}

    def matches(self, was: dict[str, Any]) -> bool:
        """Whether the id is the same; a newer commit is only fetched on request (`--force`)."""
        return (was.get("kind"), was.get("id"), was.get("config")) == ("hub", self.label, self.config)

    def _split(self, split: str) -> Any:
        """The split, or the only one that the hub has for a data set of one split."""
        self._load()
        if split == "test" and not self.named:
            return self.loaded[self._test()]
        if split in self.loaded:
            return self.loaded[split]
        if len(self.splits) == 1 and len(self.loaded) == 1:
            return next(iter(self.loaded.values()))
        raise InputError(f"{self.label} has no split {split!r}", hint=f"it has {', '.join(self.loaded)}; {LOCAL}")

    def _test(self) -> str | None:
        """What the hub calls the test split; many sets keep its answers and publish a validation split instead."""
        return next((name for name in ("test", "validation") if name in self.loaded), None)

    def _load(self) -> None:
        if self.loaded is not None:
            return
        detect_offline()
        datasets = require("datasets")
        try:
            self.loaded = datasets.load_dataset(self.label, self.config)
        except ValueError as error:
            raise InputError(
                f"{self.label}: {error}", hint="--source owner/name:config names a configuration"
            ) from error
        except (OSError, datasets.exceptions.DatasetsError) as error:
            why = "this machine is offline, and the hub's cache does not hold it" if is_offline() else str(error)
            raise EnvironmentNotReady(f"cannot fetch {self.label} from the hub: {why}", hint=LOCAL) from error


def go_offline() -> None:
    """Disable network access of the hub's libraries, which must not have been imported yet."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))


def is_offline() -> bool:
    """Whether network access of the hub's libraries is disabled."""
    return os.environ.get(OFFLINE[0], "").lower() in {"1", "on", "yes", "true"}


def detect_offline() -> None:
    """Go offline if the hub's name cannot be resolved, here or by a proxy: its libraries would retry for long."""
    if not is_offline() and not resolves(os.environ):
        go_offline()


def hide_progress() -> None:
    """Disable progress bars of the hub's libraries, which must not have been imported yet."""
    os.environ.update(dict.fromkeys(NO_PROGRESS, "1"))


class Source(Protocol):
    """Interface of a source: raw rows by split of the data set that is written."""

    @property
    def label(self) -> str:
        """The path or id that the user gave."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that will be written."""

    def rows(self, split: str, bad: BadRows) -> Iterator[Located]:
        """Yield `(where, raw row)`; entries that are not rows go to `bad`."""

    def count(self, split: str) -> int | None:
        """Number of rows, if it is known in advance."""

    def describe(self) -> dict[str, Any]:
        """Description of the source for the manifest, with hashes of the inputs."""

    def matches(self, was: dict[str, Any]) -> bool:
        """Whether `was`, read back from a manifest, describes this source as it is now."""


@dataclass(frozen=True, slots=True)
class LocalSource:
    """JSON lines, JSON, Parquet or CSV files."""

    label: str
    files: dict[str, tuple[Path, ...]]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits for which files were found."""
        return tuple(self.files)

    def rows(self, split: str, bad: BadRows) -> Iterator[Located]:
        """Yield the rows of all the split's files, in order of their names."""
        return itertools.chain.from_iterable(readers.read(path, bad) for path in self.files[split])

    def count(self, split: str) -> int | None:
        """Number of rows of all the split's files."""
        counts = [readers.count(path) for path in self.files[split]]
        return None if None in counts else sum(filter(None, counts))

    def describe(self) -> dict[str, Any]:
        """Files with size, modification time and hash."""
        stamps = {split: [_stamp(path) for path in paths] for split, paths in self.files.items()}
        return {"kind": "local", "path": str(absolute(self.label)), "files": stamps}

    def matches(self, was: dict[str, Any]) -> bool:
        """Whether the files are the same and unchanged."""
        if was.get("kind") != "local" or list(was["files"]) != list(self.files):
            return False
        return all(
            [s["path"] for s in was["files"][split]] == [str(absolute(p)) for p in paths]
            and all(map(unchanged, paths, was["files"][split]))
            for split, paths in self.files.items()
        )


def _stamp(path: Path) -> Stamp:
    with readers.readable(path):
        return stamp(absolute(path))


@dataclass(frozen=True, slots=True)
class SumsSource:
    """The sums of `arith`, drawn with a seed, which is among the manifest's options."""

    seed: int
    label: str = "numbers drawn here"

    @property
    def splits(self) -> tuple[str, ...]:
        """Both splits."""
        return SPLITS

    def rows(self, split: str, bad: BadRows) -> Iterator[Located]:  # noqa: ARG002
        """Yield the split's pairs."""
        drawn = enumerate(arith.pairs(self.seed)[split], start=1)
        return ((Location(split, number, unit="row"), {"a": a, "b": b}) for number, (a, b) in drawn)

    def count(self, split: str) -> int:
        """Number of rows of the split."""
        return arith.SIZES[split]

    def describe(self) -> dict[str, Any]:
        """A description that only says that the data is generated locally."""
        return {"kind": "generated"}

    def matches(self, was: dict[str, Any]) -> bool:
        """Whether `was` describes generated sums, too."""
        return was == self.describe()


GYM = "rg:"
"""Start of a source of tasks that reasoning-gym generates: `rg:chain_sum,gsm_symbolic`."""
GYM_CHECKED = 100
"""Number of rows of a task whose answers are scored when they are generated: all come from one generator, and some of
the scorers take a tenth of a second.
"""


@dataclass(frozen=True, slots=True)
class GymSource:
    """Tasks that reasoning-gym generates, the same number of rows of each (up to one)."""

    label: str
    rows_wanted: int
    seed: int

    @property
    def splits(self) -> tuple[str, ...]:
        """All rows are one split."""
        return SPLITS[:1]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(dict.fromkeys(name.strip() for name in self.label.removeprefix(GYM).split(",")))

    def rows(self, split: str, bad: BadRows) -> Iterator[Located]:  # noqa: ARG002
        """Yield the entries of one task after the other, each with the literal that its scorer needs.

        The answers of the first ones of each are scored. InputError for unknown tasks, EnvironmentNotReady without
        reasoning-gym.
        """
        gym = self._gym()
        for number, task in enumerate(self.tasks):
            count = self.rows_wanted // len(self.tasks) + (number < self.rows_wanted % len(self.tasks))
            random.seed(self.seed)  # two of the generators draw from Python's own generator, too
            made = gym.create_dataset(task, size=max(count, 1), seed=self.seed)
            for index in range(count):
                place = Location(f"{GYM}{task}", index + 1, unit="row")
                entry = _plain(made[index])
                if fault := _entry_fault(task, entry, score=index < GYM_CHECKED):
                    bad.add(place, fault)
                else:
                    yield place, {"task": task, **entry, ENTRY: repr(entry)}

    def count(self, split: str) -> int:  # noqa: ARG002
        """Number of rows that are generated."""
        return self.rows_wanted

    def describe(self) -> dict[str, Any]:
        """Tasks, number and seed, with the version that generated them."""
        return {"kind": "reasoning-gym", "tasks": self.tasks, "rows": self.rows_wanted, "seed": self.seed} | {
            "version": importlib.metadata.version("reasoning-gym")
        }

    def matches(self, was: dict[str, Any]) -> bool:
        """Whether `was` describes the same tasks; another version generates anew only on request (`--force`)."""
        mine = {"kind": "reasoning-gym", "tasks": self.tasks, "rows": self.rows_wanted, "seed": self.seed}
        return {key: value for key, value in was.items() if key != "version"} == mine

    def _gym(self) -> Any:
        rewards.require_gym()
        gym = importlib.import_module("reasoning_gym")
        there = sorted(importlib.import_module("reasoning_gym.factory").DATASETS.keys() - {"composite"})
        problems = [
            Problem(f"reasoning-gym has no task {name!r}", hint=_like(name, there))
            for name in self.tasks
            if name not in there
        ]
        if problems:
            hint = f"its {len(there)} tasks: {', '.join(there)}"
            raise InputError(f"{self.label} cannot be generated", problems=problems, hint=hint)
        return gym


def _like(name: str, there: list[str]) -> str | None:
    close = difflib.get_close_matches(name, there, n=2)
    return f"did you mean {' or '.join(close)}?" if close else None


def _plain(value: Any) -> Any:
    """An entry of Python's plain types, so that its literal can be read back: NumPy's numbers, others as text."""
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if hasattr(value, "item"):
        return value.item()
    return value if value is None or isinstance(value, str | int | float | bytes) else str(value)


def _entry_fault(task: str, entry: dict[str, Any], *, score: bool) -> Fault | None:
    """Why an entry cannot be trained on: its literal cannot be read back, or its own answer is not paid for."""
    try:
        same = ast.literal_eval(repr(entry)) == entry
    except (ValueError, SyntaxError):
        same = False
    if not same:
        return Fault("the entry cannot be written as text", "another task")
    if score and entry["answer"] is not None:
        source, response = f"{GYM_SOURCE}{task}", f"<answer>{entry['answer']}</answer>"
        if compute_score(source, response, entry["answer"], {ENTRY: repr(entry)})["acc"] != 1:
            return Fault(
                "the answer, written as a right one, is not paid in full", "another task", shown(entry["answer"])
            )
    return None


def open_source(recipe: Recipe, given: str | None, seed: int) -> Source:
    """The source that `--source` names, or the recipe's default. InputError if it is neither a path nor a hub id."""
    if given is None:
        if recipe.hub is None:
            return SumsSource(seed)
        return HubSource(recipe.hub, recipe.config, recipe.splits)
    config = recipe.config if given.partition(":")[0] == recipe.hub else None
    return named_source(given, recipe.splits, folder=recipe.config, config=config)


def gym_name(given: str) -> str:
    """Name of the data set of generated tasks that are named without one: `rg-chain_sum-gsm_symbolic`."""
    return given.replace(":", "-").replace(",", "-").replace(" ", "")


def named_source(
    given: str, splits: tuple[str, ...] = (), *, folder: str | None = None, config: str | None = None
) -> Source:
    """The file, folder or hub id `given`, with these splits or, if there are none, with those that it has.

    `folder` may hold a folder's files, `config` is the configuration of an id without one. InputError if it is neither
    a path nor an id.
    """
    path = Path(given).expanduser()
    if path.exists():
        return LocalSource(given, _find_files(path, splits, folder))
    if HUB_ID.fullmatch(given) and path.suffix not in readers.SOURCES:
        name, _, own_config = given.partition(":")
        return HubSource(name, own_config or config, splits)
    raise InputError(
        f"no such file or folder: {given}",
        hint="--source takes a file, a folder, or a hub id (owner/name or owner/name:config)",
    )


def _find_files(path: Path, splits: tuple[str, ...], config: str | None) -> dict[str, tuple[Path, ...]]:
    if path.is_dir():
        return _in_folder(path, splits, config)
    if path.suffix not in readers.SOURCES:
        raise InputError(f"cannot read {path}", hint=f"known formats are {', '.join(readers.SOURCES)}")
    splits = splits or SPLITS[:1]
    named = next((split for split in splits if _belongs(path, split)), splits[0])
    return {named: (path,)}


def _belongs(path: Path, split: str) -> bool:
    """Whether a file's name shows that it holds `split`: `train.jsonl`, `train-00000-of-00002.parquet`."""
    return re.fullmatch(rf"{split}([-_.].*)?", path.stem) is not None


def _in_folder(folder: Path, splits: tuple[str, ...], config: str | None) -> dict[str, tuple[Path, ...]]:
    """Files of every split; a set of one split takes whichever split the folder holds.

    Without splits it takes train and test if there are files of both, else all files as one split. It searches the
    folder itself, then the sub-folders where the hub stores data: the config's and `data`.
    """
    for place in (folder, *(folder / name for name in (config, "data") if name)):
        data = sorted(p for p in place.glob("*") if p.suffix in readers.SOURCES and p.is_file())
        found = {split: tuple(p for p in data if _belongs(p, split)) for split in SPLITS}
        if not splits and data:
            both = found if all(found.values()) else {"train": tuple(data)}
            return {split: _one_format(place, files) for split, files in both.items()}
        if len(splits) == 1:
            only = splits[0]
            found[only] = found[only] or found["train"] or found["test"] or tuple(data)
        if all(found[split] for split in splits):
            return {split: _one_format(place, found[split]) for split in splits}
    wanted = " and ".join(f"{split}.jsonl" for split in splits or SPLITS)
    raise InputError(f"{folder} does not hold the files for {wanted}", hint=_what_is_there(folder, wanted))


def _what_is_there(folder: Path, wanted: str) -> str:
    names = sorted(p.name for p in folder.iterdir())
    more = ", …" if len(names) > 8 else ""
    there = f"it holds {', '.join(names[:8])}{more}" if names else "it is empty"
    return f"{there}; name the files {wanted} (or .json, .parquet, .csv), or give one file"


def _one_format(folder: Path, files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Refuse a split that exists in two formats."""
    if len({path.suffix for path in files}) > 1:
        names = ", ".join(path.name for path in files)
        raise InputError(
            f"{folder} holds one split in several formats: {names}", hint="--source FILE names one of them"
        )
    return files
