"""What a quantized folder was made of, kept in it: with it the same command finds that there is nothing to do."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from flashrl_cli import __version__, files
from flashrl_cli.weights import Unreadable, Weights, read_json

FILE = "flashrl_quantize.json"
SCHEMA_VERSION = 1
_PACKAGES = ("torch", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All that decides what is written: the weights' fingerprint, the scheme, what is left out, and the profile's SHA-256."""

    fingerprint: str
    scheme: str
    ignore: tuple[str, ...]
    profile: str | None


def inputs(weights: Weights, scheme: str, ignore: Sequence[str], profile: Path | None) -> Inputs:
    """The inputs of one quantization. Raises Unreadable."""
    return Inputs(
        fingerprint=weights.fingerprint(),
        scheme=scheme,
        ignore=tuple(sorted(set(ignore))),
        profile=files.sha256(profile) if profile else None,
    )


def write(folder: Path, source: str, made_of: Inputs, report: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a quantized `folder`, and return it. `source` names the model as a person does."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "inputs": {**asdict(made_of), "ignore": list(made_of.ignore)},
        "versions": {"flashrl-cli": __version__, "python": platform.python_version(), **_versions()},
        **report,
    }
    files.write_json(folder / FILE, document)
    return document


def found(folder: Path, made_of: Inputs) -> dict[str, Any] | None:
    """The manifest of a whole folder that was made of the same inputs; None for any other."""
    try:
        document = read_json(folder / FILE)
        Weights(hf=folder).check()
        same = document["inputs"] == {**asdict(made_of), "ignore": list(made_of.ignore)}
    except (Unreadable, KeyError):
        return None
    return document if same and document.get("schema_version") == SCHEMA_VERSION else None


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}
