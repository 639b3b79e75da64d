"""Commands about several sessions: fork, switch, forks, diff, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from djinn_fx.debugger.words import number
from djinn_fx.diff import diff
from djinn_fx.errors import CheckpointError, InvalidValue
from djinn_fx.runtime.wording import nbytes

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger


def fork(d: Debugger, rest: str) -> None:
    """Copies of this run."""
    count = number(rest, "number of forks") if rest else 1
    made = d.stop.fork(count)
    numbers = d.adopt(made)
    names = ", ".join(f"stop{n}" for n in numbers)
    d.say_python(f"{names}{',' if count == 1 else ''} = stop{d.current}.fork({count})")
    for one in numbers:
        d.say_python(f"s{one}, run{one} = stop{one}.session, stop{one}.run")
        d.say_python(f"s{one}.watch({d.specs_python()})")
        d.sessions[one].watch(d.specs())
    d.write(f"forked: {', '.join(map(str, numbers))}; `switch {numbers[0]}` acts on it")


def switch(d: Debugger, rest: str) -> None:
    """Act on another fork."""
    chosen = number(rest, "fork")
    if chosen not in d.sessions:
        raise InvalidValue(f"no fork {chosen}; there are {', '.join(map(str, d.sessions)) or 'none'}.")
    d.current = chosen
    d.say_python(f"# from here on: s{chosen}, run{chosen}, stop{chosen}")
    forks(d, "")


def forks(d: Debugger, rest: str) -> None:
    """List the forks."""
    lines = []
    for one, session in d.sessions.items():
        run, mark = session.run, "*" if one == d.current else " "
        stop = run.stop if run is not None else None
        where = f"at {stop.site}, position {stop.position}" if stop else "not at a stop"
        if run is not None and run.finished:
            where = f"finished: {run.finish_reason}"
        steered = f"  steered: {', '.join(session.handles)}" if session.handles else ""
        text = ((run.text if run else None) or "").strip()[-60:]
        lines.append(f"{mark}{one}  {where}{steered}  {text}".rstrip())
    d.write("\n".join(lines) or "nothing runs yet")


def diff_(d: Debugger, rest: str) -> None:
    """Two forks side by side."""
    words = rest.split()
    if len(words) != 2:
        raise InvalidValue("diff takes two forks: diff 1 2.")
    chosen = [number(word, "fork") for word in words]
    runs = [d.sessions[one].run if one in d.sessions else None for one in chosen]
    if runs[0] is None or runs[1] is None:
        raise InvalidValue(f"forks are {', '.join(map(str, d.sessions)) or 'none yet'}.")
    d.say_python(f"print(djinn.diff(run{chosen[0]}, run{chosen[1]}, dj=dj))")
    d.write(str(diff(runs[0], runs[1], dj=d.dj)))


def save(d: Debugger, rest: str) -> None:
    """Checkpoint the session; breakpoints stay with the debugger, since functions do not go into files."""
    session = d.session
    if not rest:
        raise InvalidValue("give a file: save a.safetensors.")
    path = str(Path(rest).expanduser())
    session.watch(())
    try:
        saved = session.checkpoint().wait().save(path)
    finally:
        session.watch(d.specs())
    s = f"s{d.current}"
    d.say_python(f"{s}.watch([])", f"{s}.checkpoint().wait().save({path!r})", f"{s}.watch({d.specs_python()})")
    d.write(f"saved {nbytes(Path(saved).stat().st_size)}")


def load(d: Debugger, rest: str) -> None:
    """Restore a checkpoint as another fork; ``anyway``: also one of another environment, such as other sites."""
    name = rest.removesuffix(" anyway")
    if not name:
        raise InvalidValue("give a file: load a.safetensors.")
    path, exact = str(Path(name).expanduser()), name == rest
    try:
        session = d.dj.restore(path, breakpoints=d.specs(), exact=exact)
    except CheckpointError as error:
        if "exact=False" not in str(error):
            raise
        raise CheckpointError(f"{error} Here that is `load {name} anyway`.") from error
    made = max(d.sessions, default=0) + 1
    d.sessions[made], d.current = session, made
    d.say_python(
        f"s{made} = dj.restore({path!r}, breakpoints={d.specs_python()}{'' if exact else ', exact=False'})",
        f"run{made} = s{made}.run",
        f"stop{made} = run{made}.stop if run{made} else None",
    )
    forks(d, "")
