"""Questions in verl's row schema, from a prepared data set, a file of rows, or the run's own validation set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.data import readers
from flashrl_cli.data.rows import BadRows, Needs, Raw, Scoring, judge
from flashrl_cli.errors import InputError
from flashrl_cli.runs import store
from flashrl_cli.verl import checkpoints as layout

if TYPE_CHECKING:
    from flashrl_cli.reward_function import Shipped


@dataclass(frozen=True, slots=True)
class Question:
    """One row: chat messages, and what verl's scorer needs to judge a response."""

    prompt: list[dict[str, str]]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] | None
    reward: Shipped | None = None
    """The user's function that scores responses, with its source; None for verl's scorer."""

    def line(self) -> str:
        """The question as one line of JSON, with a digest of its reward function."""
        data = asdict(self)
        del data["reward"]
        own = {} if self.reward is None else {"reward": self.reward.digest}
        return json.dumps(data | own, ensure_ascii=False, default=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """Questions under one name, and the file that they were read from."""

    name: str
    file: Path
    questions: tuple[Question, ...]


def choose_questions(
    names: str | None,
    run_folders: Iterable[Path],
    limit: int | None,
    *,
    scoring: Scoring = Scoring.VERL,
    own: Callable[[Path], Shipped | None] = lambda _: None,
) -> tuple[DataSet, ...]:
    """Data sets of `--dataset` (comma-separated names or files); if it is None, the runs' own validation files.

    `own` gives the reward function of the user's that scores a file's rows, if there is one. Raises InputError if there
    are no data sets, if they differ between runs, or if rows are not fit for `scoring`.
    """
    chosen = _recorded(run_folders) if names is None else [_named(name.strip()) for name in names.split(",")]
    files = list(dict.fromkeys(chosen))
    labels = _labels(files)
    return tuple(
        DataSet(name=labels[file], file=file, questions=tuple(_scored(file, limit, scoring, own(file))))
        for file in files
    )


def read(file: Path, limit: int | None, *, scoring: Scoring = Scoring.VERL) -> list[Question]:
    """The first `limit` questions of a file of rows, all of which are checked.

    Raises InputError that names missing columns and rows that are not fit for `scoring`.
    """
    needs, bad = Needs(scoring=scoring, text_only=True), BadRows()
    rows = judge(readers.read_rows(file, needs, bad), needs, bad)
    bad.check(str(file))
    if not rows:
        raise InputError(f"no rows in {file}")
    return [_question(row) for row in rows[:limit]]


def _scored(file: Path, limit: int | None, scoring: Scoring, own: Shipped | None) -> list[Question]:
    """The first `limit` questions of a file, with the function that scores those of its data sources."""
    if own is None:
        return read(file, limit, scoring=scoring)
    return [
        replace(one, reward=own) if own.scores(one.data_source) else one
        for one in read(file, limit, scoring=Scoring.OWN)
    ]


def _named(data: str) -> Path:
    if "/" in data or data.endswith(readers.SUFFIXES):
        file = paths.absolute(data)
        if not file.is_file():
            hint = "name a prepared data set, or a file of rows (parquet, json, jsonl)"
            raise InputError(f"no such file: {file}", hint=hint)
        return file
    file = paths.DatasetPaths.named(data).split("test")
    if not file.is_file():
        raise InputError(f"data set {data} is not prepared: no {file}", hint=f"flashrl prepare {data}")
    return file


def _recorded(run_folders: Iterable[Path]) -> list[Path]:
    """Validation files in the runs' newest plans, which must be the same for all runs."""
    recorded = set()
    for folder in run_folders:
        plan = store.newest_plan(store.read_run(paths.runs_root() / folder.name).paths)
        recorded.add(tuple(layout.val_files(plan.get("overrides", []))))
    if len(recorded) == 1 and (chosen := recorded.pop()):
        return list(chosen)
    what = (
        "the runs were validated on different data" if len(recorded) > 1 else "no run record says what to evaluate on"
    )
    raise InputError(what, hint="name it: --dataset gsm8k, or --dataset FILE.parquet")


def _labels(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file: its folder's for `test` files, else the file's own; both where names would collide."""
    names = {file: file.parent.name if file.stem == "test" else file.stem for file in files}
    count = Counter(names.values())
    return {file: name if count[name] == 1 else f"{file.parent.name}/{file.stem}" for file, name in names.items()}


def _question(row: Raw) -> Question:
    """The question of a row that passed the checks; columns that its scoring does not need may be missing."""
    reward = row.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    return Question(row["prompt"], str(row.get("data_source") or ""), truth, row.get("extra_info"))
