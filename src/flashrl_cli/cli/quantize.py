"""`flashrl quantize`: quantize a model on disk to 8 bits, and calibrate its smoothing profile."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrl_cli import paths
from flashrl_cli.cli.options import Json
from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from flashrl_cli.render.output import Output

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder with safetensors, a run's global_step_N, a LoRA adapter, or a hub id.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="New folder for the quantized model (default: ./MODEL-SCHEME)."),
]
Scheme = Annotated[str | None, typer.Option(metavar="int8|fp8", help="Precision of weights and activations (W8A8).")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME|re:PATTERN", help="Leave these layers in 16 bits; repeatable."),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Smoothing profile: applied to the weights; with --calibrate, written."),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(metavar="PARQUET", help="Make a smoothing profile from the model's activations on these prompts."),
]
Samples = Annotated[int | None, typer.Option(metavar="N", min=1, help="Prompts to calibrate on.", show_default="64")]
Alpha = Annotated[
    str | None,
    typer.Option(
        metavar="A|auto",
        help="Share of the activations' range that weights take over, 0 to 1, or by layer.",
        show_default="auto",
    ),
]


SCHEMA_VERSION = 1
SAMPLES = 64
"""Default number of prompts for a calibration."""


def quantize(
    model: Model,
    *,
    out: Out = None,
    scheme: Scheme = None,
    ignore: Ignore = None,
    profile: ProfileFile = None,
    calibrate: Calibrate = None,
    samples: Samples = None,
    alpha: Alpha = None,
    json: Json = False,
) -> None:
    """Quantize a model on disk: a W8A8 checkpoint that stock vLLM loads.

    Weights symmetric with one scale per output channel, activations per token: what a rollout in int8 or fp8 computes.
    The table shows what was lost, layer by layer.

    flashrl quantize Qwen/Qwen2.5-0.5B-Instruct --scheme int8

    flashrl quantize checkpoints/flashrl/tiny/global_step_10 --scheme fp8 -o tiny-fp8 --ignore 're:.*down_proj'
    """
    from flashrl_cli import signals
    from flashrl_cli.render.output import Output

    output = Output(json_mode=json)
    if calibrate is None and scheme is None:
        raise InputError("nothing to do", hint="--scheme int8 or fp8, or --calibrate PARQUET")
    _refuse_without("--calibrate", calibrate, {"--samples": samples, "--alpha": alpha})
    _refuse_without("--scheme", scheme, {"--out": out, "--ignore": ignore})
    with signals.raised("nothing half-written is left; the same command goes on after what is whole", output.say):
        document: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        if calibrate is not None:
            profile, made = _calibrate(output, model, calibrate, samples or SAMPLES, _alpha(alpha), profile)
            document["calibration"] = made
        if scheme is not None:
            document |= _quantize(output, model, out, scheme, ignore or [], profile)
    if json:
        output.document(document)


def _refuse_without(needed: str, value: object, options: dict[str, object]) -> None:
    """Raise InputError for options that only have a meaning with another option, which is missing."""
    for name, given in options.items():
        if value is None and given:
            raise InputError(f"{name} is for {needed}", hint=f"add {needed}, or leave {name} out")


def _alpha(text: str | None) -> float | None:
    if text is None or text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--alpha {text}: neither a number nor auto", hint="--alpha 0.5") from None


def _calibrate(
    output: Output, model: str, parquet: Path, samples: int, alpha: float | None, out: Path | None
) -> tuple[Path, dict[str, Any]]:
    """Write a smoothing profile; returns its path and a description of its effect."""
    from flashrl_cli.quantize.calibrate import calibrate
    from flashrl_cli.quantize.inputs import new_profile

    folder, target = new_profile(model, out)
    with _alone(output, target):
        made = calibrate(folder, paths.absolute(parquet), samples=samples, alpha=alpha, out=target, say=output.say)
    if not output.json_mode:
        output.text(made.verdict())
        output.text(str(target))
    return target, made.document()


def _alone(output: Output, target: Path) -> AbstractContextManager[bool]:
    """Lock `target`: of two commands that produce the same file, the second waits and then finds it complete."""
    from flashrl_cli import files

    return files.alone(target, lambda: output.say(f"another command makes {target}: waiting for it"))


def _quantize(
    output: Output, model: str, out: Path | None, scheme: str, ignore: list[str], profile: Path | None
) -> dict[str, Any]:
    """Write the quantized folder and return its manifest."""
    from flashrl_cli.quantize import layer_errors
    from flashrl_cli.quantize.inputs import plan
    from flashrl_cli.quantize.offline import quantize as write

    wanted = plan(model, out, scheme, ignore, paths.absolute(profile) if profile else None)
    for warning in wanted.warnings():
        output.warn(warning)
    label = f"quantizing {wanted.name} to {wanted.scheme.name}"
    with _alone(output, wanted.target), output.progress(label, len(wanted.tensors)) as advance:
        document, there = write(wanted, lambda note: advance(1, note))
    if there:
        output.say(f"{wanted.target} is already there, made of the same")
    if not output.json_mode:
        output.table(*layer_errors.table(document), title="largest errors")
        output.text(layer_errors.summary(document))
        output.text(str(wanted.target))
    return {**document, "path": str(wanted.target), "already_there": there}
