"""A reward function of the user's: `FILE.py:name`, loaded from the file's text, checked and called.

It is called with verl's arguments by name, of which it declares those that it reads (verl/experimental/reward_loop/
reward_manager/naive.py:64 in 0.9.1), and with the arguments of the preset. One call scores one response. The file goes
with a run, and nothing beside it does, so it is executed without its folder among the places of imports.

This module runs in processes that the command line starts for it (`worker.scoring`, `evals.graders`) and in verl's
reward workers (`plugins.reward`), and imports the standard library alone.
"""

from __future__ import annotations

import ast
import asyncio
import difflib
import hashlib
import inspect
import json
import linecache
import math
import os
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flashrl_cli import contract
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.paths import absolute

GIVEN = ("data_source", "solution_str", "ground_truth", "extra_info")
"""Names of the arguments with which verl calls a reward function."""
RESPONSE = "solution_str"
FORM = "def NAME(solution_str, ground_truth)"
REFERENCE = "FILE.py:NAME"
_ALIASES = {
    "response": RESPONSE, "completion": RESPONSE, "output": RESPONSE, "solution": RESPONSE, "prediction": RESPONSE,
    "text": RESPONSE, "answer": "ground_truth", "truth": "ground_truth", "reference": "ground_truth",
    "target": "ground_truth", "label": "ground_truth", "source": "data_source", "dataset": "data_source",
    "info": "extra_info", "metadata": "extra_info", "extra": "extra_info",
}  # fmt: skip
"""Names under which other frameworks give these arguments."""
_BATCHES = {"prompts", "completions", "responses", "solutions"}
"""Arguments of reward functions that score several responses at once, as in TRL."""
LONGEST_TRACE = 40
_LONGEST_TEXT = 300
_MODULE = "flashrl_reward"
"""Name of the user's module, under which dataclasses and pickle look for it."""


class Call(NamedTuple):
    """What a reward function may read: one response and the row that was asked."""

    data_source: str
    solution_str: str
    ground_truth: Any
    extra_info: Any = None


class Score(NamedTuple):
    """A reward, and the further fields that the function returned beside it."""

    score: float
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a function gave no reward: `what` in one line, its line in the user's file, and its traceback there."""

    what: str
    line: int | None = None
    trace: tuple[str, ...] = ()


class Failed(Exception):
    """Raised instead of a reward, with the Failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.what)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Source:
    """The text of the file with a reward function, as it was when a run was planned."""

    text: str

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """A reward function as a run's workers get it.

    `copy` is the file in the attempt's folder, `file` the user's own, which tracebacks show. `source` is the file's
    text, where the workers cannot read that folder. It scores rows of the data sources `sources`, None for all. A call
    may take `timeout_s` seconds. A score above `threshold` counts as right.
    """

    copy: str
    file: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[str] | None = None
    timeout_s: float = 60.0
    threshold: float = 0.5
    source: str | None = None

    @property
    def label(self) -> str:
        """The function as the user named it."""
        return f"{self.file}:{self.name}"

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all that the scores depend on."""
        parts = [self.source or "", self.name, dict(self.arguments), self.sources, self.timeout_s, self.threshold]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def scores(self, data_source: str) -> bool:
        """Whether the function scores rows of a data source."""
        return self.sources is None or data_source in self.sources

    def text(self) -> str:
        """The function as JSON, the value of `contract.ENV_REWARD`."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def here(cls) -> Shipped:
        """The reward function of this process's run, from its environment."""
        return cls(**json.loads(os.environ[contract.ENV_REWARD]))

    def load(self) -> RewardFunction:
        """Load the function. Raises Failed if that is not possible."""
        try:
            source = Path(self.copy).read_text(encoding="utf-8") if self.source is None else self.source
        except OSError as error:
            raise Failed(Failure(what=f"cannot be read: {error}")) from None
        return load(source, self.file, self.name, self.arguments)


def is_right(score: Score, threshold: float) -> bool:
    """Whether a response counts as right: the function says so in `acc`, or gives more than `threshold`."""
    found = score.fields.get("acc")
    return score.score > threshold if found is None else bool(found)


def is_reference(text: str) -> bool:
    """Whether a text has the form `FILE.py:name`."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


@dataclass(frozen=True, slots=True)
class Reference:
    """A function in a file, as a user names it: `FILE.py:name`."""

    file: Path
    name: str

    @classmethod
    def parse(cls, text: str, where: Location | str | None = None) -> Reference:
        """The reference that `text` is, with an absolute path. Raises InputError, at `where` the text was given."""
        if not is_reference(text):
            what = f"{text!r} does not name a reward function"
            raise InputError(what, problems=[Problem(what, where, f"{REFERENCE}, for `{FORM}` in FILE.py")])
        file, _, name = text.rpartition(":")
        return cls(absolute(file), name)

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"

    def source(self, where: Location | str | None = None) -> str:
        """The file's text. Raises InputError if it cannot be read, is not Python, or does not define the name."""
        try:
            text = self.file.read_text(encoding="utf-8")
            problem = _static_problem(text, self)
        except FileNotFoundError:
            problem = Problem(f"there is no file {self.file}", where, "the path of a Python file with the function")
        except (OSError, ValueError) as error:
            problem = Problem(f"{self.file} cannot be read: {error}", where, "a text file in UTF-8")
        if problem is not None:
            raise InputError(f"reward function {self}: {problem.message}", hint=problem.hint, problems=[problem])
        return text


def _static_problem(text: str, reference: Reference) -> Problem | None:
    """What can be seen to be wrong without executing the file."""
    place = Location(str(reference.file))
    try:
        body = ast.parse(text, str(reference.file)).body
    except SyntaxError as error:
        return Problem(f"is not Python: {error.msg}", place.at(error.lineno), "correct it there")
    except ValueError as error:
        return Problem(f"is not Python: {error}", place, "a text file with Python")
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    bound = any(isinstance(node, ast.Name) and node.id == reference.name for part in body for node in ast.walk(part))
    imported = any(
        alias.asname == reference.name or alias.name in (reference.name, "*")
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    )
    if reference.name in names or bound or imported or _is_class(body, reference.name):
        return None
    close = difflib.get_close_matches(reference.name, names, n=1)
    public = sorted(name for name in names if not name.startswith("_"))
    has = f"it has: {', '.join(public)}" if public else "it defines no function"
    hint = f"did you mean {close[0]}?" if close else has
    return Problem(f"there is no function {reference.name} in it", place, hint)


def _is_class(body: Sequence[ast.stmt], name: str) -> bool:
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in body)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A function that was loaded and whose signature was checked; `file` is the path shown in its tracebacks."""

    file: str
    function: Callable[..., Any]
    names: frozenset[str]
    """Those of verl's arguments that it takes."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_async(self) -> bool:
        """Whether it is a coroutine function."""
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004  (an object with an async __call__)
        )

    def __call__(self, call: Call) -> Score:
        """The reward of a response. Raises Failed with the reason why there is none."""
        try:
            result = self._call(call)
            if self.is_async:
                result = asyncio.run(result)
        except BaseException as error:  # noqa: BLE001  (of the user's code, which may also raise SystemExit)
            raise Failed(failure_of(error, self.file)) from None
        return self.judged(result)

    async def scored(self, call: Call) -> Score:
        """The same for a coroutine function."""
        try:
            result = await self._call(call)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001  (as above)
            raise Failed(failure_of(error, self.file)) from None
        return self.judged(result)

    def _call(self, call: Call) -> Any:
        given = {name: value for name, value in call._asdict().items() if name in self.names}
        return self.function(**given, **self.arguments)

    def judged(self, result: Any) -> Score:
        """The score that a returned value is. Raises Failed if it is not a finite number, or a dict without one."""
        if isinstance(result, Mapping):
            if "score" not in result:
                keys = ", ".join(map(str, result)) or "nothing"
                raise self._failed(f"returns a dict without 'score' (it has: {keys})")
            fields = {str(key): value for key, value in result.items() if key != "score"}
            return Score(self._number(result["score"], "a dict whose 'score' is "), fields)
        return Score(self._number(result, ""), {})

    def _number(self, value: Any, within: str) -> float:
        if isinstance(value, str | bytes):
            raise self._failed(f"returns {within}text, {short(value)}, not a number")
        if value is None:
            raise self._failed(f"returns {within or ''}None, not a number: is a `return` missing?")
        if inspect.isawaitable(value):
            raise self._failed(f"returns {within}something to await: is it `async def`?")
        try:
            number = float(value)
        except Exception:  # noqa: BLE001  (of the user's type)
            raise self._failed(f"returns {within}{type(value).__name__} {short(value)}, not one number") from None
        if not math.isfinite(number):
            raise self._failed(f"returns {within}{number}, not a finite number")
        return number

    def _failed(self, what: str) -> Failed:
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        line = code.co_firstlineno if code is not None and code.co_filename == self.file else None
        return Failed(Failure(what=what, line=line))


def load(source: str, file: str, name: str, arguments: Mapping[str, Any] | None = None) -> RewardFunction:
    """Execute a file's text and return its function `name`; `file` is what its tracebacks show.

    Raises Failed if the text cannot be executed, or if it does not define a function that can be called with verl's
    arguments and `arguments`.
    """
    module = types.ModuleType(_MODULE)
    module.__file__ = file
    sys.modules[_MODULE] = module
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    try:
        exec(compile(source, file, "exec"), vars(module))  # noqa: S102
    except BaseException as error:  # noqa: BLE001  (of the user's code, which may also raise SystemExit)
        found = failure_of(error, file)
        if isinstance(error, ImportError):
            found = Failure(what=f"{found.what} (of the run's files only this one is there)", line=found.line)
        raise Failed(found) from None
    if name not in vars(module):
        raise Failed(Failure(what=f"there is no function {name} in it"))
    function = vars(module)[name]
    names = _checked(function, name, file, arguments or {})
    return RewardFunction(file=file, function=function, names=names, arguments=dict(arguments or {}))


def _checked(function: Any, name: str, file: str, arguments: Mapping[str, Any]) -> frozenset[str]:
    """Those of verl's arguments that a function takes. Raises Failed if it cannot be called with them."""
    if not callable(function) or inspect.isclass(function):
        is_ = "a class" if inspect.isclass(function) else f"{type(function).__name__} {short(function)}"
        raise Failed(Failure(what=f"{name} is {is_}, not a function"))
    code = getattr(inspect.unwrap(function), "__code__", None)
    line = code.co_firstlineno if code is not None and code.co_filename == file else None
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise Failed(Failure(what=f"the parameters of {name} cannot be read: {error}", line=line)) from None
    faults = list(_signature_faults(parameters, arguments))
    if faults:
        raise Failed(Failure(what=f"{name}{inspect.signature(function)} {'; it '.join(faults)}", line=line))
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return frozenset(one for one in GIVEN if takes_all or one in parameters)


def _signature_faults(parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> list[str]:
    named = {name: one for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    faults = []
    if reserved := [name for name in arguments if name in GIVEN]:
        faults.append(f"gets {', '.join(reserved)} from the rows, not from reward.arguments")
    if only := [name for name, one in parameters.items() if one.kind is one.POSITIONAL_ONLY]:
        faults.append(f"takes {', '.join(only)} by position only, and arguments are given by name")
    unknown = [name for name, one in named.items() if one.default is one.empty and name not in (*GIVEN, *arguments)]
    if _BATCHES & set(unknown):
        faults.append(f"scores several responses at once, and verl asks for one at a time: `{FORM}`")
    elif unknown:
        meant = [f"{name} (is it {_ALIASES[name]}?)" if name in _ALIASES else name for name in unknown]
        faults.append(f"demands {', '.join(meant)}, which neither verl gives ({', '.join(GIVEN)}) nor reward.arguments")
    elif RESPONSE not in named and not takes_all:
        faults.append(f"does not take {RESPONSE}, the response that it scores")
    if surplus := [name for name in arguments if name not in (*named, *reserved) and not takes_all]:
        faults.append(f"does not take {', '.join(surplus)}, which reward.arguments gives")
    return faults


def failure_of(error: BaseException, file: str) -> Failure:
    """The failure of the user's code that an exception is: its traceback from the first frame in `file` on."""
    found = traceback.TracebackException.from_exception(error)
    if isinstance(error, SyntaxError) and error.filename == file:
        return Failure(
            what=f"is not Python: {error.msg}", line=error.lineno, trace=_lines(found.format_exception_only())
        )
    own = [number for number, frame in enumerate(found.stack) if frame.filename == file]
    if own:
        found.stack = traceback.StackSummary.from_list(found.stack[own[0] :])
    line = found.stack[own[-1] - own[0]].lineno if own else None
    kind = type(error).__name__
    what = f"raises {kind}: {error}" if str(error) else f"raises {kind}"
    if not own:
        return Failure(what=_cut(what), trace=_lines(found.format_exception_only()))
    return Failure(what=_cut(what), line=line, trace=_lines(found.format(chain=True)))


def _lines(texts: Any) -> tuple[str, ...]:
    lines = [_cut(line, 1000) for text in texts for line in text.rstrip("\n").split("\n")]
    if len(lines) <= LONGEST_TRACE:
        return tuple(lines)
    half = LONGEST_TRACE // 2
    return (*lines[:half], f"  … {len(lines) - 2 * half} lines …", *lines[-half:])


def plain(value: Any) -> Any:
    """A value that JSON lacks as one that it has: arrays and numbers of numpy and torch as Python's, others as text."""
    try:
        return value.tolist()
    except Exception:  # noqa: BLE001  (of a library's type)
        return str(value)


def short(value: Any, most: int = 60) -> str:
    """A value as Python writes it, cut after `most` characters."""
    try:
        return _cut(repr(value), most)
    except Exception:  # noqa: BLE001  (of the user's type)
        return f"a {type(value).__name__}"


def _cut(text: str, most: int = _LONGEST_TEXT) -> str:
    line = text if most > _LONGEST_TEXT else " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
