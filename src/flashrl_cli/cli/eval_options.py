"""Arguments and options of `flashrl eval`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

MODEL = "PATH|HUB_ID"


class Rollout(enum.StrEnum):
    """Precision of the linear layers while responses are generated."""

    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


Patterns = Annotated[
    list[str],
    typer.Argument(
        metavar="PATTERN...", help="Globs or paths: projects, runs, global_step_N, HF folders, adapters; hub ids."
    ),
]
Base = Annotated[
    str | None, typer.Option(metavar=MODEL, help="The policy that training began with: step 0 of every run.")
]
Baseline = Annotated[str | None, typer.Option(metavar=MODEL, help="Any model that the best step is compared with.")]
Datasets = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="NAME|PARQUET,...",
        help="Prepared data sets (their test split) or files.",
        show_default="the run's own",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N prompts of each data set.")]
Samples = Annotated[int, typer.Option("--n", min=1, help="Responses to each prompt; several add pass@k and maj@n.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1, help="Share of probability to sample from.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")]
MaxModelLen = Annotated[
    int | None, typer.Option(min=2, help="Longest prompt and response together.", show_default="what the prompts need")
]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Precision = Annotated[Rollout, typer.Option("--rollout", help="int8 and fp8 show what such a rollout saw.")]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile", metavar="FILE", help="Smoothing profile to apply, as a rollout with it does (int8, fp8)."
    ),
]
FailUnder = Annotated[
    str | None,
    typer.Option(
        "--fail-under",
        metavar="SHARE",
        help="Exit with 5 if the newest step of a run, or a model, is less accurate (0 to 1).",
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch", help="Evaluate each new checkpoint of a running training, until it ends.")
]
Merge = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Only write the weights as HF folders to DIR; evaluate nothing.")
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where results go.", show_default="eval/ in the run's checkpoints"),
]
Png = Annotated[bool, typer.Option("--png", help="Also draw the curve to eval.png.")]
