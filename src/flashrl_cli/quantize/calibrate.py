"""Calibrate a smoothing profile from the activations of a model's linear layers on worked answers.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, arXiv 2211.10438, equation 4), rounded to powers of two, so
that the division is exact in bf16. Rounding costs little compared with an outlier: with artificial outliers an error of
14.2 % falls to 1.00 %, and to 0.88 % with scales that are not rounded.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.data.rows import Scoring
from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.evals.questions import read as read_questions
from flashrl_cli.quantize.inputs import ELSEWHERE, there
from flashrl_cli.quantize.layers import Junction, junctions
from flashrl_cli.text import GIB
from flashrl_cli.weights import Unreadable, Weights, read_json
from flashrl_cli.weights.contents import shapes
from flashrl_cli.weights.profile import SHAPE, About, Profile

if TYPE_CHECKING:
    import torch

    from flashrl_cli.evals.questions import Question

MAX_TOKENS = 1024
"""Number of tokens to which a sample is cut."""
KEPT = 256
"""Number of rows of a layer's input on which errors are measured, drawn evenly from all samples."""
SHIFTS = (0.25, 0.5, 0.75)
"""Offsets that are added to all logarithms before rounding. A common factor changes nothing in INT8, but an offset
changes which logarithms are rounded up or down.
"""
LEAST_GAIN = 0.01
"""Share of the error that scales must save to be kept; smaller gains are noise of the sample."""
_TINY = 1e-5
_MOST = 12
"""Largest exponent: a channel that needs more than 2^12 cannot be smoothed usefully."""
SCHEMA_VERSION = 1
_MADE_BY = ("torch", "transformers")
_LINES = 10
"""Number of progress lines for each part of the work."""


def texts(questions: Sequence[Question], count: int) -> list[list[dict[str, str]]]:
    """`count` conversations, spread evenly over the data: prompt and solution, or else the final answer, if any."""
    count = max(0, min(count, len(questions)))
    return [_worked(questions[number * len(questions) // count]) for number in range(count)]


def _worked(question: Question) -> list[dict[str, str]]:
    solution = (question.extra_info or {}).get("answer")
    answer = solution if isinstance(solution, str) and solution.strip() else question.ground_truth
    return question.prompt if answer is None else [*question.prompt, {"role": "assistant", "content": str(answer)}]


def tokens(folder: Path, conversations: Iterable[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of each conversation by the model's own chat template. Raises InputError if it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer that can be read in {folder}: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer in {folder} has no chat template", hint="put chat_template.jinja beside it")
    rows: list[list[int]] = [tokenizer.apply_chat_template(one, return_dict=False) for one in conversations]
    return [row[:MAX_TOKENS] for row in rows if len(row) > 1]


class Seen:
    """Inputs of one layer: `peak` [K] is max|X_j| over all tokens, `rows` [about KEPT, K] a sample; float32.

    The first token of each sample is left out: in many models its activations are huge and unlike those of other tokens
    (Sun et al. 2024, arXiv 2402.17762), and scales that smooth them spoil the weights for all others. Per-token scales
    limit the effect to that token.
    """

    def __init__(self, samples: int) -> None:
        self._each = -(-KEPT // samples)
        self._kept: list[torch.Tensor] = []
        self.peak: Any = None

    def add(self, inputs: torch.Tensor) -> None:
        """Record the inputs [1, T, K] of one sample of at least two tokens."""
        import torch

        flat = inputs.detach()[0, 1:]
        peak = flat.abs().amax(0).float()
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self._kept.append(flat[:: max(1, len(flat) // self._each)][: self._each].cpu())

    def rows(self, device: torch.device) -> torch.Tensor:
        """The rows that were kept."""
        import torch

        return torch.cat(self._kept).to(device).float()


@contextmanager
def watching(model: torch.nn.Module, readers: Iterable[str], samples: int) -> Iterator[dict[str, Seen]]:
    """While this context is open, the inputs of the modules named `readers` are recorded."""
    seen = {name: Seen(samples) for name in readers}
    hooks = [model.get_submodule(name).register_forward_pre_hook(_adder(one)) for name, one in seen.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _adder(seen: Seen) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    return lambda _, inputs: seen.add(inputs[0])


ALPHAS = tuple(step / 10 for step in range(10))
"""Values that are tried if no alpha is given: 0.0 smooths weights only, 0.9 almost only activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Scales [K] of a junction's inputs, applied to the columns of its readers, and the readers' relative errors.

    `alpha` and `scales` are None where smoothing gains nothing.
    """

    alpha: float | None
    scales: torch.Tensor | None
    before: tuple[float, ...]
    after: tuple[float, ...]


def choose(
    junction: Junction, inputs: torch.Tensor, peak: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float | None
) -> Choice:
    """The scales for alpha, or for None those of ALPHAS with the smallest error of the readers.

    `inputs` [T, K] and `weights` [N, K] are float32, `peak` [K] is max|X_j| over all recorded tokens.
    """
    exact = [inputs @ weight.T for weight in weights]

    def tried(alpha: float, shift: float) -> Choice:
        scales = balanced(junction, peak, weights, alpha, shift)
        return Choice(alpha=alpha, scales=scales, before=before, after=errors(inputs, weights, exact, scales))

    before = errors(inputs, weights, exact, None)
    plain = Choice(alpha=None, scales=None, before=before, after=before)
    found = min((tried(one, 0.0) for one in (ALPHAS if alpha is None else (alpha,))), key=_total)
    found = min((found, *(tried(found.alpha, shift) for shift in SHIFTS if found.alpha is not None)), key=_total)
    return plain if alpha is None and _total(found) > _total(plain) * (1 - LEAST_GAIN) ** 2 else found


def balanced(
    junction: Junction, peak: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float, shift: float = 0.0
) -> torch.Tensor:
    """Scales [K], powers of two around 1: equal for the query heads of one key-value head, 1 for unused channels."""
    import torch

    widest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    activation, weight = (_shared(junction, values.float()) for values in (peak, widest))
    used = (activation > 0) & (weight > 0)
    log = alpha * activation.clamp_min(_TINY).log2() - (1 - alpha) * weight.clamp_min(_TINY).log2()
    log = torch.where(used, log - log[used].mean() + shift, 0.0)
    return _spread(junction, torch.exp2(log.round().clamp(-_MOST, _MOST)))


def made(junction: Junction, scales: torch.Tensor) -> torch.Tensor:
    """Factors for the rows of the junction's makers: the inverse scales, which are exact."""
    return 1 / _shared(junction, scales)


def _shared(junction: Junction, values: torch.Tensor) -> torch.Tensor:
    """The maximum of `values` [K] over the query heads of each key-value head: [K / copies]."""
    return values.view(junction.heads, junction.copies, -1).amax(1).flatten()


def _spread(junction: Junction, values: torch.Tensor) -> torch.Tensor:
    """Repeat `values` [K / copies] for each query head: [K]."""
    return values.view(junction.heads, 1, -1).repeat(1, junction.copies, 1).flatten()


def errors(
    inputs: torch.Tensor, weights: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], scales: torch.Tensor | None
) -> tuple[float, ...]:
    """Relative error of each weight's output in INT8: the root mean square over tokens of |y_int8 - y| / |y|.

    As in the kernels, weights have one scale per output channel and activations one per token, both symmetric.
    """
    if scales is not None:
        inputs = inputs / scales
    rounded = in_int8(inputs)
    found = []
    for weight, output in zip(weights, exact, strict=True):
        quantized = rounded @ in_int8(weight if scales is None else weight * scales).T
        off = (quantized - output).norm(dim=1) / output.norm(dim=1).clamp_min(_TINY)
        found.append(float(off.square().mean().sqrt()))
    return tuple(found)


def in_int8(values: torch.Tensor) -> torch.Tensor:
    """Rows [M, K] after rounding to INT8: round(x / s) s with s = max|row| / 127."""
    step = (values.abs().amax(1, keepdim=True) / 127).clamp_min(1e-8)
    return (values / step).round().mul_(step)


def _total(choice: Choice) -> float:
    return sum(error * error for error in choice.after)


Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """One linear layer before and after smoothing: max|X|, max|W| and the error of its output; alpha None: unchanged.

    max|W| includes the scales of columns only: those of rows cancel in a weight with one scale per row. The error is
    that of `errors`.
    """

    name: str
    alpha: float | None
    activation_max: tuple[float, float]
    weight_max: tuple[float, float]
    error: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A written profile and its effect on each linear layer; without `layers` it existed already."""

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
        """The effect of the profile, as a sentence."""
        if self.error is None:
            return "the profile is already there, made of the same"
        before, after = self.error
        changed = sum(one.alpha is not None for one in self.layers)
        return (
            f"INT8 puts the output of a linear layer off by {before:.2%} on average, with the profile by {after:.2%} "
            f"({changed} of {len(self.layers)} layers smoothed)"
        )

    def document(self) -> dict[str, Any]:
        """The result as plain data."""
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
    """Write to `out` the smoothing profile of the HF folder `model`, calibrated on `samples` rows of a data set.

    With `alpha` None, each layer gets the alpha with the smallest error; `say` prints the progress. The same input
    gives the same profile, and an existing profile is reused. Nothing is written before the end. Raises InputError for
    a model, data or an alpha that cannot be used and for an `out` made from other inputs, RunFailed if nothing is
    gained, EnvironmentNotReady if the model does not fit into memory.
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
    rows = tokens(model, texts(questions, samples))
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
    """The existing profile, if there is one. Raises InputError if it was made from other inputs."""
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
    """Raise EnvironmentNotReady if the CPU's memory cannot hold the model in float32; a GPU raises its own error."""
    import psutil
    import torch

    needed, free = 4 * parameters, psutil.virtual_memory().available
    if not torch.cuda.is_available() and needed > free:
        what = f"on the CPU the model takes {needed / GIB:.1f} GiB in float32, and {free / GIB:.1f} GiB are free"
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
    """Load the model: in its stored dtype on a GPU, in float32 on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if on_gpu else torch.float32)
    return model.eval().to("cuda" if on_gpu else "cpu")


def _run(model: Any, places: Sequence[Junction], rows: Sequence[list[int]], say: Say) -> dict[str, Seen]:
    """Record the inputs of the first reader of each junction; all readers of a junction have the same inputs."""
    import torch

    with watching(model, (place.readers[0] for place in places), len(rows)) as seen:
        for number, row in enumerate(rows, start=1):
            # the body alone: the logits of the full vocabulary are not needed
            model.model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
            _tell(say, "run through the model", number, len(rows), "samples")
    return seen


def _choose(
    model: Any, places: Sequence[Junction], seen: dict[str, Seen], alpha: float | None, say: Say
) -> tuple[dict[str, torch.Tensor], tuple[LayerChange, ...]]:
    """Scales of all junctions under their names in a profile, and the change of each layer."""
    found: dict[str, torch.Tensor] = {}
    changes: list[LayerChange] = []
    for number, place in enumerate(places, start=1):
        one = seen.pop(place.readers[0])
        if not one.peak.isfinite().all():
            raise RunFailed(f"what {place.readers[0]} is given is not finite", hint="is the model whole?")
        weights = [model.get_submodule(name).weight.float() for name in place.readers]
        choice = choose(place, one.rows(model.device), one.peak, weights, alpha)
        if choice.scales is not None:
            found |= {f"{name}.weight.columns": choice.scales.cpu() for name in place.readers}
            found |= {f"{name}.rows": made(place, choice.scales).cpu() for name in place.makers}
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
    except (OSError, SafetensorError) as error:  # a full disk raises SafetensorError
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentNotReady(f"{out} cannot be written: {reason}", hint="--profile FILE elsewhere") from None


def _tell(say: Say, done: str, number: int, total: int, what: str) -> None:
    if number * _LINES // total > (number - 1) * _LINES // total:
        say(f"{done}: {number:,} of {total:,} {what}")
