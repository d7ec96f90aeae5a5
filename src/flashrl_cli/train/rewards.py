"""A run's own reward function around its start and end: its file, the calls before the start, and a failure of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.data import readers
from flashrl_cli.data.own import function_of
from flashrl_cli.data.rows import BadRows, Needs, Scoring, faults
from flashrl_cli.errors import InputError, Location, Problem, RunFailed
from flashrl_cli.memory.budget import Choice, decided
from flashrl_cli.reward_function import Call, Reference, Source, is_reference, short
from flashrl_cli.verl import rewards
from flashrl_cli.verl.overrides import data_path
from flashrl_cli.worker.scoring import Scorer, first, trial

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.plugins.reward import Report
    from flashrl_cli.train.plan import LaunchPlan

_SHOWN = 300


def source_of(resolved: Resolved) -> tuple[Source | None, list[Problem]]:
    """The file of a preset's reward function, if it has one; or the problems of its file."""
    function = resolved.spec.reward.function
    if function is None or not is_reference(function):
        return None, []
    where = resolved.origins["reward.function"].where
    try:
        return Source(Reference.parse(function).source(where)), []
    except InputError as error:
        return None, list(error.problems)


def with_reward(resolved: Resolved) -> Resolved:
    """The preset with the function that its data sets on this machine were prepared for, unless it names a reward.

    Other rows are scored as their data source asks.
    """
    spec = resolved.spec
    if spec.reward.function is not None or rewards.own_reward(spec.verl):
        return resolved
    found = dict(filter(None, map(function_of, _data_files(spec))))
    functions = list(dict.fromkeys(found.values()))
    if not functions:
        return resolved
    if len(functions) > 1:
        listed = ", ".join(f"{name} for {function}" for name, function in found.items())
        what = f"the data sets were prepared for several reward functions: {listed}"
        problem = Problem(what, resolved.origins["data.train"].where, "--set reward.function=FILE.py:NAME for all rows")
        return replace(resolved, broken=(*resolved.broken, problem))
    why = f"{' and '.join(found)} {'was' if len(found) == 1 else 'were'} prepared for it"
    chosen = {"reward.function": Choice(functions[0], why), "reward.sources": Choice(tuple(found), why)}
    return decided(resolved, chosen)


def problems(spec: RunSpec) -> list[Problem]:
    """What a run's reward function gives no reward for, of the first rows of the data files on this machine."""
    reward = spec.reward
    if reward.function is None:
        return []
    reference = Reference.parse(reward.function)
    with Scorer(reference.source(), str(reference.file), reference.name, reward.arguments, reward.timeout_s) as scorer:
        return trial(scorer, _calls(spec))


def _calls(spec: RunSpec) -> Iterator[tuple[Location, Call]]:
    for file in _data_files(spec):
        yield from first((place, _call(row)) for place, row in _rows(file, spec) if _is_own(row, spec))


def _is_own(row: Any, spec: RunSpec) -> bool:
    return spec.reward.sources is None or row["data_source"] in spec.reward.sources


def _call(row: Any) -> Call:
    return Call(row["data_source"], "", row["reward_model"]["ground_truth"], row.get("extra_info") or {})


def _data_files(spec: RunSpec) -> list[Path]:
    root = paths.data_root()
    named = [data_path("train")(name, root) for name in spec.data.train_sets]
    named += [data_path("test")(name, root) for name in spec.data.val_sets]
    return [path for path in map(Path, dict.fromkeys(named)) if path.is_file()]


def _rows(file: Path, spec: RunSpec) -> Iterator[tuple[Location, Any]]:
    """The rows of a file that verl can score; none for rows of a data set class of the user's."""
    if rewards.own_rows(spec.verl):
        return
    needs, bad = Needs(scoring=Scoring.OWN, prompt=rewards.prompt_column(spec.verl)), BadRows()
    for place, row in readers.read_rows(file, needs, bad):
        if not any(faults(row, needs)):
            yield place, row


class RewardFailed(RunFailed):
    """The run's own reward function failed."""


def failed(plan: LaunchPlan, report: Report) -> RewardFailed:
    """The error for a run whose reward function failed: row, response, and the traceback in the user's file."""
    place = Location(report.file, report.line)
    call, row = report.call, row_of(plan.spec, report) if report.call else None
    asked = f", for {row}" if row else f", for a row of {call['data_source']!r}" if call else ""
    fields = {"response": "solution_str", "ground truth": "ground_truth"} if call else {}
    lines = [
        f"the reward function {report.what} ({place}){asked}",
        *(f"  {title}: {short(call[field], _SHOWN)}" for title, field in fields.items()),
        *(f"  | {line}" for line in report.trace),
        f"log: {plan.attempt_paths.log}",
    ]
    hint = f"correct it, then go on with `--resume auto --force --name {plan.name}`"
    return RewardFailed("\n".join(lines), hint=hint)


def row_of(spec: RunSpec, report: Report) -> Location | None:
    """The row that a failed call was for, of the data files on this machine; None if none is like it."""
    call = report.call
    for file in _data_files(spec):
        with contextlib.suppress(InputError, OSError):
            for place, row in _rows(file, spec):
                same = (row["data_source"], row["reward_model"]["ground_truth"]) == (
                    call["data_source"],
                    call["ground_truth"],
                )
                if same and _is_within(row.get("extra_info"), call["extra_info"]):
                    return place
    return None


def _is_within(extra: Any, given: Any) -> bool:
    """Whether a row's `extra_info` is in that of a call, to which verl's reward managers add keys."""
    return all(value is None or (given or {}).get(key) == value for key, value in (extra or {}).items())
