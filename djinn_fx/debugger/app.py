"""The debugger with a screen: tokens, layers, the stopped site and a command line, over :class:`Debugger`."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Footer, Input, OptionList, RichLog, Static
from textual.widgets.option_list import Option

from djinn_fx.debugger import commands, panes
from djinn_fx.debugger.opening import Opening
from djinn_fx.debugger.tokens import Tokens
from djinn_fx.views import visible

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger
    from djinn_fx.dj import Dj
    from djinn_fx.runtime.stop import Stop


class DebuggerApp(App[None]):
    """The terminal program.

    The screen is there at once; a worker thread opens the model meanwhile. Commands run one at a time in a worker
    thread too; Ctrl-C stops the run at its next step and keeps it.

    Attributes:
        unopened: why the model could not be opened; empty where it was.
    """

    CSS_PATH = "style.tcss"
    TITLE = "djinn-fx debug"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "interrupt", "stop the run", priority=True),
        Binding("ctrl+l", "go('layers')", "layers", priority=True),
        Binding("ctrl+t", "go('tokens')", "tokens", priority=True),
        Binding("ctrl+q", "leave", "quit", priority=True),
        Binding("tab", "complete", "complete", priority=True),
        Binding("escape", "go('line')", "", show=False),
        Binding("up", "recall(-1)", "", show=False),
        Binding("down", "recall(1)", "", show=False),
    ]

    def __init__(self, opening: Opening, prompt: str | None, max_new_tokens: int = 40, *, echo: bool = False) -> None:
        super().__init__()
        self.opening, self.prompt, self.max_new_tokens, self.echo = opening, prompt, max_new_tokens, echo
        self.model: Dj | None = None
        self.debugger: Debugger | None = None
        self.busy = threading.Lock()
        self.place = 0
        self.doing, self.since, self.unopened = "", 0.0, ""

    def compose(self) -> ComposeResult:
        """The panes."""
        yield Tokens(id="tokens", markup=False)
        with Horizontal():
            yield OptionList(id="layers", markup=False)
            with Vertical():
                with VerticalScroll(id="site", can_focus=False):
                    yield Static(id="value", markup=False)
                yield RichLog(id="log", wrap=True, min_width=0, markup=False)
        yield Static(id="busy", markup=False)
        yield Input(placeholder="help, break resid_post.1 if norm > 40, run, continue, step", id="line")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to open the model."""
        for pane in ("tokens", "layers", "site", "log"):
            self.query_one(f"#{pane}").border_title = pane
        self.query_one("#value", Static).update(Text("opening", panes.DIM))
        self.query_one("#line", Input).focus()
        self.set_interval(0.2, self._tick)
        self._open()

    # -- the model -----------------------------------------------------------------------------

    @work(thread=True, exit_on_error=False)
    def _open(self) -> None:
        with self.busy:
            self._begin("opening")
            try:
                dj, default = self.opening(self._begin)
            except Exception as error:  # whatever a model's own code raises
                self.unopened = f"{type(error).__name__}: {error}"
                self.call_from_thread(self.exit, return_code=2)
                return
            from djinn_fx.debugger.interpreter import Debugger

            self.model = dj
            self.debugger = Debugger(
                dj, self._write, prompt=self.prompt or default, max_new_tokens=self.max_new_tokens, echo=self.echo
            )
        self.call_from_thread(self._opened)

    def _opened(self) -> None:
        if self.model is not None:
            self._tell(f"{self.model!r}\n`help` lists the commands", panes.DIM)
        self._refresh()

    def _begin(self, doing: str) -> None:
        """Note what is being done, from any thread."""
        self.doing, self.since = doing, time.monotonic()

    def _tick(self) -> None:
        busy = self.busy.locked()
        self.screen.set_class(busy, "busy")
        if busy:
            taken = time.monotonic() - self.since
            dots = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(taken * 5) % 10]
            self.query_one("#busy", Static).update(f"{dots} {self.doing}  {taken:.0f} s")

    # -- lines ---------------------------------------------------------------------------------

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Carry out the line, unless another is still running; an empty one repeats a step."""
        if self.busy.locked() or self.debugger is None:
            self._tell(f"still {self.doing}; Ctrl-C stops a run at its next step.", panes.DIM)
            return
        line = event.value.strip() or commands.again(self.debugger.history)
        event.input.value = ""
        if line:
            self._tell(f"(djinn) {line}", "bold")
            self._carry_out(line)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Toggle the breakpoint of a layer (Enter or mouse)."""
        site = str(event.option.id)
        if self.debugger is not None and not self.busy.locked():
            numbers = [number for number, point in self.debugger.points.items() if point.text == site]
            self._carry_out(f"delete {numbers[0]}" if numbers else f"break {site}")

    def on_tokens_chosen(self, event: Tokens.Chosen) -> None:
        """Rewind to a token (Enter)."""
        if not self.busy.locked():
            self._tell(f"(djinn) rewind {event.position}", "bold")
            self._carry_out(f"rewind {event.position}")

    @work(thread=True, exit_on_error=False)
    def _carry_out(self, line: str) -> None:
        debugger = self.debugger
        assert debugger is not None
        with self.busy:
            self._begin(line)
            debugger.execute(line)
            stop = self._stop()
            shown = None if debugger.done else self._site(stop)
        self.call_from_thread(self._refresh, shown)

    def _site(self, stop: Stop | None) -> Text:
        """The pane of the stopped site; it computes, so a worker makes it."""
        assert self.debugger is not None
        width = self.query_one("#value").content_size.width or 60
        try:
            return panes.site_of(self.debugger.dj, stop, width)
        except Exception as error:  # the pane shall not take the program with it
            return Text(f"{type(error).__name__}: {error}", panes.BAD)

    def _stop(self) -> Stop | None:
        debugger = self.debugger
        if debugger is None or debugger.current not in debugger.sessions:
            return None
        run = debugger.sessions[debugger.current].run
        return None if run is None else run.stop

    def _write(self, text: str) -> None:
        style = panes.BAD if text.startswith("error: ") else panes.DIM if text.startswith(">>> ") else ""
        self.call_from_thread(self._tell, text, style)

    def _tell(self, text: str, style: str = "") -> None:
        self.query_one("#log", RichLog).write(Text(visible(text), style))

    # -- what is shown -------------------------------------------------------------------------

    def _refresh(self, shown: Text | None = None) -> None:
        debugger = self.debugger
        if debugger is None:
            return
        if debugger.done:
            self.exit()
            return
        self.place = len(debugger.history)
        stop = self._stop()
        self._show_layers(debugger, stop)
        tokens = self.query_one("#tokens", Tokens)
        tokens.show(debugger)
        self.query_one("#value", Static).update(shown if shown is not None else Text("not at a stop", panes.DIM))
        self.query_one("#site").border_title = (
            "site" if stop is None else f"{stop.site} · position {stop.position} · {stop.phase}"
        )
        self.call_after_refresh(self.query_one("#log", RichLog).scroll_end, animate=False)  # the pane may be lower now
        tokens.border_title = f"tokens · session {debugger.current}" if debugger.current else "tokens"

    def _show_layers(self, debugger: Debugger, stop: Stop | None) -> None:
        points = list(debugger.points.values())
        armed = {name for point in points if point.enabled for name in point.sites}
        disabled = {name for point in points if not point.enabled for name in point.sites}
        steered = debugger.session.handles if debugger.current in debugger.sessions else {}
        layers = self.query_one("#layers", OptionList)
        chosen = layers.highlighted
        layers.clear_options()
        for name in debugger.dj.compiled_sites:
            here = stop is not None and stop.site == name
            line = panes.layer(name, armed=name in armed, disabled=name in disabled, here=here, steered=name in steered)
            layers.add_option(Option(line, id=name))
        if stop is not None and stop.site in debugger.dj.compiled_sites and not layers.has_focus:
            chosen = debugger.dj.compiled_sites.index(stop.site)  # and into sight
        layers.highlighted = chosen

    # -- keys ----------------------------------------------------------------------------------

    def action_interrupt(self) -> None:
        """Stop the run at its next step."""
        if self.busy.locked() and not (self.debugger is not None and self.debugger.interrupt()):
            self._tell(f"no run to stop; still {self.doing}. Ctrl-Q leaves.", panes.DIM)

    def action_go(self, pane: str) -> None:
        """Go to a pane, or from there back to the command line."""
        wanted, line = self.query_one(f"#{pane}"), self.query_one("#line", Input)
        (line if wanted.has_focus else wanted).focus()

    def action_leave(self) -> None:
        """Leave; a run that goes is stopped first."""
        if self.debugger is not None:
            self.debugger.interrupt()
        self.exit()

    def action_complete(self) -> None:
        """Complete the line; several: list them."""
        line = self.query_one("#line", Input)
        if self.debugger is None or not line.has_focus:
            return
        found = commands.complete(line.value, self.debugger.dj.sites.names)
        if len(found) == 1:
            line.value = found[0] + " "
            line.cursor_position = len(line.value)
        elif found:
            self._tell("  ".join(item.rpartition(" ")[2] for item in found[:40]), panes.DIM)

    def action_recall(self, by: int) -> None:
        """An earlier or later line."""
        if self.debugger is None:
            return
        history = self.debugger.history
        self.place = max(0, min(len(history), self.place + by))
        line = self.query_one("#line", Input)
        line.value = history[self.place] if self.place < len(history) else ""
        line.cursor_position = len(line.value)

    def close(self) -> None:
        """Give the model back, once the program has ended and the last command with it."""
        with self.busy:
            if self.model is not None:
                self.model.close()
