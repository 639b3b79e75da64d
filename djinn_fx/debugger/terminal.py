"""A conversation with the debugger over lines of text: a script, or lines as they come; or with a screen."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from djinn_fx.debugger.interpreter import Debugger
from djinn_fx.dj import Dj


def converse(dj: Dj, lines: Iterable[str] | None, prompt: str, max_new_tokens: int, echo: bool, strict: bool) -> int:
    """Carry out a script, or lines as they are typed. Returns the exit status: 0, or 1 if a script's command failed."""
    if lines is None and sys.stdin.isatty() and sys.stdout.isatty():
        from djinn_fx.debugger.app import DebuggerApp

        DebuggerApp(dj, prompt, max_new_tokens, echo=echo).run()
        return 0
    debugger = Debugger(dj, print, prompt=prompt, max_new_tokens=max_new_tokens, echo=echo)
    if lines is not None:
        return debugger.run_script(lines, strict=strict)
    for line in _typed():
        debugger.execute(line)
        if debugger.done:
            break
    return 0


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("(djinn) ")
        except EOFError:
            return
