"""A conversation with the debugger over lines of text, a script or lines as they come; or with a screen."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from djinn_fx.debugger.opening import Opening
from djinn_fx.views import visible

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger

#: Exit statuses: a script's command failed; nothing could be opened; ended by Ctrl-C, as shells have it.
FAILED, UNOPENED, ENDED = 1, 2, 130


def converse(
    opening: Opening, lines: Iterable[str] | None, prompt: str | None, max_new_tokens: int, echo: bool, strict: bool
) -> int:
    """Open a model and carry out a script, or lines as they are typed, or show the screen; returns the exit status."""
    if lines is None and sys.stdin.isatty() and sys.stdout.isatty():
        from djinn_fx.debugger.app import DebuggerApp

        app = DebuggerApp(opening, prompt, max_new_tokens, echo=echo)
        app.run()
        app.close()
        if app.unopened:
            print(app.unopened, file=sys.stderr)
        return app.return_code or 0
    try:
        return _lines(opening, lines, prompt, max_new_tokens, echo, strict)
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        return ENDED
    except BrokenPipeError:  # whoever read what was written has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _lines(
    opening: Opening, lines: Iterable[str] | None, prompt: str | None, max_new_tokens: int, echo: bool, strict: bool
) -> int:
    console = Console(stderr=True)
    try:
        with console.status("opening") as status:
            dj, default = opening(status.update)
    except Exception as error:  # whatever a model's own code raises
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return UNOPENED
    from djinn_fx.debugger.interpreter import Debugger

    debugger = Debugger(dj, show, prompt=prompt or default, max_new_tokens=max_new_tokens, echo=echo)
    with dj, interruptible(debugger):
        if lines is not None:
            return debugger.run_script(lines, strict=strict)
        for line in _typed(dj.sites.names):
            _carry_out(debugger, line)
            if debugger.done:
                break
    return 0


def show(text: str) -> None:
    """Print what a debugger says, such that nothing in it steers the terminal."""
    text = visible(text)
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a terminal without the signs of histograms
        print(text.encode("ascii", "replace").decode(), flush=True)


def _carry_out(debugger: Debugger, line: str) -> None:
    from djinn_fx.debugger import commands

    try:
        debugger.execute(line or commands.again(debugger.history))
    except KeyboardInterrupt:
        print("given up; say `forks` to see where things stand")


@contextmanager
def interruptible(debugger: Debugger) -> Iterator[None]:
    """While entered, Ctrl-C stops the run that goes at its next step; where none goes, or again, it is as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def asked(number: int, frame: FrameType | None) -> None:
        if not debugger.interrupt():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed(sites: tuple[str, ...]) -> Iterator[str]:
    with suppress(ImportError):
        _completing(sites)
    while True:
        try:
            yield input("(djinn) ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n`quit` leaves")


def _completing(sites: tuple[str, ...]) -> None:
    """Let Tab complete a typed line, and Up recall one."""
    import readline

    from djinn_fx.debugger import commands

    def complete(_: str, state: int) -> str | None:
        found = commands.complete(readline.get_line_buffer(), sites)
        return found[state].rpartition(" ")[2] + " " if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
