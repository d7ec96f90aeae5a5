"""Scales for one junction, chosen by what they do to the INT8 error of the layers that read there.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, arXiv 2211.10438, equation 4), rounded to powers of two: the division is then
exact in bf16, and a scale that is off by a factor of 1.4 costs next to nothing (an outlier channel is off by a hundred).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from flashrl_cli.quantize.absorbing import Junction

ALPHAS = tuple(step / 10 for step in range(10))
"""What is tried where no alpha is given: 0.0 evens out weights alone, 0.9 activations nearly alone."""
SHIFTS = (0.25, 0.5, 0.75)
"""Of all logarithms before they are rounded: a common factor changes nothing in INT8, but which of them are rounded up and which down."""
LEAST_GAIN = 0.01
"""Share of the error that scales must save to be kept: less is noise of the sample, and costs a multiplication a refit."""
_TINY = 1e-5
_MOST = 12
"""Largest exponent: beyond 2^12 a channel is not evened out but lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Scales [K] of a junction's inputs, as its readers' columns take them, and relative output errors of each reader.

    `alpha` and `scales` are None where nothing is gained.
    """

    alpha: float | None
    scales: torch.Tensor | None
    before: tuple[float, ...]
    after: tuple[float, ...]


def choose(
    junction: Junction, inputs: torch.Tensor, peak: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float | None
) -> Choice:
    """The scales for alpha, or with None those of ALPHAS under which the readers' errors are least.

    `inputs` [T, K] and `weights` [N, K] are float32, `peak` [K] is max|X_j| over all that was seen.
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
    """Scales [K], powers of two around 1: equal for the query heads of one key-value head, 1 for channels that are never used.

    `shift` is one of SHIFTS, or 0.
    """
    import torch

    widest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    activation, weight = (_shared(junction, values.float()) for values in (peak, widest))
    used = (activation > 0) & (weight > 0)
    log = alpha * activation.clamp_min(_TINY).log2() - (1 - alpha) * weight.clamp_min(_TINY).log2()
    log = torch.where(used, log - log[used].mean() + shift, 0.0)
    return _spread(junction, torch.exp2(log.round().clamp(-_MOST, _MOST)))


def made(junction: Junction, scales: torch.Tensor) -> torch.Tensor:
    """What the rows of the junction's makers are multiplied by: the inverse, which is exact."""
    return 1 / _shared(junction, scales)


def _shared(junction: Junction, values: torch.Tensor) -> torch.Tensor:
    """The largest of `values` [K] over the query heads of each key-value head: [K / copies]."""
    return values.view(junction.heads, junction.copies, -1).amax(1).flatten()


def _spread(junction: Junction, values: torch.Tensor) -> torch.Tensor:
    """`values` [K / copies] for each query head: [K]."""
    return values.view(junction.heads, 1, -1).repeat(1, junction.copies, 1).flatten()


def errors(
    inputs: torch.Tensor, weights: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], scales: torch.Tensor | None
) -> tuple[float, ...]:
    """Relative error of each weight's output in INT8: |y_int8 - y| / |y| of each token, and of those the root mean square.

    Weights have a scale per output channel, activations one per token, both symmetric, as the kernels have.
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
    """Rows [M, K] as INT8 holds them: round(x / s) s with s = max|row| / 127."""
    step = (values.abs().amax(1, keepdim=True) / 127).clamp_min(1e-8)
    return (values / step).round().mul_(step)


def _total(choice: Choice) -> float:
    return sum(error * error for error in choice.after)
