r"""Data sets of the user's own: a recipe from options or a YAML file, and the conversion of rows by it.

The recipe names the columns of question and answer, the words around the question, and the reward. The built-in rewards
are verl's scorers for GSM8K, MATH and DAPO, with the prompt wording that makes a model answer in their form, and exact
text. All values are checked, with option or file and line, before a row is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flashrl_cli import files
from flashrl_cli.config import yaml_file
from flashrl_cli.config.yaml_file import nearest, text_of
from flashrl_cli.contract import EXACT_SOURCE, GYM_SOURCE
from flashrl_cli.data import readers, truths
from flashrl_cli.data.recipes import (
    DAPO_PREFIX,
    DAPO_SUFFIX,
    GSM8K_MARK,
    GSM8K_SUFFIX,
    MATH_SUFFIX,
    Recipe,
    boxed_answer,
    message,
    plain,
    without_empty,
)
from flashrl_cli.data.rows import BadRow, BadRows, Message, Raw, Reward, Row, Scoring, kind, printable, shown, text
from flashrl_cli.data.sources import GYM
from flashrl_cli.data.writing import read_manifest
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.paths import DatasetPaths, absolute
from flashrl_cli.plugins.scorers import ENTRY
from flashrl_cli.reward_function import Reference, is_reference
from flashrl_cli.verl import rewards

if TYPE_CHECKING:
    from flashrl_cli.data.sources import Source

SCHEMA_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
RESERVED = "show"
"""The word that `prepare` takes as a sub-command."""
SHARE = 0.95
"""Share of the rows that are trained on where the source has no test split and the recipe does not say."""
LOOK = 200
"""Number of rows whose columns are compared with the recipe, and that `--init` looks at."""
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}")
_LONGEST_TEMPLATE = 100_000
_FILE_NAME = 255


class BuiltIn(NamedTuple):
    """A reward that needs no code of the user's: the rows' data source, and the words around a question."""

    data_source: str
    template: str


REWARDS: Mapping[str, BuiltIn] = {
    "gsm8k": BuiltIn("openai/gsm8k", f"{{prompt}} {GSM8K_SUFFIX}"),
    "math": BuiltIn("DigitalLearningGmbH/MATH-lighteval", f"{{prompt}} {MATH_SUFFIX}"),
    "dapo": BuiltIn("math_dapo", f"{DAPO_PREFIX}\n\n{{prompt}}\n\n{DAPO_SUFFIX}"),
    "exact": BuiltIn(EXACT_SOURCE, "{prompt}"),
}
GYM_REWARD = "reasoning-gym"
"""Reward of generated tasks, which no other rows can have."""
GYM_TEMPLATE = (
    "{prompt}\n\nThink step by step, and write the final answer, and nothing else, between <answer> and </answer>."
)
GYM_ROWS = 1000
ANSWER = "answer"
"""Column of the answer unless a map names another."""
FORMS = f"{', '.join(REWARDS)}, or FILE.py:function"
DEFAULT_REWARD = "math"
_GUESSES = {
    "prompt": ("prompt", "question", "problem", "instruction", "query", "input", "text"),
    "answer": ("answer", "solution", "ground_truth", "final_answer", "target", "label", "output", "response"),
}
"""Usual names of the columns, for hints and `--init`; the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRecipe:
    """The recipe of a data set of the user's own; paths in it are absolute, and the template is text.

    `places` says where the user wrote each value, for messages.
    """

    source: str
    prompt: str = "prompt"
    answer: str = ANSWER
    prompt_template: str
    system: str | None = None
    answer_regex: str | None = None
    reward: str = DEFAULT_REWARD
    split: float = SHARE
    rows: int | None = None
    """Number of rows that are generated; None for a source that has its own."""
    places: Mapping[str, Location] = field(default_factory=dict, compare=False, repr=False)

    def document(self) -> dict[str, Any]:
        """The recipe as plain data, as the manifest keeps it; `read` reads it back."""
        left_out = {"prompt", "answer", "places"} | ({"rows"} if self.rows is None else set())
        data = {key: value for key, value in asdict(self).items() if key not in left_out}
        return {"schema_version": SCHEMA_VERSION, "map": {"prompt": self.prompt, "answer": self.answer}, **data}

    @property
    def function(self) -> str | None:
        """The user's reward function as FILE.py:function; None for a built-in reward."""
        return None if self.reward in REWARDS or self.reward == GYM_REWARD else self.reward

    @property
    def needs_no_answer(self) -> bool:
        """Whether rows may lack the answer: those of a function of the user's, if no column is named for it."""
        return self.function is not None and self.answer == ANSWER

    @property
    def scoring(self) -> Scoring:
        """What scores responses to the rows."""
        return Scoring.OWN if self.function else Scoring.VERL

    def recipe(self, name: str) -> Recipe:
        """How the rows of data set `name` are converted."""
        columns = (self.prompt, self.answer, *template_fields(self.prompt_template))
        columns += ("task", "metadata", ENTRY) if self.reward == GYM_REWARD else ()
        return Recipe(
            splits=(),
            convert=_Converter(name, self).row,
            columns=None if self.function else tuple(dict.fromkeys(columns)),
            repeats=True,
            scoring=self.scoring,
            hold_out=1 - self.split,
        )

    def check_columns(self, source: Source) -> None:
        """Raise InputError for columns of the map and fields of the template that the source's first rows lack."""
        first = itertools.islice(source.rows(source.splits[0], BadRows()), LOOK)
        rows = [row for _, row in first]
        there = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        if not rows:
            return
        problems = list(self._missing(rows, there))
        if problems:
            raise InputError(
                f"{source.label} does not have what the recipe names; nothing was written",
                problems=problems,
                hint=f"it has: {', '.join(map(printable, there))}",
            )

    def _missing(self, rows: Sequence[Raw], there: Sequence[str]) -> Iterator[Problem]:
        for role, column in (("prompt", self.prompt), ("answer", self.answer)):
            optional = role == "answer" and self.needs_no_answer
            if not optional and not any(_has(row, column) for row in rows):
                yield Problem(
                    f"no column {column!r} for {role}",
                    self.places.get("map", Location("--map")),
                    _column_hint(role, column, there),
                )
        for name in template_fields(self.prompt_template):
            if name != "prompt" and not any(_has(row, name) for row in rows):
                close = nearest(name, ["prompt", *there], 1)
                hint = f"did you mean {{{close[0]}}}?" if close else "for braces that are no field write {{ and }}"
                where = self.places.get("prompt_template", Location("--prompt-template"))
                yield Problem(f"the template's {{{name}}} is no column", where, hint)


def _column_hint(role: str, column: str, there: Sequence[str]) -> str:
    guess = next((name for name in _GUESSES[role] if name in there), None) or next(
        iter(nearest(column, there, 1)), None
    )
    return f"--map {role}={guess or 'COLUMN'}"


def template_fields(template: str) -> list[str]:
    """Names of the columns that a template names in braces."""
    return list(dict.fromkeys(found[1] for found in _FIELD.finditer(template) if found[1]))


def fill(template: str, values: Callable[[str], str]) -> str:
    r"""The template with `values(name)` for each `{name}`; `{{` and `}}` are braces, and so is `{}` of `\boxed{}`."""
    return _FIELD.sub(lambda found: values(found[1]) if found[1] else found[0][0], template)


def _has(raw: Raw, column: str) -> bool:
    return column in raw or _nested(raw, column) is not None


def _nested(raw: Raw, column: str) -> Any:
    """Value at a dotted path: `reward_model.ground_truth`; None if there is none."""
    value: Any = raw
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _cell(raw: Raw, column: str) -> Any:
    """The value of a column, which may be a dotted path; BadRow if the row lacks it."""
    if column in raw:
        return raw[column]
    value = _nested(raw, column)
    if value is None:
        text(raw, column)  # raises
    return value


def _as_text(raw: Raw, column: str) -> str:
    """A cell as text; numbers are written as JSON has them, whole ones without a fraction."""
    value = _cell(raw, column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return text({column: value}, column)


class _Converter:
    """Converts rows by a recipe."""

    def __init__(self, name: str, own: OwnRecipe) -> None:
        self.own = own
        self.data_source = name if own.function else ""
        if own.reward in REWARDS:
            self.data_source = REWARDS[own.reward].data_source
        self.regex = re.compile(own.answer_regex, re.DOTALL) if own.answer_regex else None

    def row(self, raw: Raw, split: str, index: int) -> Row:
        """The row for a raw row; raises BadRow."""
        extra: dict[str, Any] = {"index": index, **self._extra(raw), "split": split}
        return Row(
            data_source=self.data_source or f"{GYM_SOURCE}{raw['task']}",
            prompt=self._prompt(raw),
            ability="own",
            reward_model=Reward(style="rule", ground_truth=self._truth(raw)),
            extra_info=extra,
        )

    def _prompt(self, raw: Raw) -> list[Message]:
        """The messages: the system's, and the question (or a chat that ends with it) in the template's words."""
        value = _cell(raw, self.own.prompt)
        earlier: list[Message] = []
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            if not all({"role", "content"} <= turn.keys() for turn in value):
                raise BadRow(f"a message of {self.own.prompt!r} lacks role or content", value=value)
            *earlier, last = [message(turn) for turn in value]
            if last["role"] != "user":
                what = f"the last message of {self.own.prompt!r} is of role {last['role']}: nothing is asked"
                raise BadRow(what, fix="chats that end with the user's message")
            question = text(dict(last), "content")
        else:
            question = _as_text(raw, self.own.prompt)

        def of(name: str) -> str:
            return question if name == "prompt" else _as_text(raw, name)

        if self.own.system is not None:
            earlier = [Message(role="system", content=self.own.system), *(m for m in earlier if m["role"] != "system")]
        return [*earlier, Message(role="user", content=fill(self.own.prompt_template, of))]

    def _truth(self, raw: Raw) -> Any:
        if self.own.reward == GYM_REWARD:
            return raw["answer"] or ""  # some tasks have many right answers, and name none
        if self.own.needs_no_answer and not _has(raw, self.own.answer):
            return ""
        value = _cell(raw, self.own.answer)
        if self.own.function and self.regex is None and not isinstance(value, str | int | float):
            return without_empty(value, depth=1)
        answer = _as_text(raw, self.own.answer)
        truth = self._matched(self.regex, answer) if self.regex else self._final(answer) or answer
        return (truth if self.own.function else plain(self.data_source, truth)).strip()

    def _final(self, answer: str) -> str | None:
        """The final answer within one that is written as the reward's responses are; None if it is not."""
        match self.own.reward:
            case "gsm8k" if GSM8K_MARK in answer:
                return answer.rpartition(GSM8K_MARK)[2]
            case "math":
                return boxed_answer(answer)
            case "exact":
                return answer
        return None

    def _matched(self, regex: re.Pattern[str], answer: str) -> str:
        """What the group `answer`, or else the first one, of `regex` holds in its last match."""
        found = None
        for found in regex.finditer(answer):  # noqa: B007
            pass
        group = found and found["answer" if "answer" in regex.groupindex else 1]
        if not group or not group.strip():
            what = "has no match of" if found is None else "leaves nothing in the group of"
            raise BadRow(f"{self.own.answer!r} {what} the regex {shown(regex.pattern)}", value=answer)
        return group.strip()

    def _extra(self, raw: Raw) -> dict[str, Any]:
        """What a reward function of the user's gets besides the answer: the other columns.

        With another reward the answer's whole text, as `answer` if a response could be written so: evaluations show
        that as an example.
        """
        if self.own.function:
            taken = {self.own.prompt, self.own.answer}
            others: dict[str, Any] = without_empty({key: value for key, value in raw.items() if key not in taken})
            return others
        if self.own.reward == GYM_REWARD:
            return {"task": raw["task"], ENTRY: raw[ENTRY]}
        whole = raw.get(self.own.answer)
        if not isinstance(whole, str):
            return {}
        return {"answer" if self.regex is None and self._final(whole) else "solution": whole}


class _Wrong(ValueError):
    """A value that a recipe cannot have, and how to write it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Value(NamedTuple):
    """A value of a recipe and where it was written."""

    value: Any
    where: Location


Given = dict[str, Value]
OPTIONS = {
    key: f"--{key.replace('_', '-')}"
    for key in ("source", "map", "prompt_template", "system", "answer_regex", "reward", "split", "rows")
}
"""The option of each key of a recipe."""


def from_options(**options: Any) -> Given:
    """The values that were given by options."""
    return {key: Value(value, Location(OPTIONS[key])) for key, value in options.items() if value is not None}


def from_file(path: Path, shown_as: str) -> tuple[Given, list[Problem]]:
    """The values of a recipe file with their lines, and its problems; relative paths are from the file's folder."""
    document = yaml_file.read(path, shown_as, kind="recipe")
    given = {key: Value(value, document.where.at(document.lines.get(key))) for key, value in document.data.items()}
    problems = list(document.problems)
    version = given.pop("schema_version", Value(SCHEMA_VERSION, document.where))
    if version.value != SCHEMA_VERSION:
        problems.append(_other_version(version))
        return {}, problems
    for key in [key for key in given if key not in OPTIONS]:
        close = nearest(key, OPTIONS, 1)
        hint = f"did you mean {close[0]}?" if close else f"keys are {', '.join(('schema_version', *OPTIONS))}"
        problems.append(Problem(f"no key {key!r} in a recipe", given.pop(key).where, hint))
    for key in ("source", "prompt_template", "reward"):
        if key in given and isinstance(given[key].value, str):
            given[key] = Value(_beside(absolute(path).parent, given[key].value), given[key].where)
    return {key: value for key, value in given.items() if value.value is not None}, problems


def _beside(folder: Path, value: str) -> str:
    """`value` as an absolute path, if it names a file or a folder (or a function in a file) relative to `folder`."""
    name, _, function = value.rpartition(":") if is_reference(value) else (value, "", "")
    function = function and f":{function}"
    path = folder / Path(name).expanduser()
    return f"{path}{function}" if len(name) <= _FILE_NAME and "\n" not in name and path.exists() else value


def _other_version(version: Value) -> Problem:
    return Problem(
        f"schema_version {shown(version.value)}: this flashrl reads recipes of version {SCHEMA_VERSION}",
        version.where,
        "`flashrl prepare --source … --init FILE` writes one",
    )


def from_manifest(manifest: Mapping[str, Any], path: Path) -> Given:
    """The recipe that a manifest keeps. InputError if it is of another version."""
    recipe = dict(manifest.get("recipe") or {})
    where = Location(str(path), key="recipe")
    version = recipe.pop("schema_version", None)
    if recipe and version != SCHEMA_VERSION:
        raise InputError("the data set's recipe cannot be read", problems=[_other_version(Value(version, where))])
    return {key: Value(value, where) for key, value in recipe.items() if key in OPTIONS and value is not None}


def read(given: Given, name: str) -> tuple[OwnRecipe | None, list[Problem]]:
    """The recipe of data set `name` and its problems, all of them; the recipe is None if there are any."""
    problems: list[Problem] = []

    def value(key: str, check: Callable[[Any], Any], default: Any = None) -> Any:
        if key not in given:
            return default
        try:
            return check(given[key].value)
        except _Wrong as error:
            problems.append(Problem(str(error), given[key].where, error.hint))
            return default

    source = value("source", _source)
    if "source" not in given:
        problems.append(Problem(f"no source for {name}", hint="--source FILE|FOLDER|HUB_ID"))
    generated = isinstance(source, str) and source.startswith(GYM)
    if generated:
        given = {**given, "map": given.get("map", Value({"prompt": "question"}, given["source"].where))}
        problems += [
            Problem("generated tasks have columns and a scorer of their own", given[key].where, "drop it")
            for key, usual in (("map", {"prompt": "question", "answer": "answer"}), ("reward", GYM_REWARD))
            if key in given and given[key].value not in (usual, {"prompt": "question"})
        ]
        given = {key: one for key, one in given.items() if key != "reward"}
    elif "rows" in given:
        problems.append(Problem("only tasks of reasoning-gym are generated", given["rows"].where, "--limit N"))
    reward = GYM_REWARD if generated else value("reward", _reward, DEFAULT_REWARD)
    columns = value("map", _columns, {})
    usual = GYM_TEMPLATE if generated else REWARDS[reward].template if reward in REWARDS else "{prompt}"
    template = value("prompt_template", _template, usual)
    own = OwnRecipe(
        source=source or "",
        prompt=columns.get("prompt", "prompt"),
        answer=columns.get("answer", ANSWER),
        prompt_template=template,
        system=value("system", _text),
        answer_regex=value("answer_regex", _regex),
        reward=reward,
        split=value("split", _share, SHARE),
        rows=value("rows", _count, GYM_ROWS if generated else None),
        places={key: one.where for key, one in given.items()},
    )
    return (None if problems else own), problems


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(f"should be text, not {kind(value) if not isinstance(value, str) else 'empty'}")
    return value


def _source(value: Any) -> str:
    return str(absolute(value)) if Path(_text(value)).expanduser().exists() else value


def _columns(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",")]
        if not all(equals and key.strip() and column.strip() for key, equals, column in pairs):
            raise _Wrong(f"{shown(value)} is no map", "prompt=COLUMN,answer=COLUMN")
        value = {key.strip(): column.strip() for key, _, column in pairs}
    if not isinstance(value, dict) or not all(isinstance(column, str) and column for column in value.values()):
        raise _Wrong("a map gives each of prompt and answer the name of a column", "quote names that are numbers")
    if unknown := [key for key in value if key not in _GUESSES]:
        raise _Wrong(f"a map has prompt and answer, not {shown(unknown[0])}", "prompt=COLUMN,answer=COLUMN")
    return dict(value)


def _template(value: Any) -> str:
    template = _text(value)
    if len(template) <= _FILE_NAME and "\n" not in template and (path := absolute(template)).is_file():
        try:
            template = path.read_text(encoding="utf-8-sig").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise _Wrong(f"cannot read {path}: {error}") from error
    if len(template) > _LONGEST_TEMPLATE:
        raise _Wrong(f"the template has more than {_LONGEST_TEMPLATE:,} characters")
    if not template_fields(template):
        raise _Wrong(
            f"the template {shown(template)} names no column, so all prompts would be equal",
            "write {prompt} where the question goes, or give the name of a file that does",
        )
    return template


def _regex(value: Any) -> str:
    try:
        compiled = re.compile(_text(value))
    except re.error as error:
        raise _Wrong(f"{shown(value)} is no regular expression: {error}") from error
    if not compiled.groups:
        raise _Wrong(f"{shown(value)} has no group", "put what is the answer into parentheses: 'answer is (.+)'")
    return str(value)


def _reward(value: Any) -> str:
    if value in REWARDS:
        return str(value)
    if not is_reference(_text(value)):
        close = nearest(value, REWARDS, 1)
        raise _Wrong(f"no reward {shown(value)}", f"did you mean {close[0]}?" if close else FORMS)
    reference = Reference.parse(value)
    try:
        reference.source()
    except InputError as error:
        found = next(iter(error.problems), Problem(error.message))
        raise _Wrong(found.message, error.hint) from error
    return str(reference)


def function_of(file: Path) -> tuple[str, str] | None:
    """The data set that a prepared file belongs to, which is its rows' data source, and its reward function.

    None if it was prepared for no function of the user's.
    """
    manifest = read_manifest(DatasetPaths(file.parent.name, file.parent)) or {}
    reward = (manifest.get("recipe") or {}).get("reward")
    return (manifest["dataset"], reward) if isinstance(reward, str) and is_reference(reward) else None


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise _Wrong(f"{shown(value)} is no share of the rows", "above 0, and 1 for no test split")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _Wrong(f"{shown(value)} is no number of rows", "a whole number above 0")
    return value


def check_name(name: str) -> Problem | None:
    """Why `name` cannot name a data set of the user's own; None if it can."""
    if not NAME.fullmatch(name) or name.endswith(readers.SOURCES) or name == RESERVED:
        return Problem(f"{name!r} cannot name a data set", hint="letters, digits, - and _; not the name of a file")
    if rewards.is_scored(name):
        return Problem(f"verl has a scorer of its own for {name!r}", hint="another name")
    return None


def describe_recipe(own: OwnRecipe, about: Sequence[str] = ()) -> str:
    """YAML text of a recipe file, with `about` as comments at its top."""
    lines = [*(f"# {line}" for line in about), f"schema_version: {SCHEMA_VERSION}", f"source: {text_of(own.source)}"]
    lines += ["map:", f"  prompt: {text_of(own.prompt)}"]
    lines += [f"  answer: {text_of(own.answer)}"]
    lines += ["# the words around a question: {prompt}, and any column in braces; {{ and }} are braces"]
    lines += [f"prompt_template: {text_of(own.prompt_template)}"]
    lines += [f"system: {text_of(own.system)}", "# the group of its last match is the answer, as '#### (.+)' finds it"]
    lines += [f"answer_regex: {text_of(own.answer_regex)}", f"# {FORMS}", f"reward: {text_of(own.reward)}"]
    lines += ["# share of the rows that are trained on, where the source has no test split"]
    return "\n".join([*lines, f"split: {text_of(own.split)}", ""])


def write_recipe(path: Path, source: Source, given: Given) -> OwnRecipe:
    """Write a recipe file for `source` from a look at its first rows; values in `given` are taken as they are.

    InputError if the file exists already, if the source has no rows, or for values that are wrong.
    """
    if path.exists():
        raise InputError(f"{path} exists already", hint="remove it, or name another file")
    rows = [row for _, row in itertools.islice(source.rows(source.splits[0], BadRows()), LOOK)]
    if not rows:
        raise InputError(f"{source.label} has no rows")
    there = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    looked = Location(source.label)
    guessed = {role: next((name for name in names if name in there), None) for role, names in _GUESSES.items()}
    columns = {role: name for role, name in guessed.items() if name}
    if "map" not in given:
        given = {**given, "map": Value({"prompt": there[0], "answer": there[-1], **columns}, looked)}
    if "reward" not in given:
        answers = [row.get(columns.get("answer", there[-1])) for row in rows]
        given = {**given, "reward": Value(_likely_reward(answers), looked)}
    own, problems = read(given, path.stem)
    if own is None:
        raise InputError("no recipe can be written", problems=problems)
    own.check_columns(source)
    about = [f"columns of {source.label}, with the first row's values:"]
    about += [f"  {printable(name)}: {shown(rows[0].get(name))}" for name in there]
    files.write_text(path, describe_recipe(own, about))
    return own


def _likely_reward(answers: Sequence[Any]) -> str:
    """The reward that fits such answers: numbers GSM8K's, formulas and boxes MATH's, single words exact text."""
    written = [str(answer) for answer in answers if answer is not None]
    finals = [answer.rpartition(GSM8K_MARK)[2] for answer in written]
    if all(truths.plain_number(final) is not None for final in finals):
        return "gsm8k"
    if all(re.fullmatch(r"\w+", answer) for answer in written):
        return "exact"
    return DEFAULT_REWARD
