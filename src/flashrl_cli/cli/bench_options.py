"""Options of `flashrl bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MACHINE = "the machine's"

Model = Annotated[
    str,
    typer.Option(
        metavar="PATH|HUB_ID|prepared:NAME|shape:SIZE",
        help="A model, or only the shape of Qwen2.5 with random weights: shape:7b, its first layers: shape:7b/4.",
    ),
]
Rollouts = Annotated[
    str,
    typer.Option(
        "--rollout",
        metavar="KIND,...",
        help="bf16, int8, fp8 or fp8-block, each with any of +kv8 (FP8 KV cache), +head32 (float32 logits), +smooth.",
    ),
]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="N|fit,...",
        help="Sequences at once; fit: as many as the KV cache holds.",
        show_default="64,256; on a CPU 4,16",
    ),
]
Prompt = Annotated[
    int | None, typer.Option(min=1, help="Tokens of each random prompt.", show_default="512; on a CPU 64")
]
Response = Annotated[int | None, typer.Option(min=1, help="Tokens of each response.", show_default="512; on a CPU 32")]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements of each speed; the median counts.")]
Refit = Annotated[bool, typer.Option("--refit", help="Also time the update of all weights.")]
Mismatch = Annotated[
    bool, typer.Option("--mismatch", help="Also compare log-probs with the trainer's (Transformers); needs --data.")
]
Data = Annotated[
    str | None,
    typer.Option(metavar="NAME|PARQUET,...", help="Prompts for --mismatch: prepared data sets or parquet files."),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Responses to compare.", show_default="256; on a CPU 64")]
TrainerDtype = Annotated[str, typer.Option(metavar="bfloat16|float32", help="What the trainer computes in.")]
Profile = Annotated[Path | None, typer.Option(metavar="FILE", help="Smoothing profile for +smooth.")]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences that the engine computes at once.", show_default="the largest batch"),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(min=2, help="Longest prompt and response together.", show_default="what is measured needs"),
]
KvMemory = Annotated[
    float | None,
    typer.Option(
        "--kv-memory", metavar="GIB", min=0.1, help="KV cache of each GPU.", show_default="what is left; on a CPU 1"
    ),
]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")]
Budget = Annotated[
    float | None, typer.Option(metavar="SECONDS", min=1, help="Leave out what does not fit into this time.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--dir", metavar="DIR", help="Where finished points are kept.", show_default=".bench in the runs folder"
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what is kept.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Also write the JSON document to a file.")]
Png = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw the speeds.")]
