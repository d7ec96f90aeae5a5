"""One data set from its source to verl's files: read, convert, check, measure, write; or find it up to date."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashrl_cli import __version__, files
from flashrl_cli.data import lengths, writing
from flashrl_cli.data.build import Split, build_split
from flashrl_cli.data.hub import go_offline, hide_progress
from flashrl_cli.data.recipes import RECIPES, TINY, Recipe
from flashrl_cli.data.rows import BadRows
from flashrl_cli.data.sources import LocalSource, Source, open_source
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from flashrl_cli.data.request import Request, Talk
    from flashrl_cli.paths import DatasetPaths

Counts = dict[str, dict[str, Any]]


def prepare_dataset(request: Request, output: Talk) -> dict[str, Any]:
    """Prepare one data set, unless what is there is up to date; returns `status`, `path` and its manifest.

    InputError lists the rows that cannot be used; then, and after any other failure, what was there is there still.
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


def _prepare_tiny(request: Request, output: Talk) -> dict[str, Any]:
    from flashrl_cli.data.tiny import prepare_tiny

    return prepare_tiny(request.paths, seed=request.seed, force=request.force, output=output)


def _prepare_or_keep(request: Request, output: Talk) -> dict[str, Any]:
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
    """Input beside output would be taken for input, or for output, by the next run."""
    inputs = [path for split in source.files.values() for path in split] if isinstance(source, LocalSource) else []
    if any(path.resolve().parent == paths.root.resolve() for path in inputs):
        raise InputError(f"{paths.root} is both source and output", hint="--out names another folder")


def _options(request: Request, recipe: Recipe) -> dict[str, Any]:
    """What decides on the rows, apart from the source; an option that a recipe does not heed is left out."""
    options: dict[str, Any] = {"limit": request.limit}
    if recipe.repeats:
        options["dedupe"] = request.dedupe
    if recipe.hub is None:
        options["seed"] = request.seed
    return options


def _up_to_date(request: Request, recipe: Recipe, source: Source, earlier: writing.Manifest) -> bool:
    """Whether preparing again would give what the `earlier` manifest describes, and that is still there."""
    expected = {"dataset": request.paths.name, "flashrl": __version__, "options": _options(request, recipe)}
    return (
        all(earlier.get(key) == value for key, value in expected.items())
        and request.tokenizer in {None, earlier["tokenizer"]}
        and source.matches(earlier["source"])
        and writing.outputs_unchanged(request.paths, earlier)
    )


def _refuse_loss(paths: DatasetPaths, source: Source, earlier: writing.Manifest) -> None:
    """A folder holds one data set from one source: a second would leave splits behind that do not belong to it."""
    there = earlier.get("dataset", paths.name)
    lost = set(earlier.get("splits", ())) - set(source.splits)
    if there != paths.name or lost:
        what = there if there != paths.name else f"{' and '.join(sorted(lost))} of another source"
        raise InputError(
            f"{paths.root} holds {what}", hint="--out names another folder; --force replaces what is there"
        )


def _prepare(request: Request, recipe: Recipe, source: Source, output: Talk) -> writing.Manifest:
    tokenizer = lengths.load_tokenizer(request.tokenizer) if request.tokenizer else None
    about = {"source": source.describe(), "options": _options(request, recipe), "tokenizer": request.tokenizer}
    splits = _build_all(request, recipe, source, output)
    counts = {split: built.counts() for split, built in splits.items()}
    if tokenizer is not None:
        _count_tokens(tokenizer, splits, counts, output)
    return writing.write_dataset(request.paths, {s: built.rows for s, built in splits.items()}, about, counts)


def _build_all(request: Request, recipe: Recipe, source: Source, output: Talk) -> dict[str, Split]:
    """Every split in full, so that nothing is written unless all is well."""
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


def _count_tokens(tokenizer: Any, splits: Mapping[str, Split], counts: Counts, output: Talk) -> None:
    for split, built in splits.items():
        with output.progress(f"counting tokens of {split}", len(built.rows)) as advance:
            counts[split]["prompt_tokens"] = lengths.summary(lengths.prompt_tokens(tokenizer, built.rows, advance))
