"""Look up and check the model that the user wants to quantize, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.paths import existing
from flashrl_cli.quantize import arithmetic, layers
from flashrl_cli.quantize.tensors import Tensor, described
from flashrl_cli.runs import merge
from flashrl_cli.runs.checkpoints import Checkpoint, hf_folder
from flashrl_cli.text import GIB, counted
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.weights import Unreadable, companions, read_json
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    from flashrl_cli.quantize.arithmetic import Scheme

_OTHER_FORMS = ("*.bin", "*.pth", "*.gguf")
_TRANSPOSED = frozenset({"gpt2", "openai-gpt"})
"""Families whose linear weights are stored as [K, N] (transformers' Conv1D); vLLM transposes them on load."""
_SENSES = ("vision_config", "audio_config")
_PACKED = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
_IN_8_BITS = ("F8", "I8", "U8")
_STATE = ".A_log"
"""Suffix of a tensor that every Mamba layer has; vLLM does not quantize some of that layer's linear modules."""
ELSEWHERE = "--profile FILE elsewhere, or remove it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A model, the treatment of its tensors, and the folder to create. `name` is the user's name for the model."""

    name: str
    checkpoint: Checkpoint
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    scheme: Scheme
    asked: tuple[str, ...]
    choice: layers.Choice
    profile: Profile | None
    target: Path
    left: tuple[str, ...]

    def warnings(self) -> Iterator[str]:
        """Yield warnings for the user: layers that stay in 16 bits or are slower, and files that are not copied."""
        if self.left:
            yield merge.left_behind(self.checkpoint.hf, self.left)
        if self.choice.experts:
            size = sum(self.tensors[name].bytes for name in self.tensors if layers.is_expert(name))
            whole = sum(tensor.bytes for tensor in self.tensors.values())
            yield f"experts stay in 16 bits: {size / GIB:.2f} GiB, {size / whole:.0%} of the weights"
        if odd := self.choice.odd:
            shape = " × ".join(map(str, self.tensors[f"{odd[0]}.weight"].shape))
            yield (
                f"{counted(len(odd), 'layer')} with a size that is no multiple of {layers.TILE} ({odd[0]}: {shape}): "
                "vLLM runs such a layer in INT8 by Triton instead of CUTLASS, and pads it in FP8 at each call; "
                "--ignore NAME leaves it in 16 bits"
            )


def plan(model: str, out: Path | None, scheme_name: str, ignore: Sequence[str], profile: Path | None) -> Request:
    """Look up and check all inputs. Raises InputError for a model that cannot be read or quantized."""
    wanted = arithmetic.named(scheme_name)
    checkpoint = lookup(model)
    try:
        config = read_json(checkpoint.hf / "config.json")
        _refuse_kind(checkpoint, config)
        tensors = described(checkpoint.weights)
        _refuse_tensors(tensors)
        checkpoint.weights.accounted()
        smoothing = Profile.read(profile) if profile else None
        left = () if checkpoint.shards else companions(checkpoint.hf).left
    except Unreadable as error:
        raise InputError(f"{model} cannot be quantized: {error}", hint="copy or save it again") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if smoothing and (why := smoothing.suits(config) or smoothing.fits(shapes)):
        hint = f"flashrl quantize {model} --calibrate PARQUET"
        raise InputError(f"{smoothing.path} is no profile of {model}: {why}", hint=hint)
    name = checkpoint.run if checkpoint.step is None else f"{checkpoint.run}-{layout.step_name(checkpoint.step)}"
    target = paths.absolute(out or f"{Path(name).name}-{wanted.name}")
    _refuse_inside(checkpoint, target)
    return Request(
        name=name,
        checkpoint=checkpoint,
        config=config,
        tensors=tensors,
        scheme=wanted,
        asked=tuple(ignore),
        choice=layers.choose(shapes, ignore),
        profile=smoothing,
        target=target,
        left=left,
    )


def lookup(model: str) -> Checkpoint:
    """The model that is meant: a folder, a step of a run, an adapter, or an id on the hub. Raises InputError."""
    folder = paths.absolute(model)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        other = next((file.name for form in _OTHER_FORMS for file in sorted(folder.glob(form))), None)
        if other:
            hint = "save it with `save_pretrained` of Transformers, which writes safetensors"
            raise InputError(f"{folder} has no safetensors, only {other}", hint=hint)
    return hf_folder(model)


def new_profile(model: str, out: Path | None) -> tuple[Path, Path]:
    """The HF folder to calibrate, and the profile's file. Raises InputError."""
    checkpoint = lookup(model)
    if checkpoint.shards or checkpoint.adapter:
        hint = f"flashrl eval {model} --merge FOLDER, then calibrate FOLDER"
        raise InputError(f"{model} is no whole model in Hugging Face's form, which calibration runs", hint=hint)
    target = paths.absolute(out or f"{Path(checkpoint.run).name}-profile.safetensors")
    there(target)
    return checkpoint.hf, target


def there(profile: Path) -> Profile | None:
    """The profile in an existing file; None if there is no file. Raises InputError if the file is not a profile."""
    try:
        return Profile.read(profile) if profile.exists() else None
    except Unreadable:
        raise InputError(f"{profile} exists already", hint=ELSEWHERE) from None


def check_room(target: Path, size: int) -> None:
    """Raise EnvironmentNotReady if `size` bytes do not fit on the disk of `target`."""
    free = shutil.disk_usage(existing(target)).free
    if size > free:
        what = f"{size / GIB:.2f} GiB of quantized weights, and {free / GIB:.2f} GiB are free"
        raise EnvironmentNotReady(f"{target} has no room for {what}", hint="-o FOLDER on another disk")


def _refuse_kind(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    method = checkpoint.quantized
    if method is None and (checkpoint.hf / "quantize_config.json").is_file():
        method = "gptq"
    if method:
        what = f"{checkpoint.hf} is quantized already: {method}"
        raise InputError(what, hint="quantize the model in 16 bits that it was made of")
    family = config.get("model_type")
    if family in _TRANSPOSED:
        raise InputError(f"{family} stores its weights transposed, which is not covered", hint="take another model")
    if senses := [key for key in _SENSES if config.get(key)]:
        raise InputError(
            f"a model of more than text ({', '.join(senses)}) is not covered", hint="take its language model"
        )


def _refuse_tensors(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(_STATE):
            raise InputError(f"state-space layers are not covered: {name}", hint="take a transformer")
        if name.rpartition(".")[2] in _PACKED or (name.endswith(".weight") and tensor.dtype.startswith(_IN_8_BITS)):
            what = f"the weights are quantized already: {name} ({tensor.dtype})"
            raise InputError(what, hint="quantize the model in 16 bits that it was made of")


def _refuse_inside(checkpoint: Checkpoint, target: Path) -> None:
    """Refuse a target within the model's folder, which would be taken for part of it, or equal to it."""
    shards = {shard.parent for shard in checkpoint.shards}
    sources = shards | {one for one in (checkpoint.hf, checkpoint.adapter) if one}
    if any(source.resolve() in {target.resolve(), *target.resolve().parents} for source in sources):
        raise InputError(f"{target} is in the model's own folder", hint="-o FOLDER elsewhere")
