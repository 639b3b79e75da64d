"""The debugger without a screen: lines in, text out. Every command is a thin call of the public API."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from djinn_fx.debugger import commands, shows
from djinn_fx.debugger.conditions import summaries
from djinn_fx.debugger.expressions import ExpressionError, parse
from djinn_fx.dj import Dj
from djinn_fx.errors import DjinnError
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from djinn_fx.specs import Breakpoint, break_at


class CommandError(DjinnError):
    """A command that cannot be carried out; the message says what to write instead."""


@dataclass(frozen=True)
class Point:
    """A breakpoint of the debugger: what it is, and the command that made it."""

    spec: Breakpoint
    text: str
    python: str


@dataclass
class Debugger:
    """Carries out the debugger's commands.

    Attributes:
        dj: the compiled model.
        write: gets each piece of output, without its last newline.
        prompt: what ``run`` runs where it is given nothing.
        max_new_tokens: tokens that a run generates at most.
        echo: whether the Python that a command stands for is written before its output, as ``>>> line``.
        interruptible: whether runs may be stopped by :meth:`interrupt`.
        sessions: sessions by number: the run's own is 1, its forks follow; None where one was closed.
        current: number of the session that commands act on; 0 before the first run.
        points: breakpoints by number.
        history: the lines so far.
        done: whether ``quit`` was said.
    """

    dj: Dj
    write: Callable[[str], None]
    prompt: str = ""
    max_new_tokens: int = 40
    echo: bool = False
    interruptible: bool = False
    sessions: dict[int, Session] = field(default_factory=dict)
    current: int = 0
    points: dict[int, Point] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    done: bool = False
    made: int = 0
    wish: threading.Event = field(default_factory=threading.Event)

    # -- lines ---------------------------------------------------------------------------------

    def execute(self, line: str) -> bool:
        """Carry out one line; an error is written, never raised. Returns whether it succeeded."""
        line = line.strip()
        if not line or line.startswith("#"):
            return True
        self.history.append(line)
        word, _, rest = line.partition(" ")
        try:
            commands.find(word).act(self, rest.strip())
        except ExpressionError as error:
            self.write(f"error: {error}")
        except (DjinnError, OSError, ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            self.write(f"error: {type(error).__name__}: {error}")
        else:
            return True
        return False

    def run_script(self, lines: Iterable[str], *, strict: bool = False) -> int:
        """Carry out lines, each written as ``(djinn) line`` first. Returns 0, or 1 if a command failed.

        Args:
            lines: the commands; empty ones and those that begin with ``#`` are passed over.
            strict: end at the first that fails.
        """
        failed = 0
        for line in lines:
            if line.strip() and not line.strip().startswith("#"):
                self.write(f"(djinn) {line.strip()}")
            if not self.execute(line):
                failed = 1
                if strict:
                    break
            if self.done:
                break
        return failed

    def say_python(self, *lines: str) -> None:
        """Write the Python of a command, where echo is on."""
        if self.echo:
            for line in lines:
                self.write(f">>> {line}")

    # -- where it stands -----------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The session that commands act on."""
        if self.current not in self.sessions:
            raise CommandError("nothing runs yet; say `run` or `run A PROMPT`.")
        return self.sessions[self.current]

    @property
    def run(self) -> Run:
        """The current session's run."""
        run = self.session.run
        if run is None:
            raise CommandError("this session has no run; say `run A PROMPT`.")
        return run

    @property
    def stop(self) -> Stop:
        """Where the current session stands."""
        stop = self.run.stop
        if stop is None:
            how = (
                "has finished; say `rewind POSITION SITE`" if self.run.finished else "is not at a stop; say `continue`"
            )
            raise CommandError(f"the run {how} or `run`.")
        return stop

    def names(self, source: str | None = None) -> dict[str, Any]:
        """What an expression may name here."""
        stop = self.stop
        h = stop.value.detach()
        fixed = {
            "h": h, "tokens": stop.tokens, "position": stop.position, "layer": stop.layer, "width": h[-1].numel(),
            "unembed": self.dj.unembed,
        }  # fmt: skip
        return {**fixed, **(summaries(parse(source), h[-1]) if source else {})}

    def python_names(self) -> dict[str, str]:
        """How Python says :meth:`names`."""
        at = f"stop{self.current}"
        return {
            "h": f"{at}.value", "tokens": f"{at}.tokens", "position": f"{at}.position", "layer": f"{at}.layer",
            "width": f"{at}.value[-1].numel()", "unembed": "dj.unembed",
        }  # fmt: skip

    # -- acts shared by commands ---------------------------------------------------------------

    def specs(self) -> list[Breakpoint]:
        """The breakpoints in force, and the one that :meth:`interrupt` fires."""
        own = [point.spec for point in self.points.values()]
        return own if not self.interruptible else [*own, break_at(self.dj.compiled_sites[-1], when=self._wished)]

    def specs_python(self) -> str:
        """The breakpoints in force, as a Python list."""
        return f"[{', '.join(point.python for point in self.points.values())}]"

    def watch(self) -> None:
        """Put the breakpoints in force at every session."""
        for number, session in self.sessions.items():
            session.watch(self.specs())
            self.say_python(f"s{number}.watch({self.specs_python()})")

    def interrupt(self) -> None:
        """Stop the current run at its next step; callable from any thread."""
        self.wish.set()

    def _wished(self, h: torch.Tensor) -> torch.Tensor:
        return torch.full_like(h.flatten()[0], self.wish.is_set(), dtype=torch.bool)

    def close_sessions(self) -> None:
        """Close every session."""
        for session in self.sessions.values():
            session.close()
        self.sessions.clear()
        self.current = 0

    def arrived(self, stop: Stop | None) -> None:
        """Write where the current run stands."""
        self.wish.clear()
        self.write(shows.finished(self.run) if stop is None else shows.stopped(stop, self.dj))

    def adopt(self, stops: Sequence[Stop]) -> list[int]:
        """Number the sessions of some forks."""
        first = max(self.sessions, default=0) + 1
        for number, stop in enumerate(stops, start=first):
            self.sessions[number] = stop.session
        return list(range(first, first + len(stops)))
