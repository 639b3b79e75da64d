"""The command line: ``djinn-fx``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from djinn_fx._version import __version__
from djinn_fx.cli_bench import bench
from djinn_fx.cli_debug import debug
from djinn_fx.cli_inspect import inspect
from djinn_fx.errors import DjinnError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Breakpoints for compiled transformers.")
app.add_typer(bench, name="bench")
app.command()(inspect)
app.command()(debug)


def _version(asked: bool) -> None:
    if asked:
        print(f"djinn-fx {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Breakpoints for compiled transformers."""


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Path or hub id of any causal language model; default: the bundled one.")
    ] = None,
) -> None:
    """Stop, look, edit, steer, pause, fork, rewind, save and restore: the main job on a real model."""
    from djinn_fx.demo import run_demo

    console = Console()
    try:
        held = run_demo(model, console)
    except (DjinnError, OSError) as error:
        console.print(f"[bold red]{type(error).__name__}[/bold red]: {error}")
        raise typer.Exit(2) from error
    if not held:
        raise typer.Exit(1)
