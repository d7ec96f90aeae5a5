"""`flashrl prepare show`: rows as a model sees them, and the lengths of all prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli import paths
from flashrl_cli.config.resolve import read_spec
from flashrl_cli.data import readers, writing
from flashrl_cli.data.prepare import Reporter, load_tokenizer, prompt_tokens, summary
from flashrl_cli.data.rows import BadRows, Needs, Raw, Scoring, judge
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.paths import DatasetPaths
from flashrl_cli.verl.overrides import model_path

SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What prompts are measured with: a tokenizer, and the longest prompt that is not cut, in tokens."""

    tokenizer: str | None = None
    longest: int | None = None

    @classmethod
    def chosen(cls, preset: str | None, tokenizer: str | None, longest: int | None) -> Model:
        """A preset's model and longest prompt, except where given. InputError for a length without a tokenizer."""
        if preset is not None:
            spec = read_spec(preset).spec
            tokenizer = tokenizer or model_path(spec.model.path, paths.data_root())
            longest = longest or spec.data.max_prompt_length
        if longest is not None and tokenizer is None:
            raise InputError("--max-prompt-length counts tokens", hint="--tokenizer PATH|HUB_ID, or --preset NAME")
        return cls(tokenizer=tokenizer, longest=longest)


def look(name: str, *, split: str | None, count: int, model: Model, output: Reporter) -> dict[str, Any]:
    """The first `count` rows of a split (of the first one, if it is None), and the lengths of all prompts.

    `name` is that of a prepared data set, or a file of rows. NothingMatched if there is none.
    """
    found = _files(name)
    shown = split or next(iter(found))
    if shown not in found:
        raise NothingMatched(f"{name} has no split {shown!r}", hint=f"it has {', '.join(found)}")
    tokenizer = load_tokenizer(model.tokenizer) if model.tokenizer else None
    examples: list[dict[str, Any]] = []
    splits = []
    for one, file in found.items():
        rows = _rows(file)
        lengths = _lengths(rows, tokenizer, f"counting tokens of {one}", output)
        splits.append({"split": one, "file": str(file), **_counts(file, lengths, model)})
        if one == shown:
            examples = [_example(one, *pair, tokenizer) for pair in zip(range(1, count + 1), rows, strict=False)]
    folder = next(iter(found.values())).parent
    manifest = writing.read_manifest(DatasetPaths(folder.name, folder)) or {}
    return {
        "dataset": name,
        "recipe": manifest.get("recipe"),
        "unit": "characters" if tokenizer is None else "tokens",
        "max_prompt_length": model.longest,
        "splits": splits,
        "examples": examples,
    }


def _files(name: str) -> dict[str, Path]:
    """The files of a prepared data set by split, or the one file that `name` is."""
    if "/" in name or name.endswith(readers.SUFFIXES):
        file = paths.absolute(name)
        found = {file.stem: file} if file.is_file() else {}
    else:
        places = DatasetPaths.named(name)
        found = {split: places.split(split) for split in SPLITS if places.split(split).is_file()}
    if not found:
        raise NothingMatched(f"no prepared data set {name}", hint=f"flashrl prepare {name}")
    return found


def _rows(file: Path) -> list[Raw]:
    needs, bad = Needs(scoring=Scoring.NONE), BadRows()
    rows = judge(readers.read_rows(file, needs, bad), needs, bad)
    bad.check(str(file))
    if not rows:
        raise InputError(f"no rows in {file}")
    return rows


def _lengths(rows: Sequence[Any], tokenizer: Any, label: str, output: Reporter) -> list[int]:
    if tokenizer is None:
        return [sum(len(turn["content"] or "") for turn in row["prompt"]) for row in rows]
    with output.progress(label, len(rows)) as advance:
        return prompt_tokens(tokenizer, rows, advance)


def _counts(file: Path, lengths: Sequence[int], model: Model) -> dict[str, Any]:
    """Numbers of rows and lengths of a split, with what its manifest says of it."""
    written = writing.described(file)
    known = {key: written[key] for key in ("duplicates", "also_in_train") if key in written}
    cut = None if model.longest is None else sum(length > model.longest for length in lengths)
    return {"rows": len(lengths), **known, "lengths": summary(lengths), "cut": cut}


def _example(split: str, number: int, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    reward = row.get("reward_model")
    text = tokenizer and tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    return {
        "split": split,
        "row": number,
        "prompt": row["prompt"],
        "text": text,
        "data_source": row.get("data_source"),
        "ground_truth": reward.get("ground_truth") if isinstance(reward, dict) else None,
    }


def split_table(seen: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of the table of splits."""
    unit, longest = seen["unit"], seen["max_prompt_length"]
    columns = ["split", "rows", "duplicates dropped", "also in train"]
    columns += [f"{unit} p50", "p95", "p99", "longest"]
    columns += [] if longest is None else [f"longer than {longest:,}"]
    rows: list[list[object]] = []
    for split in seen["splits"]:
        row = [split["split"], split["rows"], split.get("duplicates"), split.get("also_in_train")]
        row += split["lengths"].values()
        rows.append(row if longest is None else [*row, split["cut"]])
    return columns, rows
