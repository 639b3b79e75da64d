"""``djinn-fx debug``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from djinn_fx.errors import DjinnError


def debug(
    model: Annotated[str | None, typer.Argument(help="Path or hub id; default: the bundled storyteller.")] = None,
    script: Annotated[str | None, typer.Option(help="Commands from a file, - for standard input; no screen.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What `run` runs where it is given nothing.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a run generates at most.")] = 40,
    echo: Annotated[bool, typer.Option("--echo", help="Show the Python of each command.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End a script at its first error.")] = False,
) -> None:
    """Debug a transformer: breakpoints, step, print, set, fork, diff, rewind."""
    from djinn_fx.debugger.opening import open_model, read_script
    from djinn_fx.debugger.terminal import converse

    try:
        lines = None if script is None else read_script(script)
    except (DjinnError, OSError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from error
    code = converse(partial(open_model, model), lines, prompt, max_new_tokens, echo, strict)
    if code:
        raise typer.Exit(code)
