"""A saved step as a Hugging Face model to keep or to give away: bf16 safetensors, config, tokenizer, a model card."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched, RunFailed
from flashrl_cli.evals import card, merge
from flashrl_cli.runs import record
from flashrl_cli.runs.stock import newest_plan
from flashrl_cli.verl import checkpoints as layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flashrl_cli.runs.saved import Saved
    from flashrl_cli.runs.stock import Stock

_TRAINERS = {"dtype", "torch_dtype", "attn_implementation", "_attn_implementation"}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A model that was written: how much of it there is, and what its tensors were compared with."""

    run: str
    step: int
    path: Path
    tensors: int
    parameters: int
    bytes: int
    compared: str

    def document(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**asdict(self), "path": str(self.path)}


def choose(stock: Stock, step: str) -> Saved:
    """The step that a person means by a number, `latest` or `best`. Raises InputError or NothingMatched."""
    usable = {one.step: one for one in stock.saved if one.has_weights}
    numbers = ", ".join(map(str, usable)) or "none"
    if step == "latest":
        number = max(usable, default=None)
    elif step == "best":
        number = stock.best if stock.best is not None else max(usable, default=None) if len(usable) == 1 else None
    elif step.isascii() and step.isdecimal():
        number = int(step)
    else:
        raise InputError(f"STEP {step}: neither a number nor latest nor best", hint=f"steps with weights: {numbers}")
    if number is None or number not in usable:
        what = "no scores to tell the best step by" if step == "best" and usable else f"no weights of step {step}"
        raise NothingMatched(f"run {stock.run.name}: {what}", hint=f"steps with weights: {numbers}")
    return usable[number]


def new_folder(target: Path) -> Path:
    """`target`, if nothing is there yet that an export would replace. Raises InputError."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists already", hint="name a folder that is new or empty")
    return target


def export(stock: Stock, saved: Saved, target: Path) -> Exported:
    """Write `saved` to `target`, which appears once all of it is there and its weights are what its config asks for.

    Raises RunFailed for weights that cannot be read or do not fit their config, EnvironmentNotReady where nothing can be written.
    """
    hf, shards = _sources(saved)
    try:
        with files.replacing(target) as temporary:
            _weights(hf, shards, temporary)
            _clean_config(temporary / "config.json")
            shapes, compared = check(temporary)
            (temporary / "README.md").write_text(_card(stock, saved), encoding="utf-8")
            size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    except merge.Unreadable as error:
        raise RunFailed(f"step {saved.step} cannot be exported: {error}") from None
    except OSError as error:
        raise EnvironmentNotReady(f"{target} cannot be written: {error.strerror or error}") from None
    return Exported(
        run=stock.run.name,
        step=saved.step,
        path=target,
        tensors=len(shapes),
        parameters=sum(map(_product, shapes.values())),
        bytes=size,
        compared=compared,
    )


def check(folder: Path) -> tuple[Shapes, str]:
    """Shapes of the tensors in `folder`, compared with its index and with what its config makes, and a word on that.

    Raises merge.Unreadable naming the tensors that lack, are too many or have another shape.
    """
    shapes = _shapes(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) != set(shapes):
        raise merge.Unreadable(f"{index.name} does not name the tensors that are there")
    expected = _expected(folder)
    if expected is None:
        return shapes, "compared with the index (transformers has no such architecture)"
    wanted, tied = expected
    wrong = sorted(name for name in shapes if wanted.get(name) != shapes[name])
    wrong += sorted(wanted.keys() - shapes.keys() - tied)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise merge.Unreadable(f"the weights are not what config.json asks for: {', '.join(wrong[:3])}{more}")
    return shapes, "compared with the config"


def _sources(saved: Saved) -> tuple[Path, tuple[Path, ...]]:
    """The step's HF folder, and the shards that hold its weights if it does not. Raises InputError for an adapter."""
    actor = saved.path / layout.ACTOR
    hf = actor / layout.HUGGINGFACE
    if saved.has_hf:
        return hf, ()
    if saved.lora:
        raise InputError(f"step {saved.step} is a LoRA adapter, not a whole model", hint="merge it with peft")
    found = layout.shards(actor)
    return hf, found.files if found else ()


def _weights(hf: Path, shards: tuple[Path, ...], target: Path) -> None:
    if shards:
        logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)  # a warning about torch.compile
        merge.merge(hf, shards, target)
    else:
        shutil.copytree(merge.check(hf), target)
    readable = (target / "config.json").stat().st_mode
    for file in target.glob("*.safetensors"):
        file.chmod(readable)  # safetensors writes for its user alone


def _clean_config(config: Path) -> None:
    """Leave out of config.json what was the trainer's: its float32, which a reader would make of the weights, its attention."""
    data = json.loads(config.read_text(encoding="utf-8"))
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
    if kind is None:
        return None
    with torch.device("meta"):
        model = kind(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, set(model.all_tied_weights_keys)


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _card(stock: Stock, saved: Saved) -> str:
    found = record.load(stock.run.record)
    versions: Mapping[str, str] = found.last.versions if found and found.last else {}
    score = stock.scores.values.get(saved.step) if stock.scores else None
    by = stock.scores.by if stock.scores else None
    return card.text(
        card.Facts(
            run=stock.run.name,
            step=saved.step,
            plan=newest_plan(stock.run),
            versions=versions,
            score=None if score is None or by is None else (by, score),
        )
    )
