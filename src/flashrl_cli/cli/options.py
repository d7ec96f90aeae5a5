"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Rollout = Annotated[str | None, typer.Option("--rollout", help="Precision of the rollouts: bf16, int8 or fp8.")]
Tis = Annotated[
    str | None, typer.Option("--tis", metavar="CAP|off", help="Cap of truncated importance sampling, or off.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the preset, or verl.KEY=VALUE; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
