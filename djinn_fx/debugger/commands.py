"""The debugger's commands: each a name, its usage, a sentence, an example, and a thin call of the public API."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from djinn_fx.debugger import asking, changing, forking, moving, points
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
        examples: whole lines.
    """

    name: str
    usage: str
    says: str
    act: Act
    examples: tuple[str, ...]


def _help(debugger: Debugger, rest: str) -> None:
    if not rest:
        lines = [f"{f'{command.name} {command.usage}':<44} {command.says}" for command in COMMANDS]
        forms = "  ".join(f"{alias} {name}" for alias, name in SHORT.items())
        debugger.write("\n".join([*lines, f"short: {forms}", "help COMMAND shows examples"]))
        return
    command = find(rest)
    short = [alias for alias, name in SHORT.items() if name == command.name]
    lines = [f"{command.name} {command.usage}".rstrip() + (f"   (short: {', '.join(short)})" if short else "")]
    lines += [command.says, *(f"    {example}" for example in command.examples)]
    debugger.write("\n".join(lines))


COMMANDS: tuple[Command, ...] = (
    Command(
        "break", "SITE [if EXPR] [times N]", "stop after a site; alone: list breakpoints", points.break_,
        ("break resid_post.1", "break resid_post.* if norm > 40", "break attn_out.2 if h[3] < 0 and max > 2 times 3"),
    ),
    Command("tbreak", "SITE [if EXPR]", "stop after a site once", points.tbreak, ("tbreak resid_post.2",)),
    Command("delete", "[NUMBER ...]", "remove breakpoints, or all", points.delete, ("delete 1 3", "delete")),
    Command("disable", "[NUMBER ...]", "let runs pass breakpoints, or all", points.disable, ("disable 2",)),
    Command("enable", "[NUMBER ...]", "let breakpoints stop runs again", points.enable, ("enable 2", "enable")),
    Command(
        "info", "breakpoints|sessions|site [NAME]|edits", "what there is", asking.info,
        ("info breakpoints", "info site mlp_out.1", "i s"),
    ),
    Command(
        "run", "[PROMPT]", "begin again, to the first breakpoint", moving.run,
        ("run", "run It was a grey morning, and Mara felt sad."),
    ),
    Command("continue", "", "go on to the next breakpoint", moving.continue_, ("continue",)),
    Command(
        "step", "[N|token]", "to the next compiled site, or N on; or to this site one token on", moving.step,
        ("step", "step 3", "step token"),
    ),
    Command("next", "[N]", "to this site one token on, or N", moving.next_, ("next", "next 5")),
    Command(
        "rewind", "POSITION [SITE]", "go back to a position and stop there", moving.rewind,
        ("rewind 12", "rewind 17 resid_post.3"),
    ),
    Command(
        "print", "EXPR", "a value", asking.print_,
        ("print h[-1].norm()", "print topk(unembed(h[-1]), 3)", "print cosine(h[0], h[-1])"),
    ),
    Command(
        "set", "TARGET OP EXPR", "change the activation; OP is =, +=, -=, *= or /=", changing.set_,
        ("set h *= 0.9", "set h[-1] = 0", "set h[-1, 5] += norm / 2"),
    ),
    Command(
        "steer", "SITE scale X | add FILE [STRENGTH] | ablate FILE", "edit a site from here on", changing.steer,
        ("steer resid_post.1 scale 0.5", "steer resid_post.1 add mood.safetensors 2.0"),
    ),
    Command("unsteer", "SITE", "end an edit", changing.unsteer, ("unsteer resid_post.1",)),
    Command("fork", "[N]", "copies of this run, stopped at the same place", forking.fork, ("fork", "fork 3")),
    Command("switch", "NUMBER", "act on another fork", forking.switch, ("switch 2",)),
    Command("forks", "", "list the forks", forking.forks, ("forks",)),
    Command("diff", "A B", "tokens and logits of two forks side by side", forking.diff_, ("diff 1 2",)),
    Command("lens", "", "the logit lens over the layers, for this step as it is now", asking.lens, ("lens",)),
    Command("nan", "", "the first site of this session with a NaN or an infinity", asking.nan, ("nan",)),
    Command("save", "FILE", "checkpoint the current session", forking.save, ("save a.safetensors",)),
    Command(
        "load", "FILE [anyway]", "restore a checkpoint as another fork; anyway: though sites differ", forking.load,
        ("load a.safetensors", "load a.safetensors anyway"),
    ),
    Command("receipt", "", "how exact the compiled model was measured to be", asking.receipt, ("receipt",)),
    Command("memory", "", "bytes by component", asking.memory, ("memory",)),
    Command(
        "sites", "[PATTERN]", "names of the sites; * marks those compiled in", asking.sites,
        ("sites", "sites attn_out.*"),
    ),
    Command("tokens", "", "the session's tokens with their positions", asking.tokens, ("tokens",)),
    Command("history", "", "the lines so far", asking.history, ("history",)),
    Command("echo", "on|off", "show the Python of each command", asking.echo, ("echo on",)),
    Command("help", "[COMMAND]", "this list, or a command with examples", _help, ("help", "help break")),
    Command("quit", "", "leave", asking.quit_, ("quit",)),
)  # fmt: skip

#: Short forms, those of gdb.
SHORT: Mapping[str, str] = {
    "b": "break", "tb": "tbreak", "d": "delete", "i": "info", "r": "run", "c": "continue", "s": "step", "n": "next",
    "p": "print", "h": "help", "q": "quit",
}  # fmt: skip

#: What an empty line does again.
REPEATED = ("continue", "step", "next")


def find(word: str) -> Command:
    """The command that a name, a short form or an unambiguous prefix stands for.

    Raises:
        InvalidValue: none, or several.
    """
    word = SHORT.get(word, word)
    fits = [command for command in COMMANDS if command.name.startswith(word)]
    exact = [command for command in fits if command.name == word]
    if len(exact or fits) == 1:
        return (exact or fits)[0]
    if fits:
        raise InvalidValue(f"{word!r} may be {', '.join(command.name for command in fits)}; write more of it.")
    raise InvalidValue(f"no command {word!r}; `help` lists them.")


def again(history: list[str]) -> str:
    """What an empty line stands for: the last line, if that moved the run on."""
    word = history[-1].split(maxsplit=1)[0] if history else ""
    try:
        return history[-1] if word and find(word).name in REPEATED else ""
    except InvalidValue:
        return ""


def complete(line: str, sites: tuple[str, ...]) -> list[str]:
    """Whole lines that a line may become: commands first, then what each takes, else sites."""
    head, space, last = line.rpartition(" ")
    pool = sites if space else tuple(command.name for command in COMMANDS)
    if re.fullmatch(r"h(elp)?", head):
        pool = tuple(command.name for command in COMMANDS)
    elif re.fullmatch(r"i(nfo)?", head):
        pool = ("breakpoints", "edits", "sessions", "site")
    elif re.fullmatch(r"steer \S+", head):
        pool = ("ablate", "add", "scale")
    return [f"{head}{space}{word}" for word in pool if word.startswith(last)]
