"""Smoothing profiles: factors that scale rows and columns of a model's tensors before quantization.

A profile refers to tensor names only, not to an architecture. For a tensor NAME it holds `NAME.columns` [K] and
`NAME.rows` [N] in float32, in a safetensors file whose metadata describe how it was made. Every scale is a power of
two, so smoothing changes exponents only: it is exact in bf16 and in float32, and a model that is smoothed but not
quantized computes the same bits.

torch is imported when tensors are smoothed; reading and checking do not need it.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashrl_cli.weights.contents import Unreadable, metadata, table

SCHEMA_VERSION = 1
META = "flashrl_profile"
"""Key of the safetensors metadata that holds a profile's description, as JSON."""
SHAPE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
"""Keys of config.json that decide whether a profile can belong to a model."""
_PARTS = ("columns", "rows")
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """How a profile was made.

    If `alpha` is None, it was chosen layer by layer. `tokens` and `samples` count the calibration data. `shape` holds
    the model's SHAPE keys, `fingerprint` its `Weights.fingerprint`, `versions` the package versions, and `rows` the
    SHA-256 of the calibration token ids (empty in older profiles).
    """

    model: str
    fingerprint: str
    shape: dict[str, Any]
    data: str
    alpha: float | None
    samples: int
    tokens: int
    versions: dict[str, str]
    rows: str = ""
    schema_version: int = SCHEMA_VERSION

    def metadata(self) -> dict[str, str]:
        """The metadata of the profile's file: a single key, because safetensors writes several keys in any order."""
        return {META: json.dumps(asdict(self))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A profile on disk.

    `lengths` maps each tensor to the lengths of its scales (columns, rows), with None for a missing one.
    """

    path: Path
    about: About
    lengths: Mapping[str, tuple[int | None, int | None]]
    _scales: dict[Any, dict[str, tuple[Any, Any]]] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Scales by name, for each device and dtype of the tensors."""

    @classmethod
    def read(cls, path: Path) -> Profile:
        """The profile in a file.

        Raises Unreadable for a file that is missing, damaged, or not a profile with valid scales.
        """
        entries, start = table(path)
        about = _about(path)
        lengths: dict[str, tuple[int | None, int | None]] = {}
        for key, entry in entries.items():
            name, _, part = key.rpartition(".")
            if part not in _PARTS or entry.get("dtype") != "F32" or len(entry.get("shape", ())) != 1:
                raise Unreadable(f"{path} is no smoothing profile: it holds {key}")
            found = [*lengths.get(name, (None, None))]
            found[_PARTS.index(part)] = entry["shape"][0]
            lengths[name] = (found[0], found[1])
        if not lengths:
            raise Unreadable(f"{path} smooths nothing")
        _check_scales(path, start)
        return cls(path=path, about=about, lengths=lengths)

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors that the profile changes."""
        return frozenset(self.lengths)

    def suits(self, config: Mapping[str, Any]) -> str | None:
        """Why the profile belongs to another model than the one with this config.json; None if it suits the model."""
        for key, wanted in self.about.shape.items():
            found = config.get(key)
            if None not in {wanted, found} and found != wanted:
                return f"it was made for {self.about.model} with {key} = {wanted}, and the model has {found}"
        return None

    def fits(self, shapes: Shapes) -> str | None:
        """Why the profile cannot be applied to tensors of these shapes; None if it can."""
        for name, lengths in sorted(self.lengths.items()):
            if name not in shapes:
                return f"it smooths {name}, which the model lacks"
            if why := _misfit(name, lengths, shapes[name]):
                return why
        return None

    def apply(self, name: str, tensor: Any) -> Any:
        """The smoothed `tensor` in new memory, or `tensor` itself if the profile does not name it.

        The result has the tensor's device and dtype. It takes one multiplication instead of a copy, or two if both rows
        and columns have scales. Raises Unreadable for a wrong shape.
        """
        if name not in self.lengths:
            return tensor
        if why := _misfit(name, self.lengths[name], tensor.shape):
            raise Unreadable(f"{self.path} is of another model: {why}")
        columns, rows = self._placed(tensor)[name]
        if rows is not None:
            rows = rows.reshape(-1, *[1] * (tensor.dim() - 1))
        if columns is None:
            return tensor * rows
        smoothed = tensor * columns
        return smoothed if rows is None else smoothed.mul_(rows)

    def _placed(self, tensor: Any) -> dict[str, tuple[Any, Any]]:
        """All scales on the tensor's device and in its dtype, moved there once."""
        place = (tensor.device, tensor.dtype)
        if place not in self._scales:
            from safetensors.torch import load_file

            loaded = {key: scales.to(*place) for key, scales in load_file(self.path).items()}
            self._scales[place] = {
                name: (loaded.get(f"{name}.columns"), loaded.get(f"{name}.rows")) for name in self.lengths
            }
        return self._scales[place]


def _misfit(name: str, lengths: tuple[int | None, int | None], shape: Sequence[int]) -> str | None:
    """Why scales of these lengths do not fit a tensor of shape [N, K], or [N] without columns."""
    columns, rows = lengths
    if len(shape) in {1, 2} and rows in {None, shape[0]} and (columns is None or list(shape[1:]) == [columns]):
        return None
    wanted = ", ".join("any" if length is None else str(length) for length in (rows, columns))
    return f"it smooths {name} as [{wanted}], and the model's is {list(shape)}"


def _about(path: Path) -> About:
    try:
        data = json.loads(metadata(path)[META])
        about = About(**data)
    except (KeyError, ValueError, TypeError):
        raise Unreadable(f"{path} is no smoothing profile (`flashrl quantize --calibrate` writes them)") from None
    if about.schema_version != SCHEMA_VERSION:
        raise Unreadable(
            f"{path} has version {about.schema_version} of the format, and this flashrl reads {SCHEMA_VERSION}"
        )
    return about


def _check_scales(path: Path, start: int) -> None:
    """Raise Unreadable unless every scale, that is every value after the file's table, is a positive power of two."""
    scales = array("f")
    scales.frombytes(path.read_bytes()[start:])
    for scale in set(scales):
        if not (math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5):
            raise Unreadable(f"{path} holds the scale {scale}, which is no power of two")
