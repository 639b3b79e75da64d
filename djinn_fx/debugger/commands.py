"""The debugger's commands: each a name, its usage, a sentence, and a thin call of the public API."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from djinn_fx.debugger import acts
from djinn_fx.errors import InvalidValue

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger

Act = Callable[["Debugger", str], None]


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: its full name.
        usage: what follows the name.
        says: what it does, in a sentence.
        act: carries it out, given what follows the name.
    """

    name: str
    usage: str
    says: str
    act: Act


def _help(debugger: Debugger, rest: str) -> None:
    chosen = [find(rest)] if rest else COMMANDS
    debugger.write("\n".join(f"{f'{command.name} {command.usage}':<44} {command.says}" for command in chosen))


COMMANDS: tuple[Command, ...] = (
    Command("break", "SITE [if EXPR] [times N]", "stop after a site; alone: list breakpoints", acts.break_),
    Command("delete", "[NUMBER]", "remove a breakpoint, or all", acts.delete),
    Command("run", "[PROMPT]", "begin again, to the first breakpoint", acts.run),
    Command("continue", "", "go on to the next breakpoint", acts.continue_),
    Command("step", "[token]", "to the next compiled site, or to this site one token on", acts.step),
    Command("print", "EXPR", "a value, such as h[-1].norm()", acts.print_),
    Command("set", "TARGET OP EXPR", "change the activation: set h *= 0.9, set h[-1] = 0", acts.set_),
    Command("steer", "SITE scale X | add FILE [STRENGTH] | ablate FILE", "edit a site from here on", acts.steer),
    Command("unsteer", "SITE", "end an edit", acts.unsteer),
    Command("fork", "[N]", "copies of this run, stopped at the same place", acts.fork),
    Command("switch", "NUMBER", "act on another fork", acts.switch),
    Command("forks", "", "list the forks", acts.forks),
    Command("diff", "A B", "tokens and logits of two forks side by side", acts.diff_),
    Command("rewind", "POSITION [SITE]", "go back to a position and stop there", acts.rewind),
    Command("lens", "", "the logit lens over the layers and here", acts.lens),
    Command("nan", "", "the first site with a NaN or an infinity", acts.nan),
    Command("save", "FILE", "checkpoint the current session", acts.save),
    Command("load", "FILE", "restore a checkpoint as another fork", acts.load),
    Command("receipt", "", "how exact the compiled model was measured to be", acts.receipt),
    Command("memory", "", "bytes by component", acts.memory),
    Command("sites", "[PATTERN]", "names of the sites; * marks those compiled in", acts.sites),
    Command("tokens", "", "the session's tokens with their positions", acts.tokens),
    Command("history", "", "the lines so far", acts.history),
    Command("echo", "on|off", "show the Python of each command", acts.echo),
    Command("help", "[COMMAND]", "this list", _help),
    Command("quit", "", "leave", acts.quit_),
)


def find(word: str) -> Command:
    """The command that a name or an unambiguous prefix stands for.

    Raises:
        InvalidValue: none, or several.
    """
    fits = [command for command in COMMANDS if command.name.startswith(word)]
    exact = [command for command in fits if command.name == word]
    if len(exact or fits) == 1:
        return (exact or fits)[0]
    if fits:
        raise InvalidValue(f"{word!r} may be {', '.join(command.name for command in fits)}; write more of it.")
    raise InvalidValue(f"no command {word!r}; `help` lists them.")


def complete(line: str, sites: tuple[str, ...]) -> list[str]:
    """Whole lines that a line may become: commands first, then sites."""
    head, space, last = line.rpartition(" ")
    pool = sites if space else tuple(command.name for command in COMMANDS)
    if space and re.match(r"help\b", head):
        pool = tuple(command.name for command in COMMANDS)
    return [f"{head}{space}{word}" for word in pool if word.startswith(last)]
