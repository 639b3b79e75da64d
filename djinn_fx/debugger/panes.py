"""What the panes of the debugger's screen show, as plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from djinn_fx import render
from djinn_fx.debugger import shows
from djinn_fx.dj import Dj
from djinn_fx.runtime.stop import Stop

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger


def token_line(debugger: Debugger) -> str:
    """The current session's text; the token at which it stands in brackets."""
    if debugger.current not in debugger.sessions:
        return f"not running; `run` begins with: {debugger.prompt}"
    session = debugger.session
    stop = session.run.stop if session.run is not None else None
    parts = [debugger.dj.engine.decode_text([int(token)]) or f"{int(token)} " for token in session.tokens]
    if stop is not None and stop.position < len(parts):
        parts[stop.position] = f"[{parts[stop.position]}]"
    return "".join(parts)


def site_text(dj: Dj, stop: Stop | None) -> str:
    """The stopped site: numbers, histogram, largest neurons, and the logit lens over the layers and here."""
    if stop is None:
        return "not at a stop"
    flat = stop.value[-1].detach().float().cpu().flatten()
    top = flat.abs().topk(min(5, flat.numel())).indices.tolist()
    return "\n".join(
        (
            shows.stopped(stop, dj),
            render.histogram(flat),
            "largest  " + "  ".join(f"{i}: {flat[i]:+.2f}" for i in top),
            shows.lens(dj, stop),
        )
    )
