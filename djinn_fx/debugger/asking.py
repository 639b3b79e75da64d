"""Commands that look and change nothing: print, lens, nan, info and their like; and those about the debugger itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from djinn_fx.debugger import forking, points, shows
from djinn_fx.debugger.expressions import explain
from djinn_fx.debugger.lens import lens_at
from djinn_fx.debugger.words import listed
from djinn_fx.errors import InvalidValue
from djinn_fx.runtime import wording
from djinn_fx.runtime.wording import nbytes, word

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger


def print_(d: Debugger, rest: str) -> None:
    """Print an expression."""
    value, python = explain(rest, d.names(rest), d.python_names())
    d.say_python(f"print({python})")
    d.write(shows.value(value))


def lens(d: Debugger, rest: str) -> None:
    """The logit lens."""
    at, found = f"stop{d.current}", lens_at(d.dj, d.stop)
    d.say_python(
        f'cache = dj.run_with_cache({at}, "resid_post", positions=-1, logits=False)[1]',
        'print(dj.unembed(cache.stack("resid_post", -1)[:, 0]).float().softmax(-1).topk(3))',
    )
    d.write(found.text())


def nan(d: Debugger, rest: str) -> None:
    """The first site with a NaN."""
    d.say_python(f"print(dj.first_nonfinite(s{d.current}))")
    found = d.dj.first_nonfinite(d.session)
    if found is None:
        d.write("all finite")
        return
    d.write(f"first non-finite: {found[0]}, {listed(found[1])}")


def receipt(d: Debugger, rest: str) -> None:
    """How exact it is."""
    d.say_python("print(dj.receipt)")
    d.write(str(d.dj.receipt or "not measured: the model was compiled with verify=False"))


def memory(d: Debugger, rest: str) -> None:
    """Bytes by component."""
    d.say_python("print(dj.memory())")
    d.write("\n".join(f"{name:<16} {nbytes(size):>12}" for name, size in d.dj.memory().items()))


def sites(d: Debugger, rest: str) -> None:
    """Names of sites."""
    found = d.dj.sites.select(rest or "*")
    d.say_python(f"print([site.name for site in dj.sites.select({rest or '*'!r})])")
    compiled = set(d.dj.compiled_sites)
    d.write("\n".join(f"{'*' if s.name in compiled else ' '} {s.name}" for s in found))


def tokens(d: Debugger, rest: str) -> None:
    """Tokens with positions."""
    known = d.session.tokens
    d.say_python(f"print(s{d.current}.tokens)")
    d.write("  ".join(f"{i}:{word(d.dj.engine, int(t))}" for i, t in enumerate(known)))


def info(d: Debugger, rest: str) -> None:
    """What there is: breakpoints, sessions, a site, edits."""
    word, _, what = rest.partition(" ")
    fits = [name for name in ("breakpoints", "sessions", "site", "edits") if word and name.startswith(word)]
    if not fits:
        raise InvalidValue("info breakpoints | sessions | site [NAME] | edits.")
    if fits[0] == "breakpoints":
        d.say_python(f"print([{', '.join(point.python for point in d.points.values())}])")
        d.write(points.listed(d.points))
    elif fits[0] == "sessions":
        d.say_python("print(dj.sessions)")
        forking.forks(d, "")
    elif fits[0] == "edits":
        handles = d.session.handles
        d.say_python(f"print(s{d.current}.handles)")
        d.write("\n".join(wording.edit(handle.edit) for handle in handles.values()) or "no edits")
    else:
        _site(d, what.strip())


def _site(d: Debugger, name: str) -> None:
    site = d.dj.sites.get(name or d.stop.site)
    d.say_python(f"print(dj.sites.get({site.name!r}))")
    lines = [shows.site(site, d.dj)]
    armed = [str(n) for n, point in d.points.items() if site.name in point.sites]
    if armed:
        lines.append(f"breakpoints {', '.join(armed)}")
    run = d.session.run if d.sessions else None
    here = run.stop if run is not None else None
    if here is not None and here.site == site.name:
        lines += [shows.stopped(here, d.dj), shows.neurons(here.value[-1])]
    d.write("\n".join(lines))


def history(d: Debugger, rest: str) -> None:
    """The lines so far."""
    d.write("\n".join(f"{n:>4}  {line}" for n, line in enumerate(d.history, start=1)))


def echo(d: Debugger, rest: str) -> None:
    """Python shown or not."""
    if rest not in ("on", "off"):
        raise InvalidValue("echo on, or echo off.")
    d.echo = rest == "on"


def quit_(d: Debugger, rest: str) -> None:
    """Leave."""
    d.close_sessions()
    d.done = True
