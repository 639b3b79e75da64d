"""The debugger with a screen: layers, the stopped site and a command line, over :class:`Debugger`."""

from __future__ import annotations

import threading
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Footer, Input, OptionList, RichLog, Static
from textual.widgets.option_list import Option

from djinn_fx.debugger import commands
from djinn_fx.debugger.interpreter import Debugger
from djinn_fx.debugger.panes import site_text, token_line
from djinn_fx.dj import Dj


class DebuggerApp(App[None]):
    """The terminal program.

    Commands run one at a time in a worker thread; Ctrl-C stops the run at its next step and keeps it.
    """

    CSS_PATH = "style.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "interrupt", "stop the run", priority=True),
        Binding("ctrl+l", "layers", "layers", priority=True),
        Binding("ctrl+q", "leave", "quit", priority=True),
        Binding("tab", "complete", "complete", priority=True),
        Binding("up", "recall(-1)", "", show=False),
        Binding("down", "recall(1)", "", show=False),
    ]

    def __init__(self, dj: Dj, prompt: str, max_new_tokens: int = 40, *, echo: bool = False) -> None:
        super().__init__()
        self.debugger = Debugger(
            dj, self._write, prompt=prompt, max_new_tokens=max_new_tokens, echo=echo, interruptible=True
        )
        self.busy = threading.Lock()
        self.place = 0

    def compose(self) -> ComposeResult:
        """The panes."""
        yield Static(id="tokens", markup=False)
        with Horizontal():
            yield OptionList(id="layers", markup=False)
            with Vertical():
                yield Static(id="site", markup=False)
                yield RichLog(id="log", wrap=True, min_width=0, markup=False)
        yield Input(placeholder="help, break resid_post.1 if norm > 40, run, continue, step", id="line")
        yield Footer()

    def on_mount(self) -> None:
        """Show where it stands, and wait for a line."""
        self._refresh()
        self.query_one("#line", Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Carry out the line, unless another is still running."""
        if self.busy.locked():
            self._tell("still running; Ctrl-C stops the run at its next step.")
            return
        event.input.value, line = "", event.value
        self._tell(f"(djinn) {line}")
        self._carry_out(line)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Toggle the breakpoint of a layer (Enter or mouse)."""
        site = str(event.option.id)
        numbers = [number for number, point in self.debugger.points.items() if point.text == site]
        if not self.busy.locked():
            self._carry_out(f"delete {numbers[0]}" if numbers else f"break {site}")

    @work(thread=True, exit_on_error=False)
    def _carry_out(self, line: str) -> None:
        with self.busy:
            self.debugger.execute(line)
        self.call_from_thread(self._refresh)

    def _write(self, text: str) -> None:
        self.call_from_thread(self._tell, text)

    def _tell(self, text: str) -> None:
        self.query_one("#log", RichLog).write(Text(text))

    def _refresh(self) -> None:
        debugger = self.debugger
        if debugger.done:
            self.exit()
            return
        self.place = len(debugger.history)
        stop = debugger.sessions[debugger.current].run if debugger.current in debugger.sessions else None
        here = stop.stop if stop is not None else None
        armed = {site.name for p in debugger.points.values() for site in debugger.dj.sites.select(p.spec.site)}
        layers = self.query_one("#layers", OptionList)
        chosen = layers.highlighted
        layers.clear_options()
        for name in debugger.dj.compiled_sites:
            mark = ("o" if name in armed else " ") + (">" if here is not None and here.site == name else " ")
            layers.add_option(Option(f"{mark} {name}", id=name))
        layers.highlighted = chosen
        self.query_one("#tokens", Static).update(token_line(debugger))
        self.query_one("#site", Static).update(site_text(debugger.dj, here))

    def action_interrupt(self) -> None:
        """Stop the run at its next step."""
        if self.busy.locked():
            self.debugger.interrupt()

    def action_layers(self) -> None:
        """Go to the layers, or back to the command line."""
        line = self.query_one("#line", Input)
        (self.query_one("#layers", OptionList) if line.has_focus else line).focus()

    def action_leave(self) -> None:
        """Leave."""
        self.exit()

    def action_complete(self) -> None:
        """Complete the line; several: list them."""
        line = self.query_one("#line", Input)
        found = commands.complete(line.value, self.debugger.dj.sites.names)
        if len(found) == 1:
            line.value = found[0] + " "
            line.cursor_position = len(line.value)
        elif found:
            self._tell("  ".join(item.rpartition(" ")[2] for item in found[:40]))

    def action_recall(self, by: int) -> None:
        """An earlier or later line."""
        history = self.debugger.history
        self.place = max(0, min(len(history), self.place + by))
        line = self.query_one("#line", Input)
        line.value = history[self.place] if self.place < len(history) else ""
        line.cursor_position = len(line.value)
