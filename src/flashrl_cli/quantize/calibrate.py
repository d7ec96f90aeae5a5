"""A smoothing profile for a model, from what it computes on a data set."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.data.rows import Scoring
from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.evals.questions import read as read_questions
from flashrl_cli.quantize import activations, scales
from flashrl_cli.quantize.absorbing import Junction, junctions
from flashrl_cli.quantize.request import ELSEWHERE, there
from flashrl_cli.weights import Unreadable, Weights, read_json
from flashrl_cli.weights.contents import shapes
from flashrl_cli.weights.profile import SHAPE, About, Profile

if TYPE_CHECKING:
    import torch

    from flashrl_cli.quantize.activations import Seen
    from flashrl_cli.quantize.scales import Choice

Say = Callable[[str], None]
SCHEMA_VERSION = 1
_MADE_BY = ("torch", "transformers")
_GIB = 2**30
_LINES = 10
"""Lines of progress that a part of the work is told in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """One linear layer: alpha (None: its columns stay as they are), and before and after smoothing max|X|, max|W| and its output's error.

    max|W| is of the columns' scales alone: those of rows cancel in a weight with one scale per row. The error is `scales.errors`'.
    """

    name: str
    alpha: float | None
    activation_max: tuple[float, float]
    weight_max: tuple[float, float]
    error: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A profile that was written, and what it does to each linear layer; without `layers` it was there already, made of the same."""

    profile: Profile
    layers: tuple[LayerChange, ...]
    seconds: float

    @property
    def error(self) -> tuple[float, float] | None:
        """Mean relative error of the layers' outputs in INT8, before and after."""
        if not self.layers:
            return None
        return fmean(one.error[0] for one in self.layers), fmean(one.error[1] for one in self.layers)

    def verdict(self) -> str:
        """What it brought, in a sentence."""
        if self.error is None:
            return "the profile is already there, made of the same"
        before, after = self.error
        changed = sum(one.alpha is not None for one in self.layers)
        return (
            f"INT8 puts the output of a linear layer off by {before:.2%} on average, with the profile by {after:.2%} "
            f"({changed} of {len(self.layers)} layers smoothed)"
        )

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "profile": str(self.profile.path),
            "tensors": len(self.profile.names),
            "about": asdict(self.profile.about),
            "already_there": not self.layers,
            "error": dict(zip(("before", "after"), self.error, strict=True)) if self.error else None,
            "layers": [asdict(one) for one in self.layers],
            "seconds": round(self.seconds, 2),
        }


def calibrate(model: Path, parquet: Path, *, samples: int, alpha: float | None, out: Path, say: Say) -> Calibrated:
    """Write to `out` the smoothing profile of the HF folder `model`, calibrated on `samples` rows of a prepared data set.

    `alpha` None chooses, layer by layer, what gives the least error; `say` is told the progress. The same input gives the same profile,
    and one that is there already is taken. Nothing is written before the end. Raises InputError for a model, data or an alpha that cannot
    be used and for an `out` made of something else, RunFailed if nothing is gained, EnvironmentNotReady if the model does not fit into
    memory.
    """
    if alpha is not None and not 0 <= alpha < 1:
        raise InputError(f"alpha is {alpha}, and should be from 0 to less than 1", hint="--alpha auto")
    if not parquet.is_file():
        raise InputError(
            f"there is no file {parquet}", hint="`flashrl prepare NAME` writes train.parquet and says where"
        )
    started = time.perf_counter()
    config, found = _described(model)
    places = junctions(config, found)
    questions = read_questions(parquet, None, scoring=Scoring.OWN)
    rows = activations.tokens(model, activations.texts(questions, samples))
    if not rows:
        raise InputError(f"{parquet} gives nothing to calibrate on", hint="--samples 64")
    about = _about(model, config, parquet, rows, alpha)
    if kept := _kept(out, about):
        return Calibrated(profile=kept, layers=(), seconds=time.perf_counter() - started)
    _room(sum(map(math.prod, found.values())))
    tensors, layers = _worked_out(model, places, rows, alpha, say)
    if not tensors:
        raise RunFailed("smoothing gains nothing for this model; no profile was written", hint="quantize without one")
    _save(tensors, about, out)
    return Calibrated(profile=Profile.read(out), layers=layers, seconds=time.perf_counter() - started)


def _about(model: Path, config: dict[str, Any], parquet: Path, rows: Sequence[list[int]], alpha: float | None) -> About:
    return About(
        model="/".join(model.parts[-2:]),
        fingerprint=Weights(hf=model).fingerprint(),
        shape={key: config[key] for key in SHAPE if config.get(key) is not None},
        data=f"{parquet.parent.name}/{parquet.name}",
        alpha=alpha,
        samples=len(rows),
        tokens=sum(map(len, rows)),
        versions={name: metadata.version(name) for name in _MADE_BY},
        rows=hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    )


def _kept(out: Path, about: About) -> Profile | None:
    """The profile of before, if there is one. Raises InputError where it was made of something else."""
    found = there(out)
    if found and found.about != about:
        what = f"{out} exists already, and was made of another model, other data or with other options"
        raise InputError(what, hint=ELSEWHERE)
    return found


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json of an HF folder, and the shapes of its tensors. Raises InputError."""
    try:
        Weights(hf=folder).accounted()
        return read_json(folder / "config.json"), shapes(folder)
    except Unreadable as error:
        raise InputError(
            f"{folder} cannot be calibrated: {error}", hint="calibration takes an HF folder with safetensors"
        ) from None


def _room(parameters: int) -> None:
    """Raise EnvironmentNotReady where the CPU's memory cannot hold the model in float32; a GPU tells itself."""
    import psutil
    import torch

    needed, free = 4 * parameters, psutil.virtual_memory().available
    if not torch.cuda.is_available() and needed > free:
        what = f"on the CPU the model takes {needed / _GIB:.1f} GiB in float32, and {free / _GIB:.1f} GiB are free"
        raise EnvironmentNotReady(what, hint="calibrate it on a machine with a GPU")


def _worked_out(
    folder: Path, places: Sequence[Junction], rows: Sequence[list[int]], alpha: float | None, say: Say
) -> tuple[dict[str, torch.Tensor], tuple[LayerChange, ...]]:
    import torch

    try:
        with torch.inference_mode():
            model = _loaded(folder)
            seen = _run(model, places, rows, say)
            return _choose(model, places, seen, alpha, say)
    except torch.OutOfMemoryError:
        raise EnvironmentNotReady(
            "the model does not fit into the GPU's memory", hint="CUDA_VISIBLE_DEVICES= calibrates on the CPU, slowly"
        ) from None


def _loaded(folder: Path) -> Any:
    """The model, as it is stored on a GPU, in float32 on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if on_gpu else torch.float32)
    return model.eval().to("cuda" if on_gpu else "cpu")


def _run(model: Any, places: Sequence[Junction], rows: Sequence[list[int]], say: Say) -> dict[str, Seen]:
    """What the first reader of each junction is given; all of one junction are given the same."""
    import torch

    with activations.watching(model, (place.readers[0] for place in places), len(rows)) as seen:
        for number, row in enumerate(rows, start=1):
            # the body alone: logits of a whole vocabulary are not needed
            model.model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
            _tell(say, "run through the model", number, len(rows), "samples")
    return seen


def _choose(
    model: Any, places: Sequence[Junction], seen: dict[str, Seen], alpha: float | None, say: Say
) -> tuple[dict[str, torch.Tensor], tuple[LayerChange, ...]]:
    """Scales of all junctions under the names that a profile gives them, and each layer's change."""
    found: dict[str, torch.Tensor] = {}
    changes: list[LayerChange] = []
    for number, place in enumerate(places, start=1):
        one = seen.pop(place.readers[0])
        if not one.peak.isfinite().all():
            raise RunFailed(f"what {place.readers[0]} is given is not finite", hint="is the model whole?")
        weights = [model.get_submodule(name).weight.float() for name in place.readers]
        choice = scales.choose(place, one.rows(model.device), one.peak, weights, alpha)
        if choice.scales is not None:
            found |= {f"{name}.weight.columns": choice.scales.cpu() for name in place.readers}
            found |= {f"{name}.rows": scales.made(place, choice.scales).cpu() for name in place.makers}
        changes += _changes(place, one.peak, weights, choice)
        _tell(say, "balanced", number, len(places), "places")
    return found, tuple(changes)


def _changes(
    place: Junction, peak: torch.Tensor, weights: Sequence[torch.Tensor], choice: Choice
) -> Iterator[LayerChange]:
    def largest(values: torch.Tensor) -> float:
        return float(values.abs().max())

    by = 1.0 if choice.scales is None else choice.scales
    for name, weight, before, after in zip(place.readers, weights, choice.before, choice.after, strict=True):
        yield LayerChange(
            name=name,
            alpha=choice.alpha,
            activation_max=(largest(peak), largest(peak / by)),
            weight_max=(largest(weight), largest(weight * by)),
            error=(before, after),
        )


def _save(tensors: dict[str, torch.Tensor], about: About, out: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with files.replacing(out) as temporary:
            save_file({name: one.clone() for name, one in tensors.items()}, temporary, about.metadata())
    except (OSError, SafetensorError) as error:  # a full disk is the latter
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentNotReady(f"{out} cannot be written: {reason}", hint="--profile FILE elsewhere") from None


def _tell(say: Say, done: str, number: int, total: int, what: str) -> None:
    if number * _LINES // total > (number - 1) * _LINES // total:
        say(f"{done}: {number:,} of {total:,} {what}")
