"""The reward function of the user's that grades an evaluation: of `--reward`, or of the runs that are evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli import contract, paths
from flashrl_cli.data.own import function_of
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.reward_function import Call, Reference, Shipped
from flashrl_cli.runs import store
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.worker.scoring import Scorer, first, trial

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import DataSet

_HINT = "name the one to grade with: --reward FILE.py:NAME"


def chosen(
    reward: str | None, threshold: float | None, run_folders: Iterable[Path]
) -> Callable[[Path], Shipped | None]:
    """A function from a file of rows to the user's reward function that scores them; None for verl's scorers.

    `reward` (`FILE.py:NAME`) scores all files. Otherwise a run's own function scores the files that the run was
    trained or validated on, and other files are scored by the function that they were prepared for, if there is
    one. A score above `threshold` counts as right; None for the run's own, or 0.5. Raises InputError for a file
    that does not define the function, and if runs were trained on a file with different functions.
    """
    if reward is not None:
        given = _given(reward)
        own = given if threshold is None else replace(given, threshold=threshold)
        return lambda _: own
    folders = list(run_folders)

    def find(file: Path) -> Shipped | None:
        found = {one.digest: one for folder in folders if (one := _of_run(paths.runs_root() / folder.name, file))}
        if len(found) > 1:
            raise InputError(f"the runs were trained on {file} with different reward functions", hint=_HINT)
        own = next(iter(found.values()), None) or _of_data(file)
        return own if own is None or threshold is None else replace(own, threshold=threshold)

    return find


def check(data: Iterable[DataSet]) -> None:
    """Call the users' reward functions for the first questions. Raises InputError if one gives no reward."""
    problems: list[Problem] = []
    for one in data:
        own = [(number, question) for number, question in enumerate(one.questions, 1) if question.reward]
        if not own or (shipped := own[0][1].reward) is None:
            continue
        rows = (
            (Location(str(one.file), number, unit="row"), Call(q.data_source, "", q.ground_truth, q.extra_info or {}))
            for number, q in own
        )
        source, arguments = shipped.source or "", shipped.arguments
        with Scorer(source, shipped.file, shipped.name, arguments, shipped.timeout_s) as scorer:
            problems += trial(scorer, first(rows))
    if problems:
        raise InputError("the responses cannot be graded with this reward; nothing was generated", problems=problems)


def _given(reward: str, where: str = "--reward") -> Shipped:
    reference = Reference.parse(reward, where)
    return Shipped(copy="", file=str(reference.file), name=reference.name, source=reference.source(where))


def _of_data(file: Path) -> Shipped | None:
    """The reward function that a file of rows was prepared for, which scores its data set's rows."""
    prepared = function_of(file)
    return prepared and replace(_given(prepared[1], str(file)), sources=(prepared[0],))


def _of_run(folder: Path, file: Path) -> Shipped | None:
    """A run's own reward function with its source, if `file` is one of the run's data files."""
    run = store.read_run(folder).paths
    plan = store.newest_plan(run)
    text = plan.get("env", {}).get(contract.ENV_REWARD)
    if not text or file not in layout.data_files(plan["overrides"]):
        return None
    copy = run.attempt(plan["attempt"]).reward
    try:
        source = copy.read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"run {run.name} was trained with a reward function, and {copy} is gone", hint=_HINT) from None
    return replace(Shipped(**json.loads(text)), copy="", source=source)
