"""Checkpoints as HF folders of their own: safetensors written while they are read, config and tokenizer beside them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.doctor.system import existing
from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.weights import Unreadable, Weights, model_files, stored_in_float32

if TYPE_CHECKING:
    from flashrl_cli.runs.checkpoints import Checkpoint

FILE_BYTES = 2**30
"""Size of one file of merged weights, which is in memory until it is written."""
Shapes = dict[str, tuple[int, ...]]

_TRAINERS = {"dtype", "torch_dtype", "attn_implementation", "_attn_implementation"}
OTHER_FORMS = shutil.ignore_patterns(
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.gguf", "onnx", "original", ".*",
    layout.FSDP_CONFIG, layout.LORA,
)  # fmt: skip
"""What of a folder is no config, tokenizer or text: weights in any form, and what a checkpoint is kept by."""
_GIB = 2**30


def merged(checkpoints: Sequence[Checkpoint], target: Path, advance: Callable[[int], object]) -> list[Path]:
    """Write one checkpoint to `target`, several to `target`/<run>/global_step_N, and tell where.

    Each folder appears once it is whole and its weights are what its config asks for; then `advance(1)` is called.
    Raises InputError for a place where something lies already, EnvironmentNotReady where it does not fit or cannot be written,
    RunFailed for weights that cannot be read.
    """
    places = _places(checkpoints, target)
    _room(checkpoints, target)
    for checkpoint, place in zip(checkpoints, places, strict=True):
        try:
            with files.replacing(place) as temporary:
                write(checkpoint.weights, temporary)
                check(temporary)
        except Unreadable as error:
            raise RunFailed(f"{checkpoint.path} cannot be merged: {error}") from None
        except OSError as error:
            raise EnvironmentNotReady(f"{place} cannot be written: {error.strerror or error}") from None
        advance(1)
    return places


def new_folder(target: Path) -> Path:
    """`target`, if nothing is there yet that would be replaced. Raises InputError."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists already", hint="name a folder that is new or empty")
    return target


def write(weights: Weights, folder: Path) -> None:
    """Make `folder`: the tensors of `weights` in safetensors, its tokenizer, and its config without what was the trainer's alone.

    Raises Unreadable. The weights of an HF folder are copied as they are.
    """
    weights.check()
    if weights.shards or weights.adapter:
        logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)  # a warning about torch.compile
        shutil.copytree(weights.hf, folder, ignore=OTHER_FORMS)
        _save(folder, weights.tensors())
    else:
        shutil.copytree(weights.hf, folder)
    clean_config(folder / "config.json")
    readable = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(readable)  # safetensors writes for its user alone


def check(folder: Path) -> tuple[Shapes, str]:
    """Shapes of the tensors in `folder`, compared with its index and with what its config makes, and a word on that.

    Raises Unreadable naming the tensors that lack, are too many or have another shape.
    """
    shapes = _shapes(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) != set(shapes):
        raise Unreadable(f"{index.name} does not name the tensors that are there")
    expected = _expected(folder)
    if expected is None:
        return shapes, "compared with the index (transformers has no such architecture, or it is quantized)"
    wanted, tied = expected
    wrong = sorted(name for name in shapes if wanted.get(name) != shapes[name])
    wrong += sorted(wanted.keys() - shapes.keys() - tied)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Unreadable(f"the weights are not what config.json asks for: {', '.join(wrong[:3])}{more}")
    return shapes, "compared with the config"


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
        what = f"{needed / _GIB:.1f} GiB of weights, and {free / _GIB:.1f} GiB are free"
        raise EnvironmentNotReady(
            f"{target} has no room for {what}", hint="merge fewer checkpoints, or to another disk"
        )


def _bytes(weights: Weights) -> int:
    """Size that the weights will have, nearly: shards in float32 are halved."""
    try:
        sharded = sum(shard.stat().st_size for shard in weights.shards)
        halved = weights.shards and stored_in_float32(weights.shards[0])
        whole = weights.base or (None if weights.shards else weights.hf)
        stored = sum(file.stat().st_size for file in model_files(whole)) if whole else 0
    except (Unreadable, OSError):
        return 0  # it is told when the weights are read
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
    files.write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


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


def clean_config(config: Path) -> None:
    """Leave out of config.json what was the trainer's: its float32, which a reader would make of the weights, its attention."""
    data = json.loads(config.read_text(encoding="utf-8"))
    if "quantization_config" not in data:
        own = {key: value for key, value in data.items() if key not in _TRAINERS}
        files.write_json(config, {**own, "dtype": "bfloat16"})


def _shapes(folder: Path) -> Shapes:
    from safetensors import safe_open

    shapes: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes


def _expected(folder: Path) -> tuple[Shapes, set[str]] | None:
    """Shapes that the config makes, without their memory, and the names that are tied to others; None for a foreign model."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None or getattr(config, "quantization_config", None):
        return None
    with torch.device("meta"):
        model = kind(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, set(model.all_tied_weights_keys)
