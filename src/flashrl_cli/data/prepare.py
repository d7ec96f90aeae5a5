"""`flashrl prepare`: convert one data set from its source to verl's files, unless they are up to date.

All rows are read, converted, checked and measured before anything is written.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from flashrl_cli import __version__, files
from flashrl_cli.data import writing
from flashrl_cli.data.readers import require
from flashrl_cli.data.recipes import NAMES, RECIPES, TINY, Recipe, dropped
from flashrl_cli.data.rows import BadRow, BadRows, Located, Needs, Row, judge
from flashrl_cli.data.sources import LocalSource, Source, detect_offline, go_offline, hide_progress, open_source
from flashrl_cli.data.writing import Types
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location, Problem
from flashrl_cli.paths import DatasetPaths, absolute

BATCH = 512
TICK = 500
TOKENS = {"p50": "tokens p50", "p99": "tokens p99", "longest": "longest"}


class Reporter(Protocol):
    """Interface for progress and messages."""

    @property
    def live(self) -> bool:
        """Whether progress bars may be drawn."""

    def say(self, text: str) -> None:
        """Print a line."""

    def warn(self, text: str) -> None:
        """Print a warning."""

    def progress(self, label: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Show the progress of a task; yields a function that is called with the number of further rows done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One data set to prepare: the target, the source, and the options."""

    paths: DatasetPaths
    source: str | None = None
    limit: int | None = None
    tokenizer: str | None = None
    seed: int = 0
    dedupe: bool = True
    offline: bool = False
    force: bool = False


def requests(
    names: Sequence[str],
    *,
    source: str | None = None,
    out: str | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
    seed: int | None = None,
    dedupe: bool = True,
    offline: bool = False,
    force: bool = False,
) -> list[Request]:
    """One request per name. InputError lists unknown names, and options that the named sets do not use."""
    given = {"--source": source, "--out": out, "--limit": limit, "--tokenizer": tokenizer, "--seed": seed}
    problems = [*_unknown(names), *_misused(names, {option for option, value in given.items() if value is not None})]
    if problems:
        raise InputError("prepare cannot do that", hint=f"data sets are {', '.join(NAMES)}", problems=problems)
    return [
        Request(
            paths=DatasetPaths(name, absolute(out)) if out else DatasetPaths.named(name),
            source=source,
            limit=limit,
            tokenizer=tokenizer,
            seed=seed or 0,
            dedupe=dedupe,
            offline=offline,
            force=force,
        )
        for name in names
    ]


def _unknown(names: Sequence[str]) -> Iterator[Problem]:
    for name in names:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            yield Problem(f"no data set {name!r}", hint=f"did you mean {close[0]}?" if close else None)


def _misused(names: Sequence[str], given: set[str]) -> Iterator[Problem]:
    made_here = [name for name in names if name in NAMES and (name == TINY or RECIPES[name].hub is None)]
    if len(names) > 1:
        for option in sorted(given & {"--source", "--out"}):
            yield Problem(f"goes with one data set, not {len(names)}", where=option)
    if "--source" in given and made_here:
        yield Problem(f"{' and '.join(made_here)} is made here, from no source", where="--source")
    if "--seed" in given and not made_here:
        yield Problem("only arith and tiny are drawn by a seed", where="--seed")
    for option in sorted(given & {"--limit", "--tokenizer"}) if TINY in names else ():
        yield Problem("tiny comes as it is, with its own tokenizer", where=option)


def load_tokenizer(name: str) -> Any:
    """Tokenizer of a local folder or a hub id. EnvironmentNotReady if it is neither local nor available."""
    local = absolute(name)
    if not local.is_dir():
        detect_offline()
    try:
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(str(local) if local.is_dir() else name)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise EnvironmentNotReady(
            f"cannot load the tokenizer {name}: {first}", hint="--tokenizer PATH takes a local folder"
        ) from error
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer {name} has no chat template", hint="give that of an instruction-tuned model")
    return tokenizer


def prompt_tokens(tokenizer: Any, rows: Sequence[Row], advance: Callable[[int], None]) -> list[int]:
    """Number of tokens of each row's prompt with the generation prompt (verl/utils/dataset/rl_dataset.py:250)."""
    lengths: list[int] = []
    for start in range(0, len(rows), BATCH):
        chats = [row["prompt"] for row in rows[start : start + BATCH]]
        tokens = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=False)
        lengths += map(len, tokens)
        advance(len(chats))
    return lengths


def summary(lengths: Sequence[int]) -> dict[str, int]:
    """Median, 99th percentile (nearest rank) and maximum of the lengths."""
    ordered = sorted(lengths)
    ranks = {"p50": 0.5, "p99": 0.99, "longest": 1.0}
    return {name: ordered[math.ceil(part * len(ordered)) - 1] for name, part in ranks.items()}


Built = tuple[Location, Row]


@dataclass(slots=True)
class Unique:
    """Keeps the first of rows with equal prompts; counts the others, and those of them with another answer."""

    duplicates: int = 0
    conflicts: int = 0

    def keep_first(self, rows: Iterable[Built]) -> Iterator[Built]:
        """Yield the rows whose prompt has not occurred before."""
        answers: dict[tuple[str, ...], str] = {}
        for place, row in rows:
            prompt, answer = tuple(turn["content"] for turn in row["prompt"]), row["reward_model"]["ground_truth"]
            if prompt not in answers:
                answers[prompt] = answer
                yield place, row
            else:
                self.duplicates += 1
                self.conflicts += answers[prompt] != answer


@dataclass(frozen=True, slots=True)
class Split:
    """The kept rows of a split, the number of other rows, and the number of rows from which columns were dropped."""

    rows: list[Row]
    duplicates: int
    conflicts: int
    dropped: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        longest = max(sum(len(turn["content"]) for turn in row["prompt"]) for row in self.rows)
        return {
            "duplicates": self.duplicates,
            "conflicting_duplicates": self.conflicts,
            "longest_characters": longest,
            "dropped": self.dropped,
        }


def build_split(
    name: str,
    recipe: Recipe,
    located: Iterable[Located],
    *,
    dedupe: bool,
    limit: int | None,
    bad: BadRows,
    advance: Callable[[int], None],
) -> Split:
    """Rows of split `name`, each checked by the scorer that training would use; unusable rows go to `bad`.

    Reading stops when `limit` rows are kept.
    """
    unique, left_out = Unique(), Counter[str]()
    rows = _converted(name, recipe, located, bad, advance, left_out)
    kept = list(itertools.islice(unique.keep_first(rows) if dedupe else rows, limit))
    types = Types()
    for place, row in kept:
        for fault in types.faults(place, row):
            bad.add(place, fault)
    judge(kept, Needs(), bad)
    return Split([row for _, row in kept], unique.duplicates, unique.conflicts, dict(left_out))


def _converted(
    split: str,
    recipe: Recipe,
    located: Iterable[Located],
    bad: BadRows,
    advance: Callable[[int], None],
    left_out: Counter[str],
) -> Iterator[Built]:
    for index, (place, raw) in enumerate(located):
        if index % TICK == TICK - 1:
            advance(TICK)
        try:
            row = recipe.convert(raw, split, index)
        except BadRow as error:
            bad.add(place, error.fault)
            continue
        left_out.update(dropped(raw, recipe.columns))
        yield place, row


def summary_table(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of the summary, one row per split; lengths are those of prompts, in tokens where counted."""
    splits = [(result["dataset"], split, entry) for result in results for split, entry in result["splits"].items()]
    counted = any("prompt_tokens" in entry for _, _, entry in splits)
    lengths = list(TOKENS.values()) if counted else ["longest (characters)"]
    rows = [
        [name, split, entry["rows"], entry.get("duplicates"), *_lengths(entry, counted)]
        for name, split, entry in splits
    ]
    return ["data set", "split", "rows", "duplicates dropped", *lengths], rows


def _lengths(entry: dict[str, Any], counted: bool) -> list[object]:
    if counted:
        return [entry.get("prompt_tokens", {}).get(key) for key in TOKENS]
    return [entry.get("longest_characters")]


Counts = dict[str, dict[str, Any]]


def prepare_dataset(request: Request, output: Reporter) -> dict[str, Any]:
    """Prepare one data set, unless it is up to date; returns `status`, `path` and its manifest.

    InputError lists the rows that cannot be used; after this and any other failure, the previous files are unchanged.
    """
    if request.offline:
        go_offline()
    if not output.live:
        hide_progress()
    root = request.paths.root
    with files.alone(root, lambda: output.say(f"another command prepares {root}: waiting for it")):
        made = _prepare_tiny(request, output) if request.paths.name == TINY else _prepare_or_keep(request, output)
    output.say(f"{request.paths.name}: {made['status']} in {request.paths.root}")
    return {"path": str(request.paths.root), **made}


def _prepare_tiny(request: Request, output: Reporter) -> dict[str, Any]:
    from flashrl_cli.data.tiny import prepare_tiny

    return prepare_tiny(request.paths, seed=request.seed, force=request.force, report=output.say)


def _prepare_or_keep(request: Request, output: Reporter) -> dict[str, Any]:
    recipe = RECIPES[request.paths.name]
    source = open_source(recipe, request.source, request.seed)
    _refuse_own_folder(source, request.paths)
    earlier = writing.read_manifest(request.paths) or {}
    if not request.force:
        if _up_to_date(request, recipe, source, earlier):
            return {"status": "up to date", **earlier}
        _refuse_loss(request.paths, source, earlier)
    manifest = _prepare(request, recipe, source, output)
    for path in writing.remove_stale(request.paths, earlier, manifest):
        output.say(f"removed {path}, which belongs to what was there")
    return {"status": "prepared", **manifest}


def _refuse_own_folder(source: Source, paths: DatasetPaths) -> None:
    """Refuse a source in the target folder, whose input and output files the next run would confuse."""
    inputs = [path for split in source.files.values() for path in split] if isinstance(source, LocalSource) else []
    if any(path.resolve().parent == paths.root.resolve() for path in inputs):
        raise InputError(f"{paths.root} is both source and output", hint="--out names another folder")


def _options(request: Request, recipe: Recipe) -> dict[str, Any]:
    """The options that determine the rows, apart from the source; options that a recipe does not use are left out."""
    options: dict[str, Any] = {"limit": request.limit}
    if recipe.repeats:
        options["dedupe"] = request.dedupe
    if recipe.hub is None:
        options["seed"] = request.seed
    return options


def _up_to_date(request: Request, recipe: Recipe, source: Source, earlier: writing.Manifest) -> bool:
    """Whether preparing again would give what the `earlier` manifest describes, and its files still exist unchanged."""
    expected = {"dataset": request.paths.name, "flashrl": __version__, "options": _options(request, recipe)}
    return (
        all(earlier.get(key) == value for key, value in expected.items())
        and request.tokenizer in {None, earlier["tokenizer"]}
        and source.matches(earlier["source"])
        and writing.outputs_unchanged(request.paths, earlier)
    )


def _refuse_loss(paths: DatasetPaths, source: Source, earlier: writing.Manifest) -> None:
    """Refuse to replace a data set from another source, which would leave splits behind that do not belong to it."""
    there = earlier.get("dataset", paths.name)
    lost = set(earlier.get("splits", ())) - set(source.splits)
    if there != paths.name or lost:
        what = there if there != paths.name else f"{' and '.join(sorted(lost))} of another source"
        raise InputError(
            f"{paths.root} holds {what}", hint="--out names another folder; --force replaces what is there"
        )


def _prepare(request: Request, recipe: Recipe, source: Source, output: Reporter) -> writing.Manifest:
    tokenizer = load_tokenizer(request.tokenizer) if request.tokenizer else None
    about = {"source": source.describe(), "options": _options(request, recipe), "tokenizer": request.tokenizer}
    splits = _build_all(request, recipe, source, output)
    counts = {split: built.counts() for split, built in splits.items()}
    if tokenizer is not None:
        _count_tokens(tokenizer, splits, counts, output)
    return writing.write_dataset(request.paths, {s: built.rows for s, built in splits.items()}, about, counts)


def _build_all(request: Request, recipe: Recipe, source: Source, output: Reporter) -> dict[str, Split]:
    """Build every split completely, so that nothing is written if one of them fails."""
    name, bad, splits = request.paths.name, BadRows(), {}
    for split in source.splits:
        total = request.limit or source.count(split)
        with output.progress(f"{name}: reading {split}", total) as advance:
            splits[split] = build_split(
                split,
                recipe,
                source.rows(split, bad),
                dedupe=recipe.repeats and request.dedupe,
                limit=request.limit,
                bad=bad,
                advance=advance,
            )
    bad.check(name, "; nothing was written")
    for split, built in splits.items():
        if not built.rows:
            raise InputError(f"{name}: {source.label} has no rows for {split}; nothing was written")
        if built.conflicts:
            output.warn(f"{name}: {built.conflicts:,} duplicates of {split} give another answer; the first is kept")
        if built.dropped:
            what = ", ".join(f"{column} (in {rows:,})" for column, rows in built.dropped.items())
            output.say(f"{name}: of {len(built.rows):,} rows of {split} these columns and keys are not kept: {what}")
    return splits


def _count_tokens(tokenizer: Any, splits: Mapping[str, Split], counts: Counts, output: Reporter) -> None:
    for split, built in splits.items():
        with output.progress(f"counting tokens of {split}", len(built.rows)) as advance:
            counts[split]["prompt_tokens"] = summary(prompt_tokens(tokenizer, built.rows, advance))
