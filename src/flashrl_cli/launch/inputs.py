"""What a run reads from this machine: data files, whose rows are judged, model folders and a smoothing profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.data import readers
from flashrl_cli.data.rows import BadRows, Needs, Scoring, faults, judge
from flashrl_cli.data.writing import Types
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.verl import rewards
from flashrl_cli.verl.overrides import data_path, model_path
from flashrl_cli.verl.platform import rollout_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.data.rows import Located

PROFILE = "rollout.profile"
DATA = ("data.train", "data.val")


def local_inputs(spec: RunSpec, data_root: Path) -> dict[str, Path]:
    """Spec keys to the files and folders that they name on this machine; a hub id names none."""
    named = {
        "data.train": data_path("train")(spec.data.train, data_root),
        "data.val": data_path("test")(spec.data.val, data_root),
        "model.path": model_path(spec.model.path, data_root),
    }
    if spec.algorithm.advantage == "gae" and spec.critic.path:
        named["critic.path"] = model_path(spec.critic.path, data_root)
    if profile := rollout_options(spec).profile:
        named[PROFILE] = profile
    return {key: Path(path) for key, path in named.items() if path.startswith("/")}


def row_problems(spec: RunSpec, data_root: Path) -> list[Problem]:
    """What is wrong with the rows of the files that are here, all of which are read.

    Rows of a data set class of the person's own may have any form. Raises EnvironmentNotReady for a missing library.
    """
    if rewards.own_rows(spec.verl):
        return []
    scoring = Scoring.OWN if rewards.own_reward(spec.verl) else Scoring.VERL
    needs = Needs(scoring=scoring, prompt=rewards.prompt_column(spec.verl))
    here = local_inputs(spec, data_root)
    found: list[Problem] = []
    for file in dict.fromkeys(here[key] for key in DATA if key in here):
        if file.exists():
            found += _problems(file, needs)
    return found


def _problems(file: Path, needs: Needs) -> list[Problem]:
    bad = BadRows()
    try:
        rows = judge(_uniform(readers.read_rows(file, needs, bad), needs, bad), needs, bad)
    except InputError as error:
        return [Problem(error.message, str(file), error.hint)]
    if not rows and not bad.count:
        return [Problem("holds no rows", str(file), "flashrl prepare writes rows as verl reads them")]
    return bad.problems()


def _uniform(located: Iterator[Located], needs: Needs, bad: BadRows) -> Iterator[Located]:
    """Yield the rows; those of JSON whose types Arrow would not load with those of the rows before go to `bad`, too."""
    types = Types()
    for place, row in located:
        if not place.unit and not any(faults(row, needs)):  # a line; Parquet has one type for each column
            for fault in types.faults(place, row):
                bad.add(place, fault)
        yield place, row


def vocabulary(spec: RunSpec, data_root: Path) -> int | None:
    """Rows of the policy's embedding, from its config.json; None for a policy that is not on this machine."""
    folder = local_inputs(spec, data_root).get("model.path")
    try:
        size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"] if folder else None
    except (OSError, ValueError, KeyError):
        return None
    return size if isinstance(size, int) else None
