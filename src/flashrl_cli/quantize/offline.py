"""Write a model's folder in 8 bits while the model is read; the folder appears complete or not at all.

A manifest in the folder records its inputs, so that repeating the command recognizes a finished result.
"""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import __version__, files
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.quantize import arithmetic
from flashrl_cli.quantize.arithmetic import Losses
from flashrl_cli.quantize.inputs import check_room
from flashrl_cli.quantize.layer_errors import Layer, Report
from flashrl_cli.quantize.tensors import BYTES, INDEX, Desk, Entry, ShardFile, Tensor
from flashrl_cli.runs import merge
from flashrl_cli.weights import FLOATS, Unreadable, Weights, is_finite, not_finite, read_json

if TYPE_CHECKING:
    from flashrl_cli.quantize.arithmetic import Scheme
    from flashrl_cli.quantize.inputs import Request

FILE = "flashrl_quantize.json"
SCHEMA_VERSION = 1
_PACKAGES = ("torch", "safetensors")
_THREADS = 16
_WAITING = 8
"""Number of tensors whose pieces may wait for a thread; waiting pieces hold no memory."""
_WIDE = ("F32", "F64")
_WEIGHT, _SCALE = ".weight", ".weight_scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All inputs that determine the result: fingerprint of the weights, scheme, ignored layers, hash of the profile."""

    fingerprint: str
    scheme: str
    ignore: tuple[str, ...]
    profile: str | None


def inputs(weights: Weights, scheme: str, ignore: Sequence[str], profile: Path | None) -> Inputs:
    """The inputs of one quantization. Raises Unreadable."""
    return Inputs(
        fingerprint=weights.fingerprint(),
        scheme=scheme,
        ignore=tuple(sorted(set(ignore))),
        profile=files.sha256(profile) if profile else None,
    )


def write(folder: Path, source: str, made_of: Inputs, report: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a quantized `folder`, and return it. `source` is the user's name for the model."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "inputs": {**asdict(made_of), "ignore": list(made_of.ignore)},
        "versions": {"flashrl-cli": __version__, "python": platform.python_version(), **_versions()},
        **report,
    }
    files.write_json(folder / FILE, document)
    return document


def found(folder: Path, made_of: Inputs) -> dict[str, Any] | None:
    """The manifest of a complete folder that was made from the same inputs; None for any other folder."""
    try:
        document = read_json(folder / FILE)
        Weights(hf=folder).check()
        same = document["inputs"] == {**asdict(made_of), "ignore": list(made_of.ignore)}
    except (Unreadable, KeyError):
        return None
    return document if same and document.get("schema_version") == SCHEMA_VERSION else None


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}


Advance = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A tensor to be written to the new folder: unchanged, in another dtype, or in 8 bits by `scheme`."""

    tensor: Tensor
    dtype: str
    scheme: Scheme | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries that it becomes in the new file."""
        whole = Entry(name=self.tensor.name, dtype=self.dtype, shape=self.tensor.shape)
        if self.scheme is None:
            return (whole,)
        return whole, Entry(name=self.scale, dtype="F32", shape=(self.tensor.shape[0], 1))

    @property
    def scale(self) -> str:
        """Name of the tensor's scales."""
        return self.tensor.name.removesuffix(_WEIGHT) + _SCALE

    @property
    def bytes(self) -> int:
        """Number of bytes that it takes in the new file."""
        return sum(entry.bytes for entry in self.entries)


Shards = dict[str, list[Move]]


def quantize(wanted: Request, advance: Advance) -> tuple[dict[str, Any], bool]:
    """Quantize a model; returns the manifest, and whether a folder from the same inputs existed already.

    `advance` is called with the name of each finished tensor.

    Raises InputError for a folder that holds something else and for weights that cannot be read, EnvironmentNotReady if
    the result does not fit or cannot be written.
    """
    path = wanted.profile.path if wanted.profile else None
    try:
        made_of = inputs(wanted.checkpoint.weights, wanted.scheme.name, wanted.asked, path)
    except Unreadable as error:
        raise InputError(str(error), hint="copy or save it again") from None
    if document := found(wanted.target, made_of):
        return document, True
    merge.new_folder(wanted.target)
    shards = sharded(wanted)
    check_room(wanted.target, sum(move.bytes for moves in shards.values() for move in moves))
    try:
        with files.replacing(wanted.target) as folder:
            report = _write(wanted, shards, folder, advance)
            return write(folder, wanted.name, made_of, report.document()), False
    except Unreadable as error:
        raise InputError(f"{wanted.name} cannot be quantized: {error}", hint="nothing was written") from None
    except OSError as error:
        raise EnvironmentNotReady(f"{wanted.target} cannot be written: {error.strerror or error}") from None


def sharded(wanted: Request) -> Shards:
    """Each new file and its tensors: the same files as the model's, or else files of about merge.FILE_BYTES."""
    quantized = {module + _WEIGHT for module in wanted.choice.quantized}
    wide = _is_wide(wanted)
    moves = [
        _move(tensor, wanted.scheme if tensor.name in quantized else None, wide) for tensor in wanted.tensors.values()
    ]
    found: Shards = {}
    if all(move.tensor.file for move in moves):
        for move in moves:
            found.setdefault(move.tensor.file.name if move.tensor.file else "", []).append(move)
        return found
    size = 0
    for move in moves:
        found.setdefault(f"model-{size // merge.FILE_BYTES + 1:05d}.safetensors", []).append(move)
        size += move.bytes
    return found


def _move(tensor: Tensor, scheme: Scheme | None, wide: bool) -> Move:
    """Plan one tensor; in a `wide` model, whose tensors engines round to bf16, all other tensors are rounded here."""
    if scheme:
        return Move(tensor=tensor, dtype=scheme.dtype, scheme=scheme)
    return Move(tensor=tensor, dtype="BF16" if wide and tensor.dtype in FLOATS else tensor.dtype)


def _write(wanted: Request, shards: Shards, folder: Path, advance: Advance) -> Report:
    folder.mkdir()
    merge.take_along(wanted.checkpoint.hf, folder)
    _write_config(wanted, folder / "config.json")
    layers: list[Layer] = []
    bad: dict[str, Path | None] = {}
    with _threads() as pool:
        for name, moves in shards.items():
            entries = [entry for move in moves for entry in move.entries]
            with ShardFile(folder / name, entries) as out:
                layers += _Workers(pool, out, wanted, advance, bad).move(moves)
    if bad:
        raise not_finite(sorted(bad), bad)
    if set(shards) != {"model.safetensors"}:
        _write_index(folder, shards)
    Weights(hf=folder).check()
    moves = [move for moves in shards.values() for move in moves]
    return Report(
        layers=tuple(layers),
        kept=wanted.choice.kept,
        before=sum(move.tensor.bytes for move in moves),
        after=sum(move.bytes for move in moves),
    )


def _is_wide(wanted: Request) -> bool:
    """Whether the model is in float32, which trainers use."""
    return any(wanted.tensors[module + _WEIGHT].dtype in _WIDE for module in wanted.choice.quantized)


def _write_config(wanted: Request, config: Path) -> None:
    if _is_wide(wanted) or wanted.checkpoint.shards or wanted.checkpoint.adapter:
        merge.clean_config(config, "bfloat16")
    data = read_json(config)
    files.write_json(config, {**data, "quantization_config": wanted.scheme.config(wanted.choice.ignore)})


def _write_index(folder: Path, shards: Shards) -> None:
    names = {entry.name: name for name, moves in shards.items() for move in moves for entry in move.entries}
    total = sum(move.bytes for moves in shards.values() for move in moves)
    files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for all cores, each with torch's parallelism off; waiting work is dropped when something fails."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


class _Workers:
    """Moves tensors into one file, in pieces, with all threads; `bad` collects tensors with NaN or infinite values."""

    def __init__(
        self, pool: ThreadPoolExecutor, out: ShardFile, wanted: Request, advance: Advance, bad: dict[str, Path | None]
    ) -> None:
        self._pool, self._out, self._advance = pool, out, advance
        self._bad = bad
        self._profile = wanted.profile
        self._desk = Desk()

    def move(self, moves: Sequence[Move]) -> Iterator[Layer]:
        """Move all tensors; yields a report on each quantized one. Raises Unreadable and OSError."""
        waiting: deque[tuple[Move, list[Future[Losses]]]] = deque()
        for move in moves:
            waiting.append((move, self._begun(move)))
            # a tensor that is completely in memory is finished before the next one is read
            while len(waiting) > (0 if self._is_made(move.tensor) else _WAITING):
                yield from self._finished(*waiting.popleft())
        while waiting:
            yield from self._finished(*waiting.popleft())

    def _begun(self, move: Move) -> list[Future[Losses]]:
        if self._is_made(move.tensor):
            move = replace(move, tensor=self._made(move.tensor))
        step = move.tensor.shape[1] if move.scheme else 1
        put = partial(self._quantize, move, move.scheme) if move.scheme else partial(self._copy, move)
        return [self._pool.submit(put, span) for span in move.tensor.spans(step)]

    def _is_made(self, tensor: Tensor) -> bool:
        """Whether a tensor must be completely in memory: joined from parts, or smoothed."""
        return tensor.stored is not None or (self._profile is not None and tensor.name in self._profile.names)

    def _made(self, tensor: Tensor) -> Tensor:
        made = tensor.made()
        return replace(made, whole=self._profile.apply(made.name, made.whole)) if self._profile else made

    def _finished(self, move: Move, parts: list[Future[Losses]]) -> Iterator[Layer]:
        losses = Losses()
        for part in parts:
            losses += part.result()
        self._advance(move.tensor.name)
        if move.scheme:
            name, shape = move.tensor.name.removesuffix(_WEIGHT), move.tensor.shape
            yield Layer.of(name, shape, losses, before=move.tensor.bytes, after=move.bytes)

    def _quantize(self, move: Move, scheme: Scheme, span: range) -> Losses:
        """Quantize some rows of a weight to 8 bits."""
        columns, desk, name = move.tensor.shape[1], self._desk, move.tensor.name
        rows = len(span) // columns
        values, scales = desk.memory("values", len(span)), desk.memory("scales", 4 * rows)
        try:
            losses = arithmetic.quantize(
                desk.elements(move.tensor, span).view(rows, columns),
                scheme,
                desk.tensor(move.dtype, values).view(rows, columns),
                desk.tensor("F32", scales).view(rows, 1),
                desk.room,
            )
        except ValueError:
            self._bad[name] = move.tensor.origin
            return Losses()
        self._out.write(name, span.start, values)
        self._out.write(move.scale, 4 * span.start // columns, scales)
        return losses

    def _copy(self, move: Move, span: range) -> Losses:
        """Copy some elements of a tensor, unchanged or rounded."""
        data = self._desk.converted(move.tensor, span, move.dtype)
        if move.dtype in FLOATS and not is_finite(self._desk.tensor(move.dtype, data)):
            self._bad[move.tensor.name] = move.tensor.origin
        self._out.write(move.tensor.name, BYTES[move.dtype] * span.start, data)
        return Losses()
