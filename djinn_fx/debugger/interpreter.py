"""The debugger without a screen: lines in, text out. Every command is a thin call of the public API."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from djinn_fx import __version__
from djinn_fx.debugger import commands, shows
from djinn_fx.debugger.bounds import Sized
from djinn_fx.debugger.conditions import SUMMARIES, summaries
from djinn_fx.debugger.expressions import ExpressionError, parse
from djinn_fx.debugger.points import Point
from djinn_fx.debugger.words import listed
from djinn_fx.dj import Dj
from djinn_fx.errors import DjinnError, InvalidValue
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from djinn_fx.sites import Site
from djinn_fx.specs import Breakpoint


class CommandError(DjinnError):
    """A command that cannot be carried out; the message says what to write instead."""


@dataclass
class Debugger:
    """Carries out the debugger's commands.

    Attributes:
        dj: the compiled model.
        write: gets each piece of output, without its last newline.
        prompt: what ``run`` runs where it is given nothing.
        max_new_tokens: tokens that a run generates at most.
        echo: whether the Python that a command stands for is written before its output, as ``>>> line``.
        sessions: sessions by number: the run's own is 1, its forks follow; None where one was closed.
        current: number of the session that commands act on; 0 before the first run.
        points: breakpoints by number.
        history: the lines so far.
        done: whether ``quit`` was said.
        made: how many breakpoints were ever made.
        asked: whether the run that was last driven was asked to stop.
    """

    dj: Dj
    write: Callable[[str], None]
    prompt: str = ""
    max_new_tokens: int = 40
    echo: bool = False
    sessions: dict[int, Session] = field(default_factory=dict)
    current: int = 0
    points: dict[int, Point] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    done: bool = False
    made: int = 0
    asked: bool = False
    _going: Run | None = field(default=None, repr=False)

    # -- lines ---------------------------------------------------------------------------------

    def execute(self, line: str) -> bool:
        """Carry out one line; an error is written, never raised. Returns whether it succeeded."""
        line = line.strip()
        if not line or line.startswith("#"):
            return True
        self.history.append(line)
        word, _, rest = line.partition(" ")
        try:
            command = commands.find(word)
            if rest.strip() and not command.usage:
                raise CommandError(f"{command.name} takes nothing behind it, but was given {rest.strip()[:40]!r}.")
            command.act(self, rest.strip())
        except ExpressionError as error:
            self.write(f"error: {error}")
        except (DjinnError, OSError, torch.OutOfMemoryError) as error:
            self.write(f"error: {type(error).__name__}: {error}")
        except Exception as error:
            self.write(_unforeseen(error))
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
            "unembed": Sized(self.dj.unembed, self._unembedded),
        }  # fmt: skip
        return {**fixed, **(summaries(parse(source), h[-1]) if source else {})}

    def _unembedded(self, h: object = None, *rest: object) -> int:
        """Elements of the logits of some residuals."""
        if not isinstance(h, torch.Tensor) or rest:
            raise InvalidValue("unembed takes a residual: unembed(h[-1]).")
        return h.numel() // max(1, h.shape[-1] if h.dim() else 1) * self.dj.engine.options.vocab_size

    def python_names(self) -> dict[str, str]:
        """How Python says :meth:`names`."""
        at = f"stop{self.current}"
        summary = {name: form.format(h=f"{at}.value[-1]") for name, form in SUMMARIES.items()}
        return summary | {
            "h": f"{at}.value", "tokens": f"{at}.tokens", "position": f"{at}.position", "layer": f"{at}.layer",
            "width": f"{at}.value[-1].numel()", "unembed": "dj.unembed",
        }  # fmt: skip

    # -- acts shared by commands ---------------------------------------------------------------

    def specs(self) -> list[Breakpoint]:
        """The breakpoints in force."""
        return [point.spec for point in self.points.values() if point.enabled]

    def specs_python(self) -> str:
        """The breakpoints in force, as a Python list."""
        return f"[{', '.join(point.python for point in self.points.values() if point.enabled)}]"

    def compile_in(self, sites: Iterable[Site]) -> None:
        """Compile in those sites at which runs cannot stop or be steered yet."""
        missing = [site.name for site in sites if site.name not in self.dj.compiled_sites]
        if missing:
            self.dj.add_sites(missing)
            self.say_python(f"dj.add_sites({missing!r})")

    def watch(self) -> None:
        """Put the breakpoints in force at every session."""
        for number, session in self.sessions.items():
            session.watch(self.specs())
            self.say_python(f"s{number}.watch({self.specs_python()})")

    def drive(self, go: Callable[[], Stop | None]) -> Stop | None:
        """Let the current run go on; while it goes, :meth:`interrupt` stops it."""
        self.asked, self._going = False, self.run
        try:
            return go()
        finally:
            self._going = None

    def interrupt(self) -> bool:
        """Stop the run that goes at its next step; callable from any thread and signal handler.

        Returns:
            whether one goes that was not asked before.
        """
        run = self._going
        if run is None or self.asked:
            return False
        self.asked = True
        run.interrupt()
        return True

    def close_sessions(self) -> None:
        """Close every session."""
        for session in self.sessions.values():
            session.close()
        self.sessions.clear()
        self.current = 0

    def arrived(self, stop: Stop | None) -> None:
        """Write where the current run stands, and why; a temporary breakpoint that was hit goes."""
        if stop is None:
            self.write(shows.finished(self.run))
            return
        hit = [number for number, point in self.points.items() if point.held(stop)]
        for number in hit:
            self.points[number].hits += 1
        names = f"breakpoint{'s' * (len(hit) > 1)} {', '.join(map(str, hit))}: " if hit else ""
        if names and len(stop.fired) < len(stop.positions):
            names = f"{names[:-2]}, which held at {listed(stop.fired)}: "
        self.write((names or ("interrupted: " if self.asked else "")) + shows.stopped(stop, self.dj))
        gone = [number for number in hit if self.points[number].temporary]
        for number in gone:
            del self.points[number]
        if gone:
            self.watch()

    def adopt(self, stops: Sequence[Stop]) -> list[int]:
        """Number the sessions of some forks."""
        first = max(self.sessions, default=0) + 1
        for number, stop in enumerate(stops, start=first):
            self.sessions[number] = stop.session
        return list(range(first, first + len(stops)))


def _unforeseen(error: Exception) -> str:
    """What is said of an error that should have been another one: enough for a report."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "djinn_fx" in frame.filename] or list(frames)
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
    return (
        f"error: {type(error).__name__}: {error}\n"
        "This is a defect of djinn-fx; nothing else was lost. Please report it: these lines, what `history` shows, "
        f"and djinn-fx {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}, {where}."
    )
