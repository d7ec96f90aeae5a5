"""The row that verl trains on, and the check of rows for `prepare`, `train`, `eval`, `bench` and `--calibrate`.

A row for which no answer can get a reward trains nothing and evaluates to zero without any error. It is therefore
refused before anything starts, with file, row and fix.
"""

from __future__ import annotations

import enum
import json
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from flashrl_cli.data import truths
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.text import counted
from flashrl_cli.verl import rewards

SHOWN = 5
"""Number of rows that are listed for each type of fault."""
_KINDS = 12
"""Number of types of faults that are listed."""
_LONGEST_VALUE = 40
ROLES = ("system", "user", "assistant", "tool")
ASKING = ("user", "tool")
"""Roles of a last message that a model answers."""
MEDIA = ("images", "videos", "audios")
"""Columns with media that verl shows to a model in addition to the prompt."""
_TYPES: dict[type, str] = {
    type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "text",
    dict: "an object", list: "a list", tuple: "a map",
}  # fmt: skip
_CHAT = '[{"role": "user", "content": "…"}]'
_SEARCH_TRUTH = '{"target": ["an answer", …]}'
_TEST_CASES = '{"inputs": […], "outputs": […]}'
Raw = Mapping[str, Any]


class Message(TypedDict):
    """One turn of the prompt, before the chat template is applied."""

    role: str
    content: str


class Reward(TypedDict):
    """The value that the scorer compares a response with."""

    style: str
    ground_truth: str


class Row(TypedDict):
    """One row of verl's parquet files; the columns and their order are those of verl's own preprocess scripts."""

    data_source: str
    prompt: list[Message]
    ability: str
    reward_model: Reward
    extra_info: dict[str, Any]


Located = tuple[Location, Raw]


@dataclass(frozen=True, slots=True)
class Fault:
    """The reason why a row is unusable; `value` is the row's content there, and no part of the type of fault."""

    message: str
    fix: str | None = None
    value: str | None = None


class BadRow(ValueError):
    """A raw row that cannot be converted to a training row."""

    def __init__(self, message: str, *, fix: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.fault = Fault(message, fix, None if value is None else shown(value))


class Scoring(enum.Enum):
    """What scores the responses to the rows: verl's functions, the user's own function, or nothing."""

    VERL = enum.auto()
    OWN = enum.auto()
    NONE = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The requirements on rows, which depend on their use."""

    scoring: Scoring = Scoring.VERL
    own_sources: Collection[str] = ()
    """Data sources whose rows a function of the user's scores, beside verl's functions."""
    prompt: str = "prompt"
    """The column that holds the prompt."""
    text_only: bool = False
    """Whether the model is shown only the prompt, without images."""

    def by_verl(self, row: Raw) -> bool:
        """Whether verl's functions score a row."""
        return self.scoring is Scoring.VERL and row.get("data_source") not in self.own_sources

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        if self.scoring is Scoring.NONE:
            return (self.prompt,)
        return ("data_source", self.prompt, "reward_model")


def make_row(data_source: str, prompt: str, truth: str, extra: Mapping[str, Any], *, ability: str = "math") -> Row:
    """Create a row with one user turn and a rule-based reward."""
    return Row(
        data_source=data_source,
        prompt=[Message(role="user", content=prompt)],
        ability=ability,
        reward_model=Reward(style="rule", ground_truth=truth),
        extra_info=dict(extra),
    )


def text(raw: Raw, *columns: str) -> str:
    """Text of the first of `columns` that `raw` has; BadRow if there is none, or it is empty or not a text."""
    column = next((name for name in columns if name in raw), None)
    if column is None:
        raise BadRow(f"no column {columns[0]!r} (the row has: {', '.join(map(printable, raw)) or 'nothing'})")
    value = raw[column]
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is {kind(value)}, not text", value=value)
    if not value.strip():
        raise BadRow(f"{column!r} is empty")
    return value


def kind(value: Any) -> str:
    """Name of a value's type, in terms that apply to both JSON and Parquet."""
    return kind_of(type(value))


def kind_of(type_: type) -> str:
    """Name of a type, in terms that apply to both JSON and Parquet."""
    return _TYPES.get(type_, type_.__name__)


def shown(value: Any) -> str:
    """A value in the form used in messages: printable, on one line and short, however deeply nested it is."""
    line = repr(value) if isinstance(value, str) else reprlib.repr(value)
    return line if len(line) <= _LONGEST_VALUE else f"{line[:_LONGEST_VALUE]}…"


def printable(name: Any) -> str:
    """A column name or key in a form that a message can show."""
    return str(name) if str(name).isprintable() else ascii(name)


def folded(row: Mapping[str, Any], column: str = "prompt") -> str:
    """The text of a row's messages without differences in case and spaces."""
    return " ".join("\0".join(turn["content"] or "" for turn in row[column]).casefold().split())


def judge(located: Iterable[Located], needs: Needs, bad: BadRows) -> list[Raw]:
    """The rows that are usable for `needs`; faults of the other rows go to `bad`.

    Raises EnvironmentNotReady if verl's reward functions, or libraries that they need, are not installed.
    """
    rows: list[Raw] = []
    places: list[Location] = []
    for place, row in located:
        found = list(faults(row, needs))
        for fault in found:
            bad.add(place, fault)
        if not found:
            rows.append(row)
            places.append(place)
    if needs.scoring is not Scoring.VERL or not rows:
        return rows
    if any(rewards.scorer(row["data_source"]) is rewards.GYM for row in rows):
        rewards.require_gym()
    claims = {number: _claim(row) for number, row in enumerate(rows) if needs.by_verl(row)}
    numbers = list(claims)
    unpaid = {numbers[place]: why for place, why in truths.unpaid(list(claims.values())).items()}
    for number, why in unpaid.items():
        source, truth = claims[number]
        scorer = rewards.scorer(source)
        form = scorer.answer.format("…") if scorer and scorer.answer else "an answer"
        fix = f"verl looks for {form} in a response and compares what stands there (of numbers: 1080, not 1,080)"
        bad.add(places[number], Fault(f"reward_model.ground_truth {why}", fix, shown(truth)))
    return [row for number, row in enumerate(rows) if number not in unpaid]


def _claim(row: Raw) -> truths.Claim:
    source, truth = row["data_source"], row["reward_model"]["ground_truth"]
    return source, {"target": truth["target"]} if rewards.scorer(source) is rewards.SEARCH else truth


def faults(row: Raw, needs: Needs) -> Iterator[Fault]:
    """Yield the faults in the form of a row."""
    if missing := [name for name in needs.columns if name not in row]:
        yield Fault(f"no column {', '.join(missing)}", f"it has: {', '.join(map(printable, row)) or 'nothing'}")
        return
    yield from _prompt_faults(row[needs.prompt], needs.prompt)
    extra = row.get("extra_info")
    if extra is not None and not isinstance(extra, dict):
        yield Fault(f"extra_info is {kind(extra)}, not an object", "an object, or leave the column out")
    if needs.text_only:
        for name in MEDIA:
            if row.get(name):
                yield Fault(f"{name} are not shown to the model here", "rows of text alone")
    if needs.scoring is not Scoring.NONE:
        yield from _reward_faults(row, needs)


def _prompt_faults(prompt: Any, column: str) -> Iterator[Fault]:
    if not isinstance(prompt, list):
        yield Fault(f"{column} is {kind(prompt)}, not a list of messages", _CHAT, shown(prompt))
        return
    if not prompt:
        yield Fault(f"{column} has no messages", _CHAT)
        return
    if odd := [turn for turn in prompt if not isinstance(turn, dict)]:
        yield Fault(f"a message of {column} is {kind(odd[0])}, not an object", _CHAT, shown(odd[0]))
        return
    for turn in prompt:
        if fault := _message_fault(turn, column):
            yield fault
            return
    if prompt[-1]["role"] not in ASKING:
        yield Fault(
            f"the last message of {column} is of role {prompt[-1]['role']}: nothing is asked",
            "end the prompt with the user's message; an answer goes to extra_info.answer",
        )


def _message_fault(turn: Mapping[str, Any], column: str) -> Fault | None:
    """The fault of one message, or None."""
    role, content = turn.get("role"), turn.get("content")
    if role is None and turn.get("from") is not None:
        fix = "rename them to role (human: user, gpt: assistant) and content"
        return Fault(f"a message of {column} has from and value (ShareGPT), not role and content", fix)
    if role not in ROLES:
        what = "has no role" if role is None else f"has the role {shown(role)}"
        return Fault(f"a message of {column} {what}", f"one of {', '.join(ROLES)}")
    return _content_fault(turn, role, content)


def _content_fault(turn: Mapping[str, Any], role: str, content: Any) -> Fault | None:
    if isinstance(content, list):
        return Fault(f"the content of the {role} message is a list of parts, not text", "join the text of its parts")
    calls = role == "assistant" and bool(turn.get("tool_calls"))
    if content is None and not calls:
        what = "is null" if "content" in turn else "is missing"
        return Fault(f"the content of the {role} message {what}", "text in every message")
    if content is not None and not isinstance(content, str):
        return Fault(f"the content of the {role} message is {kind(content)}, not text", None, shown(content))
    if not (content or "").strip() and role == "user":  # an empty system message disables the template's default one
        return Fault("the content of the user message is empty", "remove the row, or ask something")
    return None


def _reward_faults(row: Raw, needs: Needs) -> Iterator[Fault]:
    source, reward = row["data_source"], row["reward_model"]
    if not isinstance(source, str) or not source.strip():
        what = kind(source) if not isinstance(source, str) else "empty"
        yield Fault(f"data_source is {what}, not the name of a data source", "openai/gsm8k, math_dapo, …")
    elif needs.by_verl(row) and not rewards.is_scored(source):
        fix = "one that verl scores (openai/gsm8k, math_dapo, …), or a reward function of your own in training"
        yield Fault(f"verl has no scorer for data_source {shown(source)}", fix)
    if not isinstance(reward, dict) or "ground_truth" not in reward:
        what = "has no ground_truth" if isinstance(reward, dict) else f"is {kind(reward)}, not an object"
        yield Fault(f"reward_model {what}", '{"style": "rule", "ground_truth": "72"}')
    elif needs.by_verl(row) and isinstance(source, str):
        if rewards.scorer(source) is not rewards.GYM:
            yield from _truth_faults(source, reward["ground_truth"])
        elif not (isinstance(extra := row.get("extra_info"), dict) and isinstance(extra.get("entry"), str)):
            yield Fault("extra_info has no entry of reasoning-gym", "`flashrl prepare rg:TASK` writes such rows")


def _truth_faults(source: str, truth: Any) -> Iterator[Fault]:
    """Yield reasons why a truth cannot be compared at all; whether it can be matched is up to the scorer."""
    scorer, name = rewards.scorer(source), "reward_model.ground_truth"
    if scorer is rewards.SEARCH:
        target = truth.get("target") if isinstance(truth, dict) else None
        golden = target if isinstance(target, list) and target else [target]
        if not all(isinstance(one, str) and one.strip() for one in golden):
            yield Fault(f"{name} holds no golden answers", _SEARCH_TRUTH, shown(truth))
    elif scorer is rewards.PROGRAMS:
        if not _are_test_cases(truth):
            yield Fault(f"{name} holds no test cases", f"JSON text: {_TEST_CASES}", shown(truth))
    elif not isinstance(truth, str):
        fix = "write it as text: verl's scorer compares text, and no answer would ever be right"
        yield Fault(f"{name} is {kind(truth)}, not text", fix, None if truth is None else shown(truth))
    elif not truth.strip():
        yield Fault(f"{name} is empty", "the answer as text, or remove the row")


def _are_test_cases(truth: Any) -> bool:
    try:
        cases = json.loads(truth) if isinstance(truth, str) else truth
    except (ValueError, RecursionError):
        return False
    if not isinstance(cases, dict):
        return False
    inputs, outputs = cases.get("inputs"), cases.get("outputs")
    return isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0


@dataclass(slots=True)
class _Group:
    """Rows of one file with the same type of fault: their number, and the first few."""

    count: int = 0
    first: list[tuple[Location, str | None]] = field(default_factory=list)

    def add(self, place: Location, value: str | None) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((place, value))

    def problem(self, fault: Fault) -> Problem:
        """The group as one problem: `FILE:row 3: what; 12 rows: 3 ('½'), 5 ('5%'), …`."""
        (place, value), *more = self.first
        if not more:
            return Problem(f"{fault.message}: {value}" if value else fault.message, place, fault.fix)
        listed = [str(place.line) + (f" ({value})" if value else "") for place, value in self.first]
        rest = ", …" if self.count > len(listed) else ""
        return Problem(f"{fault.message}; {self.count:,} rows: {', '.join(listed)}{rest}", place, fault.fix)


class BadRows:
    """All rows that cannot be used: their number, and the first few of each type of fault in each file."""

    def __init__(self) -> None:
        self.count = 0
        self._last: Location | None = None
        self._groups: dict[tuple[str, Fault], _Group] = {}

    def add(self, place: Location, fault: Fault) -> None:
        """Record one fault of a row."""
        self.count += place != self._last
        self._last = place
        group = self._groups.setdefault((place.source, Fault(fault.message, fault.fix)), _Group())
        group.add(place, fault.value)

    def problems(self) -> list[Problem]:
        """One problem for each type of fault in each file, in the order of their first rows."""
        found = [group.problem(fault) for (_, fault), group in self._groups.items()]
        left_out = len(found) - _KINDS
        more = [Problem(f"and {left_out:,} more kinds of faults")] if left_out > 0 else []
        return [*found[:_KINDS], *more]

    def check(self, name: str, after: str = "") -> None:
        """Raise InputError if there was any fault; `name` says whose rows they are, `after` names the consequence."""
        if self.count:
            rows = counted(self.count, "row")
            raise InputError(
                f"{name}: {rows} cannot be used{after}",
                hint="correct or remove them, then run the same command again",
                problems=self.problems(),
            )
