"""Questions in verl's row schema: a prepared data set, a parquet file, or the run's own validation set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashrl_cli import paths
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.evals.results import DataSet
from flashrl_cli.verl import checkpoints as layout

_COLUMNS = ("data_source", "prompt", "reward_model")


@dataclass(frozen=True, slots=True)
class Question:
    """One row: chat messages, and what verl's scorer needs to judge a response."""

    prompt: list[dict[str, str]]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] | None

    def line(self) -> str:
        """The question as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, default=str)


def choose(names: str | None, run_folders: Iterable[Path], limit: int | None) -> tuple[DataSet, ...]:
    """Data sets of `--dataset` (names or parquet files, with commas between), or the runs' own validation files when it is None.

    Raises InputError if that names nothing, or not the same for all runs, or what cannot be evaluated.
    """
    asked = _recorded(run_folders) if names is None else [_named(name.strip()) for name in names.split(",")]
    files = list(dict.fromkeys(asked))
    labels = _labels(files)
    return tuple(DataSet(name=labels[file], file=file, questions=tuple(read(file, limit))) for file in files)


def read(file: Path, limit: int | None) -> list[Question]:
    """The first `limit` questions of a parquet file; raises InputError naming missing columns and bad rows."""
    rows = _rows(file)
    problems = [p for where, row in rows if (p := _problem(where, row))]
    if problems:
        what = f"{len(problems)} of {len(rows)} rows of {file} cannot be evaluated"
        raise InputError(what, problems=problems[:10])
    if not rows:
        raise InputError(f"no rows in {file}")
    return [_question(row) for _, row in rows[:limit]]


def _named(data: str) -> Path:
    if "/" in data or data.endswith(".parquet"):
        file = paths.absolute(data)
        if not file.is_file():
            hint = "name a prepared data set, or a parquet file"
            raise InputError(f"no such file: {file}", hint=hint)
        return file
    file = paths.DatasetPaths.named(data).split("test")
    if not file.is_file():
        raise InputError(f"data set {data} is not prepared: no {file}", hint=f"flashrl prepare {data}")
    return file


def _recorded(run_folders: Iterable[Path]) -> list[Path]:
    """Validation files that the runs' records name, which must be the same for all."""
    recorded = {tuple(_validation_files(folder)) for folder in run_folders}
    if len(recorded) == 1 and (chosen := recorded.pop()):
        return list(chosen)
    what = (
        "the runs were validated on different data" if len(recorded) > 1 else "no run record says what to evaluate on"
    )
    raise InputError(what, hint="name it: --dataset gsm8k, or --dataset FILE.parquet")


def _validation_files(run_folder: Path) -> list[Path]:
    """Validation files in the plan of the run's last attempt that has one."""
    run = paths.RunPaths(run_folder.name, paths.runs_root() / run_folder.name, run_folder)
    plans = [plan for n in reversed(run.attempts()) if (plan := run.attempt(n).plan).is_file()]
    if not plans:
        return []
    return layout.val_files(json.loads(plans[0].read_text(encoding="utf-8")).get("overrides", []))


def _labels(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file: its folder's for the test split of a prepared data set, else its own, longer where two would be alike."""
    names = {file: file.parent.name if file.stem == "test" else file.stem for file in files}
    alike = Counter(names.values())
    return {file: name if alike[name] == 1 else f"{file.parent.name}/{file.stem}" for file, name in names.items()}


def _rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{file} is no parquet file: {error}", hint="flashrl prepare NAME writes one") from error
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        columns = ", ".join(table.column_names)
        hint = f"it has: {columns}; flashrl prepare writes verl's schema"
        raise InputError(f"{file} lacks the column {', '.join(missing)}", hint=hint)
    return [(f"{file}:row {n}", row) for n, row in enumerate(table.to_pylist())]


def _problem(where: str, row: dict[str, Any]) -> Problem | None:
    if not isinstance(row["prompt"], list) or not row["prompt"]:
        return Problem("prompt is not a list of messages", where)
    if not isinstance(row["reward_model"], dict) or row["reward_model"].get("ground_truth") is None:
        return Problem("no reward_model.ground_truth", where)
    return None


def _question(row: dict[str, Any]) -> Question:
    return Question(row["prompt"], row["data_source"], row["reward_model"]["ground_truth"], row.get("extra_info"))
