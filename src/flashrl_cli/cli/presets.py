"""`flashrl presets`: what can be trained."""

import typer

presets = typer.Typer(help="List and show presets.", no_args_is_help=True)


@presets.command("ls")
def ls() -> None:
    """List presets."""
