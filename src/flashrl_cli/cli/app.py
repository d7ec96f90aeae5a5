"""The `flashrl` command: its table of sub-commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from flashrl_cli import __version__
from flashrl_cli.cli import eval_show, prepare_show
from flashrl_cli.cli.bench import bench
from flashrl_cli.cli.doctor import doctor
from flashrl_cli.cli.eval import evaluate
from flashrl_cli.cli.prepare import prepare
from flashrl_cli.cli.presets import presets
from flashrl_cli.cli.quantize import quantize
from flashrl_cli.cli.runs import runs
from flashrl_cli.cli.train import train
from flashrl_cli.errors import EnvironmentNotReady, ExitCode, FlashrlError, exit_code_of, is_of_the_disk

app = typer.Typer(
    name="flashrl",
    help="Train language models by RL with quantized rollouts, on stock verl, Ray and vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help costs as much time as everything else in `--help`
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        print(f"flashrl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train language models by RL with quantized rollouts, on stock verl, Ray and vLLM."""


app.command("prepare")(prepare)
app.command("prepare show")(prepare_show.show)
app.command("quantize")(quantize)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("eval show")(eval_show.show)
app.command("bench")(bench)
app.add_typer(presets, name="presets")
app.add_typer(runs, name="runs")
app.command("doctor")(doctor)


def main() -> None:
    """Run `flashrl`; a closed stream does not end its work, but a result that cannot be written is an error."""
    from flashrl_cli.render.output import guard_streams, lost_result, print_error

    guard_streams()
    try:
        _run()
    except SystemExit as end:
        lost = lost_result()
        if lost is None or end.code:
            raise
        print_error(
            EnvironmentNotReady(
                f"the result could not be written to stdout: {lost.strerror}", hint="write it elsewhere"
            )
        )
        sys.exit(ExitCode.ENVIRONMENT)


def _run() -> None:
    """Run the command line; every error is reported, and determines the exit code.

    Errors of the user or of a disk are reported as `error:` and `hint:`, anything else, a bug, with its traceback.
    """
    try:
        app(_words(sys.argv[1:]))
    except SystemExit:
        raise
    except BaseException as error:
        _report(error)
        raise SystemExit(int(exit_code_of(error))) from error


def _report(error: BaseException) -> None:
    from flashrl_cli.render.output import print_error

    if isinstance(error, KeyboardInterrupt):
        return
    if os.environ.get("FLASHRL_DEBUG") or not (isinstance(error, FlashrlError) or is_of_the_disk(error)):
        traceback.print_exception(error)
    elif isinstance(error, FlashrlError):
        print_error(error)
    elif isinstance(error, OSError):
        where = f"{error.filename2 or error.filename}: " if error.filename else ""
        hint = "correct the disk, the path or its permissions; FLASHRL_DEBUG=1 shows what was done with it"
        print_error(EnvironmentNotReady(f"{where}{error.strerror or error}", hint=hint))


def _words(argv: list[str]) -> list[str]:
    """Join `eval show` and `prepare show` into one word: these commands take any words, and have no sub-commands."""
    return [" ".join(argv[:2]), *argv[2:]] if argv[:2] in (["eval", "show"], ["prepare", "show"]) else argv
