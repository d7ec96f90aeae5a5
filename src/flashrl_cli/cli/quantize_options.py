"""The argument and the options of `flashrl quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
