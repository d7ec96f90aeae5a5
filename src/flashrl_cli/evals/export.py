"""A saved step as a Hugging Face model to keep or to give away: bf16 safetensors, config, tokenizer, a model card."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched, RunFailed
from flashrl_cli.evals import card, merge
from flashrl_cli.runs import record
from flashrl_cli.runs.stock import newest_plan
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.weights import Unreadable, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flashrl_cli.runs.saved import Saved
    from flashrl_cli.runs.stock import Stock


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


def export(stock: Stock, saved: Saved, target: Path) -> Exported:
    """Write `saved` to `target`, which appears once all of it is there and its weights are what its config asks for.

    Raises RunFailed for weights that cannot be read or do not fit their config, EnvironmentNotReady where nothing can be written.
    """
    weights = _weights(saved)
    try:
        with files.replacing(target) as temporary:
            written = merge.write(weights, temporary)
            (temporary / "README.md").write_text(_card(stock, saved), encoding="utf-8")
            size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    except Unreadable as error:
        raise RunFailed(f"step {saved.step} cannot be exported: {error}") from None
    except OSError as error:
        raise EnvironmentNotReady(f"{target} cannot be written: {error.strerror or error}") from None
    return Exported(
        run=stock.run.name,
        step=saved.step,
        path=target,
        tensors=len(written.shapes),
        parameters=sum(map(math.prod, written.shapes.values())),
        bytes=size,
        compared=written.compared,
    )


def _weights(saved: Saved) -> Weights:
    """Where the step's weights lie. Raises InputError for an adapter."""
    actor = saved.path / layout.ACTOR
    hf = actor / layout.HUGGINGFACE
    if saved.has_hf:
        return Weights(hf=hf)
    if saved.lora:
        what = f"step {saved.step} is a LoRA adapter, not a whole model"
        raise InputError(what, hint=f"flashrl eval {saved.path} --merge FOLDER")
    found = layout.shards(actor)
    return Weights(hf=hf, shards=found.files if found else ())


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
