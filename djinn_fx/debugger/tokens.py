"""The pane of tokens: a cursor to walk over them, and to go back to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Static

from djinn_fx.debugger import panes

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger


class Tokens(Static, can_focus=True):
    """Prompt and generated tokens; Left and Right walk over them, Enter rewinds to the one chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "walk(-1)", "back", show=False),
        Binding("right", "walk(1)", "on", show=False),
        Binding("home", "walk(-1000000)", "first", show=False),
        Binding("end", "walk(1000000)", "last", show=False),
        Binding("enter", "choose", "rewind here", show=True),
    ]

    class Chosen(Message):
        """Somebody wants to go back to a position."""

        def __init__(self, position: int) -> None:
            super().__init__()
            self.position = position

    chosen: int | None = None
    debugger: Debugger | None = None

    def show(self, debugger: Debugger) -> None:
        """Show where a debugger stands."""
        self.debugger, self.chosen = debugger, None
        self.update(panes.tokens_of(debugger))

    def action_walk(self, by: int) -> None:
        """Choose an earlier or later token, at first from where the run stands."""
        debugger = self.debugger
        if debugger is None or debugger.current not in debugger.sessions:
            return
        count = len(debugger.session.tokens)
        run = debugger.session.run
        stop = run.stop if run is not None else None
        begin = self.chosen if self.chosen is not None else stop.position if stop is not None else count
        self.chosen = max(0, min(count - 1, begin + by))
        token = int(debugger.session.tokens[self.chosen])
        self.border_subtitle = f"position {self.chosen}, token {token}; Enter rewinds here"
        self.update(panes.tokens_of(debugger, self.chosen))

    def action_choose(self) -> None:
        """Ask for a rewind to the chosen token."""
        if self.chosen is not None:
            self.post_message(self.Chosen(self.chosen))
            self.border_subtitle = ""

    def on_blur(self) -> None:
        """Forget the choice."""
        if self.debugger is not None:
            self.show(self.debugger)
        self.border_subtitle = ""
