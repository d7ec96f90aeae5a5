"""Arguments and options that several commands share, with their shell completion.

Completion lists the names of presets and runs from folder listings; no file is read.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flashrl_cli.precision import METAVAR


def preset_names(incomplete: str) -> list[str]:
    """Names of the presets that start with `incomplete`; none for a path, which the shell completes itself."""
    from flashrl_cli.config.presets import names

    return [name for name in names() if name.startswith(incomplete)]


def run_names(incomplete: str) -> list[str]:
    """Names of the runs on disk that start with `incomplete`."""
    from flashrl_cli.runs import store

    return [name for name in store.run_names() if name.startswith(incomplete)]


def preset_and_run_names(incomplete: str) -> list[str]:
    """Names of presets, then of runs, that start with `incomplete`."""
    return [*preset_names(incomplete), *run_names(incomplete)]


def executors(incomplete: str) -> list[str]:
    """Names of the executors that start with `incomplete`."""
    return [name for name in ("local", "ray") if name.startswith(incomplete)]


NAME_OR_FILE = "NAME|FILE"

Preset = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar=NAME_OR_FILE,
        help="Name of a preset (`flashrl presets ls`) or a YAML file.",
        autocompletion=preset_names,
    ),
]
PresetArgument = Annotated[
    str,
    typer.Argument(metavar=NAME_OR_FILE, help="A preset's name, or a YAML file.", autocompletion=preset_names),
]
RunName = Annotated[
    str | None,
    typer.Option("--name", help="Name of the run (default: preset, precision and cap).", autocompletion=run_names),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A run's name (`flashrl runs ls`).", autocompletion=run_names)
]
Rollout = Annotated[str | None, typer.Option("--rollout", metavar=METAVAR, help="Precision of the rollouts.")]
Tis = Annotated[
    str | None, typer.Option("--tis", metavar="CAP|off", help="Cap of truncated importance sampling, or off.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the preset, or verl.KEY=VALUE; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Executor = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="local|ray",
        help="Run here, or as a job of a Ray cluster.",
        autocompletion=executors,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="The cluster's dashboard (default: RAY_ADDRESS, else http://127.0.0.1:8265).",
    ),
]
TensorParallel = Annotated[int, typer.Option("--tp", min=1, help="GPUs that share one engine (tensor parallel).")]
MemoryShare = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        min=0.01,
        max=1,
        help="Share of each GPU's memory to take.",
        show_default="what is free, to 0.9",
    ),
]
KvMemory = Annotated[
    float | None,
    typer.Option(
        "--kv-memory", metavar="GIB", min=0.1, help="KV cache of each GPU.", show_default="what is left; on a CPU 1"
    ),
]
