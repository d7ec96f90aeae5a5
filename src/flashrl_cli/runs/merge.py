"""Write checkpoints as separate HF folders: safetensors streamed from the shards, with config and tokenizer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.paths import existing
from flashrl_cli.text import GIB
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.weights import (
    INDEX,
    Unreadable,
    Weights,
    companions,
    copied,
    expected,
    model_files,
    not_finite,
    read_bytes,
    read_json,
    stored_in_float32,
)

if TYPE_CHECKING:
    from flashrl_cli.runs.checkpoints import Checkpoint

FILE_BYTES = 2**30
"""Size of one file of merged weights, which is held in memory until it is written."""
Shapes = dict[str, tuple[int, ...]]

_TRAINERS = {"attn_implementation", "_attn_implementation"}
_DTYPE = ("dtype", "torch_dtype")
"""Keys of config.json for the dtype of the weights; the second is the one of Transformers before 5."""
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS = {name: dtype for dtype, name in _NAMES.items()}
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def merged(
    checkpoints: Sequence[Checkpoint],
    target: Path,
    advance: Callable[[int], object],
    warn: Callable[[str], object] = lambda _: None,
) -> list[Path]:
    """Write one checkpoint to `target`, several to `target`/<run>/global_step_N; returns these folders.

    Each folder appears once it is complete and its weights match its config; then `advance(1)` is called, and `warn`
    with the names of source files that were not copied. A checkpoint that cannot be read does not stop the others.
    Raises InputError for a target that is not empty, EnvironmentNotReady where the result does not fit or cannot be
    written, and at the end RunFailed for all checkpoints that cannot be read.
    """
    places = _places(checkpoints, target)
    _room(checkpoints, target)
    refused = []
    for checkpoint, place in zip(checkpoints, places, strict=True):
        try:
            with files.replacing(place) as temporary:
                written = write(checkpoint.weights, temporary)
        except Unreadable as error:
            refused.append(f"{checkpoint.path} cannot be merged: {error}")
        except OSError as error:
            raise EnvironmentNotReady(f"{place} cannot be written: {error.strerror or error}") from None
        else:
            if written.left:
                warn(left_behind(checkpoint.hf, written.left))
        advance(1)
    if refused:
        done = len(checkpoints) - len(refused)
        hint = f"the other {done} are written to {target}" if done else "copy or save it again; nothing was written"
        raise RunFailed("\n".join(refused), hint=hint)
    return places


def left_behind(hf: Path, names: Sequence[str]) -> str:
    """A sentence that names the files of an HF folder that are not copied with its weights."""
    return f"not copied from {hf}: {', '.join(names)}"


def new_folder(target: Path) -> Path:
    """`target`, if nothing exists there that would be replaced. Raises InputError."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists already", hint="name a folder that is new or empty")
    return target


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: shapes of its tensors, what they were compared with, and files that were not copied."""

    shapes: Shapes
    compared: str
    left: tuple[str, ...]


def write(weights: Weights, folder: Path) -> Written:
    """Create `folder`: safetensors of `weights`, the tokenizer, and the config without the trainer's keys.

    The weights of an HF folder are copied unchanged, and the config keeps the dtype that it named. Raises Unreadable
    before the first byte is written for tensors that are not those of the architecture, and for values that are not
    finite.
    """
    weights.check()
    source = weights.accounted()
    shapes = {name: stored.shape for name, stored in source.items()}
    folder.mkdir()
    if weights.shards or weights.adapter:
        logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)  # a warning about torch.compile
        left = take_along(weights.hf, folder)
        _save(folder, weights.tensors())
        clean_config(folder / "config.json", "bfloat16")
    else:
        left = take_along(weights.hf, folder)
        _copy_weights(weights.hf, folder)
        clean_config(folder / "config.json", dtype_of({stored.dtype for stored in source.values()}, weights.hf))
    known = expected(weights.hf) is not None
    compared = "the config" if known else "the index (transformers has no such architecture, or it is quantized)"
    # files beside the shards belong to the trainer, and are not another format of the weights
    return Written(shapes=shapes, compared=f"compared with {compared}", left=() if weights.shards else left)


def take_along(hf: Path, folder: Path) -> tuple[str, ...]:
    """Copy config, tokenizer and texts of an HF folder; returns names of what is left. Raises Unreadable, OSError."""
    found = companions(hf, without=(layout.FSDP_CONFIG, layout.LORA))
    for name in found.taken:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(read_bytes(hf / name))
    return found.left


def _copy_weights(hf: Path, folder: Path) -> None:
    """Copy the files of the model's tensors and their index, checking that values are finite. Raises Unreadable."""
    import torch

    bad: dict[str, Path | None] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pieces are small: several threads took ten times as long
    try:
        for file in model_files(hf):
            bad |= dict.fromkeys(copied(file, folder / file.name), file)
    finally:
        torch.set_num_threads(threads)
    if bad:
        raise not_finite(list(bad), bad)
    if (hf / INDEX).is_file():
        (folder / INDEX).write_bytes(read_bytes(hf / INDEX))


def _places(checkpoints: Sequence[Checkpoint], target: Path) -> list[Path]:
    if len(checkpoints) == 1:
        return [new_folder(target)]
    places = [target / c.run / ("" if c.step is None else layout.step_name(c.step)) for c in checkpoints]
    if len(set(places)) != len(places):
        raise InputError("two of the checkpoints have the same name", hint="merge them one by one")
    return [new_folder(place) for place in places]


def _room(checkpoints: Iterable[Checkpoint], target: Path) -> None:
    needed = sum(_bytes(checkpoint.weights) for checkpoint in checkpoints)
    free = shutil.disk_usage(existing(target)).free
    if needed > free:
        what = f"{needed / GIB:.1f} GiB of weights, and {free / GIB:.1f} GiB are free"
        raise EnvironmentNotReady(
            f"{target} has no room for {what}", hint="merge fewer checkpoints, or to another disk"
        )


def _bytes(weights: Weights) -> int:
    """Approximate size of the written weights: float32 shards are halved."""
    try:
        sharded = sum(shard.stat().st_size for shard in weights.shards)
        halved = weights.shards and stored_in_float32(weights.shards[0])
        whole = weights.base or (None if weights.shards else weights.hf)
        stored = sum(file.stat().st_size for file in model_files(whole)) if whole else 0
    except (Unreadable, OSError):
        return 0  # reading the weights reports the error
    return stored + (sharded // 2 if halved else sharded)


def _save(folder: Path, tensors: Iterator[tuple[str, Any]]) -> None:
    """Write the tensors as safetensors files of about FILE_BYTES, and the index that names the file of each."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(_groups(tensors), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(group, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
        total += sum(tensor.nbytes for tensor in group.values())
    files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _groups(tensors: Iterator[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    group: dict[str, Any] = {}
    size = 0
    for name, tensor in tensors:
        group[name] = tensor
        size += tensor.nbytes
        if size >= FILE_BYTES:
            yield group
            group, size = {}, 0
    if group:
        yield group


def clean_config(config: Path, dtype: str | None) -> None:
    """Remove the trainer's keys from config.json, and set the weights' `dtype` (None: keep the one that is named)."""
    data = read_json(config)
    if "quantization_config" in data:
        return
    own = {key: value for key, value in data.items() if key not in _TRAINERS}
    if dtype:
        own = {key: value for key, value in own.items() if key not in _DTYPE} | {"dtype": dtype}
    files.write_json(config, own)


def dtype_of(stored: Collection[str], hf: Path) -> str | None:
    """The dtype to write to config.json if the one in `hf` is wider than all `stored` dtypes (safetensors' names).

    Trainers name their float32, and a reader would convert 16-bit weights to it. Returns None otherwise: any other
    dtype is the one with which the folder has been read so far.
    """
    config = read_json(hf / "config.json")
    asked = next((str(config[key]) for key in _DTYPE if config.get(key)), "")
    widest = max((dtype for dtype in stored if dtype in _WIDTHS), key=lambda dtype: _WIDTHS[dtype], default=None)
    if widest and _WIDTHS[widest] < _WIDTHS.get(_SAFETENSORS.get(asked, ""), 0):
        return _NAMES[widest]
    return None
