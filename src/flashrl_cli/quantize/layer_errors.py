"""The error and the saved bytes of quantizing a model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.quantize.arithmetic import Losses

_WORST = 10
_MIB = 2**20
COLUMNS = ("layer", "shape", "error %", "to zero %", "MiB", "in 8 bits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One quantized weight [N, K]; `error` is ‖W − Q·s‖ / ‖W‖ (Frobenius) with W as a bf16 engine holds it.

    `zeros` is the share of values that are stored as 0; `clipped` the share beyond the range, which is 0 for scales
    that are derived from the largest value. `before` and `after` are bytes, including scales.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    zeros: float
    clipped: float
    before: int
    after: int

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], losses: Losses, *, before: int, after: int) -> Layer:
        """The report on a weight with the given losses."""
        count = math.prod(shape)
        return cls(
            name=name,
            shape=shape,
            error=math.sqrt(losses.error / losses.square) if losses.square else 0.0,
            zeros=losses.zeros / count,
            clipped=losses.clipped / count,
            before=before,
            after=after,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All quantized layers, the linear modules that stay in 16 bits, and the model's bytes before and after."""

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    before: int
    after: int

    def document(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "totals": {
                "layers": len(self.layers),
                "kept": len(self.kept),
                "bytes_before": self.before,
                "bytes_after": self.after,
                "mean_error": sum(layer.error for layer in self.layers) / len(self.layers),
                "worst_error": max(layer.error for layer in self.layers),
            },
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
            "kept": list(self.kept),
        }


def table(document: dict[str, Any]) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Columns and rows of the layers with the largest errors, from `Report.document`."""
    worst = sorted(document["layers"], key=lambda layer: -layer["error"])[:_WORST]
    return COLUMNS, [
        (
            layer["name"],
            " × ".join(map(str, layer["shape"])),
            100 * layer["error"],
            100 * layer["zeros"],
            layer["before"] / _MIB,
            layer["after"] / _MIB,
        )
        for layer in worst
    ]


def summary(document: dict[str, Any]) -> str:
    """A one-sentence summary of the report."""
    totals = document["totals"]
    sizes = f"{totals['bytes_before'] / _MIB:,.1f} MiB of weights became {totals['bytes_after'] / _MIB:,.1f} MiB"
    errors = f"{100 * totals['mean_error']:.3f} % in the mean, {100 * totals['worst_error']:.3f} % at worst"
    return (
        f"{counted(totals['layers'], 'layer')} in 8 bits, {totals['kept']} kept in 16; {sizes}; relative error {errors}"
    )
