"""`flashrl prepare`: convert one data set from its source to verl's files, unless they are up to date.

All rows are read, converted, checked and measured before anything is written.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flashrl_cli import __version__, files
from flashrl_cli.data import own, writing
from flashrl_cli.data.readers import require
from flashrl_cli.data.recipes import NAMES, RECIPES, TINY, Recipe, dropped
from flashrl_cli.data.rows import BadRow, BadRows, Located, Needs, Row, folded, judge
from flashrl_cli.data.sources import (
    GYM,
    GymSource,
    LocalSource,
    Source,
    detect_offline,
    go_offline,
    gym_name,
    hide_progress,
    named_source,
    open_source,
)
from flashrl_cli.data.writing import Types
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location, Problem
from flashrl_cli.paths import DatasetPaths, absolute
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.data.own import Given, OwnRecipe

BATCH = 512
TICK = 500
TOKENS = {"p50": "tokens p50", "p95": "tokens p95", "p99": "tokens p99", "longest": "longest"}


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
    """One data set to prepare: the target, the source, the options, and the recipe if it is the user's own."""

    paths: DatasetPaths
    source: str | None = None
    own: OwnRecipe | None = None
    limit: int | None = None
    tokenizer: str | None = None
    seed: int = 0
    dedupe: bool = True
    offline: bool = False
    force: bool = False

    @property
    def recipe(self) -> Recipe:
        """How rows are converted."""
        return self.own.recipe(self.paths.name) if self.own else RECIPES[self.paths.name]


def requests(
    names: Sequence[str],
    *,
    source: str | None = None,
    recipe: str | None = None,
    words: Mapping[str, Any] | None = None,
    out: str | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
    seed: int | None = None,
    dedupe: bool = True,
    offline: bool = False,
    force: bool = False,
) -> list[Request]:
    """One request per name; `words` are the further options of a recipe of the user's own, `recipe` is its file.

    A data set that was prepared by a recipe of the user's own is prepared by the same one if nothing is given.
    InputError lists unknown names, values that are wrong, and options that the named sets do not use.
    """
    if recipe is not None and not names:
        names = [Path(recipe).stem]
    if generated := [name for name in names if name.startswith(GYM)]:
        if len(names) > 1 or source is not None:
            raise InputError("generated tasks are one data set", hint="flashrl prepare rg:chain_sum,gsm_symbolic")
        names, source = [gym_name(generated[0])], generated[0]
    given = {"--source": source, "--out": out, "--limit": limit, "--tokenizer": tokenizer, "--seed": seed}
    given |= {"--recipe": recipe, **{own.OPTIONS[key]: value for key, value in (words or {}).items()}}
    places = {name: DatasetPaths(name, absolute(out)) if out else DatasetPaths.named(name) for name in names}
    of_user, problems = _own_recipes(places, recipe, own.from_options(source=source, **(words or {})))
    problems += _misused(names, {option for option, value in given.items() if value is not None})
    if problems:
        hint = f"data sets are {', '.join(NAMES)}, and --source and --map make one of your own"
        raise InputError("prepare cannot do that", hint=hint, problems=problems)
    return [
        Request(
            paths=places[name],
            source=of_user[name].source if name in of_user else source,
            own=of_user.get(name),
            limit=limit,
            tokenizer=tokenizer,
            seed=seed or 0,
            dedupe=dedupe,
            offline=offline,
            force=force,
        )
        for name in names
    ]


def _own_recipes(
    places: Mapping[str, DatasetPaths], file: str | None, options: Given
) -> tuple[dict[str, OwnRecipe], list[Problem]]:
    """The recipes of those data sets that are the user's own, and their problems.

    Options go before the recipe file, and one of both before what the manifest of an earlier preparation keeps.
    """
    found: dict[str, OwnRecipe] = {}
    problems: list[Problem] = []
    for name, paths in places.items():
        if name in NAMES:
            continue
        written, faults = own.from_file(absolute(file), file) if file is not None else ({}, [])
        given = {**written, **options} if len(places) == 1 else {}
        if not given and not faults:
            given = own.from_manifest(writing.read_manifest(paths) or {}, paths.manifest)
        if not given and not faults:
            close = difflib.get_close_matches(name, NAMES, n=1)
            problems.append(Problem(f"no data set {name!r}", hint=f"did you mean {close[0]}?" if close else None))
            continue
        recipe, wrong = own.read(given, name) if not faults else (None, [])
        unfit = own.check_name(name)
        problems += [*([unfit] if unfit else []), *faults, *wrong]
        if recipe is not None:
            found[name] = recipe
    return found, problems


def _misused(names: Sequence[str], given: set[str]) -> Iterator[Problem]:
    made_here = [name for name in names if name in NAMES and (name == TINY or RECIPES[name].hub is None)]
    own_recipe = [name for name in names if name in NAMES]
    if len(names) > 1:
        for option in sorted(given & {"--out", "--recipe", *own.OPTIONS.values()}):
            yield Problem(f"goes with one data set, not {len(names)}", where=option)
    if "--source" in given and made_here:
        yield Problem(f"{' and '.join(made_here)} is made here, from no source", where="--source")
    for option in sorted(given & {"--recipe", *own.OPTIONS.values()} - {"--source"}) if own_recipe else ():
        yield Problem(f"{' and '.join(own_recipe)} has its own recipe", where=option, hint="give yours another name")
    if "--seed" in given and own_recipe and not made_here:
        yield Problem("only arith and tiny are drawn, and rows of your own divided, by a seed", where="--seed")
    for option in sorted(given & {"--limit", "--tokenizer"}) if TINY in names else ():
        yield Problem("tiny comes as it is, with its own tokenizer", where=option)


def init_recipe(path: Path, *, source: str | None, words: Mapping[str, Any]) -> dict[str, Any]:
    """Write a recipe file for `source` from a look at its first rows, and return the recipe as plain data."""
    if source is None:
        raise InputError("--init looks at a source", hint="--source FILE|FOLDER|HUB_ID")
    if source.startswith(GYM):
        raise InputError("generated tasks have no columns to look at", hint=f"flashrl prepare {source}")
    return own.write_recipe(path, named_source(source), own.from_options(source=source, **words)).document()


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
    """Median, 95th and 99th percentile (nearest rank) and maximum of the lengths."""
    ordered = sorted(lengths)
    ranks = {"p50": 50, "p95": 95, "p99": 99, "longest": 100}
    return {name: ordered[math.ceil(percent * len(ordered) / 100) - 1] for name, percent in ranks.items()}


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
    in_train: int = 0
    """Number of rows of another split whose prompts are trained on, apart from case and spaces."""

    def counts(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        longest = max(sum(len(turn["content"]) for turn in row["prompt"]) for row in self.rows)
        return {
            "duplicates": self.duplicates,
            "conflicting_duplicates": self.conflicts,
            "longest_characters": longest,
            "dropped": self.dropped,
            "also_in_train": self.in_train,
        }

    def divided(self, hold_out: float, seed: int) -> dict[str, Split]:
        """Train and test split, with the share `hold_out` of the rows in the latter: of two rows one in each.

        A row's place depends on a hash of its prompt and `seed`, so that few rows change sides when others are added.
        """

        def place(row: Row) -> bytes:
            return hashlib.sha256(f"{seed}\0{folded(row)}".encode(errors="surrogatepass")).digest()

        order = sorted(range(len(self.rows)), key=lambda index: place(self.rows[index]))
        held = min(max(round(hold_out * len(order)), 1), len(order) - 1)
        test = set(order[:held])
        rows: dict[str, list[Row]] = {"train": [], "test": []}
        for index, row in enumerate(self.rows):
            split = "test" if index in test else "train"
            row["extra_info"]["split"] = split
            rows[split].append(row)
        return {
            "train": replace(self, rows=rows["train"]),
            "test": Split(rows["test"], 0, 0),
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
    judge(kept, Needs(scoring=recipe.scoring), bad)
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
        left_out.update(dropped(raw, recipe))
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
    recipe = request.recipe
    if request.own is not None and request.own.rows is not None:
        source: Source = GymSource(request.own.source, request.own.rows, request.seed)
    else:
        source = open_source(recipe, request.source, request.seed)
    _refuse_own_folder(source, request.paths)
    earlier = writing.read_manifest(request.paths) or {}
    if not request.force:
        if _up_to_date(request, recipe, source, earlier):
            return {"status": "up to date", **earlier}
        _refuse_loss(request.paths, recipe, source, earlier)
    if request.own is not None:
        request.own.check_columns(source)
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
    if request.own is not None:
        expected["recipe"] = request.own.document()
    return (
        all(earlier.get(key) == value for key, value in expected.items())
        and request.tokenizer in {None, earlier["tokenizer"]}
        and source.matches(earlier["source"])
        and writing.outputs_unchanged(request.paths, earlier)
    )


def _refuse_loss(paths: DatasetPaths, recipe: Recipe, source: Source, earlier: writing.Manifest) -> None:
    """Refuse to replace a data set from another source, which would leave splits behind that do not belong to it."""
    there = earlier.get("dataset", paths.name)
    lost = set(earlier.get("splits", ())) - set(source.splits) if recipe.splits else set()
    if there != paths.name or lost:
        what = there if there != paths.name else f"{' and '.join(sorted(lost))} of another source"
        raise InputError(
            f"{paths.root} holds {what}", hint="--out names another folder; --force replaces what is there"
        )


def _prepare(request: Request, recipe: Recipe, source: Source, output: Reporter) -> writing.Manifest:
    tokenizer = load_tokenizer(request.tokenizer) if request.tokenizer else None
    about = {"source": source.describe(), "options": _options(request, recipe), "tokenizer": request.tokenizer}
    if request.own is not None:
        about["recipe"] = request.own.document()
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
    if recipe.hold_out and list(splits) == ["train"] and splits["train"].rows:
        splits = splits["train"].divided(recipe.hold_out, request.seed)
    for split, built in splits.items():
        if not built.rows:
            hint = "--split 1 makes no test split" if recipe.hold_out else None
            raise InputError(f"{name}: {source.label} has no rows for {split}; nothing was written", hint=hint)
        if built.conflicts:
            output.warn(f"{name}: {built.conflicts:,} duplicates of {split} give another answer; the first is kept")
        if built.dropped:
            what = ", ".join(f"{column} (in {counted(rows, 'row')})" for column, rows in built.dropped.items())
            output.say(f"{name}: of {split} these columns and keys are not kept: {what}")
    return _with_overlap(name, splits, output)


def _with_overlap(name: str, splits: dict[str, Split], output: Reporter) -> dict[str, Split]:
    """The splits with the number of rows whose prompts are also trained on; warns of them."""
    if "train" not in splits or len(splits) == 1:
        return splits
    trained = {folded(row) for row in splits["train"].rows}
    found = dict(splits)
    for split in found.keys() - {"train"}:
        shared = sum(folded(row) in trained for row in splits[split].rows)
        found[split] = replace(splits[split], in_train=shared)
        if shared:
            what = f"{shared:,} of {counted(len(splits[split].rows), 'row')} of {split}"
            output.warn(f"{name}: the prompts of {what} are also in train, apart from case and spaces")
    return found


def _count_tokens(tokenizer: Any, splits: Mapping[str, Split], counts: Counts, output: Reporter) -> None:
    for split, built in splits.items():
        with output.progress(f"counting tokens of {split}", len(built.rows)) as advance:
            counts[split]["prompt_tokens"] = summary(prompt_tokens(tokenizer, built.rows, advance))
