"""Questions in verl's row schema, from a prepared data set, a file of rows, or the run's own validation set."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.data import readers
from flashrl_cli.data.rows import BadRows, Needs, Raw, Scoring, judge
from flashrl_cli.errors import InputError
from flashrl_cli.runs import store
from flashrl_cli.text import counted
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.verl import rewards

Message = dict[str, str]

if TYPE_CHECKING:
    from flashrl_cli.reward_function import Shipped


@dataclass(frozen=True, slots=True)
class Question:
    """One row: chat messages, and what verl's scorer needs to judge a response."""

    prompt: list[Message]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """How questions become prompts.

    `system` replaces the system messages of the rows: None keeps them, and an empty text removes them. `shots` is the
    number of solved examples before each question. `chat_template` is the text of a Jinja template, empty for
    none, None for that of each tokenizer; `arguments` are variables for the template.
    """

    system: str | None = None
    shots: int = 0
    chat_template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


UNCHANGED = Prompting()
"""The messages of the rows, in the chat template of each tokenizer."""


def choose_questions(
    names: str | None,
    run_folders: Iterable[Path],
    limit: int | None,
    *,
    scoring: Scoring = Scoring.VERL,
    prompting: Prompting = UNCHANGED,
    seed: int = 0,
    own: Callable[[Path], Shipped | None] = lambda _: None,
) -> tuple[DataSet, ...]:
    """Data sets of `--dataset` (comma-separated names or files); if it is None, the runs' own validation files.

    The solved examples that `prompting` asks for are drawn with `seed` from the training rows beside each file. `own`
    gives the reward function of the user's that scores a file's rows, if there is one. Raises InputError if there are
    no data sets or examples, if they differ between runs, or if rows are not fit for `scoring`.
    """
    chosen = _recorded(run_folders) if names is None else [_named(name.strip()) for name in names.split(",")]
    files = list(dict.fromkeys(chosen))
    labels = _labels(files)
    found = []
    for file in files:
        asked = _scored(file, limit, scoring, own(file))
        shots = _shots(file, asked, prompting.shots, seed)
        put = tuple(replace(one, prompt=_prompt(one.prompt, shots, prompting.system)) for one in asked)
        found.append(DataSet(name=labels[file], file=file, questions=put))
    return tuple(found)


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


def _shots(file: Path, asked: Sequence[Question], count: int, seed: int) -> list[Message]:
    """Messages of `count` solved examples: rows of the training file beside `file` that ask none of its questions.

    An example is answered by its `extra_info.answer`, else by its truth in the form that its scorer reads. Raises
    InputError if there are too few, or if one has no answer.
    """
    if not count:
        return []
    train = file.with_name(f"train{file.suffix}")
    if train == file or not train.is_file():
        hint = "prepared data sets have one; of other files, name the questions' test.parquet and the examples' train"
        raise InputError(f"--shots {count}: no training rows for {file}: no {train}", hint=f"{hint}{file.suffix}")
    needs, bad, known = Needs(text_only=True), BadRows(), {json.dumps(one.prompt) for one in asked}
    rows_there = readers.read_rows(train, needs, bad)
    others = (one for one in rows_there if json.dumps(one[1].get("prompt"), default=str) not in known)
    draw = random.Random(seed)
    rows = judge(heapq.nsmallest(count, others, key=lambda _: draw.random()), needs, bad)
    bad.check(str(train))
    if len(rows) < count:
        raise InputError(f"--shots {count}: {train} has {counted(len(rows), 'other row')}", hint=f"--shots {len(rows)}")
    return [message for row in rows for message in (*_without_system(row["prompt"]), _answer(row, train))]


def _answer(row: Raw, train: Path) -> Message:
    answer = (row.get("extra_info") or {}).get("answer")
    if not isinstance(answer, str):
        answer = rewards.right_answer(row["data_source"], row["reward_model"]["ground_truth"])
    if answer is None:
        what = f"--shots: rows of {train} have no answer that an example could show"
        raise InputError(what, hint="put it into extra_info.answer of each row")
    return {"role": "assistant", "content": answer}


def _prompt(prompt: list[Message], shots: list[Message], system: str | None) -> list[Message]:
    """The messages of a question after its system message, or `system` instead, and the examples `shots`."""
    asked = _without_system(prompt)
    own = prompt[: len(prompt) - len(asked)] if system is None else []
    return [*own, *([{"role": "system", "content": system}] if system else []), *shots, *asked]


def _without_system(prompt: list[Message]) -> list[Message]:
    return list(itertools.dropwhile(lambda message: message["role"] == "system", prompt))


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
