"""Breakpoints of the debugger, and the commands about them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from djinn_fx.debugger.conditions import predicate, predicate_python
from djinn_fx.debugger.words import number, numbers
from djinn_fx.errors import InvalidValue
from djinn_fx.runtime.breakpoints import arm_breakpoints
from djinn_fx.runtime.stop import Stop
from djinn_fx.sites import Site
from djinn_fx.specs import Breakpoint, break_at

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger

_BREAK = re.compile(r"(?P<site>\S+?)(?:\s+if\s+(?P<when>.+?))?(?:\s+times\s+(?P<times>\d+))?$")


@dataclass
class Point:
    """A breakpoint.

    Attributes:
        spec: what runs are given.
        text: what was said after ``break``.
        python: the name that echoed Python gives it.
        sites: where it stops.
        temporary: whether it goes once it was hit.
        enabled: whether runs are given it.
        hits: how often it was hit.
    """

    spec: Breakpoint
    text: str
    python: str
    sites: frozenset[str]
    temporary: bool = False
    enabled: bool = True
    hits: int = 0

    @property
    def line(self) -> str:
        """What it is, for a list."""
        kind = "once" if self.temporary else "keep"
        hits = f"  hit {self.hits} time{'s' * (self.hits != 1)}" if self.hits else ""
        return f"{kind}  {'on ' if self.enabled else 'off'}  {self.text}{hits}"

    def held(self, stop: Stop) -> bool:
        """Whether it is one of those that stopped a run here; the value must be as the stop found it."""
        if not self.enabled or stop.site not in self.sites or not stop.fired:
            return False
        if self.spec.when is None:
            return True
        rows = [row for row, position in enumerate(stop.positions) if position in stop.fired]
        return bool(torch.func.vmap(self.spec.when)(stop.value.detach()[rows]).any())


def listed(points: Mapping[int, Point]) -> str:
    """All breakpoints, a line each."""
    return "\n".join(f"{n:<3} {point.line}" for n, point in points.items()) or "no breakpoints"


def break_(d: Debugger, rest: str) -> None:
    """List breakpoints, or make one."""
    if rest:
        _make(d, rest, temporary=False)
    else:
        d.write(listed(d.points))


def tbreak(d: Debugger, rest: str) -> None:
    """Make a breakpoint that goes once it was hit."""
    _make(d, rest, temporary=True)


def _make(d: Debugger, rest: str, *, temporary: bool) -> None:
    match = _BREAK.match(rest)
    if match is None:
        raise InvalidValue(f"cannot read {rest!r}: break SITE [if EXPR] [times N].")
    site, condition = match["site"], match["when"]
    times = 1 if temporary else number(match["times"], "number of times") if match["times"] else None
    found = d.dj.sites.select(site)
    spec = break_at(site, predicate(condition) if condition else None, times=times)
    python = [repr(site)]
    if condition:
        python.append(f"when={predicate_python(condition, _sample(d, found[0]))}")
    if times:
        python.append(f"times={times}")
    d.compile_in(found)
    engine = d.dj.engine
    arm_breakpoints([spec], engine.table, engine.sites, engine.dtype, engine.device)  # tries the condition
    d.made += 1
    name = f"b{d.made}"
    d.points[d.made] = Point(spec, rest, name, frozenset(s.name for s in found), temporary)
    d.say_python(f"{name} = djinn.break_at({', '.join(python)})")
    d.watch()
    kind = "temporary breakpoint" if temporary else "breakpoint"
    d.write(f"{kind} {d.made} at {', '.join(s.name for s in found)}" + (f" if {condition}" if condition else ""))


def _sample(d: Debugger, site: Site) -> torch.Tensor:
    """One position's value of a site, zeros."""
    engine = d.dj.engine
    return torch.zeros(site.feature_shape, dtype=site.dtype or engine.dtype, device=engine.device)


def _chosen(d: Debugger, rest: str) -> list[int]:
    """The breakpoints that somebody names; all where he names none."""
    chosen = list(d.points) if rest in ("", "all") else numbers(rest, "breakpoint")
    for one in chosen:
        if one not in d.points:
            raise InvalidValue(f"no breakpoint {one}; `break` lists them.")
    return chosen


def delete(d: Debugger, rest: str) -> None:
    """Remove breakpoints."""
    for one in _chosen(d, rest):
        del d.points[one]
    d.watch()


def enable(d: Debugger, rest: str) -> None:
    """Let breakpoints stop runs again."""
    _switch(d, rest, on=True)


def disable(d: Debugger, rest: str) -> None:
    """Keep breakpoints, but let runs pass."""
    _switch(d, rest, on=False)


def _switch(d: Debugger, rest: str, *, on: bool) -> None:
    for one in _chosen(d, rest):
        d.points[one].enabled = on
    d.watch()
